"""Export of the reference models: time with a cold and a warm cache, planned memory, and the time of one step.

Run ``python tests/benchmarks/bench_export.py`` (some minutes: of each model first the plain methods, then those of
meta-learning with K = 5, of which ``maml`` of the CNN takes longest; ``softmax`` as an argument measures that model
alone). Step times are CPU time of the calling thread, so
that other work on the machine does not count; the kernels run on one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from client_sdk.protocol.errors import PocketfedError
from client_sdk.protocol.program import MethodSpec, Program, Role
from mobile_export import ProgramBundle, build_model, export_program

BATCH_SIZES = {Role.GRAD: (8, 32), Role.TRAIN: (8, 20, 32), Role.EVALUATE: (256,), Role.INFER: (1, 32)}
META_BATCH_SIZES = dict.fromkeys((Role.ADAPT, Role.REPTILE, Role.MAML, Role.FOMAML, Role.PER_FEDAVG), (8,))
INNER_STEPS = 5
STEPS = 50
MODELS = ("softmax", "mlp", "cnn")


def example(spec: MethodSpec, bundle: ProgramBundle) -> list[np.ndarray]:
    """Inputs of a method: the initial weights, a small learning rate, normal features, no masked example."""
    rng = np.random.default_rng(0)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        match name.rpartition("_")[2]:
            case "w":
                return bundle.initial_weights()
            case "lr" | "rates":
                return np.full(shape, 0.01)
            case "y":
                return rng.integers(0, bundle.manifest.num_classes, shape)
            case "mask":
                return np.ones(shape)
        return rng.standard_normal(shape)

    return [np.ascontiguousarray(value(t.name, t.shape), dtype=t.dtype) for t in spec.inputs]


def step_ms(program: Program, spec: MethodSpec, inputs: list[np.ndarray]) -> float:
    """Median CPU time of one call in milliseconds, after a warm-up."""
    seconds = []
    for _ in range(STEPS + 3):
        begin = time.thread_time()
        program.run(spec.name, *inputs)
        seconds.append(time.thread_time() - begin)
    return float(np.median(seconds[3:])) * 1e3


def measure(name: str, kind: str, scratch: Path, options: dict[str, object]) -> None:
    """Export a model twice and run its methods; print what was measured."""
    model = build_model(name, (784,), 10, seed=0)
    seconds = []
    for run in ("cold", "warm"):
        begin = time.perf_counter()
        bundle = export_program(model, out_dir=scratch / name, cache_dir=scratch / "cache", **options)
        seconds.append(time.perf_counter() - begin)
        assert bundle.cached == (run == "warm")
    worst = bundle.parity.worst
    print(  # noqa: T201 - the benchmark's result
        f"{name}, {kind}: {bundle.manifest.num_parameters} parameters, {len(bundle.manifest.methods)} methods, program "
        f"{bundle.manifest.program_bytes / 1024:.0f} KiB; export {seconds[0]:.1f} s, from the cache "
        f"{seconds[1]:.2f} s; parity {worst.error:.1e} ({worst.method}, {worst.output})"
    )
    programs: dict[str, Program] = {}
    for runtime in ("native", "pybindings"):
        try:
            programs[runtime] = bundle.load(runtime)
        except PocketfedError as e:
            print(f"  {runtime}: {e}")  # noqa: T201
    for spec in bundle.manifest.methods:
        times = ", ".join(
            f"{runtime} {step_ms(program, spec, example(spec, bundle)):.2f} ms" for runtime, program in programs.items()
        )
        planned = f"{spec.planned_memory_bytes / 1024:8.1f} KiB"
        print(f"  {spec.name:<14} planned {planned}   {times}")  # noqa: T201
    for program in programs.values():
        program.close()


def main() -> int:
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            measure(name, "plain", Path(scratch), {"batch_sizes": BATCH_SIZES})
            measure(
                name,
                f"K = {INNER_STEPS}",
                Path(scratch),
                {"batch_sizes": META_BATCH_SIZES, "inner_steps": (INNER_STEPS,)},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
