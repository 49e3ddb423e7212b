"""The bytes of a checkpoint file: checksummed, versioned, bounded, and encrypted where the app gives a key. No I/O.

Layout, little-endian:

=============  =====  ==============================================================================================
part           bytes  content
=============  =====  ==============================================================================================
prologue       48     magic (8), format version (u32), header length (u32), SHA-256 of these 16 bytes and the header
header (v1)    64     cipher (u32: 0 none, 1 AES-256-GCM), 0 (u32), generation (u64), body length (u64), nonce (12),
                      key check (16), 0 (12); nonce and key check are 0 without a cipher
body                  plain: the payload and SHA-256 of prologue, header and payload;
                      encrypted: the payload's ciphertext and its tag, with prologue and header as associated data
=============  =====  ==============================================================================================

The prologue is the same in all versions, so that a whole file of another version is told apart from a damaged one.
From the app's key come two by HKDF-SHA256: one encrypts, and the key check is the first 16 bytes of the other, salted
by the nonce. So a wrong key is told apart from damage, and two files do not show that they share a key.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client_sdk.errors import (
    CheckpointCorrupted,
    CheckpointKeyError,
    CheckpointTooLarge,
    CheckpointTruncated,
    CheckpointVersionError,
)
from client_sdk.protocol.errors import ConfigurationError

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"pfckpt\r\n"
FORMAT_VERSION: Final = 1
KEY_BYTES: Final = 32

_PROLOGUE = struct.Struct("<8sII32s")
_SUMMED = struct.Struct("<8sII")
_HEADER = struct.Struct("<IIQQ12s16s12s")
_MAX_HEADER_BYTES = 4096
_SUM_BYTES = 32
_TAG_BYTES = 16
_NONCE_BYTES = 12
_CHECK_BYTES = 16
_PLAIN, _AES_256_GCM = 0, 1


class CheckpointKey:
    """The app's key, which is never shown."""

    def __init__(self, key: bytes) -> None:
        """Take a key.

        Raises:
            ConfigurationError: Not 32 bytes.
        """
        if len(key) != KEY_BYTES:
            raise ConfigurationError(f"a checkpoint's key has {KEY_BYTES} bytes, got {len(key)}")
        self._key = bytes(key)

    def derived(self, purpose: str, salt: bytes) -> bytes:
        """32 bytes for one purpose."""
        return HKDF(SHA256(), KEY_BYTES, salt, f"pocketfed checkpoint {purpose}".encode()).derive(self._key)

    def check(self, nonce: bytes) -> bytes:
        """What a file shows of the key it was written with."""
        return self.derived("check", nonce)[:_CHECK_BYTES]

    def __repr__(self) -> str:
        return "CheckpointKey(<redacted>)"


@dataclass(frozen=True)
class Unpacked:
    """What a file holds.

    Attributes:
        generation: Number of the save, ascending.
        payload: The content.
    """

    generation: int
    payload: Buffer


def pack(
    payload: Buffer, generation: int, key: CheckpointKey | None, random_bytes: Callable[[int], bytes]
) -> tuple[Buffer, ...]:
    """The parts of a file, in order.

    Args:
        payload: The content.
        generation: Number of the save, in ``[0, 2**63)``.
        key: Encrypts; None for a plain file.
        random_bytes: Source of the nonce.
    """
    nonce = bytes(_NONCE_BYTES) if key is None else random_bytes(_NONCE_BYTES)
    check = bytes(_CHECK_BYTES) if key is None else key.check(nonce)
    cipher, extra = (_PLAIN, _SUM_BYTES) if key is None else (_AES_256_GCM, _TAG_BYTES)
    header = _HEADER.pack(cipher, 0, generation, len(payload) + extra, nonce, check, bytes(12))
    head = _prologue(FORMAT_VERSION, header) + header
    if key is None:
        return head, payload, _checksum(head, payload)
    return head, AESGCM(key.derived("encryption", nonce)).encrypt(nonce, payload, head)


def packed_size(payload_bytes: int, key: CheckpointKey | None) -> int:
    """Bytes of the file that ``pack`` makes of a payload of so many."""
    return _PROLOGUE.size + _HEADER.size + payload_bytes + (_SUM_BYTES if key is None else _TAG_BYTES)


def is_plain(data: Buffer) -> bool:
    """Whether a file is one of this format that was written without a key, be the rest of it damaged or missing."""
    head = bytes(memoryview(data).cast("B")[: _PROLOGUE.size + 4])
    if len(head) < _PROLOGUE.size + 4:
        return False
    magic, version, _ = _SUMMED.unpack(head[: _SUMMED.size])
    return magic == MAGIC and version == FORMAT_VERSION and head[_PROLOGUE.size :] == _PLAIN.to_bytes(4, "little")


def unpack(data: Buffer, key: CheckpointKey | None, max_bytes: int) -> Unpacked:
    """Read a whole file; the inverse of ``pack``. Nothing is allocated for what the file merely declares.

    Raises:
        CheckpointTruncated: It ends early.
        CheckpointCorrupted: Its bytes are not those that were written, or it is something else.
        CheckpointTooLarge: It has or declares more than ``max_bytes``.
        CheckpointVersionError: Another format.
        CheckpointKeyError: Another key, none where one is needed, or one where none was used.
    """
    view = memoryview(data).cast("B").toreadonly()
    if len(view) > max_bytes:
        raise CheckpointTooLarge(f"the checkpoint has {len(view)} bytes; at most {max_bytes} are accepted")
    head, header = _read_head(view)
    if len(header) != _HEADER.size:
        raise CheckpointCorrupted("its header has not the length of its version")
    cipher, zero, generation, length, nonce, check, padding = _HEADER.unpack(header)
    if zero or any(padding) or generation >= 2**63 or cipher not in {_PLAIN, _AES_256_GCM}:
        raise CheckpointCorrupted("its header is not one of this version")
    if len(head) + length > max_bytes:
        raise CheckpointTooLarge(f"the checkpoint declares {length} bytes of content; at most {max_bytes} are accepted")
    body = view[len(head) :]
    if len(body) < length:
        raise CheckpointTruncated(f"the checkpoint declares {length} bytes of content, {len(body)} are there")
    if len(body) > length:
        raise CheckpointCorrupted(f"{len(body) - length} bytes follow its content")
    if cipher == _PLAIN:
        return Unpacked(generation, _plain(head, body, key))
    return Unpacked(generation, _decrypted(head, body, nonce, check, key))


def _prologue(version: int, header: bytes) -> bytes:
    summed = _SUMMED.pack(MAGIC, version, len(header))
    return summed + hashlib.sha256(summed + header).digest()


def _read_head(view: memoryview) -> tuple[bytes, bytes]:
    """Prologue with header, and the header."""
    if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)]:
        raise CheckpointCorrupted("it is not a checkpoint")
    if len(view) < _PROLOGUE.size:
        raise CheckpointTruncated(f"{len(view)} bytes cannot hold a checkpoint's prologue")
    _, version, length, _ = _PROLOGUE.unpack(view[: _PROLOGUE.size])
    if length > _MAX_HEADER_BYTES:
        raise CheckpointCorrupted(f"its header declares {length} bytes; at most {_MAX_HEADER_BYTES} are possible")
    head = bytes(view[: _PROLOGUE.size + length])
    header = head[_PROLOGUE.size :]
    if len(header) < length:
        raise CheckpointTruncated(f"the checkpoint declares a header of {length} bytes, {len(header)} are there")
    if _prologue(version, header) != head[: _PROLOGUE.size]:
        raise CheckpointCorrupted("its header's checksum does not match")
    if version != FORMAT_VERSION:
        age = "newer" if version > FORMAT_VERSION else "older"
        raise CheckpointVersionError(
            f"the checkpoint has format {version}, {age} than {FORMAT_VERSION}, the only one that this release reads"
        )
    return head, header


def _plain(head: bytes, body: memoryview, key: CheckpointKey | None) -> memoryview:
    # A keyed app does not read plain files: whoever can write the file could otherwise take the encryption away.
    if key is not None:
        raise CheckpointKeyError("the checkpoint is not encrypted, and the app gives a key")
    if len(body) < _SUM_BYTES:
        raise CheckpointCorrupted("its content is shorter than a checksum")
    payload = body[:-_SUM_BYTES]
    if _checksum(head, payload) != bytes(body[-_SUM_BYTES:]):
        raise CheckpointCorrupted("its checksum does not match")
    return payload


def _decrypted(head: bytes, body: memoryview, nonce: bytes, check: bytes, key: CheckpointKey | None) -> bytes:
    if key is None:
        raise CheckpointKeyError("the checkpoint is encrypted, and the app gives no key")
    if not hmac.compare_digest(key.check(nonce), check):
        raise CheckpointKeyError("the checkpoint was written with another key")
    try:
        return AESGCM(key.derived("encryption", nonce)).decrypt(nonce, body, head)
    except (InvalidTag, ValueError) as e:
        raise CheckpointCorrupted("its authentication tag does not match") from e


def _checksum(head: bytes, payload: Buffer) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(payload)
    return digest.digest()
