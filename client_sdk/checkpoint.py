"""Training that survives its process: the folder of its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from client_sdk.checkpoint_content import Checkpoint, CheckpointBinding, data_fingerprint
from client_sdk.checkpoint_file import CheckpointKey
from client_sdk.errors import CheckpointError, CheckpointMismatch
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.generations import FolderOptions, GenerationFolder
from client_sdk.protocol.errors import ConfigurationError

__all__ = ["Checkpoint", "CheckpointBinding", "CheckpointFile", "CheckpointManager", "data_fingerprint"]

DEFAULT_MAX_BYTES: Final = 256 * 2**20
_SUBFOLDER = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a folder of checkpoints.

    Attributes:
        path: Where it is.
        size: Bytes.
        problem: Why it cannot be used; None where it can.
        binding: Whose it is, where it can be read.
    """

    path: Path
    size: int
    problem: CheckpointError | None
    binding: CheckpointBinding | None


class CheckpointManager:
    """Checkpoints of one device, in a folder: the newest generations, each a file of its own.

    Guarantees: those of ``GenerationFolder``, whatever happens and at any instant.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        key: bytes | CheckpointKey | None = None,
        keep: int = 2,
        max_bytes: int = DEFAULT_MAX_BYTES,
        files: FileLayer = OS_FILES,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Use a folder, which is made with the first save.

        Args:
            folder: The folder, of nothing but checkpoints.
            key: 32 bytes, from the system's key store, that encrypt and authenticate the files; None for plain ones.
                Plain files of before are removed, those of another key are not.
            keep: Generations to keep, at least 1. Of more than one, an older serves where the newest was damaged.
            max_bytes: Size of a file, to write and to read.
            files: Where it is written.
            random_bytes: Source of nonces.

        Raises:
            ConfigurationError: A key that has not 32 bytes, or nothing to keep.
        """
        secret = CheckpointKey(key) if isinstance(key, bytes) else key
        self._options = FolderOptions(secret, keep, max_bytes, files, random_bytes)
        self._folder = GenerationFolder(Path(folder), "ckpt", "the checkpoints", self._options)

    def within(self, name: str) -> Self:
        """The same, for another kind of training of the device: neither displaces, or clears, the other's.

        Args:
            name: Of a folder inside this one: lower case, digits, ``_`` and ``-``, a letter first.

        Raises:
            ConfigurationError: Not such a name.
        """
        if not _SUBFOLDER.fullmatch(name):
            raise ConfigurationError(f"{name!r} does not name a folder of checkpoints; choose one like 'local'")
        return type(self)(self._folder.path / name, **vars(self._options))

    def has_checkpoint(self) -> bool:
        """Whether there is a file to load; whether it serves, ``load`` says.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """
        return bool(self._folder.saved())

    def save(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint durable before this returns; then let the oldest go.

        Raises:
            CheckpointTooLarge: It would be larger than ``max_bytes``; nothing was written.
            StateDirUnusable: It could not be written; those that were there are there.
        """
        self._folder.save(checkpoint.to_bytes())

    def load(self, binding: CheckpointBinding) -> Checkpoint | None:
        """The newest good checkpoint of this very training; None where there is none.

        Damaged files are set aside, where they are in nobody's way; those of another training, key or version, and
        those that the system cannot read, are left alone until newer generations displace them. An older generation
        then serves.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """

        def parse(path: Path) -> Checkpoint:
            checkpoint = self.read(path)
            if differing := binding.differences(checkpoint.binding):
                raise CheckpointMismatch(differing)
            return checkpoint

        return self._folder.newest(parse)

    def read(self, path: Path) -> Checkpoint:
        """One file, whosever it is.

        Raises:
            CheckpointError: The subclass says why it cannot be used.
            StateDirUnusable: The system cannot read it.
        """
        return Checkpoint.from_bytes(self._folder.read(path), self._options.max_bytes)

    def inspect(self) -> list[CheckpointFile]:
        """Every generation, newest first, and why it cannot be used; changes nothing."""
        found = []
        for generation in self._folder.saved():
            path = self._folder.file(generation)
            problem, binding = None, None
            try:
                binding = self.read(path).binding
            except CheckpointError as e:
                problem = e
            found.append(CheckpointFile(path, self._folder.size(path), problem, binding))
        return found

    def clear(self) -> None:
        """Forget all checkpoints, also what was set aside; repeating it is harmless.

        Raises:
            StateDirUnusable: They could not be removed.
        """
        self._folder.clear()
