"""The ordinary summations: the worked case of cancellation, bad input, memory, many columns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client_sdk.protocol.errors import BudgetExceeded, EmptyAggregate, NonFiniteUpdate, ShapeMismatch
from server_ref.aggregation.summation import MAX_WEIGHT, Summation, running_sum, weighted_sum

ALL = pytest.mark.parametrize("summation", Summation)


@pytest.mark.parametrize(
    ("summation", "total"),
    [
        (Summation.NAIVE_FLOAT32, 0.0),
        (Summation.PAIRWISE, 0.0),
        (Summation.KAHAN, 0.0),
        (Summation.NEUMAIER, 2.0),
        (Summation.NAIVE_FLOAT64, 2.0),
    ],
)
def test_the_worked_case_of_cancellation(summation, total):
    """1 + 1e8 + 1 - 1e8 = 2: compensation alone does not save it in float32."""
    updates = np.array([[1], [1e8], [1], [-1e8]], np.float32)
    assert weighted_sum(summation, updates, [1] * 4).tolist() == [total]


def test_compensation_keeps_what_a_plain_loop_loses():
    """16,777,216 is where float32's whole numbers end: adding 1 to it changes nothing."""
    updates = [np.array([2.0**24], np.float32), *[np.array([1.0], np.float32)] * 1000]
    found = {s: float(weighted_sum(s, updates, [1] * 1001)[0]) for s in Summation}
    assert found[Summation.NAIVE_FLOAT32] == 2.0**24
    assert found[Summation.KAHAN] == 2.0**24 + 1000
    assert found[Summation.NEUMAIER] == found[Summation.NAIVE_FLOAT64] == 2.0**24 + 1000
    assert abs(found[Summation.PAIRWISE] - 2.0**24 - 1000) <= 1


@ALL
@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 20_000])
def test_columns_do_not_depend_on_the_blocks_they_fall_into(summation, size):
    rng = np.random.default_rng(size)
    updates = (rng.standard_normal((11, size)) * 10.0 ** rng.integers(-8, 8, (11, size))).astype(np.float32)
    weights = rng.integers(1, 1000, 11).tolist()
    total = weighted_sum(summation, updates, weights)
    assert (total.dtype, total.shape) == (np.float64, (size,))
    for j in {0, size // 2, size - 1} if size else ():
        assert total[j] == weighted_sum(summation, updates[:, j : j + 1], weights)[0]


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_refused_update_changes_nothing(summation, bad):
    total = running_sum(summation, 3)
    total.add(np.array([1, 2, 3], np.float32), 5)
    before = total.total().tobytes()
    with pytest.raises(NonFiniteUpdate):
        total.add(np.array([1, bad, 3], np.float32), 1)
    with pytest.raises(ShapeMismatch):
        total.add(np.ones(4, np.float32), 1)
    with pytest.raises(ShapeMismatch):
        total.add(np.ones(3), 1)
    for weight in (0, -1, MAX_WEIGHT + 1):
        with pytest.raises(BudgetExceeded):
            total.add(np.ones(3, np.float32), weight)
    assert (total.total().tobytes(), total.count, total.total_weight) == (before, 1, 5)


@pytest.mark.parametrize("summation", [s for s in Summation if s is not Summation.NAIVE_FLOAT64])
def test_a_float32_sum_that_could_overflow_is_refused_before_it_does(summation):
    huge = np.array([1e38], np.float32)
    total = running_sum(summation, 1)
    total.add(huge, 1)
    with pytest.raises(BudgetExceeded, match="overflow"):
        total.add(huge, 1)
    assert total.total()[0] == float(huge[0])


def test_a_float64_sum_holds_what_float32_cannot():
    huge = np.array([3e38], np.float32)
    assert weighted_sum(Summation.NAIVE_FLOAT64, [huge] * 4, [MAX_WEIGHT] * 4)[0] == 4 * MAX_WEIGHT * float(huge[0])


@ALL
def test_memory_does_not_grow_with_the_count_but_for_pairwise_levels(summation):
    total = running_sum(summation, 1000)
    for _ in range(100):
        total.add(np.ones(1000, np.float32), 1)
    arrays = {Summation.NAIVE_FLOAT32: 4, Summation.PAIRWISE: 4 * 7}.get(summation, 8)
    assert total.nbytes == arrays * 1000


@ALL
def test_an_iterator_is_read_once_and_bad_counts_are_refused(summation):
    ones = [np.ones(2, np.float32)] * 3
    assert weighted_sum(summation, iter(ones), iter([1, 2, 3])).tolist() == [6.0, 6.0]
    with pytest.raises(ShapeMismatch, match="one weight for each"):
        weighted_sum(summation, ones, [1, 2])
    with pytest.raises(ShapeMismatch, match="one weight for each"):
        weighted_sum(summation, ones, [1, 2, 3, 4])
    with pytest.raises(EmptyAggregate):
        weighted_sum(summation, [], [])
    with pytest.raises(EmptyAggregate):
        running_sum(summation, 2).result()
    assert running_sum(summation, 2).total().tolist() == [0.0, 0.0]
