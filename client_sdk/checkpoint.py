"""Training that survives its process: the folder of its checkpoints."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from client_sdk.atomic import is_leftover, is_set_aside, set_aside, write_atomically
from client_sdk.checkpoint_content import Checkpoint, CheckpointBinding, data_fingerprint
from client_sdk.checkpoint_file import CheckpointKey, is_plain, pack, packed_size, unpack
from client_sdk.errors import (
    CheckpointCorrupted,
    CheckpointError,
    CheckpointMismatch,
    CheckpointTooLarge,
    CheckpointTruncated,
    StateDirUnusable,
)
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.protocol.errors import ConfigurationError

__all__ = ["Checkpoint", "CheckpointBinding", "CheckpointFile", "CheckpointManager", "data_fingerprint"]

_log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES: Final = 256 * 2**20
_MAX_SET_ASIDE = 2
_NAME = re.compile(r"([0-9]{12,18})\.ckpt")
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

    Guarantees: a process that dies at any instant, or a power cut, leaves the checkpoint that was saved last, or the
    one before where the last save had not returned. The folder holds at most ``keep`` generations (one more while one
    is written), two files that were set aside and one temporary file, each at most ``max_bytes``. With a key, none of
    them is in plain text after the first ``load`` or ``save``. One process uses it at a time.
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
        if keep < 1:
            raise ConfigurationError(f"keep must be at least 1, got {keep}")
        self._folder = Path(folder)
        self._key = CheckpointKey(key) if isinstance(key, bytes) else key
        self._keep = keep
        self._max_bytes = max_bytes
        self._files = files
        self._random_bytes = random_bytes
        self._plain_is_gone = key is None

    def within(self, name: str) -> Self:
        """The same, for another kind of training of the device: neither displaces, or clears, the other's.

        Args:
            name: Of a folder inside this one: lower case, digits, ``_`` and ``-``, a letter first.

        Raises:
            ConfigurationError: Not such a name.
        """
        if not _SUBFOLDER.fullmatch(name):
            raise ConfigurationError(f"{name!r} does not name a folder of checkpoints; choose one like 'local'")
        return type(self)(
            self._folder / name,
            key=self._key,
            keep=self._keep,
            max_bytes=self._max_bytes,
            files=self._files,
            random_bytes=self._random_bytes,
        )

    def has_checkpoint(self) -> bool:
        """Whether there is a file to load; whether it serves, ``load`` says.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """
        with self._usable("read"):
            return bool(self._generations())

    def save(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint durable before this returns; then let the oldest go.

        Raises:
            CheckpointTooLarge: It would be larger than ``max_bytes``; nothing was written.
            StateDirUnusable: It could not be written; those that were there are there.
        """
        self._remove_plain()
        generations = self._saved()
        generation = generations[0] + 1 if generations else 1
        payload = checkpoint.to_bytes()
        size = packed_size(len(payload), self._key)
        if size > self._max_bytes:
            raise CheckpointTooLarge(f"the checkpoint has {size} bytes; at most {self._max_bytes} are kept")
        parts = pack(payload, generation, self._key, self._random_bytes)
        with self._usable("save"):
            for folder in (self._folder.parent, self._folder):
                self._files.make_folder(folder)
            write_atomically(self._path(generation), *parts, files=self._files)
            self._prune()

    def load(self, binding: CheckpointBinding) -> Checkpoint | None:
        """The newest good checkpoint of this very training; None where there is none.

        Damaged files are set aside, where they are in nobody's way; those of another training, key or version, and
        those that the system cannot read, are left alone until newer generations displace them. An older generation
        then serves.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """
        self._remove_plain()
        for generation in self._saved():
            path = self._path(generation)
            try:
                checkpoint = self.read(path)
                if differing := binding.differences(checkpoint.binding):
                    raise CheckpointMismatch(differing)
            except (CheckpointCorrupted, CheckpointTruncated) as e:
                self._set_aside(path, e)
            except CheckpointError as e:
                _log.info("%s does not serve: %s", path, e)
            except StateDirUnusable as e:
                _log.warning("%s does not serve: %s", path, e)
            else:
                return checkpoint
        return None

    def read(self, path: Path) -> Checkpoint:
        """One file, whosever it is.

        Raises:
            CheckpointError: The subclass says why it cannot be used.
            StateDirUnusable: The system cannot read it.
        """
        with self._usable("read"):
            status = self._files.status(path)
            if status is not None and status.size > self._max_bytes:
                raise CheckpointTooLarge(f"{path.name} has {status.size} bytes; at most {self._max_bytes} are read")
            data = self._files.read(path)
        unpacked = unpack(data, self._key, self._max_bytes)
        if path.name != self._path(unpacked.generation).name:
            raise CheckpointCorrupted(f"it holds generation {unpacked.generation}, which is not its name")
        return Checkpoint.from_bytes(unpacked.payload, self._max_bytes)

    def inspect(self) -> list[CheckpointFile]:
        """Every generation, newest first, and why it cannot be used; changes nothing."""
        found = []
        for generation in self._saved():
            path = self._path(generation)
            problem, binding = None, None
            try:
                binding = self.read(path).binding
            except CheckpointError as e:
                problem = e
            status = self._files.status(path)
            found.append(CheckpointFile(path, 0 if status is None else status.size, problem, binding))
        return found

    def clear(self) -> None:
        """Forget all checkpoints, also what was set aside; repeating it is harmless.

        Raises:
            StateDirUnusable: They could not be removed.
        """
        with self._usable("clear"):
            names = [n for n in self._files.names(self._folder) if self._is_ours(n)]
            for name in names:
                self._files.unlink(self._folder / name)
            if names:
                self._files.sync_folder(self._folder)

    def _saved(self) -> list[int]:
        with self._usable("read"):
            return self._generations()

    def _generations(self) -> list[int]:
        """Newest first."""
        found = (_NAME.fullmatch(name) for name in self._files.names(self._folder))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _prune(self) -> None:
        """Remove what is beyond the bounds; whether it stays removed after a power cut does not matter."""
        for generation in self._generations()[self._keep :]:
            self._files.unlink(self._path(generation))
        names = sorted(filter(self._is_ours, self._files.names(self._folder)), reverse=True)
        for name in [n for n in names if is_leftover(n)] + [n for n in names if is_set_aside(n)][_MAX_SET_ASIDE:]:
            self._files.unlink(self._folder / name)

    def _set_aside(self, path: Path, problem: CheckpointError) -> None:
        """Keep a damaged file out of the way; where that fails it is in the way of nothing but a generation."""
        try:
            set_aside(path, str(problem), files=self._files)
            self._prune()
        except OSError as e:
            _log.warning("%s is damaged (%s) and cannot be set aside: %s", path, problem, e)

    def _remove_plain(self) -> None:
        """Once a key is given, no weights stay readable: also those of damaged and half-written files."""
        if self._plain_is_gone:
            return
        with self._usable("read"):
            names = [n for n in self._files.names(self._folder) if self._is_ours(n)]
        self._plain_is_gone = True
        removed = 0
        try:
            for path in [self._folder / name for name in names]:
                status = self._files.status(path)
                if status is not None and status.size <= self._max_bytes and is_plain(self._files.read(path)):
                    self._files.unlink(path)
                    removed += 1
            if removed:
                self._files.sync_folder(self._folder)
                _log.info("removed %d checkpoints that were not encrypted from %s", removed, self._folder)
        except OSError as e:
            self._plain_is_gone = False  # tried again with the next load or save
            _log.warning("checkpoints in %s may not be encrypted, and could not be removed: %s", self._folder, e)

    @staticmethod
    def _is_ours(name: str) -> bool:
        return _NAME.fullmatch(name) is not None or is_leftover(name) or is_set_aside(name)

    def _path(self, generation: int) -> Path:
        return self._folder / f"{generation:012d}.ckpt"

    @contextmanager
    def _usable(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise StateDirUnusable(
                f"cannot {verb} the checkpoints in {self._folder}: {e.strerror or e}; "
                "free space there or choose another folder"
            ) from e
