"""The exact weighted mean of fixed-point updates (int64 on the wire)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmptyAggregate,
    MalformedFrame,
    ShapeMismatch,
    UpdateOutOfRange,
)
from client_sdk.protocol.fixed_point import FixedPointGrid
from server_ref.aggregation.accumulator import Accumulator, Header, Tally, addresses_of, vectors_of
from server_ref.aggregation.blocks import fold_all_or_nothing
from server_ref.aggregation.kernels import BLOCK, fold_int64

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_KIND = 2


class Int64Accumulator:
    """Weighted mean of int64[size] updates on a fixed-point grid, decoded once.

    Shapes and dtypes: updates int64[size] as ``FixedPointGrid.encode`` makes them, weights Python integers, ``result``
    float64[size].
    Guarantees: the state depends on the multiset of (update, weight) pairs only; sums are integers and never overflow
    within the grid's budget. Memory is 8 bytes a coordinate (rounded up to a multiple of 2048), whatever the count.
    Implements ``Accumulator``, which documents the methods and their errors.

    Args:
        size: Number of coordinates, 0 or more.
        grid: Grid and bounds.
    """

    def __init__(self, size: int, grid: FixedPointGrid) -> None:
        if size < 0:
            raise ConfigurationError(f"a sum of {size} coordinates")
        self._size = size
        self._grid = grid
        self._tally = Tally()
        self._sums = np.zeros((-(-size // BLOCK), BLOCK), np.int64)

    @property
    def grid(self) -> FixedPointGrid:
        """Grid and bounds."""
        return self._grid

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
        return self._sums.nbytes

    @property
    def sums(self) -> Int64Array:
        """``sum(weight_i * code_i)``, int64[size]; a read-only view."""
        view = self._sums.reshape(-1)[: self._size]
        view.flags.writeable = False
        return view

    def add(self, update: Int64Array, weight: int) -> None:
        """Fold one update; see ``Accumulator``."""
        self.add_many([update], [weight])

    def add_many(self, updates: Sequence[Int64Array] | Int64Array, weights: Sequence[int]) -> None:
        """Fold several updates at once; see ``Accumulator``."""
        vectors = vectors_of(updates, weights, self._size, np.int64)
        tally = self._tally.admit(weights, max_weight=self._grid.max_weight, max_count=self._grid.max_count)
        addresses = addresses_of(vectors)
        factors = np.array(weights, np.int64)
        limit = self._grid.largest_code

        def kernel(sign: int, first: int, last: int) -> int:
            return fold_int64(addresses, sign * factors, self._sums, self._size, first, last, limit)

        if not fold_all_or_nothing(kernel, len(self._sums), elements=len(vectors) * self._size):
            bad = next(i for i, v in enumerate(vectors) if v.max() > limit or v.min() < -limit)
            raise UpdateOutOfRange(f"update {bad} holds codes beyond {limit}, the declared bound on this grid")
        self._tally = tally

    def merge(self, other: Self) -> None:
        """Fold what another accumulator of the same grid and size holds; see ``Accumulator``."""
        self._check_alike(other)
        tally = self._tally.plus(other._tally, max_count=self._grid.max_count)
        self._sums += other._sums
        self._tally = tally

    def subtract(self, other: Self) -> None:
        """Take out what was folded before; see ``Accumulator``."""
        self._check_alike(other)
        tally = self._tally.minus(other._tally)
        self._sums -= other._sums
        self._tally = tally

    def _check_alike(self, other: Self) -> None:
        if other._grid != self._grid:
            raise ConfigurationError("accumulators merge only if their grids are equal: declare the same bounds")
        if other._size != self._size:
            raise ShapeMismatch(f"a sum of {other._size} coordinates does not merge into one of {self._size}")

    def result(self, divisor: int | None = None) -> Float64Array:
        """The weighted mean, float64[size]; see ``Accumulator``."""
        if not self._tally.count:
            raise EmptyAggregate("a mean over no updates")
        if divisor is not None:
            return self._grid.decode(self.sums) / divisor
        return self._grid.decode_mean(self.sums, self._tally.total_weight)

    def result_into(self, out: npt.NDArray[np.float32]) -> None:
        """Write the weighted mean, rounded to float32; see ``Accumulator``."""
        if out.dtype != np.float32 or out.shape != (self._size,):
            raise ShapeMismatch(f"the mean is float32[{self._size}], not {out.dtype}{list(out.shape)}")
        if not self._tally.count:
            raise EmptyAggregate("a mean over no updates")
        for start in range(0, self._size, 4 * BLOCK):
            stretch = slice(start, start + 4 * BLOCK)
            out[stretch] = self._grid.decode_mean(self.sums[stretch], self._tally.total_weight)

    def to_bytes(self) -> bytes:
        """Header, then the sums as little-endian int64; see ``Accumulator``."""
        return _header(self._size, self._tally, self._grid).pack() + self.sums.astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of ``to_bytes``, for bytes from anywhere; see ``Accumulator``."""
        declared = Header.read(data, kind=_KIND)
        try:
            grid = FixedPointGrid(
                fraction_bits=declared.parameter,
                max_abs=declared.max_abs,
                max_count=declared.max_count,
                max_weight=declared.max_weight,
            )
        except (BudgetExceeded, ValidationError) as e:
            raise MalformedFrame("the bounds that the accumulator declares leave no exact sum") from e
        size, tally = declared.size, declared.tally
        payload = _header(size, tally, grid).payload_of(data, 8 * size)
        sums = np.frombuffer(payload, "<i8")
        bound = grid.largest_code * tally.total_weight
        if size and (sums.max() > bound or sums.min() < -bound):
            raise MalformedFrame("the accumulator holds sums that its total weight cannot reach")
        new = cls(size, grid)
        new._tally = tally
        new._sums.reshape(-1)[:size] = sums
        return new


if TYPE_CHECKING:
    _conforms: type[Accumulator[np.int64]] = Int64Accumulator


def _header(size: int, tally: Tally, grid: FixedPointGrid) -> Header:
    return Header(
        kind=_KIND,
        parameter=grid.fraction_bits,
        size=size,
        count=tally.count,
        total_weight=tally.total_weight,
        max_weight=grid.max_weight,
        max_count=grid.max_count,
        max_abs=grid.max_abs,
        resolution=grid.step,
    )
