"""The rows that a rule is given, checked once: where each begins, and how large its values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import EmptyAggregate, NonFiniteUpdate, ShapeMismatch, UpdateOutOfRange
from server_ref.aggregation.accumulator import addresses_of, vectors_of
from server_ref.aggregation.blocks import run_parts
from server_ref.aggregation.robust.kernels import BLOCK, largest_magnitudes

Float64Array = npt.NDArray[np.float64]
AnyRows = Sequence[npt.NDArray[np.floating[Any]]] | npt.NDArray[np.floating[Any]]
"""An (n, d) float32 or float64 array, or n vectors of one of these dtypes and one length."""

MAX_MAGNITUDE = 1e140
"""Squares of larger values, summed, could leave float64."""

COLUMNS_IN_PART = 32 * BLOCK
"""Columns that one thread takes at a time; a constant, so that no bit depends on the number of threads."""

_ROW_PARTS = 64


@dataclass(frozen=True, eq=False)
class Rows:
    """Finite vectors of one length. Their memory is borrowed: it must not change while this lives.

    Attributes:
        vectors: C-contiguous, each float32[size] or each float64[size].
        addresses: uint64[n], where each begins.
        peaks: float64[n], the largest magnitude in each.
        size: Columns.
        wide: Whether they are float64.
    """

    vectors: Sequence[npt.NDArray[Any]]
    addresses: npt.NDArray[np.uint64]
    peaks: Float64Array
    size: int
    wide: bool

    @classmethod
    def of(cls, rows: AnyRows) -> Self:
        """Check the rows; copies none that is C-contiguous.

        Raises:
            EmptyAggregate: No rows.
            ShapeMismatch: Not vectors of one length and one of the two dtypes.
            NonFiniteUpdate: NaN or infinities; the message names the row.
            UpdateOutOfRange: A magnitude above ``MAX_MAGNITUDE`` (float64 only).
        """
        if not len(rows):
            raise EmptyAggregate("a robust rule over no updates")
        first = rows[0]
        if first.ndim != 1 or first.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
            raise ShapeMismatch(f"row 0 is {first.dtype}{list(first.shape)}; a rule takes float32[d] or float64[d]")
        vectors = vectors_of(rows, [1] * len(rows), first.size, first.dtype.type)
        found = cls(vectors, addresses_of(vectors), np.zeros(len(vectors)), first.size, first.dtype == np.float64)
        parts = min(_ROW_PARTS, len(vectors))

        def inspect(part: int) -> None:
            begin, end = part * len(vectors) // parts, (part + 1) * len(vectors) // parts
            largest_magnitudes(found.addresses, found.wide, found.size, begin, end, found.peaks)

        run_parts(inspect, parts, elements=found.elements)
        if not np.isfinite(found.peaks).all():
            raise NonFiniteUpdate(f"row {int(np.argmin(np.isfinite(found.peaks)))} holds NaN or infinite values")
        if found.peaks.max() > MAX_MAGNITUDE:
            raise UpdateOutOfRange(f"row {int(np.argmax(found.peaks))} holds values beyond {MAX_MAGNITUDE:g}")
        return found

    def subset(self, selected: Sequence[int]) -> Rows:
        """Some of the rows, in the given order."""
        chosen = np.array(selected)
        return Rows(
            [self.vectors[i] for i in selected], self.addresses[chosen], self.peaks[chosen], self.size, self.wide
        )

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def elements(self) -> int:
        """Numbers in all rows."""
        return len(self.vectors) * self.size

    @property
    def column_parts(self) -> list[tuple[int, int]]:
        """Slices of columns, first and one past the last, for threads to take."""
        starts = range(0, self.size, COLUMNS_IN_PART)
        return [(start, min(start + COLUMNS_IN_PART, self.size)) for start in starts]
