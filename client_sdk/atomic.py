"""Files that are either the old bytes or the new ones, never something between."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def write_atomically(path: Path, data: bytes | bytearray | memoryview, *, mode: int = 0o600) -> None:
    """Replace a file's content; a process killed at any point leaves the old content or the new one.

    The temporary file has a fixed name, so that a killed process leaves at most one behind and the next write reuses
    it: one writer at a time per path, which the caller's lock must guarantee.

    Args:
        path: File to write; its folder exists.
        data: The whole new content.
        mode: Permissions of a new file, in force before the first byte is there.

    Raises:
        OSError: The disk is full, the folder is read-only, ...
    """
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # Before the rename: else a power cut can leave the new name with no content.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    replace_durably(temporary, path)


def replace_durably(source: Path, target: Path) -> None:
    """Rename a file that is synced already; afterwards ``target`` is the one or the other, even after a power cut.

    Raises:
        FileNotFoundError: There is no ``source``.
        OSError: The folder is read-only, ...
    """
    os.replace(source, target)  # noqa: PTH105 - one module to stub when tests inject faults
    sync_folder(target.parent)


def set_aside(path: Path, reason: str) -> None:
    """Keep a file that cannot be used beside itself (``*.damaged``), and say so in the log."""
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    _log.warning("%s cannot be used (%s); kept as %s", path, reason, aside.name)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
