"""Open an exported program: check that it is the one described, that this runtime can run it, and pick an adapter."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from client_sdk.protocol.errors import (
    ConfigurationError,
    ManifestError,
    MissingOperator,
    ProgramHashMismatch,
    ProgramVersionMismatch,
    RuntimeUnavailable,
)
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, Manifest, Program

__all__ = ["Program", "RuntimeName", "load_program", "read_manifest"]

_log = logging.getLogger("pocketfed.runtime")


class RuntimeName(StrEnum):
    """Which adapter runs a program."""

    AUTO = "auto"
    """The native shim where it is built or can be built, else the official bindings."""

    NATIVE = "native"
    """The torch-free C++ shim."""

    PYBINDINGS = "pybindings"
    """ExecuTorch's official Python bindings, which need torch."""


class Adapter(Protocol):
    """What a class must offer to be a runtime."""

    def __call__(self, manifest: Manifest, program: bytes, *, threads: int) -> Program:
        """Open a program whose bytes and version were checked."""
        ...

    def runtime_version(self) -> str:
        """ExecuTorch release that would run the program."""
        ...

    def operators(self) -> frozenset[str]:
        """Names of the operators that it has."""
        ...


def load_program(path: str | Path, runtime: str = RuntimeName.AUTO, *, threads: int = 1) -> Program:
    """Open the bundle in a folder.

    The bytes that run are the bytes that were hashed. One thread is the default because the exported models are
    small: more threads cost more in waiting than they gain, and one gives the same bits on every machine.

    Args:
        path: Folder with ``manifest.json`` and ``program.pte``.
        runtime: ``"auto"``, ``"native"`` or ``"pybindings"``. ``auto`` decides once per process; if it has to fall
            back, one log record of ``pocketfed.runtime`` says why.
        threads: Kernel threads, the same for all programs of a process.

    Returns:
        The open program; ``close()`` releases it.

    Raises:
        ManifestError: No manifest, or one that cannot be read.
        ProgramHashMismatch: The program's bytes are not the manifest's.
        ProgramVersionMismatch: Exported by another ExecuTorch release (major.minor) than the installed one.
        MissingOperator: The program needs operators that the runtime lacks; they are named.
        RuntimeUnavailable: The adapter (for ``auto``: neither of them) can run here; the message says what to install.
        ConfigurationError: An unknown runtime, fewer than one thread, or another number of threads than the programs
            that are open.
    """
    try:
        name = RuntimeName(runtime)
    except ValueError as e:
        raise ConfigurationError(f"unknown runtime {runtime!r}; choose one of {[r.value for r in RuntimeName]}") from e
    if threads < 1:
        raise ConfigurationError(f"threads must be at least 1, got {threads}")
    folder = Path(path)
    manifest = read_manifest(folder)
    program = _read_program(folder, manifest)
    adapter = _adapter(name)
    _check_version(manifest, adapter.runtime_version())
    missing = sorted(set(manifest.operators) - adapter.operators())
    if missing:
        raise MissingOperator(
            f"{manifest.model_name} needs {', '.join(missing)}, which this ExecuTorch runtime does not have; "
            "export it with these operators decomposed"
        )
    return adapter(manifest, program, threads=threads)


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of a bundle.

    Raises:
        ManifestError: Missing, unreadable, or not this schema.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes()
    except OSError as e:
        raise ManifestError(f"{path} cannot be read ({e.strerror}); is {folder} an exported bundle?") from e
    return Manifest.from_json(text)


def _read_program(folder: Path, manifest: Manifest) -> bytes:
    path = folder / PROGRAM_FILE
    try:
        size = path.stat().st_size
        if size != manifest.program_bytes:  # before reading: the file may be absurdly large
            raise ProgramHashMismatch(f"{path} has {size} bytes, the manifest describes {manifest.program_bytes}")
        program = path.read_bytes()
    except OSError as e:
        raise ProgramHashMismatch(f"{path} cannot be read ({e.strerror})") from e
    found = hashlib.sha256(program).hexdigest()
    if found != manifest.program_sha256:
        raise ProgramHashMismatch(f"{path} has SHA-256 {found}, the manifest describes {manifest.program_sha256}")
    return program


def _release(version: str) -> str:
    """``major.minor`` of a version such as ``1.5.1+cpu``; the whole text where it has none."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def _check_version(manifest: Manifest, installed: str) -> None:
    if _release(manifest.executorch_version) != _release(installed):
        raise ProgramVersionMismatch(
            f"{manifest.model_name} was exported by ExecuTorch {manifest.executorch_version}, "
            f"but ExecuTorch {installed} is installed here; export it again or install that release"
        )


def _adapter(name: RuntimeName) -> Adapter:
    match name:
        case RuntimeName.NATIVE:
            return _native()
        case RuntimeName.PYBINDINGS:
            return _pybindings()
        case RuntimeName.AUTO:
            return _auto()


def _native() -> Adapter:
    from client_sdk.native.adapter import NativeProgram, load_shim  # noqa: PLC0415 - only where it is chosen

    load_shim()
    return NativeProgram


def _pybindings() -> Adapter:
    from client_sdk.pybindings import PybindingsProgram, load_bindings  # noqa: PLC0415 - only where it is chosen

    load_bindings()
    return PybindingsProgram


@functools.cache
def _auto() -> Adapter:
    """Decide once per process: a failed build is not tried again for every program, and the notice comes once."""
    try:
        return _native()
    except RuntimeUnavailable as native:
        try:
            adapter = _pybindings()
        except RuntimeUnavailable as bindings:
            raise RuntimeUnavailable(
                f"no ExecuTorch runtime can run here. Native: {native}. Official bindings: {bindings}"
            ) from bindings
        _log.warning(
            "running programs with ExecuTorch's official bindings, which need torch and more memory: %s", native
        )
        return adapter
