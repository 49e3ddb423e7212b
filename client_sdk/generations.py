"""A folder of what a device must not lose: each save a file of its own, sealed as ``checkpoint_file`` says.

What the files hold, and whose it is, the caller knows: ``CheckpointManager`` of trainings under way,
``PersonalModelStore`` of the device's own model.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from client_sdk.atomic import is_leftover, is_set_aside, set_aside, write_atomically
from client_sdk.checkpoint_file import Buffer, CheckpointKey, is_plain, pack, packed_size, unpack
from client_sdk.errors import (
    CheckpointCorrupted,
    CheckpointError,
    CheckpointKeyError,
    CheckpointTooLarge,
    CheckpointTruncated,
    StateDirUnusable,
)
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.protocol.errors import ConfigurationError

_log = logging.getLogger(__name__)

_MAX_SET_ASIDE = 2

T = TypeVar("T")


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is kept.

    Attributes:
        key: Encrypts and authenticates the files; None for plain ones.
        keep: Generations that stay.
        max_bytes: Size of a file, to write and to read.
        files: Where it is written.
        random_bytes: Source of nonces.
    """

    key: CheckpointKey | None = None
    keep: int = 2
    max_bytes: int = 256 * 2**20
    files: FileLayer = OS_FILES
    random_bytes: Callable[[int], bytes] = os.urandom

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigurationError(f"keep must be at least 1, got {self.keep}")


class GenerationFolder:
    """The newest generations of one thing, each a file of its own.

    Guarantees: a process that dies at any instant, or a power cut, leaves the generation that was saved last, or the
    one before where the last save had not returned. The folder holds at most ``keep`` generations (one more while one
    is written), two files that were set aside and one temporary file, each at most ``max_bytes``. With a key, none of
    them is in plain text after the first ``payloads`` or ``save``. One process uses it at a time.
    """

    def __init__(self, folder: Path, suffix: str, what: str, options: FolderOptions) -> None:
        """Use a folder, which is made with the first save.

        Args:
            folder: The folder, of nothing else.
            suffix: Of the files' names, without the dot.
            what: The files, for messages: "the checkpoints".
            options: How it is kept.
        """
        self.path: Final = folder
        self.options: Final = options
        self._suffix = suffix
        self._name = re.compile(rf"([0-9]{{12,18}})\.{suffix}")
        self._what = what
        self._files = options.files
        self._plain_is_gone = options.key is None

    def saved(self) -> list[int]:
        """The generations that are there, newest first; whether they serve, their reading says.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """
        with self._usable("read"):
            return self._generations()

    def save(self, payload: Buffer) -> int:
        """Make a generation durable before this returns; then let the oldest go.

        Returns:
            Its number.

        Raises:
            CheckpointTooLarge: It would be larger than ``max_bytes``; nothing was written.
            StateDirUnusable: It could not be written; those that were there are there.
        """
        self._remove_plain()
        generations = self.saved()
        generation = generations[0] + 1 if generations else 1
        options = self.options
        size = packed_size(len(payload), options.key)
        if size > options.max_bytes:
            raise CheckpointTooLarge(f"the checkpoint has {size} bytes; at most {options.max_bytes} are kept")
        parts = pack(payload, generation, options.key, options.random_bytes)
        with self._usable("save"):
            for folder in (self.path.parent, self.path):
                self._files.make_folder(folder)
            write_atomically(self.file(generation), *parts, files=self._files)
            self._prune()
        return generation

    def newest(self, parse: Callable[[Path], T]) -> T | None:
        """What the newest generation that serves is parsed to; None where none serves.

        Damaged files are set aside, where they are in nobody's way; those of another owner, key or version, and those
        that the system cannot read, are left alone until newer generations displace them. An older generation then
        serves.

        Args:
            parse: Reads a file, by ``read``; raises a ``CheckpointError`` where it does not serve.

        Raises:
            StateDirUnusable: The folder cannot be read.
        """
        self._remove_plain()
        for generation in self.saved():
            path = self.file(generation)
            try:
                return parse(path)
            except (CheckpointCorrupted, CheckpointTruncated) as e:
                self._set_aside(path, e)
            except CheckpointError as e:
                _log.info("%s does not serve: %s", path, e)
            except StateDirUnusable as e:
                _log.warning("%s does not serve: %s", path, e)
        return None

    def check_key(self) -> None:
        """Ask whether what is there was written with this key; with one, plain files are removed first.

        Raises:
            CheckpointKeyError: A file was written with another key, or with one where none is given now.
            StateDirUnusable: The folder cannot be read.
        """
        self._remove_plain()
        for generation in self.saved():
            path = self.file(generation)
            try:
                self.read(path)
            except CheckpointKeyError as e:
                raise CheckpointKeyError(
                    f"{self._what} in {self.path} have another key than the one given now ({path.name}: {e}); "
                    "give that key, or clear the folder on purpose"
                ) from e
            except (CheckpointError, StateDirUnusable):
                continue  # of what does not serve at all, its reading says why

    def read(self, path: Path) -> Buffer:
        """The content of one file.

        Raises:
            CheckpointError: The subclass says why it cannot be used.
            StateDirUnusable: The system cannot read it.
        """
        largest = self.options.max_bytes
        with self._usable("read"):
            status = self._files.status(path)
            if status is not None and status.size > largest:
                raise CheckpointTooLarge(f"{path.name} has {status.size} bytes; at most {largest} are read")
            data = self._files.read(path)
        unpacked = unpack(data, self.options.key, largest)
        if path.name != self.file(unpacked.generation).name:
            raise CheckpointCorrupted(f"it holds generation {unpacked.generation}, which is not its name")
        return unpacked.payload

    def size(self, path: Path) -> int:
        """Bytes of a file; 0 where there is none."""
        status = self._files.status(path)
        return 0 if status is None else status.size

    def clear(self) -> None:
        """Forget all generations, also what was set aside; repeating it is harmless.

        Raises:
            StateDirUnusable: They could not be removed.
        """
        with self._usable("clear"):
            names = [n for n in self._files.names(self.path) if self._is_ours(n)]
            for name in names:
                self._files.unlink(self.path / name)
            if names:
                self._files.sync_folder(self.path)

    def file(self, generation: int) -> Path:
        """Where a generation is."""
        return self.path / f"{generation:012d}.{self._suffix}"

    def _generations(self) -> list[int]:
        found = (self._name.fullmatch(name) for name in self._files.names(self.path))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _prune(self) -> None:
        """Remove what is beyond the bounds; whether it stays removed after a power cut does not matter."""
        for generation in self._generations()[self.options.keep :]:
            self._files.unlink(self.file(generation))
        names = sorted(filter(self._is_ours, self._files.names(self.path)), reverse=True)
        for name in [n for n in names if is_leftover(n)] + [n for n in names if is_set_aside(n)][_MAX_SET_ASIDE:]:
            self._files.unlink(self.path / name)

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
            names = [n for n in self._files.names(self.path) if self._is_ours(n)]
        self._plain_is_gone = True
        removed = 0
        try:
            for path in [self.path / name for name in names]:
                status = self._files.status(path)
                small = status is not None and status.size <= self.options.max_bytes
                if small and is_plain(self._files.read(path)):
                    self._files.unlink(path)
                    removed += 1
            if removed:
                self._files.sync_folder(self.path)
                _log.info("removed %d files that were not encrypted from %s", removed, self.path)
        except OSError as e:
            self._plain_is_gone = False  # tried again with the next load or save
            _log.warning("%s in %s may not be encrypted, and could not be removed: %s", self._what, self.path, e)

    def _is_ours(self, name: str) -> bool:
        return self._name.fullmatch(name) is not None or is_leftover(name) or is_set_aside(name)

    @contextmanager
    def _usable(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise StateDirUnusable(
                f"cannot {verb} {self._what} in {self.path}: {e.strerror or e}; "
                "free space there or choose another folder"
            ) from e
