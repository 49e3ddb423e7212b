"""What all features at once cost: a buffer of the integrated aggregator beside a plain exact mean of the same updates.

    .venv/bin/python tests/benchmarks/bench_integrated.py

Medians of interleaved repeats, one thread. ``plain_mean_ms`` is ``GradientAggregator`` on dense updates: no clipping,
that. Shares are those of each step; ``rest`` is reading, ages, locks, dealing out and the conversion to tensors.
that. Shares are those of each step; ``rest`` is reading, ages, locks, the buckets' draw and conversion to tensors.
``times_private_mean`` compares with ``DPGradientAggregator``, which clips, enforces the integer norm and adds the same
noise once: what robustness, compression and asynchrony add to privacy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client_sdk.protocol.updates import WorkerGradient
from server_ref import (
    AsyncConfig,
    CompressionConfig,
    DPGradientAggregator,
    FederatedConfig,
    GradientAggregator,
    IntegratedFederatedAggregator,
    PrivacyConfig,
    SecurityConfig,
)
from server_ref.aggregation import reduce
from server_ref.aggregation.admission import ClipGlobal, DecodeCompressed
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.noise import CentralNoise

ROUNDS = 1000
"""Budgeted, so that no repeat runs out."""

MEAN = SecurityConfig(rule="mean", num_byzantine=0, buckets=None)
KRUM = SecurityConfig(rule="multi-krum", num_byzantine=3, buckets=9)
STEPS = {
    "decode": (DecodeCompressed, "decode"),
    "clip": (ClipGlobal, "clip"),
    "sum": (reduce._ExactFold, "_add"),
    "noise": (CentralNoise, "release"),
    "rule": (BucketedRule, "combine"),
}


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Seconds within each step, by name."""
    real = {name: (owner, attribute, getattr(owner, attribute)) for name, (owner, attribute) in STEPS.items()}

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return spy

    for name, (owner, attribute, function) in real.items():
        setattr(owner, attribute, wrapped(name, function))
    try:
        yield
    finally:
        for owner, attribute, function in real.values():
            setattr(owner, attribute, function)


def measured(
    jobs: dict[str, Callable[[], object]], prepare: Callable[[], object], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each job, interleaved, and of the integrated one's steps."""
    times: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        prepare()  # the devices' part: not timed
        for what, job in jobs.items():
            spent: dict[str, float] = defaultdict(float)
            start = time.perf_counter()
            if what == "integrated":
                with timed(spent):
                    job()
            else:
                job()
            seconds = time.perf_counter() - start
            if not repeat:
                continue  # the first one compiles
            times[what].append(seconds)
            for step, part in spent.items():
                steps[step].append(part)
    return times, steps


def case(
    name: str, compression: CompressionConfig, security: SecurityConfig, count: int, size: int, repeats: int
) -> None:
    rng = np.random.default_rng(0)
    state = {"w": np.zeros(size, np.float32)}
    updates = [rng.standard_normal(size, np.float32) for _ in range(count)]
    workers = [WorkerGradient(f"w{i}", {"w": u}, 1, 0.0) for i, u in enumerate(updates)]
    config = FederatedConfig(
        compression=compression,
        privacy=PrivacyConfig(rounds=ROUNDS),
        security=security,
        async_config=AsyncConfig(buffer_size=count),
    )
    integrated = IntegratedFederatedAggregator(config, model_state=state)
    if compression.method == "voted":
        integrated.elect_support(integrated.ballot(w.gradients) for w in workers)
    plain = GradientAggregator(max_weight=1, max_abs=100.0)
    private = DPGradientAggregator(rounds=ROUNDS, adaptive_clipping=False)
    sent: list[WorkerGradient] = []

    def encode() -> None:
        version = integrated.current_round
        payloads = [integrated.encode_update(w.gradients, version) for w in workers]
        sent[:] = [
            WorkerGradient(w.worker_id, {}, 1, 0.0, {"payload": p}) for w, p in zip(workers, payloads, strict=True)
        ]

    def buffer() -> None:
        version = integrated.current_round
        for worker in sent:
            integrated.process_worker_gradient(worker, version)

    times, steps = measured(
        {
            "plain": lambda: plain.aggregate(workers, state),
            "private": lambda: private.aggregate_with_privacy(workers, state, len(private.ledger.events)),
            "integrated": buffer,
        },
        encode,
        repeats,
    )
    total = statistics.median(times["integrated"])
    shares = {step: statistics.median(found) / total for step, found in steps.items()}
    plain_s, private_s = statistics.median(times["plain"]), statistics.median(times["private"])
    say(
        json.dumps(
            {
                "bench": "integrated",
                "case": name,
                "updates": count,
                "parameters": size,
                "plain_mean_ms": 1e3 * plain_s,
                "integrated_ms": 1e3 * total,
                "times_plain": total / plain_s,
                "times_private_mean": total / private_s,
                "shares": shares | {"rest": 1 - sum(shares.values())},
                "bytes_an_update": len(sent[0].metadata["payload"]) if sent[0].metadata else 0,
            }
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="repeats a figure is the median of (default: 5)")
    repeats = parser.parse_args().repeats
    dense, random_k = CompressionConfig(method="none"), CompressionConfig(method="randomk", ratio=0.1)
    voted = CompressionConfig(method="voted", ratio=0.01)
    for count, size in ((100, 100_000), (1000, 20_000)):
        case("dense, private mean", dense, MEAN, count, size, repeats)
        case("dense, multi-krum on 9 buckets", dense, KRUM, count, size, repeats)
        case("random-k 10 %, multi-krum on 9 buckets", random_k, KRUM, count, size, repeats)
        case("voted 1 %, multi-krum on 9 buckets", voted, KRUM, count, size, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
