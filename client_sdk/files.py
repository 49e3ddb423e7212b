"""The files of a device: all that is durable goes through this layer, so that tests can be the disk that fails."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

__all__ = ["OS_FILES", "FileLayer", "FileStatus", "OsFiles"]


@dataclass(frozen=True)
class FileStatus:
    """What is known of a file without reading it.

    Attributes:
        size: Bytes.
        modified_ns: When it was last written or touched, nanoseconds since the epoch.
    """

    size: int
    modified_ns: int


class FileLayer(Protocol):
    """The operations that a device's state is made of. All raise ``OSError``.

    What is written counts as durable after ``fsync``; a new name, a rename or a removal after ``sync_folder``.
    """

    def create(self, path: Path, mode: int) -> int:
        """Open a file for writing, empty, and return its handle; ``mode`` is that of a new file."""
        ...

    def write(self, handle: int, data: memoryview) -> int:
        """Write some of the bytes, at least one, and return how many."""
        ...

    def fsync(self, handle: int) -> None:
        """Make a file's content durable."""
        ...

    def close(self, handle: int) -> None:
        """Forget a handle."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in its folder, at once in place of whatever had it."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file; harmless where there is none."""
        ...

    def make_folder(self, folder: Path) -> None:
        """Make a folder that only the owner enters, with its parents; harmless where there is one."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        ...

    def touch(self, path: Path) -> None:
        """Set the time of the last change to now."""
        ...

    def names(self, folder: Path) -> list[str]:
        """The names in a folder; none where there is no folder."""
        ...

    def status(self, path: Path) -> FileStatus | None:
        """Size and time of a file; None where there is none."""
        ...

    def read(self, path: Path) -> bytes:
        """All of a file."""
        ...


class OsFiles:
    """The operating system's files."""

    def create(self, path: Path, mode: int) -> int:
        """Open a file for writing, empty."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)

    def write(self, handle: int, data: memoryview) -> int:
        """Write some of the bytes."""
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        """Make a file's content durable."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Close the file."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file, over another one if need be."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)

    def make_folder(self, folder: Path) -> None:
        """Make a folder and make its own name durable."""
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.sync_folder(folder.parent)

    def sync_folder(self, folder: Path) -> None:
        """Make renames and removals in a folder durable."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def touch(self, path: Path) -> None:
        """Set the time of the last change to now."""
        os.utime(path)

    def names(self, folder: Path) -> list[str]:
        """The names in a folder."""
        try:
            return [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []

    def status(self, path: Path) -> FileStatus | None:
        """Size and time of a file."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return FileStatus(found.st_size, found.st_mtime_ns)

    def read(self, path: Path) -> bytes:
        """All of a file."""
        return path.read_bytes()


OS_FILES: Final[FileLayer] = OsFiles()
"""The real ones, which everything uses that is not told otherwise."""
