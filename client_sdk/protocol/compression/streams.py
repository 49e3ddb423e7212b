r"""Public randomness that both ends derive alike, for ever: word streams, and what is drawn from them.

A stream is Philox4x64-10 [Salmon et al. 2011] with the counter at 0 (its first block is that of counter 1) under the
key

    SHA-256("pocketfed/" + purpose + "\0" + seed as 8 bytes, little-endian + context)[:16]

read as two little-endian 64-bit words. Nothing else of numpy's random module is used: its distributions may change from
release to release, the words of a bit generator may not. ``tests/vectors/compression.json`` pins them.

None of this is secret or fit for secrets: whoever knows the seed knows the stream.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError

MAX_SEED: Final = 2**64 - 1

_LOW: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)


def seed_bytes(seed: int) -> bytes:
    """A seed as 8 bytes, little-endian.

    Raises:
        ConfigurationError: A seed outside 0 to 2^64 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigurationError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    return int(seed).to_bytes(8, "little")


class WordStream:
    """The 64-bit words of one purpose and seed, in order.

    Args:
        purpose: Keeps the streams of one seed apart.
        seed: 0 to 2^64 - 1.
        context: Whatever else the stream depends on.

    Raises:
        ConfigurationError: A seed outside its range.
    """

    def __init__(self, purpose: str, seed: int, context: bytes = b"") -> None:
        text = b"pocketfed/" + purpose.encode() + b"\0" + seed_bytes(seed) + context
        key = np.frombuffer(hashlib.sha256(text).digest()[:16], "<u8").astype(np.uint64)
        self._generator = np.random.Philox(key=key)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next ``count`` words."""
        words: npt.NDArray[np.uint64] = self._generator.random_raw(count)
        return words

    def halves(self, count: int) -> npt.NDArray[np.uint32]:
        """The next ``count`` 32-bit halves: of each word the low one first. An odd count drops the last high half."""
        return self.words(-(-count // 2)).astype("<u8").view("<u4")[:count]

    def bits(self, count: int) -> npt.NDArray[np.uint8]:
        """The next ``count`` bits, one a byte: of each word the lowest first. What is left of the last is dropped."""
        octets = self.words(-(-count // 64)).astype("<u8").view(np.uint8)
        return np.unpackbits(octets, count=count, bitorder="little")

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """The next ``count`` numbers below ``bound`` (at most 2^31), one a word: ``floor(word * bound / 2^64)``.

        A number's probability differs from 1/bound by less than 2^-64.
        """
        words = self.words(count)
        high, low = words >> _HALF, words & _LOW
        factor = np.uint64(bound)
        # The product has up to 95 bits; both halves of it fit.
        return ((high * factor + ((low * factor) >> _HALF)) >> _HALF).astype(np.int64)


@functools.lru_cache(maxsize=2)
def support(seed: int, size: int, count: int) -> npt.NDArray[np.int64]:
    """Coordinates that random-k sends: ``count`` of ``size``, each set of them equally likely.

    Drawn by the rule: numbers below ``size`` from the stream ``support``, one after the other, until ``count``
    different ones were seen. Where more than half are wanted, the ones to leave out are drawn instead.

    Returns:
        int64[count], ascending, read-only (kept for the next updates of the same seed).
    """
    few = min(count, size - count)
    seen = np.zeros(size, np.bool_)
    stream, missing = WordStream("support", seed), few
    while missing:
        # So many draws cannot give too many, hence no draw is taken back and the outcome is that of drawing singly.
        seen[stream.below(size, missing)] = True
        missing = few - int(np.count_nonzero(seen))
    chosen = np.flatnonzero(seen if few == count else ~seen)
    chosen.flags.writeable = False
    return chosen
