"""Wrong shares: found with one to spare, located with two for each, and where it cannot be known, said so."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, NotEnoughShares, ShapeMismatch
from client_sdk.protocol.field import FIELDS, MERSENNE_61, Field, FieldVector
from client_sdk.protocol.shamir import Scheme, reconstruct, share, zero_sharing
from client_sdk.protocol.share_checks import LocatedShares, check_parity, locate

relaxed = settings(deadline=None, max_examples=60)
DEFAULT = Scheme()
SIZE = 12


def shares_of(scheme: Scheme) -> dict[int, FieldVector]:
    return dict(enumerate(share(scheme.field.random(SIZE, os.urandom), scheme), 1))


def changed(field: Field, vector: FieldVector, element: int, by: int) -> FieldVector:
    difference = field.from_ints([by if i == element else 0 for i in range(len(vector))])
    return field.add(vector, difference)


@st.composite
def tampered(draw: st.DrawFn) -> tuple[Scheme, dict[int, FieldVector], dict[int, FieldVector], list[int]]:
    """A scheme, some right shares, the same with wrong ones among them, and which."""
    packing, threshold = draw(st.sampled_from([1, 2])), draw(st.integers(2, 5))
    needed = threshold + packing - 1
    scheme = Scheme(threshold, draw(st.integers(needed + 1, 12)), draw(st.sampled_from(FIELDS)), packing)
    field = scheme.field
    count = draw(st.integers(needed + 1, scheme.num_shares))
    indices = draw(st.permutations(list(scheme.indices)))[:count]
    bad = indices[: draw(st.integers(0, count - needed))]
    shares = shares_of(scheme)
    right = {index: shares[index] for index in indices}
    wrong = dict(right)
    for index in bad:
        for _ in range(draw(st.integers(1, 3))):
            element = draw(st.integers(0, len(right[index]) - 1))
            by = draw(st.integers(1, field.modulus - 1))
            if wrong[index] is right[index]:
                wrong[index] = changed(field, right[index], element, by)
    return scheme, right, wrong, sorted(bad)


@relaxed
@given(tampered())
def test_wrong_shares_are_found_or_located(case):
    scheme, right, wrong, bad = case
    correctable = (len(right) - scheme.needed) // 2
    assert check_parity(right, scheme)
    assert check_parity(wrong, scheme) is not bool(bad)
    found = locate(wrong, scheme)
    assert found.correctable == correctable
    if len(bad) <= correctable:
        good = tuple(index for index in sorted(right) if index not in bad)
        assert found == LocatedShares(good, tuple(bad), ambiguous=False, correctable=correctable)
        opened = reconstruct({index: wrong[index] for index in good}, scheme, SIZE)
        assert opened.tobytes() == reconstruct(right, scheme, SIZE).tobytes()
    else:
        # More than can be located; if they happen to agree on another polynomial, right ones are found bad instead.
        assert found.ambiguous or found.bad


@pytest.mark.parametrize("bad", [1, 3, 5])
def test_four_of_five_find_a_wrong_share_and_five_locate_it(bad: int):
    shares = shares_of(DEFAULT)
    wrong = shares | {bad: changed(MERSENNE_61, shares[bad], 7, 1)}
    four = {index: wrong[index] for index in sorted(wrong, key=lambda index: index != bad)[:4]}
    assert not check_parity(four, DEFAULT)
    assert locate(four, DEFAULT) == LocatedShares((), (), ambiguous=True, correctable=0)
    assert locate(wrong, DEFAULT).bad == (bad,)
    without = {index: vector for index, vector in wrong.items() if index != bad}
    assert locate(without, DEFAULT) == LocatedShares(tuple(sorted(without)), (), ambiguous=False, correctable=0)


def test_garbage_in_two_of_five_is_ambiguous():
    garbage = {x: MERSENNE_61.random(SIZE, os.urandom) for x in (2, 5)}
    assert locate(shares_of(DEFAULT) | garbage, DEFAULT) == LocatedShares((), (), ambiguous=True, correctable=1)


def test_a_share_of_another_sum_or_of_another_index_is_located():
    shares, stale = shares_of(DEFAULT), shares_of(DEFAULT)
    assert locate(shares | {2: stale[2]}, DEFAULT).bad == (2,)
    assert locate(shares | {2: shares[3]}, DEFAULT).bad == (2,)
    assert locate(shares | {2: shares[3], 3: shares[2]}, DEFAULT).ambiguous
    assert locate(shares | {2: MERSENNE_61.zeros(SIZE)}, DEFAULT).bad == (2,)


def test_two_colluders_of_five_can_frame_a_third_and_are_only_detected_by_seven():
    """What ``correctable`` warns of: their shares agree with two right ones on another polynomial."""

    def collude(scheme: Scheme) -> dict[int, FieldVector]:
        shares = shares_of(scheme)
        # (x - 1)(x - 2) vanishes at the shares they leave alone, and needs none of them to be known.
        return shares | {
            x: changed(MERSENNE_61, shares[x], 0, (x - 1) * (x - 2)) for x in (4, 5) if x <= scheme.num_shares
        }

    framed = locate(collude(DEFAULT), DEFAULT)
    assert (framed.good, framed.bad, framed.correctable) == ((1, 2, 4, 5), (3,), 1)
    assert not check_parity(collude(DEFAULT), DEFAULT)
    assert locate(collude(Scheme(num_shares=7)), Scheme(num_shares=7)).bad == (4, 5)


def test_shares_of_products_are_checked_at_their_degree():
    scheme = Scheme(num_shares=7)
    a, b = shares_of(scheme), shares_of(scheme)
    zeros = zero_sharing(4, scheme, SIZE)
    products = {x: MERSENNE_61.add(MERSENNE_61.multiply(a[x], b[x]), zero) for x, zero in zip(a, zeros, strict=True)}
    assert check_parity(products, scheme, degree=4)
    assert not check_parity(products, scheme)
    wrong = products | {6: changed(MERSENNE_61, products[6], 3, -1)}
    assert not check_parity(wrong, scheme, degree=4)
    assert locate(wrong, scheme, degree=4).bad == (6,)
    with pytest.raises(ConfigurationError, match="cannot contradict"):
        check_parity({x: products[x] for x in range(1, 6)}, DEFAULT, degree=4)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_combinations_of_one_element_are_checked_like_vectors(field: Field):
    """As aggregators compare what each made of a report's share."""
    scheme = Scheme(field=field)
    shares, coefficients = shares_of(scheme), field.random(SIZE, os.urandom)
    combined = {x: field.from_ints([field.inner(coefficients, vector)]) for x, vector in shares.items()}
    assert check_parity(combined, scheme)
    combined[4] = changed(field, combined[4], 0, 1)
    assert locate(combined, scheme).bad == (4,)


def test_empty_vectors_agree():
    shares = {x: MERSENNE_61.zeros(0) for x in DEFAULT.indices}
    assert check_parity(shares, DEFAULT)
    assert locate(shares, DEFAULT).good == (1, 2, 3, 4, 5)


def test_the_coefficients_come_from_the_given_source_and_matter():
    """Who knows them in advance can make a wrong share look right on the combination: then nothing is claimed."""
    shares = shares_of(DEFAULT)
    seed = b"k" * 32
    first, second, *_ = MERSENNE_61.to_ints(MERSENNE_61.expand(seed, SIZE))
    wrong = changed(MERSENNE_61, changed(MERSENNE_61, shares[4], 0, second), 1, -first)
    assert locate(shares | {4: wrong}, DEFAULT, random=lambda _: seed).ambiguous
    assert locate(shares | {4: wrong}, DEFAULT).bad == (4,)


@pytest.mark.parametrize("check", [check_parity, locate])
def test_what_cannot_be_checked_is_refused(check):
    shares = shares_of(DEFAULT)
    with pytest.raises(NotEnoughShares):
        check({x: shares[x] for x in (1, 2, 3)}, DEFAULT)
    with pytest.raises(MalformedShare):
        check({(x + 1): vector for x, vector in shares.items()}, DEFAULT)
    with pytest.raises(ShapeMismatch):
        check(shares | {2: MERSENNE_61.zeros(SIZE + 1)}, DEFAULT)
    too_large = shares[2].copy()
    too_large[0] = MERSENNE_61.modulus
    with pytest.raises(MalformedShare):
        check(shares | {2: too_large}, DEFAULT)
    with pytest.raises(ConfigurationError, match="cannot contradict"):
        check({x: shares[x] for x in (1, 2, 3)}, Scheme(3, 3))
