"""Time of one step of exported models through the native shim, as a ratio to eager PyTorch on one thread.

Two oracles run in turn with the program: the exported module itself in eager mode, and (``natural``) the model as one
writes it for PyTorch alone, with ``nn.Conv2d``, ``loss.backward()`` and SGD. Times are medians of the process's CPU
time. Bar, against the natural form: <= 2 for one training step of the CNNs.

    python tests/benchmarks/bench_step.py [--calls 40] [--check]
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
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import nn

from client_sdk.protocol.program import MethodSpec, Role
from mobile_export import ProgramBundle, build_model, export_program

BATCH_SIZES = {Role.GRAD: (8, 32), Role.TRAIN: (8, 32), Role.INFER: (1, 32)}
BAR = 2.0


class NaturalCNN(nn.Module):
    """The reference CNN as one writes it for PyTorch alone."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.feature_shape = (height, width)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * (height // 4) * (width // 4), 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[:, None])


def inputs(spec: MethodSpec, bundle: ProgramBundle) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    values = {
        "w": bundle.initial_weights(),
        "lr": np.full(1, 0.01),
        "y": rng.integers(0, bundle.manifest.num_classes, spec.batch_size),
        "mask": np.ones(spec.batch_size),
    }
    return [
        np.ascontiguousarray(values[t.name] if t.name in values else rng.standard_normal(t.shape), dtype=t.dtype)
        for t in spec.inputs
    ]


def eager(model: nn.Module, spec: MethodSpec, shape: Sequence[int]) -> Callable[[], object]:
    """One call of the method's role by ordinary PyTorch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(spec.batch_size, *shape), torch.randint(0, 10, (spec.batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if spec.role is Role.TRAIN:
            optimizer.step()

    @torch.no_grad()
    def infer() -> torch.Tensor:
        return model(x)

    return infer if spec.role is Role.INFER else step


def medians_ms(calls: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Median CPU time of each call; they run in turn, and the first three rounds do not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(times + 3):
        for call, kept in zip(calls, seconds, strict=True):
            begin = time.process_time()
            call()
            kept.append(time.process_time() - begin)
    return [float(np.median(kept[3:])) * 1e3 for kept in seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=40, metavar="N", help="timed calls of each")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the bar is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind, shape in (
            ("softmax 28x28", "softmax", (28, 28)),
            ("mlp 28x28", "mlp", (28, 28)),
            ("cnn 28x28", "cnn", (28, 28)),
            ("cnn 8x8", "cnn", (8, 8)),
            ("nn.Conv2d 28x28", "conv", (28, 28)),
        ):
            model = NaturalCNN(*shape) if kind == "conv" else build_model(kind, shape, 10, seed=0)
            natural = NaturalCNN(*shape) if kind == "cnn" else model
            bundle = export_program(model, out_dir=Path(scratch) / name.replace(" ", "-"), batch_sizes=BATCH_SIZES)
            program = bundle.load("native")
            for spec in bundle.manifest.methods:
                arrays = inputs(spec, bundle)
                ours, same, plain = medians_ms(
                    [
                        functools.partial(program.run, spec.name, *arrays),
                        eager(model, spec, shape),
                        eager(natural, spec, shape),
                    ],
                    args.calls,
                )
                case = {
                    "model": name, "method": spec.name, "step_ms": round(ours, 3), "eager_ms": round(same, 3),
                    "natural_ms": round(plain, 3), "to_eager": round(ours / same, 2),
                    "to_natural": round(ours / plain, 2), "planned_mib": round(spec.planned_memory_bytes / 2**20, 2),
                }  # fmt: skip
                print(json.dumps(case), flush=True)  # noqa: T201 - the benchmark's result
                missed |= kind in {"cnn", "conv"} and spec.role is Role.TRAIN and ours > BAR * plain
            program.close()
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
