"""Every implementation of the sharing kernels gives the bits that plain integers give."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.protocol.errors import UpdateOutOfRange
from client_sdk.protocol.field import FIELDS, Field
from client_sdk.protocol.mersenne import BLOCK
from client_sdk.protocol.shamir import NumpyKernels, Scheme, SharingKernels, Weights, lagrange_weights
from tests import sharing_oracle as oracle

KERNELS = [NumpyKernels()]

every_kernel = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: type(kernels).__name__)
every_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
SIZES = [0, 1, 9, BLOCK + 3]
SEEDS = [bytes([i]) * 32 for i in range(1, 10)]


def awkward(field: Field, size: int, seed: int) -> list[int]:
    """Elements of which the first are at the edges."""
    edges = [0, field.modulus - 1, 1, field.modulus // 2, field.modulus // 2 + 1, 2**32 - 1, 2**60]
    return [*edges[:size], *oracle.expand(field.name, bytes([seed]) * 32, max(0, size - len(edges)))]


@every_kernel
@every_field
@pytest.mark.parametrize("size", SIZES)
def test_a_seed_is_expanded(kernels: SharingKernels, field: Field, size: int):
    out = field.zeros(size)
    kernels.expand_into(SEEDS[0], out, field)
    assert field.to_ints(out) == oracle.expand(field.name, SEEDS[0], size)


@every_kernel
@every_field
@pytest.mark.parametrize(
    ("threshold", "num_shares", "packing"),
    [(3, 5, 1), (3, 5, 2), (2, 2, 1), (2, 3, 2), (5, 9, 1), (4, 12, 2), (10, 20, 1)],
)
def test_a_secret_is_split(kernels: SharingKernels, field: Field, threshold: int, num_shares: int, packing: int):
    scheme = Scheme(threshold, num_shares, field, packing)
    seeds = SEEDS[: threshold - 1]
    for size in (0, 1, 12, 13):
        secret = awkward(field, size, 77)
        drawn = [oracle.expand(field.name, seed, scheme.share_length(size)) for seed in seeds]
        expected = oracle.split(field.name, secret, drawn, num_shares, packing)
        found = kernels.split_seeded(field.from_ints(secret), seeds, scheme)
        assert [field.to_ints(vector) for vector in found] == expected[threshold - 1 :]


@every_kernel
@every_field
@pytest.mark.parametrize("packing", [1, 2])
def test_a_long_secret_is_split_without_a_seam(kernels: SharingKernels, field: Field, packing: int):
    scheme, size = Scheme(field=field, packing=packing), packing * (BLOCK + 3) - packing + 1
    secret = field.expand(b"s" * 32, size)
    found = kernels.split_seeded(secret, SEEDS[:2], scheme)
    length = scheme.share_length(size)
    drawn = [field.expand(seed, length) for seed in SEEDS[:2]]
    for part in (slice(0, 3), slice(BLOCK - 2, length)):
        coordinates = field.to_ints(secret[packing * part.start : packing * part.stop])
        expected = oracle.split(field.name, coordinates, [field.to_ints(r[part]) for r in drawn], 5, packing)
        assert [field.to_ints(vector[part]) for vector in found] == expected[2:]


@every_kernel
@every_field
@pytest.mark.parametrize("size", SIZES)
def test_a_weighted_share_is_added_in_place(kernels: SharingKernels, field: Field, size: int):
    total, share = awkward(field, size, 1), awkward(field, size, 2)[::-1]
    sums, ours = field.from_ints(total), field.from_ints(share)
    for weight in (1, 2, 255, 256 * 1000, 2**30 - 1, 2**30, 2**45, 0, -1, -(2**31), field.modulus - 1):
        kernels.weighted_accumulate(sums, ours, weight, field)
        total = [(a + weight * b) % field.modulus for a, b in zip(total, share, strict=True)]
        assert field.to_ints(sums) == total
    assert field.to_ints(ours) == share


@every_kernel
@every_field
@pytest.mark.parametrize(
    "weights",
    [
        lagrange_weights((1, 2, 3), 0),
        lagrange_weights((1, 3, 5), 0),
        lagrange_weights((2, 4, 5), -1),
        lagrange_weights((1, 2, 3, 4, 5), 0),
        lagrange_weights((3, 5, 8, 11, 12, 17, 18, 19, 20), -1),
        Weights((-4, 4)),
        Weights((7, -1)),
        Weights((8, -1)),
        Weights((-(2**29), 2**29 - 1)),
        Weights((2**29, 2**29, 1), 3),
        Weights((0, 0)),
        Weights((1 - 2**30,)),
        Weights((2**30 - 1,)),
        Weights((-1, 2**29, -1)),
    ],
    ids=str,
)
def test_shares_are_combined(kernels: SharingKernels, field: Field, weights: Weights):
    p, inverse = field.modulus, pow(weights.denominator, -1, field.modulus)
    for size in (0, 1, 12):
        vectors = [awkward(field, size, i)[:: 1 if i % 2 else -1] for i in range(len(weights.numerators))]
        expected = [
            sum(n * x for n, x in zip(weights.numerators, values, strict=True)) * inverse % p
            for values in zip(*vectors, strict=True)
        ]
        found = kernels.interpolate([field.from_ints(vector) for vector in vectors], weights, field)
        assert field.to_ints(found) == expected


@every_kernel
@every_field
@pytest.mark.parametrize("size", SIZES)
def test_integers_go_in_and_out(kernels: SharingKernels, field: Field, size: int):
    limit = field.signed_limit
    signed = [0, 1, -1, limit, -limit, 2**31, -(2**32)] * (size // 7 + 1)
    codes = np.array(signed[:size], np.int64)
    vector = kernels.encode_signed(codes, field)
    assert field.to_ints(vector) == [code % field.modulus for code in signed[:size]]
    assert kernels.decode_signed(vector, field).tolist() == signed[:size]
    with pytest.raises(UpdateOutOfRange):
        kernels.encode_signed(np.append(codes, limit + 1), field)
    with pytest.raises(UpdateOutOfRange):
        kernels.encode_signed(np.append(-codes, -(2**63)), field)
