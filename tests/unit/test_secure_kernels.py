"""The server's compiled sharing kernels: the bits of numpy and of plain integers, wherever a share lies."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client_sdk.protocol.field
from client_sdk.protocol.errors import MalformedShare, ShapeMismatch
from client_sdk.protocol.field import FIELDS, MERSENNE_61, MERSENNE_127, Field, key_stream
from client_sdk.protocol.mersenne import BLOCK
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, lagrange_weights, reconstruct, share_seeded
from server_ref.secure import compiled
from server_ref.secure.compiled import CompiledKernels
from server_ref.secure.kernels import SMALL_WEIGHT

KERNELS = CompiledKernels()
WEIGHTS = [0, 1, 2, 256, SMALL_WEIGHT - 1, SMALL_WEIGHT, 2**40 - 1, -1, -255, 2**61 - 1, 2**127 + 5]

every_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
relaxed = settings(deadline=None, max_examples=60)


def elements(field: Field) -> st.SearchStrategy[int]:
    p = field.modulus
    near = {2**k + d for k in (0, 29, 31, 32, 43, 60, 61, 63, 64, 86, 126) for d in (-1, 0, 1)}
    return st.sampled_from(sorted(e % p for e in near | {-e for e in near})) | st.integers(0, p - 1)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Field, list[list[int]]]:
    """Three vectors of one field."""
    field = draw(st.sampled_from(FIELDS))
    rows = draw(st.lists(st.tuples(*[elements(field)] * 3), max_size=30))
    return field, [[row[i] for row in rows] for i in range(3)]


@relaxed
@given(columns(), st.sampled_from(WEIGHTS) | st.integers(-(2**128), 2**128))
def test_sums_are_those_of_integers_modulo_p(case, weight: int):
    field, (ours, theirs, _) = case
    total = field.from_ints(ours)
    KERNELS.weighted_accumulate(total, field.from_ints(theirs), weight, field)
    assert field.to_ints(total) == [(a + weight * b) % field.modulus for a, b in zip(ours, theirs, strict=True)]


@relaxed
@given(columns(), st.sampled_from([(1, 2, 3), (1, 3, 5), (2, 5, 9), (4, 7, 200)]))
def test_combinations_and_inner_products_are_those_of_integers_modulo_p(case, points: tuple[int, ...]):
    field, vectors = case
    weights = lagrange_weights(points, 0)
    p, shares = field.modulus, [field.from_ints(vector) for vector in vectors]
    inverse = pow(weights.denominator, -1, p)
    expected = [
        sum(n * v for n, v in zip(weights.numerators, row, strict=True)) * inverse % p
        for row in zip(*vectors, strict=True)
    ]
    assert field.to_ints(KERNELS.interpolate(shares, weights, field)) == expected
    products = [a * b for a, b in zip(vectors[0], vectors[1], strict=True)]
    assert KERNELS.inner(shares[0], shares[1], field) == sum(products) % p


@every_field
@pytest.mark.parametrize("size", [0, 1, 511, 513, BLOCK + 3])
@pytest.mark.parametrize("weight", [1, 1000, 2**40 - 1])
def test_long_vectors_are_those_of_numpy(field: Field, size: int, weight: int):
    total, share = field.random(size, os.urandom), field.random(size, os.urandom)
    expected = total.copy()
    NUMPY_KERNELS.weighted_accumulate(expected, share, weight, field)
    for offset in (0, 1, 3):  # what was received begins after a byte that says what it is
        received = bytes(offset) + field.to_bytes(share)
        ours = total.copy()
        KERNELS.accumulate_bytes(ours, memoryview(received)[offset:], weight, field)
        assert np.array_equal(ours, expected)
    seeded, plain = total.copy(), total.copy()
    KERNELS.accumulate_seed(seeded, b"s" * 32, weight, field)
    NUMPY_KERNELS.weighted_accumulate(plain, field.expand(b"s" * 32, size), weight, field)
    assert np.array_equal(seeded, plain)
    expanded = field.empty(size)
    KERNELS.expand_into(b"s" * 32, expanded, field)
    assert np.array_equal(expanded, field.expand(b"s" * 32, size))
    assert KERNELS.inner(total, share, field) == field.inner(total, share)


@every_field
@pytest.mark.parametrize("at", [0, 511, 512, 1100])
@pytest.mark.parametrize("weight", [1, 2**40 - 1, -7])
def test_a_share_that_is_not_canonical_leaves_the_sum_as_it_was(field: Field, at: int, weight: int):
    total = field.random(1101, os.urandom)
    p = field.modulus
    for element in (p, p + 1, 2 ** (64 * field.limbs - 1), 2 ** (64 * field.limbs) - 1):
        share = field.random(1101, os.urandom)
        share.reshape(1101, -1)[at] = np.frombuffer(element.to_bytes(field.element_bytes, "little"), np.uint64)
        before = total.copy()
        with pytest.raises(MalformedShare):
            KERNELS.accumulate_bytes(total, share.tobytes(), weight, field)
        with pytest.raises(MalformedShare):
            KERNELS.weighted_accumulate(total, share, weight, field)
        with pytest.raises(MalformedShare):
            KERNELS.interpolate([total, share], lagrange_weights((1, 2), 0), field)
        assert np.array_equal(total, before)


@every_field
def test_bytes_of_another_length_are_refused(field: Field):
    total = field.zeros(4)
    for count in (0, 4 * field.element_bytes - 1, 4 * field.element_bytes + 1, 5 * field.element_bytes):
        with pytest.raises(ShapeMismatch):
            KERNELS.accumulate_bytes(total, bytes(count), 1, field)
    with pytest.raises(ShapeMismatch):
        KERNELS.inner(total, field.zeros(5), field)
    assert not total.any()


@every_field
def test_integers_come_out_as_with_numpy(field: Field):
    codes = np.array([0, 1, -1, field.signed_limit, -field.signed_limit, 12345, -12345])
    elements_ = KERNELS.encode_signed(codes, field)
    assert np.array_equal(KERNELS.decode_signed(elements_, field), codes)
    assert np.array_equal(KERNELS.decode_signed(elements_[::2], field), codes[::2])


@every_field
@pytest.mark.parametrize("piece", [0, 1])
def test_an_expanded_word_that_is_no_element_is_left_out_in_order(
    field: Field, piece: int, monkeypatch: pytest.MonkeyPatch
):
    """Such a word comes once in 2^61, so it is planted in the stream."""
    bad, size = piece * BLOCK + 77, 2 * BLOCK + 9

    def planted(seed: bytes) -> object:
        fill, position = key_stream(seed), 0

        def fill_planted(buffer: memoryview) -> None:
            nonlocal position
            fill(buffer)
            words = np.frombuffer(buffer, np.uint8)
            start = bad * field.element_bytes - position
            if 0 <= start < words.size:
                words[start : start + field.element_bytes] = 255
            position += words.size

        return fill_planted

    monkeypatch.setattr(compiled, "key_stream", planted)
    monkeypatch.setattr(client_sdk.protocol.field, "key_stream", planted)
    expected = field.expand(b"s" * 32, size)
    assert not np.array_equal(expected, NUMPY_KERNELS_EXPANSIONS[field.name][:size])
    ours = field.empty(size)
    KERNELS.expand_into(b"s" * 32, ours, field)
    assert np.array_equal(ours, expected)
    total, plain = field.zeros(size), field.zeros(size)
    KERNELS.accumulate_seed(total, b"s" * 32, 3, field)
    NUMPY_KERNELS.weighted_accumulate(plain, expected, 3, field)
    assert np.array_equal(total, plain)


NUMPY_KERNELS_EXPANSIONS = {field.name: field.expand(b"s" * 32, 3 * BLOCK) for field in FIELDS}


def test_threads_share_the_kernels():
    share = MERSENNE_61.random(50_000, os.urandom)
    totals = [MERSENNE_61.zeros(len(share)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda total: KERNELS.weighted_accumulate(total, share, 3, MERSENNE_61), totals))
    expected = MERSENNE_61.scale(share, 15)
    assert all(np.array_equal(total, expected) for total in totals)


def test_a_sum_of_shares_opens_with_the_compiled_kernels():
    scheme = Scheme(field=MERSENNE_127, packing=2)
    rng = np.random.default_rng(0)
    updates, weights = rng.integers(-(2**25), 2**25, (6, 101)), [1, 7, 256, 2**30, 3, 1]
    totals = {index: scheme.field.zeros(scheme.share_length(101)) for index in scheme.indices}
    for update, weight in zip(updates, weights, strict=True):
        shares = share_seeded(scheme.field.from_signed(update), scheme, kernels=KERNELS)
        for index, seed in enumerate(shares.seeds, 1):
            KERNELS.accumulate_seed(totals[index], seed, weight, scheme.field)
        for index, vector in enumerate(shares.vectors, 1 + len(shares.seeds)):
            KERNELS.accumulate_bytes(totals[index], scheme.field.to_bytes(vector), weight, scheme.field)
    opened = reconstruct({i: totals[i] for i in (1, 2, 4, 5)}, scheme, 101, KERNELS)
    expected = (updates * np.array(weights)[:, None]).sum(axis=0)
    assert np.array_equal(KERNELS.decode_signed(opened, scheme.field), expected)


def test_the_package_compiles_nothing_until_it_is_told_to():
    code = (
        "import sys, server_ref.secure as s; assert 'numba' not in sys.modules; "
        "s.warm_up(); assert 'server_ref.secure.kernels' in sys.modules; "
        "assert s.CompiledKernels.__module__ == 'server_ref.secure.compiled'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
