"""The statistics of the one-run audit, against scipy and against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client_sdk.protocol.errors import ConfigurationError
from simulator.audit.bounds import (
    Guesses,
    best_lower_bound,
    binomial_masses,
    count_right,
    epsilon_lower_bound,
    guess,
    p_value,
)


@given(st.integers(0, 400), st.sampled_from([0.0, 1.0]) | st.floats(1e-9, 1 - 1e-9))
@settings(max_examples=40)
def test_masses_are_scipys(trials: int, success: float):
    expected = stats.binom.pmf(np.arange(trials + 1), trials, success)
    np.testing.assert_allclose(binomial_masses(trials, success), expected, rtol=1e-9, atol=1e-300)


@given(st.integers(1, 60), st.data(), st.floats(0, 5), st.sampled_from([0.0, 1e-5, 1e-2]))
@settings(max_examples=60)
def test_the_p_value_is_the_theorems(made: int, data: st.DataObject, epsilon: float, delta: float):
    right = data.draw(st.integers(0, made))
    canaries = data.draw(st.integers(made, 100))
    success = 1 / (1 + math.exp(-epsilon))

    def tail(v: int) -> float:
        return float(stats.binom.sf(v - 1, made, success))

    steepest = max(((tail(right - i) - tail(right)) / i for i in range(1, canaries + 1)), default=0.0)
    expected = min(1.0, tail(right) + 2 * canaries * delta * steepest)
    assert p_value(Guesses(canaries, made, right), epsilon, delta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_bound_refutes_exactly_what_its_p_value_does():
    guesses = Guesses(1000, 200, 140)
    bound = epsilon_lower_bound(guesses, 1e-5, 0.05)
    assert p_value(guesses, bound, 1e-5) <= 0.05 < p_value(guesses, bound + 2e-4, 1e-5)
    assert epsilon_lower_bound(Guesses(1000, 200, 104), 1e-5, 0.05) == 0.0
    # All of 1000 right: 5 % = (e / (1 + e))^1000.
    everything = 0.05 ** (1 / 1000)
    expected = math.log(everything / (1 - everything))
    assert epsilon_lower_bound(Guesses(1000, 1000, 1000), 0.0, 0.05) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_is_above_the_truth_as_seldom_as_stated(epsilon: float):
    """Randomised response is the worst (epsilon, 0)-DP mechanism; the false-alarm rate is close to what is allowed."""
    random = np.random.default_rng(1)
    right = random.binomial(100, 1 / (1 + math.exp(-epsilon)), size=2000)
    bounds = {r: epsilon_lower_bound(Guesses(100, 100, int(r)), 0.0, 0.05) for r in set(right.tolist())}
    above = np.mean([bounds[r] > epsilon for r in right.tolist()])
    # 2000 runs: 5 % plus four standard deviations.
    assert 0.005 < above <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_guesses_go_to_the_extremes():
    guesses = guess(np.array([0.1, 5.0, -3.0, 0.0, 2.0]), 3)
    assert guesses.tolist() == [0, 1, -1, 0, 1]
    # Scores may be centred anywhere.
    assert guess(np.array([0.1, 5.0, -3.0, 0.0, 2.0]) + 100, 2).tolist() == [0, 1, -1, 0, 0]
    assert count_right(guesses, np.array([True, True, True, False, False])) == Guesses(5, 3, 1)


def test_choosing_the_best_of_many_attackers_does_not_inflate_the_bound():
    """Twenty attackers who know nothing: the best of them refutes epsilon = 0 in at most 5 % of the runs."""
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        included = random.random(64) < 0.5
        scores = [(f"{i}", random.standard_normal(64)) for i in range(20)]
        alarms += best_lower_bound(scores, included, (64, 16), delta=0.0, error=0.05).epsilon > 0
    assert alarms <= 200 * 0.05 + 4 * math.sqrt(200 * 0.05 * 0.95)


def test_the_best_attacker_is_named():
    included = np.arange(200) % 2 == 0
    best = best_lower_bound(
        [("blind", np.zeros(200)), ("all-seeing", included.astype(float))], included, (200,), delta=0.0, error=0.05
    )
    assert best.strategy == "all-seeing"
    assert best.guesses == Guesses(200, 200, 200)
    assert best.epsilon > 3


def test_nonsense_is_refused():
    with pytest.raises(ConfigurationError):
        Guesses(10, 5, 6)
    with pytest.raises(ConfigurationError):
        p_value(Guesses(10, 5, 3), -1.0, 0.0)
    with pytest.raises(ConfigurationError):
        epsilon_lower_bound(Guesses(10, 5, 3), 0.0, 0.0)
    with pytest.raises(ConfigurationError):
        guess(np.zeros(3), 4)
    with pytest.raises(ConfigurationError):
        best_lower_bound([], np.ones(3, bool), (1,), delta=0.0, error=0.1)
