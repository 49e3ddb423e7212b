"""A cohort trained at once gets what each client gets from ``LocalTrainer`` with the exported program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import TrainingDiverged
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.training import Controls, LocalTrainer
from mobile_export import EagerProgram
from simulator.cohort.batches import BatchTable, num_steps
from simulator.cohort.model import BatchedModel
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.datasets import Split
from tests.bundles import FEATURE_SHAPES, NUM_CLASSES, tiny_bundle, tiny_model

BATCH = 4
EXAMPLES = 60
# What docs/simulator.md states: the largest distance of two updates beside their length.
TOLERANCE = 1e-5

plans = st.builds(
    TrainingPlan,
    local_epochs=st.integers(1, 4),
    batch_size=st.just(BATCH),
    learning_rate=st.floats(0.01, 0.3),
    shuffle=st.booleans(),
    max_steps=st.none() | st.integers(1, 12),
    algorithm=st.sampled_from(["fedavg", "scaffold", "fednova"]),
)
prox = st.sampled_from([0.0, 0.01, 1.0])
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=7)
seeds = st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class Subject:
    """One model by its three computers, and data for it."""

    program: Program
    eager: EagerProgram
    model: BatchedModel
    data: Split
    weights: np.ndarray


@pytest.fixture(scope="module", params=["softmax", "mlp", "cnn"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    name = request.param
    bundle = tiny_bundle(name, tmp_path_factory.mktemp(name))
    program = load_program(bundle.path, "native")
    rng = np.random.default_rng(5)
    data = Split(rng.random((EXAMPLES, *FEATURE_SHAPES[name]), np.float32), rng.integers(0, NUM_CLASSES, EXAMPLES))
    module = tiny_model(name)
    weights = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    yield Subject(
        program,
        EagerProgram(module, program.manifest),
        BatchedModel(module, program.manifest.parameters),
        data,
        weights,
    )
    program.close()


def clients_of(subject: Subject, lengths: list[int], plan: TrainingPlan, seed: int) -> list[LocalWork]:
    rng = np.random.default_rng(seed % 2**32)
    d = len(subject.weights)
    server = rng.normal(0, 0.01, d).astype(np.float32)

    def controls() -> Controls | None:
        return Controls(server, rng.normal(0, 0.01, d).astype(np.float32)) if plan.algorithm == "scaffold" else None

    return [LocalWork(rng.permutation(EXAMPLES)[:n], (seed + i) % 2**64, controls()) for i, n in enumerate(lengths)]


def assert_alike(subject: Subject, oracle: Program, clients: list[LocalWork], plan: TrainingPlan, memory: int) -> None:
    result = CohortTrainer(subject.model, subject.data, memory_bytes=memory).train(subject.weights, clients, plan)
    assert not result.failures
    trainer = LocalTrainer(oracle)
    for i, client in enumerate(clients):
        expected = trainer.train(
            subject.weights, subject.data.x[client.rows], subject.data.y[client.rows], plan, client.shuffle_seed,
            controls=client.controls,
        )  # fmt: skip
        update = expected.update(plan)
        assert result.updates[i].dtype == np.float32
        assert np.linalg.norm(result.updates[i] - update) <= TOLERANCE * np.linalg.norm(update)
        assert result.steps[i] == expected.steps == num_steps(len(client.rows), plan)
        assert result.first_epoch_losses[i] == pytest.approx(expected.first_epoch_loss, rel=TOLERANCE)
        assert result.last_epoch_losses[i] == pytest.approx(expected.last_epoch_loss, rel=TOLERANCE)


@settings(max_examples=40)
@given(lengths=sizes, plan=plans, mu=prox, seed=seeds, all_at_once=st.booleans())
def test_a_cohort_agrees_with_the_exported_program(subject, lengths, plan, mu, seed, all_at_once):
    plan = plan if plan.algorithm == "scaffold" else plan.model_copy(update={"prox_mu": mu})
    clients = clients_of(subject, lengths, plan, seed)
    assert_alike(subject, subject.program, clients, plan, 2**26 if all_at_once else 1)


@settings(max_examples=15)
@given(lengths=sizes, plan=plans, seed=seeds)
def test_a_cohort_agrees_with_eager_pytorch(subject, lengths, plan, seed):
    assert_alike(subject, subject.eager, clients_of(subject, lengths, plan, seed), plan, 2**26)


@settings(max_examples=12)
@given(lengths=sizes, plan=plans, seed=seeds, data=st.data())
def test_clients_do_not_touch_one_another(subject, lengths, plan, seed, data):
    """Alone, in company, in another order: the same update up to rounding; the same call, the same bits."""
    clients = clients_of(subject, lengths, plan, seed)
    trainer = CohortTrainer(subject.model, subject.data)
    together = trainer.train(subject.weights, clients, plan)
    again = trainer.train(subject.weights, clients, plan)
    assert together.updates.tobytes() == again.updates.tobytes()
    order = data.draw(st.permutations(range(len(clients))))
    shuffled = trainer.train(subject.weights, [clients[i] for i in order], plan)
    for at, i in enumerate(order):
        alone = trainer.train(subject.weights, [clients[i]], plan).updates[0]
        for other in (together.updates[i], shuffled.updates[at]):
            assert np.linalg.norm(other - alone) <= TOLERANCE * np.linalg.norm(alone)


def test_one_that_diverges_leaves_the_others_alone(subject):
    plan = TrainingPlan(local_epochs=3, batch_size=BATCH, learning_rate=0.1)
    x, y = subject.data.x.copy(), subject.data.y.copy()
    # Finite, but their products with weights soon are not; and one of the two is always classified wrongly.
    x[:2] = 3e38 * np.random.default_rng(1).choice([-1, 1], x[0].shape)
    y[:2] = 0, 1
    clients = [LocalWork(rows, i) for i, rows in enumerate((np.arange(2, 7), np.arange(0, 9), np.arange(30, 37)))]
    trainer = CohortTrainer(subject.model, Split(x, y))
    result = trainer.train(subject.weights, clients, plan)
    assert list(result.failures) == [1]
    assert isinstance(result.failures[1], TrainingDiverged)
    assert not result.updates[1].any()
    with pytest.raises(TrainingDiverged):
        LocalTrainer(subject.program).train(subject.weights, x[:9], y[:9], plan, 1)
    kept = trainer.train(subject.weights, [clients[0], clients[2]], plan)
    for ours, theirs in ((0, 0), (2, 1)):
        assert np.allclose(result.updates[ours], kept.updates[theirs], rtol=0, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    size=st.integers(1, 9),
    epochs=st.integers(1, 4),
    max_steps=st.none() | st.integers(1, 20),
    seed=seeds,
)
def test_the_table_holds_every_epochs_examples_once(lengths, size, epochs, max_steps, seed):
    plan = TrainingPlan(local_epochs=epochs, batch_size=size, max_steps=max_steps)
    clients = [LocalWork(1000 * i + np.arange(n), (seed + i) % 2**64) for i, n in enumerate(lengths)]
    table = BatchTable.of(clients, plan)
    for i, n in enumerate(lengths):
        an_epoch = -(-n // size)
        taken = num_steps(n, plan)
        assert np.count_nonzero(table.counts[i]) == taken
        assert not table.counts[i, taken:].any()
        seen = [table.picked[i, s, : table.counts[i, s]] for s in range(taken)]
        for first in range(0, taken - an_epoch + 1, an_epoch):
            epoch = np.concatenate(seen[first : first + an_epoch])
            assert sorted(epoch) == list(1000 * i + np.arange(n))
            assert [len(batch) for batch in seen[first : first + an_epoch - 1]] == [size] * (an_epoch - 1)
        # What fills a short batch up is an example of the client's own.
        assert np.isin(table.picked[i, :taken], 1000 * i + np.arange(n)).all()
        assert list(np.flatnonzero(table.in_first_epoch[i])) == list(range(min(an_epoch, taken)))
        assert list(np.flatnonzero(table.in_last_epoch[i])) == list(range((taken - 1) // an_epoch * an_epoch, taken))


def test_evaluation_is_that_of_the_program(subject):
    from server_ref.evaluation import ProgramEvaluator  # noqa: PLC0415

    expected = ProgramEvaluator(subject.program, subject.data.x, subject.data.y).evaluate(subject.weights)
    found = subject.model.evaluate(subject.weights, subject.data.x, subject.data.y)
    assert found.accuracy == expected.accuracy
    assert found.num_examples == expected.num_examples == EXAMPLES
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
