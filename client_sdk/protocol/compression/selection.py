"""Which coordinates of an update are large: the k largest by magnitude, exactly, and those above a threshold.

Magnitudes are compared as the lower 31 bits of a float32, which order them like numbers. Ties go to the lowest index.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression.bits import Int64Array, UInt32Array
from client_sdk.protocol.errors import NonFiniteUpdate
from client_sdk.protocol.program import Float32Array

MAGNITUDE_BITS: Final = 31
LARGEST_MAGNITUDE: Final = 0x7F7FFFFF
"""Bits of the largest float32; infinity and NaN lie above it."""

_MASK: Final = np.uint32(0x7FFFFFFF)
_CHUNK: Final = 2**17
"""Values looked at in one go: half a megabyte stays in a core's second cache."""

_COUNT_FROM: Final = 2**14
"""Number of magnitudes from which counting them is worth its tables."""

_SAMPLE: Final = 2**16
_GUESS_FROM: Final = 4 * _SAMPLE
"""Length from which a guess costs less than it saves."""


def magnitudes_of(values: Float32Array) -> UInt32Array:
    """The lower 31 bits of each value: its magnitude, in an order-preserving form."""
    return values.view(np.uint32) & _MASK


def top_k(vector: Float32Array, count: int) -> Int64Array:
    """The ``count`` coordinates of largest magnitude, exactly; of equal ones the lowest.

    A sample gives a threshold that somewhat more than ``count`` values reach; one pass finds these, and the exact
    selection looks at them only. Where the guess misses (it may with any structure that the sample does not see, and
    does where very many values are equal) all values are looked at. The answer is the same.

    Args:
        vector: float32[d], contiguous.
        count: 0 to d.

    Returns:
        int64[count], ascending.

    Raises:
        NonFiniteUpdate: NaN or infinities (they have the largest magnitudes, so that one would be chosen).
    """
    bits = vector.view(np.uint32)
    if count == 0:
        return np.zeros(0, np.int64)
    survivors = _survivors_of_a_guess(bits, count)
    magnitudes = (bits if survivors is None else bits[survivors]) & _MASK
    if count == len(magnitudes):
        chosen = np.arange(count)
    else:
        last = _largest(magnitudes, count)
        mask = magnitudes > last
        mask[_first(magnitudes == last, count - int(np.count_nonzero(mask)))] = True
        chosen = np.flatnonzero(mask)
    if int(magnitudes[chosen].max()) > LARGEST_MAGNITUDE:
        raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(vector)))} values are NaN or infinite")
    return chosen if survivors is None else survivors[chosen]


def threshold_bits(threshold: float) -> int:
    """Magnitude bits of the smallest float32 that is not below ``threshold``, a positive float64."""
    rounded = np.float32(threshold)
    if float(rounded) < threshold:
        rounded = np.nextafter(rounded, np.float32(math.inf))
    return int(rounded.view(np.uint32))


def at_least(vector: Float32Array, threshold: float) -> Int64Array:
    """The coordinates of magnitude ``threshold`` and more, compared without rounding; int64, ascending.

    Args:
        vector: float32[d], contiguous, finite.
        threshold: Positive, at most the largest float32.
    """
    found = _at_least_bits(vector.view(np.uint32), threshold_bits(threshold), len(vector))
    if found is None:  # there cannot be more of them than values
        raise AssertionError
    return found


def _largest(magnitudes: UInt32Array, rank: int) -> np.uint32:
    """The ``rank``-th largest magnitude.

    By counting: first the upper 16 bits, then the lower 16 bits of those that share the upper ones. ``np.partition``
    is as fast where all values differ, but takes many times longer where most are equal.
    """
    if len(magnitudes) <= _COUNT_FROM:
        smallest: np.uint32 = np.partition(magnitudes, len(magnitudes) - rank)[len(magnitudes) - rank]
        return smallest
    upper, rank = _rank_in(_histogram(magnitudes, None), rank)
    lower, _ = _rank_in(_histogram(magnitudes, upper), rank)
    return np.uint32(upper << 16 | lower)


def _rank_in(counts: Int64Array, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest item, and the item's rank inside it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - int(above[place] - counts[len(counts) - 1 - place])


def _histogram(magnitudes: UInt32Array, upper: int | None) -> Int64Array:
    """Counts of the upper 16 bits, or of the lower 16 bits of the magnitudes whose upper ones are ``upper``."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(magnitudes), _CHUNK):
        chunk = magnitudes[start : start + _CHUNK]
        high = chunk >> np.uint32(16)
        halves = high if upper is None else chunk[high == upper] & np.uint32(0xFFFF)
        counts += np.bincount(halves, minlength=1 << 16)
    return counts


def _survivors_of_a_guess(bits: UInt32Array, count: int) -> Int64Array | None:
    """Coordinates among which the ``count`` largest are, ascending; None where there is no good guess."""
    n = len(bits)
    if n < _GUESS_FROM or count > n // 4:
        return None
    # An odd step, so that a layer's power-of-two width does not make the sample see one column only.
    sample = bits[:: n // _SAMPLE | 1] & _MASK
    expected = count / n * len(sample)
    # Four standard deviations on the safe side, and a few more where next to none are expected.
    rank = min(len(sample), int(expected + 4 * math.sqrt(expected)) + 8)
    guess = int(np.partition(sample, len(sample) - rank)[len(sample) - rank])
    survivors = _at_least_bits(bits, guess, 2 * count + _SAMPLE)
    return survivors if survivors is not None and len(survivors) >= count else None


def _at_least_bits(bits: UInt32Array, least: int, limit: int) -> Int64Array | None:
    """Coordinates whose magnitude bits are ``least`` and more, ascending; None if there are more than ``limit``."""
    found: list[Int64Array] = []
    total = 0
    magnitudes, mask = np.empty(min(_CHUNK, len(bits)), np.uint32), np.empty(min(_CHUNK, len(bits)), np.bool_)
    for start in range(0, len(bits), _CHUNK):
        n = min(_CHUNK, len(bits) - start)
        np.bitwise_and(bits[start : start + n], _MASK, out=magnitudes[:n])
        np.greater_equal(magnitudes[:n], np.uint32(least), out=mask[:n])
        indices = np.flatnonzero(mask[:n])
        total += len(indices)
        if total > limit:
            return None
        indices += start
        found.append(indices)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _first(mask: npt.NDArray[np.bool_], count: int) -> Int64Array:
    """The first ``count`` coordinates where the mask is set, without listing the others."""
    found: list[Int64Array] = []
    for start in range(0, len(mask), _CHUNK):
        if count == 0:
            break
        indices = np.flatnonzero(mask[start : start + _CHUNK])[:count]
        count -= len(indices)
        found.append(indices + start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)
