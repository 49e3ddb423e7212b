"""Exact samples of the discrete Gaussian N_Z(0, sigma^2), ``P(z) ~ exp(-z**2 / (2 sigma^2))`` over all integers z.

Floating-point samplers do not have the distribution that a privacy proof speaks of, and what they do have can be told
from their low bits [Mironov 2012]. Here every decision compares integers: the distribution is exactly the stated one,
as long as the random words are uniform.

How, with variance v and width K = floor(sigma / 8), at least 1 [Karney 2016; Canonne, Kamath and Steinke 2020]:

1. A magnitude is z = K k + y with y < K. Draw k with probability ~ ``exp(-(K k)**2 / (2 v))``, from a table, and y
   uniformly.
2. Accept with probability ``exp(-y (y + 2 K k) / (2 v))``: then z has the right weight. About 95 % are accepted.
3. Draw a sign; reject -0.

Step 1 compares 64 random bits with thresholds whose first 64 bits are certain; where they are equal, more bits of both
are computed until they differ. Step 2 is von Neumann's series: trials of probability ``g / 1, g / 2, ...`` until one
fails, accept if that was an odd one. ``g = y / K * (y + 2 K k) / M`` with M = 2 v / K, so that a trial is three
comparisons: a uniform integer below K with y, a uniform real below M (its whole part suffices) with y + 2 K k, and a
uniform integer below i with 0.

How long it takes depends on the values drawn before acceptance, hardly on those returned; nothing here claims constant
time.
"""

from __future__ import annotations

import decimal
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from client_sdk.protocol.errors import ConfigurationError

LARGEST_VARIANCE = 2**112
"""Beyond it, samples (some 12 standard deviations at most) and what they are made of would not fit int64."""

_CHUNK = 2**15
"""Samples drawn at once: their words and intermediate values stay in the second cache level."""

_ALL = 2**64

Indices = npt.NDArray[np.intp]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


def sample(n: int, variance: Fraction | int, random: Callable[[int], bytes] = os.urandom) -> Int64Array:
    """Independent samples of N_Z(0, variance).

    Args:
        n: How many, from 0.
        variance: sigma^2 in integer units, a positive rational number up to 2**112. (The variance of what is drawn
            differs from it by less than 1e-30 from sigma = 3 on; below 1 it is smaller.)
        random: Asked once, for 32 bytes, which AES-256 in counter mode expands. For anything but tests it must be the
            operating system's source, or one as good.

    Returns:
        int64[n].

    Raises:
        ConfigurationError: A negative number of samples, or a variance that is not such a number.

    Example:
        >>> int(sample(3, Fraction(1, 1000)).sum())
        0
    """
    if n < 0:
        raise ConfigurationError(f"{n} samples were asked for")
    # A float's value is rarely the one that was meant: whoever has one says so by making a fraction of it.
    if isinstance(variance, bool) or not isinstance(variance, int | Fraction) or not 0 < variance <= LARGEST_VARIANCE:
        raise ConfigurationError(
            f"the variance of noise is an integer or a fraction, positive and at most 2**112, got {variance!r}"
        )
    words = _Words(random)
    law = _Law.of(Fraction(variance))
    found = np.empty(n, np.int64)
    done = 0
    while done < n:
        some = law.draw(min(_CHUNK, 2 * (n - done) + 16), words)[: n - done]
        found[done : done + some.size] = some
        done += some.size
    return found


class _Words:
    """Uniform 64-bit words: AES-256 in counter mode, under a key that is drawn once."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._stream = Cipher(algorithms.AES256(random(32)), modes.CTR(bytes(16))).encryptor()

    def draw(self, n: int) -> UInt64Array:
        """uint64[n]."""
        return np.frombuffer(self._stream.update(bytes(8 * n)), "<u8")

    def bits(self, n: int) -> npt.NDArray[np.bool_]:
        """bool[n]."""
        return np.unpackbits(self.draw(-(-n // 64)).view(np.uint8), count=n).view(np.bool_)

    def below(self, bound: int, n: int) -> Int64Array:
        """Uniform integers from 0 to ``bound - 1``, bound at most 2**62: int64[n]."""
        words = self.draw(n)
        if biased := _ALL % bound:
            # The last, incomplete stretch of multiples of the bound is drawn again.
            while (beyond := np.flatnonzero(words >= _ALL - biased)).size:
                words = words.copy()
                words[beyond] = self.draw(beyond.size)
        return (words - words // np.uint64(bound) * np.uint64(bound)).view(np.int64)

    def integer_below(self, bound: int) -> int:
        """One uniform integer from 0 to ``bound - 1``, of any size."""
        size = -(-bound.bit_length() // 64)
        while True:
            found = int.from_bytes(self.draw(size).tobytes(), "little") >> (64 * size - bound.bit_length())
            if found < bound:
                return found

    def happens(self, probability: Fraction) -> bool:
        """One trial."""
        return self.integer_below(probability.denominator) < probability.numerator


@dataclass(frozen=True)
class _Law:
    """What is computed once for a variance.

    Attributes:
        variance: v.
        width: K.
        thresholds: ``floor(2**64 * P(k <= j))`` for j = 0, 1, ...: uint64, up to the first one that is 2**64 - 1.
    """

    variance: Fraction
    width: int
    thresholds: UInt64Array

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, variance: Fraction) -> _Law:
        """The law of a variance; a few milliseconds, for the first time."""
        width = max(1, math.isqrt(math.floor(variance)) // 8)
        digits = 40
        while True:
            cumulative, error = _cumulative(variance, width, digits)
            lowest = [math.floor((f - error) * _ALL) for f in cumulative]
            highest = [math.floor((f + error) * _ALL) for f in cumulative]
            last = next((i for i, (a, b) in enumerate(zip(lowest, highest, strict=True)) if a != b), len(lowest))
            if _ALL - 1 in lowest[:last]:
                certain = lowest[: lowest.index(_ALL - 1) + 1]
                return cls(variance, width, np.array(certain, np.uint64))
            digits *= 2

    def draw(self, n: int, words: _Words) -> Int64Array:
        """Makes n proposals; returns those that are accepted."""
        bucket = self._buckets(n, words)
        rest = words.below(self.width, n) if self.width > 1 else np.zeros(n, np.int64)
        kept = self._accepts(rest, rest + 2 * self.width * bucket, words)
        magnitude = self.width * bucket + rest
        negative = words.bits(n)
        kept &= ~negative | (magnitude != 0)
        return np.where(negative, -magnitude, magnitude)[kept]

    def _buckets(self, n: int, words: _Words) -> Int64Array:
        drawn = words.draw(n)
        bucket = np.searchsorted(self.thresholds, drawn, side="right")
        # Equal to a threshold's first 64 bits: once in 2**57 words.
        for i in np.flatnonzero(self.thresholds[np.maximum(bucket, 1) - 1] == drawn).tolist():
            bucket[i] = self.resolve(int(drawn[i]), words)
        return bucket.astype(np.int64, copy=False)

    def resolve(self, word: int, words: _Words) -> int:
        """The bucket of a uniform real in [0, 1) whose first 64 bits are known; further ones are drawn as needed."""
        size = 64
        while True:
            word, size = word << 64 | int(words.draw(1)[0]), size + 64
            cumulative, error = _cumulative(self.variance, self.width, 20 + size // 3)
            for bucket, f in enumerate(cumulative):
                if Fraction(word + 1, 2**size) <= f - error:
                    return bucket
                if Fraction(word, 2**size) < f + error:
                    break

    def _accepts(self, rest: Int64Array, reach: Int64Array, words: _Words) -> npt.NDArray[np.bool_]:
        """bool[n]: accepted with probability ``exp(-rest * reach / (2 v))``."""
        accepted = np.ones(rest.size, np.bool_)
        limit = 2 * self.variance / self.width
        rare = np.flatnonzero((reach > math.floor(limit)) & (rest > 0))  # beyond 8 sigma
        for i in rare.tolist():
            accepted[i] = _survives(Fraction(int(rest[i]) * int(reach[i])) / (2 * self.variance), words)
        live = np.flatnonzero(rest)
        live = np.setdiff1d(live, rare, assume_unique=True) if rare.size else live
        trial = 1
        while live.size:
            live = live[words.below(self.width, live.size) < rest[live]]
            live = live[self._whole_part_below(limit, live.size, words) < reach[live]]
            if trial > 1:
                live = live[words.below(trial, live.size) == 0]
            accepted[live] = trial % 2 == 0
            trial += 1
        return accepted

    @staticmethod
    def _whole_part_below(limit: Fraction, n: int, words: _Words) -> Int64Array:
        """Whole parts of uniform reals in [0, limit): int64[n]."""
        whole, part = math.floor(limit), limit % 1
        found = words.below(whole + (part > 0), n)
        for i in np.flatnonzero(found == whole).tolist():
            while found[i] == whole and not words.happens(part):
                found[i] = words.below(whole + 1, 1)[0]
        return found


def _survives(exponent: Fraction, words: _Words) -> bool:
    """True with probability ``exp(-exponent)``, whatever its size [Canonne, Kamath and Steinke 2020, algorithm 1]."""
    whole, part = divmod(exponent, 1)
    return all(_series(Fraction(1), words) for _ in range(whole)) and _series(part, words)


def _series(exponent: Fraction, words: _Words) -> bool:
    trial = 1
    while words.happens(exponent / trial):
        trial += 1
    return trial % 2 == 1


def _cumulative(variance: Fraction, width: int, digits: int) -> tuple[list[Fraction], Fraction]:
    """``P(k <= j)`` for j = 0, 1, ... until it is 1 to all digits, and a bound on the error of each.

    Decimal division and ``exp`` are correctly rounded. An exponent is below 3 ``digits``, so that a weight's relative
    error is below ``3 digits * 10**(1 - digits)``; up to a thousand weights are added, each at most 1, and what is left
    out is below twice the first weight that is (the next are less than half of the ones before).
    """
    sums: list[Fraction] = []
    total = Fraction(0)
    with decimal.localcontext(decimal.Context(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)):
        smallest = decimal.Decimal(10) ** -digits
        denominator = decimal.Decimal(2 * variance.numerator)
        while True:
            square = decimal.Decimal((len(sums) * width) ** 2 * variance.denominator)
            weight = (-square / denominator).exp()
            if weight < smallest:
                break
            total += Fraction(weight)
            sums.append(total)
    return [s / total for s in sums], Fraction(10) ** (7 - digits)
