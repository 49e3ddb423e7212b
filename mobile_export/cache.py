"""Exports cached by content: an entry is found by what went into it, and believed only if its hashes hold."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from client_sdk.protocol.errors import ConfigurationError, ProgramError
from mobile_export.bundle import BUNDLE_FILES, ProgramBundle, replacing_folder
from mobile_export.parity import ParityReport

PARITY_FILE = "parity.json"
CHECKSUM_FILE = "SHA256SUMS"


class ExportCache:
    """A folder with one sub-folder for each content key: the bundle, its parity report, and checksums of all.

    Safe for several processes: whoever holds a key's lock builds, the others wait and find the entry.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, key: str) -> Path:
        """Where the entry of a key is, if there is one."""
        return self._root / key

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key's lock; the operating system frees it if the process dies.

        Raises:
            ConfigurationError: The cache folder cannot be written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            handle = (self._root / f"{key}.lock").open("wb")
        except OSError as e:
            raise ConfigurationError(
                f"the export cache {self._root} cannot be written ({e.strerror}); set POCKETFED_CACHE to another "
                "folder, or export without the cache"
            ) from e
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def find(self, key: str, tolerance: float) -> ProgramBundle | None:
        """The entry of a key, or None if it is absent, damaged in any byte, or passed a laxer gate only."""
        folder = self.folder(key)
        try:
            if (folder / CHECKSUM_FILE).read_text() != checksums(folder):
                return None
            bundle = ProgramBundle.open(folder)
            parity = ParityReport.model_validate_json((folder / PARITY_FILE).read_bytes())
        except (OSError, ValueError, ProgramError):
            return None
        if bundle.manifest.content_key != key or parity.worst.error > tolerance:
            return None
        return ProgramBundle(folder, bundle.manifest, parity, cached=True)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """Give a scratch folder that becomes the key's entry when the block ends without an error. Hold the lock."""
        for abandoned in self._root.glob(f".{key}.*"):  # by a killed process; we hold the key's lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with replacing_folder(self.folder(key)) as folder:
            yield folder
            (folder / CHECKSUM_FILE).write_text(checksums(folder))


def checksums(folder: Path) -> str:
    """Checksums of an entry's files in the format of ``sha256sum``."""
    names = (*BUNDLE_FILES, PARITY_FILE)
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a bundle's files to a folder, all or nothing."""
    with replacing_folder(target) as folder:
        for name in BUNDLE_FILES:
            # A copy, not a link: an entry must not change with the folder that a user may edit.
            shutil.copyfile(source / name, folder / name)
