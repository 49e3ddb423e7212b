"""``PybindingsProgram``: the ``Program`` protocol over ExecuTorch's official Python bindings, which need torch.

The fallback where no C++ compiler is at hand. Nothing is imported before an instance is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import (
    ManifestError,
    MissingOperator,
    ProgramError,
    ProgramExecutionError,
    RuntimeUnavailable,
)
from client_sdk.protocol.program import Manifest, MethodSpec

_OPERATOR_MISSING = re.compile(r"0x:?14\b")
"""ExecuTorch's error code 0x14, as the bindings' messages have it."""


@functools.cache
def load_bindings() -> tuple[Any, Any]:
    """Import torch and the bindings: ``(torch, bindings)``.

    The extension module is imported itself: the public wrapper re-exports exactly its names, but drags in the whole
    exporter (140 MB and seconds more) and warns on import. Both are loaded by name, so that no import statement of
    this package mentions torch.

    Raises:
        RuntimeUnavailable: torch or ExecuTorch is not installed, or they do not fit each other.
    """
    try:
        torch = importlib.import_module("torch")
        bindings = importlib.import_module("executorch.extension.pybindings._C")
    except (ImportError, OSError) as e:
        raise RuntimeUnavailable(
            f"ExecuTorch's official bindings cannot be imported ({e}); they need torch: "
            "`pip install torch==2.13.0 executorch==1.5.1`"
        ) from e
    return torch, bindings


class PybindingsProgram:
    """A program run by the official bindings. Calls on one instance are serialised by a lock."""

    def __init__(self, manifest: Manifest, program: bytes, *, threads: int = 1) -> None:
        torch, bindings = load_bindings()
        if bindings._threadpool_get_thread_count() != threads:  # noqa: SLF001 - the bindings' only name for it
            bindings._unsafe_reset_threadpool(threads)  # noqa: SLF001 - process-wide, like the shim's
        self._torch = torch
        self._manifest = manifest
        self._lock = threading.Lock()
        self._methods: dict[str, Any] = {}
        # The bindings do not keep the buffer, and a method does not keep its program: both are held here.
        self._buffer: bytes | None = program
        try:
            self._program: Any = bindings._load_program_from_buffer(  # noqa: SLF001 - the bindings' only loader
                program,
                enable_etdump=False,
                debug_buffer_size=0,
                program_verification=bindings.Verification.InternalConsistency,
            )
        except RuntimeError as e:
            raise ProgramError(f"{manifest.model_name}: cannot load the program: {e}") from e

    @staticmethod
    def runtime_version() -> str:
        """ExecuTorch release behind this adapter."""
        load_bindings()
        return importlib.metadata.version("executorch")

    @staticmethod
    def operators() -> frozenset[str]:
        """Operators that this adapter can run."""
        _, bindings = load_bindings()
        return frozenset(bindings._get_operator_names())  # noqa: SLF001 - the bindings' only listing

    @property
    def manifest(self) -> Manifest:
        """Signatures, parameter table and hashes."""
        return self._manifest

    def run(self, method: str, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run one method by name; see ``Program.run``."""
        with self._lock:
            if self._program is None:
                raise ProgramExecutionError(f"{self._manifest.model_name}: the program is closed")
            spec = self._manifest.named(method)
            spec.check_inputs(inputs)
            # torch warns about views of read-only memory, so those are copied; kernels never write to inputs.
            tensors = [self._torch.from_numpy(a if a.flags.writeable else a.copy()) for a in inputs]
            try:
                results = self._method(method)(tensors)
            except RuntimeError as e:
                raise ProgramExecutionError(f"{method} failed: {e}") from e
            return self._outputs(spec, results)

    def close(self) -> None:
        """Release the runtime's memory; waits for a call in progress. Closing twice is harmless."""
        with self._lock:
            self._methods.clear()  # before the program that they point into
            self._program = None
            self._buffer = None

    def _method(self, name: str) -> Any:  # noqa: ANN401 - the bindings are untyped
        if name not in self._methods:
            try:
                self._methods[name] = self._program.load_method(name)
            except RuntimeError as e:
                kind = MissingOperator if _OPERATOR_MISSING.search(str(e)) else ProgramError
                raise kind(f"cannot load {name}: {e}") from e
        return self._methods[name]

    @staticmethod
    def _outputs(spec: MethodSpec, results: list[Any]) -> tuple[npt.NDArray[np.generic], ...]:
        arrays = tuple(np.ascontiguousarray(r.numpy()) for r in results)
        found = [(str(a.dtype), a.shape) for a in arrays]
        expected = [(o.dtype, o.shape) for o in spec.outputs]
        if found != expected:
            raise ManifestError(f"{spec.name} returns {found}, the manifest describes {expected}")
        return arrays
