"""Values in 8, 4 or 1 bits: a scale for each block of values, and a small signed number for each value.

With 8 (4) bits a number runs from -127 to 127 (-7 to 7), and the scale is the block's largest magnitude, which is
therefore exact. With 1 bit a number is -1 or 1. Two roundings:

- *stochastic*: up or down with the probabilities that make the expectation right. With 1 bit the scale is the block's
  largest magnitude. For means over many updates; not with error feedback, whose residual it may let grow.
- *nearest* (ties to even): the smallest error; never larger than the value itself, so that every block loses at least
  1/n of its squared norm (n values), which is what error feedback needs [Karimireddy et al. 2019]. With 1 bit the scale
  is the block's mean magnitude, the best one.

The arithmetic is float64 in a fixed order, so that the bytes are the same on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression.bits import Reader, UInt32Array, num_bytes, pack_flags, read_flags
from client_sdk.protocol.compression.magnitudes import BoolArray, max_signed_bytes, read_signed, write_signed
from client_sdk.protocol.compression.selection import LARGEST_MAGNITUDE
from client_sdk.protocol.compression.streams import WordStream, seed_bytes
from client_sdk.protocol.errors import MalformedEncoding, NonFiniteUpdate
from client_sdk.protocol.program import Float32Array

_VALUES_AT_ONCE: Final = 2**16

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quantiser:
    """Writes and reads values of 8, 4 or 1 bits.

    Layout: a float32 scale for each block, then the numbers (``magnitudes``; with 1 bit just the signs).

    Attributes:
        bits: 8, 4 or 1.
        block: Values of a block; the last one may be shorter.
        stochastic: The rounding, see above.
    """

    bits: int
    block: int
    stochastic: bool

    @property
    def levels(self) -> int:
        """Largest number."""
        return (1 << (self.bits - 1)) - 1 if self.bits > 1 else 1

    def max_bytes(self, count: int) -> int:
        """The longest encoding of so many values."""
        scales = 4 * -(-count // self.block)
        return scales + (num_bytes(count) if self.bits == 1 else max_signed_bytes(count, self.bits - 1))

    def write(self, values: Float32Array, seed: int, rounding_seed: int) -> bytes:
        """Encode values.

        Args:
            values: float32[n], finite.
            seed: Public seed.
            rounding_seed: Tells apart senders that hold the very same values. The randomness of the rounding is derived
                from both seeds and from the values, so that different values are rounded independently.
        """
        noise: WordStream | None = None
        if self.stochastic:
            content = hashlib.sha256(values.astype("<f4", copy=False).view(np.uint8).data).digest()
            noise = WordStream("rounding", seed, seed_bytes(rounding_seed) + content)
        scales = self._scales(values)
        codes, negative = np.empty(len(values), np.uint32), np.empty(len(values), np.bool_)
        # Whole words of noise for every piece but the last.
        for start in range(0, len(values), _VALUES_AT_ONCE):
            piece = slice(start, start + _VALUES_AT_ONCE)
            exact, spread = values[piece].astype(np.float64), self._spread(scales, start, len(values[piece]))
            rounding = None if noise is None else noise.halves(len(exact)) * np.float64(2.0**-32)
            if self.bits == 1:
                negative[piece] = _signs(exact, spread, rounding)
            else:
                negative[piece] = exact < 0
                codes[piece] = self._round(np.abs(exact), spread, rounding)
        numbers = pack_flags(negative) if self.bits == 1 else write_signed(codes, negative, self.bits - 1)
        return scales.astype("<f4").tobytes() + numbers

    def read(self, reader: Reader, count: int) -> Float32Array:
        """The inverse of ``write``: float32[count], ``scale * number / levels`` in float64, rounded once.

        Raises:
            NonFiniteUpdate: A scale that is NaN or infinite.
            MalformedEncoding: Not the canonical encoding of anything.
        """
        num_blocks = -(-count // self.block)
        scales = np.frombuffer(reader.take(4 * num_blocks), "<f4").astype(np.float32)
        bits = scales.view(np.uint32)
        if (bits & np.uint32(0x7FFFFFFF) > LARGEST_MAGNITUDE).any():
            raise NonFiniteUpdate("a block's scale is NaN or infinite")
        if (bits > LARGEST_MAGNITUDE).any():
            raise MalformedEncoding("a block's scale is negative")
        if self.bits == 1:
            negative = read_flags(reader, count)
            codes = np.ones(count, np.uint32)
        else:
            codes, negative = read_signed(reader, count, self.bits - 1)
        self._check_scales(scales, codes, negative)
        out = np.empty(count, np.float32)
        for start in range(0, count, _VALUES_AT_ONCE):
            piece = slice(start, start + _VALUES_AT_ONCE)
            exact = self._spread(scales, start, len(out[piece]))
            exact *= codes[piece]
            exact /= self.levels
            out[piece] = exact
        # No multiplication by -1, which would make -0.0 of a 0; no 0 is negative here.
        out.view(np.uint32)[:] |= negative.astype(np.uint32) << np.uint32(31)
        return out

    def _scales(self, values: Float32Array) -> Float32Array:
        """One for each block, float32."""
        if len(values) == 0:
            return np.zeros(0, np.float32)
        starts = np.arange(0, len(values), self.block)
        if self.bits > 1 or self.stochastic:
            largest: Float32Array = np.maximum.reduceat(np.abs(values), starts)
            return largest
        lengths = np.diff(starts, append=len(values))
        return (_block_sums(values, self.block) / lengths).astype(np.float32)

    def _spread(self, scales: Float32Array, start: int, count: int) -> Float64Array:
        """The scale of each of ``count`` values from ``start`` on."""
        first, last = start // self.block, (start + count - 1) // self.block
        edges = np.clip(np.arange(first, last + 2) * self.block, start, start + count)
        return np.repeat(scales[first : last + 1].astype(np.float64), np.diff(edges))

    def _round(self, exact: Float64Array, scale: Float64Array, rounding: Float64Array | None) -> UInt32Array:
        """Numbers of magnitudes; a block of zeros has scale 0, and gives zeros."""
        exact *= self.levels
        exact /= np.where(scale == 0, 1.0, scale)
        if rounding is None:
            np.rint(exact, out=exact)
        else:
            # The noise is a multiple of 2^-32 below 1: the largest magnitude, exactly ``levels``, stays there.
            exact += rounding
            np.floor(exact, out=exact)
        return exact.astype(np.uint32)

    def _check_scales(self, scales: Float32Array, codes: UInt32Array, negative: BoolArray) -> None:
        """A scale is what the numbers say: none has another one that gives the same values."""
        if len(codes) == 0:
            return
        starts = np.arange(0, len(codes), self.block)
        if self.bits == 1:
            if (np.logical_or.reduceat(negative, starts) & (scales == 0)).any():
                raise MalformedEncoding("a block of scale 0 has negative values")
        elif (np.maximum.reduceat(codes, starts) != np.where(scales == 0, 0, self.levels)).any():
            raise MalformedEncoding("a block's scale is not its largest magnitude")


def _signs(exact: Float64Array, scale: Float64Array, rounding: Float64Array | None) -> BoolArray:
    """Which values go down to ``-scale``; none of a block whose scale is 0."""
    if rounding is None:
        return (exact < 0) & (scale > 0)
    up = (exact / np.where(scale == 0, 1.0, scale) + 1) / 2
    return (up + rounding < 1) & (scale > 0)


def _block_sums(values: Float32Array, block: int) -> Float64Array:
    """Sum of the magnitudes of each block, float64, by halves: (first half + second half), again and again.

    A fixed order, where ``np.sum`` chooses one by the machine. Missing places count as zeros, up to a power of two.
    """
    block = min(block, len(values))
    length = 1 << (block - 1).bit_length()
    whole = len(values) // block
    table = np.zeros((-(-len(values) // block), length))
    table[:whole, :block] = np.abs(values[: whole * block]).reshape(whole, block)
    table[whole:, : len(values) - whole * block] = np.abs(values[whole * block :])
    while length > 1:
        length //= 2
        table = table[:, :length] + table[:, length:]
    return table[:, 0]
