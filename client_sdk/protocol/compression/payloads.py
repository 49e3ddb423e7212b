"""What a payload holds once it is decoded, and how many bytes it took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client_sdk.protocol.compression.bits import Int64Array
from client_sdk.protocol.program import Float32Array


@dataclass(frozen=True, eq=False)
class SparseUpdate:
    """A decoded update that is 0 elsewhere.

    Attributes:
        indices: int64[n], ascending.
        values: float32[n].
        size: Coordinates of the whole.
    """

    indices: Int64Array
    values: Float32Array
    size: int

    def dense(self) -> Float32Array:
        """float32[size]."""
        out = np.zeros(self.size, np.float32)
        out[self.indices] = self.values
        return out


@dataclass(frozen=True)
class CompressionStats:
    """Bytes of updates, counted where they are sent.

    Attributes:
        dense_bytes: What they would take as float32.
        sent_bytes: What the payloads take, all of them: coordinates, scales and parameters included.
    """

    dense_bytes: int = 0
    sent_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Sent over dense; 1 where there is nothing."""
        return self.sent_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def saved_bytes(self) -> int:
        """Dense less sent; negative where compression did not pay."""
        return self.dense_bytes - self.sent_bytes

    def __add__(self, other: CompressionStats) -> CompressionStats:
        return CompressionStats(self.dense_bytes + other.dense_bytes, self.sent_bytes + other.sent_bytes)
