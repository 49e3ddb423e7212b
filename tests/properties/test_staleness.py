"""What holds for every staleness policy, and what the stability bound says of real recurrences."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ref.aggregation.staleness import (
    SCALE,
    StalenessPolicy,
    StalenessWeighting,
    largest_stable_staleness,
    stability_limit,
)

ROUNDS = st.integers(-5, 500)
AGES = st.integers(0, 10_000)


@st.composite
def policies(draw: st.DrawFn) -> StalenessPolicy:
    oldest = draw(st.integers(0, 50))
    exponent = draw(st.floats(0, 4))
    return StalenessPolicy(
        weighting=draw(st.sampled_from(StalenessWeighting)),
        exponent=exponent,
        final_exponent=exponent + draw(st.floats(0, 4)),
        max_staleness=oldest,
        min_staleness=draw(st.integers(0, oldest)),
        tighten_rounds=draw(st.none() | st.integers(1, 300)),
        total_rounds=draw(st.integers(1, 300)),
        step_times_curvature=draw(st.none() | st.floats(0.01, 1.99)),
        scale_learning_rate=draw(st.booleans()),
    )


@given(policies(), AGES, AGES, ROUNDS, ROUNDS)
def test_weights_fall_with_age_and_progress_and_never_reach_zero(policy, age, more, round_id, later):
    weight = policy.scale(age, round_id)
    assert 1 <= weight <= SCALE
    assert policy.scale(0, round_id) == SCALE
    assert policy.scale(age + more, round_id) <= weight
    assert policy.scale(age, max(round_id, later)) <= weight


@given(policies(), ROUNDS, ROUNDS)
def test_the_tolerance_never_rises_and_stays_within_its_declared_ends(policy, round_id, later):
    tolerance = policy.tolerance(round_id)
    assert 0 <= tolerance <= policy.max_staleness
    assert policy.tolerance(max(round_id, later)) <= tolerance
    if policy.step_times_curvature is None:
        assert tolerance >= (policy.min_staleness if policy.tighten_rounds else policy.max_staleness)
    else:
        assert policy.step_times_curvature < stability_limit(tolerance)


@given(st.integers(0, 400), st.integers(1, 8), st.integers(1, 8))
def test_a_weight_is_the_largest_part_of_256_that_the_formula_allows(age, numerator, denominator):
    exponent = Fraction(numerator, denominator)
    policy = StalenessPolicy(exponent=float(exponent))
    # w <= 256 (1 + age)^(-p/q)  <=>  w^q (1 + age)^p <= 256^q, in integers.
    allowed = [w for w in range(1, 257) if w**denominator * (1 + age) ** numerator <= 256**denominator]
    assert policy.scale(age, 0) == max(allowed, default=1)


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_the_learning_rate_falls_with_the_mean_staleness(ages):
    scaled = StalenessPolicy(scale_learning_rate=True).learning_rate_scale(ages)
    assert scaled == pytest.approx(float(1 / (1 + Fraction(sum(ages), len(ages)))), rel=1e-15)
    assert StalenessPolicy().learning_rate_scale(ages) == 1.0


@given(st.floats(1e-5, 1.999), st.integers(0, 10_000))
def test_the_largest_stable_staleness_is_stable_and_the_next_is_not(step, at_most):
    staleness = largest_stable_staleness(step, at_most=at_most)
    assert 0 <= staleness <= at_most
    assert step < stability_limit(staleness)
    assert staleness == at_most or step >= stability_limit(staleness + 1)


def spectral_radius(step: float, mixture: list[float]) -> float:
    """Largest root of ``z - 1 + step * sum_tau mixture[tau] z^-tau``, by an eigenvalue solver."""
    oldest = len(mixture) - 1
    coefficients = np.zeros(oldest + 2)
    coefficients[0] = 1
    coefficients[1] -= 1
    coefficients[1:] += step * np.array(mixture)
    return float(np.max(np.abs(np.roots(coefficients))))


@pytest.mark.parametrize("staleness", [0, 1, 2, 5, 10, 40])
def test_the_limit_is_where_the_characteristic_roots_leave_the_unit_circle(staleness):
    only = [0.0] * staleness + [1.0]
    assert spectral_radius(0.999 * stability_limit(staleness), only) < 1
    assert spectral_radius(1.001 * stability_limit(staleness), only) > 1


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12).filter(any), st.floats(0.01, 0.999), st.floats(0.01, 1))
def test_the_limit_of_the_oldest_suffices_for_every_fixed_mixture_of_ages(parts, fraction, total):
    mixture = [total * part / sum(parts) for part in parts]
    step = fraction * stability_limit(len(mixture) - 1)
    assert spectral_radius(step, mixture) < 1


@given(st.integers(0, 60), st.floats(0.01, math.pi / 2))
def test_a_learning_rate_divided_by_one_plus_the_age_is_stable_at_every_age(staleness, step):
    assert step / (1 + staleness) < stability_limit(staleness)
    policy = StalenessPolicy(scale_learning_rate=True)
    scaled = step * policy.learning_rate_scale([staleness] * 3)
    assert spectral_radius(scaled, [0.0] * staleness + [1.0]) < 1


def test_a_fresh_half_keeps_a_stale_half_stable_far_beyond_the_limit_of_the_stale():
    mixture = [0.5, 0, 0, 0, 0, *[0.5 / 6] * 6]
    assert all(spectral_radius(float(step), mixture) < 1 for step in np.arange(0.1, 4.0, 0.1))
    assert spectral_radius(4.1, mixture) > 1


def test_ages_that_are_chosen_against_the_run_diverge_below_the_limit_for_a_fixed_age():
    # The measured case that the documentation quotes: ages of at most 2, in a cycle of 4 rounds.
    step, cycle = 0.611, (0, 1, 2, 2)
    assert step < stability_limit(2)
    product = np.eye(3)
    for age in cycle:
        companion = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        companion[0, age] -= step
        product = companion @ product
    assert np.max(np.abs(np.linalg.eigvals(product))) > 1
