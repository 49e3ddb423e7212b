"""Prime fields whose vectors hold shares: 2^61 - 1 (the default) and 2^127 - 1.

A vector is uint64 ``[n]`` or, with two limbs, uint64 ``[n, 2]``, the low limb first. Its elements are canonical: below
the modulus, so that equal vectors have equal bytes. Bytes are little-endian, 8 or 16 an element.

Integers travel centred: c stands for ``c mod p``, and an element above (p - 1) / 2 is negative again. Operations take
vectors of this field as they come from here or from ``from_bytes`` and do not look for others' mistakes: what comes
from outside goes through ``from_bytes`` or ``require``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, ShapeMismatch, UpdateOutOfRange
from client_sdk.protocol.mersenne import (
    BLOCK,
    SMALL_LIMIT,
    Block,
    BlockArithmetic,
    Blocks61,
    Blocks127,
    FieldVector,
    slices,
)
from client_sdk.protocol.mersenne.signed import decode_61, decode_127, encode_61, encode_127, largest_magnitude
from client_sdk.protocol.mersenne.words import SEED_BYTES, draw, is_canonical, key_stream

__all__ = [
    "FIELDS",
    "MERSENNE_61",
    "MERSENNE_127",
    "SEED_BYTES",
    "Field",
    "FieldVector",
    "RandomBytes",
    "slices",
]

RandomBytes = Callable[[int], bytes]
"""So many random bytes, as ``os.urandom`` gives them."""

_SIGNED_LIMIT: Final = 1 << 62


@dataclass(frozen=True)
class Field:
    """The integers modulo a Mersenne prime, and vectors of them. There are two: ``MERSENNE_61`` and ``MERSENNE_127``.

    Attributes:
        name: ``m61`` or ``m127``, as messages have it.
        bits: Of the modulus, which is ``2**bits - 1``.
        limbs: 64-bit words of an element.

    Example:
        >>> v = MERSENNE_61.from_signed(np.array([3, -4]))
        >>> MERSENNE_61.to_signed(MERSENNE_61.scale(v, -5)).tolist()
        [-15, 20]
    """

    name: str
    bits: int
    limbs: int

    @staticmethod
    def by_name(name: str) -> Field:
        """The field of this name.

        Raises:
            ConfigurationError: There is none.
        """
        if found := [field for field in FIELDS if field.name == name]:
            return found[0]
        raise ConfigurationError(f"no field is called {name!r}: choose m61 or m127")

    @staticmethod
    def by_modulus(modulus: int) -> Field:
        """The field of this order.

        Raises:
            ConfigurationError: There is none.
        """
        if found := [field for field in FIELDS if field.modulus == modulus]:
            return found[0]
        raise ConfigurationError(f"no field has {modulus} elements: choose 2**61 - 1 or 2**127 - 1")

    @property
    def modulus(self) -> int:
        """The prime p."""
        return (1 << self.bits) - 1

    @property
    def element_bytes(self) -> int:
        """Length of an element's encoding."""
        return 8 * self.limbs

    @property
    def signed_limit(self) -> int:
        """Largest magnitude of an integer that goes in and out: 2^60 - 1, or 2^62 where the field is larger."""
        return min((self.modulus - 1) // 2, _SIGNED_LIMIT)

    def arithmetic(self) -> BlockArithmetic:
        """A workspace for operations on blocks, for one caller."""
        return Blocks61() if self.limbs == 1 else Blocks127()

    # --- vectors -------------------------------------------------------------------------------------------------

    def empty(self, size: int, *, room: bool = False) -> FieldVector:
        """A vector to be written; with ``room``, after a spare word of the same memory (see ``with_room``)."""
        words = np.empty(self.limbs * size + room, np.uint64)[int(room) :]
        return words.reshape(size, self.limbs) if self.limbs > 1 else words

    def zeros(self, size: int) -> FieldVector:
        """Zeros."""
        return np.zeros((size, self.limbs) if self.limbs > 1 else size, np.uint64)

    def require(self, vector: FieldVector, size: int | None = None) -> None:
        """Refuse what is not a vector of this field.

        Raises:
            ShapeMismatch: Another dtype, shape or length than ``size``.
            MalformedShare: An element that is not below the modulus.
        """
        shape = vector.shape
        if (
            vector.dtype != np.uint64
            or len(shape) != min(self.limbs, 2)
            or shape[1:] != (self.limbs,)[: self.limbs - 1]
        ):
            raise ShapeMismatch(f"a vector of {self.name} is not {vector.dtype} {list(shape)}")
        if size is not None and shape[0] != size:
            raise ShapeMismatch(f"the vector has {shape[0]} elements instead of {size}")
        if not is_canonical(vector, self._top_word):
            raise MalformedShare(f"an element is not below the modulus of {self.name}")

    def from_ints(self, values: Iterable[int]) -> FieldVector:
        """Any integers, modulo p. Slow: for few of them."""
        residues = [value % self.modulus for value in values]
        return self.from_bytes(b"".join(value.to_bytes(self.element_bytes, "little") for value in residues))

    def to_ints(self, vector: FieldVector) -> list[int]:
        """Elements as integers from 0 to p - 1. Slow: for few of them."""
        data, step = self.to_bytes(vector), self.element_bytes
        return [int.from_bytes(data[i : i + step], "little") for i in range(0, len(data), step)]

    def to_bytes(self, vector: FieldVector) -> bytes:
        """The canonical encoding: little-endian, ``element_bytes`` each."""
        return vector.astype("<u8", copy=False).tobytes()

    def from_bytes(self, data: bytes | bytearray | memoryview, size: int | None = None) -> FieldVector:
        """The vector of a canonical encoding, a new array.

        Args:
            data: ``element_bytes`` for each element.
            size: Number of elements, where it is known.

        Raises:
            ShapeMismatch: The length is not that of ``size`` elements, or of any number of them.
            MalformedShare: An element that is not below the modulus.
        """
        length = memoryview(data).nbytes
        if length % self.element_bytes or (size is not None and length != size * self.element_bytes):
            raise ShapeMismatch(f"{length} bytes are not {'' if size is None else size} elements of {self.name}")
        words = np.frombuffer(data, "<u8").astype(np.uint64)
        vector = words.reshape(-1, self.limbs) if self.limbs > 1 else words
        self.require(vector, size)
        return vector

    @property
    def _top_word(self) -> int:
        return (1 << (self.bits - 64 * (self.limbs - 1))) - 1

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def add(self, left: FieldVector, right: FieldVector) -> FieldVector:
        """Sum of two vectors, element by element.

        Raises:
            ShapeMismatch: They differ in length. So for ``subtract``, ``multiply`` and ``inner``.
        """
        blocks = self.arithmetic()
        return self._map(blocks, blocks.add, left, right)

    def subtract(self, left: FieldVector, right: FieldVector) -> FieldVector:
        """Difference of two vectors, element by element."""
        blocks = self.arithmetic()
        return self._map(blocks, blocks.subtract, left, right)

    def negate(self, vector: FieldVector) -> FieldVector:
        """Additive inverses."""
        return self.subtract(self.zeros(len(vector)), vector)

    def multiply(self, left: FieldVector, right: FieldVector) -> FieldVector:
        """Product of two vectors, element by element."""
        blocks = self.arithmetic()
        return self._map(blocks, blocks.multiply, left, right)

    def scale(self, vector: FieldVector, factor: int) -> FieldVector:
        """A multiple of a vector; the factor is any integer, and public."""
        blocks = self.arithmetic()
        multiply = self.scaling(blocks, factor)
        out = self.empty(len(vector))
        for part in slices(len(vector)):
            block = blocks.place(out[part])
            multiply(blocks.load(vector[part]), block)
            blocks.store(block, out[part])
        return out

    def scaling(self, blocks: BlockArithmetic, factor: int) -> Callable[[Block, Block], None]:
        """``multiply(block, out)`` by a public factor, the cheaper way where that is small."""
        centred = self.centred(factor)
        if abs(centred) < SMALL_LIMIT:
            return lambda block, out: blocks.combine((centred,), (block,), out)
        constant = blocks.load(self.from_ints([factor]))
        return lambda block, out: blocks.multiply(block, constant, out)

    def sum(self, vector: FieldVector) -> int:
        """Sum of the elements, from 0 to p - 1; 0 for none. Its last steps are on Python's integers, as ``inner``'s."""
        blocks = self.arithmetic()
        return sum(self._total(blocks.load(vector[part])) for part in slices(len(vector))) % self.modulus

    def inner(self, left: FieldVector, right: FieldVector) -> int:
        """Inner product, from 0 to p - 1; 0 for empty vectors."""
        if left.shape != right.shape:
            raise ShapeMismatch(f"{len(left)} elements do not pair with {len(right)}")
        blocks = self.arithmetic()
        product = np.empty((self.limbs, min(BLOCK, len(left))), np.uint64)
        total = 0
        for part in slices(len(left)):
            a, b = blocks.load(left[part]), blocks.load(right[part])
            out = product[:, : a.shape[1]]
            blocks.multiply(a, b, out)
            total += self._total(out)
        return total % self.modulus

    def centred(self, value: int) -> int:
        """The integer of least magnitude that is the same modulo p."""
        residue = value % self.modulus
        return residue - self.modulus if residue > self.modulus // 2 else residue

    def _map(
        self,
        blocks: BlockArithmetic,
        operation: Callable[[Block, Block, Block], None],
        left: FieldVector,
        right: FieldVector,
    ) -> FieldVector:
        if left.shape != right.shape:
            raise ShapeMismatch(f"{len(left)} elements do not pair with {len(right)}")
        out = self.empty(len(left))
        for part in slices(len(left)):
            block = blocks.place(out[part])
            operation(blocks.load(left[part]), blocks.load(right[part]), block)
            blocks.store(block, out[part])
        return out

    @staticmethod
    def _total(block: Block) -> int:
        """Sum of a block's elements, as an integer: halves of limbs, so that no sum overflows."""
        low = (block & np.uint64(2**32 - 1)).sum(axis=1).tolist()
        high = (block >> np.uint64(32)).sum(axis=1).tolist()
        return sum(((h << 32) + x) << (64 * limb) for limb, (x, h) in enumerate(zip(low, high, strict=True)))

    # --- integers ------------------------------------------------------------------------------------------------

    def from_signed(self, codes: npt.NDArray[np.int64]) -> FieldVector:
        """Integers as elements.

        Args:
            codes: int64 ``[n]``, magnitudes up to ``signed_limit``.

        Raises:
            ShapeMismatch: Another dtype, or not a vector.
            UpdateOutOfRange: A larger magnitude, which would come back as another integer.
        """
        if codes.dtype != np.int64 or codes.ndim != 1:
            raise ShapeMismatch(f"integers to be shared are an int64 vector, not {codes.dtype} {list(codes.shape)}")
        if largest_magnitude(codes) > self.signed_limit:
            raise UpdateOutOfRange(f"an integer to be shared lies beyond {self.signed_limit}")
        out = self.empty(len(codes))
        encode = encode_61 if self.limbs == 1 else encode_127
        for part in slices(len(codes)):
            encode(codes[part], out[part])
        return out

    def to_signed(self, vector: FieldVector) -> npt.NDArray[np.int64]:
        """Elements as the integers of least magnitude; int64 ``[n]``.

        Raises:
            UpdateOutOfRange: A magnitude beyond ``signed_limit`` (``m127`` only: half of ``m61`` fits).
        """
        codes = np.empty(len(vector), np.int64)
        for part in slices(len(vector)):
            if self.limbs == 1:
                decode_61(vector[part], codes[part])
            elif not decode_127(vector[part], codes[part]) or largest_magnitude(codes[part]) > self.signed_limit:
                raise UpdateOutOfRange(f"an integer lies beyond {self.signed_limit}")
        return codes

    # --- random vectors ------------------------------------------------------------------------------------------

    def random(self, size: int, random: RandomBytes) -> FieldVector:
        """Uniform elements from a source of random bytes.

        Raises:
            ConfigurationError: The source gave another number of bytes than it was asked for.
        """

        def fill(buffer: memoryview) -> None:
            data = random(buffer.nbytes)
            if len(data) != buffer.nbytes:
                raise ConfigurationError(f"the source of randomness gave {len(data)} bytes for {buffer.nbytes}")
            buffer[:] = data

        draw(out := self.empty(size), self._top_word, fill)
        return out

    def expand(self, seed: bytes, size: int) -> FieldVector:
        """The vector of a seed: the key stream of AES-256 in counter mode, from counter 0, as elements.

        Words of ``element_bytes``, little-endian, are masked to the field's bits; those that are then not below p are
        left out. A longer vector continues a shorter one.

        Raises:
            ShapeMismatch: The seed has not 32 bytes.
        """
        self.expand_into(seed, out := self.empty(size))
        return out

    def expand_into(self, seed: bytes, out: FieldVector) -> None:
        """As ``expand``, into a contiguous vector."""
        draw(out, self._top_word, key_stream(seed))

    def expander(self, seed: bytes) -> Callable[[FieldVector], None]:
        """As ``expand``, piece by piece: each call fills a contiguous vector with what comes next."""
        fill = key_stream(seed)
        return lambda out: draw(out, self._top_word, fill)


def with_room(vector: FieldVector) -> npt.NDArray[np.uint8] | None:
    """The bytes of a vector that was made with ``room``, after the eight of its spare word; None for another vector.

    What precedes an encoded vector in a message is written there, and the vector itself is not copied.
    """
    words = vector.base
    if not (isinstance(words, np.ndarray) and words.dtype == np.uint64 and words.size == vector.size + 1):
        return None
    after = words[1:]
    same = after.__array_interface__["data"] == vector.__array_interface__["data"]
    return words.view(np.uint8) if same and vector.flags.c_contiguous and sys.byteorder == "little" else None


MERSENNE_61: Final = Field("m61", 61, 1)
"""2^61 - 1: sums of up to 60 bits and a sign."""

MERSENNE_127: Final = Field("m127", 127, 2)
"""2^127 - 1: for opened projections and distances that 60 bits do not hold."""

FIELDS: Final[Sequence[Field]] = (MERSENNE_61, MERSENNE_127)
