"""What differential privacy costs on Fashion-MNIST: the same fleet with and without it, into docs/private-accuracy.md.

    .venv/bin/python tests/benchmarks/study_private.py                 # some minutes: 12,000 devices, 80 rounds
    .venv/bin/python tests/benchmarks/study_private.py --devices 300 --rounds 3 --seeds 1 --out /tmp/page.md

Two runs of ``pocketfed simulate`` for each seed. Their settings were chosen on the validation split; the test split is
read once in each run, after its last round.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from simulator.results import SimulationResults

PAGE = Path(__file__).resolve().parents[2] / "docs" / "private-accuracy.md"
COMMON = "--dataset fashion-mnist-14 --engine cohort --partition iid --server-momentum 0.9 --weighting uniform"
PLAIN = "--server-lr 4"
PRIVATE = "--clip-norm 0.5 --server-lr 5 --epsilon 1 --delta 1e-5"
BAR = 0.02


def command(devices: int, rounds: int, seed: int, settings: str) -> str:
    """The command of one run, without where it writes."""
    fleet = f"--devices {devices} --cohort {devices} --rounds {rounds} --seed {seed}"
    return f"pocketfed simulate {COMMON} {fleet} {settings}"


def run(line: str) -> SimulationResults:
    """What a command measured."""
    with tempfile.TemporaryDirectory() as folder:
        program, *words = shlex.split(line)
        subprocess.run(
            [str(Path(sys.executable).with_name(program)), *words, "--no-progress", "--out", f"{folder}/run"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return SimulationResults.read(Path(folder, "run", "results.json"))


def page(rows: list[tuple[int, SimulationResults, SimulationResults]], devices: int, rounds: int) -> str:
    """The page: what was run, what came of it."""
    each = -(-55_000 // devices)
    lines = [
        "# What differential privacy costs",
        "",
        "Written by `make private`; do not edit. Fashion-MNIST, averaged to 14 x 14 pixels, centred, of one length;",
        f"softmax regression; {devices:,} devices with at most {each} images each, all of them in each of {rounds}",
        "rounds; one local step. The budget is for a whole device and the whole run: epsilon 1 at delta 1e-5, zero-out",
        "adjacency (a device is told from one that sends nothing; [privacy](privacy.md)). Settings were chosen on the",
        "validation split; the test split is read once, after the last round.",
        "",
        "| seed | without privacy | with privacy | lost | epsilon spent | minutes |",
        "|---|---|---|---|---|---|",
    ]
    lost = []
    for seed, plain, private in rows:
        gap = (plain.final_accuracy or 0.0) - (private.final_accuracy or 0.0)
        lost.append(gap)
        lines.append(
            f"| {seed} | {plain.final_accuracy:.2%} | {private.final_accuracy:.2%} | {100 * gap:.2f} points | "
            f"{spent(private):.4f} | {private.seconds / 60:.1f} |"
        )
    mean, most = 100 * statistics.mean(lost), 100 * max(lost)
    lines += [
        "",
        f"Lost on average: {mean:.2f} points, at most {most:.2f} (allowed: {100 * BAR:.0f}).",
        f"Measured on {os.cpu_count()} cores, {platform.machine()}.",
        "",
        "```",
        command(devices, rounds, rows[0][0], PLAIN) + " --out DIR",
        command(devices, rounds, rows[0][0], PRIVATE) + " --out DIR",
        "```",
        "",
    ]
    return "\n".join(lines)


def spent(results: SimulationResults) -> float:
    """Epsilon after the last round."""
    return results.rounds[-1].epsilon or 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    rows = []
    for seed in range(1, args.seeds + 1):
        plain, private = (run(command(args.devices, args.rounds, seed, settings)) for settings in (PLAIN, PRIVATE))
        rows.append((seed, plain, private))
        told = f"seed {seed}: {plain.final_accuracy:.4f} without, {private.final_accuracy:.4f} with privacy"
        print(told, flush=True)  # noqa: T201 - progress
    args.out.write_text(page(rows, args.devices, args.rounds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
