"""From right and wrong guesses to a lower bound on epsilon: the statistics of an audit in one run.

Each of m canaries is in or out by a fair coin. Whoever saw only what an (epsilon, delta)-DP mechanism released guesses
some of the coins. Under pure DP the number of right ones among r guesses is dominated by a binomial with success
probability ``e^eps / (1 + e^eps)``; delta adds a little. So many right guesses refute a small epsilon.

Source: T. Steinke, M. Nasr, M. Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2 (the
formula with delta), for any number of guesses that was fixed in advance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

LARGEST_EPSILON: Final = 30.0
"""Where the search for a bound ends: further up there is nothing left to tell apart."""

_TOLERANCE: Final = 1e-4


@dataclass(frozen=True)
class Guesses:
    """How an attacker fared.

    Attributes:
        canaries: m, the coins thrown.
        made: r, coins guessed; fixed before the release was seen.
        right: How many of them are right.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ConfigurationError(f"{self.right} right of {self.made} guesses about {self.canaries} canaries")


def binomial_masses(trials: int, success: float) -> Float64Array:
    """Probabilities of 0, 1, ..., ``trials`` successes, float64[trials + 1]; relative error below 1e-10 up to 1e5."""
    if success in {0.0, 1.0}:
        masses = np.zeros(trials + 1)
        masses[trials if success else 0] = 1.0
        return masses
    log_factorials = np.array([math.lgamma(k + 1) for k in range(trials + 1)])
    k = np.arange(trials + 1)
    logs = log_factorials[-1] - log_factorials - log_factorials[::-1]
    return np.asarray(np.exp(logs + k * math.log(success) + (trials - k) * math.log1p(-success)))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Bound on the probability of at least so many right guesses, if the mechanism is (epsilon, delta)-DP.

    Args:
        guesses: What was observed.
        epsilon: From 0.
        delta: From 0 to 1.

    Returns:
        At most 1. A value below a level that was chosen in advance refutes (epsilon, delta) at that level.

    Example:
        >>> round(p_value(Guesses(canaries=10, made=10, right=10), 0.0, 0.0), 6)
        0.000977
    """
    if epsilon < 0 or not 0 <= delta <= 1:
        raise ConfigurationError(f"epsilon = {epsilon}, delta = {delta}")
    masses = binomial_masses(guesses.made, 1 / (1 + math.exp(-epsilon)))
    tail = float(masses[guesses.right :].sum())
    if delta == 0 or guesses.right == 0:
        return min(1.0, tail)
    # Mass just below the threshold, on average over how far down delta may push it.
    below = np.cumsum(masses[: guesses.right][::-1])
    steepest = float((below / np.arange(1, guesses.right + 1)).max())
    return min(1.0, tail + 2 * guesses.canaries * delta * steepest)


def epsilon_lower_bound(guesses: Guesses, delta: float, error: float) -> float:
    """The largest epsilon that the guesses refute, at delta; 0 if they refute none.

    Args:
        guesses: What was observed; the number made must have been fixed in advance.
        delta: The claim's.
        error: Probability of refuting a true claim that the caller accepts, in (0, 1).

    Returns:
        Between 0 and ``LARGEST_EPSILON``: a mechanism whose true epsilon is smaller yields so many right guesses with
        a probability of at most ``error``. Within 1e-4 below the exact bound.
    """
    if not 0 < error < 1:
        raise ConfigurationError(f"a probability of error of {error}")
    if p_value(guesses, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, LARGEST_EPSILON
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        # p_value grows with epsilon: what is refuted at ``middle`` is refuted below it.
        if p_value(guesses, middle, delta) <= error:
            low = middle
        else:
            high = middle
    return low


def guess(scores: Float64Array, made: int) -> npt.NDArray[np.int8]:
    """Guess the coins about which the scores are most decided: those farthest from the scores' median.

    Args:
        scores: float64[m]; larger means rather in. The median stands for "cannot tell".
        made: How many to guess, from 0 to m.

    Returns:
        int8[m]: 1 for "in", -1 for "out", 0 for no guess. Ties are broken by position.
    """
    if not 0 <= made <= len(scores):
        raise ConfigurationError(f"{made} guesses about {len(scores)} canaries")
    guesses = np.zeros(len(scores), np.int8)
    centred = scores - np.median(scores) if len(scores) else scores
    decided = np.argsort(-np.abs(centred), kind="stable")[:made]
    guesses[decided] = np.where(centred[decided] > 0, 1, -1)
    return guesses


def count_right(guesses: npt.NDArray[np.int8], included: BoolArray) -> Guesses:
    """Compare guesses with the coins."""
    truth = np.where(included, 1, -1)
    return Guesses(len(included), int(np.count_nonzero(guesses)), int(np.count_nonzero(guesses == truth)))


@dataclass(frozen=True)
class LowerBound:
    """What an attacker with several strategies refutes.

    Attributes:
        epsilon: Lower bound on the true epsilon, with the stated probability of error over all strategies together.
        strategy: Name of the one that gave it.
        guesses: How that one fared.
    """

    epsilon: float
    strategy: str
    guesses: Guesses


def best_lower_bound(
    scores: Sequence[tuple[str, Float64Array]],
    included: BoolArray,
    numbers_of_guesses: Sequence[int],
    *,
    delta: float,
    error: float,
) -> LowerBound:
    """The best of several attackers with several numbers of guesses each, all fixed in advance.

    The probability of error is divided among all of them, so that picking the best one costs nothing more.

    Args:
        scores: Name and scores of each attacker.
        included: The coins.
        numbers_of_guesses: How many guesses each makes.
        delta: The claim's.
        error: Probability that the bound is above the true epsilon.

    Raises:
        ConfigurationError: No attacker, no number of guesses, or scores of another length.
    """
    attempts = [(name, s, made) for name, s in scores for made in numbers_of_guesses]
    if not attempts or any(len(s) != len(included) for _, s, _ in attempts):
        raise ConfigurationError("an audit needs an attacker with one score a canary, and a number of guesses")
    found = []
    for name, values, made in attempts:
        outcome = count_right(guess(values, made), included)
        found.append(LowerBound(epsilon_lower_bound(outcome, delta, error / len(attempts)), name, outcome))
    return max(found, key=lambda bound: bound.epsilon)
