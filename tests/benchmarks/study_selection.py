"""What each policy of selection costs and gives, on the same fleets: a table in Markdown, in virtual time.

    .venv/bin/python tests/benchmarks/study_selection.py

The settings are fixed; none was chosen by looking at the outcome. Figures are means over ``SEEDS``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation

FLEET = {
    "devices": 24, "rounds": 30, "model": "softmax", "cohort": 4, "engine": "cohort",
    "stragglers": 0.3, "slowdown": 60.0,
}  # fmt: skip
SEEDS = (1, 2, 3)
POLICIES = ("any", "fair", "fast", "diverse")


def run(policy: str, seed: int) -> SimulationResults:
    """One fleet under one policy."""
    config = SimulationConfig.parse({**FLEET, "seed": seed, "selection": {"policy": policy}})
    with tempfile.TemporaryDirectory() as folder, RunFolder.begin(Path(folder) / "run", config) as opened:
        return run_simulation(opened, RunOptions(workers=1))


def main() -> None:
    """Print the table."""
    lines = [
        "| policy | virtual minutes, mean | of each fleet | Jain index | slow beside others | accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        runs = [run(policy, seed) for seed in SEEDS]
        minutes = [r.virtual_seconds / 60 for r in runs if r.virtual_seconds is not None]
        slow = [r.slow_share for r in runs if r.slow_share is not None]
        lines.append(
            f"| `{policy}` | {statistics.fmean(minutes):.0f} | {', '.join(f'{m:.0f}' for m in minutes)} "
            f"| {statistics.fmean(r.jain_index for r in runs):.2f} | {statistics.fmean(slow):.2f} "
            f"| {100 * statistics.fmean(r.final_accuracy for r in runs):.1f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
