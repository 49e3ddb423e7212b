"""``load_program``: what it checks before anything runs, and which adapter it picks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client_sdk.native.adapter import NativeProgram
from client_sdk.protocol.errors import (
    ConfigurationError,
    ManifestError,
    MissingOperator,
    ProgramError,
    ProgramHashMismatch,
    ProgramVersionMismatch,
)
from client_sdk.protocol.program import Role
from client_sdk.runtime import RuntimeName, load_program

Edit = Callable[[dict], None]
RUNTIMES = pytest.mark.parametrize("runtime", ["native", "pybindings"])


@pytest.fixture
def bundle(softmax_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "bundle"
    shutil.copytree(softmax_bundle, copy)
    return copy


def edit_manifest(bundle: Path, edit: Edit) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def replace_program(bundle: Path, program: bytes) -> None:
    """Put in other bytes that the manifest vouches for."""
    (bundle / "program.pte").write_bytes(program)
    edit_manifest(
        bundle, lambda m: m.update(program_sha256=hashlib.sha256(program).hexdigest(), program_bytes=len(program))
    )


@pytest.mark.parametrize("runtime", [*RuntimeName, "native"])
def test_a_bundle_opens_and_runs(softmax_bundle: Path, runtime: str):
    program = load_program(str(softmax_bundle), runtime)
    spec = program.manifest.method(Role.INFER)
    w, x = (np.zeros(t.shape, t.dtype) for t in spec.inputs)
    (logits,) = program.run(spec.name, w, x)
    assert not logits.any()
    program.close()


def test_auto_prefers_the_native_shim(softmax_bundle: Path):
    assert type(load_program(softmax_bundle)).__name__ == "NativeProgram"


def test_a_flipped_bit_in_the_program_is_a_hash_mismatch(bundle: Path):
    path = bundle / "program.pte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProgramHashMismatch, match="SHA-256"):
        load_program(bundle)


def test_a_program_of_another_size_is_refused_by_its_size(bundle: Path):
    with (bundle / "program.pte").open("ab") as f:
        f.write(b"\0")
    with pytest.raises(ProgramHashMismatch, match="bytes, the manifest describes"):
        load_program(bundle)


def test_a_missing_program_is_a_hash_mismatch(bundle: Path):
    (bundle / "program.pte").unlink()
    with pytest.raises(ProgramHashMismatch, match="cannot be read"):
        load_program(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"is .* an exported bundle"):
        load_program(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(bundle: Path):
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="unreadable manifest"):
        load_program(bundle)


@RUNTIMES
def test_a_program_of_another_executorch_release_is_refused_with_both_versions(bundle: Path, runtime: str):
    edit_manifest(bundle, lambda m: m.update(executorch_version="0.7.0"))
    with pytest.raises(ProgramVersionMismatch, match=r"0\.7\.0.*1\.5"):
        load_program(bundle, runtime)


@pytest.mark.parametrize("version", ["1.5.0", "1.5.99+cpu"])
def test_a_patch_release_does_not_matter(bundle: Path, version: str):
    edit_manifest(bundle, lambda m: m.update(executorch_version=version))
    load_program(bundle).close()


def test_a_version_that_is_none_is_refused(bundle: Path):
    edit_manifest(bundle, lambda m: m.update(executorch_version="main"))
    with pytest.raises(ProgramVersionMismatch, match="main"):
        load_program(bundle)


@RUNTIMES
def test_missing_operators_are_named_before_anything_runs(bundle: Path, runtime: str):
    edit_manifest(bundle, lambda m: m["operators"].extend(["aten::zither.out", "aten::oboe.out"]))
    with pytest.raises(MissingOperator, match=r"aten::oboe\.out, aten::zither\.out"):
        load_program(bundle, runtime)


@RUNTIMES
def test_an_operator_that_only_the_program_knows_of_is_missed_at_its_first_run(bundle: Path, runtime: str):
    program = (bundle / "program.pte").read_bytes()
    assert b"aten::gather" in program
    replace_program(bundle, program.replace(b"aten::gather", b"aten::zither"))
    opened = load_program(bundle, runtime)
    spec = opened.manifest.method(Role.GRAD)
    with pytest.raises(MissingOperator, match=spec.name):
        opened.run(spec.name, *(np.zeros(t.shape, t.dtype) for t in spec.inputs))


def test_the_native_shim_names_the_operator_that_it_missed(bundle: Path):
    program = (bundle / "program.pte").read_bytes()
    replace_program(bundle, program.replace(b"aten::gather", b"aten::zither"))
    opened = load_program(bundle, "native")
    spec = opened.manifest.method(Role.GRAD)
    with pytest.raises(MissingOperator, match="aten::zither"):
        opened.run(spec.name, *(np.zeros(t.shape, t.dtype) for t in spec.inputs))


@RUNTIMES
@pytest.mark.parametrize("program", [b"\0", b"not a program" * 100])
def test_bytes_that_are_no_program_are_refused(bundle: Path, runtime: str, program: bytes):
    replace_program(bundle, program)
    with pytest.raises(ProgramError, match="cannot load the program"):
        load_program(bundle, runtime)


@RUNTIMES
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_truncated_program_is_refused(bundle: Path, runtime: str, cut: float):
    program = (bundle / "program.pte").read_bytes()
    replace_program(bundle, program[: int(len(program) * cut)])
    with pytest.raises(ProgramError):
        load_program(bundle, runtime)


@RUNTIMES
@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_a_manifest_of_another_signature_is_found_out(bundle: Path, runtime: str, which: str):
    def widen(manifest: dict) -> None:
        for method in manifest["methods"]:
            method[which][0]["shape"][0] += 1

    edit_manifest(bundle, widen)
    program = load_program(bundle, runtime)
    spec = program.manifest.method(Role.GRAD)
    expected = ProgramError if (runtime, which) == ("pybindings", "inputs") else ManifestError
    with pytest.raises(expected):
        program.run(spec.name, *(np.zeros(t.shape, t.dtype) for t in spec.inputs))


def test_planned_memory_is_what_the_manifest_says(softmax_bundle: Path):
    program = load_program(softmax_bundle, "native")
    assert isinstance(program, NativeProgram)
    for spec in program.manifest.methods:
        assert program.planned_memory_bytes(spec.name) == spec.planned_memory_bytes > 0


@pytest.mark.parametrize("runtime", ["onnx", "", "Native"])
def test_an_unknown_runtime_is_refused_with_the_choices(softmax_bundle: Path, runtime: str):
    with pytest.raises(ConfigurationError, match="'auto', 'native', 'pybindings'"):
        load_program(softmax_bundle, runtime)


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused(softmax_bundle: Path, threads: int):
    with pytest.raises(ConfigurationError, match="at least 1"):
        load_program(softmax_bundle, threads=threads)
