"""``CompiledKernels``: the protocol's kernels of sharing, compiled, with what a server does besides.

A share that was received is added where it lies (``accumulate_bytes``), or made of its seed and added piece by piece
(``accumulate_seed``): neither becomes a vector of its own first. Importing this module compiles the kernels, or loads
them from the cache; see ``warm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import MalformedShare, ShapeMismatch
from client_sdk.protocol.field import Field, FieldVector, slices
from client_sdk.protocol.mersenne import BLOCK
from client_sdk.protocol.mersenne.words import FillBytes, key_stream
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, Weights
from server_ref.secure.kernels import (
    SMALL_WEIGHT,
    accumulate61,
    accumulate127,
    combine61,
    combine127,
    inner61,
    inner127,
    lower61,
    mask61,
    mask127,
)


class CompiledKernels:
    """``SharingKernels``, compiled. Shared freely, also between threads."""

    def expand_into(self, seed: bytes, out: FieldVector, field: Field) -> None:
        """See ``SharingKernels``."""
        fill = key_stream(seed)
        for part in slices(len(out)):
            if not _draw(out[part], fill):
                field.expand_into(seed, out)
                return

    def split_seeded(self, secret: FieldVector, seeds: Sequence[bytes], scheme: Scheme) -> list[FieldVector]:
        """See ``SharingKernels``. A server splits its noise, once a round: numpy does it."""
        return NUMPY_KERNELS.split_seeded(secret, seeds, scheme)

    def weighted_accumulate(self, total: FieldVector, share: FieldVector, weight: int, field: Field) -> None:
        """See ``SharingKernels``.

        Raises:
            MalformedShare: The share is not canonical; ``total`` is as before.
        """
        _accumulate(total, share, weight, field)

    def interpolate(self, shares: Sequence[FieldVector], weights: Weights, field: Field) -> FieldVector:
        """See ``SharingKernels``.

        Raises:
            MalformedShare: A share is not canonical.
        """
        out = field.empty(len(shares[0]))
        addresses = np.array([_address(share) for share in shares], np.uint64)
        combine = combine61 if field.limbs == 1 else combine127
        if not combine(addresses, field.from_ints(weights.residues(field)), out):
            raise MalformedShare(f"an element is not below the modulus of {field.name}")
        return out

    def encode_signed(self, codes: npt.NDArray[np.int64], field: Field) -> FieldVector:
        """See ``SharingKernels``."""
        return field.from_signed(codes)

    def decode_signed(self, vector: FieldVector, field: Field) -> npt.NDArray[np.int64]:
        """See ``SharingKernels``."""
        if field.limbs > 1:
            return field.to_signed(vector)
        codes = np.empty(len(vector), np.int64)
        vector = np.ascontiguousarray(vector)
        lower61(_address(vector), codes)
        return codes

    # --- what a server does besides ------------------------------------------------------------------------------

    def accumulate_bytes(self, total: FieldVector, data: bytes | memoryview, weight: int, field: Field) -> None:
        """``total += weight * share``, for a share in its canonical encoding. In one pass: check, multiply, add.

        Args:
            total: Canonical, contiguous; one element for each of the share's.
            data: The encoding, at any address.
            weight: Public integer.
            field: Of both.

        Raises:
            ShapeMismatch: Another length than that of ``total``.
            MalformedShare: An element that is not canonical. In both cases ``total`` is as before.
        """
        received = np.frombuffer(data, np.uint8)
        if received.size != len(total) * field.element_bytes:
            raise ShapeMismatch(f"{received.size} bytes are not {len(total)} elements of {field.name}")
        _accumulate(total, received, weight, field)

    def accumulate_seed(self, total: FieldVector, seed: bytes, weight: int, field: Field) -> None:
        """``total += weight * share``, for a share that is the expansion of a seed.

        Raises:
            ShapeMismatch: The seed has not 32 bytes.
        """
        fill = key_stream(seed)
        piece = field.empty(min(BLOCK, len(total)))
        for part in slices(len(total)):
            words = piece[: part.stop - part.start]
            if not _draw(words, fill):
                _accumulate(total[part.start :], field.expand(seed, len(total))[part.start :], weight, field)
                return
            _accumulate(total[part], words, weight, field)

    def inner(self, left: FieldVector, right: FieldVector, field: Field) -> int:
        """``Field.inner`` of contiguous vectors.

        Raises:
            ShapeMismatch: Vectors of different lengths.
        """
        if left.shape != right.shape:
            raise ShapeMismatch(f"{len(left)} elements do not pair with {len(right)}")
        words = np.empty(2, np.uint64)
        (inner61 if field.limbs == 1 else inner127)(_address(left), _address(right), len(left), words)
        low, high = words.tolist()
        return int((low + (high << (32 if field.limbs == 1 else 64))) % field.modulus)


def _draw(out: FieldVector, fill: FillBytes) -> bool:
    """Fill a piece with random words; whether all are elements: once in 2^61 words one is not, and numpy takes over."""
    fill(out.reshape(-1).view(np.uint8).data)
    return bool(mask61(out) if out.ndim == 1 else mask127(out))


def _accumulate(total: FieldVector, share: npt.NDArray[Any], weight: int, field: Field) -> None:
    """``total += weight * share``, whose elements may be at any address; all of it or nothing."""
    factor, done = weight % field.modulus, 0
    if field.limbs == 1:
        done = accumulate61(_address(share), factor, total, len(total))
    elif factor < SMALL_WEIGHT:
        done = accumulate127(_address(share), factor, total, len(total))
    else:
        both = np.array([_address(total), _address(share)], np.uint64)
        out = field.empty(len(total))
        if combine127(both, field.from_ints([1, factor]), out):
            total[...] = out
            return
    if done < len(total):
        # Arithmetic is exact, so what was added can be taken out again, to the bit.
        added = share.reshape(-1).view(np.uint8)[: done * field.element_bytes]
        NUMPY_KERNELS.weighted_accumulate(total[:done], field.from_bytes(added.tobytes()), -factor, field)
        raise MalformedShare(f"an element is not below the modulus of {field.name}")


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
