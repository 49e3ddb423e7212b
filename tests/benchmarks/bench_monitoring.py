"""How often the divergence detector cries wolf, and how late it is: docs/numerics.md has the tables.

    .venv/bin/python tests/benchmarks/bench_monitoring.py                 # 100 seeds a cell
    .venv/bin/python tests/benchmarks/bench_monitoring.py --seeds 10

Simulated curves (tests/curves.py), so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.curves import BREAK, ROUNDS, SHAPES, diverged_at, diverging, honest, oscillating

NOISES = (0.05, 0.2, 0.4)


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


def false_alarms(shape: str, noise: float, seeds: int) -> int:
    return sum(diverged_at(*honest(shape, noise, seed)) is not None for seed in range(seeds))


def delays(curve: Callable, growth: float, noise: float, seeds: int) -> tuple[float, int]:
    """Median and longest number of rounds from the break to the alarm; an alarm before it, or none, is an error."""
    found = [diverged_at(*curve(growth, noise, seed)) for seed in range(seeds)]
    found = [at - BREAK for at in found if at is not None and at > BREAK]
    if len(found) < 0.97 * seeds:
        raise SystemExit(f"growth {growth} with noise {noise}: found in time in {len(found)} of {seeds} runs only")
    return statistics.median(found), max(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="runs per cell (default: 100)")
    seeds = parser.parse_args().seeds
    say(f"False alarms in {seeds} honest runs of {ROUNDS} rounds, by the noise of loss and norm (log-normal).\n")
    say("| loss | " + " | ".join(f"{100 * noise:.0f} %" for noise in NOISES) + " |\n|---|" + "---|" * len(NOISES))
    alarms = {shape: [false_alarms(shape, noise, seeds) for noise in NOISES] for shape in SHAPES}
    for shape, found in alarms.items():
        say(f"| {shape} | " + " | ".join(map(str, found)) + " |")
    say("\nRounds from the break to the alarm: median, longest.\n")
    say(
        "| after the break | "
        + " | ".join(f"{100 * noise:.0f} %" for noise in NOISES)
        + " |\n|---|"
        + "---|" * len(NOISES)
    )
    late: dict[str, list[tuple[float, int]]] = {}
    cases = [(f"grows {g:g} times a round", diverging, g) for g in (1.02, 1.05, 1.1, 1.3, 2.0)]
    cases += [(f"swings, {g:g} times wider a round", oscillating, g) for g in (1.05, 1.2, 1.5)]
    for what, curve, growth in cases:
        late[what] = [delays(curve, growth, noise, seeds) for noise in NOISES]
        say(f"| {what} | " + " | ".join(f"{median:g}, {longest}" for median, longest in late[what]) + " |")
    noises = [f"noise_{100 * noise:.0f}_percent" for noise in NOISES]
    for shape, found in alarms.items():
        case = {"false_alarms_of": shape, "runs": seeds, **dict(zip(noises, found, strict=True))}
        say(json.dumps({"bench": "monitoring", **case}))
    for what, delay in late.items():
        case = {"rounds_to_the_alarm": what, "figures": "median, longest", **dict(zip(noises, delay, strict=True))}
        say(json.dumps({"bench": "monitoring", **case}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
