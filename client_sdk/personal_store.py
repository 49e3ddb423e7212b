"""The personal models of a device on its disk: atomic, versioned, encrypted by option, and never mixed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client_sdk.checkpoint_file import CheckpointKey
from client_sdk.errors import CheckpointError, PersonalModelMismatch
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.generations import FolderOptions, GenerationFolder
from client_sdk.personal_model import PersonalModel
from client_sdk.personalization import PersonalRecord
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Manifest

PERSONAL_FOLDER: Final = "personal"
"""Where they are in a state directory."""
DEFAULT_MAX_BYTES: Final = 256 * 2**20


@dataclass(frozen=True)
class PersonalVersion:
    """One file of the folder.

    Attributes:
        generation: Number of the save, ascending.
        size: Bytes.
        problem: Why it cannot be used; None where it can.
        record: Where the model comes from, where it can be read.
    """

    generation: int
    size: int
    problem: CheckpointError | None
    record: PersonalRecord | None


class PersonalModelStore:
    """Personal models of one device, in a folder: the newest generations, each a file of its own.

    Guarantees: those of ``GenerationFolder``: a process that dies at any instant leaves the model that was saved last,
    or the one before where the last save had not returned. A model is never served to another program than the one it
    was adapted for. One process uses the folder at a time.
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
            folder: The folder, of nothing but personal models.
            key: 32 bytes, from the system's key store, that encrypt and authenticate the files; None for plain ones.
                Plain files of before are removed, those of another key are not.
            keep: Models to keep, at least 1: the others can be rolled back to. Each takes 8 bytes a parameter.
            max_bytes: Size of a file, to write and to read.
            files: Where it is written.
            random_bytes: Source of nonces.

        Raises:
            ConfigurationError: A key that has not 32 bytes, or nothing to keep.
        """
        secret = CheckpointKey(key) if isinstance(key, bytes) else key
        self._options = FolderOptions(secret, keep, max_bytes, files, random_bytes)
        self._folder = GenerationFolder(Path(folder), "model", "the personal models", self._options)

    def save(self, model: PersonalModel) -> int:
        """Make a model durable before this returns; then let the oldest go.

        Returns:
            Its generation.

        Raises:
            CheckpointKeyError: A model of another key is there, or an encrypted one where no key is given: give its
                key, or ``clear`` the store on purpose. Nothing was written, and it stays.
            CheckpointTooLarge: It would be larger than ``max_bytes``; nothing was written.
            StateDirUnusable: It could not be written; those that were there are there.
        """
        self._folder.check_key()
        return self._folder.save(model.to_bytes())

    def load(self, manifest: Manifest) -> PersonalModel | None:
        """The newest good model of this very program; None where there is none.

        Damaged files are set aside (``*.damaged``); those of another program or format are left alone until newer
        models displace them, those of another key for good.

        Raises:
            CheckpointKeyError: None serves, and one was written with another key, or with one where none is given.
            StateDirUnusable: The folder cannot be read.
        """

        def parse(path: Path) -> PersonalModel:
            model = self._read(path)
            if not model.is_of(manifest):
                raise PersonalModelMismatch(model.record.program_sha256)
            return model

        return self._newest(parse)

    def newest(self) -> PersonalModel | None:
        """The newest good model, whichever program it is of.

        Raises:
            CheckpointKeyError: See ``load``.
            StateDirUnusable: The folder cannot be read.
        """
        return self._newest(self._read)

    def versions(self) -> list[PersonalVersion]:
        """Every model, newest first, and why it cannot be used; changes nothing.

        Raises:
            StateDirUnusable: The folder, or a file in it, cannot be read.
        """
        found = []
        for generation in self._folder.saved():
            path = self._folder.file(generation)
            problem, record = None, None
            try:
                record = self._read(path).record
            except CheckpointError as e:
                problem = e
            found.append(PersonalVersion(generation, self._folder.size(path), problem, record))
        return found

    def roll_back(self, generation: int) -> PersonalModel:
        """Make an earlier model the newest one again. What it displaces can be rolled back to in turn.

        Args:
            generation: Of ``versions``.

        Raises:
            ConfigurationError: There is none of this number.
            CheckpointError: It cannot be used; the subclass says why.
            StateDirUnusable: It could not be read or written; those that were there are there.
        """
        if generation not in self._folder.saved():
            raise ConfigurationError(f"there is no personal model {generation}; there are {self._folder.saved()}")
        model = self._read(self._folder.file(generation))
        self.save(model)
        return model

    def clear(self) -> None:
        """Forget all personal models, also what was set aside; repeating it is harmless.

        Raises:
            StateDirUnusable: They could not be removed.
        """
        self._folder.clear()

    def _newest(self, parse: Callable[[Path], PersonalModel]) -> PersonalModel | None:
        found = self._folder.newest(parse)
        if found is None:
            self._folder.check_key()
        return found

    def _read(self, path: Path) -> PersonalModel:
        return PersonalModel.from_bytes(self._folder.read(path), self._options.max_bytes)
