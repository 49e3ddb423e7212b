"""Memory: 100 million parameters from a stream of clients, and many rounds in one process. What is judged is bytes.

    .venv/bin/python tests/benchmarks/bench_large.py            # small instances of both (some seconds)
    .venv/bin/python tests/benchmarks/bench_large.py --large    # `make bench-large`: 100M parameters (2.6 GB)
    .venv/bin/python tests/benchmarks/bench_large.py --leak     # `make bench-leak`: 20,000 rounds in one process
    .venv/bin/python tests/benchmarks/bench_large.py --check    # exit status 1 if a bar is missed

Clients are made one after the other by a generator; each is clipped, folded exactly and forgotten. The figures are the
process's resident memory as the kernel counts it, beyond what it was when everything was loaded. One JSON line each.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client_sdk.protocol.clipping import clip_global, l2_norm
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.exact import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation.monitoring import DivergenceDetector, DivergenceState
from server_ref.aggregation.server_optim import Adam, ServerState
from server_ref.aggregation.warm import warm_up

MIB = 2**20
PLAN = AccumulatorPlan.for_bounds(max_abs=1024.0, max_weight=1000, max_count=100_000, resolution=1e-8)
CHECKED = 200
"""Coordinates that are compared with an exact sum."""


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Most bytes of this process that were ever in memory; getrusage would count those of its parent's, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def clients(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Updates and weights, one at a time."""
    for number in range(count):
        rng = np.random.default_rng(number)
        yield rng.standard_normal(size, dtype=np.float32), int(rng.integers(1, 1001))


def report(**figures: object) -> bool:
    say(json.dumps({"bench": "large", **figures}))
    return bool(figures["passed"])


# --- many parameters --------------------------------------------------------------------------------------------


def large(size: int, count: int) -> bool:
    """A weighted mean of ``count`` updates of ``size`` parameters.

    Held at once: the bins, one update, its clipped copy, and at the end the mean. A second update, or an array per
    client, breaks the bar.
    """
    places = np.random.default_rng(0).integers(0, size, CHECKED)
    before = resident()
    accumulator = ExactAccumulator(size, PLAN)
    clip_norm = math.sqrt(size) / 2
    seen, after_each, start = [], [], time.perf_counter()
    for update, weight in clients(count, size):
        clipped = clip_global(update, clip_norm).vector
        accumulator.add(clipped, weight)
        seen.append((clipped[places].tolist(), weight))
        # Before the next one is made: a name that lives on would keep two of each.
        del update, clipped
        after_each.append(resident() - before)
        say(f"client {len(seen)} of {count}: {after_each[-1] / size:.1f} bytes a parameter held")
    mean = np.empty(size, np.float32)
    accumulator.result_into(mean)
    seconds = time.perf_counter() - start
    total = sum(weight for _, weight in seen)
    sums = [
        math.fsum(x * w for x, w in zip(column, (w for _, w in seen), strict=True))
        for column in zip(*(x for x, _ in seen), strict=True)
    ]
    wrong = int(np.count_nonzero(mean[places] != (np.array(sums) / total).astype(np.float32)))
    grown = peak() - before
    bar = 8 * PLAN.num_bins * size + 4 * size + 4 * size + 6 * MIB
    # What the second client adds to the first one's, and every later one to the second's.
    growth = max(after_each[1:]) - after_each[0]
    passed = grown <= bar and wrong == 0 and growth <= 4 * MIB
    return report(
        case="large",
        parameters=size,
        clients=count,
        peak_bytes_a_parameter=round(grown / size, 2),
        bar_bytes_a_parameter=round(bar / size, 2),
        growth_over_clients_bytes=growth,
        wrong_of_checked=[wrong, CHECKED],
        gradients_a_second=round(size * count / seconds),
        passed=passed,
    )


# --- many rounds ------------------------------------------------------------------------------------------------


def one_round(state: ServerState, optimizer: Adam, updates: list[np.ndarray]) -> tuple[ServerState, float]:
    """Everything the aggregation core does in a round, its trips through bytes included."""
    shards = [ExactAccumulator(state.size, PLAN) for _ in range(2)]
    for number, update in enumerate(updates):
        shards[number % 2].add(clip_global(update, 1.0).vector, 1 + number)
    total = ExactAccumulator.from_bytes(shards[0].to_bytes())
    total.merge(shards[1])
    mean = total.result()
    state = optimizer.step(state, mean, UpdateKind.DELTA)
    return ServerState.from_bytes(state.to_bytes()), l2_norm(mean)


def leak(size: int, rounds: int) -> bool:
    """``rounds`` rounds in one process: the memory after the last tenth, against that after the first tenth."""
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal(size, dtype=np.float32) for _ in range(5)]
    optimizer, detector = Adam(learning_rate=1e-3), DivergenceDetector()
    state, health = optimizer.initial(np.zeros(size, np.float32)), DivergenceState()
    held, objects = [], []
    for number in range(rounds):
        state, norm = one_round(state, optimizer, updates)
        health = detector.next(health, norm=norm, loss=1.0)
        held.append(resident())
        if number in {rounds // 10, rounds - 1}:
            gc.collect()
            objects.append(len(gc.get_objects()))
    tenth = rounds // 10
    growth = int(statistics.median(held[-tenth:]) - statistics.median(held[tenth : 2 * tenth]))
    bar = 2 * MIB
    return report(
        case="leak",
        parameters=size,
        rounds=rounds,
        growth_bytes=growth,
        bar_bytes=bar,
        lowest_highest_mib=[round(min(held[tenth:]) / MIB, 1), round(max(held[tenth:]) / MIB, 1)],
        growth_objects=objects[1] - objects[0],
        passed=growth <= bar and objects[1] - objects[0] <= 50,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="100 million parameters")
    parser.add_argument("--leak", action="store_true", help="20,000 rounds")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    args = parser.parse_args()
    warm_up()
    # Rounds first: what the large sum gives back stays with the process, and would hide what the rounds leak.
    jobs: list[Callable[[], bool]] = []
    if args.leak:
        jobs.append(lambda: leak(20_000, 20_000))
    if args.large:
        jobs.append(lambda: large(100_000_000, 12))
    jobs = jobs or [lambda: leak(5_000, 600), lambda: large(4_000_000, 6)]
    passed = [job() for job in jobs]
    return 0 if all(passed) or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
