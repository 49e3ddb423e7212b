"""What privacy costs: exact noise, the integer norm, and the accounts, each beside a peer in the same run.

    .venv/bin/python tests/benchmarks/bench_privacy.py

Medians of interleaved repeats, one thread, a million elements. ``numpy_normal`` is float64 noise from a seeded
generator, which is neither exact nor fit for privacy; ``one_by_one`` is the algorithm of Canonne, Kamath and Steinke as
the paper has it, on Python integers; ``keystream`` is AES-256 in counter mode alone. A plain encoding is the float32
norm, one multiplication and one rounding, without any guarantee. Epsilons are for noise multiplier 1, sampling rate
0.01, 1000 rounds and delta 1e-5, by Renyi divergence at the default orders.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dp_accounting
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.privacy import EncodedBounds, encode_clipped
from server_ref.aggregation import (
    Adjacency,
    GaussianRelease,
    PrivacyBudget,
    PrivacyLedger,
    RenyiPrivacyAccountant,
    calibrate,
)
from server_ref.aggregation.renyi import sampled_gaussian_rdp

SIZE = 1_000_000
FEW = 500
EVENT = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0))


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


def emit(**case: object) -> None:
    say(json.dumps({"bench": "privacy", **case}))


def medians(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


# --- one sample at a time, as the paper has it ------------------------------------------------------------------


def bernoulli_exp(exponent: Fraction) -> bool:
    while exponent > 1:
        if not bernoulli_exp(Fraction(1)):
            return False
        exponent -= 1
    trial = 1
    while secrets.randbelow(exponent.denominator * trial) < exponent.numerator:
        trial += 1
    return trial % 2 == 1


def discrete_laplace(scale: int) -> int:
    while True:
        rest = secrets.randbelow(scale)
        if not bernoulli_exp(Fraction(rest, scale)):
            continue
        bucket = 0
        while bernoulli_exp(Fraction(1)):
            bucket += 1
        magnitude, negative = rest + scale * bucket, secrets.randbelow(2)
        if magnitude or not negative:
            return -magnitude if negative else magnitude


def one_by_one(variance: int) -> int:
    scale = math.isqrt(variance) + 1
    while True:
        found = discrete_laplace(scale)
        if bernoulli_exp((abs(found) - Fraction(variance, scale)) ** 2 / (2 * variance)):
            return found


def sampler(repeats: int) -> None:
    rng = np.random.default_rng(0)
    stream = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * SIZE)
    for sigma in (3, 1000, 37306 * 2**20, 2**40):
        found = medians(
            {
                "exact": lambda v=sigma**2: sample(SIZE, v),
                "numpy_normal": lambda s=sigma: np.rint(rng.normal(0, s, SIZE)).astype(np.int64),
                "keystream": lambda: stream.update(zeros),
                "one_by_one": lambda v=sigma**2: [one_by_one(v) for _ in range(FEW)],
            },
            repeats,
        )
        emit(
            case="discrete Gaussian",
            sigma=float(sigma),
            exact_ns=found["exact"] / SIZE * 1e9,
            million_samples_a_second=SIZE / found["exact"] / 1e6,
            times_numpy_normal=found["exact"] / found["numpy_normal"],
            keystream_ns=found["keystream"] / SIZE * 1e9,
            one_by_one_ns=found["one_by_one"] / FEW * 1e9,
        )


def plain_encoding(vector: np.ndarray, clip_norm: float, scale: float) -> np.ndarray:
    norm = np.linalg.norm(vector)
    clipped = vector * np.float32(min(1.0, clip_norm / norm))
    return np.rint(clipped * scale).astype(np.int64)


def encoding(repeats: int) -> None:
    vector = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    for name, clip_norm in (("clipped", 1.0), ("within the bound", 1e4)):
        for bits in (24, 40):
            bounds = EncodedBounds(clip_norm=clip_norm, fraction_bits=bits)
            found = medians(
                {
                    "ours": lambda b=bounds: encode_clipped(vector, b),
                    "plain": lambda c=clip_norm, b=bits: plain_encoding(vector, c, 2.0**b),
                },
                repeats,
            )
            emit(
                case="encoding with the integer norm",
                update=name,
                fraction_bits=bits,
                ns_per_element=found["ours"] / SIZE * 1e9,
                times_plain=found["ours"] / found["plain"],
            )


def accounts(repeats: int) -> None:
    # The peer's accountant reports every fractional order at which its series does not converge.
    logging.disable(logging.WARNING)

    def ours() -> float:
        accountant = RenyiPrivacyAccountant()
        accountant.accumulate(1.0, 0.01, 1000)
        return accountant.get_epsilon(1e-5)

    def theirs(accountant: RdpAccountant | PLDAccountant) -> float:
        return float(accountant.compose(EVENT, 1000).get_epsilon(1e-5))

    found = medians(
        {"ours": ours, "rdp": lambda: theirs(RdpAccountant()), "pld": lambda: theirs(PLDAccountant())}, repeats
    )
    orders = [float(order) for order in range(2, 64)]
    peer = RdpAccountant(orders)
    peer.compose(EVENT)
    difference = np.abs(sampled_gaussian_rdp(1.0, 0.01, orders) / np.asarray(peer.rdp) - 1).max()
    emit(
        case="Renyi accountant",
        epsilon=ours(),
        dp_accounting_epsilon=theirs(RdpAccountant()),
        largest_difference_at_integer_orders=float(difference),
        ms=found["ours"] * 1e3,
        dp_accounting_ms=found["rdp"] * 1e3,
        dp_accounting_pld_ms=found["pld"] * 1e3,
    )
    z = calibrate(1.0, 1e-5, participations=1000)
    events = [GaussianRelease(round_id=i, noise_multiplier=z, adjacency=Adjacency.ZERO_OUT) for i in range(1000)]
    for count in (1, 100, 999):
        ledger = PrivacyLedger.replay(PrivacyBudget(epsilon=1.0, delta=1e-5), events[:count])
        found = medians({"check": lambda led=ledger, n=count: led.check(events[n])}, repeats)
        emit(case="ledger check", releases_before=count, check_ms=found["check"] * 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="repeats a figure is the median of (default: 9)")
    repeats = parser.parse_args().repeats
    sampler(repeats)
    encoding(repeats)
    accounts(repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
