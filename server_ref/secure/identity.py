"""Who is who: an aggregator's keys, its peers' pinned keys, and its whole configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, model_validator

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Message, SigningKeyHex
from client_sdk.protocol.sealing import SealingKey, SealingPublicKey, SealingSuite
from server_ref.secure.messages import Index, SealingKeyHex, TaskBinding
from server_ref.secure.parameters import PinnedParameters


class Signable(Protocol):
    """A message that carries a signature over the rest of it."""

    def signed_bytes(self) -> bytes:
        """What the signature is taken over."""
        ...

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """As pydantic's."""
        ...


S = TypeVar("S", bound=Signable)


class SigningKey:
    """An Ed25519 private key. Its ``repr`` shows the public key's beginning only.

    Attributes:
        public: The public key, hex.
    """

    __slots__ = ("_key", "public")

    def __init__(self, raw: bytes) -> None:
        """Rebuild from ``private_bytes``.

        Raises:
            ConfigurationError: Not 32 bytes.
        """
        if len(raw) != 32:
            raise ConfigurationError(f"an Ed25519 private key has 32 bytes, not {len(raw)}")
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = self._key.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Self:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def private_bytes(self) -> bytes:
        """The secret bytes, for a store that keeps them private."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> str:
        """Signature, hex; the same for the same message."""
        return self._key.sign(message).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public {self.public[:16]}...)"


@dataclass(frozen=True)
class AggregatorKeys:
    """An aggregator's two private keys."""

    signing: SigningKey
    sealing: SealingKey

    @classmethod
    def generate(cls, suite: SealingSuite = SealingSuite.X25519) -> Self:
        """New keys from the operating system's randomness."""
        return cls(SigningKey.generate(), SealingKey.generate(suite))

    def sign(self, message: S) -> S:
        """The message with this aggregator's signature in its place."""
        return message.model_copy(update={"signature": self.signing.sign(message.signed_bytes())})

    @property
    def public(self) -> PeerKeys:
        """What the others pin."""
        return PeerKeys(signing_key=self.signing.public, sealing_key=self.sealing.public.hex)


class PeerKeys(Message):
    """The public keys of one aggregator, as the others pin them."""

    signing_key: SigningKeyHex
    sealing_key: SealingKeyHex


class AggregatorConfig(Message):
    """All that an aggregator takes from its own operator and from nobody else.

    Attributes:
        index: Whose configuration it is.
        parameters: What it insists on.
        suite: How everything is sealed.
        peers: Keys of all aggregators, its own included, in order of their indices.
        task: The task to serve; None to serve the first that it is bound to.
        keep_rounds: For so many rounds answers, and reports that no set named, are kept.
    """

    index: Index
    parameters: PinnedParameters
    suite: SealingSuite = SealingSuite.X25519
    peers: tuple[PeerKeys, ...]
    task: TaskBinding | None = None
    keep_rounds: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = self.parameters.num_aggregators
        if len(self.peers) != n:
            raise ValueError(f"keys of {n} aggregators are pinned, not of {len(self.peers)}")
        if self.index > n:
            raise ValueError(f"there is no aggregator {self.index} among {n}")
        for name in ("signing_key", "sealing_key"):
            if len({getattr(peer, name) for peer in self.peers}) < n:
                raise ValueError(f"two aggregators have one {name}, so that one party would be two")
        try:
            _ = self.parameters.bounds, [self.sealing_key(i) for i in range(1, n + 1)]
        except ConfigurationError as e:
            raise ValueError(str(e)) from e
        return self

    def sealing_key(self, index: int) -> SealingPublicKey:
        """The pinned sealing key of an aggregator."""
        return SealingPublicKey.from_hex(self.suite, self.peers[index - 1].sealing_key)

    def signed(self, index: int, message: bytes, signature: str) -> bool:
        """Whether this aggregator's pinned key made the signature (hex); False for an index that does not exist."""
        return signed_by(self.peers, index, message, signature)


def signed_by(peers: Sequence[PeerKeys], index: int, message: bytes, signature: str) -> bool:
    """Whether the key that is pinned for an aggregator made the signature (hex); False if there is no such index."""
    if not 1 <= index <= len(peers):
        return False
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(peers[index - 1].signing_key))
    try:
        key.verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        return False
    return True
