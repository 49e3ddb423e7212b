"""t - 1 shares of a fixed secret are uniform, together: a statistical test that says what it would see.

A vector that repeats one coordinate is as many independent sharings of it. For every t - 1 of the n shares, counts of
bytes and of pairs of half bytes are compared with uniform ones, and with those of another secret (chi-square).

Level: one of these statistics is beyond its threshold with probability 1e-9, and there are fewer than 300 in a test: a
true sharing fails with probability 3e-7 for the source's key, which is fixed. Power: a distribution of pairs at a
chi-square distance of 0.01 from uniform, such as one bit that is set with probability 0.55, is seen with probability
0.999. That the test does see such things, weak splits show.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from client_sdk.protocol.field import FIELDS, MERSENNE_61, MERSENNE_127, Field, FieldVector
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, share, share_seeded
from client_sdk.protocol.sharing_kernels import extrapolate
from tests.sharing_oracle import counted_bytes

Split = Callable[[FieldVector], list[FieldVector]]

SAMPLES = 2**15
LEVEL = 1e-9
DISTANCE = 0.01
SECRETS = (0, -12345678901)


def test_the_power_is_as_stated():
    threshold = stats.chi2.isf(LEVEL, 255)
    assert stats.ncx2.sf(threshold, 255, SAMPLES * DISTANCE) > 0.999
    assert np.isclose(256 * 128 * ((0.55 / 128 - 1 / 256) ** 2 + (0.45 / 128 - 1 / 256) ** 2), DISTANCE)


def not_uniform(counts: np.ndarray) -> bool:
    return bool(stats.chisquare(counts).pvalue < LEVEL)


def differ(left: np.ndarray, right: np.ndarray) -> bool:
    seen = left + right > 0
    statistic = ((left - right)[seen] ** 2 / (left + right)[seen]).sum()
    return bool(stats.chi2.sf(statistic, max(1, seen.sum() - 1)) < LEVEL)


def octets(vector: FieldVector, field: Field) -> np.ndarray:
    return np.frombuffer(field.to_bytes(vector), np.uint8).reshape(-1, field.element_bytes)


def pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Counts of pairs of values from 0 to 15."""
    return np.bincount(left.astype(np.int64) * 16 + right, minlength=256)


def findings(split: Split, scheme: Scheme) -> set[str]:
    """Which kinds of statistics tell the shares from uniform ones, or one secret from another."""
    field, found = scheme.field, set()
    top_bits = field.bits % 8
    joint: list[dict[object, np.ndarray]] = []
    for value in SECRETS:
        secret = np.repeat(field.from_ints([value]), SAMPLES * scheme.packing, axis=0)
        shares = [octets(each, field) for each in split(secret)]
        for each in shares:
            full = [np.bincount(column, minlength=256) for column in each[:, :-1].T]
            if any(map(not_uniform, [*full, np.bincount(each[:, -1], minlength=2**top_bits)])):
                found.add("bytes")
        counts: dict[object, np.ndarray] = {}
        for left, right in combinations(range(len(shares)), 2):
            a, b = shares[left], shares[right]
            counts["low", left, right] = pairs(a[:, 0] & 15, b[:, 0] & 15)
            shift = top_bits - 4
            counts["high", left, right] = pairs(a[:, -1] >> shift, b[:, -1] >> shift)
        if any(map(not_uniform, counts.values())):
            found.add("pairs")
        joint.append(counts)
    if any(differ(joint[0][key], joint[1][key]) for key in joint[0]):
        found.add("secrets")
    return found


@pytest.mark.parametrize("packing", [1, 2])
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
@pytest.mark.parametrize("seeded", [False, True], ids=["plain", "seeded"])
def test_two_of_five_shares_are_uniform(field: Field, packing: int, seeded: bool):
    scheme, source = Scheme(field=field, packing=packing), counted_bytes(b"secrecy")

    def split(secret: FieldVector) -> list[FieldVector]:
        if seeded:
            return share_seeded(secret, scheme, source).expand(scheme, len(secret))
        return share(secret, scheme, source)

    assert findings(split, scheme) == set()


def test_three_of_five_are_not_independent_of_the_secret():
    """The same statistics on one share too many, opened with the others: the test is not blind to what it looks for."""
    scheme, source = Scheme(num_shares=3), counted_bytes(b"three")

    def split(secret: FieldVector) -> list[FieldVector]:
        first, second, third = share(secret, scheme, source)
        known = MERSENNE_61.add(MERSENNE_61.scale(first, 3), MERSENNE_61.scale(second, -3))
        return [first, MERSENNE_61.add(known, third)]

    assert findings(split, scheme) == {"bytes", "pairs", "secrets"}


# --- splits that must not pass -----------------------------------------------------------------------------------


def drawn(field: Field, key: bytes, size: int, bits: int | None = None) -> FieldVector:
    """Uniform elements, or elements of so many bits."""
    vector = field.expand(key.ljust(32, b"\1"), size)
    return vector if bits is None else vector & np.uint64(2**bits - 1)


def from_values(secret: FieldVector, first: FieldVector, second: FieldVector) -> list[FieldVector]:
    return [first, second, *extrapolate([secret, first, second], 3, MERSENNE_61)]


def small_coefficients(secret: FieldVector, bits: int) -> list[FieldVector]:
    a, b = (drawn(MERSENNE_61, key, len(secret), bits) for key in (b"a", b"b"))
    shares = []
    for x in range(1, 6):
        total = secret.copy()
        NUMPY_KERNELS.weighted_accumulate(total, a, x, MERSENNE_61)
        NUMPY_KERNELS.weighted_accumulate(total, b, x * x, MERSENNE_61)
        shares.append(total)
    return shares


def one_seed_twice(secret: FieldVector) -> list[FieldVector]:
    once = drawn(MERSENNE_61, b"r", len(secret))
    return from_values(secret, once, once)


def one_seed_for_two_reports(secret: FieldVector) -> list[FieldVector]:
    """Of two reports a share is seen: their difference is the difference of the secrets, if the seeds are the same."""
    first, second = (drawn(MERSENNE_61, key, len(secret)) for key in (b"a", b"b"))
    one = from_values(secret, first, second)[3]
    other = from_values(MERSENNE_61.zeros(len(secret)), first, second)[3]
    return [first, MERSENNE_61.subtract(one, other)]


def a_bit_is_missing(secret: FieldVector) -> list[FieldVector]:
    first, second = (drawn(MERSENNE_61, key, len(secret), 60) for key in (b"a", b"b"))
    return from_values(secret, first, second)


def a_bit_is_biased(secret: FieldVector) -> list[FieldVector]:
    """Set with probability 0.55: the distance that the power is stated for."""
    first, second = (drawn(MERSENNE_61, key, len(secret)) for key in (b"a", b"b"))
    tenth = np.arange(len(secret)) % 10 == 0
    return from_values(secret, first | (tenth.astype(np.uint64) << np.uint64(60)), second)


def a_coefficient_is_missing(secret: FieldVector) -> list[FieldVector]:
    """Lines instead of parabolas: each share is uniform, two tell the secret."""
    first = drawn(MERSENNE_61, b"a", len(secret))
    return [first, *extrapolate([secret, first], 4, MERSENNE_61)]


@pytest.mark.parametrize(
    ("split", "by"),
    [
        (lambda secret: small_coefficients(secret, 32), {"bytes", "pairs", "secrets"}),
        (lambda secret: small_coefficients(secret, 60), {"bytes", "pairs", "secrets"}),
        (one_seed_twice, {"pairs"}),
        (one_seed_for_two_reports, {"bytes", "pairs", "secrets"}),
        (a_bit_is_missing, {"bytes", "pairs"}),
        (a_bit_is_biased, {"bytes", "pairs"}),
        (a_coefficient_is_missing, {"pairs", "secrets"}),
    ],
    ids=[
        "coefficients of 32 bits",
        "coefficients of 60 bits",
        "one seed twice",
        "one seed for two reports",
        "a bit is missing",
        "a bit is biased",
        "a coefficient is missing",
    ],
)
def test_a_weak_split_is_seen(split: Split, by: set[str]):
    assert by <= findings(split, Scheme())


def test_of_a_larger_field_the_high_limb_is_looked_at_too():
    def split(secret: FieldVector) -> list[FieldVector]:
        first, second = (drawn(MERSENNE_127, key, len(secret)) for key in (b"a", b"b"))
        first[:, 1] &= np.uint64(2**62 - 1)
        return [first, second, *extrapolate([secret, first, second], 3, MERSENNE_127)]

    assert "pairs" in findings(split, Scheme(field=MERSENNE_127))
