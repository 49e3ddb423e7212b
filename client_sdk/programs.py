"""Where a device gets the program of an assignment from, and whether the pieces of a bundle belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from client_sdk.atomic import write_atomically
from client_sdk.errors import BundleMismatch, StateDirUnusable
from client_sdk.protocol.frames import Frame
from client_sdk.protocol.messages import CONTROL_TENSOR
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, Float32Array, Manifest, Program

Buffer = bytes | bytearray | memoryview
ReadBlob = Callable[[str], Buffer]


class NamesProgram(Protocol):
    """What says by hash which program is meant: an assignment, or what the server says of its newest model."""

    @property
    def manifest_sha256(self) -> str: ...  # noqa: D102
    @property
    def program_sha256(self) -> str: ...  # noqa: D102
    @property
    def parameter_table_sha256(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class ProgramNames:
    """A program by its hashes alone, as a device keeps them with what it has adapted."""

    manifest_sha256: str
    program_sha256: str
    parameter_table_sha256: str


class ProgramProvider(Protocol):
    """Opens programs for a device. Who opens a program closes it: the device only runs it.

    A simulator gives many devices one provider, which keeps a loaded program per worker thread.
    """

    def open(self, assignment: NamesProgram, read: ReadBlob) -> Program:
        """The assignment's program, for the calling thread, until its next ``open``.

        Args:
            assignment: Names manifest and program by hash; a model that was asked for without work does so too.
            read: Blob hash -> bytes that were checked against it; only called for what is not loaded yet.

        Raises:
            ProgramError: It cannot be run here.
        """
        ...

    def close(self) -> None:
        """Release what is loaded."""
        ...


class EmbeddedProgram:
    """The one program that an app brings along."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def open(self, assignment: NamesProgram, read: ReadBlob) -> Program:  # noqa: ARG002 - nothing has to be read
        """The app's program; the device checks that it is the assignment's."""
        return self._program

    def close(self) -> None:
        """Nothing: the program is the app's."""


class DownloadedPrograms:
    """Programs that come with their assignments, unpacked into a folder; the last one stays loaded."""

    def __init__(self, folder: Path, runtime: str = "auto") -> None:
        self._folder = folder
        self._runtime = runtime
        self._key: tuple[str, str] | None = None
        self._program: Program | None = None

    def open(self, assignment: NamesProgram, read: ReadBlob) -> Program:
        """Unpack and load the program, unless it is loaded already."""
        from client_sdk.runtime import load_program  # noqa: PLC0415 - a device with a program of its own needs none

        key = (assignment.manifest_sha256, assignment.program_sha256)
        if self._program is None or key != self._key:
            self.close()
            bundle = self._folder / assignment.manifest_sha256
            self._unpack(bundle, read(assignment.manifest_sha256), read(assignment.program_sha256))
            self._program = load_program(bundle, self._runtime)
            self._key = key
        return self._program

    def close(self) -> None:
        """Close the loaded program."""
        if self._program is not None:
            self._program.close()
        self._program = self._key = None

    def _unpack(self, bundle: Path, manifest: Buffer, program: Buffer) -> None:
        try:
            # The former programs go first: on a full disk they are what is in the way.
            shutil.rmtree(self._folder, ignore_errors=True)
            bundle.mkdir(mode=0o700, parents=True)
            write_atomically(bundle / PROGRAM_FILE, program)
            write_atomically(bundle / MANIFEST_FILE, manifest)
        except OSError as e:
            raise StateDirUnusable(f"cannot unpack the program into {bundle}: {e.strerror or e}") from e


def check_program(manifest: Manifest, assignment: NamesProgram) -> None:
    """Compare a loaded program with the assignment, or with the newest model.

    Raises:
        BundleMismatch: Another program, or another order of parameters.
    """
    if manifest.program_sha256 != assignment.program_sha256:
        raise BundleMismatch(
            f"the assignment is for program {assignment.program_sha256}, "
            f"its manifest describes {manifest.program_sha256}"
        )
    if manifest.parameter_table_sha256 != assignment.parameter_table_sha256:
        raise BundleMismatch(
            f"the assignment's parameter table is {assignment.parameter_table_sha256}, "
            f"that of {manifest.model_name} is {manifest.parameter_table_sha256}"
        )


def model_weights(model: Frame, manifest: Manifest) -> Float32Array:
    """The flat weight vector of a model, a view into its frame.

    Raises:
        BundleMismatch: The frame's tensors are not the manifest's parameters, in their order.
    """
    expected = [(p.name, p.shape) for p in manifest.parameters]
    found = [(name, tensor.shape) for name, tensor in model.tensors.items()]
    if found != expected or any(tensor.dtype != np.float32 for tensor in model.tensors.values()):
        raise BundleMismatch(f"the model's tensors are not the parameters of {manifest.model_name}")
    return np.frombuffer(model.payload, np.float32)


def control_vector(frame: Frame, manifest: Manifest) -> Float32Array:
    """The server's control variate, a view into its frame.

    Raises:
        BundleMismatch: Not one float32[d] tensor of the expected name.
    """
    tensor = frame.tensors.get(CONTROL_TENSOR)
    expected = (manifest.num_parameters,)
    if len(frame.tensors) != 1 or tensor is None or tensor.dtype != np.float32 or tensor.shape != expected:
        raise BundleMismatch(f"the server's control is not one float32[{expected[0]}] tensor named {CONTROL_TENSOR!r}")
    return np.frombuffer(frame.payload, np.float32)
