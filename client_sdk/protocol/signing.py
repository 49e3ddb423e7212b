"""Request signatures: a small profile of HTTP Message Signatures [RFC 9421] with Ed25519.

Covered components: ``@method``, ``@path`` and ``content-digest`` [RFC 9530], so what is signed is a digest of the
body, never the body. The key id is the device id, which is itself derived from the public key.
Replaying a signed request is harmless by the protocol's idempotency; secrecy on the wire is TLS's job.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client_sdk.protocol.errors import AuthenticationFailed, BodyAltered

_PARAMS = '("@method" "@path" "content-digest");keyid="{key_id}";alg="ed25519"'
_INPUT = re.compile(r'sig1=\("@method" "@path" "content-digest"\);keyid="(?P<key_id>[0-9a-f]{32})";alg="ed25519"')


def device_id_of(public_key: bytes) -> str:
    """Device id of an Ed25519 public key (32 raw bytes): the first 128 bits of its SHA-256, hex."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def content_digest(body: bytes | memoryview) -> str:
    """``Content-Digest`` header value of a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode('ascii')}:"


def _signature_base(method: str, path: str, digest: str, key_id: str) -> bytes:
    params = _PARAMS.format(key_id=key_id)
    return (
        f'"@method": {method.upper()}\n"@path": {path}\n"content-digest": {digest}\n"@signature-params": {params}'
    ).encode("ascii")


def sign_request(
    key: Ed25519PrivateKey, device_id: str, method: str, path: str, body: bytes | memoryview
) -> dict[str, str]:
    """Headers that authenticate one request.

    Args:
        key: The device's private key.
        device_id: ``device_id_of`` its public key.
        method: HTTP method.
        path: Absolute path, percent-encoded, without query.
        body: The body; may be empty.
    """
    digest = content_digest(body)
    signature = key.sign(_signature_base(method, path, digest, device_id))
    return {
        "content-digest": digest,
        "signature-input": "sig1=" + _PARAMS.format(key_id=device_id),
        "signature": f"sig1=:{base64.b64encode(signature).decode('ascii')}:",
    }


def signing_device(headers: Mapping[str, str]) -> str:
    """The device id that a request claims, before it is verified.

    Raises:
        AuthenticationFailed: No signature, or not of this profile.
    """
    match = _INPUT.fullmatch(headers.get("signature-input", ""))
    if match is None:
        raise AuthenticationFailed("the request carries no signature of the expected form")
    return match["key_id"]


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
    raw = headers.get("signature", "")
    if not (raw.startswith("sig1=:") and raw.endswith(":")):
        raise AuthenticationFailed("the signature header is malformed")
    try:
        public_key.verify(
            base64.b64decode(raw[6:-1], validate=True),
            _signature_base(method, path, claimed, signing_device(headers)),
        )
    except (InvalidSignature, ValueError) as e:  # ValueError: not base64, or a path that is not ASCII
        raise AuthenticationFailed("the signature does not verify") from e
    return claimed
