"""What a guaranteed norm costs, beside the plain float32 form: a table, then one JSON line a case.

    .venv/bin/python tests/benchmarks/bench_clipping.py

Medians of interleaved repeats, one thread, a million elements. The plain form is ``x * (C / numpy.linalg.norm(x))``,
timed ten times in a row so that both sides last as long; how often its result exceeds C is counted in exact arithmetic
over many small vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client_sdk.protocol.clipping import clip_global, l2_norm

SIZE = 1_000_000


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


def plain(vector: np.ndarray, clip_norm: float) -> np.ndarray:
    norm = np.linalg.norm(vector)
    return vector * vector.dtype.type(clip_norm / norm) if norm > clip_norm else vector


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def times_plain(jobs: dict[str, Callable[[], object]], base: Callable[[], object], repeats: int) -> dict[str, float]:
    found = {}
    for name, job in jobs.items():
        job()
        ratios = []
        for _ in range(repeats):
            before = sum(seconds(base) for _ in range(10)) / 10
            ratios.append(seconds(job) / before)
        found[name] = statistics.median(ratios)
    return found


def exceeding(dtype: type[np.floating], clip: Callable[[np.ndarray], np.ndarray], vectors: int = 2000) -> float:
    """Share of clipped vectors of 50 elements whose exact norm is above 1."""
    rng = np.random.default_rng(1)
    beyond = 0
    for _ in range(vectors):
        clipped = clip((rng.standard_normal(50) * 10).astype(dtype))
        beyond += sum(Fraction(x) ** 2 for x in clipped.tolist()) > 1
    return beyond / vectors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="repeats a figure is the median of (default: 15)")
    repeats = parser.parse_args().repeats
    say("| dtype | norm, times plain | clip, times plain | beyond C: plain | beyond C: clip_global |")
    say("|---|---|---|---|---|")
    figures = {}
    for dtype in (np.float16, np.float32, np.float64):
        vector = np.random.default_rng(0).standard_normal(SIZE).astype(dtype)
        jobs = {"norm": lambda x=vector: l2_norm(x), "clip": lambda x=vector: clip_global(x, 1.0)}
        row = times_plain(jobs, lambda x=vector: plain(x, 1.0), repeats)
        row["beyond_plain"] = exceeding(dtype, lambda x: plain(x, 1.0))
        row["beyond_ours"] = exceeding(dtype, lambda x: clip_global(x, 1.0).vector)
        figures[dtype.__name__] = row
        shares = f"{100 * row['beyond_plain']:.0f} % | {100 * row['beyond_ours']:.0f} %"
        say(f"| {dtype.__name__} | {row['norm']:.1f} | {row['clip']:.1f} | {shares} |")
    for dtype_name, row in figures.items():
        say(json.dumps({"bench": "clipping", "elements": SIZE, "dtype": dtype_name, **row}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
