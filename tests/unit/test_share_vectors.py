"""Replays the golden vectors of fields and shares."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.field import Field, FieldVector
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, SeededShares, reconstruct
from client_sdk.protocol.share_checks import check_parity, locate
from tests.vectors.generate import FOLDER

VECTORS = json.loads((FOLDER / "shares.json").read_text())
CHECKED = json.loads((FOLDER / "shares_checked.json").read_text())


def name(vector: dict[str, Any]) -> str:
    return vector.get("name", vector.get("field", "?")).replace(" ", "-")


def scheme_of(vector: dict[str, Any]) -> Scheme:
    field = Field.by_name(vector["field"])
    return Scheme(vector["threshold"], vector["num_shares"], field, vector["packing"])


def vectors_of(field: Field, shares: dict[str, str]) -> dict[int, FieldVector]:
    return {int(index): field.from_bytes(bytes.fromhex(data)) for index, data in shares.items()}


@pytest.mark.parametrize("vector", VECTORS["expansions"], ids=name)
def test_seeds_never_expand_to_anything_else(vector: dict[str, Any]):
    field = Field.by_name(vector["field"])
    size = len(vector["elements"]) // (2 * field.element_bytes)
    expanded = field.expand(bytes.fromhex(vector["seed"]), size)
    assert field.to_bytes(expanded).hex() == vector["elements"]


@pytest.mark.parametrize("vector", VECTORS["streams"], ids=name)
def test_words_are_masked_and_left_out(vector: dict[str, Any]):
    field = Field.by_name(vector["field"])
    stream = iter(bytes.fromhex(vector["stream"]))
    size = len(vector["elements"]) // (2 * field.element_bytes)
    drawn = field.random(size, lambda count: bytes(islice(stream, count)))
    assert field.to_bytes(drawn).hex() == vector["elements"]


@pytest.mark.parametrize("vector", VECTORS["integers"], ids=name)
def test_integers_are_elements_and_back(vector: dict[str, Any]):
    field = Field.by_name(vector["field"])
    encoded = field.from_signed(np.array(vector["codes"], np.int64))
    assert field.to_bytes(encoded).hex() == vector["elements"]
    assert field.to_signed(encoded).tolist() == vector["codes"]


@pytest.mark.parametrize("vector", VECTORS["bad_codes"], ids=name)
def test_codes_out_of_range_are_not_shared(vector: dict[str, Any]):
    codes = np.array(vector["codes"], np.int64)
    with pytest.raises(ProtocolError) as caught:
        Field.by_name(vector["field"]).from_signed(codes)
    assert caught.value.slug == vector["error"]


@pytest.mark.parametrize("vector", VECTORS["bad_elements"], ids=name)
def test_elements_out_of_range_are_no_codes(vector: dict[str, Any]):
    field = Field.by_name(vector["field"])
    elements = field.from_bytes(bytes.fromhex(vector["elements"]))
    with pytest.raises(ProtocolError) as caught:
        field.to_signed(elements)
    assert caught.value.slug == vector["error"]


@pytest.mark.parametrize("vector", VECTORS["good"], ids=name)
def test_a_secret_and_its_seeds_give_these_shares_and_they_open_it(vector: dict[str, Any]):
    scheme = scheme_of(vector)
    field = scheme.field
    secret = field.from_bytes(bytes.fromhex(vector["secret"]), vector["size"])
    seeds = tuple(map(bytes.fromhex, vector["seeds"]))
    made = SeededShares(seeds, tuple(NUMPY_KERNELS.split_seeded(secret, seeds, scheme)))
    shares = made.expand(scheme, vector["size"])
    assert [field.to_bytes(share).hex() for share in shares] == vector["shares"]
    last = {index: shares[index - 1] for index in scheme.indices[-scheme.needed :]}
    assert reconstruct(last, scheme, vector["size"]).tobytes() == secret.tobytes()


@pytest.mark.parametrize("vector", VECTORS["sums"], ids=name)
def test_shares_of_a_sum_open_it(vector: dict[str, Any]):
    scheme = scheme_of(vector)
    opened = reconstruct(vectors_of(scheme.field, vector["shares"]), scheme, vector["size"])
    assert scheme.field.to_signed(opened).tolist() == vector["opened"]


@pytest.mark.parametrize("vector", VECTORS["bad"], ids=name)
def test_shares_that_do_not_open_are_refused_with_their_error(vector: dict[str, Any]):
    scheme = Scheme()
    with pytest.raises(ProtocolError) as caught:
        reconstruct(vectors_of(scheme.field, vector["shares"]), scheme, vector["size"])
    assert caught.value.slug == vector["error"]


@pytest.mark.parametrize("vector", [*CHECKED["good"], *CHECKED["bad"]], ids=name)
def test_wrong_shares_are_located_or_said_to_be_ambiguous(vector: dict[str, Any]):
    scheme = scheme_of(vector)
    shares = vectors_of(scheme.field, vector["shares"])
    assert check_parity(shares, scheme) == vector["consistent"]
    found = locate(shares, scheme)
    assert found.ambiguous == vector["ambiguous"]
    assert list(found.bad) == (vector["bad"] or [])
    assert set(found.good) == (set() if found.ambiguous else set(shares) - set(found.bad))
