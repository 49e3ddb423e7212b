"""Divergence is found soon, honest noise is not divergence, and a restarted server goes on where it was."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError, DivergenceDetected
from server_ref.aggregation.monitoring import (
    DivergenceDetector,
    DivergenceState,
    Health,
    NormMonitor,
    NormState,
)
from tests.curves import BREAK, SHAPES, diverged_at, diverging, honest, oscillating, states

DETECTOR = DivergenceDetector()


def after(losses: list[float], detector: DivergenceDetector = DETECTOR) -> DivergenceState:
    state = DivergenceState()
    for loss in losses:
        state = detector.next(state, loss=loss)
    return state


# --- curves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noisy_honest_training_raises_no_alarm(shape, noise):
    assert [seed for seed in range(6) if diverged_at(*honest(shape, noise, seed, rounds=300)) is not None] == []


@pytest.mark.parametrize(("growth", "median", "longest"), [(1.05, 25, 40), (1.1, 16, 22), (1.3, 9, 10), (2.0, 7, 7)])
def test_exponential_divergence_is_found_within_its_delay(growth, median, longest):
    late = [diverged_at(*diverging(growth, 0.2, seed)) - BREAK for seed in range(8)]
    assert min(late) > 0
    assert statistics.median(late) <= median
    assert max(late) <= longest


@pytest.mark.parametrize(("growth", "longest"), [(1.2, 22), (1.5, 13)])
def test_an_oscillation_that_widens_is_found_although_every_other_loss_is_low(growth, longest):
    late = [diverged_at(*oscillating(growth, 0.05, seed)) - BREAK for seed in range(4)]
    assert all(0 < rounds <= longest for rounds in late)


def test_the_norms_alone_find_what_no_loss_was_measured_for():
    _, norms = diverging(1.3, 0.1, 0)
    monitor, found = NormMonitor(), [NormState()]
    for norm in norms.tolist():
        found.append(monitor.next(found[-1], norm))
    assert found[BREAK].health is Health.HEALTHY
    assert found[BREAK + 14].health is Health.DIVERGED
    assert "norms of the aggregates grew" in found[-1].reason


# --- losses, by hand ------------------------------------------------------------------------------------------


def test_twice_the_best_loss_for_as_many_rounds_as_patience_is_divergence():
    good = [1.0] * 20
    assert after([*good, *[2.1] * 4]).health is Health.SUSPECT
    assert after([*good, *[2.1] * 5]).health is Health.DIVERGED
    assert after([*good, *[1.9] * 50]).health is Health.HEALTHY


def test_a_loss_that_swings_around_the_threshold_does_not_escape_and_a_good_one_forgets():
    good = [1.0] * 20
    between, below = 1.7, 1.2
    assert after([*good, *[2.1, between] * 5]).health is Health.DIVERGED
    assert after([*good, *[2.1, 2.1, 2.1, 2.1, below] * 5]).health is Health.HEALTHY
    assert after([*good, 2.1, between]).strikes == 1
    assert after([*good, 2.1, below]).strikes == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e301])
def test_a_loss_that_is_not_a_number_is_divergence_at_once(bad):
    state = after([bad])
    assert state.health is Health.DIVERGED
    with pytest.raises(DivergenceDetected, match="not finite"):
        DETECTOR.check(state)


def test_a_loss_of_nearly_nothing_may_double():
    assert after([1.0, 0.1, *[1e-9] * 50, *[1e-3] * 50, *[0.02] * 50]).health is Health.HEALTHY
    assert after([1.0, 0.1, *[1e-9] * 50, *[0.06] * 5]).health is Health.DIVERGED
    assert after([0.0] * 20).health is Health.HEALTHY
    assert after([*[0.0] * 20, *[1.0] * 5]).health is Health.DIVERGED


def test_a_verdict_stays_until_the_model_is_rolled_back():
    state = after([*[1.0] * 20, *[5.0] * 5, *[0.5] * 50])
    assert state.health is Health.DIVERGED
    again = state.after_rollback()
    assert again.health is Health.HEALTHY
    assert math.exp(again.best) == pytest.approx(1.0)
    for loss in [2.1] * 5:
        again = DETECTOR.next(again, loss=loss)
    assert again.health is Health.DIVERGED


def test_a_healthy_run_passes_the_check():
    DETECTOR.check(DivergenceState())
    DETECTOR.check(after([*[1.0] * 20, 2.1]))


def test_rounds_without_a_loss_count_for_nothing():
    state = after([*[1.0] * 20, 2.1])
    assert DETECTOR.next(state) == state
    assert DETECTOR.next(state, norm=0.0) == state


# --- norms, by hand -------------------------------------------------------------------------------------------


def test_one_norm_that_stands_out_is_a_warning_only():
    state = DivergenceState()
    for norm in [1.0, 1.1, 0.9, 1.05, 0.95] * 5:
        state = DETECTOR.next(state, norm=norm)
    assert state.health is Health.HEALTHY
    state = DETECTOR.next(state, norm=3.0)
    assert state.health is Health.SUSPECT
    assert "stands out" in state.reason
    DETECTOR.check(state)
    assert DETECTOR.next(state, norm=1.0, loss=1.0).health is Health.HEALTHY


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_divergence_at_once(bad):
    state = DETECTOR.next(DivergenceState(), norm=bad)
    assert state.health is Health.DIVERGED
    with pytest.raises(DivergenceDetected, match="norm"):
        DETECTOR.check(state)


def test_norms_that_shrank_to_a_thousandth_may_grow_tenfold():
    monitor, state = NormMonitor(), NormState()
    for norm in [*[1.0] * 10, *[1e-3] * 10, *[2e-2] * 10]:
        state = monitor.next(state, norm)
    assert state.health is Health.HEALTHY
    for norm in [1.5] * 5:
        state = monitor.next(state, norm)
    assert state.health is Health.DIVERGED


def test_extreme_norms_and_empty_rounds_are_taken():
    monitor, state = NormMonitor(), NormState()
    for norm in [0.0, *[5e-324] * 5, 0.0, *[1.7e308] * 5]:
        state = monitor.next(state, norm)
    assert state.health is Health.DIVERGED


# --- the state as data ----------------------------------------------------------------------------------------


def test_a_state_that_went_through_json_goes_on_the_same():
    losses, norms = diverging(1.1, 0.2, 3)
    uninterrupted = list(states(losses, norms))
    state = DivergenceState()
    for loss, norm, expected in zip(losses.tolist(), norms.tolist(), uninterrupted, strict=True):
        state = DETECTOR.next(DivergenceState.model_validate_json(state.model_dump_json()), loss=loss, norm=norm)
        assert state == expected
    assert state.health is Health.DIVERGED


@pytest.mark.parametrize(
    "change",
    [{"best": math.inf}, {"best": 1e9}, {"losses": -1}, {"strikes": -1}, {"health": "well"}, {"more": 1}],
    ids=str,
)
def test_a_stored_state_that_cannot_be_is_refused(change):
    stored = {**json.loads(after([1.0] * 5).model_dump_json()), **change}
    with pytest.raises(ValidationError):
        DivergenceState.model_validate_json(json.dumps(stored))


def test_the_state_stays_small():
    losses, norms = honest("flat", 0.2, 0)
    *_, last = states(losses, norms)
    assert len(last.model_dump_json()) < 2000


@pytest.mark.parametrize(
    "settings",
    [{"factor": 1.0}, {"patience": 0}, {"smoothing": 0.0}, {"smoothing": 1.1}, {"window": 4}, {"least_rise": -1.0}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError):
        DivergenceDetector(**settings)


def test_negative_losses_and_norms_are_refused():
    with pytest.raises(ConfigurationError):
        DETECTOR.next(DivergenceState(), loss=-1.0)
    with pytest.raises(ConfigurationError):
        DETECTOR.next(DivergenceState(), norm=-1.0)
