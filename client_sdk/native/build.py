"""Compile each native library once; torch-free, and a no-op when current.

There are two: ``RUNTIME``, the shim over the installed ExecuTorch wheel, and ``SHARING``, the kernels that split an
update into shares, which need a compiler and nothing else.

A library lies in a per-user cache under a name that is the hash of what it depends on (source, header, flags; for the
shim also ExecuTorch's release and place), so an upgrade of any of them builds a new one and never loads an old one.

Run ``python -m client_sdk.native.build`` to build them ahead of time and to learn where they are.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client_sdk.protocol.errors import PocketfedError, RuntimeUnavailable
from client_sdk.protocol.folders import cache_folder

FOLDER: Final = Path(__file__).parent
COMPILERS: Final = ("g++", "clang++", "c++")
COMPILE_TIMEOUT_S: Final = 600.0

WARNINGS: Final = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
"""What the sources are held to, by the tests and with ``--strict``. A user's build is not: the warnings of a compiler
that is newer than this release are no reason to have no runtime."""

_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
# The two C10/ET macros must be those that the wheel's libraries were built with: they change class layouts.
_RUNTIME_FLAGS = ("-O2", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED")
# -O3 vectorises; a product and a sum that were fused would round once instead of twice, and give other bits.
_SHARING_FLAGS = ("-O3", "-ffp-contract=off")
# Kernels and delegates register themselves when they are loaded; nothing refers to them by symbol.
_LIBRARIES = ("executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")


@dataclass(frozen=True)
class ExecutorchWheel:
    """Where the installed ExecuTorch wheel lies, found without importing it."""

    root: Path
    version: str

    @classmethod
    def find(cls) -> ExecutorchWheel:
        """Locate the wheel.

        Raises:
            RuntimeUnavailable: Not installed, or installed without its C++ headers and libraries.
        """
        spec = importlib.util.find_spec("executorch")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeUnavailable("ExecuTorch is not installed; run `pip install executorch==1.5.1`")
        for location in spec.submodule_search_locations:
            root = Path(location)
            if (root / "include" / "executorch" / "extension" / "module").is_dir() and any(
                (root / "lib").glob("libexecutorch.*")
            ):
                return cls(root, importlib.metadata.version("executorch"))
        raise RuntimeUnavailable(
            f"the ExecuTorch package in {list(spec.submodule_search_locations)} has no C++ headers and libraries; "
            "install the wheel with `pip install executorch==1.5.1`"
        )


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX`` (which may carry arguments), else the first of ``COMPILERS`` on the path.

    Raises:
        RuntimeUnavailable: There is none.
    """
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if not command or shutil.which(command[0]) is None:
            raise RuntimeUnavailable(f"$CXX names {named!r}, which is not an executable; unset it or correct it")
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise RuntimeUnavailable(
        "no C++17 compiler was found, and the native libraries are compiled once per machine; "
        "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`) or set $CXX"
    )


@dataclass(frozen=True)
class Library:
    """A native library that is compiled from one source and one header, and exports what its map lists.

    Attributes:
        name: Of the file, and of its source and header without their endings.
        purpose: What errors call it.
        arguments: Everything on the compiler's command line but the compiler, the source and the output: before the
            source, and after it.
        source: C++ source.
        header: Its C ABI.
        exports: Version script for the linker.
    """

    name: str
    purpose: str
    arguments: Callable[[], tuple[list[str], list[str]]]
    source: Path
    header: Path
    exports: Path

    @property
    def path(self) -> Path:
        """Where the library for these sources and flags lies, whether or not it exists.

        The compiler is not part of the name: a device whose library was built by a set-up step needs none to find it.

        Raises:
            RuntimeUnavailable: Something that it is compiled against is not installed.
        """
        digest = hashlib.sha256()
        files = [file.read_bytes() for file in (self.source, self.header, self.exports)]
        for part in (*files, "\0".join(self.command()).encode()):
            digest.update(hashlib.sha256(part).digest())
        return cache_folder("native") / f"{self.name}-{digest.hexdigest()[:24]}.so"

    def ensure_built(self) -> Path:
        """Path of the current library; compiles it if it is not there yet.

        Concurrent callers, in this or another process, wait for one build. The file appears whole or not at all.

        Raises:
            RuntimeUnavailable: Something that it is compiled against is not installed, no compiler, a failed
                compilation, or no writable cache.
        """
        target = self.path
        if target.exists():
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(target.with_suffix(".lock")):
                if not target.exists():
                    self._compile(target)
        except OSError as e:
            raise RuntimeUnavailable(
                f"{self.purpose} cannot be stored in {target.parent}: {e}; point $POCKETFED_CACHE at a writable folder"
            ) from e
        return target

    def command(self) -> list[str]:
        """The compiler's arguments but for the output.

        Raises:
            RuntimeUnavailable: Something that it is compiled against is not installed.
        """
        before, after = self.arguments()
        return [*_FLAGS, *before, "-shared", f"-Wl,--version-script={self.exports}", str(self.source), *after]

    def check_warnings(self) -> None:
        """Compile under ``WARNINGS``, for nothing but what the compiler says.

        Raises:
            RuntimeUnavailable: It warns, or there is none.
        """
        before, _ = self.arguments()
        self._run([*_FLAGS, *WARNINGS, *before, "-fsyntax-only", str(self.source)])

    def _compile(self, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
            output = Path(scratch) / target.name
            self._run([*self.command(), "-o", str(output)])
            output.replace(target)

    def _run(self, arguments: list[str]) -> None:
        compiler = find_compiler()
        try:
            done = subprocess.run(  # noqa: S603 - the compiler is the user's own, the arguments are ours
                [*compiler, *arguments], capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as e:
            raise RuntimeUnavailable(f"{compiler[0]} did not finish within {COMPILE_TIMEOUT_S:.0f} s") from e
        if done.returncode != 0:
            raise RuntimeUnavailable(
                f"{compiler[0]} could not compile {self.purpose} (exit status {done.returncode}):\n"
                + "\n".join(done.stderr.splitlines()[:20])
            )


def _runtime_arguments() -> tuple[list[str], list[str]]:
    wheel = ExecutorchWheel.find()
    lib = wheel.root / "lib"
    before = [
        *_RUNTIME_FLAGS,
        f'-DPOCKETFED_EXECUTORCH_VERSION="{wheel.version}"',
        f"-isystem{wheel.root / 'include'}",
        f"-isystem{wheel.root / 'include/executorch/runtime/core/portable_type/c10'}",
    ]
    after = [f"-L{lib}", "-Wl,--no-as-needed", *(f"-l{name}" for name in _LIBRARIES), f"-Wl,-rpath,{lib}"]
    return before, after


RUNTIME: Final = Library(
    "pocketfed_shim",
    "the native runtime",
    _runtime_arguments,
    FOLDER / "pocketfed_shim.cpp",
    FOLDER / "pocketfed_shim.h",
    FOLDER / "pocketfed_shim.map",
)

SHARING: Final = Library(
    "pocketfed_sharing",
    "the native sharing kernels",
    lambda: ([*_SHARING_FLAGS], []),
    FOLDER / "sharing.cpp",
    FOLDER / "sharing.h",
    FOLDER / "sharing.map",
)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also by a killed process
        yield


def main(arguments: Sequence[str] = ()) -> int:
    """Build the libraries (or find them current) and print their paths; one that fails does not stop the other.

    Args:
        arguments: ``--strict`` compiles the sources under ``WARNINGS`` first.
    """
    parser = argparse.ArgumentParser(prog="python -m client_sdk.native.build", description="build the native libraries")
    parser.add_argument("--strict", action="store_true", help="a warning of the compiler is an error")
    strict = parser.parse_args(arguments).strict
    status = 0
    for library in (RUNTIME, SHARING):
        try:
            if strict:
                library.check_warnings()
            print(library.ensure_built())  # noqa: T201 - the command's result
        except PocketfedError as e:
            print(f"error: {e}", file=sys.stderr)  # noqa: T201 - the command's diagnosis
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
