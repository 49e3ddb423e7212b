"""The compiled inner loops of the accumulators. Only ``exact`` and ``fixed`` call them, and they check every argument.

**Layout.** Columns are grouped in blocks of ``BLOCK``; the bins of one block lie next to each other
(``sums[block, bin, column]``), so that folding one report is one sequential stream through memory instead of one a
bin (nearly twice as fast at a million parameters).

**All or nothing per block.** A slice's magnitudes are checked before it is folded, and several reports are folded
into scratch that fits the first cache level; the block itself is written once, when every report in it was admissible.

**Reports come as addresses**, not as arrays: any number of separate buffers, writable or not, go through one
compiled signature without being stacked into a matrix first.

**Many reports at a time** use two short cuts that change no bit. (1) The product of a float32 and an integer weight
below 2**29 is exact in float64, so a fused multiply-add gives what a multiplication and an addition give. (2) With
``t = m + p``, m = 1.5 * 2**52 * g, t lies in one binade whose spacing is g, so t's bit pattern read as an integer is
that of m plus the number of grid steps: summing the bit patterns sums the parts, and saves two floating-point
operations a bin.

``fastmath`` stays off: it would let the compiler simplify ``(p + m) - m`` to ``p``, which is the whole algorithm.
The kernels release the GIL and start no thread. Their signatures are explicit, so they are compiled when this module
is imported; the machine code is cached beside this file (or in ``NUMBA_CACHE_DIR`` where that is read-only).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

BLOCK = 2048
"""Columns in a block: two bins take 32 KiB, a report's slice 8 KiB."""

GROUP = 4
"""Reports folded together; several reports are padded to a multiple of it with copies of weight 0."""

_MAGIC = 1.5 * 2.0**52
_WITHOUT_SIGN = np.int32(0x7FFFFFFF)


def pointer_to(element: types.Type) -> Any:  # noqa: ANN401 - numba's intrinsics have no type
    """A compiled function from an address to a pointer, for ``carray``."""

    def pointer(_context: Any, _address: Any) -> Any:  # noqa: ANN401 - as above
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401 - as above
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.uint64), codegen  # type: ignore[no-untyped-call]  # numba has no types

    return intrinsic(pointer)


def _fused_multiply_add(_context: Any, _x: Any, _y: Any, _z: Any) -> Any:  # noqa: ANN401 - as above
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401 - as above
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), codegen


_float32_at = pointer_to(types.float32)
_int64_at = pointer_to(types.int64)
_fma: Any = intrinsic(_fused_multiply_add)
"""``x * y + z`` with one rounding."""


@njit(nogil=True)
def _magnitude(x: np.float32) -> np.int32:
    """Bits of ``|x|``: ordered like the magnitudes, infinity and every NaN above all finite values."""
    return np.int32(np.float32(x).view(np.int32) & _WITHOUT_SIGN)


@njit(nogil=True)
def _peak_of_one(x: Float32Array) -> np.int32:
    top = np.int32(0)
    for j in range(x.size):
        top = np.int32(max(top, _magnitude(x[j])))
    return top


@njit(nogil=True)
def _peak_of_four(x0: Float32Array, x1: Float32Array, x2: Float32Array, x3: Float32Array) -> np.int32:
    top = np.int32(0)
    for j in range(x0.size):
        top01 = max(_magnitude(x0[j]), _magnitude(x1[j]))
        top23 = max(_magnitude(x2[j]), _magnitude(x3[j]))
        top = np.int32(max(top, top01, top23))
    return top


@njit(nogil=True)
def _bits(x: np.float64) -> np.uint64:
    return np.float64(x).view(np.uint64)


@njit(nogil=True)
def _steps(x: np.float32, w: np.float64, m0: float, m1: float, m2: float) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Bit patterns of m plus the part of ``x * w`` on each grid; what a caller ignores is not computed."""
    t = _fma(np.float64(x), w, m0)
    r = _fma(np.float64(x), w, m0 - t)
    u = r + m1
    v = (r - (u - m1)) + m2
    return _bits(t), _bits(u), _bits(v)


def _folds(bins: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The fold of one report into float64 bins, and of four into integer steps; ``bins`` is a constant of the code."""
    three = bins == 3

    @njit(nogil=True)
    def fold_one(s: Float64Array, x: Float32Array, w: np.float64, m: Float64Array) -> None:
        m0, m1, m2 = m[0], m[1], m[2]
        for j in range(x.size):
            p = np.float64(x[j]) * w
            part = (p + m0) - m0
            s[j] += part
            p -= part
            part = (p + m1) - m1
            s[j + BLOCK] += part
            if three:
                p -= part
                s[j + 2 * BLOCK] += (p + m2) - m2

    @njit(nogil=True)
    def fold_four(  # noqa: PLR0917 - compiled functions are called by position
        s: UInt64Array,
        x0: Float32Array,
        x1: Float32Array,
        x2: Float32Array,
        x3: Float32Array,
        w: Float64Array,
        m: Float64Array,
    ) -> None:
        m0, m1, m2 = m[0], m[1], m[2]
        w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
        for j in range(x0.size):
            a0, b0, c0 = _steps(x0[j], w0, m0, m1, m2)
            a1, b1, c1 = _steps(x1[j], w1, m0, m1, m2)
            a2, b2, c2 = _steps(x2[j], w2, m0, m1, m2)
            a3, b3, c3 = _steps(x3[j], w3, m0, m1, m2)
            s[j] += (a0 + a1) + (a2 + a3)
            s[j + BLOCK] += (b0 + b1) + (b2 + b3)
            if three:
                s[j + 2 * BLOCK] += (c0 + c1) + (c2 + c3)

    return fold_one, fold_four


_one_into_two, _four_into_two = _folds(2)
_one_into_three, _four_into_three = _folds(3)


@njit(
    "int64(uint64[::1], float64[::1], float64[:, :, ::1], float64[::1], int64, int64, int64, int32)",
    cache=True,
    nogil=True,
)
def fold_float32(  # noqa: PLR0917 - compiled functions are called by position
    addresses: UInt64Array,
    weights: Float64Array,
    sums: Float64Array,
    grids: Float64Array,
    size: int,
    first: int,
    last: int,
    limit: np.int32,
) -> int:
    """Add ``weights[i] * x_i`` to the bins of the blocks ``first <= b < last``.

    Args:
        addresses: Where each ``x_i`` (float32[size], aligned) begins: one, or a multiple of ``GROUP``.
        weights: Integers of magnitude below 2**29; 0 for padding.
        sums: Bins, float64[blocks, 2 or 3, BLOCK].
        grids: Powers of two, one a bin, as ``AccumulatorPlan`` proves them.
        size: Columns in all.
        first: First block.
        last: One past the last block.
        limit: Bits of the largest admissible magnitude.

    Returns:
        ``last``, or the first block with an inadmissible value: that block and the ones after it are untouched.
    """
    bins = sums.shape[1]
    n = addresses.size
    magic = np.zeros(3)
    magic[:bins] = _MAGIC * grids
    steps = np.empty(bins * BLOCK, np.uint64)
    for block in range(first, last):
        start = block * BLOCK
        stop = min(start + BLOCK, size)
        flat = sums[block].reshape(bins * BLOCK)
        if n == 1:
            x = carray(_float32_at(addresses[0]), (size,))[start:stop]
            if _peak_of_one(x) > limit:
                return block
            if bins == 2:
                _one_into_two(flat, x, weights[0], magic)
            else:
                _one_into_three(flat, x, weights[0], magic)
            continue
        steps[:] = np.uint64(0)
        for i in range(0, n, GROUP):
            x0 = carray(_float32_at(addresses[i]), (size,))[start:stop]
            x1 = carray(_float32_at(addresses[i + 1]), (size,))[start:stop]
            x2 = carray(_float32_at(addresses[i + 2]), (size,))[start:stop]
            x3 = carray(_float32_at(addresses[i + 3]), (size,))[start:stop]
            # This pass also fetches the slices: a pure read keeps more of memory's bandwidth busy than the fold.
            if _peak_of_four(x0, x1, x2, x3) > limit:
                return block
            if bins == 2:
                _four_into_two(steps, x0, x1, x2, x3, weights[i : i + GROUP], magic)
            else:
                _four_into_three(steps, x0, x1, x2, x3, weights[i : i + GROUP], magic)
        for b in range(bins):
            # Unsigned arithmetic wraps, so the n patterns of m cancel and the signed number of steps is left.
            offset = np.uint64(n) * _bits(magic[b])
            for j in range(b * BLOCK, b * BLOCK + stop - start):
                flat[j] += np.float64(np.int64(steps[j] - offset)) * grids[b]
    return last


@njit("int64(uint64[::1], int64[::1], int64[:, ::1], int64, int64, int64, int64)", cache=True, nogil=True)
def fold_int64(  # noqa: PLR0917 - compiled functions are called by position
    addresses: UInt64Array, weights: Int64Array, sums: Int64Array, size: int, first: int, last: int, limit: int
) -> int:
    """Add ``weights[i] * q_i`` to the sums of the blocks ``first <= b < last``.

    Args:
        addresses: Where each ``q_i`` (int64[size], aligned) begins.
        weights: Integers.
        sums: int64[blocks, BLOCK].
        size: Columns in all.
        first: First block.
        last: One past the last block.
        limit: Largest admissible magnitude.

    Returns:
        ``last``, or the first block with an inadmissible value: that block and the ones after it are untouched.
    """
    scratch = np.empty(BLOCK, np.int64)
    for block in range(first, last):
        start = block * BLOCK
        stop = min(start + BLOCK, size)
        scratch[:] = sums[block]
        for i in range(addresses.size):
            q = carray(_int64_at(addresses[i]), (size,))[start:stop]
            w = weights[i]
            low = np.int64(0)
            high = np.int64(0)
            for j in range(q.size):
                low = min(low, q[j])
                high = max(high, q[j])
                scratch[j] += q[j] * w
            if high > limit or low < -limit:
                return block
        sums[block] = scratch
    return last


@njit(nogil=True)
def _two_sum(a: np.float64, b: np.float64) -> tuple[np.float64, np.float64]:
    """``a + b`` and its rounding error, exactly (Knuth)."""
    s = a + b
    a_part = s - b
    return s, (a - a_part) + (b - (s - a_part))


@njit(nogil=True)
def _sum_of_three(a: np.float64, b: np.float64, c: np.float64) -> np.float64:
    """The sum of three numbers, rounded once; ``a + (b + c)`` rounds twice and can miss by one place.

    The low parts are added with rounding to odd: an inexact result gets its last bit set, so that the final addition
    sees on which side of a tie it lies.

    Source: S. Boldo, G. Melquiond, "Emulation of a FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to
    Odd", IEEE Transactions on Computers 57(4), 2008, section 5.
    """
    u_high, u_low = _two_sum(b, c)
    t_high, t_low = _two_sum(a, u_high)
    low, error = _two_sum(t_low, u_low)
    bits = np.float64(low).view(np.int64)
    if error != 0.0 and bits & 1 == 0:
        # One place towards the error: away from zero if it has the sign of the rounded sum.
        bits += 1 if (error > 0.0) == (low > 0.0) else -1
    return t_high + np.int64(bits).view(np.float64)


@njit("void(float64[:, :, ::1], int64, int64, float64[::1])", cache=True, nogil=True)
def sum_bins(sums: Float64Array, first: int, last: int, total: Float64Array) -> None:
    """Write the correctly rounded sum of the bins of the blocks ``first <= b < last``.

    Args:
        sums: Bins, float64[blocks, 2 or 3, BLOCK].
        first: First block.
        last: One past the last block.
        total: Output, float64[at least (last - first) * BLOCK].
    """
    for block in range(first, last):
        bins = sums[block]
        out = total[(block - first) * BLOCK : (block - first + 1) * BLOCK]
        for j in range(BLOCK):
            if sums.shape[1] == 2:
                out[j] = bins[0, j] + bins[1, j]
            else:
                out[j] = _sum_of_three(bins[0, j], bins[1, j], bins[2, j])
