"""Fixed point: the rounding is bounded and fair, the budget is never exceeded, and what does not fit is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from client_sdk.protocol.errors import BudgetExceeded, NonFiniteUpdate, ShapeMismatch, UpdateOutOfRange
from client_sdk.protocol.fixed_point import MAX_FRACTION_BITS, FixedPointGrid, choose_fraction_bits

INT64_MAX = 2**63 - 1
# The machine may be busy; no test here is about time.
relaxed = settings(deadline=None)

bounds = st.fixed_dictionaries(
    {
        "max_abs": st.floats(1e-12, 1e12),
        "max_count": st.integers(1, 10**7),
        "max_weight": st.integers(1, 10**4),
    }
)


def grid_of(bounds: dict) -> FixedPointGrid | None:
    try:
        return FixedPointGrid.for_bounds(**bounds)
    except BudgetExceeded:
        return None


def float32s(limit: float) -> st.SearchStrategy[float]:
    top = np.float32(limit)
    top = float(top) if float(top) <= limit else float(np.nextafter(top, np.float32(0)))
    return st.floats(-top, top, width=32)


vectors_on_a_grid = (
    bounds.map(grid_of)
    .filter(lambda grid: grid is not None)
    .flatmap(
        lambda grid: st.tuples(
            st.just(grid), hnp.arrays(np.float32, st.integers(0, 20), elements=float32s(grid.max_abs))
        )
    )
)


@relaxed
@given(vectors_on_a_grid)
def test_a_round_trip_misses_by_at_most_half_a_step(case):
    grid, values = case
    decoded = grid.decode(grid.encode(values))
    for x, y in zip(values.tolist(), decoded.tolist(), strict=True):
        assert abs(Fraction(x) - Fraction(y)) <= Fraction(1, 2 ** (grid.fraction_bits + 1)) == Fraction(grid.max_error)


@relaxed
@given(vectors_on_a_grid)
def test_encoding_is_the_nearest_integer_with_ties_to_even(case):
    grid, values = case
    exact = [round(Fraction(x) * 2**grid.fraction_bits) for x in values.tolist()]
    assert grid.encode(values).tolist() == exact


@relaxed
@given(vectors_on_a_grid)
def test_what_is_on_the_grid_stays_and_encoding_again_changes_nothing(case):
    grid, values = case
    codes = grid.encode(values)
    assert np.array_equal(grid.encode(grid.decode(codes).astype(np.float32)), codes)


@relaxed
@given(vectors_on_a_grid)
def test_encoding_keeps_order_and_sign(case):
    grid, values = case
    assert np.array_equal(grid.encode(-values), -grid.encode(values))
    assert (np.diff(grid.encode(np.sort(values))) >= 0).all()


def test_ties_go_to_even_codes():
    grid = FixedPointGrid(fraction_bits=1, max_abs=10, max_count=1)
    values = np.array([0.25, 0.75, 1.25, 1.75, -0.25, -0.75], np.float32)
    assert grid.encode(values).tolist() == [0, 2, 2, 4, 0, -2]


def test_the_documented_figures_hold():
    """With 19 bits a value's error is below 1e-6; with 24, 1e-8 becomes 0."""
    assert FixedPointGrid(fraction_bits=19, max_abs=1, max_count=1).max_error < 1e-6
    fine = FixedPointGrid(fraction_bits=24, max_abs=1, max_count=1)
    assert fine.encode(np.array([1e-8], np.float32)).tolist() == [0]


@relaxed
@given(bounds)
def test_the_worst_sum_stays_in_60_bits_and_one_more_bit_would_not(bounds):
    grid = grid_of(bounds)
    if grid is None:
        assert bounds["max_abs"] * bounds["max_count"] * bounds["max_weight"] > 2**59
        return
    top = np.float32(grid.max_abs)
    top = top if float(top) <= grid.max_abs else np.nextafter(top, np.float32(0))
    code = int(grid.encode(np.array([top]))[0])
    assert code <= grid.largest_code
    assert grid.largest_code * grid.max_count * grid.max_weight <= 2**60 <= INT64_MAX
    if grid.fraction_bits < MAX_FRACTION_BITS:
        with pytest.raises(BudgetExceeded):
            FixedPointGrid(**(grid.model_dump() | {"fraction_bits": grid.fraction_bits + 1}))


@relaxed
@given(bounds, st.sampled_from(["max_abs", "max_count", "max_weight"]), st.integers(2, 1000))
def test_wider_bounds_never_get_a_finer_grid(bounds, name, factor):
    narrow = grid_of(bounds)
    wide = grid_of(bounds | {name: bounds[name] * factor})
    if narrow is None:
        assert wide is None
    elif wide is not None:
        assert wide.fraction_bits <= narrow.fraction_bits


@pytest.mark.parametrize(
    ("bounds", "fraction_bits"),
    [
        ({"max_abs": 1.0, "max_count": 1}, 40),
        ({"max_abs": 1.0, "max_count": 2**20}, 40),
        ({"max_abs": 1.0, "max_count": 2**20 + 1}, 39),
        ({"max_abs": 1.0, "max_count": 2**20, "max_weight": 2**10}, 30),
        ({"max_abs": 1e8, "max_count": 100_000, "max_weight": 1000}, 6),
        ({"max_abs": 2.0**60, "max_count": 1}, 0),
    ],
)
def test_the_formula_decides_the_bits(bounds, fraction_bits):
    assert choose_fraction_bits(**bounds) == fraction_bits


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_abs": 2.0**61, "max_count": 1},
        {"max_abs": 1.0, "max_count": 2**60 + 1},
        {"max_abs": 1e-30, "max_count": 2**60 + 1},
        {"max_abs": 0.0, "max_count": 1},
        {"max_abs": -1.0, "max_count": 1},
        {"max_abs": math.inf, "max_count": 1},
        {"max_abs": math.nan, "max_count": 1},
        {"max_abs": 1.0, "max_count": 0},
        {"max_abs": 1.0, "max_count": 1, "max_weight": 0},
    ],
)
def test_bounds_that_no_grid_serves_are_refused(bounds):
    with pytest.raises(BudgetExceeded):
        choose_fraction_bits(**bounds)


@pytest.mark.parametrize("change", [{"fraction_bits": 41}, {"fraction_bits": -1}, {"max_abs": math.nan}, {"bits": 3}])
def test_a_grid_with_senseless_fields_is_refused(change):
    with pytest.raises(ValidationError):
        FixedPointGrid(**({"fraction_bits": 8, "max_abs": 1.0, "max_count": 1} | change))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 3, 6])
def test_nan_and_infinities_are_refused(value, position):
    values = np.zeros(7, np.float32)
    values[position] = value
    with pytest.raises(NonFiniteUpdate):
        FixedPointGrid(fraction_bits=8, max_abs=1.0, max_count=1).encode(values)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_is_inclusive_and_compared_without_rounding(sign):
    grid = FixedPointGrid(fraction_bits=8, max_abs=0.1, max_count=1)
    above = np.float32(0.1)
    assert float(above) > 0.1
    below = np.nextafter(above, np.float32(0))
    grid.encode(np.array([sign * below]))
    with pytest.raises(UpdateOutOfRange):
        grid.encode(np.array([sign * above]))


def test_other_dtypes_are_refused():
    grid = FixedPointGrid(fraction_bits=8, max_abs=1.0, max_count=1)
    with pytest.raises(ShapeMismatch):
        grid.encode(np.zeros(3))
    with pytest.raises(ShapeMismatch):
        grid.decode(np.zeros(3, np.int32))


@relaxed
@given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(1, 50)), min_size=1, max_size=30),
)
def test_the_mean_is_decoded_once(pairs):
    grid = FixedPointGrid.for_bounds(max_abs=1.0, max_count=30, max_weight=50)
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    codes = grid.encode(values.astype(np.float32))
    sums = np.array([int(codes @ weights)])
    total = int(weights.sum())
    mean = float(grid.decode_mean(sums, total)[0])
    assert mean == float(Fraction(int(sums[0]), 2**grid.fraction_bits)) / total


def test_sums_that_no_codes_reach_are_not_decoded():
    grid = FixedPointGrid.for_bounds(max_abs=1.0, max_count=30)
    with pytest.raises(UpdateOutOfRange):
        grid.decode_mean(np.array([grid.largest_code * 3 + 1]), 3)
    with pytest.raises(UpdateOutOfRange):
        grid.decode(np.array([-(2**63)]))
