"""Signatures of requests and replies: a small profile of HTTP Message Signatures [RFC 9421] with Ed25519.

A request covers ``@method``, ``@path`` and ``content-digest`` [RFC 9530], so what is signed is a digest of the body,
never the body. Its key id is the device id, which is itself derived from the public key; its nonce makes it unlike any
other. A reply covers ``@status``, its own ``content-digest`` and the request's signature, and with that the device, the
method, the path, the body and the nonce that it answers: it can neither be shown to another request nor be shown again.
Its key id is the server's public key itself.

Replaying a signed request is harmless by the protocol's idempotency; secrecy on the wire is TLS's job. Neither kind has
a time in it: no clock has to be right.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client_sdk.protocol.errors import AuthenticationFailed, BodyAltered

_COMPONENTS = '("@method" "@path" "content-digest")'
_INPUT = re.compile(
    rf'sig1={re.escape(_COMPONENTS)};keyid="(?P<key_id>[0-9a-f]{{32}})";alg="ed25519";nonce="(?P<nonce>[0-9a-f]{{32}})"'
)
_REPLY_COMPONENTS = '("@status" "content-digest" "signature";req;key="sig1")'
_REPLY_INPUT = re.compile(rf'reply={re.escape(_REPLY_COMPONENTS)};keyid="(?P<key>[0-9a-f]{{64}})";alg="ed25519"')
_SIGNATURE = re.compile(r"(?P<label>sig1|reply)=:(?P<value>[0-9A-Za-z+/]{85}[AQgw]==):")


def device_id_of(public_key: bytes) -> str:
    """Device id of an Ed25519 public key (32 raw bytes): the first 128 bits of its SHA-256, hex."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def content_digest(body: bytes | memoryview) -> str:
    """``Content-Digest`` header value of a body."""
    return f"sha-256=:{_base64(hashlib.sha256(body).digest())}:"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _params(key_id: str, nonce: str) -> str:
    return f'{_COMPONENTS};keyid="{key_id}";alg="ed25519";nonce="{nonce}"'


def _signature_base(method: str, path: str, digest: str, params: str) -> bytes:
    return (
        f'"@method": {method.upper()}\n"@path": {path}\n"content-digest": {digest}\n"@signature-params": {params}'
    ).encode("ascii")


def sign_request(
    key: Ed25519PrivateKey, device_id: str, method: str, path: str, body: bytes | memoryview, *, nonce: str
) -> dict[str, str]:
    """Headers that authenticate one request.

    Args:
        key: The device's private key.
        device_id: ``device_id_of`` its public key.
        method: HTTP method.
        path: Absolute path, percent-encoded, without query.
        body: The body; may be empty.
        nonce: 128 random bits, hex, new for each request: the reply is bound to them.
    """
    digest = content_digest(body)
    params = _params(device_id, nonce)
    signature = key.sign(_signature_base(method, path, digest, params))
    return {"content-digest": digest, "signature-input": f"sig1={params}", "signature": f"sig1=:{_base64(signature)}:"}


def signing_device(headers: Mapping[str, str]) -> str:
    """The device id that a request claims, before it is verified.

    Raises:
        AuthenticationFailed: No signature, or not of this profile.
    """
    return _request_input(headers)["key_id"]


def _request_input(headers: Mapping[str, str]) -> re.Match[str]:
    match = _INPUT.fullmatch(headers.get("signature-input", ""))
    if match is None:
        raise AuthenticationFailed("the request carries no signature of the expected form")
    return match


def verify_request(
    public_key: Ed25519PublicKey,
    headers: Mapping[str, str],
    method: str,
    path: str,
    body: bytes | memoryview,
) -> None:
    """Check a request's digest and signature.

    Args:
        public_key: Key of the device that ``signing_device`` named.
        headers: Lower-case header names.
        method: HTTP method.
        path: Absolute path as sent.
        body: The whole body.

    Raises:
        BodyAltered: The digest is not the body's.
        AuthenticationFailed: There is no digest, or the signature is not the device's.
    """
    digest = content_digest(body)
    claimed = headers.get("content-digest")
    if claimed is None:
        raise AuthenticationFailed("the request carries no content digest")
    if claimed != digest:
        raise BodyAltered("the content digest is not that of the body")
    verify_headers(public_key, headers, method, path)


def verify_headers(public_key: Ed25519PublicKey, headers: Mapping[str, str], method: str, path: str) -> str:
    """Check a request's signature over the digest that it claims: before the body is read, or after.

    Returns:
        The claimed ``content-digest``, which the body must still turn out to have.

    Raises:
        AuthenticationFailed: There is no digest, or the signature is not the key's.
    """
    claimed = headers.get("content-digest", "")
    given = _request_input(headers)
    params = _params(given["key_id"], given["nonce"])
    try:
        public_key.verify(_signature_of(headers, "sig1"), _signature_base(method, path, claimed, params))
    except (InvalidSignature, ValueError) as e:  # ValueError: a path that is not ASCII
        raise AuthenticationFailed("the signature does not verify") from e
    return claimed


def request_signature(headers: Mapping[str, str]) -> str | None:
    """The ``signature`` header of a request, which its reply is bound to; None where it cannot be one.

    What it says is not looked at: ``verify_request`` does that.
    """
    raw = headers.get("signature", "")
    match = _SIGNATURE.fullmatch(raw)
    return raw if match is not None and match["label"] == "sig1" else None


def _signature_of(headers: Mapping[str, str], label: str) -> bytes:
    match = _SIGNATURE.fullmatch(headers.get("signature", ""))
    if match is None or match["label"] != label:
        raise AuthenticationFailed("the signature header is malformed")
    return base64.b64decode(match["value"])


# --- replies -------------------------------------------------------------------------------------------------


def _reply_base(status: int, digest: str, request_signature: str, key: str) -> tuple[bytes, str]:
    """What a reply's signature is taken over, and its parameters."""
    params = f'{_REPLY_COMPONENTS};keyid="{key}";alg="ed25519"'
    base = (
        f'"@status": {status}\n"content-digest": {digest}\n'
        f'"signature";req;key="sig1": {request_signature.removeprefix("sig1=")}\n"@signature-params": {params}'
    )
    return base.encode("ascii"), params


def sign_reply(
    key: Ed25519PrivateKey, public_key: str, request_signature: str, status: int, body: bytes | memoryview
) -> dict[str, str]:
    """Headers that bind a reply to its request.

    Args:
        key: The server's private key.
        public_key: Its public key, hex.
        request_signature: The ``signature`` header of the request, which was verified.
        status: HTTP status of the reply.
        body: Its whole body; may be empty.
    """
    digest = content_digest(body)
    base, params = _reply_base(status, digest, request_signature, public_key)
    return {
        "content-digest": digest,
        "signature-input": f"reply={params}",
        "signature": f"reply=:{_base64(key.sign(base))}:",
    }


def reply_signer(headers: Mapping[str, str], request_signature: str, status: int, body: bytes | memoryview) -> str:
    """Whose reply this is: the public key (hex) that signed it, for exactly this request. Any key will do here.

    Args:
        headers: Of the reply; lower-case names.
        request_signature: The ``signature`` header that the request was sent with.
        status: HTTP status of the reply.
        body: Its whole body.

    Raises:
        AuthenticationFailed: It carries no signature, or one over another request, status or body.
    """
    match = _REPLY_INPUT.fullmatch(headers.get("signature-input", ""))
    if match is None:
        raise AuthenticationFailed("the reply carries no signature of the expected form")
    digest = content_digest(body)
    if headers.get("content-digest") != digest:
        raise AuthenticationFailed("the content digest is not that of the reply's body")
    base, _ = _reply_base(status, digest, request_signature, match["key"])
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(match["key"]))
        key.verify(_signature_of(headers, "reply"), base)
    except (InvalidSignature, ValueError) as e:  # ValueError: the key id is no key
        raise AuthenticationFailed("the reply's signature does not verify") from e
    return match["key"]
