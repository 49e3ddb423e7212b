"""Files that are either the old bytes or the new ones, never something between."""

from __future__ import annotations

import logging
from pathlib import Path

from client_sdk.files import OS_FILES, FileLayer

_log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_DAMAGED = ".damaged"


def write_atomically(
    path: Path, *parts: bytes | bytearray | memoryview, mode: int = 0o600, files: FileLayer = OS_FILES
) -> None:
    """Replace a file's content; a process killed at any point leaves the old content or the new one.

    The temporary file has a fixed name, so that a killed process leaves at most one behind and the next write reuses
    it: one writer at a time per path, which the caller's lock must guarantee.

    Args:
        path: File to write; its folder exists.
        parts: The whole new content, in order.
        mode: Permissions of a new file, in force before the first byte is there.
        files: Where it is written.

    Raises:
        OSError: The disk is full, the folder is read-only, ...; ``path`` has its old content, and the temporary file
            is gone if it can be removed, since on a full disk it is what is in the way. Only where the very last
            step failed, which makes the new name durable, the new content may be there.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        handle = files.create(temporary, mode)
        try:
            for part in parts:
                rest = memoryview(part).cast("B")
                while rest:
                    rest = rest[files.write(handle, rest) :]
            # Before the rename: else a power cut can leave the new name with no content.
            files.fsync(handle)
        finally:
            files.close(handle)
        replace_durably(temporary, path, files=files)
    except OSError:
        _discard(temporary, files)
        raise


def replace_durably(source: Path, target: Path, *, files: FileLayer = OS_FILES) -> None:
    """Rename a file that is synced already; afterwards ``target`` is the one or the other, even after a power cut.

    Raises:
        FileNotFoundError: There is no ``source``.
        OSError: The folder is read-only, ...
    """
    files.rename(source, target)
    files.sync_folder(target.parent)


def set_aside(path: Path, reason: str, *, files: FileLayer = OS_FILES) -> None:
    """Keep a file that cannot be used beside itself (``*.damaged``), and say so in the log."""
    aside = path.with_name(path.name + _DAMAGED)
    files.rename(path, aside)
    _log.warning("%s cannot be used (%s); kept as %s", path, reason, aside.name)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a killed ``write_atomically`` left behind."""
    return name.startswith(".") and name.endswith(_TEMPORARY)


def is_set_aside(name: str) -> bool:
    """Whether a file of this name was set aside."""
    return name.endswith(_DAMAGED)


def _discard(path: Path, files: FileLayer) -> None:
    try:
        files.unlink(path)
    except OSError as e:
        _log.warning("%s is left behind: %s", path, e)
