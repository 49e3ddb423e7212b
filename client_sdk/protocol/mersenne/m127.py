"""Arithmetic modulo 2^127 - 1 on blocks of two limbs of 64 bits.

Sums carry by comparison. Products and combinations are built from quarters of 32 bits in four columns: what would be
added to column 4 + k goes, doubled, to column k, since 2^128 = 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.mersenne.blocks import BLOCK, Block, FieldVector

_ONE: Final = np.uint64(1)
_HALF: Final = np.uint64(32)
_LOW: Final = np.uint64(2**32 - 1)
_TOP: Final = np.uint64(63)
_HIGH_LIMB: Final = np.uint64(2**63 - 1)
_LOW_LIMB: Final = np.uint64(2**64 - 1)
_TOP_QUARTER_BITS: Final = np.int64(31)
_TOP_QUARTER: Final = np.int64(2**31 - 1)
_QUARTER_BITS: Final = np.int64(32)
_QUARTER: Final = np.int64(2**32 - 1)

_Row = npt.NDArray[np.uint64]


class Blocks127:
    """Arithmetic modulo 2^127 - 1; a block is ``[2, b]``. See ``BlockArithmetic``."""

    def __init__(self) -> None:
        self._scratch = np.empty((14, BLOCK), np.uint64)
        self._placed = np.empty((2, BLOCK), np.uint64)

    def load(self, elements: FieldVector) -> Block:
        """See ``BlockArithmetic``."""
        return np.ascontiguousarray(elements.T)

    def place(self, elements: FieldVector) -> Block:
        """See ``BlockArithmetic``."""
        return self._placed[:, : len(elements)]

    def store(self, block: Block, elements: FieldVector) -> None:
        """See ``BlockArithmetic``."""
        elements[...] = block.T

    def add(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        size = out.shape[1]
        t, carry = self._scratch[:2, :size]
        np.add(left[0], right[0], out=t)
        carry[...] = t < left[0]
        np.add(left[1], right[1], out=out[1])
        out[1] += carry
        out[0] = t
        self._reduce(out)

    def subtract(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        negated = self._scratch[2:4, : right.shape[1]]
        # p - x is the complement of x's 127 bits.
        np.bitwise_xor(right[0], _LOW_LIMB, out=negated[0])
        np.bitwise_xor(right[1], _HIGH_LIMB, out=negated[1])
        self.add(left, negated, out)

    def multiply(self, left: Block, right: Block, out: Block) -> None:
        """See ``BlockArithmetic``."""
        size = out.shape[1]
        columns, product, t = self._scratch[:4, :size], self._scratch[4, :size], self._scratch[5, :size]
        ours = self._scratch[6:10, :size]
        self._split(left, ours)
        theirs = self._scratch[10:14, : right.shape[1]]
        self._split(right, theirs)
        columns.fill(0)
        for i in range(4):
            for j in range(4):
                np.multiply(ours[i], theirs[j], out=product)
                # 16 halves of at most 2 * 2^32 to a column: nothing overflows before the carries.
                np.bitwise_and(product, _LOW, out=t)
                self._put(columns, i + j, t)
                product >>= _HALF
                self._put(columns, i + j + 1, product)
        self._carry(columns.view(np.int64), t.view(np.int64), out)

    @staticmethod
    def _put(columns: Block, index: int, value: _Row) -> None:
        if index >= 4:
            value <<= _ONE
        columns[index % 4] += value

    def combine(self, coefficients: Sequence[int], blocks: Sequence[Block], out: Block) -> None:
        """See ``BlockArithmetic``."""
        size = out.shape[1]
        columns, t = self._scratch[:4, :size], self._scratch[5, :size]
        quarters = self._scratch[6:10, :size]
        columns.fill(0)
        for coefficient, block in zip(coefficients, blocks, strict=True):
            self._split(block, quarters)
            quarters *= np.uint64(coefficient % 2**64)
            columns += quarters
        self._carry(columns.view(np.int64), t.view(np.int64), out)

    @staticmethod
    def _split(block: Block, quarters: Block) -> None:
        for limb in range(2):
            np.bitwise_and(block[limb], _LOW, out=quarters[2 * limb])
            np.right_shift(block[limb], _HALF, out=quarters[2 * limb + 1])

    def _carry(self, columns: npt.NDArray[np.int64], t: npt.NDArray[np.int64], out: Block) -> None:
        """``out`` = the signed columns (magnitudes below 2^62) with carries.

        What comes around the first time is below 2^31 in magnitude. If anything comes around again, it is 1 or -1 and
        has gone through all columns, of which the first is then as small, or as far below 2^32, and takes it.
        """
        for _ in range(2):
            for k in range(3):
                np.right_shift(columns[k], _QUARTER_BITS, out=t)
                columns[k] &= _QUARTER
                columns[k + 1] += t
            np.right_shift(columns[3], _TOP_QUARTER_BITS, out=t)
            columns[3] &= _TOP_QUARTER
            columns[0] += t
        words = columns.view(np.uint64)
        for limb in range(2):
            np.left_shift(words[2 * limb + 1], _HALF, out=out[limb])
            out[limb] |= words[2 * limb]
        self._reduce(out)

    def _reduce(self, out: Block) -> None:
        """Make a number below 2^128 - 1 canonical: x >= p if and only if x + 1 reaches bit 127."""
        size = out.shape[1]
        full, top = self._scratch[:2, :size]
        full[...] = out[0] == _LOW_LIMB
        np.add(out[1], full, out=top)
        top >>= _TOP
        full &= top
        out[0] += top
        out[1] += full
        out[1] &= _HIGH_LIMB
