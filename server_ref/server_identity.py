"""Who this server is: one Ed25519 key, by which devices know its replies from everybody else's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from client_sdk.protocol.messages import Message
from client_sdk.protocol.signing import sign_reply
from server_ref.secure.keys import read_secret, write_secret

KEY_FILE: Final = "server.key"
"""In the data directory; JSON, for its owner only."""


class _ServerKey(Message):
    """The server's key file. Secret."""

    server_signing_key: str = Field(pattern="^[0-9a-f]{64}$", repr=False)


class ServerIdentity:
    """The server's signing key. Its ``repr`` shows the public key only.

    Attributes:
        public_key: Hex; what devices pin.
    """

    __slots__ = ("_key", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Self:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def open(cls, data_dir: Path) -> tuple[Self, bool]:
        """The key of a data directory: read, or made if there is none.

        Returns:
            The identity, and whether it is new.

        Raises:
            ConfigurationError: The file cannot be written or read, others can read it, or it holds something else.
        """
        path = data_dir / KEY_FILE
        fresh = Ed25519PrivateKey.generate().private_bytes_raw().hex()
        created = write_secret(path, _ServerKey(server_signing_key=fresh))
        raw = bytes.fromhex(read_secret(path, _ServerKey).server_signing_key)
        return cls(Ed25519PrivateKey.from_private_bytes(raw)), created

    def sign_reply(self, request_signature: str, status: int, body: bytes | memoryview) -> Mapping[str, str]:
        """Headers that bind a reply to the request that it answers; see ``client_sdk.protocol.signing``."""
        return sign_reply(self._key, self.public_key, request_signature, status, body)

    def __repr__(self) -> str:
        return f"ServerIdentity({self.public_key})"
