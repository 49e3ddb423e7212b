"""A secure report: one sealed share of the update for each aggregator, in one frame. What is shared, and its sizes.

What a device shares are elements of a prime field::

    [codes of the update | indicator, where the plan has one | zeros up to a whole share | mask]

The mask is random and no part of any sum: it hides what aggregators compare to see whether a device's shares lie on one
polynomial. It fills the last element of each share. Before it is sealed, a share is one byte that says what follows:
0 and a seed of 32 bytes, of which the aggregator makes its share itself (the first t - 1 of n), or 1 and the share's
elements in canonical form (the others).

Nothing here seals or opens: see ``sealing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, MalformedShare, ShapeMismatch
from client_sdk.protocol.field import SEED_BYTES, Field, FieldVector, with_room
from client_sdk.protocol.frames import Frame
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.shamir import Scheme, SeededShares

_SEED: Final = b"\x00"
_VECTOR: Final = b"\x01"
_SHARE_TENSOR: Final = "share-{}"
_MAX_FACTS_BYTES: Final = 1024
_MAX_ENTRY_BYTES: Final = 128
"""Of a share in the frame's header."""


@dataclass(frozen=True)
class SecureLayout:
    """What the shares of one update hold, and how long everything is.

    Attributes:
        scheme: Who needs how many shares, and of which field.
        size: Coordinates of the update that are shared: after compression, see ``shared_size``.
        indicator: Whether the coordinate of adaptive clipping follows.
        suite: How shares are sealed.
    """

    scheme: Scheme
    size: int
    indicator: bool = False
    suite: SealingSuite = SealingSuite.X25519

    @classmethod
    def of(cls, plan: SecurePlan, size: int) -> Self:
        """The layout of a plan's shares; ``size`` as in ``shared_size``."""
        scheme = Scheme(plan.threshold, plan.num_aggregators, Field.by_name(plan.field), plan.packing)
        return cls(scheme, size, plan.indicator_norm is not None, plan.suite)

    # --- what is shared ------------------------------------------------------------------------------------------

    @property
    def num_values(self) -> int:
        """Coordinates that a sum is opened of: the update's, and the indicator."""
        return self.size + self.indicator

    @property
    def length(self) -> int:
        """Coordinates that are shared: those, zeros, and the mask's, of which there is one for each in a share."""
        packing = self.scheme.packing
        return -(-self.num_values // packing) * packing + packing

    @property
    def share_length(self) -> int:
        """Elements of one share. The last is the mask's."""
        return self.scheme.share_length(self.length)

    def secret(self, codes: npt.NDArray[np.int64], mask_seed: bytes) -> FieldVector:
        """The vector that is shared: ``length`` elements.

        Args:
            codes: int64 ``[num_values]``: of the update, then the indicator (with their noise, where the device adds
                it).
            mask_seed: 32 random bytes, used for nothing else.

        Raises:
            ShapeMismatch: Another number of codes.
            UpdateOutOfRange: A code that the field does not hold.
        """
        if codes.shape != (self.num_values,):
            raise ShapeMismatch(f"{self.num_values} codes are shared, not {codes.shape}")
        codes, indicator = codes[: self.size], codes[self.size :]
        return np.concatenate([self.scheme.field.from_signed(codes), self.tail(indicator, mask_seed)])

    def tail(self, indicator: npt.NDArray[np.int64], mask_seed: bytes) -> FieldVector:
        """What follows the codes of the update in ``secret``.

        Args:
            indicator: int64 ``[1]``, 1 or -1 (and its noise); empty where the layout has none.
            mask_seed: 32 random bytes, used for nothing else.

        Raises:
            ShapeMismatch: An indicator where there is none, or the other way around.
            UpdateOutOfRange: A code that the field does not hold.
        """
        if indicator.shape != (self.indicator,):
            raise ShapeMismatch(f"{int(self.indicator)} indicators are shared, not {indicator.shape}")
        field, packing = self.scheme.field, self.scheme.packing
        tail = field.zeros(self.length - self.size)
        tail[: len(indicator)] = field.from_signed(indicator)
        tail[len(tail) - packing :] = field.expand(mask_seed, packing)
        return tail

    def values(self, secret: FieldVector) -> FieldVector:
        """The coordinates that a sum is opened of: ``num_values`` elements of ``length``."""
        return secret[: self.num_values]

    # --- shares --------------------------------------------------------------------------------------------------

    @property
    def num_seeds(self) -> int:
        """Aggregators that are sent a seed: the first t - 1. The others get their elements."""
        return self.scheme.threshold - 1

    def plaintext_bytes(self, index: int) -> int:
        """Length of share ``index`` (from 1) before it is sealed."""
        return 1 + (SEED_BYTES if index <= self.num_seeds else self.share_length * self.scheme.field.element_bytes)

    def ciphertext_bytes(self, index: int) -> int:
        """Length of sealed share ``index``, from 1."""
        return self.plaintext_bytes(index) + self.suite.overhead

    @property
    def payload_bytes(self) -> int:
        """All sealed shares together."""
        return sum(map(self.ciphertext_bytes, self.scheme.indices))

    @property
    def max_header_bytes(self) -> int:
        """Largest header of a report's frame."""
        return _MAX_FACTS_BYTES + _MAX_ENTRY_BYTES * self.scheme.num_shares

    @property
    def max_frame_bytes(self) -> int:
        """Largest report."""
        return 8 + self.max_header_bytes + self.payload_bytes


def encode_shares(shares: SeededShares, layout: SecureLayout) -> list[bytes | memoryview]:
    """What is sealed to each aggregator, in order.

    Raises:
        ShapeMismatch: Shares of another secret than the layout has.
    """
    if len(shares.seeds) != layout.num_seeds or any(len(each) != layout.share_length for each in shares.vectors):
        raise ShapeMismatch(f"these are not shares of {layout.length} coordinates")
    return [*(_SEED + seed for seed in shares.seeds), *map(_encoded_vector, shares.vectors)]


def _encoded_vector(vector: FieldVector) -> memoryview:
    encoded = with_room(vector)
    if encoded is None:
        data = np.ascontiguousarray(vector, "<u8").reshape(-1).view(np.uint8)
        # An array, because numpy asks for large pages: touching a new ``bytes`` object takes longer than copying.
        encoded = np.empty(8 + data.size, np.uint8)
        encoded[8:] = data
    encoded[7] = _VECTOR[0]
    return encoded[7:].data


def decode_share(plaintext: bytes, layout: SecureLayout, index: int) -> FieldVector:
    """An aggregator's share of one update.

    Args:
        plaintext: What was opened.
        layout: What the task's shares hold.
        index: The aggregator's, from 1.

    Returns:
        ``share_length`` field elements.

    Raises:
        MalformedShare: Not what a device seals for this aggregator: another kind or length, or an element that is not
            in canonical form.
    """
    kind = _SEED if index <= layout.num_seeds else _VECTOR
    if index not in layout.scheme.indices:
        raise MalformedShare(f"there is no share {index} of {layout.scheme.num_shares}")
    if len(plaintext) != layout.plaintext_bytes(index):
        raise MalformedShare(f"share {index} has {len(plaintext)} bytes, not {layout.plaintext_bytes(index)}")
    if plaintext[:1] != kind:
        raise MalformedShare(f"share {index} begins with {plaintext[:1].hex()}, not with {kind.hex()}")
    if kind == _SEED:
        return layout.scheme.field.expand(plaintext[1:], layout.share_length)
    return layout.scheme.field.from_bytes(memoryview(plaintext)[1:], layout.share_length)


# --- the frame ---------------------------------------------------------------------------------------------------


def share_tensors(ciphertexts: Sequence[bytes]) -> dict[str, npt.NDArray[np.uint8]]:
    """The tensors of a report's frame: ``share-1`` to ``share-n``, each the bytes of a sealed share."""
    return {_SHARE_TENSOR.format(i): np.frombuffer(each, np.uint8) for i, each in enumerate(ciphertexts, 1)}


def split_secure_report(frame: Frame, layout: SecureLayout) -> list[memoryview]:
    """The sealed shares of a report, in order of the aggregators; nothing is opened or copied.

    Raises:
        MalformedShare: Other tensors than ``share-1`` to ``share-n`` in this order, or of another type or length.
    """
    names = [_SHARE_TENSOR.format(index) for index in layout.scheme.indices]
    if list(frame.tensors) != names:
        raise MalformedShare(f"a report of this task holds the tensors {names[0]} to {names[-1]}, and no others")
    for index, tensor in zip(layout.scheme.indices, frame.tensors.values(), strict=True):
        expected = layout.ciphertext_bytes(index)
        if tensor.dtype != np.uint8 or tensor.shape != (expected,):
            raise MalformedShare(f"share-{index} is {tensor.dtype}{list(tensor.shape)}, not uint8[{expected}]")
    return [tensor.data for tensor in frame.tensors.values()]


# --- compression -------------------------------------------------------------------------------------------------


def shared_codec(compression: str | None, size: int) -> Codec | None:
    """What picks the coordinates that are shared; None where all are.

    Args:
        compression: The assignment's.
        size: Coordinates of the update before it.

    Raises:
        ConfigurationError: A compression that chooses by the data, quantises, or feeds errors back: sums of shares are
            sums of what was clipped, at places that are public.
    """
    if compression is None:
        return None
    spec = CompressionSpec.parse(compression)
    if not spec.is_linear or spec.value_bits != 32 or spec.error_feedback:
        raise ConfigurationError(
            f"compression {compression} cannot be shared: choose randomk or sketch, with 32 bits and without feedback"
        )
    return Codec(spec, size)


def shared_size(compression: str | None, size: int) -> int:
    """Coordinates of an update that are shared: those that a codec picks, else all.

    Raises:
        ConfigurationError: As ``shared_codec``.
    """
    codec = shared_codec(compression, size)
    return size if codec is None else codec.num_values or 0
