"""The inner loops of sharing, behind one interface: plain numpy here, compiled elsewhere, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ShapeMismatch
from client_sdk.protocol.field import Field
from client_sdk.protocol.mersenne import BLOCK, SMALL_LIMIT, Block, FieldVector, slices
from client_sdk.protocol.packed import pack
from client_sdk.protocol.sharing_scheme import Scheme, Weights


class SharingKernels(Protocol):
    """Operations on whole vectors of a field, each in one pass. Every implementation gives the same bits.

    Data-independent, and nothing more, is what implementations are: the instructions that run and the addresses that
    they touch follow from lengths, the scheme, the field, indices and weights, all of them public. No branch and no
    index depends on a secret, a seed or a share. Three things do show: that an expanded word was left out (once in 2^61
    words, and then it is in no share), and that an integer is out of range, or an element not canonical, which ends
    the operation with an error. How long a processor or a library takes for one instruction is beyond such a claim.

    Vectors are contiguous and canonical; lengths are the caller's to check, with ``Field.require``.
    """

    def expand_into(self, seed: bytes, out: FieldVector, field: Field) -> None:
        """``Field.expand`` of the seed, into ``out``."""
        ...

    def split_seeded(self, secret: FieldVector, seeds: Sequence[bytes], scheme: Scheme) -> list[FieldVector]:
        """The n - t + 1 last shares of a secret whose first t - 1 shares are the expanded seeds."""
        ...

    def weighted_accumulate(self, total: FieldVector, share: FieldVector, weight: int, field: Field) -> None:
        """``total += weight * share``, in place, for a public integer."""
        ...

    def interpolate(self, shares: Sequence[FieldVector], weights: Weights, field: Field) -> FieldVector:
        """The shares' linear combination, a new vector."""
        ...

    def encode_signed(self, codes: npt.NDArray[np.int64], field: Field) -> FieldVector:
        """``Field.from_signed``."""
        ...

    def decode_signed(self, vector: FieldVector, field: Field) -> npt.NDArray[np.int64]:
        """``Field.to_signed``."""
        ...


class NumpyKernels:
    """``SharingKernels`` in plain numpy. Shared freely: what an operation needs, it allocates."""

    def expand_into(self, seed: bytes, out: FieldVector, field: Field) -> None:
        """See ``SharingKernels``."""
        field.expand_into(seed, out)

    def split_seeded(self, secret: FieldVector, seeds: Sequence[bytes], scheme: Scheme) -> list[FieldVector]:
        """See ``SharingKernels``."""
        field = scheme.field
        rows = pack(secret, scheme.packing, field)[::-1]
        blocks = field.arithmetic()
        expanders = [field.expander(seed) for seed in seeds]
        pieces = [field.empty(min(BLOCK, len(rows[0]))) for _ in seeds]

        def read(part: slice) -> list[Block]:
            drawn = [piece[: part.stop - part.start] for piece in pieces]
            for expander, piece in zip(expanders, drawn, strict=True):
                expander(piece)
            return [blocks.load(values) for values in (*(row[part] for row in rows), *drawn)]

        return _continued(read, len(rows[0]), len(rows) + len(seeds), scheme.num_shares - len(seeds), field)

    def weighted_accumulate(self, total: FieldVector, share: FieldVector, weight: int, field: Field) -> None:
        """See ``SharingKernels``."""
        blocks = field.arithmetic()
        multiply = field.scaling(blocks, weight)
        scaled = np.empty((field.limbs, min(BLOCK, len(total))), np.uint64)
        for part in slices(len(total)):
            term = blocks.load(share[part])
            if weight != 1:
                out = scaled[:, : term.shape[1]]
                multiply(term, out)
                term = out
            sums = blocks.place(total[part])
            blocks.add(blocks.load(total[part]), term, sums)
            blocks.store(sums, total[part])

    def interpolate(self, shares: Sequence[FieldVector], weights: Weights, field: Field) -> FieldVector:
        """See ``SharingKernels``."""
        blocks = field.arithmetic()
        small = sum(map(abs, weights.numerators)) < SMALL_LIMIT
        divide = field.scaling(blocks, pow(weights.denominator, -1, field.modulus))
        multipliers = [] if small else [field.scaling(blocks, residue) for residue in weights.residues(field)]
        out = field.empty(len(shares[0]))
        scaled = np.empty((field.limbs, min(BLOCK, len(out))), np.uint64)
        for part in slices(len(out)):
            values = [blocks.load(share[part]) for share in shares]
            total = blocks.place(out[part])
            if small:
                blocks.combine(weights.numerators, values, total)
                if weights.denominator != 1:
                    divide(total, total)
            else:
                term = scaled[:, : total.shape[1]]
                total.fill(0)
                for multiply, value in zip(multipliers, values, strict=True):
                    multiply(value, term)
                    blocks.add(total, term, total)
            blocks.store(total, out[part])
        return out

    def encode_signed(self, codes: npt.NDArray[np.int64], field: Field) -> FieldVector:
        """See ``SharingKernels``."""
        return field.from_signed(codes)

    def decode_signed(self, vector: FieldVector, field: Field) -> npt.NDArray[np.int64]:
        """See ``SharingKernels``."""
        return field.to_signed(vector)


NUMPY_KERNELS: Final = NumpyKernels()


def extrapolate(values: Sequence[FieldVector], count: int, field: Field) -> list[FieldVector]:
    """The next ``count`` values of polynomials, of least degree, that have these at consecutive integers.

    Raises:
        ShapeMismatch: Vectors of different lengths.
    """
    if any(value.shape != values[0].shape for value in values):
        raise ShapeMismatch(f"values of one polynomial differ in length: {[len(value) for value in values]}")
    blocks = field.arithmetic()
    return _continued(
        lambda part: [blocks.load(value[part]) for value in values], len(values[0]), len(values), count, field
    )


def _continued(
    read: Callable[[slice], list[Block]], size: int, known: int, count: int, field: Field
) -> list[FieldVector]:
    """``extrapolate`` of the values that ``read`` gives, a block after the other.

    By finite differences, that is by additions alone: those of order ``known - 1`` are constant.
    """
    blocks = field.arithmetic()
    out = [field.empty(size) for _ in range(count)]
    table = np.empty((known - 1, field.limbs, min(BLOCK, size)), np.uint64)
    for part in slices(size):
        values = read(part)
        # Row i becomes the difference of order known - 1 - i that ends at the last value.
        rows = table[:, :, : part.stop - part.start]
        for i, row in enumerate(rows):
            blocks.subtract(values[i + 1], values[i], row)
        for order in range(2, known):
            for i in range(known - order):
                blocks.subtract(rows[i + 1], rows[i], rows[i])
        last = values[-1]
        for target in out:
            for i in range(1, known - 1):
                blocks.add(rows[i], rows[i - 1], rows[i])
            following = blocks.place(target[part])
            blocks.add(last, rows[-1], following)
            blocks.store(following, target[part])
            last = following
    return out
