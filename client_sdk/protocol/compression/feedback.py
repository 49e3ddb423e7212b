"""Error feedback: what compression left out of one update is added to the next [Seide et al. 2014, Stich et al. 2018].

The state is one vector, the residual. It belongs to the device and to its checkpoint; the server never sees it. A
round:

    compensated = update + residual           what the device would like to send
    payload     = encode(compensated)
    residual'   = compensated - decode(payload)

Arithmetic: float32, each operation rounded to nearest, ``-0.0`` turned into ``0.0``. For a lossless choice of values
(topk, threshold or randomk with 32 bits and no rotation) a coordinate is either sent as it is or kept as it is, so

    decode(payload) + residual' == compensated      bit for bit, and without any rounding;

elsewhere the subtraction rounds, by at most half a unit in the last place of the residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from client_sdk.protocol.compression.codec import Codec
from client_sdk.protocol.errors import MalformedFrame, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.program import Float32Array

_TENSOR: Final = "residual"
_HEADER_BYTES: Final = 256


@dataclass(frozen=True, eq=False)
class ErrorFeedback:
    """The residual of a device; a value, never changed.

    Attributes:
        residual: float32[d], finite, read-only, without ``-0.0``.
    """

    residual: Float32Array

    def __post_init__(self) -> None:
        if self.residual.dtype != np.float32 or self.residual.ndim != 1:
            raise ShapeMismatch("a residual is a flat float32 vector")
        # Adding 0.0 makes a copy of its own and turns -0.0 into 0.0.
        own = self.residual + np.float32(0)
        if not np.isfinite(own).all():
            raise NonFiniteUpdate("the residual of the error feedback is not finite")
        own.flags.writeable = False
        object.__setattr__(self, "residual", own)

    @classmethod
    def zeros(cls, size: int) -> Self:
        """The state before the first round."""
        return cls(np.zeros(size, np.float32))

    @property
    def norm(self) -> float:
        """L2 norm of the residual.

        With updates of norm at most G and a compression that loses at most a share ``1 - c`` of a squared norm (topk:
        c = k/d) it never exceeds ``2 sqrt(1 - c) / c * G`` [Karimireddy et al. 2019, lemma 3], up to rounding.
        """
        return float(np.linalg.norm(self.residual.astype(np.float64)))

    def compensate(self, update: Float32Array) -> Float32Array:
        """The update with the residual added, which is what is to be encoded: float32[d].

        Raises:
            ShapeMismatch: Not float32 of the residual's length.
            NonFiniteUpdate: NaN or infinities, in the update or by overflow. The state is as it was.
        """
        if update.dtype != np.float32 or update.shape != self.residual.shape:
            raise ShapeMismatch(f"the residual belongs to updates of float32[{len(self.residual)}]")
        with np.errstate(over="ignore", invalid="ignore"):
            compensated = update + self.residual
        compensated += np.float32(0)
        if not np.isfinite(compensated).all():
            raise NonFiniteUpdate("the update, with what was left of earlier ones, is not finite")
        return compensated

    @classmethod
    def after(cls, compensated: Float32Array, sent: Float32Array) -> Self:
        """The state once ``sent``, the decoded payload of ``compensated``, has arrived.

        Raises:
            NonFiniteUpdate: The difference overflows.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return cls(compensated - sent)

    def encode(
        self, codec: Codec, update: Float32Array, seed: int, *, rounding_seed: int = 0
    ) -> tuple[bytes, ErrorFeedback]:
        """One round: the payload, and the state to go on with.

        The new state presumes that the payload arrives. Keep the old one until the server has acknowledged the report;
        if the report is given up, go on from the old one, as if the round had never been.

        Args:
            codec: Of the assignment.
            update: float32[d].
            seed: See ``Codec.encode``.
            rounding_seed: See ``Codec.encode``.

        Raises:
            ShapeMismatch: Another dtype or shape.
            NonFiniteUpdate: NaN or infinities.
        """
        compensated = self.compensate(update)
        payload = codec.encode(compensated, seed, rounding_seed=rounding_seed)
        return payload, self.after(compensated, codec.decode(payload, seed))

    def to_bytes(self) -> bytes:
        """A frame with one tensor, for the device's checkpoint."""
        return encode_frame({_TENSOR: self.residual})

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, size: int) -> Self:
        """The inverse of ``to_bytes`` for an update of ``size`` coordinates.

        Raises:
            MalformedFrame: Not such a frame (or truncated, or oversized; see ``decode_frame``).
            ShapeMismatch: Of another model.
            NonFiniteUpdate: NaN or infinities.
        """
        limits = FrameLimits(max_bytes=4 * size + _HEADER_BYTES, max_header_bytes=_HEADER_BYTES, max_tensors=1)
        tensors = decode_frame(data, limits).tensors
        if list(tensors) != [_TENSOR]:
            raise MalformedFrame(f"the frame of a residual has one tensor, {_TENSOR!r}")
        residual = tensors[_TENSOR]
        if residual.dtype != np.float32 or residual.shape != (size,):
            raise ShapeMismatch(f"the residual is not float32[{size}]: it belongs to another model")
        return cls(residual.astype(np.float32))
