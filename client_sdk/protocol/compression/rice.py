"""Golomb-Rice codes of whole numbers, with the parameter that makes them shortest, found exactly.

With parameter r a number v becomes its r low bits and ``v >> r`` in unary: optimal for geometric distributions, which
gaps between random indices follow exactly and excesses over a threshold nearly [Golomb 1966, Rice 1979]. Low bits and
unary parts lie apart, so that both are packed and unpacked by whole-array operations.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from client_sdk.protocol.compression.bits import (
    Int64Array,
    Reader,
    UInt32Array,
    num_bytes,
    pack_fields,
    pack_unary,
    read_fields,
    read_unary,
)
from client_sdk.protocol.errors import MalformedEncoding

MAX_PARAMETER: Final = 31


def choose_parameter(values: UInt32Array, counts: Int64Array | None = None) -> tuple[int, int]:
    """The smallest r with which the values take the fewest bits.

    Args:
        values: uint32, any number of them.
        counts: How often each occurs; None for once.

    Returns:
        r, and the sum of all ``v >> r``.
    """
    n = len(values) if counts is None else int(counts.sum())
    if n == 0:
        return 0, 0

    def unary(r: int) -> int:
        shifted = values >> np.uint32(r)
        return int(shifted.sum(dtype=np.int64)) if counts is None else int(shifted.astype(np.int64) @ counts)

    # The length n (r + 1) + sum(v >> r) is convex in r: each step takes away sum(ceil((v >> r) / 2)), which only
    # shrinks. So the nearest minimum is the minimum, and going down through equals finds the smallest.
    r = min(MAX_PARAMETER, max(0, (unary(0) // n).bit_length() - 1))
    best = unary(r)
    while r > 0 and (below := unary(r - 1)) <= best + n:
        r, best = r - 1, below
    while r < MAX_PARAMETER and (above := unary(r + 1)) + n < best:
        r, best = r + 1, above
    return r, best


def coded_bytes(count: int, parameter: int, unary_sum: int) -> int:
    """Length of ``write_rice``'s answer for ``count`` values whose ``v >> r`` add up to ``unary_sum``."""
    return num_bytes(count * parameter) + num_bytes(count + unary_sum)


def write_rice(values: UInt32Array, parameter: int) -> bytes:
    """The values' low bits, then their unary parts."""
    return pack_fields(values, parameter) + pack_unary(values >> np.uint32(parameter))


def read_rice(reader: Reader, count: int, parameter: int, limit: int) -> UInt32Array:
    """The inverse of ``write_rice``: uint32[count].

    Args:
        reader: The payload.
        count: How many.
        parameter: r.
        limit: Largest value that is accepted, below 2^31.

    Raises:
        MalformedEncoding: A larger value (or, see ``bits``, truncated or not canonical).
    """
    low = read_fields(reader, count, parameter)
    values = read_unary(reader, count, limit >> parameter)
    values <<= np.uint32(parameter)
    values |= low
    if int(values.max(initial=0)) > limit:
        raise MalformedEncoding(f"a coded number exceeds {limit}")
    return values
