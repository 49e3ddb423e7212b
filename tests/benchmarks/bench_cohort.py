"""Clients a second through the cohort engine, beside a plain torch loop that does the training alone.

    .venv/bin/python tests/benchmarks/bench_cohort.py            # one JSON line a case
    .venv/bin/python tests/benchmarks/bench_cohort.py --check    # exit status 1 if a bar is missed

One client's work is that of the field's usual comparison: a 784-64-10 MLP (50,890 parameters), 20 examples, one step of
SGD; 1000 clients a round. The engine's figure is of the whole: check-ins and arrivals in virtual time, training,
encoding, the exact weighted mean, the server's step, the new model's frame and hash; only scoring is left to the end.

The peer is the same training in eager PyTorch, one client after another on one thread, summed in float32: what a
researcher's loop looks like. Every repeat times the loop, the engine, and the loop again; ``ratio_to_loop`` is the
median of the repeats' ratios. On a busy machine the wall clock says little about an engine with several threads beside
a loop with one: ``cpu_ratio_to_loop`` compares what the two take from the processor. The bar of 3,500 clients a second
is for two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simulator import Dataset, Fleet, Population, RunFolder, SimulationConfig, Split
from simulator.cohort.run import CohortSetting
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.journal import Journal
from simulator.monitor import Standing
from simulator.progress import SilentDisplay
from simulator.view import CommittedRound

SAMPLES, FEATURES, HIDDEN, CLASSES = 20, 784, 64, 10
EXAMPLES = 20_000
LOOPED = 250
BAR_CLIENTS_PER_S = 3500.0
BAR_ROUND_S = 3.0
BAR_PEAK_MIB = 1024.0


def synthetic() -> Dataset:
    """Random images; what they hold does not change the work."""
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        return Split(rng.standard_normal((n, FEATURES), np.float32), rng.integers(0, CLASSES, n))

    return Dataset("synthetic", split(EXAMPLES), split(256), split(256), (FEATURES,), CLASSES, "0" * 64)


@dataclass(frozen=True)
class Cost:
    """Seconds by the wall clock, and of the processor (all threads)."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())

    def since(self, clients: int) -> Cost:
        """What each client has cost since this moment."""
        now = Cost.now()
        return Cost((now.wall_s - self.wall_s) / clients, (now.cpu_s - self.cpu_s) / clients)


class TorchLoop:
    """The peer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
        )
        self._start = {k: v.clone() for k, v in self._model.state_dict().items()}
        self._x, self._y = torch.randn(LOOPED, SAMPLES, FEATURES), torch.randint(0, CLASSES, (LOOPED, SAMPLES))

    def cost_of_a_client(self) -> Cost:
        """Single-threaded."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        begun = Cost.now()
        total = {k: torch.zeros_like(v) for k, v in self._start.items()}
        for client in range(LOOPED):
            self._model.load_state_dict(self._start)
            optimizer = torch.optim.SGD(self._model.parameters(), 0.1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self._model(self._x[client]), self._y[client]).backward()
            optimizer.step()
            for k, v in self._model.state_dict().items():
                total[k] += v
        cost = begun.since(LOOPED)
        torch.set_num_threads(before)
        return cost


def beside_the_loop(job: Callable[[], Cost], repeats: int) -> dict[str, float]:
    """Run a job that returns what a client costs, between two runs of the loop each time."""
    loop = TorchLoop()
    loop.cost_of_a_client()
    job()
    ours, ratios, cpu_ratios, peers = [], [], [], []
    for _ in range(repeats):
        before, mine, after = loop.cost_of_a_client(), job(), loop.cost_of_a_client()
        ratios.append((before.wall_s + after.wall_s) / 2 / mine.wall_s)
        cpu_ratios.append((before.cpu_s + after.cpu_s) / 2 / mine.cpu_s)
        ours.append(mine)
        peers += [before, after]
    return {
        "ratio_to_loop": round(statistics.median(ratios), 2),
        "cpu_ratio_to_loop": round(statistics.median(cpu_ratios), 2),
        "clients_per_s": round(1 / statistics.median(c.wall_s for c in ours)),
        "best_clients_per_s": round(1 / min(c.wall_s for c in ours)),
        "cpu_us_a_client": round(1e6 * statistics.median(c.cpu_s for c in ours)),
        "loop_clients_per_s": round(1 / statistics.median(c.wall_s for c in peers)),
        "loop_cpu_us_a_client": round(1e6 * statistics.median(c.cpu_s for c in peers)),
    }


class RoundTimes(SilentDisplay):
    """Looks at the clocks when a round is committed."""

    def __init__(self) -> None:
        self._ends: list[Cost] = []

    def round_done(self, _committed: CommittedRound, _standing: Standing) -> None:
        self._ends.append(Cost.now())

    def of_the_second(self, clients: int) -> Cost:
        first, second = self._ends
        return Cost((second.wall_s - first.wall_s) / clients, (second.cpu_s - first.cpu_s) / clients)


class Engine:
    """The whole engine over a fleet whose devices share the examples."""

    def __init__(self, devices: int, cohort: int, scratch: Path) -> None:
        self._config = SimulationConfig(
            dataset="synthetic", devices=devices, rounds=2, model="mlp", partition="iid", cohort=cohort, epochs=1,
            batch_size=SAMPLES, learning_rate=0.1, engine="cohort",
        )  # fmt: skip
        parts = [(np.arange(SAMPLES) + SAMPLES * d) % EXAMPLES for d in range(devices)]
        # Devices that come back about when the next round opens: one that comes too early is told to wait.
        spread = 0.1 if devices == cohort else 0.5
        self._fleet = Fleet(Population(1, devices, check_in_spread=spread), synthetic(), parts)
        self._scratch = scratch
        self._runs = 0

    def cost_of_a_client(self) -> Cost:
        """In the second of two rounds: the first one's devices are all at the door at once."""
        self._runs += 1
        with RunFolder.begin(self._scratch / f"{self._config.devices}-{self._runs}", self._config) as folder:
            setting = CohortSetting.prepare(folder, self._fleet, lambda _line: None)
            with Journal(folder.path / "journal.jsonl") as journal:
                rounds = RoundTimes()
                _, ending = setting.play(journal, rounds, lambda _line: None, score_every=10**6)
        assert ending.finished
        assert [len(counted) for counted in ending.counted] == [self._config.cohort_size] * 2
        return rounds.of_the_second(self._config.cohort_size)

    def trainer(self) -> Callable[[], Cost]:
        """Training alone, in the windows that the engine would ask for."""
        with RunFolder.begin(self._scratch / "trainer", self._config) as folder:
            setting = CohortSetting.prepare(folder, self._fleet, lambda _line: None)
            weights, plan = setting.task.initial_weights, setting.task.settings.plan
            module = setting.model()
        trainer = CohortTrainer(module, self._fleet.dataset.train)
        clients = [LocalWork(part, i) for i, part in enumerate(self._fleet.parts)]
        size = trainer.clients_at_once(plan)

        def job() -> Cost:
            begun = Cost.now()
            for at in range(0, len(clients), size):
                trainer.train(weights, clients[at : at + size], plan)
            return begun.since(len(clients))

        return job


def main() -> int:
    """Print one JSON line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=7, help="repeats a figure is the median of (default: 7)")
    args = parser.parse_args()
    missed = False

    def say(case: str, *, passed: bool, **figures: object) -> None:
        nonlocal missed
        missed |= not passed
        line = {"bench": "cohort", "case": case, **figures, "passed": passed, "cpus": os.cpu_count()}
        print(json.dumps(line), flush=True)  # noqa: T201 - what a benchmark is for

    with tempfile.TemporaryDirectory() as scratch:
        everybody = Engine(1000, 1000, Path(scratch))
        found = beside_the_loop(everybody.trainer(), args.repeats)
        say("training alone, 1000 clients", passed=True, **found)
        found = beside_the_loop(everybody.cost_of_a_client, args.repeats)
        fast = found["clients_per_s"] >= BAR_CLIENTS_PER_S
        say("whole engine, 1000 of 1000 devices a round", passed=fast, **found, bar_clients_per_s=BAR_CLIENTS_PER_S)
        crowd = Engine(10_000, 1000, Path(scratch))
        found = beside_the_loop(crowd.cost_of_a_client, args.repeats)
        peak_mib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        round_s = round(1000 / found["clients_per_s"], 2)
        say(
            "whole engine, 1000 of 10,000 devices a round",
            passed=round_s < BAR_ROUND_S and peak_mib < BAR_PEAK_MIB,
            **found,
            round_s=round_s,
            bar_round_s=BAR_ROUND_S,
            peak_mib=peak_mib,
            bar_peak_mib=BAR_PEAK_MIB,
        )
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
