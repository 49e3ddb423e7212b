"""A bundle on disk: ``program.pte``, ``manifest.json``, ``weights.safetensors``; complete or absent, never half."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ManifestError, ProgramHashMismatch
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.program import (
    MANIFEST_FILE,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    Float32Array,
    Manifest,
    Program,
)
from client_sdk.runtime import load_program

if TYPE_CHECKING:
    from mobile_export.parity import ParityReport

BUNDLE_FILES = (PROGRAM_FILE, MANIFEST_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class ProgramBundle:
    """A verified bundle folder.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        parity: What the parity gate measured when the program was exported; None for a bundle opened from disk, or
            exported without the gate.
        cached: Whether the export cache held it already.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None = None
    cached: bool = False

    @classmethod
    def open(cls, path: str | Path) -> ProgramBundle:
        """Open a bundle folder and compare its files with the manifest's hashes.

        Raises:
            ManifestError: A file is missing, or the manifest is unreadable.
            ProgramHashMismatch: The program or the weights are not those that the manifest describes.
        """
        folder = Path(path)
        missing = [name for name in BUNDLE_FILES if not (folder / name).is_file()]
        if missing:
            raise ManifestError(f"{folder} is not a program bundle: {', '.join(missing)} missing")
        manifest = Manifest.from_json((folder / MANIFEST_FILE).read_bytes())
        for name, expected in (
            (PROGRAM_FILE, manifest.program_sha256),
            (WEIGHTS_FILE, manifest.initial_weights_sha256),
        ):
            actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if actual != expected:
                raise ProgramHashMismatch(
                    f"{folder / name} has SHA-256 {actual}, the manifest says {expected}; export the program again"
                )
        return cls(folder, manifest)

    def initial_weights(self) -> Float32Array:
        """The initial weights as one flat float32 vector ``[d]`` in table order; a fresh array."""
        frame = decode_frame((self.path / WEIGHTS_FILE).read_bytes())
        return np.frombuffer(frame.payload, dtype="<f4").astype(np.float32)

    def load(self, runtime: Literal["native", "pybindings", "auto"] = "auto") -> Program:
        """Load the program into an ExecuTorch runtime (see ``client_sdk.runtime.load_program``)."""
        return load_program(self.path, runtime)


def refuse_foreign_folder(target: Path) -> None:
    """Refuse to replace what is not a bundle: its files are not ours to delete.

    Raises:
        ConfigurationError: ``target`` is a file, or a folder that holds anything but a bundle's files.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{target} is a file; export into a folder")
    strangers = sorted(p.name for p in target.iterdir() if p.name not in BUNDLE_FILES)
    if strangers:
        raise ConfigurationError(f"{target} holds {strangers[0]!r}, no part of a bundle; export into another folder")


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``target`` that takes its place when the block ends without an error.

    A reader (or a restart after ``kill -9``) sees the old folder, the new one or, for an instant, none; never a mix.
    An interrupted run leaves at most a hidden ``.NAME.*`` folder that nothing reads.

    Raises:
        ConfigurationError: The folder cannot be written (no permission, disk full).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            fresh = scratch / "new"
            fresh.mkdir()
            yield fresh
            for path in (*fresh.iterdir(), fresh):
                _sync(path)
            if target.exists():
                target.rename(scratch / "old")
            fresh.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as e:
        raise ConfigurationError(f"cannot write {target}: {e.strerror or e}") from e


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
