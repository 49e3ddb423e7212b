"""Count-sketches: an update thrown into a few rows of signed sums [Charikar, Chen, Farach-Colton 2002].

Row r adds ``sign_r(i) * x_i`` to its column ``column_r(i)``. The sketch is linear, so the sketches of one seed can be
added and the *sum* is decoded once; the estimate of a coordinate is the median over the rows of its signed column. Its
error is below ``3 ||x|| / sqrt(columns)`` with a probability that grows fast with the rows: heavy coordinates come out
well, small ones drown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from client_sdk.protocol.compression.bits import Int64Array
from client_sdk.protocol.compression.selection import top_k
from client_sdk.protocol.compression.streams import WordStream
from client_sdk.protocol.errors import NonFiniteUpdate
from client_sdk.protocol.program import Float32Array

_CHUNK: Final = 2**16


@dataclass(frozen=True)
class CountSketch:
    """The linear map of one shape and seed.

    Row r hashes coordinate i to ``h = (a_r i + b_r) mod 2^64`` with the seed's random words a_r and b_r; bit 63 is the
    sign (1: negative) and the 32 bits below it, times the columns, over 2^32, are the column. Any two coordinates get
    independent pairs of sign and column [multiply-add-shift, Dietzfelbinger 1996].

    Attributes:
        size: Coordinates of an update.
        rows: An odd number.
        columns: Columns of each row.
        seed: Public seed.
    """

    size: int
    rows: int
    columns: int
    seed: int

    def project(self, vector: Float32Array) -> Float32Array:
        """The sketch of an update: float32[rows * columns], row by row.

        Each sum is added in float64 in the order of the coordinates and rounded once.

        Raises:
            NonFiniteUpdate: A sum beyond float32.
        """
        table = np.zeros((self.rows, self.columns))
        for start in range(0, self.size, _CHUNK):
            values = vector[start : start + _CHUNK].astype(np.float64)
            for row, (columns, negative) in zip(table, self._hashes(start, len(values)), strict=True):
                np.add.at(row, columns, np.where(negative, -values, values))
        with np.errstate(over="ignore"):
            sketch = table.astype(np.float32).reshape(-1)
        if not np.isfinite(sketch).all():
            raise NonFiniteUpdate("a sum of the sketch is beyond float32")
        return sketch

    def estimate(self, sketch: Float32Array, keep: int | None = None) -> Float32Array:
        """The update whose sketch this is, about: float32[size].

        Args:
            sketch: float32[rows * columns], of one update or a sum of several.
            keep: How many coordinates, those with the largest estimates, are kept; None for all.
        """
        table = sketch.reshape(self.rows, self.columns)
        out = np.empty(self.size, np.float32)
        for start in range(0, self.size, _CHUNK):
            n = min(_CHUNK, self.size - start)
            estimates = [
                np.where(negative, -row[columns], row[columns])
                for row, (columns, negative) in zip(table, self._hashes(start, n), strict=True)
            ]
            out[start : start + n] = _median(estimates)
        if keep is None or keep >= self.size:
            return out
        kept = top_k(out, keep)
        recovered = np.zeros(self.size, np.float32)
        recovered[kept] = out[kept]
        return recovered

    def _hashes(self, start: int, count: int) -> list[tuple[Int64Array, np.ndarray[tuple[int], np.dtype[np.bool_]]]]:
        """For each row the columns of ``count`` coordinates, and whether their signs are negative."""
        words = WordStream("sketch", self.seed).words(2 * self.rows)
        coordinates = np.arange(start, start + count, dtype=np.uint64)
        found = []
        for multiplier, offset in words.reshape(self.rows, 2):
            mixed = coordinates * multiplier
            mixed += offset
            fraction = mixed >> np.uint64(31) & np.uint64(0xFFFFFFFF)
            columns = (fraction * np.uint64(self.columns) >> np.uint64(32)).astype(np.int64)
            found.append((columns, mixed >> np.uint64(63) != 0))
        return found


def _median(rows: list[Float32Array]) -> Float32Array:
    """The median over an odd number of arrays, by a sorting network of neighbours."""
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = np.minimum(rows[i], rows[i + 1]), np.maximum(rows[i], rows[i + 1])
    return rows[len(rows) // 2]
