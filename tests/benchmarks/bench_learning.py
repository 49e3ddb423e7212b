"""What settings cost or save in a simulated fleet: accuracy, bytes, simulated time to a loss, time of a round.

    .venv/bin/python tests/benchmarks/bench_learning.py             # some minutes; one JSON line a case
    .venv/bin/python tests/benchmarks/bench_learning.py --quick     # digits instead of fashion-mnist

Each case runs ``pocketfed simulate`` as a process of its own, once with a setting and once without, and compares:

- *compression*: top-k 1 % with error feedback beside dense updates, test accuracy and bytes sent.
- *asynchrony*: a fifth of the devices is ten times slower; simulated time until the validation loss is as low as that
  of the synchronous run at its end.
- *round time*: wall-clock time of a round with each robust rule beside the mean, against the real server, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RULES = ("krum", "multi-krum", "trimmed-mean", "median", "geometric-median", "centered-clipping", "bulyan")


def say(**case: object) -> None:
    print(json.dumps({"bench": "learning", **case}), flush=True)  # noqa: T201 - a benchmark reports on stdout


def simulate(*flags: str) -> dict[str, Any]:
    """Results of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("pocketfed")), "simulate", "--no-progress", *flags]
        subprocess.run([*command, "--out", folder + "/run"], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run", "results.json").read_text())


def compression(dataset: str, rounds: int, seeds: int) -> None:
    common = ("--engine", "cohort", "--dataset", dataset, "--devices", "50", "--cohort", "25", "--epochs", "2")
    common = (*common, "--rounds", str(rounds))
    dense = {seed: simulate(*common, "--seed", str(seed)) for seed in range(1, seeds + 1)}
    for spec in ("topk:0.01", "topk:0.01,bits=8", "randomk:0.1,rotate", "quantize:8", "quantize:4"):
        gaps, savings, accuracies = [], [], []
        for seed, plain in dense.items():
            sparse = simulate(*common, "--seed", str(seed), "--compression", spec)
            gaps.append(plain["final_accuracy"] - sparse["final_accuracy"])
            accuracies.append(sparse["final_accuracy"])
            savings.append(plain["bytes_up"] / sparse["bytes_up"])
        say(
            case=f"{spec} beside dense, {dataset}, {rounds} rounds", seeds=seeds, accuracy=statistics.mean(accuracies),
            accuracy_lost=statistics.mean(gaps), worst_lost=max(gaps), bytes_saved=statistics.mean(savings),
        )  # fmt: skip


def asynchrony(dataset: str, rounds: int, seeds: int) -> None:
    common = ("--engine", "cohort", "--dataset", dataset, "--devices", "100", "--stragglers", "0.2", "--slowdown", "10")
    ratios = []
    for seed in range(1, seeds + 1):
        sync = simulate(*common, "--seed", str(seed), "--cohort", "20", "--rounds", str(rounds))
        target = sync["rounds"][-1]["loss"]
        late = simulate(
            *common, "--seed", str(seed), "--async", "--buffer", "10", "--overselect", "2", "--rounds", str(6 * rounds)
        )
        reached = next((r["closed_at_s"] for r in late["rounds"] if r["loss"] <= target), None)
        ratios.append(None if reached is None else sync["virtual_seconds"] / reached)
    found = [r for r in ratios if r is not None]
    say(
        case=f"async beside sync, a fifth ten times slower, {dataset}", seeds=seeds, reached=len(found),
        times_faster=statistics.median(found) if found else None, worst=min(found) if found else None, bar=2,
    )  # fmt: skip


def round_time(rounds: int) -> None:
    common = ("--dataset", "digits", "--devices", "60", "--cohort", "30", "--rounds", str(rounds))
    times: dict[str, list[float]] = {name: [] for name in ("mean", *RULES)}
    for _ in range(3):
        for rule, seconds in times.items():
            flags = () if rule == "mean" else ("--rule", rule, "--byzantine", "0.2", "--attack", "sign-flip")
            seconds += [r["seconds"] for r in simulate(*common, *flags)["rounds"][2:]]
    plain = statistics.median(times["mean"])
    for rule in RULES:
        ratio = statistics.median(times[rule]) / plain
        say(case=f"round with {rule} beside the mean", times_the_mean=ratio, bar=1.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, one seed, few rounds")
    parser.add_argument("--only", choices=("compression", "asynchrony", "round-time"))
    args = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    dataset = "digits" if args.quick else "fashion-mnist"
    if args.only in (None, "compression"):
        compression(dataset, 40 if args.quick else 150, 1 if args.quick else 2)
    if args.only in (None, "asynchrony"):
        asynchrony(dataset, 20, 1 if args.quick else 3)
    if args.only in (None, "round-time"):
        round_time(6 if args.quick else 15)
    return 0


if __name__ == "__main__":
    sys.exit(main())
