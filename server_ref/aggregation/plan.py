"""Which grids make a sum exact: the declared bounds of a weighted sum, and the proof that every addition holds.

A weighted sum of float32 vectors is kept in K float64 bins per coordinate (K = 2 or 3). Bin j holds multiples of a
power of two ``g_j``, its grid. A product ``p = x * w`` is split by rounding to one grid after the other:

    part_0 = rnd(p, g_0)      r_1 = p - part_0      part_1 = rnd(r_1, g_1)      ...

where ``rnd(r, g) = (r + m) - m`` with ``m = 1.5 * 2**52 * g``, and bin j adds ``part_j``. No operation rounds, but
for ``rnd`` itself:

1. ``p`` is exact: 24 bits times at most 29 bits.
2. ``rnd`` is right while ``|r| <= 2**51 g``: then ``r + m`` lies between ``2**52 g`` and ``2**53 g``, where float64's
   spacing is g, so that the addition rounds r to a multiple of g (m/g is even, so ties go to even whatever the sign),
   and the subtraction is exact.
3. ``r - rnd(r, g)`` is exact: it is a multiple of r's last bit and at most ``min(|r|, g/2)``, hence representable.
4. Bin 0 adds at most n parts of at most ``w x + g_0/2``, bin j > 0 at most n parts of at most ``g_{j-1}/2`` (which is a
   multiple of ``g_j``). While these totals stay within ``2**53 g_j``, every partial sum is a multiple of g_j below
   2**53 steps: representable, so the addition is exact, and exact additions do not depend on order.

With n = ``max_count``, w = ``max_weight``, x = ``max_abs``, points 2 and 4 give (up to the g_0/2 of point 4)

    g_0 >= n w x / 2**53        g_j >= n g_{j-1} / 2**54        (n >= 4 in these formulas, for point 2)

and the smallest such powers of two are taken. What is left after the last grid is dropped: every float32 whose
magnitude reaches ``exact_from`` = ``2**23 * g_last`` (and 0) is a multiple of the last grid and loses nothing; a
smaller one is rounded to it, each product on its own, so the sum is still independent of order and off by at most
``g_last / 2`` for each such product.

Source: J. Demmel, H. D. Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013 (grids by declared bounds
instead of by a first pass over the data).
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import BudgetExceeded

MAX_BINS = 3
_MANTISSA = 23
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = 2.0**-149


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def _ceil_log2(value: Fraction) -> int:
    """Smallest e with ``value <= 2**e``."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while _power(exponent) < value:
        exponent += 1
    return exponent


def _coarsest_last_grid(resolution: float) -> int:
    """Exponent of the coarsest grid that holds every float32 of at least this magnitude."""
    return max(math.frexp(resolution)[1] - 1 - _MANTISSA, -149)


class _Bounds(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    max_abs: float = Field(gt=0, le=_LARGEST_FLOAT32, description="largest magnitude of a value")
    max_weight: int = Field(ge=1, le=2**29, description="largest weight; weights are integers from 1")
    max_count: int = Field(ge=1, description="largest number of addends, over all accumulators that are merged")
    resolution: float = Field(
        ge=_SMALLEST_FLOAT32, le=_LARGEST_FLOAT32, description="smallest magnitude that must be added exactly"
    )


class AccumulatorPlan(_Bounds):
    """Declared bounds of a sum and the grids that make it exact. ``for_bounds`` chooses the grids.

    Whoever chose them, a plan that exists is proved: the conditions of the module's docstring are checked in exact
    arithmetic when it is made.

    Raises:
        BudgetExceeded: The grids do not make every addition exact within the bounds.
        pydantic.ValidationError: A bound that is not a positive number of its kind.
    """

    # Bounds of float32 and of the other fields give exponents from -304 to 157.
    grid_exponents: tuple[Annotated[int, Field(ge=-400, le=200)], ...] = Field(
        min_length=2, max_length=MAX_BINS, description="log2 of each bin's grid"
    )

    @classmethod
    def for_bounds(cls, *, max_abs: float, max_weight: int, max_count: int, resolution: float) -> Self:
        """The plan with the fewest bins that is exact within the bounds.

        Args:
            max_abs: Largest magnitude of a value.
            max_weight: Largest weight.
            max_count: Largest number of addends.
            resolution: Smallest magnitude (of a value, before its weight) that must be added exactly.

        Returns:
            Two bins for moderate ranges, three for wide ones.

        Raises:
            BudgetExceeded: More than three bins would be needed, or no value fits the bound; the message says what to
                change.
            pydantic.ValidationError: A bound that is not a positive number of its kind.

        Example:
            >>> plan = AccumulatorPlan.for_bounds(max_abs=1e8, max_weight=1000, max_count=100_000, resolution=1e-8)
            >>> plan.grid_exponents
            (1, -36, -73)
        """
        bounds = _Bounds(max_abs=max_abs, max_weight=max_weight, max_count=max_count, resolution=resolution)
        if bounds.max_abs < _SMALLEST_FLOAT32:
            raise BudgetExceeded(
                f"no float32 but 0 lies within {max_abs:g}: raise max_abs, or the clip_norm that it follows from"
            )
        reach = Fraction(bounds.max_abs) * bounds.max_weight
        count = max(bounds.max_count, 4)
        first = _ceil_log2(count * reach / 2**53)
        if count * (reach + _power(first - 1)) > _power(first + 53):
            first += 1
        exponents = [first]
        while True:
            exponents.append(_ceil_log2(count * _power(exponents[-1] - 54)))
            if exponents[-1] <= _coarsest_last_grid(bounds.resolution):
                return cls(**bounds.model_dump(), grid_exponents=tuple(exponents))
            if len(exponents) == MAX_BINS:
                raise BudgetExceeded(
                    f"{MAX_BINS} bins do not hold an exact sum of {max_count} values of {resolution:g} to {max_abs:g}, "
                    f"with weights up to {max_weight}: raise resolution to {2.0 ** (exponents[-1] + _MANTISSA):.3g} "
                    "or lower max_abs, max_weight or max_count"
                )

    @model_validator(mode="after")
    def _proved(self) -> Self:
        reach = Fraction(self.max_abs) * self.max_weight
        exponents = self.grid_exponents
        # Largest |r| at each bin's rounding, and largest |part| that comes out of it.
        remainders = [reach, *(_power(e - 1) for e in exponents[:-1])]
        parts = [reach + _power(exponents[0] - 1), *remainders[1:]]
        for e, remainder, part in zip(exponents, remainders, parts, strict=True):
            if remainder > _power(e + 51) or self.max_count * part > _power(e + 53):
                raise BudgetExceeded(
                    f"a bin with the grid 2**{e} does not hold {self.max_count} parts up to {float(part):.3g} exactly"
                )
        if any(fine >= coarse for coarse, fine in pairwise(exponents)):
            raise BudgetExceeded(f"grids must fall from bin to bin, got the exponents {exponents}")
        if exponents[-1] > _coarsest_last_grid(self.resolution):
            raise BudgetExceeded(
                f"the last grid 2**{exponents[-1]} rounds values of magnitude {self.resolution:g}: exact from "
                f"{self.exact_from:.3g}"
            )
        if self.max_count * self.max_weight > 2**53:
            raise BudgetExceeded(
                f"the total weight may reach {self.max_count * self.max_weight}, beyond 2**53: lower max_count or "
                "max_weight"
            )
        return self

    @property
    def num_bins(self) -> int:
        """Bins per coordinate, of 8 bytes each."""
        return len(self.grid_exponents)

    @property
    def exact_from(self) -> float:
        """Smallest magnitude that is added exactly; at most ``resolution``. 0 is exact too."""
        return max(2.0 ** (self.grid_exponents[-1] + _MANTISSA), _SMALLEST_FLOAT32)

    @property
    def grids(self) -> npt.NDArray[np.float64]:
        """The grids, float64[num_bins], coarsest first."""
        return np.ldexp(np.ones(self.num_bins), self.grid_exponents)

    @property
    def limit_bits(self) -> np.int32:
        """Bit pattern of the largest float32 that does not exceed ``max_abs``."""
        limit = np.float32(self.max_abs)
        if float(limit) > self.max_abs:
            limit = np.nextafter(limit, np.float32(0))
        return limit.view(np.int32)

    def capacity(self, bin_index: int, count: int, total_weight: int) -> float:
        """Largest magnitude that a bin can reach with ``count`` addends of this total weight (rounded up)."""
        if bin_index:
            reach = count * _power(self.grid_exponents[bin_index - 1] - 1)
        else:
            reach = Fraction(self.max_abs) * total_weight + count * _power(self.grid_exponents[0] - 1)
        return math.nextafter(float(reach), math.inf) if reach else 0.0
