"""The compiled inner loops of shares on a server. Only ``compiled`` calls them, and it checks every argument.

They are those of ``client_sdk.protocol.sharing_kernels`` with the same bits; the arithmetic is that of the device's
native kernels (``client_sdk/native/sharing.cpp``), written so that the compiler vectorises it:

- Modulo 2^61 - 1, three bits of a word are free and 2^61 = 1. Products are made of halves of words; sums are reduced
  late, and made canonical once.
- Modulo 2^127 - 1, small multiples are added in limbs of 43, 43 and 41 bits, without carries in between; other products
  are made in 128 bits.

**Vectors come as addresses**, so that what was received is read where it lies: any alignment, writable or not.

No branch and no address depends on an element, but for the refusal of a vector that is not canonical. The kernels
release the GIL, start no thread and keep no state. Their signatures are explicit, so they are compiled when this module
is imported; the machine code is cached beside this file (or in ``NUMBA_CACHE_DIR`` where that is read-only).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

BLOCK: Final = 512
"""Elements that are checked, and then worked on while they are in the first cache level."""

SMALL_WEIGHT: Final = 1 << 20
"""Weights below this, times a limb of 43 bits and plus another, fit a word."""

_ONE: Final = np.uint64(1)
_3: Final = np.uint64(3)
_21: Final = np.uint64(21)
_22: Final = np.uint64(22)
_29: Final = np.uint64(29)
_32: Final = np.uint64(32)
_41: Final = np.uint64(41)
_43: Final = np.uint64(43)
_61: Final = np.uint64(61)
_63: Final = np.uint64(63)
_LOW29: Final = np.uint64(2**29 - 1)
_LOW32: Final = np.uint64(2**32 - 1)
_LOW41: Final = np.uint64(2**41 - 1)
_LOW43: Final = np.uint64(2**43 - 1)
_HALF61: Final = np.uint64(2**60 - 1)
_LOW63: Final = np.uint64(2**63 - 1)
_P61: Final = np.uint64(2**61 - 1)
_ZERO: Final = np.uint64(0)


def _load(_context: Any, _address: Any, _index: Any) -> Any:  # noqa: ANN401 - numba's intrinsics have no type
    """The 64-bit word at an index from an address of any alignment."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - as above
        base = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(base, [arguments[1]]), align=1)

    return types.uint64(types.uint64, types.int64), generate


def _add_product(_context: Any, _s0: Any, _s1: Any, _x0: Any, _x1: Any, _c0: Any, _c1: Any) -> Any:  # noqa: ANN401 - as above
    """``sum + x * c`` modulo 2^127 - 1, from pairs of words up to p, and up to p itself."""
    result = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]  # numba has no types

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - as above
        wide, word = ir.IntType(128), ir.IntType(64)
        s0, s1, x0, x1, c0, c1 = (builder.zext(a, wide) for a in arguments)
        half, bits, modulus = ir.Constant(wide, 64), ir.Constant(wide, 127), ir.Constant(wide, 2**127 - 1)

        def fold(x: Any) -> Any:  # noqa: ANN401 - as above
            return builder.add(builder.and_(x, modulus), builder.lshr(x, bits))

        lowest = builder.mul(x0, c0)
        middle = builder.add(builder.add(builder.mul(x0, c1), builder.mul(x1, c0)), builder.lshr(lowest, half))
        low = builder.or_(builder.shl(middle, half), builder.zext(builder.trunc(lowest, word), wide))
        high = builder.add(builder.mul(x1, c1), builder.lshr(middle, half))  # times 2^128, which is 2
        product = fold(builder.add(fold(low), builder.shl(high, ir.Constant(wide, 1))))
        total = fold(builder.add(builder.or_(s0, builder.shl(s1, half)), product))
        return context.make_tuple(
            builder, result, (builder.trunc(total, word), builder.trunc(builder.lshr(total, half), word))
        )

    return result(*[types.uint64] * 6), generate


_word: Any = intrinsic(_load)
_plus_product: Any = intrinsic(_add_product)


# --- modulo 2^61 - 1 -----------------------------------------------------------------------------------------------


@njit(nogil=True)
def _fold61(x: np.uint64) -> np.uint64:
    return (x & _P61) + (x >> _61)


@njit(nogil=True)
def _canonical61(x: np.uint64) -> np.uint64:
    """Of a number below 2 p."""
    return np.uint64(min(x, x - _P61))


@njit(nogil=True)
def _product61(x: np.uint64, low: np.uint64, high: np.uint64) -> np.uint64:
    """``x * (low + 2^32 high)``, below 2^63."""
    x_low, x_high = x & _LOW32, x >> _32
    middle = x_low * high + x_high * low
    return _fold61(x_low * low) + (middle >> _29) + ((middle & _LOW29) << _32) + ((x_high * high) << _3)


@njit(nogil=True)
def _canonical_block61(address: int, start: int, stop: int) -> bool:
    excess = _ZERO
    for j in range(start, stop):
        x = _word(address, j)
        excess |= x | (x + _ONE)
    return bool(excess >> _61 == _ZERO)


@njit("int64(uint64, uint64, uint64[::1], int64)", cache=True, nogil=True)
def accumulate61(address: int, weight: int, total: UInt64Array, size: int) -> int:
    """Add ``weight * vector`` to the first ``size`` elements of ``total``.

    Args:
        address: Where the vector begins.
        weight: Below p.
        total: Canonical.
        size: Elements.

    Returns:
        ``size``, or the first element of the block that is not canonical: from there on, ``total`` is untouched.
    """
    low, high = weight & _LOW32, weight >> _32
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        if not _canonical_block61(address, start, stop):
            return start
        part = total[start:stop]
        for j in range(part.size):
            part[j] = _canonical61(_fold61(part[j] + _product61(_word(address, start + j), low, high)))
    return size


@njit("boolean(uint64[::1], uint64[::1], uint64[::1])", cache=True, nogil=True)
def combine61(addresses: UInt64Array, weights: UInt64Array, out: UInt64Array) -> bool:
    """Write the sum of ``weights[i]`` (below p) times the vector at ``addresses[i]``; whether all are canonical."""
    good = True
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        part = out[start:stop]
        part[:] = _ZERO
        for i in range(addresses.size):
            address, low, high = addresses[i], weights[i] & _LOW32, weights[i] >> _32
            good &= _canonical_block61(address, start, stop)
            for j in range(part.size):
                part[j] = _fold61(part[j] + _product61(_word(address, start + j), low, high))
        for j in range(part.size):
            part[j] = _canonical61(part[j])
    return good


@njit("boolean(uint64[::1])", cache=True, nogil=True)
def mask61(words: UInt64Array) -> bool:
    """Random words as elements, in place; whether all are, as but one in 2^61 is."""
    excess = _ZERO
    for j in range(words.size):
        words[j] &= _P61
        excess |= words[j] + _ONE
    return bool(excess >> _61 == _ZERO)


@njit("void(uint64, uint64, int64, uint64[::1])", cache=True, nogil=True)
def inner61(left: int, right: int, size: int, halves: UInt64Array) -> None:
    """Write the sums of the lower and of the upper 32 bits of all products modulo p, for up to 2^32 elements."""
    low, high = _ZERO, _ZERO
    for j in range(size):
        y = _word(right, j)
        product = _fold61(_product61(_word(left, j), y & _LOW32, y >> _32))
        low += product & _LOW32
        high += product >> _32
    halves[0], halves[1] = low, high


@njit("void(uint64, int64[::1])", cache=True, nogil=True)
def lower61(address: int, codes: Int64Array) -> None:
    """Write the integers of least magnitude that elements stand for."""
    for j in range(codes.size):
        x = _word(address, j)
        codes[j] = np.int64(x - (_P61 & (_ZERO - ((_HALF61 - x) >> _63))))


# --- modulo 2^127 - 1; element j has the words 2 j and 2 j + 1 -------------------------------------------------------


@njit(nogil=True)
def _canonical_block127(address: int, start: int, stop: int) -> bool:
    excess = _ZERO
    for j in range(start, stop):
        low, high = _word(address, 2 * j), _word(address, 2 * j + 1)
        excess |= high | (high + np.uint64(low + _ONE == _ZERO))
    return bool(excess >> _63 == _ZERO)


@njit(nogil=True)
def _plus_multiple(
    t0: np.uint64, t1: np.uint64, x0: np.uint64, x1: np.uint64, weight: int
) -> tuple[np.uint64, np.uint64]:
    """``t + weight * x``, canonical."""
    low = (t0 & _LOW43) + weight * (x0 & _LOW43)
    middle = ((t0 >> _43 | t1 << _21) & _LOW43) + weight * ((x0 >> _43 | x1 << _21) & _LOW43) + (low >> _43)
    high = (t1 >> _22) + weight * (x1 >> _22) + (middle >> _43)
    # What is above bit 127 goes to the bottom; what is left is below 2 p.
    low = (low & _LOW43) + (high >> _41)
    middle = (middle & _LOW43) + (low >> _43)
    high = (high & _LOW41) + (middle >> _43)
    low, middle = low & _LOW43, middle & _LOW43
    # It reaches p exactly if the next number reaches 2^127, and then that, without its top bit, is the residue.
    low += (high + ((middle + ((low + _ONE) >> _43)) >> _43)) >> _41
    middle += low >> _43
    high += middle >> _43
    low, middle, high = low & _LOW43, middle & _LOW43, high & _LOW41
    return low | middle << _43, middle >> _21 | high << _22


@njit("int64(uint64, uint64, uint64[:, ::1], int64)", cache=True, nogil=True)
def accumulate127(address: int, weight: int, total: UInt64Array, size: int) -> int:
    """As ``accumulate61``, for a weight below ``SMALL_WEIGHT``."""
    # Limb by limb, because vector units do not take pairs apart well.
    limbs = np.empty((4, BLOCK), np.uint64)
    t0, t1, x0, x1 = limbs[0], limbs[1], limbs[2], limbs[3]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        if not _canonical_block127(address, start, stop):
            return start
        part = total[start:stop]
        for j in range(len(part)):
            t0[j], t1[j] = part[j, 0], part[j, 1]
            x0[j], x1[j] = _word(address, 2 * (start + j)), _word(address, 2 * (start + j) + 1)
        for j in range(len(part)):
            t0[j], t1[j] = _plus_multiple(t0[j], t1[j], x0[j], x1[j], weight)
        for j in range(len(part)):
            part[j, 0], part[j, 1] = t0[j], t1[j]
    return size


@njit("boolean(uint64[:, ::1])", cache=True, nogil=True)
def mask127(words: UInt64Array) -> bool:
    """As ``mask61``."""
    excess = _ZERO
    for j in range(len(words)):
        words[j, 1] &= _LOW63
        excess |= words[j, 1] + np.uint64(words[j, 0] + _ONE == _ZERO)
    return bool(excess >> _63 == _ZERO)


@njit("boolean(uint64[::1], uint64[:, ::1], uint64[:, ::1])", cache=True, nogil=True)
def combine127(addresses: UInt64Array, weights: UInt64Array, out: UInt64Array) -> bool:
    """As ``combine61``."""
    good = True
    for i in range(addresses.size):
        good &= _canonical_block127(addresses[i], 0, len(out))
    for j in range(len(out)):
        low, high = _ZERO, _ZERO
        for i in range(addresses.size):
            x0, x1 = _word(addresses[i], 2 * j), _word(addresses[i], 2 * j + 1)
            low, high = _plus_product(low, high, x0, x1, weights[i, 0], weights[i, 1])
        is_modulus = np.uint64(high + np.uint64(low + _ONE == _ZERO) == np.uint64(2**63))
        out[j, 0] = low & (is_modulus - _ONE)
        out[j, 1] = high & (is_modulus - _ONE)
    return good


@njit("void(uint64, uint64, int64, uint64[::1])", cache=True, nogil=True)
def inner127(left: int, right: int, size: int, total: UInt64Array) -> None:
    """Write the sum of all products modulo p, as two words; p may stand for 0."""
    low, high = _ZERO, _ZERO
    for j in range(0, 2 * size, 2):
        x0, x1, y0, y1 = _word(left, j), _word(left, j + 1), _word(right, j), _word(right, j + 1)
        low, high = _plus_product(low, high, x0, x1, y0, y1)
    total[0], total[1] = low, high
