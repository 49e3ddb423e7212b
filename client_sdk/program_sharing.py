"""Splitting an update with the program's own ``share`` method: what a host does that has no native kernels.

What splits an update is chosen by ``choose_kernels``: native kernels, else the program's method, else numpy. They make
the same shares, bit for bit. What is here besides the method is the reference for hosts in other languages: draw and
expand the seeds, compute the clip factor, run the method, and compare the integer norm that comes out with its bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client_sdk.native.sharing import NativeKernels, PlainKernels, UpdateKernels, load_kernels
from client_sdk.protocol.clipping import plan_clip
from client_sdk.protocol.errors import UnknownMethod
from client_sdk.protocol.field import MERSENNE_61, FieldVector
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.program import Float32Array, Program, Role, norm_squared
from client_sdk.protocol.shamir import Scheme
from client_sdk.protocol.sharing_kernels import extrapolate


def choose_kernels(
    program: Program, scheme: Scheme, size: int, *, available: UpdateKernels | None = None
) -> UpdateKernels:
    """What splits updates on this device. All choices make the same shares, bit for bit.

    Args:
        program: The assignment's.
        scheme: How its plan splits.
        size: Coordinates that are shared.
        available: What the host has; by default ``load_kernels()``.

    Returns:
        Native kernels where there are any. Else the program's, if it has a ``share`` method for this scheme and size.
        Else numpy's.
    """
    found = available or load_kernels()
    if isinstance(found, NativeKernels):
        return found
    try:
        own = ProgramKernels(program)
    except UnknownMethod:
        return found
    return own if own.splits(scheme, size) else found


class ProgramKernels(PlainKernels):
    """``UpdateKernels`` that run the program for what it was exported for, and numpy for the rest.

    Args:
        program: Loaded; used by one thread at a time.

    Raises:
        UnknownMethod: The program has no ``share`` method.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._method = program.manifest.method(Role.SHARE)

    @property
    def scheme(self) -> Scheme:
        """What the method splits for."""
        drawn = len(self._method.inputs) - 3
        return Scheme(drawn + 1, drawn + len(self._method.outputs) - 1)

    def splits(self, scheme: Scheme, size: int) -> bool:
        """Whether the method is for this scheme and so many coordinates."""
        return scheme == self.scheme and size == self._program.manifest.num_parameters

    def split_update(
        self, update: Float32Array, bounds: EncodedBounds, tail: FieldVector, seeds: Sequence[bytes], scheme: Scheme
    ) -> list[FieldVector]:
        """See ``UpdateKernels``.

        Raises:
            UnknownMethod: The method splits for another scheme, or for a model of another size.
        """
        size = self._program.manifest.num_parameters
        if not self.splits(scheme, update.size):
            raise UnknownMethod(
                f"the program splits {size} parameters for {self.scheme}, not {update.size} for {scheme}"
            )
        if update.dtype == np.float32:
            drawn = [MERSENNE_61.expand(seed, size + len(tail)) for seed in seeds]
            # In float64, as numpy and the native kernels clip: the norm is the host's to compute.
            factor = np.array([plan_clip(update, bounds.clip_norm).factor])
            norm_limbs, *shares = self._program.run(
                self._method.name,
                np.ascontiguousarray(update).reshape(-1),
                factor,
                np.array([1 / bounds.step]),
                *(words[:size].view(np.int64) for words in drawn),
            )
            if norm_squared(norm_limbs.astype(np.int64, copy=False)) <= bounds.norm_bound**2:
                rest = extrapolate([tail, *(words[size:] for words in drawn)], len(shares), MERSENNE_61)
                return [np.concatenate([share.view(np.uint64), end]) for share, end in zip(shares, rest, strict=True)]
        # Rounding pushed the norm beyond its bound, which is rare; or the dtype is refused.
        return super().split_update(update, bounds, tail, seeds, scheme)
