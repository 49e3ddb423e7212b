"""The adaptive clip norm: where it goes, what it costs, and that it never looks at a norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation import AdaptiveClipNorm, split_noise
from server_ref.aggregation.adaptive_clipping import update_multiplier

# The machine may be busy; no test here is about time.
relaxed = settings(deadline=None, max_examples=60)


def indicator(norms: np.ndarray, clip_norm: float) -> int:
    return int(np.where(norms <= clip_norm, 1, -1).sum())


@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_it_settles_where_the_target_share_of_the_norms_lies_below(start, target):
    norms = np.random.default_rng(0).lognormal(0.5, 0.7, 1000)
    state = AdaptiveClipNorm(clip_norm=start, target_quantile=target)
    for _ in range(400):
        state = state.after(indicator(norms, state.clip_norm), 1000)
    assert np.mean(norms <= state.clip_norm) == pytest.approx(target, abs=0.05)


def test_it_follows_norms_that_shrink_in_spite_of_the_noise():
    rng = np.random.default_rng(1)
    state = AdaptiveClipNorm(clip_norm=5.0, target_quantile=0.5)
    split = split_noise(2.0, 500)
    medians, clip_norms = [], []
    for t in range(120):
        norms = 4.0 * 0.98**t * rng.lognormal(0, 0.3, 500)
        noised = indicator(norms, state.clip_norm) + round(rng.normal(0, split.indicator_multiplier))
        state = state.after(noised, 500)
        medians.append(float(np.median(norms)))
        clip_norms.append(state.clip_norm)
    ratio = np.array(clip_norms[20:]) / np.array(medians[20:])
    assert 0.7 < ratio.min() < ratio.max() < 1.6
    assert clip_norms[-1] < clip_norms[30] / 3


@relaxed
@given(st.integers(-(10**9), 10**9), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_one_round_moves_it_by_no_more_than_the_rate_whatever_the_noise_says(noised, count, clip_norm):
    state = AdaptiveClipNorm(clip_norm=clip_norm, target_quantile=0.9, learning_rate=0.2)
    after = state.after(noised, count)
    assert math.exp(-0.2 * 0.1) * 0.999999 <= after.clip_norm / clip_norm <= math.exp(0.2 * 0.9) * 1.000001
    assert after.model_copy(update={"clip_norm": clip_norm}) == state
    if not count:
        assert after == state


def test_it_stays_within_its_bounds():
    state = AdaptiveClipNorm(clip_norm=1.0, smallest=0.9, largest=1.1)
    assert state.after(-10, 10).clip_norm == pytest.approx(math.exp(0.1), abs=0.01)
    for _ in range(5):
        state = state.after(-10, 10)
    assert state.clip_norm == 1.1
    for _ in range(9):
        state = state.after(10, 10)
    assert state.clip_norm == 0.9


@relaxed
@given(st.floats(0.1, 500), st.integers(1, 10**6))
def test_update_and_indicator_together_cost_what_was_paid_for(z, count):
    split = split_noise(z, count)
    if split is None:
        assert z / (2 * math.sqrt(0.1)) > count / 4
        return
    together = 1 / math.hypot(1 / split.update_multiplier, 1 / split.indicator_multiplier)
    assert together == pytest.approx(z, rel=1e-9)
    assert together >= z * (1 - 1e-15)
    assert z < split.update_multiplier <= z / math.sqrt(0.9) * (1 + 1e-9)
    assert count / 20 <= split.indicator_stddev <= count / 4
    if split.indicator_stddev > count / 20 * (1 + 1e-9):
        assert (z / split.indicator_multiplier) ** 2 == pytest.approx(0.1)


def test_the_source_s_formula():
    assert split_noise(1.0, 100).indicator_stddev == 5.0
    assert split_noise(1.0, 100).update_multiplier == pytest.approx((1.0**-2 - 10.0**-2) ** -0.5)
    # With bits of 0 and 1 it would be sigma_b**-2: half of the noise would not do.
    assert update_multiplier(1.0, 5.0) < (1.0**-2 - 5.0**-2) ** -0.5


def test_too_few_updates_leave_the_clip_norm_where_it_is():
    assert split_noise(100.0, 600) is None
    assert split_noise(100.0, 700) is not None
    assert split_noise(1.0, 1) is None


@pytest.mark.parametrize("stddev", [0.0, 1.0, 1.5])
def test_an_indicator_that_costs_everything_is_refused(stddev):
    with pytest.raises((ConfigurationError, ZeroDivisionError)):
        update_multiplier(3.0, stddev)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigurationError):
        AdaptiveClipNorm(clip_norm=1.0, smallest=2.0)
    with pytest.raises(ConfigurationError):
        split_noise(0.0, 100)
    for bad in ({"clip_norm": 0.0}, {"clip_norm": math.inf}, {"target_quantile": 1.0}, {"learning_rate": 0.0}):
        with pytest.raises(ValidationError):
            AdaptiveClipNorm(**{"clip_norm": 1.0, **bad})
