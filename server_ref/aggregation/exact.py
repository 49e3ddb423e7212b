"""The exact weighted mean of float32 updates: same inputs, same bits, in any order, sharding or grouping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmptyAggregate,
    InvalidUpdate,
    MalformedFrame,
    NonFiniteUpdate,
    ShapeMismatch,
    UpdateOutOfRange,
)
from server_ref.aggregation.accumulator import Accumulator, Header, Tally, addresses_of, vectors_of
from server_ref.aggregation.blocks import fold_all_or_nothing
from server_ref.aggregation.kernels import BLOCK, GROUP, fold_float32, sum_bins
from server_ref.aggregation.plan import AccumulatorPlan

__all__ = ["AccumulatorPlan", "ExactAccumulator"]

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_KIND = 1
_BLOCKS_AT_ONCE = 4
"""Blocks in one step through the bins: what is temporary stays in the cache."""


class ExactAccumulator:
    """Weighted mean of float32[size] updates over the float64 bins of a plan.

    Shapes and dtypes: updates float32[size], weights Python integers, ``result`` float64[size].
    Guarantees: the state, and so ``result`` and ``to_bytes``, depends on the multiset of (update, weight) pairs only;
    the sum is exact for values from ``plan.exact_from`` to ``plan.max_abs`` (smaller ones are rounded one by one, see
    ``plan``), and ``result`` rounds it once before the division. Memory is 8 bytes a bin and coordinate (coordinates
    rounded up to a multiple of 2048), whatever the count.
    Implements ``Accumulator``, which documents the methods and their errors.

    Args:
        size: Number of coordinates, 0 or more.
        plan: Declared bounds and grids.

    Example:
        >>> plan = AccumulatorPlan.for_bounds(max_abs=1e8, max_weight=10, max_count=100, resolution=1e-8)
        >>> total = ExactAccumulator(1, plan)
        >>> for x in (1.0, 1e8, 1.0, -1e8):
        ...     total.add(np.array([x], np.float32), weight=1)
        >>> float(total.result()[0])
        0.5
    """

    def __init__(self, size: int, plan: AccumulatorPlan) -> None:
        if size < 0:
            raise ConfigurationError(f"a sum of {size} coordinates")
        self._size = size
        self._plan = plan
        self._tally = Tally()
        self._bins = np.zeros((-(-size // BLOCK), plan.num_bins, BLOCK))

    @property
    def plan(self) -> AccumulatorPlan:
        """Declared bounds and grids."""
        return self._plan

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
        return self._bins.nbytes

    def add(self, update: Float32Array, weight: int) -> None:
        """Fold one update; see ``Accumulator``."""
        self.add_many([update], [weight])

    def add_many(self, updates: Sequence[Float32Array] | Float32Array, weights: Sequence[int]) -> None:
        """Fold several updates at once; see ``Accumulator``."""
        vectors = vectors_of(updates, weights, self._size, np.float32)
        tally = self._tally.admit(weights, max_weight=self._plan.max_weight, max_count=self._plan.max_count)
        if not vectors:
            return
        addresses = addresses_of(vectors, multiple_of=1 if len(vectors) == 1 else GROUP)
        factors = np.zeros(addresses.size)
        factors[: len(vectors)] = weights
        grids, limit = self._plan.grids, self._plan.limit_bits

        def kernel(sign: int, first: int, last: int) -> int:
            return fold_float32(addresses, sign * factors, self._bins, grids, self._size, first, last, limit)

        if not fold_all_or_nothing(kernel, len(self._bins), elements=len(vectors) * self._size):
            raise self._reason(vectors)
        self._tally = tally

    def _reason(self, vectors: Sequence[Float32Array]) -> InvalidUpdate:
        """Why the kernel refused: the first bad update's position and condition, never its values."""
        for i, vector in enumerate(vectors):
            peak = max(float(vector.max()), -float(vector.min()))
            if not np.isfinite(peak):
                return NonFiniteUpdate(f"update {i} holds NaN or infinite values")
            if peak > self._plan.max_abs:
                return UpdateOutOfRange(f"update {i} holds values beyond the declared bound of {self._plan.max_abs:g}")
        return InvalidUpdate("an update changed while it was folded")

    def merge(self, other: Self) -> None:
        """Fold what another accumulator of the same plan and size holds; see ``Accumulator``."""
        self._check_alike(other)
        tally = self._tally.plus(other._tally, max_count=self._plan.max_count)
        self._bins += other._bins
        self._tally = tally

    def subtract(self, other: Self) -> None:
        """Take out what was folded before; see ``Accumulator``. Exact: what is left is a partial sum of this one."""
        self._check_alike(other)
        tally = self._tally.minus(other._tally)
        self._bins -= other._bins
        self._tally = tally

    def _check_alike(self, other: Self) -> None:
        if other._plan != self._plan:
            raise ConfigurationError("accumulators merge only if their plans are equal: declare the same bounds")
        if other._size != self._size:
            raise ShapeMismatch(f"a sum of {other._size} coordinates does not merge into one of {self._size}")

    def result(self, divisor: int | None = None) -> Float64Array:
        """The weighted mean, float64[size]; see ``Accumulator``."""
        out = np.empty(self._size)
        for start, mean in self._means(divisor):
            out[start : start + mean.size] = mean
        return out

    def result_into(self, out: Float32Array) -> None:
        """Write the weighted mean, rounded to float32; see ``Accumulator``."""
        if out.dtype != np.float32 or out.shape != (self._size,):
            raise ShapeMismatch(f"the mean is float32[{self._size}], not {out.dtype}{list(out.shape)}")
        for start, mean in self._means(None):
            out[start : start + mean.size] = mean

    def _means(self, divisor: int | None) -> Iterator[tuple[int, Float64Array]]:
        """First coordinate and mean of one stretch of coordinates after the other, in a buffer that is used again."""
        if not self._tally.count:
            raise EmptyAggregate("a mean over no updates")
        total = np.zeros(_BLOCKS_AT_ONCE * BLOCK)
        for first in range(0, len(self._bins), _BLOCKS_AT_ONCE):
            sum_bins(self._bins, first, min(first + _BLOCKS_AT_ONCE, len(self._bins)), total)
            start = first * BLOCK
            total /= self._tally.total_weight if divisor is None else divisor
            yield start, total[: self._size - start]

    def to_bytes(self) -> bytes:
        """Header, then the bins one after the other as little-endian float64; see ``Accumulator``."""
        # No bin is ever -0.0: sums start at +0.0, and x + y is -0.0 only where both are.
        columns = np.moveaxis(self._bins, 1, 0).reshape(self._plan.num_bins, -1)[:, : self._size]
        return _header(self._size, self._tally, self._plan).pack() + columns.astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of ``to_bytes``, for bytes from anywhere; see ``Accumulator``."""
        declared = Header.read(data, kind=_KIND)
        try:
            plan = AccumulatorPlan(
                max_abs=declared.max_abs,
                max_weight=declared.max_weight,
                max_count=declared.max_count,
                resolution=declared.resolution,
                grid_exponents=declared.grid_exponents[: declared.parameter],
            )
        except (BudgetExceeded, ValidationError) as e:
            raise MalformedFrame("the bounds and grids that the accumulator declares leave no exact sum") from e
        size, tally = declared.size, declared.tally
        payload = _header(size, tally, plan).payload_of(data, 8 * plan.num_bins * size)
        columns = np.frombuffer(payload, "<f8").reshape(plan.num_bins, size)
        for b, column in enumerate(columns):
            _check_bin(column, float(plan.grids[b]), plan.capacity(b, tally.count, tally.total_weight))
        new = cls(size, plan)
        new._tally = tally
        for b, column in enumerate(columns):
            padded = np.zeros(len(new._bins) * BLOCK)
            padded[:size] = column
            new._bins[:, b] = padded.reshape(-1, BLOCK)
        return new


if TYPE_CHECKING:
    _conforms: type[Accumulator[np.float32]] = ExactAccumulator


def _header(size: int, tally: Tally, plan: AccumulatorPlan) -> Header:
    return Header(
        kind=_KIND,
        parameter=plan.num_bins,
        size=size,
        count=tally.count,
        total_weight=tally.total_weight,
        max_weight=plan.max_weight,
        max_count=plan.max_count,
        max_abs=plan.max_abs,
        resolution=plan.resolution,
        grid_exponents=plan.grid_exponents,
    )


def _check_bin(column: Float64Array, grid: float, capacity: float) -> None:
    """Refuse what no sequence of additions leaves in a bin: off its grid, too large, NaN, -0.0."""
    for start in range(0, column.size, _BLOCKS_AT_ONCE * BLOCK):
        part = column[start : start + _BLOCKS_AT_ONCE * BLOCK]
        with np.errstate(all="ignore"):
            on_grid = np.rint(part / grid) * grid == part
        if not (on_grid & (np.abs(part) <= capacity) & ~(np.signbit(part) & (part == 0))).all():
            raise MalformedFrame("the accumulator's bins hold values that no sum within its bounds leaves there")
