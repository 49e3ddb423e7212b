"""Meta-learning of a cohort at once: what each client would send by plain autograd, one client and step at a time."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from client_sdk.meta_training import MetaTrainer
from client_sdk.protocol.errors import ConfigurationError, NotEnoughExamples, TrainingDiverged
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import ParameterSpec
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from simulator.cohort.meta_training import MetaGradients, Splits, differentiated_steps
from simulator.cohort.model import BatchedModel
from simulator.cohort.stepping import clients_at_once
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.datasets import Split
from tests.bundles import (
    FEATURE_SHAPES,
    META_CLASSES,
    META_FEATURE_SHAPE,
    META_INNER_STEPS,
    NUM_CLASSES,
    meta_bundle,
    meta_model,
    tiny_model,
)

EXAMPLES = 60
BATCH = 4
TOLERANCE = 1e-5

algorithms = st.sampled_from(["maml", "fomaml", "reptile", "per-fedavg"])
plans = st.builds(
    lambda algorithm, rate, shuffle, meta: TrainingPlan(
        algorithm=algorithm, learning_rate=rate, shuffle=shuffle, meta=meta, batch_size=BATCH
    ),
    algorithms,
    st.floats(0.01, 0.3),
    st.booleans(),
    st.builds(
        MetaPlan,
        inner_steps=st.integers(1, 6),
        query_fraction=st.sampled_from([0.2, 0.5]),
        query_batches=st.integers(1, 3),
        meta_learning_rate=st.just(0.25),
    ),
)
# Clients of one example too, which only Reptile can use.
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=7)
seeds = st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class Oracle:
    """One client's update in float64, written down as the papers have it: no masks, no batching of clients."""

    module: torch.nn.Module
    data: Split

    def loss(self, w: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Mean loss of some examples."""
        parameters, at = {}, 0
        for name, p in self.module.named_parameters():
            parameters[name] = w[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        x, y = torch.tensor(self.data.x[rows], dtype=w.dtype), torch.tensor(self.data.y[rows])
        return cross_entropy(functional_call(self.module, parameters, (x,)), y)

    def gradient(self, w: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Of the mean loss; can be differentiated again."""
        return torch.autograd.grad(self.loss(w, rows), w, create_graph=True)[0]

    def update(self, weights: np.ndarray, rows: np.ndarray, plan: TrainingPlan, seed: int) -> tuple[np.ndarray, float]:
        """What the client sends, and the loss that it reports."""
        assert plan.meta is not None
        start = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        needs_query = plan.algorithm != "reptile"
        split = ExampleSplit.of(
            self.data.x[rows], self.data.y[rows], plan.meta.query_fraction, require_query=needs_query
        )
        batches = MetaBatches.of(
            plan.algorithm, plan.meta, split, batch_size=plan.batch_size, seed=seed, shuffle=plan.shuffle
        )
        if plan.algorithm == "per-fedavg":
            return self._per_fedavg(start, rows, batches, plan)
        adapted, losses = start, []
        for batch in batches.support:
            losses.append((self.loss(adapted, rows[batch]).item(), len(batch)))
            adapted = adapted - plan.learning_rate * self.gradient(adapted, rows[batch])
        if plan.algorithm == "reptile":
            mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
            return (adapted - start).detach().numpy(), mean
        judged = self.loss(adapted, rows[np.concatenate(batches.query)])
        towards = start if plan.algorithm == "maml" else adapted
        return torch.autograd.grad(judged, towards)[0].numpy(), judged.item()

    def _per_fedavg(
        self, start: torch.Tensor, rows: np.ndarray, batches: MetaBatches, plan: TrainingPlan
    ) -> tuple[np.ndarray, float]:
        now, total, losses = start.detach(), torch.zeros_like(start), []
        for mine, judging, curving in zip(batches.support, batches.query, batches.hessian, strict=True):
            w = now.clone().requires_grad_()
            adapted = (w - plan.learning_rate * self.gradient(w, rows[mine])).detach().requires_grad_()
            losses.append((self.loss(adapted, rows[judging]).item(), len(judging)))
            v = self.gradient(adapted, rows[judging]).detach()
            _, bent = torch.autograd.functional.hvp(lambda w, r=rows[curving]: self.loss(w, r), w.detach(), v)
            g = v - plan.learning_rate * bent
            now = now - plan.meta.meta_learning_rate * g
            total = total + g
        return total.detach().numpy(), sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


@dataclass(frozen=True)
class Subject:
    """A model, its oracle, and data."""

    model: BatchedModel
    oracle: Oracle
    data: Split
    weights: np.ndarray


def table_of(module: torch.nn.Module) -> tuple[ParameterSpec, ...]:
    table, offset = [], 0
    for name, p in module.named_parameters():
        table.append(ParameterSpec(name=name, shape=tuple(p.shape), offset=offset))
        offset += p.numel()
    return tuple(table)


def subject_of(name: str) -> Subject:
    rng = np.random.default_rng(5)
    data = Split(rng.random((EXAMPLES, *FEATURE_SHAPES[name]), np.float32), rng.integers(0, NUM_CLASSES, EXAMPLES))
    module = tiny_model(name)
    weights = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    return Subject(BatchedModel(module, table_of(module)), Oracle(tiny_model(name).double(), data), data, weights)


@pytest.fixture(scope="module", params=["softmax", "mlp", "cnn"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def clients_of(lengths: list[int], seed: int) -> list[LocalWork]:
    rng = np.random.default_rng(seed % 2**32)
    return [LocalWork(rng.permutation(EXAMPLES)[:n], (seed + i) % 2**64) for i, n in enumerate(lengths)]


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@settings(max_examples=25)
@given(lengths=sizes, plan=plans, seed=seeds, memory=st.sampled_from([1, 2**26]))
def test_each_client_sends_what_it_would_alone_by_plain_autograd(subject, lengths, plan, seed, memory):
    clients = clients_of(lengths, seed)
    result = CohortTrainer(subject.model, subject.data, memory_bytes=memory).train(subject.weights, clients, plan)
    assert result.updates.dtype == np.float32
    for i, client in enumerate(clients):
        if len(client.rows) == 1 and plan.algorithm != "reptile":
            assert isinstance(result.failures[i], NotEnoughExamples)
            assert not result.updates[i].any()
            continue
        assert i not in result.failures
        update, loss = subject.oracle.update(subject.weights, client.rows, plan, client.shuffle_seed)
        # Per-FedAvg divides a difference of weights by its rate: the weights' own rounding is in it.
        lost = np.linalg.norm(subject.weights) * 2**-23 / 0.25 if plan.algorithm == "per-fedavg" else 0.0
        assert np.linalg.norm(result.updates[i] - update) <= 2 * TOLERANCE * np.linalg.norm(update) + lost
        assert result.steps[i] == plan.meta.inner_steps
        assert result.last_epoch_losses[i] == pytest.approx(loss, rel=TOLERANCE)


@settings(max_examples=6)
@given(lengths=sizes, plan=plans, seed=seeds, data=st.data())
def test_clients_do_not_touch_one_another(subject, lengths, plan, seed, data):
    """Alone, in company, in another order: alike up to rounding; on any number of threads the same bits."""
    clients = clients_of(lengths, seed)
    together, again = (
        CohortTrainer(subject.model, subject.data, memory_bytes=2**16, threads=threads).train(
            subject.weights, clients, plan
        )
        for threads in (1, 3)
    )
    assert together.updates.tobytes() == again.updates.tobytes()
    assert together.last_epoch_losses.tobytes() == again.last_epoch_losses.tobytes()
    trainer = CohortTrainer(subject.model, subject.data)
    order = data.draw(st.permutations(range(len(clients))))
    shuffled = trainer.train(subject.weights, [clients[i] for i in order], plan)
    for at, i in enumerate(order):
        alone = trainer.train(subject.weights, [clients[i]], plan).updates[0]
        for other in (together.updates[i], shuffled.updates[at]):
            # The rate that Per-FedAvg divides by makes four roundings of one.
            assert np.linalg.norm(other - alone) <= 4 * TOLERANCE * np.linalg.norm(alone)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """A program that has every method of meta-learning."""
    with contextlib.closing(load_program(meta_bundle(tmp_path_factory.mktemp("meta")).path, "native")) as program:
        yield program


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "per-fedavg"])
def test_a_cohort_agrees_with_devices_that_run_the_exported_program(exported, algorithm):
    rng = np.random.default_rng(2)
    data = Split(rng.random((90, *META_FEATURE_SHAPE), np.float32), rng.integers(0, META_CLASSES, 90))
    module = meta_model()
    weights = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    plan = TrainingPlan(
        algorithm=algorithm, learning_rate=0.2, batch_size=8,
        meta=MetaPlan(inner_steps=META_INNER_STEPS, query_batches=2, meta_learning_rate=0.5),
    )  # fmt: skip
    clients = [LocalWork(rng.permutation(90)[:n], 11 + n) for n in (2, 9, 30, 80)]
    result = CohortTrainer(BatchedModel(module, exported.manifest.parameters), data).train(weights, clients, plan)
    assert not result.failures
    trainer = MetaTrainer(exported)
    for i, client in enumerate(clients):
        alone = trainer.train(weights, data.x[client.rows], data.y[client.rows], plan, client.shuffle_seed)
        # The rate that Per-FedAvg divides by makes two roundings of one.
        assert_near(result.updates[i], alone.update(plan), 2 * TOLERANCE)
        assert result.steps[i] == alone.steps
        assert result.first_epoch_losses[i] == pytest.approx(alone.first_epoch_loss, rel=TOLERANCE)
        assert result.last_epoch_losses[i] == pytest.approx(alone.last_epoch_loss, rel=TOLERANCE)


def plan_of(algorithm: str, **changes) -> TrainingPlan:
    rest = {k: changes.pop(k) for k in ("learning_rate", "personal") if k in changes}
    return TrainingPlan(
        **{"algorithm": algorithm, "learning_rate": 0.3, "batch_size": BATCH, "meta": MetaPlan(**changes), **rest}
    )


def judged_after_adapting(subject: Subject, rows: np.ndarray, plan: TrainingPlan, seed: int) -> Callable[..., float]:
    """Weights -> the mean query loss once they are adapted, in float64."""
    split = ExampleSplit.of(subject.data.x[rows], subject.data.y[rows], plan.meta.query_fraction)
    batches = MetaBatches.of("maml", plan.meta, split, batch_size=BATCH, seed=seed, shuffle=True)

    def loss(weights: np.ndarray) -> float:
        w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        for batch in batches.support:
            w = w - plan.learning_rate * subject.oracle.gradient(w, rows[batch])
        return subject.oracle.loss(w, rows[np.concatenate(batches.query)]).item()

    return loss


def test_the_second_order_is_really_there(subject):
    """Finite differences of the loss after adaptation agree with maml, and disagree with fomaml."""
    client = clients_of([20], 4)[0]
    trainer = CohortTrainer(subject.model, subject.data)
    plan = plan_of("maml", inner_steps=4)
    exact = trainer.train(subject.weights, [client], plan).updates[0]
    first_order = trainer.train(subject.weights, [client], plan_of("fomaml", inner_steps=4)).updates[0]
    loss = judged_after_adapting(subject, client.rows, plan, client.shuffle_seed)
    rng = np.random.default_rng(0)
    errors = {"maml": 0.0, "fomaml": 0.0}
    for _ in range(5):
        direction = rng.normal(size=len(subject.weights))
        direction /= np.linalg.norm(direction)
        step = 1e-5
        slope = (loss(subject.weights + step * direction) - loss(subject.weights - step * direction)) / (2 * step)
        for name, gradient in (("maml", exact), ("fomaml", first_order)):
            errors[name] = max(errors[name], abs(gradient @ direction - slope) / np.linalg.norm(exact))
    assert errors["maml"] < 1e-5
    assert errors["fomaml"] > 1e-3


def test_one_step_of_reptile_is_a_gradient_step(subject):
    client = LocalWork(np.arange(BATCH), 7)
    plan = plan_of("reptile", inner_steps=1)
    found = CohortTrainer(subject.model, subject.data).train(subject.weights, [client], plan)
    w = torch.tensor(subject.weights, dtype=torch.float64, requires_grad=True)
    assert_near(found.updates[0], -0.3 * subject.oracle.gradient(w, client.rows).detach().numpy())


def test_who_cannot_be_judged_leaves_the_others_alone(subject):
    """One example, many copies of one, and nobody who could."""
    able = clients_of([9, 30], 3)
    lonely = LocalWork(np.array([7]), 1)
    copies = LocalWork(np.full(12, 7), 2)
    trainer = CohortTrainer(subject.model, subject.data)
    for algorithm in ("maml", "fomaml", "per-fedavg"):
        plan = plan_of(algorithm, inner_steps=2)
        mixed = trainer.train(subject.weights, [lonely, able[0], copies, able[1]], plan)
        assert sorted(mixed.failures) == [0, 2]
        assert all(isinstance(e, NotEnoughExamples) for e in mixed.failures.values())
        assert not mixed.updates[[0, 2]].any()
        assert (mixed.steps == [0, 2, 0, 2]).all()
        kept = trainer.train(subject.weights, able, plan)
        assert mixed.updates[[1, 3]].tobytes() == kept.updates.tobytes()
        nobody = trainer.train(subject.weights, [lonely, copies], plan)
        assert sorted(nobody.failures) == [0, 1]
    assert not trainer.train(subject.weights, [lonely, copies], plan_of("reptile")).failures


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "per-fedavg"])
def test_one_that_diverges_leaves_the_others_alone(subject, algorithm):
    x, y = subject.data.x.copy(), subject.data.y.copy()
    # Finite, but their products with weights soon are not; and one of the two labels is always wrong.
    x[:6] = 3e38 * np.random.default_rng(1).choice([-1, 1], x[:6].shape)
    y[:6] = 0, 1, 0, 1, 0, 1
    clients = [LocalWork(rows, i) for i, rows in enumerate((np.arange(6, 15), np.arange(0, 9), np.arange(30, 37)))]
    plan = plan_of(algorithm, inner_steps=3)
    trainer = CohortTrainer(subject.model, Split(x, y))
    result = trainer.train(subject.weights, clients, plan)
    assert list(result.failures) == [1]
    assert isinstance(result.failures[1], TrainingDiverged)
    assert not result.updates[1].any()
    kept = trainer.train(subject.weights, [clients[0], clients[2]], plan)
    for ours, theirs in ((0, 0), (2, 1)):
        assert np.allclose(result.updates[ours], kept.updates[theirs], rtol=0, atol=1e-5)


def test_there_is_no_rate_that_float32_cannot_hold(subject):
    with pytest.raises(ConfigurationError, match="meta_learning_rate"):
        CohortTrainer(subject.model, subject.data).train(
            subject.weights, clients_of([9], 1), plan_of("per-fedavg", meta_learning_rate=1e-60)
        )


# --- personal layers ---------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(lengths=sizes, seed=seeds, which=st.sampled_from(["fedavg", "fedprox", "reptile"]), first=st.booleans())
def test_personal_layers_are_trained_with_the_others_and_not_sent(lengths, seed, which, first):
    subject = subject_of("mlp")
    own = {} if which == "reptile" else {"prox_mu": 0.5 if which == "fedprox" else 0.0, "local_epochs": 2}
    plan = TrainingPlan(
        algorithm="reptile" if which == "reptile" else "fedavg", batch_size=BATCH, personal=("output",),
        meta=MetaPlan(inner_steps=3) if which == "reptile" else None, **own,
    )  # fmt: skip
    layers = SharedLayers.of(subject.model.parameters, plan.personal)
    rng = np.random.default_rng(seed % 2**32)
    kept = [None if first else rng.normal(0, 0.1, (~layers.mask).sum()).astype(np.float32) for _ in lengths]
    clients = [
        LocalWork(c.rows, c.shuffle_seed, own=mine) for c, mine in zip(clients_of(lengths, seed), kept, strict=True)
    ]
    trainer = CohortTrainer(subject.model, subject.data)
    result = trainer.train(subject.weights, clients, plan)
    assert result.updates.shape == (len(clients), layers.size)
    whole_plan = plan.model_copy(update={"personal": ()})
    for i, client in enumerate(clients):
        # The same training of the whole vector, by somebody who has these very weights.
        start = subject.weights if kept[i] is None else layers.with_personal(subject.weights, kept[i])
        alone = trainer.train(start, [LocalWork(client.rows, client.shuffle_seed)], whole_plan).updates[0]
        assert_near(result.updates[i], layers.gather(alone))
        assert np.allclose(result.personal[i], layers.personal_of(start + alone), rtol=0, atol=1e-6)


def test_own_layers_go_with_personal_ones_only():
    subject = subject_of("mlp")
    client = LocalWork(np.arange(5), 1, own=np.zeros(27, np.float32))
    trainer = CohortTrainer(subject.model, subject.data)
    with pytest.raises(ConfigurationError, match="personal layers"):
        trainer.train(subject.weights, [client], TrainingPlan(batch_size=BATCH))
    with pytest.raises(ConfigurationError, match="personal layers"):
        trainer.train(subject.weights, [client], TrainingPlan(batch_size=BATCH, personal=("output.bias",)))


# --- memory ------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._alive:
            return

        def gone() -> None:
            self._alive.discard(at)
            self._now -= size

        weakref.finalize(storage, gone)
        self._alive.add(at)
        self._now += size
        self.peak = max(self.peak, self._now)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "per-fedavg"])
def test_as_many_clients_train_at_once_as_the_memory_holds(subject, algorithm):
    plan = plan_of(algorithm, inner_steps=4)
    memory = 3 * 2**20
    count = clients_at_once(subject.model, subject.data, BATCH, memory, differentiated_steps=differentiated_steps(plan))
    rows = [client.rows for client in clients_of([20] * count, 1)]
    drawn = [Splits(subject.data).batches(mine, plan, seed) for seed, mine in enumerate(rows)]
    updates = torch.empty(count, len(subject.weights))
    with Peak() as found:
        MetaGradients(subject.model, subject.data, drawn, plan).train(subject.weights, updates)
    assert memory / 5 < found.peak <= memory
