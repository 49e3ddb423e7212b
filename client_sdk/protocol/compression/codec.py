"""The codec: from an update to the bytes of its payload and back, for one specification and one length.

The payload holds nothing that both ends know already (method, length, count, seed), and one content has one payload.
``docs/compression.md`` has the layout byte by byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from client_sdk.protocol.compression import rotation
from client_sdk.protocol.compression.bits import Int64Array, Reader
from client_sdk.protocol.compression.indices import max_index_bytes, read_indices, write_indices
from client_sdk.protocol.compression.magnitudes import max_signed_bytes, read_signed, write_signed
from client_sdk.protocol.compression.payloads import CompressionStats, SparseUpdate
from client_sdk.protocol.compression.quantisation import Quantiser
from client_sdk.protocol.compression.selection import (
    LARGEST_MAGNITUDE,
    MAGNITUDE_BITS,
    at_least,
    magnitudes_of,
    threshold_bits,
    top_k,
)
from client_sdk.protocol.compression.sketch import CountSketch
from client_sdk.protocol.compression.spec import MAX_SIZE, CompressionMethod, CompressionSpec
from client_sdk.protocol.compression.streams import support
from client_sdk.protocol.errors import (
    ConfigurationError,
    MalformedEncoding,
    NonFiniteUpdate,
    OversizedBody,
    ShapeMismatch,
    TruncatedEncoding,
)
from client_sdk.protocol.program import Float32Array

_COUNT_BYTES: Final = 4


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes updates of one length.

    Guarantees:

    - ``encode`` is a pure function with the same bytes on every machine; ``decode(encode(x))`` is what the method says.
    - ``decode`` accepts canonical payloads only, and refuses all else with a typed error before it allocates more than
      the payload and the update need.
    - ``len(encode(x)) <= max_bytes``, and no payload beyond it is looked at.
    - Without rotation and with 32 bits, values arrive as they were (-0.0 as 0.0), and encoding a decoded payload again
      gives the same bytes, for every method but the sketch.

    Attributes:
        spec: What is done.
        size: Coordinates of an update, 0 to 2^31 - 1.

    Example:
        >>> codec = Codec(CompressionSpec.parse("topk:0.5"), 4)
        >>> data = codec.encode(np.array([1, -3, 0.5, 2], np.float32), seed=1)
        >>> codec.decode(data, seed=1)
        array([ 0., -3.,  0.,  2.], dtype=float32)
    """

    spec: CompressionSpec
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_SIZE:
            raise ConfigurationError(f"an update has from 0 to {MAX_SIZE} coordinates, not {self.size}")

    # --- sizes ---------------------------------------------------------------------------------------------------

    @property
    def num_values(self) -> int | None:
        """Values in a payload; None where it depends on the update (threshold).

        ``max(1, int(size * ratio))`` in float64 for topk and randomk, as the specification has it.
        """
        match self.spec.method:
            case CompressionMethod.NONE:
                return self.size
            case CompressionMethod.TOPK | CompressionMethod.RANDOMK:
                return self._share(self.spec.ratio)
            case CompressionMethod.COUNT_SKETCH:
                return self._rows * self._columns
            case CompressionMethod.THRESHOLD:
                return None

    @property
    def max_bytes(self) -> int:
        """Length of the longest payload, to within a few bytes: the limit of what a server needs to accept."""
        count = self.num_values
        if count is None:
            # Of all counts the last but one costs most: a bit for each coordinate, and nearly all values.
            return _COUNT_BYTES + 1 + (self.size + 14) // 8 + self._max_value_bytes(self.size)
        indices = max_index_bytes(count, self.size) if self.spec.method is CompressionMethod.TOPK else 0
        return indices + self._max_value_bytes(count)

    @property
    def unbias_factor(self) -> float:
        """What a mean of decoded updates has to be multiplied by to be right in expectation: d/k for randomk, else 1.

        Applied once, to the aggregate and after its release, so that it is no part of any sensitivity. With error
        feedback it is 1: there what was not sent is sent later.
        """
        if self.spec.method is CompressionMethod.RANDOMK and not self.spec.error_feedback and self.size:
            return self.size / self._share(self.spec.ratio)
        return 1.0

    def stats(self, payload: bytes | bytearray | memoryview) -> CompressionStats:
        """What one payload saves."""
        return CompressionStats(4 * self.size, memoryview(payload).nbytes)

    # --- both ends -----------------------------------------------------------------------------------------------

    def encode(self, vector: Float32Array, seed: int, *, rounding_seed: int = 0) -> bytes:
        """The payload of an update.

        Args:
            vector: float32[size], finite.
            seed: The assignment's public seed.
            rounding_seed: See ``Quantiser.write``; the decoder does not need it.

        Raises:
            ShapeMismatch: Another dtype or shape.
            NonFiniteUpdate: NaN or infinities.
        """
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (self.size,):
            raise ShapeMismatch(f"a codec of this length encodes float32[{self.size}]")
        vector = np.ascontiguousarray(vector)
        if self.spec.method is CompressionMethod.TOPK:
            indices = top_k(vector, self._share(self.spec.ratio))  # refuses NaN and infinities itself
            return write_indices(indices, self.size) + self._write_values(vector[indices], seed, rounding_seed)
        _check_finite(vector)
        if self.spec.method is CompressionMethod.THRESHOLD:
            indices = at_least(vector, self._threshold)
            count = len(indices).to_bytes(_COUNT_BYTES, "little")
            return count + write_indices(indices, self.size) + self._write_values(vector[indices], seed, rounding_seed)
        return self._write_values(self.project(vector, seed), seed, rounding_seed)

    def decode(self, payload: bytes | bytearray | memoryview, seed: int) -> Float32Array:
        """The update of a payload: float32[size], a new array, finite.

        Raises:
            OversizedBody: More than ``max_bytes``.
            TruncatedEncoding: Fewer bytes than the content takes.
            NonFiniteUpdate: NaN or infinities, outright or once decoded.
            MalformedEncoding: Not the canonical encoding of anything.
        """
        if self.spec.is_linear:
            return self.expand(self.decode_projection(payload), seed)
        return self.decode_sparse(payload, seed).dense()

    def decode_sparse(self, payload: bytes | bytearray | memoryview, seed: int) -> SparseUpdate:
        """The same as coordinates and values (topk, threshold, and randomk without rotation).

        Raises:
            ConfigurationError: Another method, whose updates are dense.
            ProtocolError: As ``decode``.
        """
        if self.spec.is_linear:
            if self.spec.method is not CompressionMethod.RANDOMK or self.spec.rotation:
                raise ConfigurationError(f"an update of {self.spec} is dense")
            chosen = support(seed, self.size, self._share(self.spec.ratio))
            return SparseUpdate(chosen, self.decode_projection(payload), self.size)
        reader = self._reader(payload)
        count = self.num_values
        if count is None:
            count = reader.number(_COUNT_BYTES)
            if count > self.size:
                raise MalformedEncoding(f"the payload declares {count} values of an update of {self.size}")
        _check_room(reader, count)
        indices = read_indices(reader, count, self.size)
        values = self._read_values(reader, count)
        reader.finish()
        if self.spec.value_bits == 32:
            self._check_choice(indices, values)
        return SparseUpdate(indices, values, self.size)

    # --- linear methods ------------------------------------------------------------------------------------------

    def project(self, vector: Float32Array, seed: int) -> Float32Array:
        """What a linear method sends, before quantisation: float32[num_values].

        Projections of one seed can be added, clipped and shared like updates; ``expand`` takes their sum.

        Args:
            vector: float32[size], finite.
            seed: Public seed.

        Raises:
            ConfigurationError: The method chooses by the data.
            NonFiniteUpdate: The result is beyond float32.
        """
        self._need_linear()
        if self.spec.rotation:
            vector = rotation.rotate(vector, seed)
        if self.spec.method is CompressionMethod.RANDOMK:
            return vector[support(seed, self.size, self._share(self.spec.ratio))]
        if self.spec.method is CompressionMethod.COUNT_SKETCH:
            return self._sketch(seed).project(vector)
        return vector

    def expand(self, projection: Float32Array, seed: int) -> Float32Array:
        """From a projection (or a sum of several) to float32[size]; linear but for the sketch's estimate.

        ``unbias_factor`` is not applied.

        Raises:
            ShapeMismatch: Another dtype or shape.
            ConfigurationError: The method chooses by the data.
            NonFiniteUpdate: The result is beyond float32.
        """
        self._need_linear()
        if projection.dtype != np.float32 or projection.shape != (self.num_values,):
            raise ShapeMismatch(f"a projection of this codec is float32[{self.num_values}]")
        if self.spec.method is CompressionMethod.COUNT_SKETCH:
            keep = None if self.spec.recover is None else self._share(self.spec.recover)
            return self._sketch(seed).estimate(projection, keep)
        if self.spec.method is CompressionMethod.RANDOMK:
            chosen = support(seed, self.size, self._share(self.spec.ratio))
            projection = SparseUpdate(chosen, projection, self.size).dense()
        return rotation.rotate_back(projection, seed) if self.spec.rotation else projection

    def decode_projection(self, payload: bytes | bytearray | memoryview) -> Float32Array:
        """The projection in the payload of a linear method: float32[num_values].

        Raises:
            ConfigurationError: The method chooses by the data.
            ProtocolError: As ``decode``.
        """
        self._need_linear()
        reader, count = self._reader(payload), self.num_values or 0
        _check_room(reader, count)
        values = self._read_values(reader, count)
        reader.finish()
        return values

    # --- parts ---------------------------------------------------------------------------------------------------

    def _share(self, ratio: float | None) -> int:
        """``max(1, int(size * ratio))``; 0 of nothing."""
        return min(self.size, max(1, int(self.size * (ratio or 0.0))))

    @property
    def _threshold(self) -> float:
        return self.spec.threshold or 0.0

    @property
    def _rows(self) -> int:
        return self.spec.rows or 1

    @property
    def _columns(self) -> int:
        return self.spec.columns or max(1, int(self.size * (self.spec.ratio or 0.0)) // self._rows)

    def _sketch(self, seed: int) -> CountSketch:
        return CountSketch(self.size, self._rows, self._columns, seed)

    @property
    def _quantiser(self) -> Quantiser:
        return Quantiser(self.spec.value_bits, self.spec.block, stochastic=not self.spec.error_feedback)

    def _max_value_bytes(self, count: int) -> int:
        if self.spec.is_none:
            return 4 * count
        if self.spec.value_bits == 32:
            return max_signed_bytes(count, MAGNITUDE_BITS)
        return self._quantiser.max_bytes(count)

    def _write_values(self, values: Float32Array, seed: int, rounding_seed: int) -> bytes:
        if self.spec.is_none:
            return values.astype("<f4", copy=False).tobytes()
        if self.spec.value_bits == 32:
            return write_signed(magnitudes_of(values), np.signbit(values), MAGNITUDE_BITS)
        return self._quantiser.write(values, seed, rounding_seed)

    def _read_values(self, reader: Reader, count: int) -> Float32Array:
        if self.spec.is_none:
            values = np.frombuffer(reader.take(4 * count), "<f4").astype(np.float32)
            _check_finite(values)
            return values
        if self.spec.value_bits != 32:
            return self._quantiser.read(reader, count)
        magnitudes, negative = read_signed(reader, count, MAGNITUDE_BITS)
        if int(magnitudes.max(initial=0)) > LARGEST_MAGNITUDE:
            raise NonFiniteUpdate("the payload holds NaN or infinite values")
        return (magnitudes | negative.astype(np.uint32) << np.uint32(MAGNITUDE_BITS)).view(np.float32)

    def _check_choice(self, indices: Int64Array, values: Float32Array) -> None:
        """The coordinates are those that the encoder would have chosen in the update they describe."""
        if self.spec.method is CompressionMethod.THRESHOLD:
            if len(values) and int(magnitudes_of(values).min()) < threshold_bits(self._threshold):
                raise MalformedEncoding("the payload holds a value below the threshold")
            return
        zeros = values == 0
        if zeros.any():
            # top-k sends zeros only after all other values, and then the lowest: every coordinate up to the last of
            # them is on the wire.
            last = int(np.flatnonzero(zeros)[-1])
            if int(indices[last]) != last:
                raise MalformedEncoding("of the values that are 0 not the lowest ones are sent")

    def _need_linear(self) -> None:
        if not self.spec.is_linear:
            raise ConfigurationError(f"{self.spec.method} is not linear: its payloads cannot be added")

    def _reader(self, payload: bytes | bytearray | memoryview) -> Reader:
        length = memoryview(payload).nbytes
        if length > self.max_bytes:
            raise OversizedBody(f"the payload has {length} bytes; {self.spec} takes at most {self.max_bytes}")
        return Reader(payload)


def _check_room(reader: Reader, count: int) -> None:
    """No value takes less than a bit: a short payload that declares many is refused before they get any memory."""
    if count > 8 * len(reader.rest):
        raise TruncatedEncoding(f"{len(reader.rest)} bytes cannot hold {count} values")


def _check_finite(vector: Float32Array) -> None:
    # NaN passes through max and min.
    if not math.isfinite(max(float(vector.max(initial=0)), -float(vector.min(initial=0)))):
        raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(vector)))} values are NaN or infinite")
