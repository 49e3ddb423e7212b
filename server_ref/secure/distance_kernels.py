"""Squared distances of field vectors modulo 2^61 - 1: the step whose cost grows with the square of the cohort.

A difference is centred first, so that its square is below 2^120, and 256 squares are added in 128 bits before anything
is reduced. What is computed of a pair does not depend on who computes it, and there is no branch on an element. The
kernel releases the GIL and starts no thread. Importing this module compiles it; the machine code is cached.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from server_ref.aggregation.kernels import pointer_to

UInt64Array = npt.NDArray[np.uint64]

BLOCK: Final = 256
"""Columns between two reductions: 2^8 squares below 2^120 fit 128 bits."""

TILE: Final = 32
"""Rows on either side of a tile: 64 rows of a block are 128 KiB."""

_P: Final = np.uint64(2**61 - 1)
_61: Final = np.uint64(61)
_58: Final = np.uint64(58)
_3: Final = np.uint64(3)
_ZERO: Final = np.uint64(0)

_uint64_at = pointer_to(types.uint64)


def _add_square(_context: Any, low: Any, high: Any, x: Any) -> Any:  # noqa: ANN401, ARG001 - as numba has it
    """``(low, high) + x * x`` in 128 bits."""
    result: Any = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - as above
        wide, word = ir.IntType(128), ir.IntType(64)
        low_, high_, x_ = (builder.zext(a, wide) for a in arguments)
        shift = ir.Constant(wide, 64)
        total = builder.add(builder.or_(low_, builder.shl(high_, shift)), builder.mul(x_, x_))
        halves = builder.trunc(total, word), builder.trunc(builder.lshr(total, shift), word)
        return context.make_tuple(builder, result, halves)

    return result(types.uint64, types.uint64, types.uint64), generate


_accumulate: Any = intrinsic(_add_square)


@njit("void(uint64[::1], int64, int64, int64, int64, int64, uint64[:, ::1])", cache=True, nogil=True)
def add_tile(  # noqa: PLR0917 - numba's signatures are positional
    addresses: UInt64Array, size: int, first: int, last: int, others: int, end: int, out: UInt64Array
) -> None:
    """Write ``||x_i - x_j||^2 mod p`` to ``out[i, j]`` for ``first <= i < last``, ``others <= j < end``, i < j.

    Args:
        addresses: Where each row begins: ``size`` canonical elements.
        size: Coordinates.
        first: First row.
        last: One past it.
        others: First row to compare with.
        end: One past it.
        out: uint64 (rows, rows).
    """
    for i in range(first, last):
        for j in range(max(others, i + 1), end):
            out[i, j] = _ZERO
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        for i in range(first, last):
            x = carray(_uint64_at(addresses[i]), (size,))
            for j in range(max(others, i + 1), end):
                y = carray(_uint64_at(addresses[j]), (size,))
                low, high = _ZERO, _ZERO
                for c in range(start, stop):
                    difference = x[c] - y[c]
                    # Of d and d + p modulo 2^64 the smaller is in range; of d and p - d the smaller is the magnitude.
                    difference = min(difference, difference + _P)
                    low, high = _accumulate(low, high, min(difference, _P - difference))
                # 2^61 = 1: the 128 bits in three parts.
                total = (low & _P) + (((high << _3) | (low >> _61)) & _P) + (high >> _58) + out[i, j]
                total = (total & _P) + (total >> _61)
                out[i, j] = min(total, total - _P)
