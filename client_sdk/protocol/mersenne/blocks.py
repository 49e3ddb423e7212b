"""What a field needs of its arithmetic: a few operations on blocks of elements.

A block holds up to ``BLOCK`` elements limb by limb: row l has limb l (64 bits, least significant first) of each. Its
operations are sequences of numpy calls on whole rows. Which ones run, and on which addresses, follows from lengths and
public constants only: there is no branch on, and no index from, an element.

An object that implements ``BlockArithmetic`` owns the scratch memory of one caller: threads do not share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

FieldVector = npt.NDArray[np.uint64]
"""uint64 ``[n]`` (one limb) or ``[n, 2]`` (two limbs, the low one first); every element below the modulus."""

Block = npt.NDArray[np.uint64]
"""uint64 ``[limbs, b]``, b <= ``BLOCK``."""

BLOCK: Final = 8192
"""64 KB a limb: the operands of an operation stay in the second-level cache, and numpy's cost per call is spread."""

SMALL_LIMIT: Final = 1 << 30
"""Coefficients whose magnitudes sum to less are multiplied with halves of limbs and summed without carries."""


def slices(size: int, step: int = BLOCK) -> Iterator[slice]:
    """Consecutive pieces of a vector, a block each."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


class BlockArithmetic(Protocol):
    """Operations on blocks. ``out`` may be one of the operands."""

    def load(self, elements: FieldVector) -> Block:
        """Elements (any stride) as a block, which may be a view of them: not to be written to."""
        ...

    def place(self, elements: FieldVector) -> Block:
        """A block to compute these elements in, until the next one is asked for: it may be a view of them."""
        ...

    def store(self, block: Block, elements: FieldVector) -> None:
        """Bring what was computed in ``place(elements)`` to where it belongs."""
        ...

    def add(self, left: Block, right: Block, out: Block) -> None:
        """``out = left + right``."""
        ...

    def subtract(self, left: Block, right: Block, out: Block) -> None:
        """``out = left - right``."""
        ...

    def multiply(self, left: Block, right: Block, out: Block) -> None:
        """``out = left * right``; ``right`` may have one element, which multiplies all."""
        ...

    def combine(self, coefficients: Sequence[int], blocks: Sequence[Block], out: Block) -> None:
        """``out = sum of coefficients[i] * blocks[i]``, for magnitudes that sum to less than ``SMALL_LIMIT``."""
        ...
