"""What a private update is, the same on the device and on the server, to the bit: clipped, on a grid, norm enforced.

Noise is calibrated to the largest norm of what is *summed*, and what is summed are integers. Clipping the float32
vector does not bound them: rounding a million coordinates to a grid can enlarge their norm beyond the clip norm. So
the bound is enforced where it counts, in exact integer arithmetic:

    B = floor(C * 2**f),    sum(code**2) <= B**2.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.clipping import clip_global, integer_norm_squared
from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, ShapeMismatch
from client_sdk.protocol.fixed_point import BUDGET_BITS, MAX_FRACTION_BITS

NOISE_TAIL = 12
"""Standard deviations of noise that a sum leaves room for: a Gaussian exceeds them once in 10**32 draws."""

_LARGEST_SUM = 2**BUDGET_BITS - 1
"""Half of the field that updates are shared in, 2**61 - 1: what lies within it has a sign."""

_ATTEMPTS = 4
"""Rounding to nearest is tried this often before a vector is rounded towards zero. The first correction suffices but
where the grid is so coarse that rounding errors are of the order of the bound."""


class EncodedBounds(BaseModel):
    """The grid and the norm of a private update. Fixed for a task; travels in the assignment.

    Raises:
        ConfigurationError: The clip norm is below the grid's step, or beyond what a sum can hold.
        pydantic.ValidationError: A field that is not a number of its kind.

    Example:
        >>> EncodedBounds(clip_norm=1.5, fraction_bits=24).norm_bound
        25165824
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_norm: float = Field(gt=0, allow_inf_nan=False, description="C, largest L2 norm of an update")
    fraction_bits: int = Field(ge=0, le=MAX_FRACTION_BITS, description="f; the grid's step is 2**-f")

    @model_validator(mode="after")
    def _has_codes(self) -> EncodedBounds:
        if not 1 <= self.norm_bound <= _LARGEST_SUM:
            raise ConfigurationError(
                f"with {self.fraction_bits} fraction bits, an update of norm {self.clip_norm:g} has codes of norm "
                f"{self.norm_bound}; choose fraction_bits so that it lies between 1 and 2**{BUDGET_BITS}"
            )
        return self

    @property
    def norm_bound(self) -> int:
        """B, largest L2 norm of the codes: ``floor(C * 2**f)``, exactly."""
        return math.floor(Fraction(self.clip_norm) * (1 << self.fraction_bits))

    @property
    def step(self) -> float:
        """Distance of two neighbours on the grid, 2**-f."""
        return math.ldexp(1.0, -self.fraction_bits)


def encode_clipped(vector: npt.NDArray[np.float32], bounds: EncodedBounds) -> npt.NDArray[np.int64]:
    """Clip an update and round it to the grid, so that the norm of its codes is at most B, exactly.

    The vector is clipped to C (``clip_global``) and rounded to nearest, ties to even. Where the codes' norm exceeds B
    all the same, the vector is scaled down by a little more and rounded again, a few times; at last it is scaled by
    ``B / (C * 2**f)`` and rounded towards zero, which cannot exceed B. Clipping an already clipped vector changes
    nothing, so it does not matter whether the caller clips too.

    Args:
        vector: float32, any shape; an empty one has norm 0.
        bounds: C and the grid.

    Returns:
        int64 of the same shape, a new array, with ``integer_norm_squared(codes) <= bounds.norm_bound**2``.

    Raises:
        ShapeMismatch: Another dtype.
        NonFiniteUpdate: NaN or infinities.
    """
    if vector.dtype != np.float32:
        raise ShapeMismatch(f"private updates are encoded from float32, not from {vector.dtype}")
    clipped = clip_global(vector, bounds.clip_norm).vector
    limit = bounds.norm_bound**2
    scale = math.ldexp(1.0, bounds.fraction_bits)
    shrunk = 1.0
    for attempt in range(_ATTEMPTS):
        codes = _rounded(clipped, scale * shrunk)
        excess = integer_norm_squared(codes) - limit
        if excess <= 0:
            return codes
        # Rounding adds about as much to the next norm as it did to this one: aim as far below B as it lies above, and
        # further with every attempt.
        shrunk *= math.sqrt(max(0.0, 1 - (excess << (attempt + 1)) / (limit + excess)))
    # The margin covers the rounding of the quotient and of the products, a few 2**-53.
    return _rounded(clipped, bounds.norm_bound / bounds.clip_norm * (1 - 2.0**-50), towards_zero=True)


def _rounded(vector: npt.NDArray[np.float32], factor: float, *, towards_zero: bool = False) -> npt.NDArray[np.int64]:
    scaled = np.multiply(vector, factor, dtype=np.float64)
    (np.trunc if towards_zero else np.rint)(scaled, out=scaled)
    return scaled.astype(np.int64)


def choose_private_grid(
    *,
    clip_norm: float,
    max_count: int,
    max_weight: int = 1,
    noise_multiplier: float = 0.0,
    threshold: int = 1,
) -> EncodedBounds:
    """The finest grid, of at most 40 fraction bits, on which a noised sum stays within 60 bits.

    With W the largest weight and n the largest number of updates, ``W n B + 12 sqrt(t) sigma W B <= 2**60 - 1``: the
    sum and twelve standard deviations of its noise. (Where t - 1 of the contributors of noise may be dishonest, each
    adds so much that the others suffice; in all the variance is then up to t times what is needed.)

    Args:
        clip_norm: C, largest L2 norm of an update.
        max_count: n, largest number of updates in a sum.
        max_weight: W, largest integer weight of an update, staleness scale included.
        noise_multiplier: sigma, noise on the sum as a multiple of W B; 0 for none.
        threshold: t, shares that reconstruct a sum; 1 where the noise is added in one place.

    Raises:
        BudgetExceeded: Not even whole numbers (f = 0) fit, or a bound is not positive and finite.

    Example:
        >>> choose_private_grid(clip_norm=1.0, max_count=12_000, noise_multiplier=40.0, threshold=3).fraction_bits
        40
        >>> choose_private_grid(clip_norm=1.0, max_count=12_000, max_weight=1000, noise_multiplier=40.0).fraction_bits
        36
    """
    if not (
        0 < clip_norm < math.inf
        and max_count >= 1
        and max_weight >= 1
        and threshold >= 1
        and 0 <= noise_multiplier < math.inf
    ):
        raise BudgetExceeded(
            f"the bounds of a sum are positive and finite, got clip_norm={clip_norm}, max_count={max_count}, "
            f"max_weight={max_weight}, noise_multiplier={noise_multiplier}, threshold={threshold}"
        )
    sigma = Fraction(noise_multiplier)
    # The square root of a rational number is rounded up: to the next integer, over a common denominator.
    tail = Fraction(
        math.isqrt(NOISE_TAIL**2 * threshold * (sigma.numerator * max_weight) ** 2) + 1, sigma.denominator
    ) * bool(sigma)
    for fraction_bits in range(MAX_FRACTION_BITS, -1, -1):
        # As round() for clip norms between two codes, so that the same grid serves sums of values up to C.
        largest = max(1, round(Fraction(clip_norm) * (1 << fraction_bits)))
        if (max_weight * max_count + tail) * largest <= _LARGEST_SUM and Fraction(clip_norm) * (
            1 << fraction_bits
        ) >= 1:
            return EncodedBounds(clip_norm=clip_norm, fraction_bits=fraction_bits)
    raise BudgetExceeded(
        f"a sum of {max_count} updates of norm {clip_norm:g} with weights up to {max_weight} and its noise "
        f"(noise_multiplier={noise_multiplier:g}, threshold={threshold}) does not fit {BUDGET_BITS} bits: lower one of "
        "them"
    )


def noise_variance(
    bounds: EncodedBounds, *, noise_multiplier: float, max_weight: int = 1, contributors: int = 1, threshold: int = 1
) -> Fraction:
    """Variance of one contributor's discrete Gaussian noise: ``(sigma W B)**2 / h``, exactly.

    Args:
        bounds: Norm of the codes.
        noise_multiplier: sigma, noise on the sum as a multiple of W B.
        max_weight: W, largest integer weight of an update, staleness scale included.
        contributors: How many draw noise of this variance.
        threshold: Of them, threshold - 1 may be dishonest: h is the number of the others.

    Raises:
        ConfigurationError: No honest contributor is left, or a bound is not positive and finite.
    """
    honest = contributors - (threshold - 1)
    if honest < 1 or threshold < 1:
        raise ConfigurationError(
            f"of {contributors} contributors of noise {threshold - 1} may be dishonest: none is left; name more"
        )
    if not 0 < noise_multiplier < math.inf or max_weight < 1:
        raise ConfigurationError(
            f"noise is positive and finite, got noise_multiplier={noise_multiplier}, max_weight={max_weight}"
        )
    return (Fraction(noise_multiplier) * max_weight * bounds.norm_bound) ** 2 / honest
