"""Run the native libraries under sanitizers: ``make sanitize``.

The libraries' sources and ``native_driver.cpp`` become one program, built with AddressSanitizer (leak checking on) and
UndefinedBehaviorSanitizer, and once more with ThreadSanitizer. ExecuTorch's own libraries are as the wheel has them: of
what happens inside, only the heap is watched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client_sdk.native.adapter import _DTYPE_CODES
from client_sdk.native.build import FOLDER, RUNTIME, SHARING, WARNINGS, find_compiler
from client_sdk.protocol.program import PROGRAM_FILE, Manifest
from client_sdk.runtime import read_manifest

DRIVER = Path(__file__).with_name("native_driver.cpp")


@dataclass(frozen=True)
class Sanitizer:
    """How a driver is built, and what its environment has to say."""

    name: str
    flags: tuple[str, ...]
    environment: dict[str, str]


# A refused allocation is null and not the end: the shim has to report it. "vptr" would need the runtime's type
# information, which the wheel's libraries do not carry.
ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    {
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
    },
)
THREAD = Sanitizer("thread", ("-fsanitize=thread",), {"TSAN_OPTIONS": "halt_on_error=1"})
PLAIN = Sanitizer("none", (), {})


def build(sanitizer: Sanitizer, folder: Path, verification: str) -> Path:
    """Compile the driver with both libraries inside."""
    program = folder / f"driver-{sanitizer.name}"
    before, after = RUNTIME.arguments()
    before.append(f"-DPOCKETFED_VERIFICATION={verification}")
    common = ["-std=c++17", "-g", "-fno-omit-frame-pointer", *sanitizer.flags, f"-I{FOLDER}"]
    steps = []
    for source, flags in ((RUNTIME.source, [*before, "-O1"]), (SHARING.source, ["-O1"]), (DRIVER, ["-O1", *WARNINGS])):
        output = folder / f"{sanitizer.name}-{source.stem}.o"
        steps.append(([*find_compiler(), *common, *flags, "-c", str(source), "-o", str(output)], output))
    running = [subprocess.Popen(command) for command, _ in steps]
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit("sanitize: the driver does not compile")
    objects = [str(output) for _, output in steps]
    subprocess.run([*find_compiler(), *sanitizer.flags, *objects, *after, "-pthread", "-o", str(program)], check=True)
    return program


def signatures(manifest: Manifest) -> str:
    """What the driver has to know of a program's methods; see ``native_driver.cpp``."""
    lines = []
    for method in manifest.methods:
        lines.append(f"method {method.name}")
        for kind, specs in (("in", method.inputs), ("out", method.outputs)):
            lines += [
                f"{kind} {_DTYPE_CODES[spec.dtype]} {len(spec.shape)} {' '.join(map(str, spec.shape))}"
                for spec in specs
            ]
    return "\n".join(lines) + "\n"


def run(driver: Path, sanitizer: Sanitizer, *arguments: str) -> None:
    """Run the driver and show what it says.

    Raises:
        SystemExit: It ended with another status than 0, as it does if a sanitizer finds something.
    """
    environment = os.environ | sanitizer.environment
    done = subprocess.run([str(driver), *arguments], env=environment, check=False, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        print(f"{sanitizer.name}: {line}", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: {arguments[0]} ended with status {done.returncode} under {sanitizer.name}")


def small_bundle(folder: Path) -> Path:
    """A bundle of softmax regression with every kind of method but ``share``."""
    from client_sdk.protocol.program import Role  # noqa: PLC0415 - the exporter's imports are heavy
    from mobile_export import build_model, export_program  # noqa: PLC0415

    sizes = {Role.GRAD: (4, 8), Role.TRAIN: (4, 8), Role.EVALUATE: (8,), Role.INFER: (8,)}
    model = build_model("softmax", (6,), 3, seed=0)
    export_program(model, out_dir=folder, batch_sizes=sizes, feature_shape=(6,), num_classes=3)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=300, help="damaged programs to open (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the damage (default: 1)")
    parser.add_argument("--bundle", type=Path, help="a bundle to damage; a small one is exported by default")
    parser.add_argument("--only", choices=["address", "thread", "none"], help="one build instead of both sanitizers")
    parser.add_argument(
        "--verification",
        choices=["InternalConsistency", "Minimal"],
        default="InternalConsistency",
        help="how the runtime checks a program's structure; the second is for comparing figures",
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pocketfed-sanitize-") as scratch:
        folder = Path(scratch)
        bundle = options.bundle or small_bundle(folder / "bundle")
        described = folder / "signatures"
        described.write_text(signatures(read_manifest(bundle)))
        program = str(bundle / PROGRAM_FILE)
        chosen = [
            s for s in (ADDRESS, THREAD, PLAIN) if s.name == options.only or (not options.only and s is not PLAIN)
        ]
        for sanitizer in chosen:
            driver = build(sanitizer, folder, options.verification)
            if options.verification == "InternalConsistency":  # with less, a program that is cut off may crash it
                run(driver, sanitizer, "abi", program, str(described))
            run(driver, sanitizer, "sharing")
            if sanitizer is PLAIN:
                run(driver, sanitizer, "open", program)
            if sanitizer is not THREAD and options.programs:
                run(driver, sanitizer, "mutate", program, str(described), str(options.seed), str(options.programs))
    print(f"sanitize: nothing was found ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
