"""A clip norm that follows the updates' norms without looking at them [Andrew et al. 2021].

Every client adds one bit to what it sends: whether its update was within the clip norm. The bits are summed and noised
like the update, and the clip norm moves so that a chosen share of the updates is within it. (A quantile of the norms
themselves, taken in the clear, is not private: one client can be seen in it.)

The bit is encoded as +-1/2, in integers as +-1 halves, so that one client moves the sum by half of what 0 and 1 would.
Update and bit are released together. Their noise is set so that both cost what one release with the whole noise
multiplier z would:

    z**-2 = z_D**-2 + (2 sigma_b)**-2.

The state is a value, the same wherever the sum is made: by the central server, or from shares, where the bit is one
more coordinate of what is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.clipping import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM
from client_sdk.protocol.errors import ConfigurationError

INDICATOR_NOISE: Final = 1 / 20
"""Standard deviation of the noise on the share of updates within the bound; the source's choice."""

_LARGEST_SHARE: Final = 0.1
"""Share of the privacy loss that the bit may take: the update's noise grows by 5.4 % at most."""

_USELESS: Final = 1 / 4
"""With more noise than this on the share, the clip norm would wander instead of follow."""


class AdaptiveClipNorm(BaseModel):
    """The clip norm of the present round, and how it moves.

    Example:
        >>> norm = AdaptiveClipNorm(clip_norm=1.0, target_quantile=0.5)
        >>> norm.after(indicator=100, count=100).clip_norm < 1.0  # all 100 were within it: it may shrink
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_norm: float = Field(gt=0, allow_inf_nan=False, description="C of the present round")
    target_quantile: float = Field(0.5, gt=0, lt=1, description="share of the updates that should be within it")
    learning_rate: float = Field(0.2, gt=0, le=10, description="of log C, for each round")
    smallest: float = Field(SMALLEST_CLIP_NORM, gt=0, description="C never falls below it")
    largest: float = Field(LARGEST_CLIP_NORM, gt=0, allow_inf_nan=False, description="C never rises above it")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.smallest <= self.clip_norm <= self.largest:
            raise ConfigurationError(
                f"a clip norm of {self.clip_norm:g} is not between its bounds, {self.smallest:g} and {self.largest:g}"
            )
        return self

    def after(self, indicator: int, count: int) -> Self:
        """The state after a round, from what was released of it: ``C exp(-rate (b - target))``.

        Args:
            indicator: Noised sum of the bits, in halves: those within the bound less those beyond it.
            count: How many bits were summed (public), from 1; 0 changes nothing.

        Returns:
            The next round's state. Noise can bring the share beyond 0 and 1; it counts as 0 or 1 then.
        """
        if count < 1:
            return self
        within = min(1.0, max(0.0, 0.5 + indicator / (2 * count)))
        moved = self.clip_norm * math.exp(-self.learning_rate * (within - self.target_quantile))
        return self.model_copy(update={"clip_norm": min(self.largest, max(self.smallest, moved))})


@dataclass(frozen=True)
class NoiseSplit:
    """One noise multiplier, divided between the update and the bit.

    Attributes:
        update_multiplier: z_D, noise on the update as a multiple of its sensitivity.
        indicator_stddev: sigma_b, noise on the sum of the bits of +-1/2, whose sensitivity is 1/2.
    """

    update_multiplier: float
    indicator_stddev: float

    @property
    def indicator_multiplier(self) -> float:
        """``2 sigma_b``: noise on the sum of the bits as a multiple of its sensitivity."""
        return 2 * self.indicator_stddev


def split_noise(noise_multiplier: float, count: int, *, least: float = 0.0) -> NoiseSplit | None:
    """How to divide a release between the update and the bit, for so many updates (a public number).

    sigma_b is ``count / 20``, or as much more as keeps the bit's share of the privacy loss at 10 %.

    Args:
        noise_multiplier: z of both together.
        count: Updates in the sum.
        least: sigma_b is at least this: where several parties draw parts of it, each part needs a width of its own.

    Returns:
        None where the bits would drown in their noise (more than 1/4 of ``count``): the clip norm has to stay as it is,
        and the update gets the whole noise multiplier.

    Raises:
        ConfigurationError: The multiplier is not positive.

    Example:
        >>> split_noise(3.73, 1000).update_multiplier
        3.7325...
        >>> split_noise(100.0, 50) is None
        True
    """
    if not noise_multiplier > 0:
        raise ConfigurationError(f"a noise multiplier is positive, got {noise_multiplier}")
    stddev = max(count * INDICATOR_NOISE, _floor(noise_multiplier, least))
    if stddev > count * _USELESS:
        return None
    return NoiseSplit(update_multiplier(noise_multiplier, stddev), stddev)


def fewest_updates(noise_multiplier: float, *, least: float = 0.0) -> int:
    """The smallest ``count`` for which ``split_noise`` is not None."""
    return math.ceil(_floor(noise_multiplier, least) / _USELESS)


def _floor(noise_multiplier: float, least: float) -> float:
    """sigma_b for however few updates."""
    return max(least, noise_multiplier / (2 * math.sqrt(_LARGEST_SHARE)))


def update_multiplier(noise_multiplier: float, indicator_stddev: float) -> float:
    """``z_D = (z**-2 - (2 sigma_b)**-2)**(-1/2)``.

    Raises:
        ConfigurationError: The bit alone costs as much as both may: ``2 sigma_b <= z``.
    """
    rest = noise_multiplier**-2 - (2 * indicator_stddev) ** -2
    if not rest > 0:
        raise ConfigurationError(
            f"noise of {indicator_stddev:g} on the indicators leaves nothing of a noise multiplier of "
            f"{noise_multiplier:g}; use more than half of that"
        )
    # Rounded up, so that the two together never cost more than was paid for.
    return (1 + 1e-12) / math.sqrt(rest)
