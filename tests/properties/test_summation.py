"""The ordinary summations against their textbook form, one number at a time, and against their proved error bounds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server_ref.aggregation.summation import Summation, running_sum, weighted_sum

relaxed = settings(deadline=None)
U32, U64 = Fraction(1, 2**24), Fraction(1, 2**53)

MAGNITUDES = st.integers(-60, 60).flatmap(lambda e: st.floats(1, 2, width=32).map(lambda x: math.ldexp(x, e)))
VALUES = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda x: -x)).map(lambda x: float(np.float32(x)))
CASES = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float32, (n, 2), elements=VALUES),
        st.lists(st.integers(1, 2**29), min_size=n, max_size=n),
    )
)


def products(column: np.ndarray, weights: list[int]) -> list[np.float32]:
    return [np.float32(float(x) * w) for x, w in zip(column, weights, strict=True)]


def naive(values: list[np.float32]) -> float:
    total = np.float32(0)
    for x in values:
        total = np.float32(total + x)
    return float(total)


def pairwise(values: list[np.float32]) -> np.float32:
    """The largest power of two of addends first, halved down to single ones; then the rest likewise."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return np.float32(pairwise(values[:half]) + pairwise(values[half:]))


def kahan(values: list[np.float32]) -> float:
    total = carry = np.float32(0)
    for x in values:
        y = np.float32(x - carry)
        t = np.float32(total + y)
        carry = np.float32(np.float32(t - total) - y)
        total = t
    return float(total)


def neumaier(values: list[np.float32]) -> float:
    total = carry = np.float32(0)
    for x in values:
        t = np.float32(total + x)
        big, small = (total, x) if abs(total) >= abs(x) else (x, total)
        carry = np.float32(carry + np.float32(np.float32(big - t) + small))
        total = t
    return float(total) + float(carry)


@relaxed
@given(CASES)
def test_every_column_has_the_bits_of_the_textbook_loop(case):
    updates, weights = case
    for j in range(updates.shape[1]):
        values = products(updates[:, j], weights)
        double = 0.0
        for x, w in zip(updates[:, j].tolist(), weights, strict=True):
            double += x * w
        expected = {
            Summation.NAIVE_FLOAT32: naive(values),
            Summation.NAIVE_FLOAT64: double,
            Summation.PAIRWISE: float(pairwise(values)),
            Summation.KAHAN: kahan(values),
            Summation.NEUMAIER: neumaier(values),
        }
        assert set(expected) == set(Summation)
        for summation, total in expected.items():
            assert weighted_sum(summation, updates, weights)[j] == total


def bound(summation: Summation, n: int) -> Fraction:
    """Relative to the sum of the magnitudes; the rounding of the products included, second orders generously."""
    if summation is Summation.NAIVE_FLOAT64:
        return n * U64
    second_order = 4 * n * n * U32**2
    return (
        U32
        + second_order
        + {
            Summation.NAIVE_FLOAT32: (n - 1) * U32,
            Summation.PAIRWISE: max(n - 1, 0).bit_length() * U32,
            Summation.KAHAN: 2 * U32,
            # Its last addition is in float64.
            Summation.NEUMAIER: 2 * U64,
        }[summation]
    )


@relaxed
@given(CASES)
def test_the_error_stays_within_the_documented_bound(case):
    updates, weights = case
    for j, column in enumerate(updates.T.tolist()):
        exact = [Fraction(x) * w for x, w in zip(column, weights, strict=True)]
        magnitudes = sum(map(abs, exact), Fraction(0))
        for summation in Summation:
            error = abs(Fraction(float(weighted_sum(summation, updates, weights)[j])) - sum(exact))
            assert error <= bound(summation, len(weights)) * magnitudes


@relaxed
@given(CASES, st.sampled_from(Summation))
def test_a_running_sum_is_the_sum_at_every_prefix(case, summation):
    updates, weights = case
    total = running_sum(summation, 2)
    for i, (update, weight) in enumerate(zip(updates, weights, strict=True), start=1):
        total.add(update, weight)
        assert (total.count, total.total_weight) == (i, sum(weights[:i]))
        assert total.total().tobytes() == weighted_sum(summation, updates[:i], weights[:i]).tobytes()
        assert total.result().tolist() == (total.total() / sum(weights[:i])).tolist()
