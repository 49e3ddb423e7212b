"""Fixed point: float32 values on an int64 grid, so that sums are exact and do not depend on order.

A value x becomes ``q = rint(x * 2**f)`` (ties to even), once, on the device. From there on everything is integer
arithmetic, in the clear or on shares, and the sum is decoded once at the end: both paths give the same bits.

The number of fraction bits f follows from declared bounds. A weighted sum of n updates needs

    f + log2(max_abs) + log2(n) + log2(max_weight) <= 60

which is checked on integers, ``rint(max_abs * 2**f) * n * max_weight <= 2**60``: three bits below the end of int64, so
that no partial sum in any order leaves it. The rounding error of a value is at most ``2**-(f+1)``: f >= 19 keeps it
below 1e-6, and f = 24 turns 1e-8 into 0.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import BudgetExceeded, NonFiniteUpdate, ShapeMismatch, UpdateOutOfRange

MAX_FRACTION_BITS = 40
"""A finer grid would hold more than float32 gives."""

BUDGET_BITS = 60

_BUDGET = 1 << BUDGET_BITS


def _largest_code(max_abs: float, fraction_bits: int) -> int:
    """``rint(max_abs * 2**fraction_bits)``, exactly."""
    return round(Fraction(max_abs) * Fraction(2**fraction_bits))


def _fits(max_abs: float, max_count: int, max_weight: int, fraction_bits: int) -> bool:
    # A grid on which all values are 0 still counts: the total weight has to stay within the budget as well.
    return max(1, _largest_code(max_abs, fraction_bits)) * max_count * max_weight <= _BUDGET


def choose_fraction_bits(*, max_abs: float, max_count: int, max_weight: int = 1) -> int:
    """The largest number of fraction bits, at most 40, with which a weighted sum stays in its budget.

    Args:
        max_abs: Largest magnitude of a value, positive and finite.
        max_count: Largest number of updates in a sum.
        max_weight: Largest integer weight of an update.

    Returns:
        f, so that ``rint(max_abs * 2**f) * max_count * max_weight <= 2**60``.

    Raises:
        BudgetExceeded: Not even whole numbers (f = 0) fit, or a bound is not positive and finite.

    Example:
        >>> choose_fraction_bits(max_abs=16.0, max_count=1000, max_weight=50)
        40
        >>> choose_fraction_bits(max_abs=1e8, max_count=1000, max_weight=50)
        17
    """
    if not (0 < max_abs < math.inf and max_count >= 1 and max_weight >= 1):
        raise BudgetExceeded(
            f"the bounds of a sum are positive and finite, got max_abs={max_abs}, max_count={max_count}, "
            f"max_weight={max_weight}"
        )
    for fraction_bits in range(MAX_FRACTION_BITS, -1, -1):
        if _fits(max_abs, max_count, max_weight, fraction_bits):
            return fraction_bits
    raise BudgetExceeded(
        f"{max_count} values up to {max_abs:g} with weights up to {max_weight} do not fit {BUDGET_BITS} bits: "
        "lower max_abs, max_count or max_weight"
    )


class FixedPointGrid(BaseModel):
    """A grid and the bounds within which sums on it are exact. Fixed for a task; travels in the assignment.

    Raises:
        BudgetExceeded: A sum within these bounds could leave 60 bits.
        pydantic.ValidationError: A field that is not a positive number of its kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction_bits: int = Field(ge=0, le=MAX_FRACTION_BITS, description="f; the grid's step is 2**-f")
    max_abs: float = Field(gt=0, allow_inf_nan=False, description="largest magnitude of a value")
    max_count: int = Field(ge=1, description="largest number of updates in a sum")
    max_weight: int = Field(1, ge=1, description="largest weight of an update; weights are integers from 1")

    @classmethod
    def for_bounds(cls, *, max_abs: float, max_count: int, max_weight: int = 1) -> Self:
        """The finest grid that fits; see ``choose_fraction_bits``."""
        bits = choose_fraction_bits(max_abs=max_abs, max_count=max_count, max_weight=max_weight)
        return cls(fraction_bits=bits, max_abs=max_abs, max_count=max_count, max_weight=max_weight)

    @model_validator(mode="after")
    def _in_budget(self) -> Self:
        if not _fits(self.max_abs, self.max_count, self.max_weight, self.fraction_bits):
            raise BudgetExceeded(
                f"{self.max_count} values up to {self.max_abs:g} with weights up to {self.max_weight} and "
                f"{self.fraction_bits} fraction bits do not fit {BUDGET_BITS} bits: lower one of them"
            )
        return self

    @property
    def step(self) -> float:
        """Distance of two neighbours on the grid, 2**-f."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def max_error(self) -> float:
        """Largest rounding error of one value, half a step."""
        return self.step / 2

    @property
    def largest_code(self) -> int:
        """Largest magnitude of an encoded value."""
        return _largest_code(self.max_abs, self.fraction_bits)

    def encode(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Round values to the grid, ties to even.

        Args:
            values: float32, any shape.

        Returns:
            int64 of the same shape, a new array; magnitudes up to ``largest_code``.

        Raises:
            ShapeMismatch: Another dtype.
            NonFiniteUpdate: NaN or infinities.
            UpdateOutOfRange: A magnitude beyond ``max_abs``.
        """
        if values.dtype != np.float32:
            raise ShapeMismatch(f"fixed point encodes float32, not {values.dtype}")
        # NaN passes through max and min; as Python floats, because a float32 comparison would round max_abs.
        peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        if not math.isfinite(peak):
            raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(values)))} values are NaN or infinite")
        if peak > self.max_abs:
            raise UpdateOutOfRange(f"a value of magnitude {peak:.3g} lies beyond the declared bound {self.max_abs:g}")
        # Scaling by a power of two is exact in float64, so rint is the only rounding.
        scaled = np.multiply(values, math.ldexp(1.0, self.fraction_bits), dtype=np.float64)
        return np.rint(scaled, out=scaled).astype(np.int64)

    def decode(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The values that codes stand for.

        Args:
            codes: int64, any shape.

        Returns:
            float64 of the same shape: exact for every code that ``encode`` makes, correctly rounded for a sum.

        Raises:
            ShapeMismatch: Another dtype.
            UpdateOutOfRange: A magnitude beyond 2**60, which no sum on this grid reaches.
        """
        return self._scaled(codes, 1, _BUDGET)

    def decode_mean(self, sums: npt.NDArray[np.int64], total_weight: int) -> npt.NDArray[np.float64]:
        """The weighted mean that a sum of codes stands for: the one decoding of a round.

        Args:
            sums: int64, any shape: ``sum(weight_i * code_i)``.
            total_weight: ``sum(weight_i)``, from 1.

        Returns:
            float64 of the same shape: the correctly rounded sum, divided by the total weight.

        Raises:
            ShapeMismatch: Another dtype.
            UpdateOutOfRange: A sum that codes with this total weight do not reach.
        """
        return self._scaled(sums, total_weight, self.largest_code * total_weight)

    def _scaled(self, codes: npt.NDArray[np.int64], divisor: int, bound: int) -> npt.NDArray[np.float64]:
        if codes.dtype != np.int64:
            raise ShapeMismatch(f"fixed point decodes int64, not {codes.dtype}")
        if max(int(codes.max(initial=0)), -int(codes.min(initial=0))) > bound:
            raise UpdateOutOfRange(f"a code lies beyond {bound}, which is out of reach for this grid")
        return codes.astype(np.float64) / math.ldexp(divisor, self.fraction_bits)
