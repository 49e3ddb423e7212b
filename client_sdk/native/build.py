"""Compile the native shim once, against the installed ExecuTorch wheel; torch-free, and a no-op when current.

The library lies in a per-user cache under a name that is the hash of what it depends on (source, header, ExecuTorch
release and place, flags), so an upgrade of any of them builds a new one and never loads an old one.

Run ``python -m client_sdk.native.build`` to build it ahead of time and to learn where it is.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client_sdk.protocol.errors import PocketfedError, RuntimeUnavailable
from client_sdk.protocol.folders import cache_folder

SOURCE: Final = Path(__file__).with_name("pocketfed_shim.cpp")
HEADER: Final = Path(__file__).with_name("pocketfed_shim.h")
COMPILERS: Final = ("g++", "clang++", "c++")
COMPILE_TIMEOUT_S: Final = 600.0

# The two C10/ET macros must be those that the wheel's libraries were built with: they change class layouts.
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DET_EVENT_TRACER_ENABLED",
)
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
        "no C++17 compiler was found, and the native runtime is compiled once per machine; "
        "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`) or set $CXX"
    )


def _arguments(wheel: ExecutorchWheel) -> list[str]:
    """Everything on the compiler's command line but the compiler and the output."""
    lib = wheel.root / "lib"
    return [
        *_FLAGS,
        f'-DPOCKETFED_EXECUTORCH_VERSION="{wheel.version}"',
        f"-isystem{wheel.root / 'include'}",
        f"-isystem{wheel.root / 'include/executorch/runtime/core/portable_type/c10'}",
        str(SOURCE),
        f"-L{lib}",
        "-Wl,--no-as-needed",
        *(f"-l{name}" for name in _LIBRARIES),
        f"-Wl,-rpath,{lib}",
    ]


def library_path() -> Path:
    """Where the library for the installed wheel, these sources and these flags lies, whether or not it exists.

    The compiler is not part of the name: a device whose library was built by a set-up step needs none to find it.

    Raises:
        RuntimeUnavailable: ExecuTorch is not installed.
    """
    wheel = ExecutorchWheel.find()
    digest = hashlib.sha256()
    for part in (SOURCE.read_bytes(), HEADER.read_bytes(), "\0".join(_arguments(wheel)).encode()):
        digest.update(hashlib.sha256(part).digest())
    return cache_folder("native") / f"pocketfed_shim-{digest.hexdigest()[:24]}.so"


def ensure_built() -> Path:
    """Path of the current library; compiles it if it is not there yet.

    Concurrent callers, in this or another process, wait for one build. The file appears whole or not at all.

    Raises:
        RuntimeUnavailable: No ExecuTorch wheel, no compiler, a failed compilation, or no writable cache.
    """
    target = library_path()
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(target)
    except OSError as e:
        raise RuntimeUnavailable(
            f"the native runtime cannot be stored in {target.parent}: {e}; point $POCKETFED_CACHE at a writable folder"
        ) from e
    return target


def _compile(target: Path) -> None:
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        output = Path(scratch) / target.name
        command = [*compiler, *_arguments(ExecutorchWheel.find()), "-o", str(output)]
        try:
            done = subprocess.run(  # noqa: S603 - the compiler is the user's own, the arguments are ours
                command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as e:
            raise RuntimeUnavailable(f"{compiler[0]} did not finish within {COMPILE_TIMEOUT_S:.0f} s") from e
        if done.returncode != 0:
            raise RuntimeUnavailable(
                f"{compiler[0]} could not compile the native runtime (exit status {done.returncode}):\n"
                + "\n".join(done.stderr.splitlines()[:20])
            )
        output.replace(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also by a killed process
        yield


def main() -> int:
    """Build the library (or find it current) and print its path."""
    try:
        print(ensure_built())  # noqa: T201 - the command's result
    except PocketfedError as e:
        print(f"error: {e}", file=sys.stderr)  # noqa: T201 - the command's diagnosis
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
