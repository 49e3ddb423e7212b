"""How much noise a run needs: calibrated once, over all of its rounds, before the first one.

Gaussian noise of multiplier z composes in closed form: releases with z_1, z_2, ... are as private as one with
``(sum 1 / z_i**2) ** -1/2`` [Dong, Roth and Su 2022, corollary 3.3], and what one is worth is known exactly [Balle and
Wang 2018]. Sampled releases compose numerically, by their privacy loss distribution.

A noise multiplier is always a multiple of the L2 sensitivity *under the stated adjacency*. Replacing one client moves a
sum twice as far as leaving one out, so the same z then means twice the noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Final, Self

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.accountant import ORDERS, rdp_to_epsilon
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.renyi import sampled_gaussian_rdp

_LARGEST_MULTIPLIER: Final = 1e6
_SLACK: Final = 1 + 1e-12
"""On every calibrated multiplier: sums of a thousand floats round by less, so that the last round still fits."""

_INTERVAL: Final = 5e-4
"""Grid of numeric privacy losses. What it rounds, it rounds up: by 1e-3 of epsilon at most over a thousand rounds."""

_MOST_DISTRIBUTIONS: Final = 8
"""Different multipliers for which a schedule is normalised by privacy loss distributions; each takes 0.1 s."""

Steps = tuple[tuple[float, int], ...]
"""Noise multipliers, and in how many releases each was used."""


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """The least delta of one Gaussian release, exactly [Balle and Wang 2018, theorem 8].

    Args:
        epsilon: From 0.
        noise_multiplier: z, standard deviation over L2 sensitivity.
    """
    mu = 1 / noise_multiplier
    least = _normal_cdf(mu / 2 - epsilon / mu)
    # exp(epsilon) * cdf(x) overflows before it is small: the tail is scaled, or absent.
    tail = _normal_cdf(-mu / 2 - epsilon / mu)
    return max(0.0, least - (math.exp(epsilon + math.log(tail)) if tail else 0.0))


def gaussian_epsilon(delta: float, noise_multiplier: float) -> float:
    """The least epsilon of one Gaussian release at this delta: exact to 1e-12, rounded up."""
    _check_delta(delta)
    if gaussian_delta(0.0, noise_multiplier) <= delta:
        return 0.0
    return _least(lambda epsilon: gaussian_delta(epsilon, noise_multiplier) <= delta, 1.0)


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """The least noise multiplier with which one Gaussian release is (epsilon, delta)-private.

    Raises:
        ConfigurationError: Epsilon or delta out of range.

    Example:
        >>> round(gaussian_noise_multiplier(1.0, 1e-5), 4)
        3.7306
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    return _least(lambda z: gaussian_delta(epsilon, z) <= delta, 1.0)


def composed_multiplier(multipliers: Sequence[float]) -> float:
    """The noise multiplier of the one Gaussian release that is as private as all of these; infinite for none."""
    total = math.fsum(z**-2 for z in multipliers)
    return math.inf if not total else total**-0.5


def composed_rdp_epsilon(steps: Steps, sampling_probability: float, delta: float, *, quick: bool = False) -> float:
    """Epsilon of Poisson-sampled releases by Renyi divergence (add/remove adjacency).

    Args:
        steps: Noise multipliers and how often each was used.
        sampling_probability: As for ``sampled_epsilon``.
        delta: In (0, 1).
        quick: At integer orders only: twenty times as fast, and a little higher.
    """
    orders = _WHOLE_ORDERS if quick else ORDERS
    total = np.zeros(len(orders))
    for noise_multiplier, count in steps:
        total += count * _divergences(noise_multiplier, sampling_probability, orders)
    return rdp_to_epsilon(total.tolist(), delta, orders)


_WHOLE_ORDERS: Final = tuple(order for order in ORDERS if order.is_integer())

_divergences = lru_cache(maxsize=4096)(sampled_gaussian_rdp)


@lru_cache(maxsize=256)
def sampled_epsilon(steps: Steps, sampling_probability: float, delta: float) -> float:
    """Epsilon of Poisson-sampled releases, by their privacy loss distribution (add/remove adjacency).

    Each distinct multiplier takes about a tenth of a second.

    Args:
        steps: Noise multipliers and how often each was used; in sorted order, so that equal questions are asked once.
        sampling_probability: With which each client takes part in each round, independently.
        delta: In (0, 1).
    """
    accountant = PLDAccountant(value_discretization_interval=_INTERVAL)
    for noise_multiplier, count in steps:
        accountant.compose(_sampled(noise_multiplier, sampling_probability), count)
    return float(accountant.get_epsilon(delta))


def calibrate(
    epsilon: float,
    delta: float,
    *,
    participations: int | None = None,
    rounds: int | None = None,
    sampling_probability: float | None = None,
) -> float:
    """The noise multiplier that spends a budget over a whole run.

    Args:
        epsilon: Of the run.
        delta: Of the run.
        participations: In how many rounds one client takes part at most; nothing is claimed for its being selected.
        rounds: With sampling: how many rounds there are.
        sampling_probability: With it, every client takes part in every round by an independent coin of this
            probability, and nobody learns who did.

    Returns:
        z, the same in every round; with sampling within 0.1 % of the least one, above it.

    Raises:
        ConfigurationError: Not exactly one of the two forms, a number out of range, or no multiplier up to 1e6 is
            enough.

    Example:
        >>> round(calibrate(1.0, 1e-5, participations=100), 3)
        37.306
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    if sampling_probability is None:
        if participations is None or participations < 1 or rounds is not None:
            raise ConfigurationError(
                "without sampling, give participations (from 1): in how many rounds one client takes part at most"
            )
        return gaussian_noise_multiplier(epsilon, delta) * math.sqrt(participations) * _SLACK
    if rounds is None or rounds < 1 or participations is not None or not 0 < sampling_probability <= 1:
        raise ConfigurationError("with sampling, give rounds (from 1) and a sampling_probability in (0, 1]")

    return _least_sampled(((1.0, rounds),), sampling_probability, epsilon, delta)


class ScheduleShape(StrEnum):
    """How the noise changes over a run."""

    CONSTANT = "constant"
    LINEAR = "linear"
    EXPONENTIAL = "exponential"
    STEP = "step"


class NoiseSchedule(BaseModel):
    """One noise multiplier for each round, fixed before the first and public.

    It must not look at the training: noise that shrinks as the loss does tells something of the loss, and is not
    accounted for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise_multipliers: tuple[float, ...] = Field(min_length=1, description="z of round 0, 1, ...")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if not all(0 < z <= _LARGEST_MULTIPLIER for z in self.noise_multipliers):
            raise ConfigurationError(f"noise multipliers lie in (0, {_LARGEST_MULTIPLIER:g}]")
        return self

    @classmethod
    def plan(
        cls,
        epsilon: float,
        delta: float,
        *,
        rounds: int,
        shape: ScheduleShape | str = ScheduleShape.CONSTANT,
        final_ratio: float = 0.5,
        steps: int = 4,
        participations: int | None = None,
        sampling_probability: float | None = None,
    ) -> Self:
        """A schedule that spends a budget over a whole run, whichever rounds a client takes part in.

        Args:
            epsilon: Of the run.
            delta: Of the run.
            rounds: How many rounds there are.
            shape: From the first round's noise to the last one's: ``constant``, ``linear``, ``exponential``, or in
                equal ``step`` s down.
            final_ratio: The last round's multiplier over the first one's.
            steps: Stretches of equal noise of the shape ``step``.
            participations: In how many rounds one client takes part at most; None: in all. The schedule holds for the
                worst choice of them, the rounds with the least noise.
            sampling_probability: As for ``calibrate``. A schedule of more than eight different multipliers is then
                normalised by Renyi divergences, which asks for up to a fifth more noise than necessary.

        Raises:
            ConfigurationError: A number out of range, or participations and sampling together.
        """
        try:
            shape = ScheduleShape(shape)
        except ValueError as e:
            raise ConfigurationError(f"no schedule {shape!r}; choose one of {', '.join(ScheduleShape)}") from e
        if rounds < 1 or steps < 1 or not 0 < final_ratio < math.inf:
            raise ConfigurationError(
                f"a schedule of {rounds} rounds in {steps} steps to {final_ratio:g} of the noise; all are positive"
            )
        factors = [_factor(shape, t, rounds, final_ratio, steps) for t in range(rounds)]
        if sampling_probability is None:
            if participations is not None and participations < 1:
                raise ConfigurationError(f"a client takes part in {participations} rounds at most; declare 1 or more")
            # z_t = c f_t with sum over the worst rounds 1 / z_t**2 = 1 / z**2.
            scale = calibrate(epsilon, delta, participations=1) / composed_multiplier(sorted(factors)[:participations])
        elif participations is not None:
            raise ConfigurationError("participations are bounded, or drawn by coins (sampling_probability), not both")
        elif not 0 < sampling_probability <= 1:
            raise ConfigurationError(f"a sampling_probability lies in (0, 1], got {sampling_probability}")
        else:
            scale = _least_sampled(tuple(Counter(factors).items()), sampling_probability, epsilon, delta)
        return cls(noise_multipliers=tuple(scale * f * _SLACK for f in factors))

    def at(self, round_id: int) -> float:
        """The multiplier of a round.

        Raises:
            ConfigurationError: The schedule ends before it: what it would cost was never planned for.
        """
        if not 0 <= round_id < len(self.noise_multipliers):
            raise ConfigurationError(
                f"the noise schedule has {len(self.noise_multipliers)} rounds, and this is round {round_id}"
            )
        return self.noise_multipliers[round_id]


def _factor(shape: ScheduleShape, at: int, rounds: int, final_ratio: float, steps: int) -> float:
    done = at / max(1, rounds - 1)
    match shape:
        case ScheduleShape.CONSTANT:
            return 1.0
        case ScheduleShape.LINEAR:
            return 1 + (final_ratio - 1) * done
        case ScheduleShape.EXPONENTIAL:
            return float(final_ratio**done)
        case ScheduleShape.STEP:
            return 1 + (final_ratio - 1) * (min(steps, rounds) * at // rounds) / max(1, min(steps, rounds) - 1)


def _least_sampled(factors: Steps, sampling_probability: float, epsilon: float, delta: float) -> float:
    """The least c, to 0.1 %, with which sampled rounds of multipliers c f are within the budget."""

    def scaled(scale: float) -> Steps:
        return tuple(sorted((scale * f, count) for f, count in factors))

    # Renyi divergences are quick and never too low, so what they find is a bracket's upper end.
    upper = _least(
        lambda c: composed_rdp_epsilon(scaled(c), sampling_probability, delta, quick=True) <= epsilon,
        1.0,
        tolerance=1e-4,
    )
    if len(factors) > _MOST_DISTRIBUTIONS:
        return upper

    def enough(scale: float) -> bool:
        return sampled_epsilon(scaled(scale), sampling_probability, delta) <= epsilon

    lower = 0.8 * upper
    while lower > 1e-3 and enough(lower):
        upper, lower = lower, 0.8 * lower
    while upper - lower > 1e-3 * lower:
        middle = math.sqrt(lower * upper)
        lower, upper = (lower, middle) if enough(middle) else (middle, upper)
    return upper


def _sampled(noise_multiplier: float, sampling_probability: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier))


def _least(enough: Callable[[float], bool], start: float, *, tolerance: float = 1e-13) -> float:
    """The least positive number that is enough, from above, to a relative tolerance; whatever is larger is enough."""
    upper = start
    while not enough(upper):
        upper *= 2
        if upper > _LARGEST_MULTIPLIER * 2:
            raise ConfigurationError(f"no noise multiplier up to {_LARGEST_MULTIPLIER:g} keeps this budget")
    lower = upper / 2
    while lower > 1e-9 and enough(lower):
        upper, lower = lower, lower / 2
    while upper - lower > tolerance * upper:
        middle = (lower + upper) / 2
        if middle in {lower, upper}:
            break
        lower, upper = (lower, middle) if enough(middle) else (middle, upper)
    return upper


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon is positive and finite, got {epsilon}")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta lies between 0 and 1, got {delta}")
