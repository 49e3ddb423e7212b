"""Arithmetic modulo 2^61 - 1 on blocks of 64-bit words.

An element leaves three bits of its word free. A sum or a difference is corrected without a branch: of the candidates
x and x - p (modulo 2^64), the one in range is the smaller. Products are built from halves of 32 bits, and what lies
above bit 61 is added below: 2^61 = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from client_sdk.protocol.mersenne.blocks import BLOCK, Block, FieldVector

_P: Final = np.uint64(2**61 - 1)
_HALF: Final = np.uint64(32)
_LOW: Final = np.uint64(2**32 - 1)
_BITS: Final = np.uint64(61)
_ABOVE: Final = np.uint64(61 - 32)
"""A number shifted up by half a word passes bit 61 with what it has from this bit on."""
_BELOW: Final = np.uint64(2**29 - 1)
_EIGHT: Final = np.uint64(8)
_FITS_A_WORD: Final = 8
"""Multiples of p that are below 2^64."""
_FOUR_P: Final = np.uint64(4 * (2**61 - 1))


class Blocks61:
    """Arithmetic modulo 2^61 - 1; a block is ``[1, b]``. See ``BlockArithmetic``."""

    def __init__(self) -> None:
        self._scratch = np.empty((5, 1, BLOCK), np.uint64)

    def _temporaries(self, size: int) -> tuple[Block, ...]:
        return tuple(self._scratch[:, :, :size])

    def load(self, elements: FieldVector) -> Block:
        """See ``BlockArithmetic``."""
        return elements[np.newaxis]

    def place(self, elements: FieldVector) -> Block:
        """See ``BlockArithmetic``."""
        return elements[np.newaxis]

    def store(self, block: Block, elements: FieldVector) -> None:
        """See ``BlockArithmetic``. It is there already."""

    def add(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        t, *_ = self._temporaries(out.shape[1])
        np.add(left, right, out=out)
        np.subtract(out, _P, out=t)
        np.minimum(out, t, out=out)

    def subtract(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        t, *_ = self._temporaries(out.shape[1])
        np.subtract(left, right, out=out)
        np.add(out, _P, out=t)
        np.minimum(out, t, out=out)

    def multiply(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        size = out.shape[1]
        low, high, middle, t, u = self._temporaries(size)
        right_low, right_high = right & _LOW, right >> _HALF
        np.bitwise_and(left, _LOW, out=low)
        np.right_shift(left, _HALF, out=high)
        # low < 2^32 and high < 2^29: the middle stays below 2^62, and the top, times 2^64 = 8, below 2^61.
        np.multiply(low, right_high, out=middle)
        np.multiply(high, right_low, out=t)
        middle += t
        high *= right_high
        high *= _EIGHT
        low *= right_low
        self._fold(low, middle, t, u)
        low += high
        self._reduce(low, t, out)

    def combine(self, coefficients: Sequence[int], blocks: Sequence[Block], out: Block) -> None:
        """See ``BlockArithmetic``."""
        if sum(map(abs, coefficients)) <= _FITS_A_WORD:
            self._combine_few(coefficients, blocks, out)
            return
        low, high, t, u, _ = self._temporaries(out.shape[1])
        # Two's complement: magnitudes stay below 2^62 and 2^59, so that adding 4 p, and p, makes them positive.
        low.fill(_FOUR_P)
        high.fill(_P)
        for coefficient, block in zip(coefficients, blocks, strict=True):
            factor = np.uint64(coefficient % 2**64)
            np.bitwise_and(block, _LOW, out=t)
            t *= factor
            low += t
            np.right_shift(block, _HALF, out=t)
            t *= factor
            high += t
        self._fold(low, high, t, u)
        self._reduce(low, t, out)

    def _combine_few(self, coefficients: Sequence[int], blocks: Sequence[Block], out: Block) -> None:
        """As ``combine``, where a word holds the sum once it is made positive: that stays below 8 p."""
        total, t, *_ = self._temporaries(out.shape[1])
        total.fill(np.uint64(-sum(min(coefficient, 0) for coefficient in coefficients) * (2**61 - 1)))
        for coefficient, block in zip(coefficients, blocks, strict=True):
            term = block
            if abs(coefficient) != 1:
                term = np.multiply(block, np.uint64(abs(coefficient)), out=t)
            (np.subtract if coefficient < 0 else np.add)(total, term, out=total)
        self._reduce(total, t, out)

    @staticmethod
    def _fold(low: Block, high: Block, t: Block, u: Block) -> None:
        """``low = low + 2^32 high`` in the field, below 2^62 + 2^36, for any low and for high < 2^62."""
        np.right_shift(low, _BITS, out=t)
        low &= _P
        low += t
        np.right_shift(high, _ABOVE, out=t)
        low += t
        np.bitwise_and(high, _BELOW, out=u)
        u <<= _HALF
        low += u

    @staticmethod
    def _reduce(wide: Block, t: Block, out: Block) -> None:
        """``out = wide`` in the field, canonical, for any word; destroys ``wide``."""
        np.right_shift(wide, _BITS, out=t)
        wide &= _P
        wide += t
        np.subtract(wide, _P, out=t)
        np.minimum(wide, t, out=out)
