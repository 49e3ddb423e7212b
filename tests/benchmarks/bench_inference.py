"""A personal model served in float and in int8: time of a call, memory, and what the answers lose.

Each variant runs in a process of its own without torch, on a bundle of its own that holds what that variant needs: the
``infer`` methods with the weights as an input, or ``infer_int8`` with the head as an input. Times are medians of the
process's CPU time; memory is what the process holds resident beyond what it held before it opened the bundle. Models
are trained on scikit-learn's digits, enlarged where the model takes 28x28, so that the answers mean something; the last
layer is the head.

    python tests/benchmarks/bench_inference.py [--calls 200]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from client_sdk.inference import PersonalInference
from client_sdk.memory_budget import resident_bytes
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.program import WEIGHTS_FILE
from client_sdk.runtime import load_program

BATCH_SIZES = (1, 32)
MODELS = (
    ("mlp 8x8", "mlp", (8, 8), (64,)),
    ("cnn 8x8", "cnn", (8, 8), (32,)),
    ("mlp 28x28", "mlp", (28, 28), (64,)),
    ("cnn 28x28", "cnn", (28, 28), (32,)),
    ("mlp 28x28, 2 x 2048", "mlp", (28, 28), (2048, 2048)),
)
HEADS = {"mlp": "output", "cnn": "head.output"}
TRAINING_STEPS, TRAINING_BATCH, LEARNING_RATE = 300, 64, 0.1


def serve(folder: Path, precision: str, calls: int) -> dict[str, object]:
    """One variant, in this process."""
    x = np.load(folder / "test.npy")
    bundle = folder / precision
    before = resident_bytes()
    program = load_program(bundle, "native")
    weights = np.frombuffer(decode_frame((bundle / WEIGHTS_FILE).read_bytes()).payload, np.float32)
    served = PersonalInference(program, weights, precision=precision, monotonic=time.process_time)
    del weights
    found: dict[str, object] = {"program_kib": program.manifest.program_bytes / 1024}
    for size in BATCH_SIZES:
        found[f"ms_b{size}"] = served.latency(calls=calls, batch_size=size).median_s * 1e3
    found["resident_kib"] = (resident_bytes() - before) / 1024
    found["answers"] = served.predict(x).tolist()
    program.close()
    return found


def prepare(folder: Path, kind: str, shape: tuple[int, int], hidden: tuple[int, ...]) -> np.ndarray:
    """Train a model, export it both ways, and leave the test examples; returns their labels."""
    import torch  # noqa: PLC0415 - the variants' processes are without
    import torch.nn.functional as F  # noqa: N812, PLC0415 - torch's own idiom
    from sklearn.datasets import load_digits  # noqa: PLC0415

    from client_sdk.protocol.program import Role  # noqa: PLC0415
    from mobile_export import Int8Body, build_model, export_program  # noqa: PLC0415

    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = F.interpolate(pixels, shape, mode="bilinear")[:, 0] if shape != (8, 8) else pixels[:, 0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.tensor(labels)[order]
    train, test = slice(0, 1200), slice(1200, None)
    model = build_model(kind, shape, 10, seed=0, hidden=hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(TRAINING_STEPS):
        batch = torch.randint(0, 1200, (TRAINING_BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    body = Int8Body((HEADS[kind],), x[train][:200].numpy())
    export_program(model, out_dir=folder / "float", batch_sizes={Role.INFER: BATCH_SIZES})
    export_program(model, out_dir=folder / "int8", batch_sizes={Role.INFER_INT8: BATCH_SIZES}, int8=body)
    np.save(folder / "test.npy", x[test].numpy())
    return y[test].numpy()


def main() -> int:
    """Run all models; with ``--serve`` one variant of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="timed calls of each method")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(serve(Path(args.serve[0]), args.serve[1], args.calls)))  # noqa: T201 - for the parent
        return 0
    for name, kind, shape, hidden in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            labels = prepare(Path(scratch), kind, shape, hidden)
            found = {}
            for precision in ("float", "int8"):
                done = subprocess.run(
                    [sys.executable, __file__, "--serve", scratch, precision, "--calls", str(args.calls)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                found[precision] = json.loads(done.stdout)
            floating, int8 = found["float"], found["int8"]
            answers = {precision: np.array(f["answers"]) for precision, f in found.items()}
            case = {"model": name}
            for size in BATCH_SIZES:
                ours, theirs = int8[f"ms_b{size}"], floating[f"ms_b{size}"]
                case |= {
                    f"float_ms_b{size}": round(theirs, 4),
                    f"int8_ms_b{size}": round(ours, 4),
                    f"times_faster_b{size}": round(theirs / ours, 2),
                }
            weights_kib = (Path(scratch) / "float" / WEIGHTS_FILE).stat().st_size / 1024
            case |= {
                "float_kib": round(floating["program_kib"] + weights_kib, 1),
                "int8_kib": round(int8["program_kib"], 1),
                "float_resident_kib": round(floating["resident_kib"]),
                "int8_resident_kib": round(int8["resident_kib"]),
                "float_accuracy": round(float((answers["float"] == labels).mean()), 4),
                "int8_accuracy": round(float((answers["int8"] == labels).mean()), 4),
                "same_answers": round(float((answers["float"] == answers["int8"]).mean()), 4),
            }
        print(json.dumps(case), flush=True)  # noqa: T201 - the benchmark's result
    return 0


if __name__ == "__main__":
    sys.exit(main())
