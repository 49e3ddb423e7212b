"""What local training refuses, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged, UnknownMethod
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.training import LocalTrainer

N = 10


@pytest.fixture(scope="module")
def program(softmax_bundle: Path) -> Iterator[Program]:
    opened = load_program(softmax_bundle, "native")
    yield opened
    opened.close()


@pytest.fixture
def data(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    manifest = program.manifest
    return (
        rng.normal(size=manifest.num_parameters).astype(np.float32),
        rng.normal(size=(N, *manifest.feature_shape)).astype(np.float32),
        rng.integers(0, manifest.num_classes, N),
    )


PLAN = TrainingPlan(local_epochs=2, batch_size=4, learning_rate=0.1)


def put(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, x, y: (w, x[:0], y[:0]), "no training data"),
        (lambda w, x, y: (w, x[:, :-1], y), r"features must be float32 of shape \[n, 6\], got float32\[10, 5\]"),
        (lambda w, x, y: (w, x[0], y[:1]), "features must be float32"),
        (lambda w, x, y: (w, x[0, 0].reshape(()), y), "features must be float32"),
        (lambda w, x, y: (w, x.astype(np.float64), y), "got float64"),
        (lambda w, x, y: (w, x, y[:-1]), r"labels must be int64\[10\], got int64\[9\]"),
        (lambda w, x, y: (w, x, y.astype(np.int32)), "got int32"),
        (lambda w, x, y: (w, x, y[:, None]), "labels must be int64"),
        (lambda w, x, y: (w[:-1], x, y), r"weights must be float32\[21\]"),
        (lambda w, x, y: (w.astype(np.float64), x, y), "weights must be float32"),
        (lambda w, x, y: (w, put(x, np.nan), y), "training data holds NaN"),
        (lambda w, x, y: (w, put(x, -np.inf), y), "training data holds NaN or infinite"),
        (lambda w, x, y: (put(w, np.inf), x, y), "weights hold NaN or infinite"),
        (lambda w, x, y: (w, x, put(y, 3)), r"labels must lie in \[0, 3\), got 0 to 3"),
        (lambda w, x, y: (w, x, put(y, -1)), r"labels must lie in \[0, 3\), got -1 to"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(program: Program, data: tuple, spoil: Callable, message: str):
    with pytest.raises(ProgramInputError, match=message):
        LocalTrainer(program).train(*spoil(*data), PLAN, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 6, 9, 4 * 5 + 1])
def test_a_batch_size_that_cannot_be_built_is_refused_with_the_choices(program: Program, data: tuple, batch_size: int):
    plan = PLAN.model_copy(update={"batch_size": batch_size})
    with pytest.raises(UnknownMethod, match=r"choose one of \[4, 8\] or a multiple of one of \[4, 8\]"):
        LocalTrainer(program).train(*data, plan, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(program: Program, data: tuple, seed: int):
    with pytest.raises(ConfigurationError, match="shuffle_seed"):
        LocalTrainer(program).train(*data, PLAN, seed)


@pytest.mark.parametrize("rate", [1e-60, 1e60])
def test_a_learning_rate_beyond_float32_is_refused(program: Program, data: tuple, rate: float):
    with pytest.raises(ConfigurationError, match="as a float32"):
        LocalTrainer(program).train(*data, PLAN.model_copy(update={"learning_rate": rate}), 0)


@pytest.mark.parametrize("batch_size", [4, 12])
def test_divergence_is_told_with_the_step(program: Program, data: tuple, batch_size: int):
    plan = TrainingPlan(local_epochs=50, batch_size=batch_size, learning_rate=3e38)
    with pytest.raises(TrainingDiverged, match=r"diverged at step [1-9]"):
        LocalTrainer(program).train(*data, plan, 0)


def test_divergence_through_the_proximal_term_is_told(program: Program, data: tuple):
    plan = TrainingPlan(local_epochs=200, batch_size=8, learning_rate=1.0, prox_mu=1e6)
    with pytest.raises(TrainingDiverged, match=r"diverged at step \d+ \(epoch \d+ of 200"):
        LocalTrainer(program).train(*data, plan, 0)


def test_max_steps_ends_training_in_the_middle_of_an_epoch(program: Program, data: tuple):
    result = LocalTrainer(program).train(*data, PLAN.model_copy(update={"max_steps": 2}), 0)
    assert (result.steps, result.num_samples) == (2, N)
    assert result.first_epoch_loss == result.last_epoch_loss


def test_an_epoch_ends_with_a_short_batch(program: Program, data: tuple):
    result = LocalTrainer(program).train(*data, PLAN, 0)
    assert result.steps == 2 * 3


def test_training_learns(program: Program):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    y = np.argmax(x[:, :3], axis=1)
    w = np.zeros(21, np.float32)
    result = LocalTrainer(program).train(w, x, y, TrainingPlan(local_epochs=20, batch_size=8, learning_rate=0.5), 1)
    assert result.last_epoch_loss < result.first_epoch_loss / 2


def test_features_in_any_memory_layout_train_alike(program: Program, data: tuple):
    w, x, y = data
    trainer = LocalTrainer(program)
    expected = trainer.train(w, x, y, PLAN, 3).weights.tobytes()
    strided = np.repeat(x, 2, axis=0)[::2]
    assert trainer.train(w, np.asfortranarray(x), y, PLAN, 3).weights.tobytes() == expected
    assert trainer.train(np.repeat(w, 2)[::2], strided, y, PLAN, 3).weights.tobytes() == expected
