"""Building the native libraries: found without an import, compiled once, whole or absent, and refused with a remedy.

A stub stands in for the compiler where a test is about the build and not about the library: it records its calls and
writes what it is told to.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client_sdk.native import adapter
from client_sdk.native import build as building
from client_sdk.native.build import RUNTIME, SHARING, ExecutorchWheel, Library
from client_sdk.protocol.errors import RuntimeUnavailable

STUB = """#!/bin/sh
echo "$@" >> "{calls}"
while [ "$1" != "-o" ]; do shift; done
printf library > "$2"
{then}
"""


class StubCompiler:
    """A compiler whose calls can be counted."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stub-cxx"
        self._calls = folder / "calls"
        self.write("exit 0")

    def write(self, then: str) -> None:
        self.path.write_text(STUB.format(calls=self._calls, then=then))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("POCKETFED_CACHE", str(folder))
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubCompiler:
    stub = StubCompiler(tmp_path)
    monkeypatch.setenv("CXX", str(stub.path))
    return stub


def test_the_library_is_compiled_once(cache: Path, compiler: StubCompiler):
    first = RUNTIME.ensure_built()
    assert first.read_bytes() == b"library"
    assert first.is_relative_to(cache)
    assert RUNTIME.ensure_built() == first
    assert len(compiler.calls) == 1


def test_concurrent_builds_compile_once(cache: Path, compiler: StubCompiler):
    with ThreadPoolExecutor(4) as pool:
        paths = {f.result() for f in [pool.submit(RUNTIME.ensure_built) for _ in range(8)]}
    assert len(paths) == len(compiler.calls) == 1


def test_concurrent_processes_compile_once(cache: Path, compiler: StubCompiler):
    processes = [
        subprocess.Popen([sys.executable, "-m", "client_sdk.native.build"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {p.communicate()[0] for p in processes}
    assert [p.returncode for p in processes] == [0, 0, 0]
    assert printed == {f"{RUNTIME.path}\n{SHARING.path}\n"}
    assert len(compiler.calls) == 2


def test_a_failed_compilation_leaves_nothing_and_shows_the_compiler(cache: Path, compiler: StubCompiler):
    compiler.write("echo 'error: no such header' >&2; exit 3")
    with pytest.raises(RuntimeUnavailable, match=r"exit status 3(.|\n)*no such header"):
        RUNTIME.ensure_built()
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    compiler.write("exit 0")
    assert RUNTIME.ensure_built().exists()


@pytest.mark.parametrize("library", [RUNTIME, SHARING], ids=lambda library: library.name)
@pytest.mark.parametrize("changed", ["source", "header", "exports"])
def test_a_changed_source_is_another_library(
    cache: Path, compiler: StubCompiler, tmp_path: Path, changed: str, library: Library
):
    old = library.ensure_built()
    edited = tmp_path / "edited"
    edited.write_bytes(getattr(library, changed).read_bytes() + b"\n")
    assert dataclasses.replace(library, **{changed: edited}).ensure_built() != old
    assert len(compiler.calls) == 2


def test_another_executorch_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch):
    before = RUNTIME.path
    wheel = ExecutorchWheel.find()
    other = ExecutorchWheel(wheel.root, "1.5.2")
    monkeypatch.setattr(ExecutorchWheel, "find", lambda: other)
    assert RUNTIME.path != before


def test_the_compiler_may_carry_arguments(cache: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{compiler.path} --from-the-environment")
    RUNTIME.ensure_built()
    assert compiler.calls[0].startswith("--from-the-environment -std=c++17")


@pytest.mark.parametrize("named", ["no-such-compiler", "/nowhere/g++", "  "])
def test_a_cxx_that_is_no_executable_is_refused_by_name(cache: Path, monkeypatch: pytest.MonkeyPatch, named: str):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(RuntimeUnavailable, match=re.escape(f"$CXX names {named!r}")):
        RUNTIME.ensure_built()


def test_no_compiler_says_what_to_install(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match=r"apt install g\+\+.*\$CXX"):
        RUNTIME.ensure_built()


def test_a_library_that_was_built_needs_no_compiler(
    cache: Path, compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    built = RUNTIME.ensure_built()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert RUNTIME.ensure_built() == built


def test_a_cache_that_cannot_be_written_says_where_to_point_it(
    tmp_path: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("POCKETFED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeUnavailable, match=r"\$POCKETFED_CACHE"):
        RUNTIME.ensure_built()


def test_no_executorch_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(RuntimeUnavailable, match="pip install executorch"):
        _ = RUNTIME.path


def test_the_sharing_kernels_need_no_executorch(
    cache: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert building.main() == 2
    printed = capsys.readouterr()
    assert printed.out == f"{SHARING.path}\n"
    assert printed.err.startswith("error: ExecuTorch is not installed")
    assert SHARING.path.exists()


def test_an_executorch_without_headers_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hollow = tmp_path / "executorch"
    hollow.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda _name: type("Spec", (), {"submodule_search_locations": [str(hollow)]})
    )
    with pytest.raises(RuntimeUnavailable, match="no C\\+\\+ headers"):
        ExecutorchWheel.find()


def test_the_command_prints_an_error_and_no_traceback(cache: Path, tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "client_sdk.native.build"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no C++17 compiler was found")
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_library_is_refused_with_a_remedy(tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"library")
    with pytest.raises(RuntimeUnavailable, match="delete the file"):
        adapter.Shim(broken)


@pytest.mark.parametrize("library", [RUNTIME, SHARING], ids=lambda library: library.name)
def test_the_sources_compile_without_a_warning(library: Library):
    library.check_warnings()


def test_a_warning_is_an_error_for_us_and_none_for_a_user(tmp_path: Path, cache: Path):
    edited = tmp_path / "sharing.cpp"
    edited.write_text(SHARING.source.read_text() + "\nint narrowed(long x) { return x; }\n")
    (tmp_path / "sharing.h").write_bytes(SHARING.header.read_bytes())
    careless = dataclasses.replace(SHARING, source=edited)
    with pytest.raises(RuntimeUnavailable, match="narrowed"):
        careless.check_warnings()
    assert building.WARNINGS[-1] == "-Werror"
    assert not any(flag.startswith("-W") and not flag.startswith("-Wl,") for flag in careless.command())


@pytest.mark.parametrize(("library", "macro"), [(RUNTIME, "PF_EXPORT"), (SHARING, "PFS_EXPORT")])
def test_nothing_is_exported_but_the_abi(library: Library, macro: str):
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--format=posix", str(library.ensure_built())],
        check=True,
        capture_output=True,
        text=True,
    )
    exported = {line.split()[0] for line in listed.stdout.splitlines()}
    assert exported == set(re.findall(rf"^{macro} .*?\b(\w+)\(", library.header.read_text(), re.MULTILINE))


@pytest.mark.parametrize(("library", "prefix"), [(RUNTIME, "pf"), (SHARING, "pfs")])
def test_the_header_is_plain_c(tmp_path: Path, library: Library, prefix: str):
    source = tmp_path / "host.c"
    version = f"{prefix}_abi_version() != {prefix.upper()}_ABI_VERSION"
    source.write_text(f'#include "{library.header.name}"\nint main(void) {{ return {version}; }}\n')
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([compiler, *flags, f"-I{library.header.parent}", str(source)], check=True)
