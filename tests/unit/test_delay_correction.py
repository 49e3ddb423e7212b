"""The momentum correction: an exact cancellation where it can be, a larger stable region where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.staleness import stability_limit


def descend(curvatures, step, ages, *, damping=None, rounds=400):
    """Delayed gradient descent on a diagonal quadratic from all ones; ``ages[t]`` are those of round t's updates."""
    curvatures = np.array(curvatures, float)
    correction = damping and DelayCorrection(damping=damping, max_staleness=max(map(max, ages)))
    models = [np.ones(curvatures.size)]
    for t in range(rounds):
        now = [min(age, t) for age in ages[t % len(ages)]]
        mean = np.mean([curvatures * models[t - age] for age in now], axis=0)
        if correction:
            mean = correction.correct(mean, now, [1] * len(now), len(now))
            correction.record(mean)
        models.append(models[-1] - step * mean)
    return np.array(models)


def test_with_the_true_curvature_the_delay_vanishes():
    corrected = descend([1.0], 0.5, [[10, 10]], damping=0.5)
    fresh = descend([1.0], 0.5, [[0, 0]])
    np.testing.assert_allclose(corrected, fresh, rtol=0, atol=1e-12)


def test_what_diverges_without_it_converges_with_it():
    step = 5 * stability_limit(10)
    assert np.abs(descend([1.0, 0.3], step, [[10]])[-1]).max() > 1e6
    corrected = descend([1.0, 0.3], step, [[10]], damping=step)
    assert np.abs(corrected[-1]).max() < 1e-5


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=12),
    st.floats(0.1, 1.0),
    st.floats(0.05, 1.9),
)
def test_no_sequence_of_ages_grows_while_half_the_step_is_damped(ages, damping, fraction):
    # 0 < step < 2 damping: the largest recent distance from the optimum never grows, whatever the ages.
    distances = np.abs(descend([1.0], fraction * damping, ages, damping=damping, rounds=150)[:, 0])
    assert distances.max() <= 1 + 1e-9
    assert distances[-14:].max() <= distances[:15].max()


def test_a_fresh_buffer_is_left_alone():
    correction = DelayCorrection(damping=0.5, max_staleness=3)
    correction.record(np.array([1.0, 2.0]))
    mean = np.array([3.0, 4.0])
    assert correction.correct(mean, [0, 0], [256, 256], 512) is mean


def test_the_correction_by_hand():
    correction = DelayCorrection(damping=0.5, max_staleness=2)
    for step in ([64.0], [8.0], [1.0]):
        correction.record(np.array(step))
    mean = np.array([10.0])
    # One update misses the last step, one the last two; a third is fresh; the oldest step is forgotten.
    found = correction.correct(mean, [1, 2, 0], [100, 50, 256], 256 * 3)
    assert found == pytest.approx(10 - 0.5 * (150 / 768 * 1 + 50 / 768 * 8), rel=1e-15)
    assert mean[0] == 10.0


def test_the_order_of_updates_changes_no_bit():
    rng = np.random.default_rng(0)
    correction = DelayCorrection(damping=0.3, max_staleness=8)
    for _ in range(8):
        correction.record(rng.normal(size=50))
    mean, ages, scales = rng.normal(size=50), rng.integers(0, 9, 30).tolist(), rng.integers(1, 257, 30).tolist()
    order = rng.permutation(30)
    one = correction.correct(mean, ages, scales, 256 * 30)
    other = correction.correct(mean, [ages[i] for i in order], [scales[i] for i in order], 256 * 30)
    assert one.tobytes() == other.tobytes()


def test_what_it_is_given_later_does_not_change_what_it_remembers():
    correction = DelayCorrection(damping=1.0, max_staleness=1)
    step = np.ones(2)
    correction.record(step)
    step += 5
    np.testing.assert_array_equal(correction.correct(np.zeros(2), [1], [1], 1), [-1.0, -1.0])


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.01, float("nan")])
def test_a_damping_that_proves_nothing_is_refused(damping):
    with pytest.raises(ConfigurationError):
        DelayCorrection(damping=damping, max_staleness=3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError):
        DelayCorrection(damping=0.5, max_staleness=-1)
    correction = DelayCorrection(damping=0.5, max_staleness=3)
    correction.record(np.zeros(3))
    with pytest.raises(ShapeMismatch):
        correction.correct(np.zeros(4), [1], [1], 1)
    with pytest.raises(ShapeMismatch):
        correction.correct(np.zeros(3), [1, 2], [1], 1)
