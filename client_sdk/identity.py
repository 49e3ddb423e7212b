"""Who a device is: one Ed25519 key, from which its id and its report ids follow."""

from __future__ import annotations

import hashlib
import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.protocol.signing import device_id_of, sign_request

_REPORT_DOMAIN = b"pocketfed report id of assignment "


class DeviceIdentity:
    """A device's private key and what is derived from it. Its ``repr`` shows the public id only."""

    __slots__ = ("_key", "device_id", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        self.device_id = device_id_of(self.public_key)

    @classmethod
    def generate(cls) -> DeviceIdentity:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, raw: bytes) -> DeviceIdentity:
        """Rebuild from ``private_bytes``.

        Raises:
            ValueError: Not 32 bytes.
        """
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def private_bytes(self) -> bytes:
        """The 32 secret bytes, for a store that keeps them private."""
        return self._key.private_bytes_raw()

    def sign(self, method: str, path: str, body: bytes | bytearray | memoryview) -> dict[str, str]:
        """Headers that authenticate one request, never the same twice; see ``client_sdk.protocol.signing``."""
        nonce = secrets.token_hex(16)
        return sign_request(self._key, self.device_id, method, path, memoryview(body), nonce=nonce)

    def report_id(self, assignment_id: str) -> str:
        """The one report id of an assignment: 128 bits, hex.

        Random to everyone without the key (Ed25519 signatures are deterministic), yet the same after the device lost
        its session: it can never send two reports with two ids for one assignment.
        """
        return hashlib.sha256(self._key.sign(_REPORT_DOMAIN + assignment_id.encode("ascii"))).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"DeviceIdentity({self.device_id})"
