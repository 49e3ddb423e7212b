"""Plans: the specification's range gives the published grids, every plan is proved, and impossible ones are refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import BudgetExceeded
from server_ref import AccumulatorPlan

relaxed = settings(deadline=None)
FULL_RANGE = {"max_abs": 1e8, "max_weight": 1000, "max_count": 100_000, "resolution": 1e-8}

bounds = st.fixed_dictionaries(
    {
        "max_abs": st.floats(1e-20, 1e20),
        "max_weight": st.integers(1, 2**20),
        "max_count": st.integers(1, 2**30),
        "resolution": st.floats(1e-30, 1e10),
    }
)


def test_the_specification_s_full_range_takes_three_bins():
    assert AccumulatorPlan.for_bounds(**FULL_RANGE).grid_exponents == (1, -36, -73)


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_abs": 1.0, "max_weight": 1, "max_count": 10**6, "resolution": 1e-8},
        {"max_abs": 1024.0, "max_weight": 1024, "max_count": 1000, "resolution": 1e-8},
        {"max_abs": 1e8, "max_weight": 1, "max_count": 1000, "resolution": 1e-8},
    ],
)
def test_moderate_ranges_take_two_bins(bounds):
    plan = AccumulatorPlan.for_bounds(**bounds)
    assert plan.num_bins == 2
    assert plan.exact_from <= bounds["resolution"]


@relaxed
@given(bounds)
def test_a_plan_keeps_every_condition_of_the_proof_or_is_refused(bounds):
    try:
        plan = AccumulatorPlan.for_bounds(**bounds)
    except BudgetExceeded:
        return
    n, reach = plan.max_count, Fraction(plan.max_abs) * plan.max_weight
    left = reach
    for grid in map(Fraction, plan.grids.tolist()):
        assert left <= 2**51 * grid
        assert n * (left + grid / 2 if left is reach else left) <= 2**53 * grid
        left = grid / 2
    smallest = np.float32(plan.resolution)
    if float(smallest) < plan.resolution:
        smallest = np.nextafter(smallest, np.float32(np.inf))
    assert (Fraction(float(smallest)) / Fraction(plan.grids.tolist()[-1])).denominator == 1


@relaxed
@given(bounds, st.sampled_from(["max_abs", "max_weight", "max_count"]), st.integers(2, 100))
def test_wider_bounds_never_get_finer_first_grids(bounds, name, factor):
    try:
        wide = AccumulatorPlan.for_bounds(**(bounds | {name: bounds[name] * factor}))
        narrow = AccumulatorPlan.for_bounds(**bounds)
    except (BudgetExceeded, ValidationError):
        return
    assert narrow.grid_exponents[0] <= wide.grid_exponents[0]
    assert narrow.num_bins <= wide.num_bins


def test_a_range_beyond_three_bins_is_refused_with_a_resolution_that_works():
    bounds = FULL_RANGE | {"max_abs": 1e30, "resolution": 1e-30}
    with pytest.raises(BudgetExceeded, match="raise resolution to") as refusal:
        AccumulatorPlan.for_bounds(**bounds)
    advice = float(str(refusal.value).split("raise resolution to ")[1].split()[0])
    assert AccumulatorPlan.for_bounds(**(bounds | {"resolution": advice * 1.01})).num_bins == 3


@pytest.mark.parametrize(
    ("exponents", "match"),
    [
        ((0, -36, -73), "does not hold"),
        ((1, -37, -73), "does not hold"),
        ((1, -36, -74), "does not hold"),
        ((1, -36), "rounds values"),
        ((80, 80, 80), "must fall"),
    ],
)
def test_grids_that_break_the_proof_are_refused(exponents, match):
    with pytest.raises(BudgetExceeded, match=match):
        AccumulatorPlan(**FULL_RANGE, grid_exponents=exponents)


def test_a_total_weight_beyond_53_bits_is_refused():
    with pytest.raises(BudgetExceeded, match="total weight"):
        AccumulatorPlan.for_bounds(max_abs=1.0, max_weight=2**29, max_count=2**25, resolution=1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_abs": 0.0},
        {"max_abs": -1.0},
        {"max_abs": math.inf},
        {"max_abs": math.nan},
        {"max_abs": 1e39},
        {"max_weight": 0},
        {"max_weight": 2**29 + 1},
        {"max_weight": 1.5},
        {"max_count": 0},
        {"resolution": 0.0},
        {"resolution": 1e-46},
        {"resolution": math.nan},
    ],
)
def test_bounds_that_are_no_positive_numbers_are_refused(change):
    with pytest.raises(ValidationError):
        AccumulatorPlan.for_bounds(**(FULL_RANGE | change))


@pytest.mark.parametrize("max_abs", [5e-324, 1e-200, 1.4e-45])
def test_a_bound_that_only_zero_keeps_is_refused_with_what_to_change(max_abs):
    with pytest.raises(BudgetExceeded, match="raise max_abs, or the clip_norm"):
        AccumulatorPlan.for_bounds(**(FULL_RANGE | {"max_abs": max_abs}))


def test_the_smallest_bound_that_a_float32_keeps_has_a_plan():
    assert AccumulatorPlan.for_bounds(**(FULL_RANGE | {"max_abs": 2.0**-149, "resolution": 2.0**-149}))


def test_a_plan_is_frozen_and_knows_no_other_field():
    plan = AccumulatorPlan.for_bounds(**FULL_RANGE)
    with pytest.raises(ValidationError):
        plan.max_count = 3
    with pytest.raises(ValidationError):
        AccumulatorPlan(**plan.model_dump(), bins=3)


def test_the_limit_is_the_largest_float32_within_the_bound():
    plan = AccumulatorPlan.for_bounds(max_abs=0.1, max_weight=1, max_count=1, resolution=1e-3)
    limit = plan.limit_bits.view(np.float32)
    assert float(limit) <= 0.1 < float(np.nextafter(limit, np.float32(1)))
