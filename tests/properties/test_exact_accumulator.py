"""The exact accumulator against exact arithmetic, and the sum of three against ``math.fsum``."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server_ref import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation.kernels import BLOCK, sum_bins

relaxed = settings(deadline=None)
TWO_BINS = AccumulatorPlan.for_bounds(max_abs=1024.0, max_weight=1000, max_count=1000, resolution=1e-8)
THREE_BINS = AccumulatorPlan.for_bounds(max_abs=1e8, max_weight=1000, max_count=100_000, resolution=1e-8)
PLANS = [TWO_BINS, THREE_BINS]
FLOAT32_TINY = float(np.float32(2.0**-149))


def values_of(plan: AccumulatorPlan, smallest: float) -> st.SearchStrategy[float]:
    """float32 values of a plan: uniform, spread over the magnitudes, zeros of both signs."""
    top = float(plan.limit_bits.view(np.float32))
    magnitude = st.floats(smallest, top, width=32)
    spread = st.integers(math.frexp(smallest)[1], math.frexp(top)[1] - 1).map(lambda e: 2.0**e)
    return st.one_of(st.sampled_from([0.0, -0.0, top, smallest]), magnitude, spread).flatmap(
        lambda x: st.sampled_from([x, -x])
    )


def cases(smallest: float | None = None) -> st.SearchStrategy[tuple[AccumulatorPlan, np.ndarray, list[int]]]:
    """A plan, a matrix of updates and weights for its rows."""

    def of(plan: AccumulatorPlan, n: int, d: int):
        least = np.float32(plan.exact_from) if smallest is None else smallest
        return st.tuples(
            st.just(plan),
            hnp.arrays(np.float32, (n, d), elements=values_of(plan, float(least))),
            st.lists(st.integers(1, plan.max_weight), min_size=n, max_size=n),
        )

    return st.tuples(st.sampled_from(PLANS), st.integers(1, 12), st.integers(1, 4)).flatmap(lambda t: of(*t))


def folded(plan: AccumulatorPlan, updates, weights) -> ExactAccumulator:
    accumulator = ExactAccumulator(updates.shape[1], plan)
    accumulator.add_many(updates, weights)
    return accumulator


def exact_means(updates, weights) -> list[float]:
    products = updates.astype(np.float64) * np.array(weights, np.float64)[:, None]
    return [math.fsum(column) / sum(weights) for column in products.T.tolist()]


@relaxed
@given(cases())
def test_the_sum_is_that_of_exact_arithmetic_rounded_once(case):
    plan, updates, weights = case
    means = folded(plan, updates, weights).result().tolist()
    assert means == exact_means(updates, weights)
    sums = [sum(Fraction(x) * w for x, w in zip(c, weights, strict=True)) for c in updates.T.tolist()]
    assert means == [float(s) / sum(weights) for s in sums]


@relaxed
@given(cases(smallest=FLOAT32_TINY))
def test_below_the_resolution_each_value_is_off_by_at_most_half_a_step_and_order_still_does_not_matter(case):
    plan, updates, weights = case
    total = folded(plan, updates, weights)
    assert folded(plan, updates[::-1], weights[::-1]).to_bytes() == total.to_bytes()
    half_step = Fraction(float(plan.grids[-1])) / 2
    for mean, column in zip(total.result().tolist(), updates.T.tolist(), strict=True):
        exact = sum(Fraction(x) * w for x, w in zip(column, weights, strict=True))
        error = abs(Fraction(mean) * sum(weights) - exact)
        assert error <= len(weights) * half_step + abs(exact) * Fraction(1, 2**51)


@relaxed
@given(cases(smallest=FLOAT32_TINY), st.randoms(use_true_random=False))
def test_any_order_grouping_and_sharding_gives_the_same_bytes(case, random):
    plan, updates, weights = case
    order = list(range(len(weights)))
    random.shuffle(order)
    shards = [ExactAccumulator(updates.shape[1], plan) for _ in range(3)]
    while order:
        take = [order.pop() for _ in range(min(len(order), random.randint(1, 6)))]
        shard = random.choice(shards)
        if random.random() < 0.5:
            shard.add_many([updates[i] for i in take], [weights[i] for i in take])
        else:
            for i in take:
                shard.add(updates[i], weights[i])
    random.shuffle(shards)
    total = ExactAccumulator(updates.shape[1], plan)
    for shard in shards:
        total.merge(ExactAccumulator.from_bytes(shard.to_bytes()))
    assert total.to_bytes() == folded(plan, updates, weights).to_bytes()


@pytest.mark.parametrize("plan", PLANS, ids=["two bins", "three bins"])
@pytest.mark.parametrize("fraction", [1.0, 0.7500001, 2 / 3])
def test_the_budget_s_worst_case_is_still_exact(plan, fraction):
    """As many addends as declared, as large and as heavy as declared: no bin may leave its 53 bits."""
    top = plan.limit_bits.view(np.float32)
    update = np.array([top, -top, top * np.float32(fraction), plan.exact_from], np.float32)
    accumulator = ExactAccumulator(update.size, plan)
    accumulator.add_many([update] * plan.max_count, [plan.max_weight] * plan.max_count)
    total = plan.max_count * plan.max_weight
    assert accumulator.result().tolist() == [float(Fraction(x) * total) / total for x in update.tolist()]


@pytest.mark.parametrize("plan", PLANS, ids=["two bins", "three bins"])
def test_values_half_way_between_grid_points_split_the_same_way_forwards_and_backwards(plan):
    """The rounding to a grid must not depend on what the bin holds: ties are where it would show."""
    steps = np.arange(-7, 8, dtype=np.float64)
    ties = [((steps + 0.5) * g).astype(np.float32) for g in plan.grids.tolist()]
    updates = np.array([t for t in ties if np.abs(t).max() <= plan.max_abs]).T.copy()
    weights = [1] * len(updates)
    total = folded(plan, updates, weights)
    assert folded(plan, updates[::-1], weights).to_bytes() == total.to_bytes()
    one_by_one = ExactAccumulator(updates.shape[1], plan)
    for update in updates:
        one_by_one.add(update, 1)
    assert one_by_one.to_bytes() == total.to_bytes()


def test_the_worked_case_of_cancellation():
    accumulator = folded(THREE_BINS, np.array([[1], [1e8], [1], [-1e8]], np.float32), [1, 1, 1, 1])
    assert accumulator.result().tolist() == [0.5]


@pytest.mark.parametrize("plan", PLANS, ids=["two bins", "three bins"])
def test_everything_cancels_to_positive_zero(plan):
    rng = np.random.default_rng(3)
    updates = (rng.standard_normal((40, 5000)) * 10.0 ** rng.integers(-8, 3, (40, 5000))).astype(np.float32)
    weights = rng.integers(1, 1000, 40).tolist()
    accumulator = ExactAccumulator(5000, plan)
    accumulator.add_many(updates, weights)
    accumulator.add_many(-updates, weights)
    mean = accumulator.result()
    assert not mean.any()
    assert not np.signbit(mean).any()


@pytest.mark.parametrize("plan", PLANS, ids=["two bins", "three bins"])
@pytest.mark.parametrize("d", [0, 1, 2047, 2048, 2049, 70_001])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_every_size_and_number_of_reports_is_exact(plan, d, n):
    rng = np.random.default_rng(d + n)
    exponents = rng.integers(-8, 4 if plan is TWO_BINS else 8, (n, d))
    updates = (rng.uniform(-1, 1, (n, d)) * 10.0**exponents).astype(np.float32)
    updates[np.abs(updates) < plan.exact_from] = 0
    weights = rng.integers(1, plan.max_weight + 1, n).tolist()
    accumulator = folded(plan, updates, weights)
    assert accumulator.result().tolist() == exact_means(updates, weights)
    out = np.empty(d, np.float32)
    accumulator.result_into(out)
    assert np.array_equal(out, accumulator.result().astype(np.float32))


@pytest.mark.parametrize(("plan", "bytes_a_parameter"), [(TWO_BINS, 16), (THREE_BINS, 24)])
def test_memory_is_eight_bytes_a_bin_and_does_not_grow(plan, bytes_a_parameter):
    accumulator = ExactAccumulator(2048 * 50, plan)
    assert accumulator.nbytes == bytes_a_parameter * accumulator.size
    before = accumulator.nbytes
    accumulator.add_many(np.ones((100, accumulator.size), np.float32), [1] * 100)
    assert accumulator.nbytes == before


def sum_of_three(*columns) -> np.ndarray:
    bins = np.zeros((1, 3, BLOCK))
    bins[0, :, : len(columns[0])] = columns
    total = np.empty(BLOCK)
    sum_bins(bins, 0, 1, total)
    return total[: len(columns[0])]


finite = st.floats(-1e300, 1e300)


@relaxed
@given(hnp.arrays(np.float64, st.tuples(st.just(3), st.integers(1, 10)), elements=finite))
def test_the_sum_of_three_is_rounded_once(columns):
    assert sum_of_three(*columns).tolist() == [math.fsum(column) for column in columns.T.tolist()]


@relaxed
@given(st.integers(2**52, 2**53 - 1), st.sampled_from([0.5, -0.5, 1.0, 0.25]), st.integers(54, 300), st.booleans())
def test_the_sum_of_three_breaks_ties_by_what_lies_below_them(high, middle, depth, negative):
    low = 2.0**-depth * (-1 if negative else 1)
    for a, b, c in [(high, middle, low), (low, high, middle), (middle, low, high), (-high, -middle, low)]:
        column = [float(a), float(b), float(c)]
        assert sum_of_three(*np.array(column)[:, None]).tolist() == [math.fsum(column)]
    # What two roundings make of the same numbers, to show that the case is a hard one.
    if middle == 0.5 and depth > 54:
        assert float(high) + (middle + low) in (float(high), float(high + 1))
