"""Reading requests: bounded bodies, signatures, byte ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope

from client_sdk.protocol.errors import (
    AuthenticationFailed,
    MalformedMessage,
    OversizedBody,
    RangeNotSatisfiable,
    TruncatedFrame,
    UnknownDevice,
)
from client_sdk.protocol.signing import request_signature, signing_device, verify_request

if TYPE_CHECKING:
    # An aggregator reads requests too, and has no coordinator to load.
    from server_ref.coordinator import Coordinator

AUTHENTICATED: Final = "pocketfed.request-signature"
"""Key of the ASGI scope that holds the ``signature`` header, once it is known to be a device's."""

M = TypeVar("M", bound=BaseModel)
_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})$")


def headers_of(scope: Scope) -> dict[str, str]:
    """Lower-case header names to values."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body, refused before it is read where its declared length says enough.

    Raises:
        MalformedMessage: No Content-Length.
        OversizedBody: More than ``limit`` bytes declared (or sent).
        TruncatedFrame: The sender went away before the end.
    """
    declared = headers.get("content-length", "")
    if not declared.isascii() or not declared.isdigit():
        raise MalformedMessage("the request needs a Content-Length")
    if len(declared) > 18 or int(declared) > limit:
        raise OversizedBody(f"the body declares {declared[:30]} bytes; at most {limit} are accepted here")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise TruncatedFrame(f"the connection ended after {size} of {declared} bytes")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise OversizedBody(f"at most {limit} bytes are accepted here")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@lru_cache(maxsize=65536)
def public_key(hex_key: str) -> Ed25519PublicKey:
    """The key that these 64 characters stand for.

    Raises:
        ValueError: They stand for none.
    """
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(hex_key))


def verify_with(hex_key: str, scope: Scope, headers: Mapping[str, str], body: bytes) -> None:
    """Check a request's signature against a known key; only what follows is answered with a signed reply.

    Before this, anybody could have sent the bytes that are refused, beside a signature that a device made for others.

    Raises:
        AuthenticationFailed: Not signed by it.
    """
    try:
        key = public_key(hex_key)
    except ValueError as e:
        raise AuthenticationFailed("the public key is not an Ed25519 key") from e
    path = scope.get("raw_path") or scope["path"].encode("ascii", "replace")
    verify_request(key, headers, scope["method"], path.decode("latin-1"), body)
    scope[AUTHENTICATED] = headers["signature"]


def authenticate(coordinator: Coordinator, scope: Scope, headers: Mapping[str, str], body: bytes) -> str:
    """The device that signed a request.

    Raises:
        AuthenticationFailed: Not signed, wrongly signed, or by an unknown device.
    """
    device_id = signing_device(headers)
    try:
        public_key, _tier = coordinator.device(device_id)
    except UnknownDevice:
        # The one refusal that is signed without a check, which needs the key. Forged, it costs an enrolment.
        scope[AUTHENTICATED] = request_signature(headers)
        raise
    verify_with(public_key, scope, headers, body)
    return device_id


def parse(model: type[M], body: bytes) -> M:
    """Validate a JSON body.

    Raises:
        MalformedMessage: Not JSON, or not this schema.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        raise MalformedMessage(
            "; ".join(f"{'.'.join(map(str, err['loc'])) or 'body'}: {err['msg']}" for err in e.errors()[:5])
        ) from e


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end (exclusive) of a single byte range; None for the whole.

    Raises:
        RangeNotSatisfiable: It lies outside the blob.
    """
    match = _RANGE.match(header) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if start >= end or start >= size:
        raise RangeNotSatisfiable(f"the blob has {size} bytes")
    return start, end
