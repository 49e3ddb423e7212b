"""Request signatures: what is covered, what is refused, and that every refusal is the typed one."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import AuthenticationFailed, BodyAltered
from client_sdk.protocol.signing import (
    content_digest,
    device_id_of,
    reply_signer,
    request_signature,
    sign_reply,
    sign_request,
    signing_device,
    verify_request,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
DEVICE = device_id_of(PUBLIC.public_bytes_raw())
PATH, BODY = "/v1/check-ins", b'{"num_samples":3}'
NONCE = "0123456789abcdef" * 2
SIGNED = sign_request(KEY, DEVICE, "POST", PATH, BODY, nonce=NONCE)


def verify(headers: dict[str, str] | None = None, method: str = "POST", path: str = PATH, body: bytes = BODY) -> None:
    verify_request(PUBLIC, SIGNED if headers is None else headers, method, path, body)


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "post"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
    body=st.binary(max_size=200),
)
def test_a_signed_request_verifies(method: str, path: str, body: bytes):
    headers = sign_request(KEY, DEVICE, method, path, body, nonce=NONCE)
    assert signing_device(headers) == DEVICE
    verify(headers, method, path, body)
    verify(headers, method, path, memoryview(body))  # type: ignore[arg-type]  # any buffer will do


def test_the_device_id_follows_from_the_key():
    assert device_id_of(PUBLIC.public_bytes_raw()) == DEVICE
    assert len(DEVICE) == 32
    assert device_id_of(bytes(32)) != DEVICE


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "PUT"},
        {"method": "GET"},
        {"path": "/v1/check-ins/"},
        {"path": "/v1/devices"},
        {"path": ""},
        {"body": b""},
        {"body": BODY + b" "},
        {"body": BODY.replace(b"3", b"4")},
    ],
)
def test_method_path_and_body_are_covered(changes: dict):
    with pytest.raises(AuthenticationFailed):
        verify(**changes)


@given(at=st.integers(0, len(BODY) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_body_is_noticed(at: int, bit: int):
    body = bytearray(BODY)
    body[at] ^= 1 << bit
    with pytest.raises(BodyAltered):
        verify(body=bytes(body))


def test_only_a_body_that_changed_on_its_way_is_worth_sending_again():
    """A proxy may be mended; a signature that was never ours, or was cut off, stays what it is."""
    with pytest.raises(BodyAltered) as altered:
        verify(body=BODY + b" ")
    assert altered.value.retryable
    for headers in ({}, {k: v for k, v in SIGNED.items() if k != "content-digest"}):
        with pytest.raises(AuthenticationFailed) as refused:
            verify(headers | {"signature-input": SIGNED["signature-input"]})
        assert not refused.value.retryable


def test_a_digest_of_another_body_does_not_verify_even_if_it_matches():
    other = b"other"
    with pytest.raises(AuthenticationFailed, match="signature does not verify"):
        verify(SIGNED | {"content-digest": content_digest(other)}, body=other)


def test_another_devices_signature_is_refused():
    key = Ed25519PrivateKey.generate()
    headers = sign_request(key, device_id_of(key.public_key().public_bytes_raw()), "POST", PATH, BODY, nonce=NONCE)
    with pytest.raises(AuthenticationFailed):
        verify(headers)


def test_the_key_id_is_covered():
    with pytest.raises(AuthenticationFailed):
        verify(SIGNED | {"signature-input": SIGNED["signature-input"].replace(DEVICE, "0" * 32)})


def test_the_nonce_is_covered_and_makes_requests_differ():
    with pytest.raises(AuthenticationFailed):
        verify(SIGNED | {"signature-input": SIGNED["signature-input"].replace(NONCE, "f" * 32)})
    other = sign_request(KEY, DEVICE, "POST", PATH, BODY, nonce="f" * 32)
    assert other["signature"] != SIGNED["signature"]
    identity = DeviceIdentity(KEY)
    assert len({identity.sign("POST", PATH, BODY)["signature"] for _ in range(3)}) == 3, "never the same twice"


@pytest.mark.parametrize("missing", ["content-digest", "signature-input", "signature"])
def test_each_header_is_needed(missing: str):
    with pytest.raises(AuthenticationFailed):
        verify({k: v for k, v in SIGNED.items() if k != missing})


def b64(data: bytes) -> str:
    return f"sig1=:{base64.b64encode(data).decode()}:"


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "sig1=",
        "sig1=::",
        "sig1=:not base64!:",
        "sig1=:é:",
        "sig1=:\ud800:",
        "sig2=" + SIGNED["signature"][5:],
        SIGNED["signature"][:-1],
        SIGNED["signature"] + " ",
        SIGNED["signature"].upper(),
        b64(bytes(64)),
        b64(bytes(63)),
        b64(bytes(65)),
        b64(b""),
        b64(b"\xff" * 64),
    ],
)
def test_a_signature_that_is_none_is_refused(signature: str):
    with pytest.raises(AuthenticationFailed):
        verify(SIGNED | {"signature": signature})


@pytest.mark.parametrize(
    "signature_input",
    [
        "",
        SIGNED["signature-input"] + ";created=1",
        SIGNED["signature-input"].replace('"@path" ', ""),
        SIGNED["signature-input"].replace("ed25519", "hmac-sha256"),
        SIGNED["signature-input"].replace("sig1", "sig2"),
        SIGNED["signature-input"].replace(DEVICE, DEVICE.upper()),
        SIGNED["signature-input"].replace(DEVICE, DEVICE[:-1]),
        SIGNED["signature-input"].replace(DEVICE, DEVICE + "\n"),
        SIGNED["signature-input"].replace(f';nonce="{NONCE}"', ""),
        SIGNED["signature-input"].replace(NONCE, NONCE.upper()),
        SIGNED["signature-input"].replace(NONCE, ""),
        SIGNED["signature-input"] + "\n",
        SIGNED["signature-input"] + ", " + SIGNED["signature-input"],
    ],
)
def test_another_profile_of_signatures_is_refused(signature_input: str):
    headers = SIGNED | {"signature-input": signature_input}
    with pytest.raises(AuthenticationFailed, match="no signature of the expected form"):
        signing_device(headers)
    with pytest.raises(AuthenticationFailed):
        verify(headers)


@pytest.mark.parametrize("path", ["/é", "/\ud800", "/\n"])
def test_a_path_that_cannot_have_been_signed_is_refused(path: str):
    with pytest.raises(AuthenticationFailed):
        verify(path=path)


@given(st.dictionaries(st.sampled_from(list(SIGNED)), st.text(max_size=80)))
def test_any_header_text_gives_the_typed_refusal(headers: dict[str, str]):
    with pytest.raises(AuthenticationFailed):
        verify(SIGNED | headers if headers else {})


def test_a_signature_is_not_over_the_body_but_over_its_digest():
    """[RFC 9530] A proxy can check the digest without the key, the signature without the body."""
    digest = SIGNED["content-digest"]
    assert digest == content_digest(BODY)
    params = SIGNED["signature-input"].removeprefix("sig1=")
    base = f'"@method": POST\n"@path": {PATH}\n"content-digest": {digest}\n"@signature-params": {params}'
    PUBLIC.verify(base64.b64decode(SIGNED["signature"][6:-1]), base.encode())


# --- replies ---

SERVER = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
SERVER_KEY = SERVER.public_key().public_bytes_raw().hex()
REPLY = b'{"reply":{"status":"finished","model_version":3}}'
SIGNED_REPLY = sign_reply(SERVER, SERVER_KEY, SIGNED["signature"], 200, REPLY)


def signer(
    headers: dict[str, str] | None = None, request: str = SIGNED["signature"], status: int = 200, body: bytes = REPLY
) -> str:
    return reply_signer(SIGNED_REPLY if headers is None else headers, request, status, body)


@given(status=st.integers(200, 599), body=st.binary(max_size=200), nonce=st.binary(min_size=16, max_size=16))
def test_a_signed_reply_says_whose_it_is(status: int, body: bytes, nonce: bytes):
    asked = sign_request(KEY, DEVICE, "POST", PATH, BODY, nonce=nonce.hex())["signature"]
    headers = sign_reply(SERVER, SERVER_KEY, asked, status, memoryview(body))
    assert reply_signer(headers, asked, status, body) == SERVER_KEY


def test_a_reply_to_another_request_status_or_body_is_refused():
    """The request's signature stands for its device, method, path, body and nonce: another one is another request."""
    others = [
        ("POST", PATH, BODY, "f" * 32),
        ("POST", "/v1/devices", BODY, NONCE),
        ("PUT", PATH, BODY, NONCE),
        ("POST", PATH, b"{}", NONCE),
    ]
    for method, path, body, nonce in others:
        with pytest.raises(AuthenticationFailed, match="does not verify"):
            signer(request=sign_request(KEY, DEVICE, method, path, body, nonce=nonce)["signature"])
    stranger = DeviceIdentity.generate().sign("POST", PATH, BODY)["signature"]
    with pytest.raises(AuthenticationFailed, match="does not verify"):
        signer(request=stranger)
    with pytest.raises(AuthenticationFailed, match="does not verify"):
        signer(status=201)
    with pytest.raises(AuthenticationFailed, match="digest"):
        signer(body=REPLY + b" ")
    with pytest.raises(AuthenticationFailed, match="does not verify"):
        signer(SIGNED_REPLY | {"content-digest": content_digest(b"other")}, body=b"other")


def test_another_key_that_signs_is_told_apart_from_none_that_does():
    other = Ed25519PrivateKey.generate()
    public = other.public_key().public_bytes_raw().hex()
    assert signer(sign_reply(other, public, SIGNED["signature"], 200, REPLY)) == public
    with pytest.raises(AuthenticationFailed, match="does not verify"):
        signer(sign_reply(other, SERVER_KEY, SIGNED["signature"], 200, REPLY))


@pytest.mark.parametrize("missing", list(SIGNED_REPLY))
def test_each_header_of_a_reply_is_needed(missing: str):
    with pytest.raises(AuthenticationFailed):
        signer({k: v for k, v in SIGNED_REPLY.items() if k != missing})


@pytest.mark.parametrize(
    "change",
    [
        {"signature-input": SIGNED_REPLY["signature-input"].replace('"@status" ', "")},
        {"signature-input": SIGNED_REPLY["signature-input"].replace("reply=", "sig1=")},
        {"signature-input": SIGNED_REPLY["signature-input"].replace(SERVER_KEY, "f" * 64)},
        {"signature-input": SIGNED_REPLY["signature-input"].replace(SERVER_KEY, SERVER_KEY.upper())},
        {"signature-input": SIGNED_REPLY["signature-input"] + "\n"},
        {"signature": SIGNED_REPLY["signature"].replace("reply", "sig1")},
        {"signature": SIGNED["signature"]},
        {"signature": "reply=:" + "A" * 86 + "==:"},
        {"signature": "reply=::"},
    ],
    ids=lambda change: next(iter(change.values()))[:48],
)
def test_a_reply_of_another_form_is_refused(change: dict[str, str]):
    with pytest.raises(AuthenticationFailed):
        signer(SIGNED_REPLY | change)


def test_a_device_cannot_pass_for_the_server_nor_the_server_for_a_device():
    """The two are signed over different components under different labels, also where one key would make both."""
    with pytest.raises(AuthenticationFailed):
        signer(SIGNED)
    with pytest.raises(AuthenticationFailed):
        verify(SIGNED_REPLY)


@given(st.dictionaries(st.sampled_from(list(SIGNED_REPLY)), st.text(max_size=80), min_size=1))
def test_any_text_in_a_replys_headers_gives_the_typed_refusal(headers: dict[str, str]):
    with pytest.raises(AuthenticationFailed):
        signer(SIGNED_REPLY | headers)


def test_only_what_can_be_a_requests_signature_is_signed_over():
    assert request_signature(SIGNED) == SIGNED["signature"]
    for other in ("", "sig1=:AA==:", SIGNED["signature"] + " ", SIGNED_REPLY["signature"], "sig1=:\u00e9:"):
        assert request_signature({"signature": other}) is None
