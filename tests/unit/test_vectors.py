"""Replays the golden vectors: what a host in another language must do, done here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from client_sdk.protocol import messages
from client_sdk.protocol.errors import AuthenticationFailed, ProtocolError
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.signing import (
    device_id_of,
    reply_signer,
    sign_reply,
    sign_request,
    signing_device,
    verify_request,
)
from tests.vectors.generate import FOLDER, GENERATORS, text_of


def vectors(name: str, kind: str) -> list[Any]:
    return json.loads((FOLDER / name).read_text())[kind]


def names(vector: dict[str, Any]) -> str:
    return vector.get("name") or f"{vector['type']}-{vector.get('why', 'good')}"


@pytest.mark.parametrize("name", list(GENERATORS))
def test_the_generator_still_makes_the_committed_vectors(name: str):
    """They change with the protocol's version only: a difference here breaks every other host."""
    assert (FOLDER / name).read_text() == text_of(name)


@pytest.mark.parametrize("vector", vectors("frames.json", "good"), ids=names)
def test_a_good_frame_decodes_to_its_content_and_back_to_its_bytes(vector: dict[str, Any]):
    frame = decode_frame(bytes.fromhex(vector["hex"]))
    found = [
        {"name": n, "dtype": t.dtype.str.lstrip("<|"), "shape": list(t.shape), "data": t.tobytes().hex()}
        for n, t in frame.tensors.items()
    ]
    assert found == vector["tensors"]
    assert frame.metadata == vector["metadata"]
    rebuilt = {
        t["name"]: np.frombuffer(bytes.fromhex(t["data"]), t["dtype"]).reshape(t["shape"]) for t in vector["tensors"]
    }
    assert encode_frame(rebuilt, vector["metadata"]).hex() == vector["hex"]


@pytest.mark.parametrize("vector", vectors("frames.json", "bad"), ids=names)
def test_a_bad_frame_is_refused_with_its_error(vector: dict[str, Any]):
    with pytest.raises(ProtocolError) as caught:
        decode_frame(bytes.fromhex(vector["hex"]))
    assert caught.value.slug == vector["error"]


SIGNATURES = json.loads((FOLDER / "signatures.json").read_text())
PUBLIC_KEY = Ed25519PublicKey.from_public_bytes(bytes.fromhex(SIGNATURES["public_key"]))


@pytest.mark.parametrize("vector", SIGNATURES["good"], ids=names)
def test_a_good_signature_verifies_and_is_made_again(vector: dict[str, Any]):
    body = bytes.fromhex(vector["body"])
    verify_request(PUBLIC_KEY, vector["headers"], vector["method"], vector["path"], body)
    assert signing_device(vector["headers"]) == SIGNATURES["device_id"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SIGNATURES["private_key"]))
    assert device_id_of(key.public_key().public_bytes_raw()) == SIGNATURES["device_id"]
    device_id, nonce = SIGNATURES["device_id"], vector["nonce"]
    made = sign_request(key, device_id, vector["method"], vector["path"], body, nonce=nonce)
    assert made == vector["headers"]


@pytest.mark.parametrize("vector", SIGNATURES["bad"], ids=names)
def test_a_bad_signature_is_refused(vector: dict[str, Any]):
    with pytest.raises(AuthenticationFailed) as caught:
        verify_request(PUBLIC_KEY, vector["headers"], vector["method"], vector["path"], bytes.fromhex(vector["body"]))
    assert caught.value.slug == vector["error"]


REPLIES = SIGNATURES["replies"]


@pytest.mark.parametrize("vector", REPLIES["good"], ids=names)
def test_a_good_reply_verifies_and_is_made_again(vector: dict[str, Any]):
    asked, status, body = vector["request_signature"], vector["status"], bytes.fromhex(vector["body"])
    assert reply_signer(vector["headers"], asked, status, body) == vector["signer"] == REPLIES["public_key"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(REPLIES["private_key"]))
    assert sign_reply(key, REPLIES["public_key"], asked, status, body) == vector["headers"]


@pytest.mark.parametrize("vector", REPLIES["bad"], ids=names)
def test_a_bad_reply_is_refused(vector: dict[str, Any]):
    with pytest.raises(AuthenticationFailed):
        reply_signer(vector["headers"], vector["request_signature"], vector["status"], bytes.fromhex(vector["body"]))


@pytest.mark.parametrize("vector", vectors("messages.json", "good"), ids=names)
def test_a_good_message_is_read_and_written_back(vector: dict[str, Any]):
    model = getattr(messages, vector["type"])
    message = model.model_validate_json(json.dumps(vector["json"]))
    assert message.model_dump(mode="json") == vector["json"]


@pytest.mark.parametrize("vector", vectors("messages.json", "bad"), ids=names)
def test_a_bad_message_is_refused(vector: dict[str, Any]):
    with pytest.raises(ValidationError):
        getattr(messages, vector["type"]).model_validate_json(json.dumps(vector["json"]))
