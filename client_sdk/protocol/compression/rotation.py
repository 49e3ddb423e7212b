"""A random rotation that both ends draw from the public seed: signs, then Walsh-Hadamard transforms in blocks.

After it no value is much larger than the others whatever the update looked like, so that few bits a value or a random
tenth of the values describe it well [Suresh et al. 2017; Vargaftik et al. 2021]. The matrix is orthogonal: norms and
distances stay (up to float32 rounding), and the inverse is the transpose.

The transform of B values costs log2(B) additions each. B is the largest power of four up to 4096 that the update can
fill: a power of four makes the scale ``1 / sqrt(B)`` a power of two, which rounds nothing. What is left at the end of
the update is not padded, which would cost bytes; a second transform over the *last* B values mixes it instead.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression.streams import WordStream
from client_sdk.protocol.errors import NonFiniteUpdate
from client_sdk.protocol.program import Float32Array

LARGEST_BLOCK: Final = 4**6

_BLOCKS_AT_ONCE: Final = 16
"""Blocks that are transformed together: with their copy they stay in a core's second cache."""


def block_size(size: int) -> int:
    """The largest power of four that is at most 4096 and at most ``size`` (1 for an empty update)."""
    block = 1
    while block < LARGEST_BLOCK and block * 4 <= size:
        block *= 4
    return block


def rotate(vector: Float32Array, seed: int) -> Float32Array:
    """Rotate an update.

    Args:
        vector: float32[d], finite.
        seed: Public seed.

    Returns:
        float32[d], a new array. Each addition rounds to float32 in a fixed order: same bits on every machine.

    Raises:
        NonFiniteUpdate: Values above about 1e34, whose sums overflow.
    """
    out = vector.copy()
    for part, signs in _parts(out, seed):
        part.view(np.uint32)[:] ^= signs
        _transform(part, block_size(len(out)))
    return _finite(out)


def rotate_back(vector: Float32Array, seed: int) -> Float32Array:
    """The inverse of ``rotate`` up to rounding, likewise."""
    out = vector.copy()
    for part, signs in reversed(_parts(out, seed)):
        _transform(part, block_size(len(out)))
        part.view(np.uint32)[:] ^= signs
    return _finite(out)


def _parts(vector: Float32Array, seed: int) -> list[tuple[Float32Array, npt.NDArray[np.uint32]]]:
    """What is transformed in turn, as views of the vector, each with its random signs (as bits to flip)."""
    block = block_size(len(vector))
    whole = len(vector) // block * block
    parts = [vector[:whole]]
    if whole < len(vector):
        parts.append(vector[-block:])
    signs = WordStream("rotation", seed).bits(sum(len(part) for part in parts)).astype(np.uint32) << np.uint32(31)
    return list(zip(parts, np.split(signs, [whole]), strict=False))


def _transform(values: Float32Array, block: int) -> None:
    """Walsh-Hadamard transform of each block in place, times ``1 / sqrt(block)``; its own inverse up to rounding.

    A block is a square matrix, transformed along its columns and then along its rows. In a column the k-th of the
    steps h = 1, 2, 4, ... replaces (x, y), h places apart, by (x + y, x - y).
    """
    side = 1 << ((block.bit_length() - 1) // 2)
    scale = np.float32(1 / side)
    squares = values.reshape(-1, side, side)
    for start in range(0, len(squares), _BLOCKS_AT_ONCE):
        chunk = squares[start : start + _BLOCKS_AT_ONCE]
        columns = _butterflies(chunk)
        rows = _butterflies(np.ascontiguousarray(columns.transpose(0, 2, 1)))
        np.multiply(rows.transpose(0, 2, 1), scale, out=chunk)


def _butterflies(squares: Float32Array) -> Float32Array:
    """All steps along the middle axis; the result may be ``squares`` itself or a new array."""
    n, side, width = squares.shape
    here, there = squares, np.empty_like(squares)
    step = 1
    # Sums that overflow are found at the end.
    with np.errstate(over="ignore", invalid="ignore"):
        while step < side:
            pairs = here.reshape(n, side // (2 * step), 2, step * width)
            out = there.reshape(pairs.shape)
            np.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
            np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
            here, there = there, here
            step *= 2
    return here


def _finite(values: Float32Array) -> Float32Array:
    if not np.isfinite(values).all():
        raise NonFiniteUpdate("the update's values are too large to be rotated")
    return values
