"""What the cohort trainer refuses, and what it promises about memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError
from client_sdk.protocol.program import ParameterSpec
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import Controls
from simulator.cohort.model import BatchedModel
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.datasets import Split
from tests.bundles import tiny_model

D, N = 39, 10
PLAN = TrainingPlan(batch_size=4)
ROWS = np.arange(3)
ZEROS = np.zeros(D, np.float32)


def softmax() -> BatchedModel:
    specs, offset = [], 0
    for name, parameter in tiny_model("softmax").named_parameters():
        specs.append(ParameterSpec(name=name, shape=tuple(parameter.shape), offset=offset))
        offset += parameter.numel()
    assert offset == D
    return BatchedModel(tiny_model("softmax"), tuple(specs))


def split() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.random((N, 12), np.float32), rng.integers(0, 3, N))


def spoilt(**changes: np.ndarray) -> Split:
    whole = split()
    return Split(changes.get("x", whole.x), changes.get("y", whole.y))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (spoilt(x=split().x.astype(np.float64)), "got float64"),
        (spoilt(y=split().y.astype(np.int32)), "int32"),
        (spoilt(y=split().y[:-1]), r"int64\[9\]"),
        (Split(split().x[:0], split().y[:0]), "n >= 1"),
        (spoilt(x=np.full((N, 12), np.nan, np.float32)), "NaN or infinite"),
        (spoilt(x=np.full((N, 12), np.inf, np.float32)), "NaN or infinite"),
    ],
)
def test_data_that_nobody_could_train_on_is_refused(data: Split, message: str):
    with pytest.raises(ProgramInputError, match=message):
        CohortTrainer(softmax(), data)


@pytest.mark.parametrize(
    ("weights", "clients", "plan", "error", "message"),
    [
        (ZEROS[:-1], [LocalWork(ROWS, 0)], PLAN, ProgramInputError, r"finite float32\[39\], got float32\[38\]"),
        (ZEROS.astype(np.float64), [LocalWork(ROWS, 0)], PLAN, ProgramInputError, "got float64"),
        (ZEROS * np.float32(np.nan), [LocalWork(ROWS, 0)], PLAN, ProgramInputError, "must be finite"),
        (ZEROS, [], PLAN, ProgramInputError, "no training data"),
        (ZEROS, [LocalWork(ROWS, 0), LocalWork(ROWS[:0], 0)], PLAN, ProgramInputError, "no training data"),
        (ZEROS, [LocalWork(ROWS, 0)], TrainingPlan(learning_rate=1e-60), ConfigurationError, "zero or infinite"),
        (ZEROS, [LocalWork(ROWS, 0)], TrainingPlan(learning_rate=1e60), ConfigurationError, "zero or infinite"),
        (ZEROS, [LocalWork(ROWS, 0)], TrainingPlan(algorithm="scaffold"), ConfigurationError, "control variates"),
        (ZEROS, [LocalWork(ROWS, 0, Controls(ZEROS, ZEROS))], PLAN, ConfigurationError, "control variates"),
    ],
)
def test_work_that_cannot_be_done_is_refused(weights, clients, plan, error, message):
    with pytest.raises(error, match=message):
        CohortTrainer(softmax(), split()).train(weights, clients, plan)


def test_the_callers_arrays_stay_as_they_are():
    data, weights, rows = split(), np.ones(D, np.float32), ROWS.copy()
    for array in (data.x, data.y, weights, rows):
        array.flags.writeable = False
    before = data.x.copy()
    CohortTrainer(softmax(), data).train(weights, [LocalWork(rows, 0), LocalWork(rows[:1], 1)], PLAN)
    assert np.array_equal(data.x, before)


def test_fewer_clients_at_once_where_a_batch_is_larger():
    def at_once(batch_size: int, memory_bytes: int) -> int:
        trainer = CohortTrainer(softmax(), split(), memory_bytes=memory_bytes)
        return trainer.clients_at_once(TrainingPlan(batch_size=batch_size))

    assert at_once(64, 2**20) < at_once(4, 2**20)
    assert at_once(4, 2**21) >= 2 * at_once(4, 2**20)
    assert at_once(64, 1) == 4, "a batch of one client each"


def test_threads_change_no_bit_and_leave_torch_as_it_was():
    clients = [LocalWork(np.arange(n), n) for n in (1, 9, 4, 7, 2, 10, 3, 3)]
    before = torch.get_num_threads()
    results = [
        CohortTrainer(softmax(), split(), memory_bytes=3000, threads=threads).train(ZEROS, clients, PLAN)
        for threads in (1, 2, 5)
    ]
    assert len({result.updates.tobytes() for result in results}) == 1
    assert len({result.last_epoch_losses.tobytes() for result in results}) == 1
    assert torch.get_num_threads() == before


OWN = (
    TrainingPlan(local_epochs=3, batch_size=4),
    TrainingPlan(local_epochs=1, batch_size=2),
    TrainingPlan(max_steps=1),
)


def test_clients_with_plans_of_their_own_train_as_those_that_share_them():
    """Batches, epochs and steps may differ in one call, and no client feels the plans of the others."""
    clients = [LocalWork(np.arange(2, 9), seed, plan=OWN[seed % 3]) for seed in range(7)]
    together = CohortTrainer(softmax(), split()).train(ZEROS, clients, PLAN)
    assert together.steps.tolist() == [6, 4, 1, 6, 4, 1, 6]
    for i, client in enumerate(clients):
        assert client.plan is not None
        alone = CohortTrainer(softmax(), split()).train(
            ZEROS, [LocalWork(client.rows, client.shuffle_seed)], client.plan
        )
        np.testing.assert_allclose(together.updates[i], alone.updates[0], rtol=1e-4, atol=1e-7)
        assert together.last_epoch_losses[i] == pytest.approx(alone.last_epoch_losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "change", [{"algorithm": "fednova"}, {"learning_rate": 0.2}, {"prox_mu": 1}, {"shuffle": False}]
)
def test_plans_of_ones_own_share_all_but_batch_epochs_and_steps(change: dict[str, object]):
    other = TrainingPlan.model_validate({"batch_size": 4, **change})
    with pytest.raises(ConfigurationError, match="differ in batch size and in epochs and steps, nowhere else"):
        CohortTrainer(softmax(), split()).train(ZEROS, [LocalWork(ROWS, 0), LocalWork(ROWS, 1, plan=other)], PLAN)
