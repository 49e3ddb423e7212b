"""Replays the vectors of sealing, and has the oracle that made them open what the library seals, and the other way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.field import Field
from client_sdk.protocol.sealing import SealingKey, SealingPublicKey, SealingSuite, SharingTerms, noise_info, share_info
from client_sdk.protocol.secure import SecureLayout, decode_share
from client_sdk.protocol.shamir import Scheme
from tests.vectors.generate import FOLDER
from tests.vectors.sealing import HYBRID_KEYS, SEALING_KEYS, hpke_open, hpke_seal

VECTORS = json.loads((FOLDER / "sealing.json").read_text())


def names(vector: dict[str, Any]) -> str:
    return str(vector["name"])


def key_of(vector: dict[str, Any]) -> SealingKey:
    return SealingKey(SealingSuite(vector["suite"]), bytes.fromhex(vector["private_key"]))


@pytest.mark.parametrize("vector", VECTORS["infos"], ids=names)
def test_a_context_has_the_stated_encoding(vector: dict[str, Any]):
    context = vector["context"]
    if vector["kind"] == "noise":
        assert noise_info(**context).hex() == vector["info"]
    else:
        assert share_info(**context | {"terms": SharingTerms(**context["terms"])}).hex() == vector["info"]


@pytest.mark.parametrize("vector", VECTORS["good"], ids=names)
def test_a_good_ciphertext_opens(vector: dict[str, Any]):
    key, info, ciphertext = key_of(vector), bytes.fromhex(vector["info"]), bytes.fromhex(vector["ciphertext"])
    assert key.public == SealingPublicKey.from_hex(key.suite, vector["public_key"])
    assert sealing.open(ciphertext, key, info).hex() == vector["plaintext"]
    assert hpke_open(ciphertext, key.suite, key.private_bytes(), info).hex() == vector["plaintext"]


@pytest.mark.parametrize("vector", [v for v in VECTORS["good"] if v["suite"] == "x25519"], ids=names)
def test_a_good_ciphertext_is_made_again_by_whoever_knows_the_senders_key(vector: dict[str, Any]):
    plaintext, public, info = (bytes.fromhex(vector[name]) for name in ("plaintext", "public_key", "info"))
    made = hpke_seal(plaintext, public, info, bytes.fromhex(VECTORS["sender_key"]))
    assert made.hex() == vector["ciphertext"]


@pytest.mark.parametrize("vector", VECTORS["bad"], ids=names)
def test_a_bad_ciphertext_is_refused(vector: dict[str, Any]):
    with pytest.raises(ProtocolError) as caught:
        sealing.open(bytes.fromhex(vector["ciphertext"]), key_of(vector), bytes.fromhex(vector["info"]))
    assert caught.value.slug == vector["error"]


# --- shares before they are sealed -------------------------------------------------------------------------------

SHARES = json.loads((FOLDER / "sealing_shares.json").read_text())


def layout_of(stated: dict[str, Any]) -> SecureLayout:
    scheme = Scheme(stated["threshold"], stated["num_shares"], Field.by_name(stated["field"]), stated["packing"])
    return SecureLayout(scheme, stated["size"], stated["indicator"], SealingSuite(stated["suite"]))


@pytest.mark.parametrize("vector", SHARES["good"], ids=names)
def test_good_shares_decode_to_points_of_polynomials_through_the_secret(vector: dict[str, Any]):
    """Checked with integers: each element of the shares lies on the one polynomial that the secrets and seeds fix."""
    layout = layout_of(vector["layout"])
    scheme, field = layout.scheme, layout.scheme.field
    secret = [int(value) for value in vector["secret"]]
    mask = field.to_ints(field.expand(bytes.fromhex(vector["mask_seed"]), scheme.packing))
    padding = [0] * (len(secret) - len(mask) - len(vector["codes"]))
    assert secret == [code % field.modulus for code in vector["codes"]] + padding + mask
    shares = [
        field.to_ints(decode_share(bytes.fromhex(share), layout, index))
        for index, share in enumerate(vector["shares"], 1)
    ]
    for index, seed in enumerate(vector["seeds"], 1):
        assert shares[index - 1] == field.to_ints(field.expand(bytes.fromhex(seed), layout.share_length))
    for element in range(layout.share_length):
        points = {-i: secret[element * scheme.packing + i] for i in range(scheme.packing)}
        points |= {index: share[element] for index, share in enumerate(shares, 1)}
        known = list(points)[: scheme.needed]
        for at in points:
            assert points[at] == interpolated({x: points[x] for x in known}, at, field.modulus)
    lengths = [len(share) // 2 + layout.suite.overhead for share in vector["shares"]]
    assert lengths == vector["ciphertext_bytes"] == [layout.ciphertext_bytes(i) for i in scheme.indices]


def interpolated(points: dict[int, int], at: int, modulus: int) -> int:
    total = 0
    for x, value in points.items():
        top, bottom = 1, 1
        for other in points:
            if other != x:
                top, bottom = top * (at - other), bottom * (x - other)
        total += value * top * pow(bottom, -1, modulus)
    return total % modulus


@pytest.mark.parametrize("vector", SHARES["bad"], ids=names)
def test_a_bad_share_is_refused(vector: dict[str, Any]):
    with pytest.raises(ProtocolError) as caught:
        decode_share(bytes.fromhex(vector["share"]), layout_of(SHARES["good"][0]["layout"]), vector["index"])
    assert caught.value.slug == vector["error"]


# --- the oracle --------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([SEALING_KEYS[0], HYBRID_KEYS[0]]), st.binary(max_size=200), st.binary(max_size=200), st.randoms()
)
def test_the_library_and_the_oracle_open_what_the_other_has_sealed(key, plaintext, info, random):
    ciphertext = sealing.seal(plaintext, key.public, info)
    assert hpke_open(ciphertext, key.suite, key.private_bytes(), info) == plaintext
    if key.suite is SealingSuite.X25519:
        made = hpke_seal(plaintext, key.public.raw, info, random.randbytes(32))
        assert sealing.open(made, key, info) == plaintext
