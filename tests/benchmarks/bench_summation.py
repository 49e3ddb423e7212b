"""What ordinary summations lose and cost, beside the exact one.

    .venv/bin/python tests/benchmarks/bench_summation.py             # costs, then one JSON line
    .venv/bin/python tests/benchmarks/bench_summation.py --errors    # accuracy tables of docs/numerics.md

Errors are deterministic. A cost is the median ratio of interleaved repeats to the float64 loop of the same run, one
thread each; the exact sum folds one update at a time here, as the others do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from server_ref.aggregation import blocks
from server_ref.aggregation.exact import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation.summation import RunningSum, Summation, running_sum

EXACT = "exact, 3 bins"
METHODS = (*Summation, EXACT)
PLAN = AccumulatorPlan.for_bounds(max_abs=1e8, max_weight=1000, max_count=100_000, resolution=1e-8)


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


def empty(method: str, size: int) -> RunningSum | ExactAccumulator:
    return ExactAccumulator(size, PLAN) if method == EXACT else running_sum(Summation(method), size)


def mean(method: str, updates: np.ndarray, weights: list[int]) -> np.ndarray:
    total = empty(method, updates.shape[1])
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total.result()


# --- accuracy ---------------------------------------------------------------------------------------------------


def ranges(n: int, d: int) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    rng = np.random.default_rng(4)
    spread = 10.0 ** rng.uniform(-8, 8, (n, d))
    signs = rng.choice([-1, 1], (n, d))
    ones = [1] * n
    yield "1e-8..1e8, one sign", spread.astype(np.float32), ones
    yield "1e-8..1e8, both signs", (spread * signs).astype(np.float32), ones
    half = (spread * signs)[: n // 2 - 5].astype(np.float32)
    rest = (10.0 ** rng.uniform(-8, 0, (n - 2 * len(half), d))).astype(np.float32)
    yield "1e-8..1e8, large ones cancel", rng.permuted(np.concatenate([half, -half, rest]), axis=0), ones
    updates = rng.normal(0, 0.01, (n, d)).astype(np.float32)
    yield "updates of 0.01, weights 1..1000", updates, rng.integers(1, 1001, n).tolist()


def accuracy(n: int, d: int, orders: int) -> None:
    say(f"Means of {n} values at {d} coordinates: the worst coordinate, and the results of {orders} permutations.\n")
    say("| values | method | error / abs(sum) | error / sum of abs | not the nearest float32 | different results |")
    say("|---|---|---|---|---|---|")
    permutations = [np.random.default_rng(s).permutation(n) for s in range(orders)]
    for values, updates, weights in ranges(n, d):
        # Products of float32 and these weights are exact in float64, and fsum rounds their sum once.
        products = (updates.astype(np.float64) * np.array(weights)[:, None]).T.tolist()
        means = np.array([math.fsum(p) for p in products]) / sum(weights)
        sizes = np.array([math.fsum(map(abs, p)) for p in products]) / sum(weights)
        for method in METHODS:
            found = [mean(method, updates[p], [weights[i] for i in p]) for p in permutations]
            errors = np.abs(found[0] - means)
            relative, scaled = (errors / np.abs(means)).max(), (errors / sizes).max()
            wrong = np.mean(found[0].astype(np.float32) != means.astype(np.float32))
            distinct = len({f.tobytes() for f in found})
            say(f"| {values} | {method} | {relative:.1e} | {scaled:.1e} | {100 * wrong:.0f} % | {distinct} |")


def worked_case() -> None:
    values = (1.0, 1e8, 1.0, -1e8)
    exact = sum(map(Fraction, values))
    updates = np.array(values, np.float32)[:, None]
    say(f"\nThe sum of {list(values)}, which is {exact}:\n")
    say("| method | sum | error / abs(sum) | error / sum of abs |\n|---|---|---|---|")
    for method in METHODS:
        found = Fraction(float(mean(method, updates, [1] * 4)[0])) * 4
        error = abs(found - exact)
        say(f"| {method} | {float(found):g} | {float(error / exact):g} | {float(error / 200_000_002):.1e} |")


# --- cost -------------------------------------------------------------------------------------------------------


def costs(n: int, d: int, repeats: int) -> dict[str, float]:
    """Median time of a mean of n float32[d], over that of the float64 loop measured right before."""
    updates = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    weights = np.random.default_rng(1).integers(1, 1001, n).tolist()

    def seconds(job: Callable[[], object]) -> float:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    found = {}
    for method in METHODS:
        mean(method, updates[:1], weights[:1])
        ratios = []
        for _ in range(repeats):
            base = seconds(lambda: mean(Summation.NAIVE_FLOAT64, updates, weights))
            ratios.append(seconds(lambda method=method: mean(method, updates, weights)) / base)
        found[method] = statistics.median(ratios)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="print the accuracy tables instead")
    parser.add_argument("--repeats", type=int, default=9, help="repeats a figure is the median of (default: 9)")
    args = parser.parse_args()
    if args.errors:
        accuracy(n=1000, d=500, orders=20)
        worked_case()
        return 0
    blocks.THREADS = 1
    n, d = 30, 1_000_000
    figures = costs(n, d, args.repeats)
    say(f"Mean of {n} float32[{d}], one update at a time, one thread: time over that of the float64 loop.\n")
    say("| method | time | state, bytes a parameter |\n|---|---|---|")
    state = {}
    for method, ratio in figures.items():
        total = empty(method, d)
        for _ in range(n):
            total.add(np.ones(d, np.float32), 1)
        state[method] = total.nbytes / d
        say(f"| {method} | {ratio:.2f} | {state[method]:.3g} |")
    for method, ratio in figures.items():
        case = {"method": method, "time_over_float64": ratio, "state_bytes_a_parameter": state[method]}
        say(json.dumps({"bench": "summation", **case}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
