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

Meta-learning has rows of its own, for the same model and for one of 8x8 digits: five steps on batches of eight, and
what is judged, beside a plain loop that does the same for one client after the other (second order by ``create_graph``,
as the papers' code has it). ``cpu_to_fedavg`` is what a client costs beside one that takes the same five steps for
FedAvg, in the same run.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.program import ParameterSpec
from client_sdk.protocol.training import TrainingPlan
from mobile_export import build_model
from simulator import Dataset, Fleet, Population, RunFolder, SimulationConfig, Split
from simulator.cohort.model import BatchedModel
from simulator.cohort.run import CohortSetting
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.journal import Journal
from simulator.monitor import Standing
from simulator.progress import SilentDisplay
from simulator.view import CommittedRound

SAMPLES, FEATURES, HIDDEN, CLASSES = 20, 784, 64, 10
DIGITS = 64  # features of the small data set's images
EXAMPLES = 20_000
LOOPED = 250
# A client of meta-learning: batches of eight for five steps, and eight to judge by.
STEPS, META_BATCH, META_SAMPLES, META_CLIENTS, META_LOOPED = 5, 8, 48, 100, 50
RATE, META_RATE = 0.05, 0.1
ALGORITHMS = ("fedavg", "reptile", "fomaml", "maml", "per-fedavg")
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


class MetaLoop:
    """The peer of meta-learning: one client after the other, single-threaded, with torch's autograd.

    Args:
        algorithm: What each client sends.
        features: Of an example.
    """

    def __init__(self, algorithm: str, features: int) -> None:
        torch.manual_seed(0)
        self._algorithm = algorithm
        model = torch.nn.Sequential(
            torch.nn.Linear(features, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
        )
        self._start = [p.detach() for p in model.parameters()]
        self._x, self._y = (
            torch.randn(META_LOOPED, META_SAMPLES, features),
            torch.randint(0, CLASSES, (META_LOOPED, META_SAMPLES)),
        )

    def cost_of_a_client(self) -> Cost:
        """Of as many clients as ``META_LOOPED``."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        begun = Cost.now()
        for x, y in zip(self._x, self._y, strict=True):
            self._update(x.split(META_BATCH), y.split(META_BATCH))
        cost = begun.since(META_LOOPED)
        torch.set_num_threads(before)
        return cost

    def _update(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        """Of batches, the last of which judge."""
        second_order, start = self._algorithm == "maml", [p.clone().requires_grad_() for p in self._start]
        if self._algorithm == "per-fedavg":
            return self._local_meta_steps(start, x, y)
        now = start
        for k in range(STEPS):
            now = self._step(now, x[k], y[k], create_graph=second_order)
        if self._algorithm in {"fedavg", "reptile"}:
            return [p - q for p, q in zip(now, start, strict=True)]
        return list(torch.autograd.grad(self._loss(now, x[STEPS], y[STEPS]), start if second_order else now))

    def _local_meta_steps(self, start: list[Tensor], x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        now = start
        for k in range(STEPS):
            adapted = self._step(now, x[k], y[k], create_graph=False)
            direction = torch.autograd.grad(self._loss(adapted, x[STEPS], y[STEPS]), adapted)
            slope = torch.autograd.grad(self._loss(now, x[k], y[k]), now, create_graph=True)
            bent = torch.autograd.grad(slope, now, direction)
            now = [
                (w - META_RATE * (v - RATE * h)).detach().requires_grad_()
                for w, v, h in zip(now, direction, bent, strict=True)
            ]
        return now

    def _step(self, weights: list[Tensor], x: Tensor, y: Tensor, *, create_graph: bool) -> list[Tensor]:
        gradients = torch.autograd.grad(self._loss(weights, x, y), weights, create_graph=create_graph)
        after = [w - RATE * g for w, g in zip(weights, gradients, strict=True)]
        return after if create_graph else [w.detach().requires_grad_() for w in after]

    def _loss(self, weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.relu(torch.nn.functional.linear(x, weights[0], weights[1]))
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weights[2], weights[3]), y)


class MetaEngine:
    """Training alone of clients that adapt, as many as the trainer asks for at once.

    Args:
        features: Of an example.
    """

    def __init__(self, features: int) -> None:
        module = build_model("mlp", (features,), CLASSES, 0, hidden=(HIDDEN,))
        table, weights = [], []
        for name, p in module.named_parameters():
            table.append(ParameterSpec(name=name, shape=tuple(p.shape), offset=sum(map(len, weights))))
            weights.append(p.detach().numpy().ravel())
        self._weights = np.concatenate(weights)
        images = synthetic().train
        self._data = Split(np.ascontiguousarray(images.x[:, :features]), images.y)
        self._trainer = CohortTrainer(BatchedModel(module, tuple(table)), self._data)
        self._clients = [
            LocalWork((np.arange(META_SAMPLES) + META_SAMPLES * d) % EXAMPLES, d) for d in range(META_CLIENTS)
        ]

    def trainer(self, algorithm: str) -> Callable[[], Cost]:
        """A round of ``META_CLIENTS`` clients; the splits, which a run works out once, are there before the first."""
        plan = TrainingPlan(
            algorithm=algorithm, batch_size=META_BATCH, learning_rate=RATE,
            **({"max_steps": STEPS} if algorithm == "fedavg" else {
                "meta": MetaPlan(inner_steps=STEPS, meta_learning_rate=META_RATE)
            }),
        )  # fmt: skip
        size = self._trainer.clients_at_once(plan)

        def job() -> Cost:
            begun = Cost.now()
            for at in range(0, META_CLIENTS, size):
                self._trainer.train(self._weights, self._clients[at : at + size], plan)
            return begun.since(META_CLIENTS)

        return job


def beside_the_loop(
    job: Callable[[], Cost], repeats: int, loop: TorchLoop | MetaLoop | None = None
) -> dict[str, float]:
    """Run a job that returns what a client costs, between two runs of the loop each time."""
    loop = loop or TorchLoop()
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
        for features in (FEATURES, DIGITS):
            meta, fedavg = MetaEngine(features), None
            for algorithm in ALGORITHMS:
                found = beside_the_loop(meta.trainer(algorithm), args.repeats, MetaLoop(algorithm, features))
                fedavg = fedavg or found
                say(
                    f"{algorithm}, {features}-{HIDDEN}-{CLASSES}, 5 steps of 8 examples",
                    passed=True,
                    **found,
                    cpu_to_fedavg=round(found["cpu_us_a_client"] / fedavg["cpu_us_a_client"], 2),
                    seconds_for_500_rounds_of_20=round(500 * 20 / found["clients_per_s"], 1),
                )
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
