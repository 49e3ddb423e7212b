"""Staleness policies and the schedules made of them, case by case."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Facts
from server_ref.aggregation.errors import UnboundedWeight
from server_ref.aggregation.stages import Slot
from server_ref.aggregation.staleness import (
    SCALE,
    BufferedSchedule,
    StalenessPolicy,
    SynchronousSchedule,
    largest_stable_staleness,
    stability_limit,
)

FACTS = Facts(size=4, kind=UpdateKind.DELTA, capacity=20)


def test_the_figures_that_the_documentation_quotes():
    assert [round(stability_limit(tau), 4) for tau in (0, 1, 5, 10)] == [2.0, 1.0, 0.2846, 0.1495]
    assert largest_stable_staleness(0.1) == 15
    assert [StalenessPolicy(exponent=0.5).scale(tau, 0) for tau in (0, 1, 3, 10)] == [256, 181, 128, 77]


def test_an_update_that_rounds_to_nothing_keeps_the_smallest_weight():
    policy = StalenessPolicy(exponent=2.0, max_staleness=100)
    assert policy.scale(15, 0) == 1  # 256 / 16 ** 2 exactly
    assert policy.scale(16, 0) == policy.scale(100, 0) == policy.scale(10**9, 0) == 1


def test_adaptive_weights_follow_the_declared_progress():
    policy = StalenessPolicy(weighting="adaptive", exponent=0.5, final_exponent=2.0, total_rounds=50)
    assert [policy.exponent_at(r) for r in (0, 25, 50, 1000)] == [0.5, 1.25, 2.0, 2.0]
    assert [policy.scale(3, r) for r in (0, 50)] == [128, 16]


def test_adaptive_weights_need_to_know_how_long_the_run_is():
    policy = StalenessPolicy(weighting="adaptive")
    with pytest.raises(ConfigurationError, match="total_rounds"):
        policy.scale(1, 0)
    with pytest.raises(ConfigurationError, match="total_rounds"):
        BufferedSchedule(policy, buffer_size=5)
    assert BufferedSchedule(policy.lasting(10), buffer_size=5).scale(3, 10) == 16
    assert policy.lasting(10).lasting(99).total_rounds == 10, "what is declared stays"


def test_the_tolerance_falls_in_equal_steps_and_stops():
    policy = StalenessPolicy(max_staleness=10, min_staleness=4, tighten_rounds=12)
    assert [policy.tolerance(r) for r in range(0, 15, 2)] == [10, 9, 8, 7, 6, 5, 4, 4]


def test_the_declared_step_size_limits_the_tolerance():
    policy = StalenessPolicy(max_staleness=10, min_staleness=4, tighten_rounds=12, step_times_curvature=0.2)
    assert largest_stable_staleness(0.2) == 7
    assert [policy.tolerance(r) for r in (0, 6, 12)] == [7, 7, 4]
    assert StalenessPolicy(max_staleness=10, step_times_curvature=1.5).tolerance(0) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"min_staleness": 11, "max_staleness": 10},
        {"weighting": "adaptive", "exponent": 2.0, "final_exponent": 1.0},
        {"step_times_curvature": 2.0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ConfigurationError):
        StalenessPolicy(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"exponent": -1.0},
        {"exponent": float("nan")},
        {"max_staleness": -1},
        {"weighting": "quadratic"},
        {"tighten_rounds": 0},
        {"step_times_curvature": 0.0},
        {"tolerence": 3},
    ],
)
def test_numbers_out_of_their_range_are_refused(settings):
    with pytest.raises(ValidationError):
        StalenessPolicy(**settings)


@pytest.mark.parametrize("step", [0.0, -1.0, 2.0, float("nan"), float("inf")])
def test_a_step_that_is_unstable_without_delay_has_no_stable_staleness(step):
    with pytest.raises(ConfigurationError):
        largest_stable_staleness(step)


def test_a_model_from_the_future_has_no_weight():
    with pytest.raises(ConfigurationError):
        StalenessPolicy().scale(-1, 0)
    with pytest.raises(ConfigurationError):
        stability_limit(-1)


def test_synchronous_rounds_take_fresh_updates_only_and_change_no_fact():
    schedule = SynchronousSchedule()
    assert schedule.slot is Slot.SCHEDULE
    assert [schedule.admits(tau, 3) for tau in (-1, 0, 1)] == [False, True, False]
    assert schedule.derive(FACTS) is FACTS
    assert schedule.scale(0, 3) == 1
    assert schedule.learning_rate_scale([0, 0], 3) == 1.0


def test_a_buffered_schedule_admits_by_the_policy_and_refuses_the_future():
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=2, min_staleness=0, tighten_rounds=2), buffer_size=5)
    assert [schedule.admits(tau, 0) for tau in (-1, 0, 2, 3)] == [False, True, True, False]
    assert [schedule.admits(tau, 2) for tau in (0, 1)] == [True, False]


def test_staleness_weights_declare_their_scale_and_never_change_the_denominator():
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=5, exponent=1.0), buffer_size=5)
    facts = schedule.derive(FACTS)
    assert facts.max_scale == SCALE
    assert facts.constant_denominator == 5, "the constant K: not what is in the buffer, and not how old it is"
    assert schedule.scale(0, 0) == facts.max_scale
    assert schedule.scale(3, 0) == 64
    weighted = schedule.derive(Facts(size=4, kind=UpdateKind.DELTA, max_weight=100))
    assert weighted.constant_denominator is None, "sample weights divide by their own sum, which no age changes"


def test_constant_weights_stay_as_they_are():
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=5, weighting="constant"), buffer_size=5)
    assert schedule.derive(FACTS).max_scale == 1
    assert schedule.scale(5, 0) == 1


def test_staleness_weights_on_unbounded_sample_weights_are_refused():
    unbounded = Facts(size=4, kind=UpdateKind.DELTA, max_weight=None)
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=5), buffer_size=5)
    with pytest.raises(UnboundedWeight, match="max_weight"):
        schedule.derive(unbounded)
    constant = BufferedSchedule(StalenessPolicy(max_staleness=5, weighting="constant"), buffer_size=5)
    assert constant.derive(unbounded) == unbounded


def test_a_schedule_says_what_it_does():
    policy = StalenessPolicy(
        weighting="adaptive",
        max_staleness=10,
        min_staleness=3,
        tighten_rounds=40,
        total_rounds=100,
        scale_learning_rate=True,
    )
    assert BufferedSchedule(policy, buffer_size=8).title == (
        "asynchronous: buffers of 8, staleness <= 10, falling to 3 over 40 rounds, "
        "weights (1 + staleness)^-0.5..2 over 100 rounds, learning rate / (1 + mean staleness)"
    )
    with pytest.raises(ConfigurationError):
        BufferedSchedule(policy, buffer_size=0)
