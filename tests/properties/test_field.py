"""Vectors of a field compute what integers modulo p do; encodings are canonical; seeds expand as documented."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import (
    ConfigurationError,
    MalformedShare,
    ShapeMismatch,
    UpdateOutOfRange,
)
from client_sdk.protocol.field import FIELDS, MERSENNE_61, MERSENNE_127, Field
from client_sdk.protocol.mersenne import BLOCK, SMALL_LIMIT
from tests import sharing_oracle as oracle

relaxed = settings(deadline=None, max_examples=60)
fields = st.sampled_from(FIELDS)
every_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)


def elements(field: Field) -> st.SearchStrategy[int]:
    """Anything, and what sits at the edge of a half, a limb, the modulus, or of the integers that have a sign."""
    p = field.modulus
    edges = {2**k + d for k in (0, 16, 29, 31, 32, 60, 61, 62, 63, 64, 95, 96, 126) for d in (-1, 0, 1)}
    edges |= {p - 1, p - 2, p // 2, p // 2 + 1, *(p - edge for edge in edges)}
    return st.sampled_from(sorted({edge for edge in edges if 0 <= edge < p})) | st.integers(0, p - 1)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Field, list[int], list[int]]:
    field = draw(fields)
    both = draw(st.lists(st.tuples(elements(field), elements(field)), max_size=40))
    return field, [a for a, _ in both], [b for _, b in both]


@relaxed
@given(pairs())
def test_arithmetic_is_that_of_integers_modulo_p(case):
    field, a, b = case
    p, left, right = field.modulus, field.from_ints(a), field.from_ints(b)
    pairs_of = list(zip(a, b, strict=True))
    assert field.to_ints(field.add(left, right)) == [(x + y) % p for x, y in pairs_of]
    assert field.to_ints(field.subtract(left, right)) == [(x - y) % p for x, y in pairs_of]
    assert field.to_ints(field.multiply(left, right)) == [x * y % p for x, y in pairs_of]
    assert field.to_ints(field.negate(left)) == [-x % p for x in a]
    assert field.inner(left, right) == sum(x * y for x, y in pairs_of) % p
    assert field.sum(left) == sum(a) % p
    assert field.to_ints(left) == a, "operands are left alone"
    assert field.to_ints(right) == b, "operands are left alone"


@relaxed
@given(
    fields.flatmap(lambda field: st.tuples(st.just(field), st.lists(elements(field), max_size=20))),
    st.sampled_from([0, 1, -1, 7, 8, -8, 9, SMALL_LIMIT - 1, SMALL_LIMIT, -SMALL_LIMIT, 2**200])
    | st.integers(-(2**130), 2**130),
)
def test_scaling_takes_any_integer(case, factor):
    field, values = case
    scaled = field.scale(field.from_ints(values), factor)
    assert field.to_ints(scaled) == [value * factor % field.modulus for value in values]


@every_field
def test_long_vectors_are_computed_in_blocks_without_a_seam(field: Field):
    size = 2 * BLOCK + 5
    a, b = field.expand(b"a" * 32, size), field.expand(b"b" * 32, size)
    total, product = field.add(a, b), field.multiply(a, b)
    assert field.to_ints(total) == [(x + y) % field.modulus for x, y in zip(*map(field.to_ints, (a, b)), strict=True)]
    for part in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK), slice(2 * BLOCK, size)):
        assert field.add(a[part], b[part]).tobytes() == total[part].tobytes()
        assert field.multiply(a[part], b[part]).tobytes() == product[part].tobytes()
    assert field.inner(a, b) == field.sum(product) == sum(field.to_ints(product)) % field.modulus


@every_field
def test_sums_of_the_largest_elements_do_not_overflow(field: Field):
    size = 3 * BLOCK
    largest = field.negate(field.from_ints([1] * size))
    assert field.sum(largest) == -size % field.modulus
    assert field.inner(largest, largest) == size


# --- encodings ---------------------------------------------------------------------------------------------------


@relaxed
@given(pairs())
def test_an_encoding_is_little_endian_and_comes_back(case):
    field, values, _ = case
    data = field.to_bytes(field.from_ints(values))
    assert data == b"".join(value.to_bytes(field.element_bytes, "little") for value in values)
    decoded = field.from_bytes(data, len(values))
    assert field.to_ints(decoded) == values
    decoded[...] = 0  # a new array, which its owner may write to
    field.require(decoded, len(values))


@every_field
def test_an_element_that_is_not_below_the_modulus_is_refused(field: Field):
    zeros = bytes(3 * field.element_bytes)
    for value in (field.modulus, field.modulus + 1, 2 ** (8 * field.element_bytes) - 1):
        with pytest.raises(MalformedShare):
            field.from_bytes(zeros + value.to_bytes(field.element_bytes, "little"))
    assert field.to_ints(field.from_bytes((field.modulus - 1).to_bytes(field.element_bytes, "little"))) == [
        field.modulus - 1
    ]


def test_a_large_limb_alone_does_not_make_an_element_too_large():
    for value in (2**64 - 1, 2**127 - 2, (2**63 - 1) << 64, (2**63 - 2) << 64 | 2**64 - 1):
        assert MERSENNE_127.to_ints(MERSENNE_127.from_ints([5, value])) == [5, value]


@every_field
def test_a_length_that_does_not_fit_is_refused(field: Field):
    for length, size in ((field.element_bytes - 1, None), (field.element_bytes + 4, None), (field.element_bytes, 2)):
        with pytest.raises(ShapeMismatch):
            field.from_bytes(bytes(length), size)
    assert field.from_bytes(b"").tobytes() == b""


@every_field
def test_what_is_no_vector_of_the_field_is_refused(field: Field):
    other = MERSENNE_127 if field is MERSENNE_61 else MERSENNE_61
    for wrong in (
        other.zeros(4),
        np.zeros(field.zeros(4).shape, np.int64),
        np.zeros((2, 2, 2), np.uint64),
        np.zeros((), np.uint64),
        np.zeros((4, 3), np.uint64),
    ):
        with pytest.raises(ShapeMismatch):
            field.require(wrong)
    with pytest.raises(ShapeMismatch):
        field.require(field.zeros(4), 5)


@every_field
def test_vectors_of_different_lengths_do_not_pair(field: Field):
    for operation in (field.add, field.subtract, field.multiply, field.inner):
        with pytest.raises(ShapeMismatch):
            operation(field.zeros(3), field.zeros(4))


def test_fields_are_found_by_name_and_by_modulus():
    for field in FIELDS:
        assert Field.by_name(field.name) is field
        assert Field.by_modulus(field.modulus) is field
    assert (MERSENNE_61.modulus, MERSENNE_127.modulus) == (2**61 - 1, 2**127 - 1)
    for find, unknown in ((Field.by_name, "m31"), (Field.by_modulus, 2**31 - 1)):
        with pytest.raises(ConfigurationError):
            find(unknown)


# --- integers ----------------------------------------------------------------------------------------------------


@relaxed
@given(fields, st.lists(st.integers(-(2**60) + 1, 2**60 - 1), max_size=30))
def test_integers_come_back_with_their_sign(field, codes):
    vector = field.from_signed(np.array(codes, np.int64))
    assert field.to_ints(vector) == [code % field.modulus for code in codes]
    assert field.to_signed(vector).tolist() == codes


@every_field
def test_integers_out_of_range_are_refused_and_the_last_ones_in_range_are_not(field: Field):
    limit = field.signed_limit
    edges = np.array([limit, -limit], np.int64)
    assert field.to_signed(field.from_signed(edges)).tolist() == edges.tolist()
    for code in (limit + 1, -limit - 1, 2**63 - 1, -(2**63)):
        with pytest.raises(UpdateOutOfRange):
            field.from_signed(np.array([0, code], np.int64))


def test_an_element_that_stands_for_no_64_bit_integer_is_refused():
    limit, p = 2**62, MERSENNE_127.modulus
    fits = MERSENNE_127.from_ints([limit, p - limit, 0, p - 1])
    assert MERSENNE_127.to_signed(fits).tolist() == [limit, -limit, 0, -1]
    for value in (limit + 1, p - limit - 1, 2**63, 2**64 - 1, 2**64, p // 2, p // 2 + 1, p - 2**63 - 1, p - 2**64):
        with pytest.raises(UpdateOutOfRange):
            MERSENNE_127.to_signed(MERSENNE_127.from_ints([0, value]))


def test_only_int64_vectors_are_encoded():
    for wrong in (np.zeros(3), np.zeros(3, np.int32), np.zeros((2, 2), np.int64)):
        with pytest.raises(ShapeMismatch):
            MERSENNE_61.from_signed(wrong)


# --- random vectors ----------------------------------------------------------------------------------------------


@every_field
@pytest.mark.parametrize("size", [0, 1, 7, BLOCK + 3])
def test_a_seed_expands_as_documented(field: Field, size: int):
    seed = bytes(range(32))
    assert field.to_ints(field.expand(seed, size)) == oracle.expand(field.name, seed, size)


@every_field
def test_a_longer_vector_continues_a_shorter_one_and_pieces_continue_each_other(field: Field):
    seed, size = b"\7" * 32, 2 * BLOCK + 9
    whole = field.expand(seed, size)
    assert field.expand(seed, BLOCK + 1).tobytes() == whole[: BLOCK + 1].tobytes()
    expand, pieces = field.expander(seed), []
    for length in (1, 1000, BLOCK, size - BLOCK - 1001):
        pieces.append(field.empty(length))
        expand(pieces[-1])
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_has_32_bytes(length: int):
    with pytest.raises(ShapeMismatch):
        MERSENNE_61.expand(bytes(length), 3)


def replayed(data: bytes) -> Callable[[int], bytes]:
    """A source of exactly these bytes, then of zeros."""
    stream = iter(data)
    return lambda count: bytes(islice(stream, count)).ljust(count, b"\0")


@relaxed
@given(fields.flatmap(lambda f: st.tuples(st.just(f), st.lists(st.just(f.modulus) | elements(f), max_size=60))))
def test_words_that_are_not_below_the_modulus_are_left_out_in_order(case):
    field, words = case
    kept = [word for word in words if word != field.modulus]
    width = field.element_bytes
    # What lies above the field's bits counts for nothing.
    above = 2 ** (8 * width) - 1 - field.modulus
    data = b"".join((word | above * (i % 2)).to_bytes(width, "little") for i, word in enumerate(words))
    assert field.to_ints(field.random(len(kept), replayed(data))) == kept
    assert field.to_ints(field.random(len(kept) + 2, replayed(data))) == [*kept, 0, 0]
    assert kept == list(islice(oracle.elements(field.name, iter(data)), len(kept)))


def test_a_source_that_gives_too_few_bytes_is_refused():
    with pytest.raises(ConfigurationError):
        MERSENNE_61.random(3, lambda count: bytes(count - 1))


@every_field
def test_a_vector_with_gaps_is_not_drawn_into(field: Field):
    """What would be written is a copy, and the vector would keep what it held."""
    with pytest.raises(ShapeMismatch):
        field.expand_into(b"s" * 32, field.zeros(8)[::2])
