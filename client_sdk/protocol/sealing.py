"""Sealing: what only one aggregator may read, on its way through others' hands.

HPKE [RFC 9180] in base mode with HKDF-SHA256 and AES-256-GCM, one message per encapsulation. Everything that a
ciphertext is about goes into HPKE's ``info``: a share opens only for the task, assignment, device, model, terms and
aggregator that it was made for, so a relay can neither swap nor replay nor rename it. Who sealed, HPKE does not say: a
signature must.

A ciphertext is the encapsulated key, then the sealed bytes, then a tag of 16 bytes; its length says nothing but the
plaintext's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from client_sdk.protocol.errors import InvalidSealingKey, SealingFailed

Buffer = bytes | bytearray | memoryview

_TAG_BYTES: Final = 16
_X25519_BYTES: Final = 32
_MLKEM768_PUBLIC_BYTES: Final = 1184
_MLKEM768_SEED_BYTES: Final = 64
_LENGTH_BYTES: Final = 4
_INTEGER_BYTES: Final = 8


class SealingSuite(StrEnum):
    """How the key of a ciphertext is agreed on."""

    X25519 = "x25519"
    """Elliptic curve: 48 bytes more than the plaintext. Does not outlast a quantum computer."""

    MLKEM768_X25519 = "mlkem768-x25519"
    """Both ML-KEM-768 and X25519 would have to be broken: 1136 bytes more than the plaintext."""

    @property
    def public_key_bytes(self) -> int:
        """Length of a raw public key."""
        return _X25519_BYTES if self is SealingSuite.X25519 else _MLKEM768_PUBLIC_BYTES + _X25519_BYTES

    @property
    def private_key_bytes(self) -> int:
        """Length of a raw private key."""
        return _X25519_BYTES if self is SealingSuite.X25519 else _MLKEM768_SEED_BYTES + _X25519_BYTES

    @property
    def overhead(self) -> int:
        """By how many bytes a ciphertext is longer than its plaintext."""
        return _KEMS[self].enc_length() + _TAG_BYTES


_KEMS: Mapping[SealingSuite, KEM] = MappingProxyType(
    {SealingSuite.X25519: KEM.X25519, SealingSuite.MLKEM768_X25519: KEM.MLKEM768_X25519}
)
_HPKE: Mapping[SealingSuite, Suite] = MappingProxyType(
    {suite: Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM) for suite, kem in _KEMS.items()}
)


@dataclass(frozen=True)
class SealingPublicKey:
    """To whom something is sealed.

    Attributes:
        suite: The key's kind.
        raw: X25519: the 32 bytes of RFC 7748. ML-KEM hybrid: the 1184 bytes of FIPS 203, then those.

    Raises:
        InvalidSealingKey: Not a key of this suite.
    """

    suite: SealingSuite
    raw: bytes

    def __post_init__(self) -> None:
        self._loaded()

    @classmethod
    def from_hex(cls, suite: SealingSuite, text: str) -> Self:
        """Read ``hex``.

        Raises:
            InvalidSealingKey: Not a key of this suite.
        """
        try:
            return cls(suite, bytes.fromhex(text))
        except ValueError as e:
            raise InvalidSealingKey(f"a public key of {suite} is written in hex") from e

    @property
    def hex(self) -> str:
        """The raw bytes, in lower-case hex."""
        return self.raw.hex()

    def _loaded(self) -> X25519PublicKey | MLKEM768X25519PublicKey:
        expected = self.suite.public_key_bytes
        if len(self.raw) != expected:
            raise InvalidSealingKey(f"a public key of {self.suite} has {expected} bytes, not {len(self.raw)}")
        try:
            curve = X25519PublicKey.from_public_bytes(self.raw[-_X25519_BYTES:])
            if self.suite is SealingSuite.X25519:
                return curve
            lattice = MLKEM768PublicKey.from_public_bytes(self.raw[:_MLKEM768_PUBLIC_BYTES])
        except ValueError as e:
            raise InvalidSealingKey(f"the bytes are no public key of {self.suite}") from e
        return MLKEM768X25519PublicKey(lattice, curve)


class SealingKey:
    """An aggregator's private key. Its ``repr`` shows the suite and the public key's beginning only.

    Attributes:
        suite: The key's kind.
        public: What others seal to.
    """

    __slots__ = ("_curve", "_lattice", "public", "suite")

    def __init__(self, suite: SealingSuite, raw: bytes) -> None:
        """Rebuild from ``private_bytes``.

        Args:
            suite: The key's kind.
            raw: X25519: 32 bytes. ML-KEM hybrid: the 64-byte seed of FIPS 203 (d, then z), then those.

        Raises:
            InvalidSealingKey: Not a key of this suite.
        """
        if len(raw) != suite.private_key_bytes:
            raise InvalidSealingKey(f"a private key of {suite} has {suite.private_key_bytes} bytes, not {len(raw)}")
        self.suite = suite
        self._curve = X25519PrivateKey.from_private_bytes(raw[-_X25519_BYTES:])
        self._lattice: MLKEM768PrivateKey | None = None
        public = self._curve.public_key().public_bytes_raw()
        if suite is SealingSuite.MLKEM768_X25519:
            self._lattice = MLKEM768PrivateKey.from_seed_bytes(raw[:_MLKEM768_SEED_BYTES])
            public = self._lattice.public_key().public_bytes_raw() + public
        self.public = SealingPublicKey(suite, public)

    @classmethod
    def generate(cls, suite: SealingSuite = SealingSuite.X25519) -> Self:
        """A new key from the operating system's randomness."""
        raw = X25519PrivateKey.generate().private_bytes_raw()
        if suite is SealingSuite.MLKEM768_X25519:
            raw = MLKEM768PrivateKey.generate().private_bytes_raw() + raw
        return cls(suite, raw)

    def private_bytes(self) -> bytes:
        """The secret bytes, for a store that keeps them private."""
        lattice = b"" if self._lattice is None else self._lattice.private_bytes_raw()
        return lattice + self._curve.private_bytes_raw()

    def _loaded(self) -> X25519PrivateKey | MLKEM768X25519PrivateKey:
        return self._curve if self._lattice is None else MLKEM768X25519PrivateKey(self._lattice, self._curve)

    def __repr__(self) -> str:
        return f"SealingKey({self.suite}, public {self.public.hex[:16]}...)"


def seal(plaintext: Buffer, public: SealingPublicKey, info: bytes) -> bytes:
    """Encrypt for the holder of one key, bound to ``info``. Each call draws a new key: no two ciphertexts are alike.

    Args:
        plaintext: Any bytes.
        public: To whom.
        info: ``share_info`` or ``noise_info``.

    Returns:
        ``len(plaintext) + suite.overhead`` bytes.

    Raises:
        InvalidSealingKey: A curve point of low order, with which nothing can be agreed on.
    """
    try:
        return _HPKE[public.suite].encrypt(plaintext, public._loaded(), info=info)  # noqa: SLF001 - one module
    except ValueError as e:
        raise InvalidSealingKey(f"nothing can be sealed to this public key of {public.suite}") from e


def open(ciphertext: Buffer, key: SealingKey, info: bytes) -> bytes:  # noqa: A001 - called as sealing.open
    """Decrypt what was sealed to this key under this ``info``.

    Raises:
        SealingFailed: Anything is wrong: a bit flipped, bytes missing, another key, another ``info``. The error does
            not say what.
    """
    try:
        return _HPKE[key.suite].decrypt(ciphertext, key._loaded(), info=info)  # noqa: SLF001 - one module
    except (InvalidTag, ValueError):
        raise SealingFailed from None


# --- what a ciphertext is bound to -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharingTerms:
    """What a device was told of the sharing and of its privacy: ``SecurePlan.terms``.

    An aggregator makes the same value of what it accepts itself, and of the norms that it is told with the report. A
    device that was told anything else (another clip norm, less noise, a lower threshold, more participations) sealed a
    share that does not open.

    Attributes:
        field: Name of the prime field.
        threshold: t; t - 1 shares say nothing.
        num_aggregators: n.
        packing: Coordinates in one share.
        fraction_bits: f.
        clip_norm: C.
        indicator_norm: Of adaptive clipping; None without.
        noise_variance: Of the noise that the device adds to each code; None where it adds none.
        indicator_variance: Likewise of the indicator.
        max_participations: k: how often the device takes part in the task; None for no limit of its own.
    """

    field: str
    threshold: int
    num_aggregators: int
    packing: int
    fraction_bits: int
    clip_norm: float
    indicator_norm: float | None = None
    noise_variance: str | None = None
    indicator_variance: str | None = None
    max_participations: int | None = None

    def to_bytes(self) -> bytes:
        """The one encoding; see ``_encode``."""
        return _encode(
            self.field.encode(),
            _integer(self.threshold),
            _integer(self.num_aggregators),
            _integer(self.packing),
            _integer(self.fraction_bits),
            _real(self.clip_norm),
            b"" if self.indicator_norm is None else _real(self.indicator_norm),
            (self.noise_variance or "").encode(),
            (self.indicator_variance or "").encode(),
            b"" if self.max_participations is None else _integer(self.max_participations),
        )


def share_info(
    *,
    task_id: str,
    assignment_id: str,
    device_id: str,
    aggregator_index: int,
    model_version: int,
    parameter_table_sha256: str,
    terms: SharingTerms,
) -> bytes:
    """What a device's share is bound to.

    Args:
        task_id: The task.
        assignment_id: The assignment that the report answers.
        device_id: Whose update it is, by its own word. So reports of an honest device always count as one device's.
        aggregator_index: Whose share it is, from 1.
        model_version: Version that the device trained on.
        parameter_table_sha256: Order and shapes of the update.
        terms: What the device was told.
    """
    return _encode(
        b"pocketfed share v1",
        task_id.encode(),
        assignment_id.encode(),
        device_id.encode(),
        _integer(aggregator_index),
        _integer(model_version),
        parameter_table_sha256.encode(),
        terms.to_bytes(),
    )


def noise_info(
    *,
    task_id: str,
    round_id: int,
    run: int,
    contributors: Iterable[int],
    set_sha256: str,
    sender: int,
    receiver: int,
) -> bytes:
    """What an aggregator's share of noise is bound to.

    Args:
        task_id: The task.
        round_id: The round.
        run: How often the phase was begun.
        contributors: Indices of the aggregators that add noise, in any order.
        set_sha256: Hash of the accepted set.
        sender: Index of the aggregator whose noise it is.
        receiver: Index of the aggregator that it is for.
    """
    return _encode(
        b"pocketfed noise v1",
        task_id.encode(),
        _integer(round_id),
        _integer(run),
        b"".join(map(_integer, sorted(set(contributors)))),
        set_sha256.encode(),
        _integer(sender),
        _integer(receiver),
    )


def _encode(*fields: bytes) -> bytes:
    """Each field after its length, four bytes little-endian: no two lists of fields have one encoding."""
    return b"".join(len(field).to_bytes(_LENGTH_BYTES, "little") + field for field in fields)


def _integer(value: int) -> bytes:
    return value.to_bytes(_INTEGER_BYTES, "little")


def _real(value: float) -> bytes:
    """The eight bytes of a double, so that no decimal notation matters."""
    return struct.pack("<d", value)
