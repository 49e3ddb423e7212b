"""Random words as elements of a Mersenne field, and which words are elements at all.

A word of a field of b bits has, masked to them, 2^b values, of which one is no element: all ones, the modulus itself.
``top`` is the mask of an element's last limb.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from client_sdk.protocol.errors import ShapeMismatch
from client_sdk.protocol.mersenne.blocks import BLOCK, FieldVector

SEED_BYTES: Final = 32
"""Of a vector that is expanded from a seed."""

FillBytes = Callable[[memoryview], None]
"""Fills a buffer with the next bytes of a stream."""

_COUNTER: Final = bytes(16)
_ZEROS: Final = memoryview(bytes(16 * BLOCK))
_ONES: Final = np.uint64(2**64 - 1)


def key_stream(seed: bytes) -> FillBytes:
    """The key stream of AES-256 in counter mode under a seed, from counter 0; a block of elements at a time.

    Raises:
        ShapeMismatch: The seed has not 32 bytes.
    """
    if len(seed) != SEED_BYTES:
        raise ShapeMismatch(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    encryptor = Cipher(algorithms.AES256(seed), modes.CTR(_COUNTER)).encryptor()

    def fill(buffer: memoryview) -> None:
        encryptor.update_into(_ZEROS[: buffer.nbytes], buffer)

    return fill


def draw(out: FieldVector, top: int, fill: FillBytes) -> None:
    """Fill a contiguous vector with a stream's next words, little-endian and masked; what is no element is left out.

    Raises:
        ShapeMismatch: The vector is not contiguous, so that a stream cannot be written to it.
    """
    if not out.flags.c_contiguous:
        raise ShapeMismatch("random words are drawn into a contiguous vector only")
    done = 0
    while done < len(out):
        piece = out[done : done + BLOCK]
        fill(piece.reshape(-1).view(np.uint8).data)
        if sys.byteorder == "big":
            piece.byteswap(inplace=True)
        last = piece if piece.ndim == 1 else piece[:, -1]
        last &= np.uint64(top)
        if is_canonical(piece, top):
            done += len(piece)
        else:  # Once in 2^61 words, or more: what is left out is in no share.
            kept = piece[~_all_ones(piece, top)]
            piece[: len(kept)] = kept
            done += len(kept)


def is_canonical(words: FieldVector, top: int) -> bool:
    """Whether all words are elements: below the modulus."""
    if not len(words):
        return True
    last = words if words.ndim == 1 else words[:, -1]
    largest = int(last.max())
    return largest < top or (largest == top and not bool(_all_ones(words, top).any()))


def _all_ones(words: FieldVector, top: int) -> npt.NDArray[np.bool_]:
    if words.ndim == 1:
        return np.equal(words, np.uint64(top))
    return np.logical_and(np.equal(words[:, 0], _ONES), np.equal(words[:, 1], np.uint64(top)))
