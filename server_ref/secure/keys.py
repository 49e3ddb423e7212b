"""Key files: private ones that nobody else can read and nothing overwrites, and the public parts that are exchanged."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import MAX_AGGREGATORS, Message, SigningKeyHex
from client_sdk.protocol.sealing import SealingKey, SealingPublicKey, SealingSuite
from server_ref.secure.identity import AggregatorKeys, PeerKeys, SigningKey
from server_ref.secure.messages import Index, SealingKeyHex

M = TypeVar("M", bound=Message)


class PublicPart(Message):
    """What an aggregator's operator hands to everybody else."""

    index: Index
    suite: SealingSuite
    signing_key: SigningKeyHex
    sealing_key: SealingKeyHex


class Peers(Message):
    """The public keys of all aggregators, in order of their indices: one file, the same for all parties."""

    suite: SealingSuite
    peers: tuple[PeerKeys, ...] = Field(min_length=2, max_length=MAX_AGGREGATORS)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for name in ("signing_key", "sealing_key"):
            if len({getattr(peer, name) for peer in self.peers}) < len(self.peers):
                raise ValueError(f"two aggregators have one {name}, so that one party would be two")
        try:
            for peer in self.peers:
                SealingPublicKey.from_hex(self.suite, peer.sealing_key)
        except ConfigurationError as e:
            raise ValueError(str(e)) from e
        return self

    @classmethod
    def of(cls, parts: Sequence[PublicPart]) -> Self:
        """Assemble the parts, in any order.

        Raises:
            ConfigurationError: An index is missing or comes twice, the suites differ, or two parts have one key.
        """
        indices = sorted(part.index for part in parts)
        if indices != list(range(1, len(parts) + 1)):
            raise ConfigurationError(f"the parts are of aggregators {indices}; give one part of each, from 1 on")
        suites = {part.suite for part in parts}
        if len(suites) > 1:
            raise ConfigurationError(f"the aggregators use different suites: {', '.join(sorted(suites))}")
        ordered = sorted(parts, key=lambda part: part.index)
        keys = [PeerKeys(signing_key=part.signing_key, sealing_key=part.sealing_key) for part in ordered]
        try:
            return cls(suite=ordered[0].suite, peers=tuple(keys))
        except ValidationError as e:
            raise ConfigurationError("; ".join(str(problem["msg"]) for problem in e.errors())) from e

    def fingerprint(self) -> str:
        """A short name of exactly these keys, for the parties to compare over another channel."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]
        return " ".join(digest[at : at + 4] for at in range(0, len(digest), 4))


class _PrivateKeys(Message):
    """An aggregator's key file. Secret."""

    index: Index
    suite: SealingSuite
    signing_key: str = Field(repr=False)
    sealing_key: str = Field(repr=False)


class _CoordinatorKey(Message):
    """The coordinator's key file. Secret."""

    coordinator_signing_key: str = Field(repr=False)


def create_keys(path: Path, index: int, suite: SealingSuite) -> tuple[PublicPart, bool]:
    """Make an aggregator's keys, unless the file has them already.

    Args:
        path: The key file, readable by its owner only.
        index: Whose.
        suite: How everything is sealed.

    Returns:
        The public part, and whether the keys are new.

    Raises:
        ConfigurationError: The file cannot be written, or holds something else or another aggregator's keys.
    """
    keys = AggregatorKeys.generate(suite)
    content = _PrivateKeys(
        index=index,
        suite=suite,
        signing_key=keys.signing.private_bytes().hex(),
        sealing_key=keys.sealing.private_bytes().hex(),
    )
    created = write_secret(path, content)
    return public_part(load_keys(path, index, suite), index), created


def load_keys(path: Path, index: int, suite: SealingSuite) -> AggregatorKeys:
    """Read an aggregator's keys.

    Raises:
        ConfigurationError: No such file, others can read it, or it is not this aggregator's.
    """
    found = read_secret(path, _PrivateKeys)
    if (found.index, found.suite) != (index, suite):
        raise ConfigurationError(
            f"{path} has the keys of aggregator {found.index} for {found.suite}, not {index}, {suite}"
        )
    try:
        signing, sealing = bytes.fromhex(found.signing_key), bytes.fromhex(found.sealing_key)
    except ValueError:
        raise ConfigurationError(f"{path} is damaged") from None
    return AggregatorKeys(SigningKey(signing), SealingKey(suite, sealing))


def public_part(keys: AggregatorKeys, index: int) -> PublicPart:
    """What may be shown of these keys."""
    public = keys.public
    return PublicPart(
        index=index, suite=keys.sealing.suite, signing_key=public.signing_key, sealing_key=public.sealing_key
    )


def create_coordinator_key(path: Path) -> tuple[SigningKey, bool]:
    """The coordinator's signing key: read, or made if there is none.

    Returns:
        The key, and whether it is new.

    Raises:
        ConfigurationError: As ``create_keys``.
    """
    created = write_secret(path, _CoordinatorKey(coordinator_signing_key=SigningKey.generate().private_bytes().hex()))
    found = read_secret(path, _CoordinatorKey)
    try:
        return SigningKey(bytes.fromhex(found.coordinator_signing_key)), created
    except ValueError:
        raise ConfigurationError(f"{path} is damaged") from None


def read_public(path: Path, model: type[M]) -> M:
    """Read a ``PublicPart`` or the ``Peers``.

    Raises:
        ConfigurationError: No such file, or not that.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as e:
        raise ConfigurationError(f"cannot read {path}: {e.strerror or e}") from e
    except ValidationError as e:
        raise ConfigurationError(f"{path}: {'; '.join(str(problem['msg']) for problem in e.errors()[:3])}") from e


def write_secret(path: Path, content: Message) -> bool:
    """Write a file that did not exist, for its owner only, whole or not at all; False if it exists.

    Raises:
        ConfigurationError: The folder cannot be made, or the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.model_dump_json().encode())
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, it never replaces anything
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as e:
        raise ConfigurationError(f"cannot write {path}: {e.strerror or e}") from e
    return True


def read_secret(path: Path, model: type[M]) -> M:
    """Read what ``write_secret`` wrote.

    Raises:
        ConfigurationError: It cannot be read, others can read it too, or it is no such file. Never quotes the file.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as e:
        raise ConfigurationError(f"cannot read {path}: {e.strerror or e}") from e
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigurationError(f"others can read {path}: chmod 600 {path}")
    try:
        return model.model_validate_json(data)
    except ValidationError:
        # The error would quote the file.
        raise ConfigurationError(f"{path} is no key file of this kind") from None
