"""Bit strings in numpy: fixed-width fields, unary numbers, and a reader that trusts nothing.

Bits are numbered from the lowest bit of the first byte (little-endian, as in DEFLATE). Every string ends at a byte, the
bits that are left over are 0, and a reader refuses anything else: equal contents have equal bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import MalformedEncoding, TruncatedEncoding

UInt32Array = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]

_LANES = 32
_FIELDS_AT_ONCE = 2**16
"""Fields or unary numbers that are packed in one go: their lanes or bits stay in a core's cache."""

_BITWISE_UP_TO = 2**12
"""Fields up to which one byte a bit costs less than many operations on few words."""

_BYTES_AT_ONCE = 2**14
"""Bytes that are unpacked to bits in one go while unary numbers are read."""


class Reader:
    """Takes a payload apart from the front. Nothing is allocated that the payload does not hold."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def rest(self) -> memoryview:
        """What is still unread."""
        return self._data[self._at :]

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes.

        Raises:
            TruncatedEncoding: Fewer are left.
        """
        left = len(self._data) - self._at
        if count > left:
            raise TruncatedEncoding(f"{count} bytes are needed at offset {self._at}, {left} are there")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, num_bytes: int) -> int:
        """The next bytes as a little-endian number."""
        return int.from_bytes(self.take(num_bytes), "little")

    def finish(self) -> None:
        """Nothing may be left.

        Raises:
            MalformedEncoding: Trailing bytes.
        """
        if left := len(self._data) - self._at:
            raise MalformedEncoding(f"{left} bytes follow the payload's end")


def num_bytes(num_bits: int) -> int:
    """Bytes that hold so many bits."""
    return -(-num_bits // 8)


def pack_flags(flags: npt.NDArray[np.bool_]) -> bytes:
    """One bit each."""
    return np.packbits(flags, bitorder="little").tobytes()


def read_flags(reader: Reader, count: int) -> npt.NDArray[np.bool_]:
    """The inverse of ``pack_flags``."""
    octets = np.frombuffer(reader.take(num_bytes(count)), np.uint8)
    _check_padding(octets, count)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.bool_)


def pack_fields(values: UInt32Array, width: int) -> bytes:
    """Fields of ``width`` bits (0 to 32), one after the other; higher bits of the values are left out."""
    if width in {8, 16, 32}:
        return values.astype(f"<u{width // 8}", copy=False).tobytes()
    if width == 0 or len(values) == 0:
        return b""
    chunks = [
        _pack_chunk(values[start : start + _FIELDS_AT_ONCE], width) for start in range(0, len(values), _FIELDS_AT_ONCE)
    ]
    # All chunks but the last fill whole bytes.
    return b"".join(chunks)[: num_bytes(len(values) * width)]


def read_fields(reader: Reader, count: int, width: int) -> UInt32Array:
    """The inverse of ``pack_fields``: uint32[count]."""
    octets = reader.take(num_bytes(count * width))
    if width in {8, 16, 32}:
        return np.frombuffer(octets, f"<u{width // 8}").astype(np.uint32)
    if width == 0:
        return np.zeros(count, np.uint32)
    _check_padding(np.frombuffer(octets, np.uint8), count * width)
    out = np.empty(count, np.uint32)
    step = _FIELDS_AT_ONCE * width // 8
    for start in range(0, count, _FIELDS_AT_ONCE):
        chunk = out[start : start + _FIELDS_AT_ONCE]
        offset = start * width // 8
        chunk[:] = _unpack_chunk(octets[offset : offset + step], len(chunk), width)
    return out


def _pack_chunk(values: UInt32Array, width: int) -> bytes:
    if len(values) <= _BITWISE_UP_TO:
        bit_rows = np.unpackbits(values.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        return np.packbits(bit_rows[:, :width], bitorder="little").tobytes()
    # 32 fields make `width` words: lane i of each group starts at bit i * width of them.
    groups = -(-len(values) // _LANES)
    padded = np.zeros(groups * _LANES, np.uint32)
    padded[: len(values)] = values
    # A row for each lane, so that every step below runs over contiguous memory.
    lanes = np.ascontiguousarray(padded.reshape(groups, _LANES).T)
    lanes &= np.uint32((1 << width) - 1)
    words = np.zeros((width, groups), np.uint32)
    for lane in range(_LANES):
        word, shift = divmod(lane * width, _LANES)
        words[word] |= lanes[lane] << np.uint32(shift)
        if shift + width > _LANES:
            words[word + 1] |= lanes[lane] >> np.uint32(_LANES - shift)
    return words.T.astype("<u4").tobytes()


def _unpack_chunk(octets: memoryview, count: int, width: int) -> UInt32Array:
    """The inverse of ``_pack_chunk``."""
    if count <= _BITWISE_UP_TO:
        bits = np.unpackbits(np.frombuffer(octets, np.uint8), count=count * width, bitorder="little")
        bit_rows = np.zeros((count, _LANES), np.uint8)
        bit_rows[:, :width] = bits.reshape(count, width)
        return np.packbits(bit_rows, axis=1, bitorder="little").reshape(-1).view("<u4").astype(np.uint32)
    groups = -(-count // _LANES)
    padded = np.zeros(groups * width * 4, np.uint8)
    padded[: len(octets)] = np.frombuffer(octets, np.uint8)
    words = np.ascontiguousarray(padded.view("<u4").astype(np.uint32).reshape(groups, width).T)
    lanes = np.empty((_LANES, groups), np.uint32)
    for lane in range(_LANES):
        word, shift = divmod(lane * width, _LANES)
        lanes[lane] = words[word] >> np.uint32(shift)
        if shift + width > _LANES:
            lanes[lane] |= words[word + 1] << np.uint32(_LANES - shift)
    lanes &= np.uint32((1 << width) - 1)
    return lanes.T.reshape(-1)[:count]


def pack_unary(values: npt.NDArray[np.unsignedinteger]) -> bytes:
    """Each number as so many 0 bits and a 1."""
    chunks: list[bytes] = []
    carry = np.zeros(0, np.bool_)
    for start in range(0, len(values), _FIELDS_AT_ONCE):
        ends = np.cumsum(values[start : start + _FIELDS_AT_ONCE], dtype=np.int64)
        ends += np.arange(len(carry), len(carry) + len(ends))
        flags = np.zeros(int(ends[-1]) + 1, np.bool_)
        flags[: len(carry)] = carry
        flags[ends] = True
        whole = len(flags) // 8 * 8
        chunks.append(pack_flags(flags[:whole]))
        carry = flags[whole:]
    return b"".join([*chunks, pack_flags(carry)])


def read_unary(reader: Reader, count: int, limit: int) -> UInt32Array:
    """The inverse of ``pack_unary``: uint32[count]. It ends where the payload's ``count``-th 1 is found.

    Args:
        reader: The payload.
        count: How many.
        limit: Largest number that is accepted, below 2^32.

    Raises:
        TruncatedEncoding: The payload ends first.
        MalformedEncoding: A larger number.
    """
    values = np.empty(count, np.uint32)
    found, end, rest = 0, -1, reader.rest
    # In pieces: the bits of a hostile payload are never in memory all at once, nor read beyond the last number.
    for start in range(0, len(rest), _BYTES_AT_ONCE):
        if found == count:
            break
        octets = np.frombuffer(rest[start : start + _BYTES_AT_ONCE], np.uint8)
        ones = np.flatnonzero(np.unpackbits(octets, bitorder="little").view(np.bool_))[: count - found]
        if len(ones) == 0:
            continue
        ones += 8 * start
        zeros = np.diff(ones, prepend=end) - 1
        if int(zeros.max()) > limit:
            raise MalformedEncoding(f"a unary number exceeds {limit}")
        values[found : found + len(ones)] = zeros
        found, end = found + len(ones), int(ones[-1])
    if found < count:
        raise TruncatedEncoding(f"the payload holds {found} of {count} unary numbers")
    _check_padding(np.frombuffer(reader.take(num_bytes(end + 1)), np.uint8), end + 1)
    return values


def _check_padding(octets: npt.NDArray[np.uint8], num_bits: int) -> None:
    if num_bits % 8 and int(octets[-1]) >> (num_bits % 8):
        raise MalformedEncoding("the bits that fill up a byte are not 0")
