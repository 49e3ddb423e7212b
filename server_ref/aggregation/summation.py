"""Ordinary summations of float32 vectors, for comparison: all of them round, and their bits depend on the order.

The server adds with ``ExactAccumulator``, which does neither. These are the baselines beside it: what a plain loop
does, what compensation buys, and at which price. Bounds on the error of the sum of n products ``p_i = w_i x_i``, with
u = 2**-24 for float32 (2**-53 for float64) and S the sum of the magnitudes ``|p_i|``; the float32 methods also round
each product once, which adds up to ``u S`` to each of them:

| summation | error, at most | state, bytes a parameter |
|---|---|---|
| ``naive-float32`` | (n - 1) u S | 4 |
| ``naive-float64`` | (n - 1) u S | 8 |
| ``pairwise`` | log2(n) u S | 4 (1 + log2(n)) |
| ``kahan`` | (2 u + O(n u**2)) S | 8 |
| ``neumaier`` | O(n**2 u**2) S, beside the rounding of the products | 8 |

All are relative to S, not to the sum: where values cancel, the sum is smaller than S without limit, and so nothing
here promises a small error relative to the sum. docs/numerics.md has the measured figures.

Sources: W. Kahan, "Further remarks on reducing truncation errors", CACM 8(1), 1965; A. Neumaier, "Rundungsfehleranalyse
einiger Verfahren zur Summation endlicher Summen", ZAMM 54, 1974; N. J. Higham, "The accuracy of floating point
summation", SIAM J. Sci. Comput. 14(4), 1993.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import zip_longest
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import BudgetExceeded, EmptyAggregate, NonFiniteUpdate, ShapeMismatch
from server_ref.aggregation.accumulator import Tally, vectors_of

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

MAX_WEIGHT = 2**29
"""Largest weight: its product with a float32 is exact in float64, and is rounded once."""

MAX_COUNT = 2**23
"""Largest number of addends: below it, rounding does not double a partial sum (of float32)."""

_COLUMNS = 2**13
"""Columns at a time: what is temporary stays in the second cache level."""


class Summation(StrEnum):
    """Ordinary summations. The exact one has bounds to declare, and is a class of its own (``ExactAccumulator``)."""

    NAIVE_FLOAT32 = "naive-float32"
    """One float32 addition after the other."""

    NAIVE_FLOAT64 = "naive-float64"
    """One float64 addition after the other."""

    PAIRWISE = "pairwise"
    """float32 sums of two, then of four, then of eight addends, and so on."""

    KAHAN = "kahan"
    """float32, the rounding error of each addition carried into the next."""

    NEUMAIER = "neumaier"
    """float32, the rounding errors summed apart and added at the end."""


class RunningSum(ABC):
    """A weighted sum of float32[size] updates that is folded one update at a time, and rounds.

    Shapes and dtypes: updates float32[size], weights integers from 1 to ``MAX_WEIGHT``; ``total`` and ``result``
    float64[size]. Guarantees: the same updates in the same order give the same bits; a refused update changes nothing.
    Subclasses are made by ``running_sum``.

    Args:
        size: Number of coordinates, 0 or more.
    """

    _largest: ClassVar[float] = 2.0**127
    """What the sum of the magnitudes may reach before a partial sum could overflow."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tally = Tally()
        self._reach = 0.0
        self._product = np.empty(min(size, _COLUMNS))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self._size

    @property
    def count(self) -> int:
        """Number of updates folded so far."""
        return self._tally.count

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        return self._tally.total_weight

    @property
    def nbytes(self) -> int:
        """Bytes that hold the sum."""
        return sum(part.nbytes for part in self._state())

    def add(self, update: Float32Array, weight: int) -> None:
        """Fold one update.

        Raises:
            ShapeMismatch: Not float32[size].
            NonFiniteUpdate: NaN or infinities.
            BudgetExceeded: A weight out of bounds, too many addends, or magnitudes whose sum could overflow.
        """
        (vector,) = vectors_of([update], [weight], self._size, np.float32)
        tally = self._tally.admit([weight], max_weight=MAX_WEIGHT, max_count=MAX_COUNT)
        peak = max(float(vector.max(initial=0)), -float(vector.min(initial=0)))  # NaN passes through both
        if not math.isfinite(peak):
            raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(vector)))} values are NaN or infinite")
        reach = self._reach + peak * weight
        if reach > self._largest:
            raise BudgetExceeded(f"a float32 sum of magnitudes up to {reach:.3g} could overflow: use the exact sum")
        for columns in self._blocks():
            part = vector[columns]
            product = self._product[: part.size]
            np.multiply(part, float(weight), out=product, dtype=np.float64)
            self._fold(columns, product)
        self._tally, self._reach = tally, reach

    def total(self) -> Float64Array:
        """The weighted sum, float64[size], a new array; zeros where nothing was folded."""
        total = np.zeros(self._size)
        for columns in self._blocks():
            total[columns] = self._sum(columns)
        return total

    def result(self) -> Float64Array:
        """The weighted mean, float64[size]: ``total`` divided by ``total_weight``.

        Raises:
            EmptyAggregate: Nothing was folded.
        """
        if not self._tally.count:
            raise EmptyAggregate("a mean over no updates")
        return self.total() / self._tally.total_weight

    def _blocks(self) -> Iterator[slice]:
        return (slice(i, min(i + _COLUMNS, self._size)) for i in range(0, self._size, _COLUMNS))

    @abstractmethod
    def _state(self) -> Iterable[npt.NDArray[np.generic]]:
        """The arrays that hold the sum."""

    @abstractmethod
    def _fold(self, columns: slice, product: Float64Array) -> None:
        """Add exact products to these columns."""

    @abstractmethod
    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        """The sum of these columns."""


class _NaiveFloat32(RunningSum):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._total = np.zeros(size, np.float32)

    def _state(self) -> Iterable[npt.NDArray[np.generic]]:
        return [self._total]

    def _fold(self, columns: slice, product: Float64Array) -> None:
        self._total[columns] += product.astype(np.float32)

    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        return self._total[columns]


class _NaiveFloat64(RunningSum):
    _largest = math.inf  # float32 values, MAX_COUNT and MAX_WEIGHT stay far from float64's end

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._total = np.zeros(size)

    def _state(self) -> Iterable[npt.NDArray[np.generic]]:
        return [self._total]

    def _fold(self, columns: slice, product: Float64Array) -> None:
        self._total[columns] += product

    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        return self._total[columns]


class _Pairwise(RunningSum):
    """A binary counter of partial sums: level k is taken where bit k of the count is set, and sums 2**k addends."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._levels: list[Float32Array] = []

    def _state(self) -> Iterable[npt.NDArray[np.generic]]:
        return self._levels

    def _fold(self, columns: slice, product: Float64Array) -> None:
        part = product.astype(np.float32)
        level = 0
        while self.count >> level & 1:
            part += self._levels[level][columns]
            level += 1
        if level == len(self._levels):
            self._levels.append(np.zeros(self._size, np.float32))
        self._levels[level][columns] = part

    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        total = np.zeros(columns.stop - columns.start, np.float32)
        for level, part in enumerate(self._levels):
            if self.count >> level & 1:
                total += part[columns]
        return total


class _Compensated(RunningSum):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._total = np.zeros(size, np.float32)
        self._carry = np.zeros(size, np.float32)

    def _state(self) -> Iterable[npt.NDArray[np.generic]]:
        return [self._total, self._carry]


class _Kahan(_Compensated):
    def _fold(self, columns: slice, product: Float64Array) -> None:
        total, carry = self._total[columns], self._carry[columns]
        addend = product.astype(np.float32) - carry
        new = total + addend
        np.subtract(new, total, out=carry)
        carry -= addend
        total[:] = new

    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        return self._total[columns]


class _Neumaier(_Compensated):
    def _fold(self, columns: slice, product: Float64Array) -> None:
        total, addend = self._total[columns], product.astype(np.float32)
        new = total + addend
        # The larger of the two loses nothing when the sum is taken from it.
        larger = np.abs(total) >= np.abs(addend)
        self._carry[columns] += np.where(larger, (total - new) + addend, (addend - new) + total)
        total[:] = new

    def _sum(self, columns: slice) -> Float32Array | Float64Array:
        return np.add(self._total[columns], self._carry[columns], dtype=np.float64)


_CLASSES: Mapping[Summation, type[RunningSum]] = MappingProxyType(
    {
        Summation.NAIVE_FLOAT32: _NaiveFloat32,
        Summation.NAIVE_FLOAT64: _NaiveFloat64,
        Summation.PAIRWISE: _Pairwise,
        Summation.KAHAN: _Kahan,
        Summation.NEUMAIER: _Neumaier,
    }
)


def running_sum(summation: Summation, size: int) -> RunningSum:
    """An empty sum of ``size`` coordinates.

    Example:
        >>> total = running_sum(Summation.KAHAN, 1)
        >>> for x in (1.0, 1e8, 1.0, -1e8):
        ...     total.add(np.array([x], np.float32), weight=1)
        >>> float(total.result()[0])  # 0.5 in exact arithmetic
        0.0
    """
    return _CLASSES[summation](size)


def weighted_sum(summation: Summation, updates: Iterable[Float32Array], weights: Iterable[int]) -> Float64Array:
    """``sum(weight_i * update_i)``, folded in the given order; memory does not grow with the number of updates.

    Args:
        summation: How to add.
        updates: float32[d] each; any iterable, read once.
        weights: One for each.

    Returns:
        float64[d].

    Raises:
        EmptyAggregate: No updates.
        ShapeMismatch: Updates of different lengths or dtypes, or not one weight for each.
        NonFiniteUpdate: NaN or infinities.
        BudgetExceeded: See ``RunningSum.add``.
    """
    total: RunningSum | None = None
    for update, weight in zip_longest(updates, weights):
        if update is None or weight is None:
            raise ShapeMismatch("not one weight for each update")
        if total is None:
            total = running_sum(summation, update.size)
        total.add(update, weight)
    if total is None:
        raise EmptyAggregate("a sum of no updates")
    return total.total()
