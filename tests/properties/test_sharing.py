"""Sharing: any needed shares open the secret and combinations of it, whatever t, n, packing and field; fewer do not."""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, NotEnoughShares, ShapeMismatch
from client_sdk.protocol.field import FIELDS, MERSENNE_61, Field, FieldVector
from client_sdk.protocol.shamir import (
    NUMPY_KERNELS,
    Scheme,
    SeededShares,
    by_index,
    lagrange_weights,
    reconstruct,
    reconstruct_degree,
    share,
    share_seeded,
    zero_sharing,
)
from tests import sharing_oracle as oracle

relaxed = settings(deadline=None, max_examples=40)
DEFAULT = Scheme()


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    packing = draw(st.sampled_from([1, 2]))
    threshold = draw(st.integers(2, 6))
    num_shares = draw(st.integers(threshold + packing - 1, 12))
    return Scheme(threshold, num_shares, draw(st.sampled_from(FIELDS)), packing)


def secrets(field: Field, size: int) -> st.SearchStrategy[FieldVector]:
    element = st.sampled_from([0, 1, field.modulus - 1]) | st.integers(0, field.modulus - 1)
    return st.lists(element, min_size=size, max_size=size).map(field.from_ints)


@st.composite
def shared(draw: st.DrawFn, count: int = 1) -> tuple[Scheme, list[FieldVector], list[list[FieldVector]]]:
    """A scheme, secrets of one size, and the shares of each, some seeded."""
    scheme = draw(schemes())
    size = draw(st.integers(0, 9))
    values = [draw(secrets(scheme.field, size)) for _ in range(count)]
    split = [
        share_seeded(value, scheme).expand(scheme, size) if draw(st.booleans()) else share(value, scheme)
        for value in values
    ]
    return scheme, values, split


def chosen(shares: list[FieldVector], indices: list[int]) -> dict[int, FieldVector]:
    return {index: shares[index - 1] for index in indices}


@relaxed
@given(shared(), st.data())
def test_any_needed_shares_open_the_secret(case, data):
    scheme, (secret,), (shares,) = case
    count = data.draw(st.integers(scheme.needed, scheme.num_shares))
    indices = data.draw(st.permutations(list(scheme.indices)))[:count]
    opened = reconstruct(chosen(shares, indices), scheme, len(secret))
    assert opened.tobytes() == secret.tobytes()
    assert all(len(each) == scheme.share_length(len(secret)) for each in shares)


@pytest.mark.parametrize("packing", [1, 2])
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_all_subsets_of_the_default_scheme_open(field: Field, packing: int):
    scheme = Scheme(field=field, packing=packing)
    secret = field.random(21, os.urandom)
    shares = share_seeded(secret, scheme).expand(scheme, 21)
    for indices in combinations(scheme.indices, scheme.needed):
        assert reconstruct(chosen(shares, list(indices)), scheme, 21).tobytes() == secret.tobytes()


@relaxed
@given(shared(count=3), st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3), st.data())
def test_a_combination_of_shares_opens_the_combination_of_secrets(case, weights, data):
    scheme, values, split = case
    field, size = scheme.field, len(values[0])
    indices = data.draw(st.permutations(list(scheme.indices)))[: scheme.needed]
    sums = {index: field.zeros(scheme.share_length(size)) for index in indices}
    for weight, shares in zip(weights, split, strict=True):
        for index in indices:
            NUMPY_KERNELS.weighted_accumulate(sums[index], shares[index - 1], weight, field)
    rows = zip(*(field.to_ints(value) for value in values), strict=True)
    expected = [sum(w * x for w, x in zip(weights, row, strict=True)) % field.modulus for row in rows]
    assert field.to_ints(reconstruct(sums, scheme, size)) == expected


@relaxed
@given(st.data())
def test_the_product_of_two_sharings_opens_at_twice_the_degree(data):
    threshold, packing = data.draw(st.integers(2, 4)), data.draw(st.sampled_from([1, 2]))
    degree = 2 * (threshold + packing - 2)
    scheme = Scheme(threshold, degree + data.draw(st.integers(1, 3)), data.draw(st.sampled_from(FIELDS)), packing)
    field, size = scheme.field, data.draw(st.integers(0, 7))
    a, b = (data.draw(secrets(field, size)) for _ in range(2))
    zeros = zero_sharing(degree, scheme, size)
    products = {
        index: field.add(field.multiply(left, right), zero)
        for index, left, right, zero in zip(scheme.indices, share(a, scheme), share(b, scheme), zeros, strict=True)
    }
    indices = data.draw(st.permutations(list(scheme.indices)))[: degree + 1]
    opened = reconstruct_degree({i: products[i] for i in indices}, degree, scheme, size)
    assert opened.tobytes() == field.multiply(a, b).tobytes()
    with pytest.raises(NotEnoughShares):
        reconstruct_degree({i: products[i] for i in indices[:-1]}, degree, scheme, size)


@relaxed
@given(st.sampled_from(FIELDS), st.sampled_from([1, 2]), st.data())
def test_a_sharing_of_zero_can_be_any_polynomial_without_a_value(field, packing, data):
    """Each is drawn in one way, so all are equally likely: added, it hides all of an opened product but its value."""
    scheme, p = Scheme(2, 7, field, packing), field.modulus
    degree = data.draw(st.integers(packing, 6))
    free = degree + 1 - packing
    factor = data.draw(st.lists(st.integers(0, p - 1), min_size=free, max_size=free))
    polynomial = {
        x: sum(c * x**k for k, c in enumerate(factor)) * x * (x + 1 if packing == 2 else 1) % p for x in scheme.indices
    }
    source = iter([field.to_bytes(field.from_ints([polynomial[x]])) for x in range(1, free + 1)])
    shares = zero_sharing(degree, scheme, packing, lambda _: next(source))
    assert {x: field.to_ints(each) for x, each in zip(scheme.indices, shares, strict=True)} == {
        x: [value] for x, value in polynomial.items()
    }
    assert next(source, None) is None


@relaxed
@given(schemes(), st.data())
def test_every_secret_explains_what_t_minus_1_shares_hold(scheme, data):
    """Perfect secrecy: whatever the others are, there is exactly one choice of random values for each secret."""
    field, size = scheme.field, 3 * scheme.packing
    mine = data.draw(st.permutations(list(scheme.indices)))[: scheme.threshold - 1]
    seen = {index: field.to_ints(data.draw(secrets(field, 3))) for index in mine}
    secret = data.draw(secrets(field, size))
    coordinates = field.to_ints(secret)
    drawn = []
    for x in range(1, scheme.threshold):
        known = [
            {-i: coordinates[scheme.packing * j + i] for i in range(scheme.packing)}
            | {index: values[j] for index, values in seen.items()}
            for j in range(3)
        ]
        drawn.append([oracle.interpolate(each, x, field.modulus) for each in known])
    source = iter([field.to_bytes(field.from_ints(values)) for values in drawn])
    shares = share(secret, scheme, lambda _: next(source))
    assert {index: field.to_ints(shares[index - 1]) for index in mine} == seen


def test_seeds_are_the_first_shares_and_the_rest_is_as_long_as_the_secret():
    secret = MERSENNE_61.random(1000, os.urandom)
    seeded = share_seeded(secret, DEFAULT)
    assert ([len(seed) for seed in seeded.seeds], [each.nbytes for each in seeded.vectors]) == ([32, 32], [8000] * 3)
    expanded = seeded.expand(DEFAULT, 1000)
    for seed, first in zip(seeded.seeds, expanded, strict=False):
        assert first.tobytes() == MERSENNE_61.expand(seed, 1000).tobytes()
    packed = share_seeded(secret, Scheme(packing=2))
    assert [each.nbytes for each in packed.vectors] == [4000] * 3


def test_shares_are_fresh_every_time():
    secret = MERSENNE_61.zeros(4)
    assert len({tuple(MERSENNE_61.to_ints(each)) for _ in range(2) for each in share(secret, DEFAULT)}) == 10
    assert len({seed for _ in range(10) for seed in share_seeded(secret, DEFAULT).seeds}) == 20


def test_shares_do_not_print_what_they_hold():
    assert repr(share_seeded(MERSENNE_61.zeros(4), DEFAULT)) == "SeededShares()"


def test_the_weights_of_consecutive_shares_are_integers():
    assert lagrange_weights((1, 2, 3), 0).numerators == (3, -3, 1)
    assert lagrange_weights((1, 2, 3), 4).numerators == (1, -3, 3)
    assert (weights := lagrange_weights((1, 3, 5), 0)).numerators == (15, -10, 3)
    assert weights.denominator == 8
    assert weights.residues(MERSENNE_61) == tuple(n * pow(8, -1, 2**61 - 1) % (2**61 - 1) for n in (15, -10, 3))


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1},
        {"threshold": 0},
        {"threshold": 6},
        {"threshold": 5, "packing": 2},
        {"packing": 3},
        {"packing": 0},
        {"num_shares": 256},
        {"num_shares": 2},
    ],
    ids=str,
)
def test_a_scheme_that_cannot_work_is_refused(wrong: dict[str, int]):
    with pytest.raises(ConfigurationError):
        Scheme(**wrong)


def test_the_largest_scheme_works():
    scheme = Scheme(128, 255, packing=2)
    secret = MERSENNE_61.from_ints([5, MERSENNE_61.modulus - 1, 7])
    shares = share_seeded(secret, scheme).expand(scheme, 3)
    opened = reconstruct(chosen(shares, list(range(255, 126, -1))), scheme, 3)
    assert opened.tobytes() == secret.tobytes()


def some_shares() -> dict[int, FieldVector]:
    return dict(enumerate(share(MERSENNE_61.from_ints(range(6)), DEFAULT), 1))


def test_too_few_shares_are_refused():
    shares = some_shares()
    with pytest.raises(NotEnoughShares):
        reconstruct({1: shares[1], 5: shares[5]}, DEFAULT, 6)
    with pytest.raises(NotEnoughShares):
        reconstruct({i: shares[i] for i in (1, 2, 3)}, Scheme(packing=2), 12)


@pytest.mark.parametrize("index", [0, -1, 6, 2**61])
def test_a_wrong_index_is_refused(index: int):
    shares = some_shares()
    with pytest.raises(MalformedShare):
        reconstruct({index: shares[1], 2: shares[2], 3: shares[3]}, DEFAULT, 6)


def test_an_index_that_comes_twice_is_refused_even_with_the_same_share():
    shares = some_shares()
    with pytest.raises(MalformedShare):
        by_index([(1, shares[1]), (2, shares[2]), (1, shares[1])], DEFAULT)
    assert list(by_index([(3, shares[3]), (1, shares[1])], DEFAULT)) == [3, 1]


@pytest.mark.parametrize("size", [5, 7])
def test_a_wrong_length_is_refused(size: int):
    shares = some_shares()
    with pytest.raises(ShapeMismatch):
        reconstruct(shares, DEFAULT, size)
    with pytest.raises(ShapeMismatch):
        reconstruct(shares | {5: MERSENNE_61.zeros(size)}, DEFAULT, 6)


def test_an_element_that_is_not_canonical_is_refused():
    shares = some_shares()
    for index in (1, 5):
        changed = shares[index].copy()
        changed[3] = MERSENNE_61.modulus
        with pytest.raises(MalformedShare):
            reconstruct(shares | {index: changed}, DEFAULT, 6)
        for split in (share, share_seeded):
            with pytest.raises(MalformedShare):
                split(changed, DEFAULT)


def test_what_is_no_vector_of_the_field_is_not_split():
    for wrong in (np.zeros(3, np.int64), np.zeros((3, 2), np.uint64)):
        for split in (share, share_seeded):
            with pytest.raises(ShapeMismatch):
                split(wrong, DEFAULT)


def test_a_source_without_fresh_seeds_is_refused():
    for source in (lambda count: b"x" * count, lambda count: os.urandom(count - 1), lambda _: b""):
        with pytest.raises(ConfigurationError):
            share_seeded(MERSENNE_61.zeros(3), DEFAULT, source)


def test_seeded_shares_that_no_split_gives_are_refused():
    made = share_seeded(MERSENNE_61.zeros(6), DEFAULT)
    short = SeededShares(made.seeds[:1], made.vectors)
    long = SeededShares((*made.seeds, b"x" * 32), made.vectors[1:])
    missing = SeededShares(made.seeds, made.vectors[:2])
    for wrong in (short, long, missing):
        with pytest.raises(MalformedShare):
            wrong.expand(DEFAULT, 6)
    with pytest.raises(ShapeMismatch):
        made.expand(DEFAULT, 7)
    with pytest.raises(ShapeMismatch):
        SeededShares((b"x" * 31, b"y" * 32), made.vectors).expand(DEFAULT, 6)
    large = made.vectors[0] | np.uint64(2**61)
    with pytest.raises(MalformedShare):
        SeededShares(made.seeds, (large, *made.vectors[1:])).expand(DEFAULT, 6)


@pytest.mark.parametrize(("degree", "packing"), [(5, 1), (0, 1), (1, 2), (-1, 1)])
def test_a_degree_that_hides_nothing_or_cannot_be_opened_is_refused(degree: int, packing: int):
    scheme = Scheme(packing=packing)
    with pytest.raises(ConfigurationError):
        zero_sharing(degree, scheme, 3)
    with pytest.raises(ConfigurationError):
        reconstruct_degree(some_shares(), degree, scheme, 6 * packing)
