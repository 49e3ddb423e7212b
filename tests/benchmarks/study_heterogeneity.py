"""What unequal phones cost FedAvg, FedNova and FedProx: days and adaptive work, into docs/heterogeneity.md.

    .venv/bin/python tests/benchmarks/study_heterogeneity.py                # some minutes
    .venv/bin/python tests/benchmarks/study_heterogeneity.py --rounds 3 --seeds 1 --out /tmp/page.md

Virtual time and accuracy only: both repeat, on however busy a machine. No setting was tuned.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
from pathlib import Path

from simulator.command import command_of
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.profiles import read_profiles
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "heterogeneity.md"
FLEET = {
    "engine": "cohort", "devices": 100, "cohort": 20, "overselect": 1.5, "partition": "dirichlet:0.3", "epochs": 5,
    "batch_size": 8, "learning_rate": 0.1, "work_scale": 3000.0,
}  # fmt: skip
PHONES = {"profiles": read_profiles("phones"), "local_work": "adaptive"}
ROWS = {
    "FedAvg, equal work, no days": {},
    "FedAvg, phones": PHONES,
    "FedProx (mu 0.1), phones": {**PHONES, "prox_mu": 0.1},
    "FedNova, phones": {**PHONES, "algorithm": "fednova"},
}


def run(config: SimulationConfig) -> SimulationResults:
    """What a run measured."""
    with tempfile.TemporaryDirectory() as scratch, RunFolder.begin(Path(scratch) / "run", config) as folder:
        return run_simulation(folder, RunOptions())


def cells(results: list[SimulationResults]) -> list[str]:
    """Test accuracy with its range, virtual hours, and how much the low end counted, as means over the seeds."""
    scores = [r.final_accuracy or 0.0 for r in results]
    hours = statistics.mean((r.virtual_seconds or 0.0) / 3600 for r in results)
    low = statistics.mean(t.counted / sum(x.counted for x in r.tiers) for r in results for t in r.tiers[-1:])
    return [f"{statistics.mean(scores):.3f}", f"{min(scores):.3f} .. {max(scores):.3f}", f"{hours:.1f}", f"{low:.0%}"]


def main() -> None:
    """Play all runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    lines, commands = [], []
    for name, settings in ROWS.items():
        configs = [
            SimulationConfig.parse({**FLEET, **settings, "rounds": args.rounds, "seed": seed})
            for seed in range(1, args.seeds + 1)
        ]
        lines.append("| " + " | ".join([name, *cells([run(c) for c in configs])]) + " |")
        commands.append(shlex.join(shlex.split(command_of(configs[0]))))
    text = f"""# What unequal phones cost

For whoever chooses an algorithm for a mixed fleet. {FLEET["devices"]} simulated devices share the digits, classes
dealt out unevenly (`dirichlet:0.3`), {args.rounds} rounds. The phones have the day of the profiles `phones`, which are
invented and not measured, and train 5, 3 or 1 epochs by tier. Virtual time begins at midnight UTC: runs this short see
that part of the day only. Means over {args.seeds} seeds, of the test split; nothing was tuned. Made by
`tests/benchmarks/study_heterogeneity.py`.

| run | accuracy | range | virtual hours | low-end share of counted reports |
|---|---|---|---|---|
{chr(10).join(lines)}

Ranges that overlap tell nothing apart. The commands of the first seeds:

```
{chr(10).join(commands)}
```
"""
    args.out.write_text(text)


if __name__ == "__main__":
    main()
