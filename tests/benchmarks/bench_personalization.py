"""What a device session of each meta-learning algorithm costs: counted operations, and time in the native runtime.

A session is what a device computes for one report with K = 5 steps in batches of 8: one call of ``maml``, ``fomaml``
or ``reptile``, of which the first two have 8 query examples on top, or five calls of ``per_fedavg``, a local meta step
each.

Counted are the multiplications and additions of matrix products and convolutions, as ordinary PyTorch runs them on the
eager oracle; measured is the process's CPU time, all sessions in turn in one process, as a median. Bar: Reptile is at
least twice cheaper than second-order MAML, counted and measured.

    python tests/benchmarks/bench_personalization.py [--calls 30] [--check]
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from client_sdk.protocol.program import Manifest, MethodSpec, Role
from mobile_export import EagerProgram, build_model, export_program

STEPS, BATCH, BAR = 5, 8, 2.0
SESSIONS = {Role.MAML: 1, Role.FOMAML: 1, Role.REPTILE: 1, Role.PER_FEDAVG: STEPS}
"""Calls that make a session."""

MODELS = (("mlp 28x28", "mlp", (28, 28)), ("cnn 28x28", "cnn", (28, 28)))


def method_of(manifest: Manifest, role: Role) -> MethodSpec:
    return manifest.method(role, BATCH) if role is Role.PER_FEDAVG else manifest.adapting_method(role, BATCH, STEPS)


def inputs(spec: MethodSpec, weights: np.ndarray, classes: int) -> list[np.ndarray]:
    """Ordinary examples, none of them masked, and rates at which nothing diverges."""
    rng = np.random.default_rng(0)
    arrays = []
    for t in spec.inputs:
        match t.name.split("_")[-1]:
            case "w":
                value = weights
            case "lr":
                value = np.full(t.shape, 0.01)
            case "x":
                value = rng.random(t.shape)
            case "y":
                value = rng.integers(0, classes, t.shape)
            case "mask":
                value = np.ones(t.shape)
            case other:
                raise SystemExit(f"{spec.name} has an input {other}, which is not known here")
        arrays.append(np.ascontiguousarray(value, dtype=t.dtype))
    return arrays


def counted(call: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def medians_ms(calls: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Median CPU time of each; they run in turn, and the first two rounds do not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(times + 2):
        for call, kept in zip(calls, seconds, strict=True):
            begin = time.process_time()
            call()
            kept.append(time.process_time() - begin)
    return [float(np.median(kept[2:])) * 1e3 for kept in seconds]


def main() -> int:
    """Run once; exit status 1 if the bar is missed and ``--check`` is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=30, metavar="N", help="timed sessions of each")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the bar is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind, shape in MODELS:
            model = build_model(kind, shape, 10, seed=0)
            bundle = export_program(
                model,
                out_dir=Path(scratch) / kind,
                batch_sizes=dict.fromkeys(SESSIONS, (BATCH,)),
                inner_steps=(STEPS,),
            )
            manifest, weights = bundle.manifest, bundle.initial_weights()
            eager, program = EagerProgram(model, manifest), bundle.load("native")
            specs = {role: method_of(manifest, role) for role in SESSIONS}
            arrays = {role: inputs(spec, weights, manifest.num_classes) for role, spec in specs.items()}

            def session(runner: Callable[..., object], role: Role, specs=specs, arrays=arrays) -> None:
                for _ in range(SESSIONS[role]):
                    runner(specs[role].name, *arrays[role])

            operations = {role: counted(functools.partial(session, eager.run, role)) for role in SESSIONS}
            calls = [functools.partial(session, program.run, role) for role in SESSIONS]
            times = dict(zip(SESSIONS, medians_ms(calls, args.calls), strict=True))
            program.close()
            for role, spec in specs.items():
                case = {
                    "model": name, "session": role.value, "calls": SESSIONS[role],
                    "mflop": round(operations[role] / 1e6, 2), "ms": round(times[role], 3),
                    "flop_to_reptile": round(operations[role] / operations[Role.REPTILE], 2),
                    "time_to_reptile": round(times[role] / times[Role.REPTILE], 2),
                    "planned_mib": round(spec.planned_memory_bytes / 2**20, 2),
                }  # fmt: skip
                print(json.dumps(case), flush=True)  # noqa: T201 - the benchmark's result
            for cost in (operations, times):
                missed |= cost[Role.MAML] < BAR * cost[Role.REPTILE]
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
