"""The C ABI as a host in another language sees it: raw calls, wrong calls, statuses and texts."""

from __future__ import annotations

import ctypes
import re
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from client_sdk.native import adapter
from client_sdk.native.build import RUNTIME, ExecutorchWheel
from client_sdk.protocol.program import Manifest, Role
from client_sdk.runtime import read_manifest

OK, INVALID_ARGUMENT, INVALID_PROGRAM, UNKNOWN_METHOD, SIGNATURE, OUT_OF_MEMORY, BUSY = 0, 1, 2, 3, 5, 6, 8


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return adapter.load_shim()._lib


@pytest.fixture(scope="module")
def manifest(softmax_bundle: Path) -> Manifest:
    return read_manifest(softmax_bundle)


@pytest.fixture
def handle(lib: ctypes.CDLL, softmax_bundle: Path) -> Iterator[ctypes.c_void_p]:
    data = (softmax_bundle / "program.pte").read_bytes()
    opened = ctypes.c_void_p()
    assert lib.pf_open(data, len(data), ctypes.byref(opened)) == OK
    yield opened
    lib.pf_close(opened)


def tensor(array: np.ndarray, **overrides: object) -> adapter._Tensor:
    """A descriptor of an array; the caller keeps the array alive."""
    sizes = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    fields = {
        "dtype": adapter._DTYPE_CODES[str(array.dtype)],
        "rank": array.ndim,
        "sizes": sizes,
        "data": array.ctypes.data,
    }
    return adapter._Tensor(**(fields | overrides))


class Call:
    """One ``infer`` call whose descriptors a test may spoil."""

    def __init__(self, manifest: Manifest) -> None:
        spec = manifest.method(Role.INFER)
        self.method = spec.name.encode()
        self.arrays = [np.ones(t.shape, t.dtype) for t in (*spec.inputs, *spec.outputs)]
        self.tensors = [tensor(a) for a in self.arrays]
        self.num_inputs = len(spec.inputs)

    @property
    def output(self) -> np.ndarray:
        return self.arrays[-1]

    def run(self, lib: ctypes.CDLL, handle: ctypes.c_void_p) -> int:
        inputs, outputs = self.tensors[: self.num_inputs], self.tensors[self.num_inputs :]
        return lib.pf_run(
            handle,
            self.method,
            len(inputs),
            (adapter._Tensor * len(inputs))(*inputs),
            len(outputs),
            (adapter._Tensor * len(outputs))(*outputs),
        )


def peak_rss_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def last_error(lib: ctypes.CDLL) -> str:
    return lib.pf_last_error().decode()


def test_a_host_can_run_a_method(lib: ctypes.CDLL, handle: ctypes.c_void_p, manifest: Manifest):
    call = Call(manifest)
    assert call.run(lib, handle) == OK
    assert last_error(lib) == ""
    np.testing.assert_array_equal(call.output, np.full_like(call.output, manifest.feature_shape[0] + 1))


@pytest.mark.parametrize(
    ("index", "override", "status", "message"),
    [
        (0, {"dtype": 99}, INVALID_ARGUMENT, "input 0 has an unknown dtype"),
        (0, {"dtype": -1}, INVALID_ARGUMENT, "input 0 has an unknown dtype"),
        (1, {"rank": -1}, INVALID_ARGUMENT, "input 1 has an impossible rank"),
        (1, {"rank": 17}, INVALID_ARGUMENT, "input 1 has an impossible rank"),
        (1, {"sizes": None}, INVALID_ARGUMENT, "input 1 has an impossible rank"),
        (1, {"data": None}, INVALID_ARGUMENT, "input 1 has no data"),
        (1, {"sizes": (ctypes.c_int64 * 2)(2**40, 1)}, INVALID_ARGUMENT, "input 1 has a size out of range"),
        (1, {"sizes": (ctypes.c_int64 * 2)(-1, 6)}, INVALID_ARGUMENT, "input 1 has a size out of range"),
        (1, {"sizes": (ctypes.c_int64 * 2)(2**31 - 1, 2**31 - 1)}, INVALID_ARGUMENT, "input 1 has a size out of range"),
        (1, {"sizes": (ctypes.c_int64 * 2)(2**16, 2**15)}, INVALID_ARGUMENT, "input 1 has a size out of range"),
        (1, {"sizes": (ctypes.c_int64 * 16)(*[2] * 16), "rank": 16}, SIGNATURE, "inputs do not fit"),
        (1, {"sizes": (ctypes.c_int64 * 2)(0, 6)}, SIGNATURE, "inputs do not fit"),
        (1, {"data": 2**20 + 1}, INVALID_ARGUMENT, "input 1 is not aligned to its elements"),
        (2, {"data": 2**20 + 2}, INVALID_ARGUMENT, "output 0 is not aligned to its elements"),
        (1, {"sizes": (ctypes.c_int64 * 2)(3, 6)}, SIGNATURE, "inputs do not fit"),
        (0, {"dtype": 1}, SIGNATURE, "inputs do not fit"),
        (2, {"data": None}, INVALID_ARGUMENT, "output 0 has no data"),
        (2, {"dtype": 3}, SIGNATURE, "output 0 of .* has another dtype or shape"),
        (2, {"sizes": (ctypes.c_int64 * 2)(8, 4)}, SIGNATURE, "output 0 of .* has another dtype or shape"),
    ],
)
def test_wrong_tensors_are_refused_and_no_output_is_written(
    lib: ctypes.CDLL,
    handle: ctypes.c_void_p,
    manifest: Manifest,
    index: int,
    override: dict[str, object],
    status: int,
    message: str,
):
    call = Call(manifest)
    call.tensors[index] = tensor(call.arrays[index], **override)
    assert call.run(lib, handle) == status
    assert re.search(message, last_error(lib))
    assert (call.output == 1).all()
    assert Call(manifest).run(lib, handle) == OK  # and the program is still usable


@pytest.mark.parametrize("count", [0, 1, 3, 2**20, 2**63, 2**64 - 1])
def test_a_wrong_number_of_tensors_is_refused_before_one_is_read(
    lib: ctypes.CDLL, handle: ctypes.c_void_p, manifest: Manifest, count: int
):
    call = Call(manifest)
    nowhere = ctypes.cast(ctypes.c_void_p(8), ctypes.POINTER(adapter._Tensor))  # whoever reads it, crashes
    number = ctypes.c_uint64(count)
    assert lib.pf_run(handle, call.method, number, nowhere, 1, nowhere) == SIGNATURE
    assert f"takes 2 inputs, {count} are given" in last_error(lib)
    if count != 1:
        assert lib.pf_run(handle, call.method, 2, nowhere, number, nowhere) == SIGNATURE
        assert f"returns 1 outputs, {count} are expected" in last_error(lib)
    assert call.run(lib, handle) == OK


def test_an_output_may_lie_where_an_input_lay(lib: ctypes.CDLL, handle: ctypes.c_void_p, manifest: Manifest):
    apart, together = Call(manifest), Call(manifest)
    together.tensors[2] = tensor(together.output, data=together.arrays[1].ctypes.data)
    assert apart.run(lib, handle) == together.run(lib, handle) == OK
    assert together.arrays[1].tobytes()[: apart.output.nbytes] == apart.output.tobytes()


def test_a_closed_handle_is_found_out_whatever_was_opened_since(
    lib: ctypes.CDLL, softmax_bundle: Path, manifest: Manifest
):
    data = (softmax_bundle / "program.pte").read_bytes()
    handles = [ctypes.c_void_p() for _ in range(20)]
    for opened in handles:
        assert lib.pf_open(data, len(data), ctypes.byref(opened)) == OK
        lib.pf_close(opened)
        lib.pf_close(opened)
    assert len({opened.value for opened in handles}) == 20
    last = ctypes.c_void_p()
    assert lib.pf_open(data, len(data), ctypes.byref(last)) == OK
    size = ctypes.c_uint64()
    for stale in (*handles, ctypes.c_void_p(2**47 + 1), ctypes.c_void_p(-1)):
        assert Call(manifest).run(lib, stale) == INVALID_ARGUMENT
        assert "not that of an open program" in last_error(lib)
        assert lib.pf_load_method(stale, b"infer_b8") == INVALID_ARGUMENT
        assert lib.pf_planned_memory(stale, b"infer_b8", ctypes.byref(size)) == INVALID_ARGUMENT
        lib.pf_close(stale)
    assert Call(manifest).run(lib, last) == OK
    lib.pf_close(last)


def test_a_program_may_be_closed_while_others_use_it(lib: ctypes.CDLL, softmax_bundle: Path, manifest: Manifest):
    data = (softmax_bundle / "program.pte").read_bytes()
    opened = ctypes.c_void_p()
    assert lib.pf_open(data, len(data), ctypes.byref(opened)) == OK
    running = threading.Barrier(3)

    def work() -> set[int]:
        call, statuses = Call(manifest), [OK]
        assert call.run(lib, opened) == OK
        running.wait()
        while statuses[-1] == OK:
            statuses.append(call.run(lib, opened))
        return set(statuses)

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(work) for _ in range(2)]
        running.wait()
        lib.pf_close(opened)
        assert [worker.result() for worker in workers] == [{OK, INVALID_ARGUMENT}] * 2


def test_null_arguments_are_refused(lib: ctypes.CDLL, handle: ctypes.c_void_p):
    opened, size = ctypes.c_void_p(), ctypes.c_uint64()
    assert lib.pf_open(None, 10, ctypes.byref(opened)) == INVALID_ARGUMENT
    assert lib.pf_open(b"abc", 0, ctypes.byref(opened)) == INVALID_ARGUMENT
    assert lib.pf_open(b"abc", 3, None) == INVALID_ARGUMENT
    assert lib.pf_run(None, b"infer_b8", 0, None, 0, None) == INVALID_ARGUMENT
    assert lib.pf_run(handle, None, 0, None, 0, None) == INVALID_ARGUMENT
    assert lib.pf_run(handle, b"infer_b8", 2, None, 0, None) == INVALID_ARGUMENT
    assert lib.pf_load_method(handle, None) == INVALID_ARGUMENT
    assert lib.pf_planned_memory(handle, b"infer_b8", None) == INVALID_ARGUMENT
    assert lib.pf_planned_memory(None, b"infer_b8", ctypes.byref(size)) == INVALID_ARGUMENT
    assert lib.pf_set_threads(0) == INVALID_ARGUMENT
    assert lib.pf_set_threads(2**32 - 1) == INVALID_ARGUMENT
    lib.pf_close(None)


def test_bytes_that_are_no_program_leave_no_handle(lib: ctypes.CDLL):
    opened = ctypes.c_void_p(1)
    assert lib.pf_open(b"x" * 100, 100, ctypes.byref(opened)) == INVALID_PROGRAM
    assert not opened
    assert last_error(lib) != ""


@pytest.mark.parametrize("size", [2**31, 2**63, 2**64 - 1])
def test_a_program_beyond_the_limit_is_refused_before_it_is_copied(lib: ctypes.CDLL, size: int):
    opened = ctypes.c_void_p()
    before = peak_rss_kib()
    assert lib.pf_open(b"x" * 100, ctypes.c_uint64(size), ctypes.byref(opened)) == INVALID_ARGUMENT
    assert "at most 2147483647 bytes" in last_error(lib)
    assert peak_rss_kib() - before < 2**20


@pytest.mark.parametrize(
    ("planned", "status", "message"),
    [
        (2**32 + 1, OUT_OF_MEMORY, "plans 4294967297 bytes at once"),
        (2**62, OUT_OF_MEMORY, "plans 4611686018427387904 bytes at once"),
        (2**63, INVALID_PROGRAM, "plans memory that is not host memory"),
        (2**28, OK, ""),
    ],
)
def test_planned_memory_is_bounded_before_it_is_reserved(
    lib: ctypes.CDLL, softmax_bundle: Path, manifest: Manifest, planned: int, status: int, message: str
):
    data, largest = (softmax_bundle / "program.pte").read_bytes(), max(m.planned_memory_bytes for m in manifest.methods)
    declared = largest.to_bytes(8, "little")
    assert declared in data
    crafted, opened, before = data.replace(declared, planned.to_bytes(8, "little")), ctypes.c_void_p(), peak_rss_kib()
    assert lib.pf_open(crafted, len(crafted), ctypes.byref(opened)) == status
    assert message in last_error(lib)
    assert peak_rss_kib() - before < 2**17  # also where 256 MiB were reserved: nobody touched them
    lib.pf_close(opened)


@pytest.mark.parametrize("name", [b"nothing", b"", b"infer_b8 "])
def test_an_unknown_method_is_told_by_name(lib: ctypes.CDLL, handle: ctypes.c_void_p, name: bytes):
    size = ctypes.c_uint64()
    assert lib.pf_load_method(handle, name) == UNKNOWN_METHOD
    assert lib.pf_planned_memory(handle, name, ctypes.byref(size)) == UNKNOWN_METHOD
    assert lib.pf_run(handle, name, 0, None, 0, None) == UNKNOWN_METHOD
    assert last_error(lib) == f"no method {name.decode()}"


def test_loading_ahead_is_harmless(lib: ctypes.CDLL, handle: ctypes.c_void_p, manifest: Manifest):
    for _ in range(2):
        assert lib.pf_load_method(handle, manifest.method(Role.INFER).name.encode()) == OK
    assert Call(manifest).run(lib, handle) == OK


def test_the_thread_count_cannot_change_under_an_open_program(lib: ctypes.CDLL, handle: ctypes.c_void_p):
    assert lib.pf_set_threads(1) == OK  # what it is
    assert lib.pf_set_threads(2) == BUSY
    assert "1" in last_error(lib)


def test_the_operators_are_listed_into_the_callers_buffer(lib: ctypes.CDLL):
    size = lib.pf_registered_operators(None, 0)
    small = ctypes.create_string_buffer(b"?" * 16)
    assert lib.pf_registered_operators(small, 16) == size
    assert small.raw[:16] == b"?" * 16
    assert "aten::add.out" in adapter.load_shim().operators()
    assert size > 1000


def test_the_library_says_what_it_was_built_for(lib: ctypes.CDLL):
    assert lib.pf_abi_version() == adapter.ABI_VERSION
    assert lib.pf_executorch_version().decode() == ExecutorchWheel.find().version


def test_python_and_the_header_agree_on_every_code():
    header = RUNTIME.header.read_text()
    codes = {name: int(value) for name, value in re.findall(r"PF_([A-Z0-9_]+) = (\d+)", header)}
    for dtype, code in adapter._DTYPE_CODES.items():
        assert codes[dtype.upper()] == code
    statuses = {
        "INVALID_PROGRAM": "ProgramError",
        "UNKNOWN_METHOD": "UnknownMethod",
        "MISSING_OPERATOR": "MissingOperator",
        "SIGNATURE": "ManifestError",
        "OUT_OF_MEMORY": "MemoryBudgetExceeded",
        "EXECUTION_FAILED": "ProgramExecutionError",
        "BUSY": "ConfigurationError",
    }
    assert {codes[name]: error for name, error in statuses.items()} == {
        code: error.__name__ for code, error in adapter._ERRORS.items()
    }
    assert f"#define PF_ABI_VERSION {adapter.ABI_VERSION}\n" in header


def test_the_library_offers_what_the_header_declares_and_the_adapter_uses(lib: ctypes.CDLL):
    declared = set(re.findall(r"^PF_EXPORT .*?\b(pf_\w+)\(", RUNTIME.header.read_text(), re.MULTILINE))
    assert len(declared) == 10
    assert all(hasattr(lib, name) for name in declared)
