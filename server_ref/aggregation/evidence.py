"""Tests of the hypothesis "nobody attacks", each with a bound on how often it is wrong about honest clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError

Float64Array = npt.NDArray[np.float64]

_STRENGTHS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Drifts, in standard deviations of a round's noise, that ``DriftEvidence`` bets on: from what takes a thousand rounds
to see to what one or two rounds show."""


@dataclass(frozen=True)
class Evidence:
    """What a test found.

    Attributes:
        test: Its name.
        null: What is assumed of honest clients, in words; the rate below holds where this does.
        statistic: What was measured.
        p_value: Bound on the probability of evidence at least as strong, under the null hypothesis.
        alpha: Rate of false alarms that was chosen.
        conclusive: Whether the test could have raised an alarm at all; False where it knows too little.
    """

    test: str
    null: str
    statistic: float
    p_value: float
    alpha: float
    conclusive: bool = True

    @property
    def alarm(self) -> bool:
        """Whether the null hypothesis is rejected."""
        return self.p_value <= self.alpha


def check_alpha(alpha: float) -> float:
    """A rate of false alarms, in (0, 1).

    Raises:
        ConfigurationError: Another number.
    """
    if not 0 < alpha < 1:
        raise ConfigurationError(f"a rate of false alarms lies between 0 and 1, got {alpha}")
    return alpha


def rank_p_value(scores: Float64Array) -> float:
    """Exact p-value of the last score among all: honest scores are exchangeable, so each rank is equally likely.

    Valid for any law of the scores, and any that are computed from all of them symmetrically.

    Args:
        scores: float64[n + 1]: n of honest updates, then the one in question. Larger is stranger; ties count against
            strangeness.

    Returns:
        ``(1 + number of honest scores at least as large) / (n + 1)``.

    Source: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005, proposition 2.8.

    Example:
        >>> rank_p_value(np.array([0.1, 0.5, 0.3, 0.4]))
        0.5
    """
    return float(np.count_nonzero(scores >= scores[-1]) / len(scores))


def norm_p_value(squared_norm: float, dimension: int, signal_norm: float, noise_stddev: float) -> float:
    """Bound on the probability that a signal of at most this norm, plus Gaussian noise, is as long as what was seen.

    ``||signal + noise||^2 / s^2`` is noncentral chi-squared, which grows stochastically with the signal's norm. Its
    tail: L. Birge, "An alternative point of view on Lepski's method", 2001, lemma 8.1.

    Args:
        squared_norm: Of the noised vector.
        dimension: d, its coordinates.
        signal_norm: Largest L2 norm of the signal under the null hypothesis, from 0.
        noise_stddev: s, of each coordinate.
    """
    noncentral = (signal_norm / noise_stddev) ** 2
    spread = dimension + 2 * noncentral
    excess = squared_norm / noise_stddev**2 - dimension - noncentral
    if excess <= 0:
        return 1.0
    root = (math.sqrt(spread + 2 * excess) - math.sqrt(spread)) / 2
    return math.exp(-(root**2))


def direction_p_value(along: float, noise_stddev: float) -> float:
    """Probability that noise alone carries a vector this far against a unit direction: a one-sided z-test.

    Args:
        along: Inner product with the direction, plus what the null hypothesis tolerates; negative is against it.
        noise_stddev: s, of each coordinate of the vector.
    """
    return 0.5 * math.erfc(-along / noise_stddev / math.sqrt(2)) if along < 0 else 1.0


@dataclass(frozen=True)
class DriftEvidence:
    """A slow drift, hidden below each round's noise, summed over the rounds; a value that grows round by round.

    Under the null hypothesis each observation, given all before it, is at most the noise: ``N(<= 0, 1)`` or anything
    with a moment-generating function below that (the discrete Gaussian). Then ``value`` is a non-negative
    supermartingale that starts at 1, and exceeds ``1 / alpha`` *at any time* with a probability of at most alpha: it
    may be looked at after every round, for ever.

    Source: J. Ville 1939; H. Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.

    Attributes:
        total: Sum of the observations.
        rounds: Their number.
        peak: Largest value so far.
    """

    total: float = 0.0
    rounds: int = 0
    peak: float = 1.0

    @property
    def value(self) -> float:
        """How much a bet against the null hypothesis would have multiplied its stake."""
        logs = [strength * self.total - self.rounds * strength**2 / 2 for strength in _STRENGTHS]
        # Beyond this the answer is clear, and exp would overflow.
        return sum(math.exp(min(log, 700.0)) for log in logs) / len(logs)

    @property
    def p_value(self) -> float:
        """Valid at any time."""
        return min(1.0, 1 / self.peak)

    def after(self, observation: float) -> DriftEvidence:
        """With one round more.

        Args:
            observation: How far the round went in the suspicious direction, in standard deviations of its noise.

        Raises:
            ConfigurationError: NaN or infinite.
        """
        if not math.isfinite(observation):
            raise ConfigurationError(f"an observation of {observation}")
        new = DriftEvidence(self.total + observation, self.rounds + 1, self.peak)
        return DriftEvidence(new.total, new.rounds, max(self.peak, new.value))
