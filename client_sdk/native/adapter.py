"""``NativeProgram``: the ``Program`` protocol over the C++ shim. No torch, no ``executorch`` import.

The shim is loaded with ``ctypes.CDLL`` (not ``PyDLL``), so the GIL is released for the whole of every call: programs
in different threads train at the same time.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.native.build import RUNTIME
from client_sdk.protocol.errors import (
    ConfigurationError,
    ManifestError,
    MemoryBudgetExceeded,
    MissingOperator,
    PocketfedError,
    ProgramError,
    ProgramExecutionError,
    RuntimeUnavailable,
    UnknownMethod,
)
from client_sdk.protocol.program import Manifest, MethodSpec, TensorSpec

ABI_VERSION: Final = 1

_DTYPE_CODES: Final = {"float32": 0, "float64": 1, "int32": 2, "int64": 3, "bool": 4, "uint8": 5, "int8": 6}
_OK: Final = 0
# Inputs are checked against the manifest before every call, so a signature that the program refuses (5) means that
# the manifest describes another program.
_ERRORS: Final[dict[int, type[PocketfedError]]] = {
    2: ProgramError,
    3: UnknownMethod,
    4: MissingOperator,
    5: ManifestError,
    6: MemoryBudgetExceeded,
    7: ProgramExecutionError,
    8: ConfigurationError,
}


class _Tensor(ctypes.Structure):
    """``pf_tensor``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    )


class Shim:
    """The loaded library: declared signatures, and statuses turned into typed errors."""

    def __init__(self, path: Path) -> None:
        try:
            self._lib = ctypes.CDLL(str(path))
            found = int(self._lib.pf_abi_version())
        except (OSError, AttributeError) as e:
            raise RuntimeUnavailable(
                f"the native runtime {path} cannot be loaded ({e}); delete the file and build it again with "
                "`python -m client_sdk.native.build`"
            ) from e
        if found != ABI_VERSION:
            raise RuntimeUnavailable(f"{path} speaks ABI {found}, this SDK needs {ABI_VERSION}; delete the file")
        handle, name, tensors = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Tensor)
        signatures: dict[str, tuple[list[type], type | None]] = {
            "pf_executorch_version": ([], name),
            "pf_last_error": ([], name),
            "pf_open": ([name, ctypes.c_uint64, ctypes.POINTER(handle)], ctypes.c_int32),
            "pf_close": ([handle], None),
            "pf_load_method": ([handle, name], ctypes.c_int32),
            "pf_planned_memory": ([handle, name, ctypes.POINTER(ctypes.c_uint64)], ctypes.c_int32),
            "pf_run": ([handle, name, ctypes.c_uint64, tensors, ctypes.c_uint64, tensors], ctypes.c_int32),
            "pf_set_threads": ([ctypes.c_uint32], ctypes.c_int32),
            "pf_registered_operators": ([name, ctypes.c_uint64], ctypes.c_uint64),
        }
        for function, (arguments, result) in signatures.items():
            entry = getattr(self._lib, function)
            entry.argtypes, entry.restype = arguments, result

    def check(self, status: int) -> None:
        """Raise the typed error that a status stands for."""
        if status != _OK:
            text = (self._lib.pf_last_error() or b"").decode(errors="replace")
            raise _ERRORS.get(status, ProgramExecutionError)(text or f"native status {status}")

    @property
    def executorch_version(self) -> str:
        """ExecuTorch release that the library was compiled against."""
        return str(self._lib.pf_executorch_version().decode())

    def set_threads(self, threads: int) -> None:
        """Fix the process's number of kernel threads.

        Raises:
            ConfigurationError: Programs are open with another number.
        """
        self.check(self._lib.pf_set_threads(threads))

    def operators(self) -> frozenset[str]:
        """Names of all registered operators, such as ``aten::add.out``."""
        size = self._lib.pf_registered_operators(None, 0)
        buffer = ctypes.create_string_buffer(size)
        self._lib.pf_registered_operators(buffer, size)
        return frozenset(buffer.raw.decode().split())

    def open(self, program: bytes) -> ctypes.c_void_p:
        """Open a program from its bytes; the shim keeps a copy."""
        handle = ctypes.c_void_p()
        self.check(self._lib.pf_open(program, len(program), ctypes.byref(handle)))
        return handle

    def close(self, handle: ctypes.c_void_p) -> None:
        """Release a program."""
        self._lib.pf_close(handle)

    def load_method(self, handle: ctypes.c_void_p, method: str) -> None:
        """Load one method."""
        self.check(self._lib.pf_load_method(handle, method.encode()))

    def planned_memory(self, handle: ctypes.c_void_p, method: str) -> int:
        """Bytes that the method's memory plan reserves."""
        size = ctypes.c_uint64()
        self.check(self._lib.pf_planned_memory(handle, method.encode(), ctypes.byref(size)))
        return size.value

    def run(self, handle: ctypes.c_void_p, frame: _CallFrame) -> None:
        """Run the method that a filled frame describes."""
        self.check(
            self._lib.pf_run(handle, frame.name, len(frame.inputs), frame.inputs, len(frame.outputs), frame.outputs)
        )


@dataclass(frozen=True)
class _CallFrame:
    """The descriptors of one method's tensors, built once; a call only fills in the data pointers."""

    name: bytes
    inputs: ctypes.Array[_Tensor]
    outputs: ctypes.Array[_Tensor]

    @classmethod
    def of(cls, spec: MethodSpec) -> _CallFrame:
        return cls(spec.name.encode(), _descriptors(spec.inputs), _descriptors(spec.outputs))


def _descriptors(specs: tuple[TensorSpec, ...]) -> ctypes.Array[_Tensor]:
    array = (_Tensor * len(specs))()
    for descriptor, spec in zip(array, specs, strict=True):
        descriptor.dtype = _DTYPE_CODES[spec.dtype]
        descriptor.rank = len(spec.shape)
        descriptor.sizes = (ctypes.c_int64 * len(spec.shape))(*spec.shape)
    return array


@functools.cache
def load_shim() -> Shim:
    """The process's shim, built on first use.

    Raises:
        RuntimeUnavailable: It can neither be found nor built, or not be loaded.
    """
    return Shim(RUNTIME.ensure_built())


class NativeProgram:
    """A program run by the native shim.

    Calls on one instance are serialised by a lock (planned memory is shared by its methods); different instances run
    concurrently. ``threads`` holds for the whole process: see ``Shim.set_threads``.
    """

    def __init__(self, manifest: Manifest, program: bytes, *, threads: int = 1) -> None:
        shim = load_shim()
        shim.set_threads(threads)
        self._manifest = manifest
        self._shim = shim
        self._lock = threading.Lock()
        self._frames: dict[str, tuple[MethodSpec, _CallFrame]] = {}
        self._handle: ctypes.c_void_p | None = None
        self._handle = shim.open(program)

    @staticmethod
    def runtime_version() -> str:
        """ExecuTorch release behind this adapter."""
        return load_shim().executorch_version

    @staticmethod
    def operators() -> frozenset[str]:
        """Operators that this adapter can run."""
        return load_shim().operators()

    @property
    def manifest(self) -> Manifest:
        """Signatures, parameter table and hashes."""
        return self._manifest

    def planned_memory_bytes(self, method: str) -> int:
        """Bytes reserved for one call of ``method``, as the program itself says."""
        with self._lock:
            return self._shim.planned_memory(self._live_handle(), method)

    def run(self, method: str, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run one method by name; see ``Program.run``."""
        with self._lock:
            handle = self._live_handle()
            spec, frame = self._frame(method)
            spec.check_inputs(inputs)
            outputs = tuple(np.empty(o.shape, o.dtype) for o in spec.outputs)
            for descriptor, array in zip(frame.inputs, inputs, strict=True):
                descriptor.data = array.__array_interface__["data"][0]
            for descriptor, array in zip(frame.outputs, outputs, strict=True):
                descriptor.data = array.__array_interface__["data"][0]
            self._shim.run(handle, frame)
            return outputs

    def close(self) -> None:
        """Release the runtime's memory; waits for a call in progress. Closing twice is harmless."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self._shim.close(handle)

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            self._shim.close(handle)

    def _live_handle(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise ProgramExecutionError(f"{self._manifest.model_name}: the program is closed")
        return self._handle

    def _frame(self, method: str) -> tuple[MethodSpec, _CallFrame]:
        found = self._frames.get(method)
        if found is None:
            spec = self._manifest.named(method)
            found = self._frames[method] = (spec, _CallFrame.of(spec))
        return found
