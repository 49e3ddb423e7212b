"""One byte string per value: what signatures and hashes of the aggregators are taken over.

Each field is tagged with its type and length, so that no two different lists of fields share an encoding, and each
encoding begins with the name of what it encodes, so that a signature for one purpose never serves another.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

Field = int | float | str | bytes | None
"""What can be encoded; an int fits 64 signed bits."""

_PREFIX = "pocketfed/secure/1/"


def encode(purpose: str, fields: Iterable[Field]) -> bytes:
    """The canonical encoding of a list of fields.

    Args:
        purpose: What the encoding is for; part of it.
        fields: In a fixed order. Floats are encoded as their eight IEEE 754 bytes.

    Raises:
        OverflowError: An integer beyond 64 bits.
    """
    out = [_tagged(b"s", (_PREFIX + purpose).encode())]
    for field in fields:
        match field:
            case None:
                out.append(b"n")
            case bool():
                out.append(_integer(int(field)))
            case int():
                out.append(_integer(field))
            case float():
                out.append(b"f" + struct.pack(">d", field))
            case str():
                out.append(_tagged(b"s", field.encode()))
            case bytes():
                out.append(_tagged(b"b", field))
    return b"".join(out)


def digest(purpose: str, fields: Iterable[Field]) -> str:
    """SHA-256 of the canonical encoding, hex."""
    return hashlib.sha256(encode(purpose, fields)).hexdigest()


def _integer(value: int) -> bytes:
    return b"i" + value.to_bytes(8, "big", signed=True)


def _tagged(tag: bytes, data: bytes) -> bytes:
    return tag + struct.pack(">Q", len(data)) + data
