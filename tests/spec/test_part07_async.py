"""Part 7 of the specification: asynchronous aggregation with staleness handling.

Where the listed expectation speaks of wall-clock time, simulated time stands in: durations are data of the test.
"""

from __future__ import annotations

import heapq
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from multiprocessing.connection import Listener

import numpy as np
import pytest

from client_sdk.protocol.errors import DuplicateReport, StaleReport
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref import AsyncGradientAggregator, apply_update
from server_ref.selection import selection_ratio


def gradient(worker: str, *values: float, timestamp: float = 0.0) -> WorkerGradient:
    return WorkerGradient(worker, {"w": np.array(values, np.float32)}, 1, timestamp)


def advance(aggregator: AsyncGradientAggregator, rounds: int) -> None:
    """Complete rounds of two fresh updates each."""
    for _ in range(rounds):
        for i in range(2):
            aggregator.submit_gradient_async(gradient(f"filler{i}", 0.0, 0.0), aggregator.current_round)


def test_staleness_rejection():
    """A gradient on the model of 15 rounds ago, with max_staleness=10: rejected, and not in the aggregate."""
    aggregator = AsyncGradientAggregator(min_workers_per_round=2, max_staleness=10)
    advance(aggregator, 15)
    assert aggregator.submit_gradient_async(gradient("stale", 1e6, 1e6), 0) is None
    assert [(r.worker_id, r.error) for r in aggregator.rejections] == [("stale", StaleReport)]
    assert aggregator.pending == 0
    aggregator.submit_gradient_async(gradient("a", 1.0, 0.0), 15)
    assert aggregator.submit_gradient_async(gradient("b", 3.0, 0.0), 15)["w"].tolist() == [2.0, 0.0]


def test_staleness_weighting():
    """One fresh worker, one five rounds late: the fresh one weighs more, by what the formula says (in 256ths)."""
    aggregator = AsyncGradientAggregator(min_workers_per_round=2, staleness_exponent=0.5)
    advance(aggregator, 5)
    aggregator.submit_gradient_async(gradient("fresh", 1.0, 0.0), 5)
    fresh, stale = aggregator.submit_gradient_async(gradient("stale", 0.0, 1.0), 0)["w"]
    assert fresh == 0.5, "all of its half"
    assert fresh > stale == 0.5 * int(256 / 6**0.5) / 256


# --- a fleet in simulated time -------------------------------------------------------------------------------

DEVICES, SLOW = 10, 2
CLASSES, FEATURES, SAMPLES = 3, 5, 60


class Fleet:
    """Ten devices with data of their own (three blobs, softmax regression); two of them ten times slower."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(CLASSES, FEATURES))
        self.labels = rng.integers(0, CLASSES, (DEVICES, SAMPLES))
        self.data = centres[self.labels] + rng.normal(size=(DEVICES, SAMPLES, FEATURES))
        self.rng = rng

    def duration(self, device: int) -> float:
        """Seconds of simulated time that one local training takes."""
        return (10.0 if device < SLOW else 1.0) * self.rng.uniform(0.8, 1.2)

    def _probabilities(self, weights: np.ndarray, device: int) -> np.ndarray:
        logits = self.data[device] @ weights
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def loss(self, weights: np.ndarray, device: int) -> float:
        chosen = self._probabilities(weights, device)[np.arange(SAMPLES), self.labels[device]]
        return float(-np.log(chosen).mean())

    def mean_loss(self, weights: np.ndarray) -> float:
        return float(np.mean([self.loss(weights, device) for device in range(DEVICES)]))

    def train(self, weights: np.ndarray, device: int) -> WorkerGradient:
        """Three local steps; the update is what they changed."""
        local = weights.copy()
        for _ in range(3):
            error = self._probabilities(local, device) - np.eye(CLASSES)[self.labels[device]]
            local -= 0.1 * self.data[device].T @ error / SAMPLES
        update = {"w": (local - weights).astype(np.float32)}
        return WorkerGradient(f"device-{device}", update, SAMPLES, 0.0, kind=UpdateKind.DELTA)


def time_to_loss(fleet: Fleet, aggregator: AsyncGradientAggregator, target: float, *, synchronous: bool) -> float:
    """Simulated seconds until the model's loss on all devices' data reaches the target."""
    model = {"w": np.zeros((FEATURES, CLASSES))}
    versions = [model["w"]]
    queue = [(fleet.duration(device), device, 0) for device in range(DEVICES)]
    heapq.heapify(queue)
    idle: list[int] = []
    while True:
        now, device, version = heapq.heappop(queue)
        result = aggregator.submit_gradient_async(fleet.train(versions[version], device), version)
        idle.append(device)
        if result is not None:
            model = apply_update(model, result)
            versions.append(model["w"])
            if fleet.mean_loss(model["w"]) <= target:
                return now
        if result is not None or not synchronous:
            # Asynchronous devices go on at once with the newest model; synchronous ones wait for the last one.
            for waiting in idle:
                heapq.heappush(queue, (now + fleet.duration(waiting), waiting, len(versions) - 1))
            idle.clear()
        assert len(versions) < 2000, "the target was not reached"


@pytest.mark.parametrize("seed", range(5))
def test_async_convergence(seed):
    """Five of ten against all of ten, two of which are ten times slower: the same loss in half the simulated time.

    ``pytest -s`` shows the ratios that docs/async.md has.
    """
    untrained = Fleet(seed).mean_loss(np.zeros((FEATURES, CLASSES)))
    best = Fleet(seed)
    reference = np.zeros((FEATURES, CLASSES))
    for _ in range(300):
        reference += np.mean([best.train(reference, device).gradients["w"] for device in range(DEVICES)], axis=0)
    # 95 % of the way from the untrained model to what synchronous training reaches in 300 rounds.
    target = untrained - 0.95 * (untrained - best.mean_loss(reference))
    synchronous = AsyncGradientAggregator(min_workers_per_round=DEVICES, max_staleness=0)
    asynchronous = AsyncGradientAggregator(min_workers_per_round=5, max_staleness=20)
    slow = time_to_loss(Fleet(seed), synchronous, target, synchronous=True)
    fast = time_to_loss(Fleet(seed), asynchronous, target, synchronous=False)
    print(f"seed {seed}: the same loss {slow / fast:.1f} times sooner")  # noqa: T201 - for pytest -s
    assert fast <= slow / 2
    assert asynchronous.rejection_counts.get("stale-report", 0) < asynchronous.current_round


def test_straggler_mitigation():
    """Ten workers, two ten times slower: after 50 rounds they were selected less often, but not below the floor."""
    floor, per_round = 0.2, 5
    rng = np.random.default_rng(3)
    now = 0.0
    aggregator = AsyncGradientAggregator(per_round, selection_floor=floor, clock=lambda: now)
    workers = [f"worker{i}" for i in range(10)]
    slow = set(workers[:2])
    selected: Counter[str] = Counter(dict.fromkeys(workers, 0))
    for round_id in range(50):
        known = aggregator.get_worker_selection_probabilities()
        # Who never reported yet is tried first.
        chances = np.array([known.get(worker, 1.0) for worker in workers])
        chosen = rng.choice(workers, per_round, replace=False, p=chances / chances.sum())
        started = now
        for worker in sorted(chosen, key=slow.__contains__):
            selected[worker] += 1
            now = started + (10.0 if worker in slow else 1.0)
            aggregator.submit_gradient_async(gradient(worker, 0.0, timestamp=started), round_id)
    assert aggregator.current_round == 50
    assert 0 < selection_ratio(selected, slow) < 0.6
    probabilities = aggregator.get_worker_selection_probabilities()
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert min(probabilities.values()) >= floor / len(workers)
    assert max(probabilities[w] for w in slow) < 0.5 * min(probabilities[w] for w in workers if w not in slow)


# --- concurrency ---------------------------------------------------------------------------------------------


def one_hot(worker: int, workers: int) -> WorkerGradient:
    return gradient(f"worker-{worker}", *(float(i == worker) for i in range(workers)))


def test_thread_safety():
    """100 workers submit at once: every gradient is in exactly one aggregate, and in it exactly once."""
    workers, buffer_size = 100, 7
    aggregator = AsyncGradientAggregator(buffer_size, max_staleness=workers, staleness_weighting="constant")
    barrier = threading.Barrier(workers)
    results = [None] * workers

    def run(worker: int) -> None:
        barrier.wait()
        results[worker] = aggregator.submit_gradient_async(one_hot(worker, workers), 0)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    aggregates = [r for r in results if r is not None]
    assert sorted(r.measurements["round_id"] for r in aggregates) == list(range(workers // buffer_size))
    # A gradient is a coordinate of its own: counted twice it would show as a 2, lost as a 0 too many.
    counted = np.round(sum(buffer_size * r["w"] for r in aggregates), 5)
    assert set(counted) == {0.0, 1.0}
    assert np.count_nonzero(counted == 0) == aggregator.pending == workers % buffer_size
    assert aggregator.rejection_counts == {}


SUBMITTER = """
import sys
from multiprocessing.connection import Client
import numpy as np
from client_sdk.protocol.updates import WorkerGradient

port, first, last, total = map(int, sys.argv[1:])
with Client(("127.0.0.1", port), authkey=b"test") as server:
    print("ready", flush=True)
    sys.stdin.readline()
    for worker in range(first, last):
        values = np.zeros(total, np.float32)
        values[worker] = 1
        update = WorkerGradient(f"worker-{worker}", {"w": values}, 1, 0.0, {"report_id": str(worker)})
        outcomes = []
        for _ in range(2):
            server.send(update)
            outcomes.append(server.recv())
        assert outcomes == ["accepted", "duplicate-report"], outcomes
"""


def serve(listener: Listener, aggregator: AsyncGradientAggregator, aggregates: list[np.ndarray]) -> None:
    """Submit what one process sends, until it hangs up."""
    with listener.accept() as connection:
        while True:
            try:
                update = connection.recv()
            except EOFError:
                return
            try:
                result = aggregator.submit_gradient_async(update, 0)
            except DuplicateReport as refusal:
                connection.send(refusal.slug)
                continue
            if result is not None:
                aggregates.append(result["w"])
            connection.send("accepted")


def test_processes_submit_at_once_and_each_update_counts_once():
    """Four processes with 25 workers each, every report sent twice."""
    processes, each, buffer_size = 4, 25, 7
    workers = processes * each
    aggregator = AsyncGradientAggregator(buffer_size, max_staleness=workers, staleness_weighting="constant")
    aggregates: list[np.ndarray] = []
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(("127.0.0.1", 0), authkey=b"test"))
        threads = [
            threading.Thread(target=serve, args=(listener, aggregator, aggregates), daemon=True)
            for _ in range(processes)
        ]
        for thread in threads:
            thread.start()
        children = []
        for i in range(processes):
            numbers = (listener.address[1], i * each, (i + 1) * each, workers)
            command = [sys.executable, "-c", SUBMITTER, *map(str, numbers)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            children.append(stack.enter_context(child))
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        for thread in threads:
            thread.join()
        assert [child.wait(timeout=120) for child in children] == [0] * processes
    counted = np.round(sum(buffer_size * aggregate for aggregate in aggregates), 5)
    assert len(aggregates) == workers // buffer_size
    assert set(counted) == {0.0, 1.0}
    assert counted.sum() == workers // buffer_size * buffer_size
    assert aggregator.pending == workers % buffer_size
    assert aggregator.rejection_counts == {"duplicate-report": workers}
