"""``NativeKernels``: the kernels of sharing in native code, behind the protocol's interface and with its bits.

The stream cipher stays with the host (``cryptography``'s AES is about as fast as code of our own would be), and so do
two rare ways, which are left to numpy: an expanded word that is no element, and codes whose norm rounding pushed beyond
the bound.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from client_sdk.native.build import SHARING
from client_sdk.native.sharing_library import OK, address_of, addresses_of, check, load_library
from client_sdk.protocol.clipping import plan_clip
from client_sdk.protocol.errors import RuntimeUnavailable, ShapeMismatch
from client_sdk.protocol.field import FIELDS, Field, FieldVector, RandomBytes, slices
from client_sdk.protocol.mersenne import BLOCK
from client_sdk.protocol.mersenne.words import key_stream
from client_sdk.protocol.privacy import EncodedBounds, encode_clipped
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.shamir import (
    NUMPY_KERNELS,
    NumpyKernels,
    Scheme,
    SeededShares,
    SharingKernels,
    Weights,
    draw_seeds,
)

_CODES: Final = {field.name: code for code, field in enumerate(FIELDS)}

_log = logging.getLogger("pocketfed.sharing")

_Int64Array = npt.NDArray[np.int64]


class UpdateKernels(SharingKernels, Protocol):
    """``SharingKernels`` that also do what precedes them on a device. Every implementation gives the same bits."""

    def encode_clipped(self, vector: Float32Array, bounds: EncodedBounds) -> _Int64Array:
        """``client_sdk.protocol.privacy.encode_clipped``."""
        ...

    def split_update(
        self, update: Float32Array, bounds: EncodedBounds, tail: FieldVector, seeds: Sequence[bytes], scheme: Scheme
    ) -> list[FieldVector]:
        """``split_seeded`` of the update's codes and, after them, the elements of ``tail``."""
        ...


class PlainKernels(NumpyKernels):
    """``UpdateKernels`` in plain numpy."""

    def encode_clipped(self, vector: Float32Array, bounds: EncodedBounds) -> _Int64Array:
        """See ``UpdateKernels``."""
        return encode_clipped(vector, bounds)

    def split_update(
        self, update: Float32Array, bounds: EncodedBounds, tail: FieldVector, seeds: Sequence[bytes], scheme: Scheme
    ) -> list[FieldVector]:
        """See ``UpdateKernels``."""
        codes = self.encode_clipped(update, bounds).reshape(-1)
        return self.split_seeded(np.concatenate([self.encode_signed(codes, scheme.field), tail]), seeds, scheme)


class NativeKernels:
    """``UpdateKernels`` over the library. Shared freely.

    Args:
        lib: From ``load_library``.
    """

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib

    @property
    def variant(self) -> str:
        """The instruction set that the kernels were chosen for."""
        return str(self._lib.pfs_variant().decode())

    # --- the protocol's operations -------------------------------------------------------------------------------

    def expand_into(self, seed: bytes, out: FieldVector, field: Field) -> None:
        """See ``SharingKernels``."""
        fill = key_stream(seed)
        status = OK
        for part in slices(len(out)):
            piece = out[part]
            fill(piece.reshape(-1).view(np.uint8).data)
            status |= self._lib.pfs_mask(_CODES[field.name], address_of(piece), len(piece), address_of(piece))
        if status != OK:
            NUMPY_KERNELS.expand_into(seed, out, field)

    def split_seeded(self, secret: FieldVector, seeds: Sequence[bytes], scheme: Scheme) -> list[FieldVector]:
        """See ``SharingKernels``."""
        split = _Split(self._lib, scheme, scheme.share_length(len(secret)))
        padded = _padded(secret, scheme)
        for start, words in split.drawn(seeds):
            split.run(padded, 0, start, words)
        return split.outputs if split.ok else NUMPY_KERNELS.split_seeded(secret, seeds, scheme)

    def weighted_accumulate(self, total: FieldVector, share: FieldVector, weight: int, field: Field) -> None:
        """See ``SharingKernels``.

        Raises:
            MalformedShare: The share is not canonical; what ``total`` holds then means nothing.
        """
        code, factor = _CODES[field.name], field.from_ints([weight])
        check(self._lib.pfs_accumulate(code, address_of(share), len(total), address_of(factor), address_of(total)))

    def interpolate(self, shares: Sequence[FieldVector], weights: Weights, field: Field) -> FieldVector:
        """See ``SharingKernels``.

        Raises:
            MalformedShare: A share is not canonical.
        """
        factors = field.from_ints(weights.residues(field))
        out = field.empty(len(shares[0]))
        check(
            self._lib.pfs_interpolate(
                _CODES[field.name], len(shares), addresses_of(shares), address_of(factors), len(out), address_of(out)
            )
        )
        return out

    def encode_signed(self, codes: _Int64Array, field: Field) -> FieldVector:
        """See ``SharingKernels``."""
        if codes.dtype != np.int64 or codes.ndim != 1:
            raise ShapeMismatch(f"integers to be shared are an int64 vector, not {codes.dtype} {list(codes.shape)}")
        codes = np.ascontiguousarray(codes)
        out = field.empty(len(codes))
        check(self._lib.pfs_lift(_CODES[field.name], address_of(codes), len(codes), address_of(out)))
        return out

    def decode_signed(self, vector: FieldVector, field: Field) -> _Int64Array:
        """See ``SharingKernels``."""
        codes = np.empty(len(vector), np.int64)
        vector = np.ascontiguousarray(vector)
        check(self._lib.pfs_lower(_CODES[field.name], address_of(vector), len(codes), address_of(codes)))
        return codes

    # --- a device's whole way ------------------------------------------------------------------------------------

    def encode_clipped(self, vector: Float32Array, bounds: EncodedBounds) -> _Int64Array:
        """See ``UpdateKernels``."""
        encode = _Encode.of(vector, bounds)
        if encode is None:
            return encode_clipped(vector, bounds)
        codes = encode.run(self._lib, np.ascontiguousarray(vector))
        return codes if encode.within(bounds) else encode_clipped(vector, bounds)

    def split_update(
        self, update: Float32Array, bounds: EncodedBounds, tail: FieldVector, seeds: Sequence[bytes], scheme: Scheme
    ) -> list[FieldVector]:
        """See ``UpdateKernels``; in one pass, a block in the cache after the other."""
        outputs = self._split_update(update, bounds, tail, seeds, scheme)
        if outputs is not None:
            return outputs
        codes = encode_clipped(update, bounds).reshape(-1)
        return self.split_seeded(np.concatenate([self.encode_signed(codes, scheme.field), tail]), seeds, scheme)

    def _split_update(
        self, update: Float32Array, bounds: EncodedBounds, tail: FieldVector, seeds: Sequence[bytes], scheme: Scheme
    ) -> list[FieldVector] | None:
        """None where one pass does not do it: codes beyond their bound, or an expanded word that is no element."""
        encode = _Encode.of(update, bounds)
        if encode is None:
            return None
        values = np.ascontiguousarray(update).reshape(-1)
        split = _Split(self._lib, scheme, scheme.share_length(values.size + len(tail)))
        whole = values.size // scheme.packing
        # The update's last coordinates, if they do not fill an element, are packed together with the tail.
        last = encode.run(self._lib, values[whole * scheme.packing :])
        if (np.abs(last) > scheme.field.signed_limit).any():
            return None
        ends = _padded(np.concatenate([self.encode_signed(last, scheme.field), tail]), scheme)
        for start, words in split.drawn(seeds):
            split.run_encoding(values, whole, start, words, encode)
            split.run(ends, whole, start, words)
        return split.outputs if split.ok and encode.within(bounds) else None


class _Encode:
    """How an update is clipped and rounded at the first attempt, and the norm of what came out.

    ``EncodedBounds`` keeps clip norms from 2**-40, where clipping a float32 vector rounds to nearest, as the kernel
    does, to 2**60, where codes are within the kernel's range.
    """

    def __init__(self, factor: float, scale: float) -> None:
        self.factor = factor
        self.scale = scale
        self.norm_squared = np.zeros(3, np.uint64)

    @classmethod
    def of(cls, vector: Float32Array, bounds: EncodedBounds) -> _Encode | None:
        """None for another dtype, which is refused elsewhere."""
        if vector.dtype != np.float32:
            return None
        return cls(plan_clip(vector, bounds.clip_norm).factor, 1 / bounds.step)

    def run(self, lib: ctypes.CDLL, values: Float32Array) -> _Int64Array:
        """The codes of contiguous values."""
        codes = np.empty(values.shape, np.int64)
        data, norm = address_of(values), address_of(self.norm_squared)
        check(lib.pfs_encode(data, values.size, self.factor, self.scale, address_of(codes), norm))
        return codes

    def within(self, bounds: EncodedBounds) -> bool:
        """Whether the codes' norm is at most B."""
        return int.from_bytes(self.norm_squared.tobytes(), "little") <= bounds.norm_bound**2


class _Split:
    """One splitting: the outputs, and whether every expanded word was an element.

    Args:
        lib: The library.
        scheme: How.
        length: Elements of a share.
    """

    def __init__(self, lib: ctypes.CDLL, scheme: Scheme, length: int) -> None:
        self._lib = lib
        self._scheme = scheme
        self._length = length
        self.outputs = [scheme.field.empty(length, room=True) for _ in range(scheme.num_shares - scheme.threshold + 1)]
        self.ok = True

    def drawn(self, seeds: Sequence[bytes]) -> Iterator[tuple[int, list[FieldVector]]]:
        """Where a piece begins, and the random words for it, one vector for each seed; written over by the next."""
        fills = [key_stream(seed) for seed in seeds]
        buffers = [self._scheme.field.empty(min(BLOCK, self._length)) for _ in seeds]
        for part in slices(self._length):
            pieces = [buffer[: part.stop - part.start] for buffer in buffers]
            for fill, piece in zip(fills, pieces, strict=True):
                fill(piece.reshape(-1).view(np.uint8).data)
            yield part.start, pieces

    def run(self, secret: FieldVector, origin: int, start: int, words: list[FieldVector]) -> None:
        """Split what the piece has of a secret whose first element belongs at ``origin`` of the shares."""
        first, stop = max(start, origin), start + len(words[0])
        if first >= stop:
            return
        packing = self._scheme.packing
        status = self._lib.pfs_split(
            _CODES[self._scheme.field.name],
            packing,
            address_of(secret, (first - origin) * packing),
            *self._shares(words, first - start, first),
            stop - first,
        )
        self.ok &= status == OK

    def run_encoding(
        self, values: Float32Array, count: int, start: int, words: list[FieldVector], encode: _Encode
    ) -> None:
        """Encode and split what the piece has of the first ``count`` elements of the shares."""
        stop = min(start + len(words[0]), count)
        if start >= stop:
            return
        packing = self._scheme.packing
        status = self._lib.pfs_encode_split(
            _CODES[self._scheme.field.name],
            packing,
            address_of(values, start * packing),
            encode.factor,
            encode.scale,
            *self._shares(words, 0, start),
            stop - start,
            address_of(encode.norm_squared),
        )
        self.ok &= status == OK

    def _shares(self, words: list[FieldVector], in_piece: int, in_shares: int) -> tuple[Any, ...]:
        return len(words), addresses_of(words, in_piece), len(self.outputs), addresses_of(self.outputs, in_shares)


def share_update(
    update: Float32Array,
    bounds: EncodedBounds,
    tail: FieldVector,
    scheme: Scheme,
    *,
    random: RandomBytes = os.urandom,
    kernels: UpdateKernels | None = None,
) -> SeededShares:
    """Clip, encode and split an update: the seeded shares of ``[codes of the update | tail]``.

    Args:
        update: float32, any shape.
        bounds: Clip norm and grid; see ``encode_clipped``.
        tail: Canonical elements that follow the codes.
        scheme: How.
        random: Source of the seeds; anything but a CSPRNG gives the update away.
        kernels: What computes; ``load_kernels()`` by default. All of them make the same shares.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        ShapeMismatch: The update is not float32, or the tail not a vector of the field.
        MalformedShare: An element of the tail is not canonical.
        ConfigurationError: The source gave no seeds, or the same one twice.
    """
    scheme.field.require(tail)
    seeds = draw_seeds(scheme, random)
    vectors = (kernels or load_kernels()).split_update(update, bounds, tail, seeds, scheme)
    return SeededShares(seeds, tuple(vectors))


@functools.cache
def load_kernels() -> UpdateKernels:
    """The fastest kernels that run here: native ones, built on first use, or else numpy's. Decided once per process."""
    try:
        return NativeKernels(load_library(SHARING.ensure_built()))
    except RuntimeUnavailable as e:
        _log.warning("updates are split into shares with numpy, which gives the same shares and takes longer: %s", e)
        return PlainKernels()


def _padded(secret: FieldVector, scheme: Scheme) -> FieldVector:
    """Contiguous, with zeros up to a whole element of a share."""
    missing = -len(secret) % scheme.packing
    if missing:
        return np.concatenate([secret, scheme.field.zeros(missing)])
    return np.ascontiguousarray(secret)
