"""Replays the vectors of sealing, and has the oracle that made them open what the library seals, and the other way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.sealing import SealingKey, SealingPublicKey, SealingSuite, SharingTerms, noise_info, share_info
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


@given(
    st.sampled_from([SEALING_KEYS[0], HYBRID_KEYS[0]]), st.binary(max_size=200), st.binary(max_size=200), st.randoms()
)
def test_the_library_and_the_oracle_open_what_the_other_has_sealed(key, plaintext, info, random):
    ciphertext = sealing.seal(plaintext, key.public, info)
    assert hpke_open(ciphertext, key.suite, key.private_bytes(), info) == plaintext
    if key.suite is SealingSuite.X25519:
        made = hpke_seal(plaintext, key.public.raw, info, random.randbytes(32))
        assert sealing.open(made, key, info) == plaintext
