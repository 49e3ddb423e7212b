"""Any interleaving of the same accepted updates gives the same bits, and nothing counts twice or gets lost."""

from __future__ import annotations

import threading
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import DuplicateReport
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.asynchronous import AsyncGradientAggregator
from server_ref.aggregation.staleness import StalenessPolicy

# Within the magnitudes that are added exactly.
VALUES = st.lists(st.integers(-(2**23), 2**23).map(lambda n: n / 4096), min_size=3, max_size=3)


def update(worker: int, values: list[float], samples: int = 1, **metadata: object) -> WorkerGradient:
    return WorkerGradient(f"worker-{worker}", {"w": np.array(values, np.float32)}, samples, 0.0, metadata or None)


def at_round(rounds: int, buffer_size: int, **options: object) -> AsyncGradientAggregator:
    aggregator = AsyncGradientAggregator(buffer_size, **options)
    for round_id in range(rounds):
        for i in range(buffer_size):
            aggregator.submit_gradient_async(update(i, [1.0 + round_id, -2.0, 1e-3]), round_id)
    return aggregator


@given(st.lists(st.tuples(VALUES, st.integers(1, 1000), st.integers(0, 4)), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60)
def test_the_order_of_a_buffer_changes_no_bit(members, random):
    results = []
    for _ in range(2):
        aggregator = at_round(4, len(members), delay_damping=0.25, scale_learning_rate=True)
        order = list(enumerate(members))
        random.shuffle(order)
        outcomes = [aggregator.submit_gradient_async(update(i, v, n), 4 - age) for i, (v, n, age) in order]
        results.append(outcomes[-1]["w"].tobytes())
        assert outcomes[:-1] == [None] * (len(members) - 1)
    assert results[0] == results[1]


@given(st.lists(st.tuples(VALUES, st.integers(1, 1000), st.integers(0, 4)), min_size=1, max_size=6), st.floats(0, 2))
@settings(max_examples=60)
def test_the_aggregate_is_the_rational_number_that_the_formula_gives(members, exponent):
    aggregator = at_round(4, len(members), staleness_exponent=exponent)
    outcomes = [aggregator.submit_gradient_async(update(i, v, n), 4 - age) for i, (v, n, age) in enumerate(members)]
    policy = StalenessPolicy(exponent=exponent)
    denominator = 256 * sum(samples for _, samples, _ in members)
    for column, found in enumerate(outcomes[-1]["w"]):
        exact = sum(Fraction(v[column]) * n * policy.scale(age, 4) for v, n, age in members) / denominator
        rounded = np.float32(float(exact))
        assert abs(found - rounded) <= np.spacing(abs(rounded))


class Ledger:
    """What really happened: outcomes of all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.aggregates: list[np.ndarray] = []
        self.refused: Counter[str] = Counter()

    def submit(self, aggregator: AsyncGradientAggregator, gradient: WorkerGradient, version: int) -> None:
        try:
            result = aggregator.submit_gradient_async(gradient, version)
        except DuplicateReport:
            with self.lock:
                self.refused["duplicate"] += 1
            return
        if result is not None:
            with self.lock:
                self.aggregates.append(result["w"] * result.count)


@given(st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(max_examples=15, deadline=None)
def test_threads_that_also_send_again_are_each_counted_exactly_once(buffer_size, repeats, stale_too):
    workers = 24
    aggregator = AsyncGradientAggregator(
        buffer_size, max_staleness=workers, staleness_weighting="constant", model_state={"w": np.zeros(workers)}
    )
    ledger = Ledger()
    barrier = threading.Barrier(workers)

    def run(worker: int) -> None:
        gradient = update(worker, [float(i == worker) for i in range(workers)], report_id=f"r{worker}")
        barrier.wait()
        for _ in range(1 + repeats):
            ledger.submit(aggregator, gradient, 0)
        if stale_too:
            aggregator.submit_gradient_async(gradient, -workers - 1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One hot coordinate each: a double count would show as a 2, a lost update as a 0 too many.
    counted = np.sum(ledger.aggregates, axis=0, initial=0.0) if ledger.aggregates else np.zeros(workers)
    assert set(np.round(counted, 9)) <= {0.0, 1.0}
    assert counted.sum() == (workers // buffer_size) * buffer_size
    assert aggregator.pending == workers % buffer_size
    assert aggregator.current_round == len(ledger.aggregates) == workers // buffer_size
    assert ledger.refused["duplicate"] == workers * repeats
    expected = {"duplicate-report": workers * repeats, "stale-report": workers * stale_too}
    assert aggregator.rejection_counts == {slug: n for slug, n in expected.items() if n}
