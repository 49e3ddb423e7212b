"""Weighted means: speed against reading the data once, memory, and wrong bits, of the accumulators and of plain sums.

    .venv/bin/python tests/benchmarks/bench_aggregation.py            # table, then one JSON line a case
    .venv/bin/python tests/benchmarks/bench_aggregation.py --check    # exit status 1 if a bar is missed

L is the time to read the same data once (an XOR over all of it, two threads). Each repeat times L and then the
candidate; the figure is the median of the repeats' ratios, which a busy machine disturbs least. A candidate's time is
that of the whole job: new accumulator, all reports, float32 mean.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

os.environ.setdefault("NUMBA_NUM_THREADS", "2")
# Idle OpenMP threads spin by default, and would take the next candidate's cores.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numba
import numpy as np
import torch

import server_ref

SHAPES = ((100, 1_000_000), (1000, 100_000))
MAX_WEIGHT = 50
CHECKED_COLUMNS = 20_000

Mean = Callable[..., np.ndarray]


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


@dataclass(frozen=True)
class Bar:
    """One figure and the value it must not exceed (None: reported only)."""

    shape: str
    what: str
    value: float
    bar: float | None

    @property
    def passed(self) -> bool:
        return self.bar is None or self.value <= self.bar

    def __str__(self) -> str:
        verdict = "" if self.bar is None else f"<= {self.bar:<5g} {'pass' if self.passed else 'FAIL'}"
        return f"{self.shape:<14} {self.what:<54} {self.value:>10.4g}  {verdict}"


# --- speed ------------------------------------------------------------------------------------------------------


@numba.njit(parallel=True)
def read_once(words):
    parts = 64
    length = words.size // parts
    out = np.zeros(parts, np.int64)
    for part in numba.prange(parts):
        acc = np.int64(0)
        for word in words[part * length : (part + 1) * length]:
            acc ^= word
        out[part] = acc
    return out


def ratios(read: Callable[[], object], job: Mean, repeats: int) -> list[float]:
    job()
    found = []
    for _ in range(repeats):
        t0 = time.perf_counter()
        read()
        t1 = time.perf_counter()
        job()
        found.append((time.perf_counter() - t1) / (t1 - t0))
    return found


def plan_of(bins: int, n: int) -> server_ref.AccumulatorPlan:
    plan = server_ref.AccumulatorPlan.for_bounds(
        max_abs=1024.0 if bins == 2 else 1e8, max_weight=1000, max_count=n if bins == 2 else 100_000, resolution=1e-8
    )
    assert plan.num_bins == bins
    return plan


class Work:
    """Reports of one shape as separate arrays (as they are after decoding), weights, and the ways to average them."""

    def __init__(self, n: int, d: int) -> None:
        rng = np.random.default_rng(0)
        self.matrix = rng.standard_normal((n, d), dtype=np.float32) * np.float32(0.01)
        self.reports = list(self.matrix)
        self.weights = np.random.default_rng(1).integers(1, MAX_WEIGHT + 1, n).tolist()
        self.total = sum(self.weights)
        self.shape = f"{n} x {d:.0e}".replace("e+0", "e")
        self.n, self.d = n, d

    def read(self) -> object:
        return read_once(self.matrix.reshape(-1).view(np.int64))

    def accumulator(self, bins: int) -> server_ref.ExactAccumulator:
        return server_ref.ExactAccumulator(self.d, plan_of(bins, self.n))

    def blocked(self, bins: int) -> np.ndarray:
        accumulator = self.accumulator(bins)
        accumulator.add_many(self.reports, self.weights)
        out = np.empty(self.d, np.float32)
        accumulator.result_into(out)
        return out

    def one_by_one(self, bins: int) -> np.ndarray:
        accumulator = self.accumulator(bins)
        for report, weight in zip(self.reports, self.weights, strict=True):
            accumulator.add(report, weight)
        out = np.empty(self.d, np.float32)
        accumulator.result_into(out)
        return out

    def numpy_loop(self, dtype: type[np.floating]) -> np.ndarray:
        total = np.zeros(self.d, dtype)
        for report, weight in zip(self.reports, self.weights, strict=True):
            total += report * dtype(weight)
        return (total / self.total).astype(np.float32)

    def torch_add(self) -> np.ndarray:
        total = torch.zeros(self.d)
        for report, weight in zip(self.reports, self.weights, strict=True):
            total.add_(torch.from_numpy(report), alpha=weight / self.total)
        return total.numpy()

    def wrong_share(self, mean: np.ndarray) -> float:
        """Share of coordinates that are not the correctly rounded sum, divided and rounded to mean's dtype."""
        columns = slice(0, min(self.d, CHECKED_COLUMNS))
        products = self.matrix[:, columns].astype(np.float64) * np.array(self.weights, np.float64)[:, None]
        exact = np.array([math.fsum(column) for column in products.T.tolist()]) / self.total
        return float(np.mean(mean[columns] != exact.astype(mean.dtype)))

    def different_bits(self, bins: int) -> int:
        """Orders, groupings and shardings that do not give the bytes of one pass over everything."""
        reference = self.accumulator(bins)
        reference.add_many(self.reports, self.weights)
        expected = hashlib.sha256(reference.to_bytes()).digest()
        shuffled = random.Random(2)
        different = 0
        for shards in (1, 3):
            order = list(range(self.n))
            shuffled.shuffle(order)
            parts = [self.accumulator(bins) for _ in range(shards)]
            while order:
                take = [order.pop() for _ in range(min(len(order), shuffled.choice([1, 2, 7, 32])))]
                shuffled.choice(parts).add_many([self.reports[i] for i in take], [self.weights[i] for i in take])
            total = parts.pop(shuffled.randrange(shards))
            for part in parts:
                total.merge(part)
            different += hashlib.sha256(total.to_bytes()).digest() != expected
        return different


def extra_bytes(job: Mean) -> int:
    """Peak of what numpy allocates while a job runs, its result included; the kernels add 48 KiB a thread."""
    tracemalloc.start()
    job()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def figures(work: Work, repeats: int) -> Iterator[Bar]:
    def speed(what: str, job: Mean, bar: float | None) -> Bar:
        return Bar(work.shape, f"{what}, times L", statistics.median(ratios(work.read, job, repeats)), bar)

    yield speed("exact, 2 bins, blocked", lambda: work.blocked(2), 4)
    yield speed("exact, 3 bins (1e-8..1e8), blocked", lambda: work.blocked(3), 4)
    yield speed("exact, 2 bins, one report at a time", lambda: work.one_by_one(2), 12)
    yield speed("exact, 3 bins (1e-8..1e8), one report at a time", lambda: work.one_by_one(3), 16)
    yield speed("numpy loop, float32 (not exact)", lambda: work.numpy_loop(np.float32), None)
    yield speed("numpy loop, float64 (not exact)", lambda: work.numpy_loop(np.float64), None)
    yield speed("torch add_, float32 (not exact)", work.torch_add, None)
    for bins in (2, 3):
        peak = extra_bytes(lambda bins=bins: work.blocked(bins))
        yield Bar(work.shape, f"exact, {bins} bins: extra bytes a parameter", peak / work.d, 32)
        yield Bar(work.shape, f"exact, {bins} bins: wrong coordinates, share", work.wrong_share(work.blocked(bins)), 0)
        accumulator = work.accumulator(bins)
        accumulator.add_many(work.reports, work.weights)
        wrong = work.wrong_share(accumulator.result())
        yield Bar(work.shape, f"exact, {bins} bins: wrong coordinates (float64), share", wrong, 0)
        yield Bar(work.shape, f"exact, {bins} bins: orders with other bits", work.different_bits(bins), 0)
    for dtype in (np.float32, np.float64):
        wrong = work.wrong_share(work.numpy_loop(dtype))
        yield Bar(work.shape, f"numpy loop, {dtype.__name__}: wrong coordinates, share", wrong, None)
    yield Bar(work.shape, "torch add_: wrong coordinates, share", work.wrong_share(work.torch_add()), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=9, help="repeats a figure is the median of (default: 9)")
    args = parser.parse_args()
    start = time.perf_counter()
    server_ref.warm_up()
    compiled_s = time.perf_counter() - start
    torch.set_num_threads(2)
    bars: list[Bar] = []
    for n, d in SHAPES:
        for bar in figures(Work(n, d), args.repeats):
            bars.append(bar)
            say(str(bar))
    passed = all(bar.passed for bar in bars)
    say(f"\nthe kernels took {compiled_s:.1f} s to load or compile; {'all bars pass' if passed else 'A BAR IS MISSED'}")
    for bar in bars:
        say(json.dumps({"bench": "aggregation", **asdict(bar), "passed": bar.passed}))
    return 0 if passed or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
