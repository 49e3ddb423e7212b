"""Cost of checkpoints at the default schedule, as a fraction of training time, and of going on from one.

The exported reference models train on one thread; each save and each resume is real: bytes, checksum or encryption,
fsync, rename. The figure is what a save costs over the time to the next one that the default ``CheckpointSchedule``
leaves, and what a whole resume (read, check, begin) costs over the same time. Bar: < 2 % for each. Beside it stands
what a training of some seconds really spends that saves as often as a schedule of 2 % without a period lets it.

    python tests/benchmarks/bench_checkpoints.py [--saves 30] [--folder FOLDER] [--check]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from client_sdk.checkpoint import Checkpoint, CheckpointBinding, CheckpointManager, data_fingerprint
from client_sdk.checkpoint_schedule import CheckpointSchedule
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.training import LocalTrainer, TrainingRun
from mobile_export import build_model, export_program

MODELS = {"mlp": (784,), "cnn": (28, 28)}
CLASSES, SAMPLES, BATCH = 10, 600, 32
BAR = 0.02


def measure(name: str, folder: Path, saves: int, key: bytes | None) -> dict[str, object]:
    """One model."""
    bundle = folder / name
    if not bundle.exists():
        export_program(
            build_model(name, MODELS[name], CLASSES, seed=0),
            out_dir=bundle,
            feature_shape=MODELS[name],
            num_classes=CLASSES,
        )
    program = load_program(bundle, "native")
    manifest = program.manifest
    rng = np.random.default_rng(0)
    x = rng.random((SAMPLES, *MODELS[name]), np.float32)
    y = rng.integers(0, CLASSES, SAMPLES)
    weights = rng.normal(0, 0.05, manifest.num_parameters).astype(np.float32)
    plan = TrainingPlan(local_epochs=1000, batch_size=BATCH, learning_rate=0.01)
    trainer = LocalTrainer(program)

    start = time.perf_counter()
    fingerprint = data_fingerprint(x, y)
    fingerprint_s = time.perf_counter() - start
    binding = CheckpointBinding(
        assignment_id="0" * 32,
        task_id="0" * 32,
        model_version=0,
        model_sha256="0" * 64,
        program_sha256=manifest.program_sha256,
        parameter_table_sha256=manifest.parameter_table_sha256,
        plan=plan,
        shuffle_seed=0,
        data_sha256=fingerprint,
    )
    manager = CheckpointManager(folder / f"{name}-{key is not None}", key=key)
    run = trainer.begin(weights, x, y, plan, 0)
    calls, costs, resumes = [], [], []
    for _ in range(saves):
        start = time.perf_counter()
        run.advance()
        calls.append(time.perf_counter() - start)
        start = time.perf_counter()
        manager.save(Checkpoint(binding, run.snapshot()))
        costs.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = manager.load(binding)
        run = trainer.begin(weights, x, y, plan, 0, state=found.state)
        resumes.append(time.perf_counter() - start)
    spent, trained = as_often_as_allowed(run, manager, binding)
    program.close()
    size = manager.inspect()[0].size
    save_s, worst_s = statistics.median(costs), max(costs)
    schedule = CheckpointSchedule()
    # As the schedule goes: by the period, or by the last save's cost, whichever is later.
    interval = max(schedule.period_s, worst_s / schedule.max_fraction)
    return {
        "bench": "checkpoints", "model": name, "parameters": manifest.num_parameters, "encrypted": key is not None,
        "file_bytes": size, "step_ms": round(1e3 * statistics.median(calls), 3),
        "save_ms": round(1e3 * save_s, 3), "worst_save_ms": round(1e3 * worst_s, 3),
        "save_in_steps": round(save_s / statistics.median(calls), 2),
        "resume_ms": round(1e3 * statistics.median(resumes), 3), "fingerprint_ms": round(1e3 * fingerprint_s, 3),
        "period_s": schedule.period_s,
        "save_fraction": round(save_s / interval, 6), "worst_save_fraction": round(worst_s / interval, 6),
        "resume_fraction": round(statistics.median(resumes) / interval, 6),
        "shortest_period_for_bar_s": round(save_s / BAR, 3), "bar": BAR,
        "saving_all_the_time_fraction": round(spent / trained, 4),
    }  # fmt: skip


def as_often_as_allowed(
    run: TrainingRun, manager: CheckpointManager, binding: CheckpointBinding, seconds: float = 3.0
) -> tuple[float, float]:
    """Seconds spent on saving, and on training, of a loop that asks the schedule before each call."""
    begun = now = time.perf_counter()
    schedule = CheckpointSchedule(period_s=1e-9).begun(begun)
    spent = 0.0
    while now - begun < seconds:
        run.advance()
        now = time.perf_counter()
        if schedule.due(now):
            manager.save(Checkpoint(binding, run.snapshot()))
            end = time.perf_counter()
            schedule = schedule.saved(end, end - now)
            spent += end - now
    return spent, time.perf_counter() - begun - spent


def main() -> int:
    """Measure both models, plain and encrypted; with ``--check`` exit status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=30, metavar="N", help="saves to measure")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--check", action="store_true", help="fail where a save costs 2 %% of the period or more")
    args = parser.parse_args()
    met = True
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for name in MODELS:
            for key in (None, bytes(range(32))):
                row = measure(name, Path(scratch), args.saves, key)
                met &= row["save_fraction"] < BAR and row["resume_fraction"] < BAR
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
    return 0 if met or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
