"""Signed whole numbers on the wire: magnitudes in the shortest of a few codes, and signs where there is one.

Both kinds of values end here. A float32 is its sign and its other 31 bits read as a number, which orders magnitudes:
the values that top-k keeps lie just above a threshold, so that their excess over the smallest is geometric-like and
takes 9 bits less than 31 (the exponents cost almost nothing); the values of a whole layer lie below the largest by a
similar law. A quantised value is a sign and a number of 7 or 3 bits, distributed alike.

Codes: *plain* fields; the excess over the smallest (*rising*) or the distance from the largest (*falling*) in Rice
codes. Each of them with or without a bitmap that takes the zeros out first. The shortest is taken, and of equals the
first in the order of ``_KINDS``, so that equal numbers have equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression.bits import (
    Int64Array,
    Reader,
    UInt32Array,
    num_bytes,
    pack_fields,
    pack_flags,
    read_fields,
    read_flags,
)
from client_sdk.protocol.compression.rice import MAX_PARAMETER, choose_parameter, coded_bytes, read_rice, write_rice
from client_sdk.protocol.errors import MalformedEncoding

BoolArray = npt.NDArray[np.bool_]

_PLAIN, _RISING, _FALLING = _KINDS = range(3)
_KIND_SHIFT: Final = 5
_ZEROS_APART: Final = 0x80
_HISTOGRAM_WIDTH: Final = 8


@dataclass(frozen=True)
class _Code:
    """How a set of magnitudes is written; the first byte of the section says it.

    Attributes:
        zeros_apart: Whether a bitmap of the numbers that are not 0 goes first.
        kind: Plain, rising or falling.
        parameter: Of the Rice code; 0 for plain.
        base: Smallest (rising) or largest (falling) magnitude; 0 for plain.
        length: Bytes in all, without the first one.
    """

    zeros_apart: bool
    kind: int
    parameter: int
    base: int
    length: int

    @property
    def head(self) -> int:
        return _ZEROS_APART * self.zeros_apart | self.kind << _KIND_SHIFT | self.parameter


def write_signed(magnitudes: UInt32Array, negative: BoolArray, width: int) -> bytes:
    """Encode numbers; nothing where there are none.

    Layout: the code (1 byte: bit 7 for a bitmap of the numbers that are not 0, bits 5-6 for the kind, bits 0-4 for
    the Rice parameter), the bitmap, the base (as many bytes as ``width`` needs), the fields or Rice codes, and a bit
    for the sign of each number that is not 0.

    Args:
        magnitudes: uint32[n] below ``2**width``.
        negative: bool[n]; of a zero it does not matter.
        width: 1 to 31.
    """
    if len(magnitudes) == 0:
        return b""
    nonzero = magnitudes != 0
    code = _best_code(magnitudes, nonzero, width)
    parts = [bytes([code.head])]
    written = magnitudes
    if code.zeros_apart:
        parts.append(pack_flags(nonzero))
        written = magnitudes[nonzero]
    if code.kind == _PLAIN:
        parts.append(pack_fields(written, width))
    else:
        parts.append(code.base.to_bytes(num_bytes(width), "little"))
        parts.append(write_rice(_distances(written, code.kind, code.base), code.parameter))
    parts.append(pack_flags(negative[nonzero]))
    return b"".join(parts)


def read_signed(reader: Reader, count: int, width: int) -> tuple[UInt32Array, BoolArray]:
    """The inverse of ``write_signed``: magnitudes uint32[count] and whether each is negative, bool[count].

    Raises:
        MalformedEncoding: Not the canonical encoding of anything.
    """
    if count == 0:
        return np.zeros(0, np.uint32), np.zeros(0, np.bool_)
    head = reader.number(1)
    zeros_apart, kind, parameter = bool(head & _ZEROS_APART), head >> _KIND_SHIFT & 3, head & MAX_PARAMETER
    if kind not in _KINDS:
        raise MalformedEncoding(f"no code of magnitudes starts with the byte {head}")
    nonzero = read_flags(reader, count) if zeros_apart else None
    num_coded = count if nonzero is None else int(np.count_nonzero(nonzero))
    base = 0
    if kind == _PLAIN:
        coded = read_fields(reader, num_coded, width)
    else:
        base = reader.number(num_bytes(width))
        if base >> width:
            raise MalformedEncoding(f"the magnitudes' base does not fit {width} bits")
        limit = (1 << width) - 1 - base if kind == _RISING else base
        distances = read_rice(reader, num_coded, parameter, limit)
        coded = np.uint32(base) + distances if kind == _RISING else np.uint32(base) - distances
    if nonzero is None:
        magnitudes, nonzero = coded, coded != 0
    else:
        if not coded.all():
            raise MalformedEncoding("a magnitude of 0 is marked as another one")
        magnitudes = np.zeros(count, np.uint32)
        magnitudes[nonzero] = coded
    best = _best_code(magnitudes, nonzero, width)
    if (best.head, best.base) != (head, base):
        raise MalformedEncoding("the magnitudes are not in their shortest code")
    negative = np.zeros(count, np.bool_)
    negative[nonzero] = read_flags(reader, int(np.count_nonzero(nonzero)))
    return magnitudes, negative


def max_signed_bytes(count: int, width: int) -> int:
    """The longest encoding of ``count`` numbers: plain fields and all signs."""
    return 1 + num_bytes(count * width) + num_bytes(count) if count else 0


def _best_code(magnitudes: UInt32Array, nonzero: BoolArray, width: int) -> _Code:
    """The shortest code; of equals the first: without a bitmap before with one, then plain, rising, falling."""
    values, counts = magnitudes, None
    if width <= _HISTOGRAM_WIDTH:
        # Few different numbers: their histogram stands for them.
        histogram = np.bincount(magnitudes)
        values = np.flatnonzero(histogram).astype(np.uint32)
        counts = histogram[values]
    codes = _codes(values, counts, width, zeros_apart=False)
    if not nonzero.all():
        kept = nonzero if counts is None else values != 0
        counts = None if counts is None else counts[kept]
        codes += _codes(values[kept], counts, width, zeros_apart=True, bitmap=num_bytes(len(magnitudes)))
    return min(codes, key=lambda code: code.length)


def _codes(
    values: UInt32Array, counts: Int64Array | None, width: int, *, zeros_apart: bool, bitmap: int = 0
) -> list[_Code]:
    """The three codes of values, each of which occurs ``counts`` times (None: once)."""
    n = len(values) if counts is None else int(counts.sum())
    codes = [_Code(zeros_apart, _PLAIN, 0, 0, bitmap + num_bytes(n * width))]
    if n == 0:
        return codes
    for kind, base in ((_RISING, int(values.min())), (_FALLING, int(values.max()))):
        parameter, unary_sum = choose_parameter(_distances(values, kind, base), counts)
        length = bitmap + num_bytes(width) + coded_bytes(n, parameter, unary_sum)
        codes.append(_Code(zeros_apart, kind, parameter, base, length))
    return codes


def _distances(magnitudes: UInt32Array, kind: int, base: int) -> UInt32Array:
    return magnitudes - np.uint32(base) if kind == _RISING else np.uint32(base) - magnitudes
