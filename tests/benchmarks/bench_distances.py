"""Distances between secret updates at one aggregator, beside distances of the same updates in the clear.

    .venv/bin/python tests/benchmarks/bench_distances.py    # one JSON line a case

``ratio`` is CPU time (all threads) over that of the exact float32 distances of the robust rules, in the same repeat;
medians of the repeats. Both compute all pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client_sdk.protocol.field import MERSENNE_61, MERSENNE_127, Field
from client_sdk.protocol.shamir import Scheme
from server_ref.aggregation.robust import RuleOptions
from server_ref.aggregation.robust.distances import squared_distances as plain_distances
from server_ref.aggregation.robust.rows import Rows
from server_ref.secure.distances import squared_distances
from server_ref.secure.zero_sharing import KEY_BYTES, held_by, key_holders, zero_shares

CASES = ((MERSENNE_61, 100, 100_000), (MERSENNE_61, 500, 10_000), (MERSENNE_127, 20, 10_000))
REPEATS = 5


def cpu_s(job: Callable[[], object]) -> float:
    before = time.process_time()
    job()
    return time.process_time() - before


def case(field: Field, reports: int, size: int) -> None:
    random = np.random.default_rng(0)
    plain = Rows.of(random.standard_normal((reports, size)).astype(np.float32))
    shares = [field.random(size, os.urandom) for _ in range(reports)]
    pairs = reports * (reports - 1) // 2
    scheme = Scheme(3, 5, field)
    keys = {subset: os.urandom(KEY_BYTES) for subset in held_by(1, key_holders(scheme))}
    jobs: dict[str, Callable[[], object]] = {
        "clear": lambda: plain_distances(plain, RuleOptions()),
        "shares": lambda: squared_distances(shares, size, field),
        "zero shares": lambda: zero_shares(keys, 1, scheme, pairs),
    }
    for job in jobs.values():
        job()
    runs = [{name: cpu_s(job) for name, job in jobs.items()} for _ in range(REPEATS)]
    what = f"{reports} reports of {size}, {field.name}"
    distances = statistics.median(run["shares"] for run in runs)
    ratio = statistics.median(run["shares"] / run["clear"] for run in runs)
    masks = statistics.median(run["zero shares"] for run in runs)
    say(case=f"distances of shares: {what}", ns_per_pair_and_coordinate=1e9 * distances / (pairs * size), ratio=ratio)
    say(case=f"shares of zero, 3 of 5: {what}", ns_per_pair=1e9 * masks / pairs, part_of_distances=masks / distances)
    say(
        case=f"answer of one aggregator: {what}",
        bytes_per_pair=field.element_bytes,
        total_bytes=pairs * field.element_bytes,
    )


def say(**fields: object) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
    print(json.dumps({"bench": "distances", **rounded}), flush=True)  # noqa: T201 - a benchmark reports on stdout


if __name__ == "__main__":
    for each in CASES:
        case(*each)
