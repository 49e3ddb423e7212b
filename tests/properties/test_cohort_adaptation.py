"""Many devices adapted and judged at once: what one device after the other would get, with the program's own steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.program import Role
from client_sdk.runtime import load_program
from mobile_export import EagerProgram
from simulator.cohort.adaptation import adapt_devices, adaptation_curves, evaluate_devices
from simulator.cohort.model import BatchedModel
from simulator.datasets import Split
from tests.bundles import FEATURE_SHAPES, NUM_CLASSES, tiny_bundle, tiny_model

EXAMPLES = 60
BATCH = 4
TOLERANCE = 1e-5

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=7)
seeds = st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class Subject:
    """A model, its program in eager PyTorch, and data."""

    program: EagerProgram
    model: BatchedModel
    data: Split
    weights: np.ndarray

    def step(self, weights: np.ndarray, rows: np.ndarray, rate: float) -> np.ndarray:
        """One call of the program's training method."""
        method = self.program.manifest.method(Role.TRAIN, BATCH)
        x = np.zeros((BATCH, *self.data.x.shape[1:]), np.float32)
        y, mask = np.zeros(BATCH, np.int64), np.zeros(BATCH, np.float32)
        x[: len(rows)], y[: len(rows)], mask[: len(rows)] = self.data.x[rows], self.data.y[rows], 1
        return self.program.run(method.name, weights, np.array([rate], np.float32), x, y, mask)[0]


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name = request.param
    manifest = load_program(tiny_bundle(name, tmp_path_factory.mktemp(name)).path, "native").manifest
    rng = np.random.default_rng(5)
    data = Split(rng.random((EXAMPLES, *FEATURE_SHAPES[name]), np.float32), rng.integers(0, NUM_CLASSES, EXAMPLES))
    module = tiny_model(name)
    weights = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    return Subject(EagerProgram(module, manifest), BatchedModel(module, manifest.parameters), data, weights)


def rows_of(sizes: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed % 2**32)
    return [rng.permutation(EXAMPLES)[:n] for n in sizes]


def adapted(subject: Subject, rows: list[np.ndarray], weights: np.ndarray, steps: int, **options) -> np.ndarray:
    """float32[n, K + 1, d]."""
    found = np.full((len(rows), max(0, steps) + 1, len(subject.weights)), np.nan, np.float32)
    settings_ = {"learning_rate": 0.2, "batch_size": BATCH, "seed": 3, **options}
    for devices, step, models in adapt_devices(subject.model, subject.data, rows, weights, steps=steps, **settings_):
        found[devices, step] = models
    assert np.isfinite(found).all(), "every device after every step"
    return found


@settings(max_examples=20)
@given(sizes=lengths, steps=st.integers(0, 6), seed=seeds, shuffle=st.booleans(), memory=st.sampled_from([1, 2**26]))
def test_every_device_takes_the_steps_that_its_program_would(subject, sizes, steps, seed, shuffle, memory):
    rows = rows_of(sizes, seed)
    found = adapted(subject, rows, subject.weights, steps, seed=seed, shuffle=shuffle, memory_bytes=memory)
    for mine, models in zip(rows, found, strict=True):
        assert models[0].tobytes() == subject.weights.tobytes()
        if not len(mine):
            assert (models == subject.weights).all()
        elif steps:
            split = ExampleSplit(np.arange(len(mine)), np.zeros(0, np.int64))
            plan = MetaPlan(inner_steps=steps)
            batches = MetaBatches.of("reptile", plan, split, batch_size=BATCH, seed=seed, shuffle=shuffle)
            expected = subject.weights
            for k, batch in enumerate(batches.support):
                expected = subject.step(expected, mine[batch], 0.2)
                moved = np.linalg.norm(expected - subject.weights)
                assert np.linalg.norm(models[k + 1] - expected) <= TOLERANCE * moved


@settings(max_examples=10)
@given(sizes=lengths, seed=seeds)
def test_devices_may_start_each_from_its_own_weights(subject, sizes, seed):
    rows = rows_of(sizes, seed)
    starts = adapted(subject, rows, subject.weights, 2)[:, -1]
    found = adapted(subject, rows, starts, 3)
    for i in range(len(rows)):
        alone = adapted(subject, [rows[i]], starts[i], 3)[0]
        assert np.allclose(found[i], alone, rtol=0, atol=1e-6)


def test_frozen_layers_stay_and_the_others_learn_all_the_same(subject):
    rows = rows_of([9, 1, 20], 1)
    table = subject.model.parameters
    module = table[-1].name.rpartition(".")[0]
    found = adapted(subject, rows, subject.weights, 2, frozen=[module])
    mask = np.concatenate([np.full(p.num_elements, p.name.startswith(module)) for p in table])
    assert 0 < mask.sum() < len(mask)
    assert (found[..., mask] == subject.weights[mask]).all()
    # The first step of the others is what it would be without, for a gradient knows nothing of who takes it.
    free = adapted(subject, rows, subject.weights, 2)
    assert np.allclose(found[:, 1, ~mask], free[:, 1, ~mask], rtol=0, atol=1e-7)
    assert (found[:, 1, ~mask] != subject.weights[~mask]).any()
    assert not np.allclose(found[:, 2, ~mask], free[:, 2, ~mask], rtol=0, atol=1e-7)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=40), seed=seeds, own=st.booleans())
def test_models_are_judged_as_the_program_judges_them(subject, sizes, seed, own):
    rng = np.random.default_rng(seed % 2**32)
    tests = [rng.integers(0, EXAMPLES, n) for n in sizes]
    weights = subject.weights
    if own:
        weights = (weights + rng.normal(0, 0.1, (len(tests), len(weights)))).astype(np.float32)
    found = evaluate_devices(subject.model, weights, subject.data, tests)
    assert list(found.count) == sizes
    for i, rows in enumerate(tests):
        if len(rows):
            expected = subject.model.evaluate(
                weights[i] if own else weights, subject.data.x[rows], subject.data.y[rows]
            )
            assert found.correct[i] == round(expected.accuracy * len(rows))
            assert found.loss_sum[i] == pytest.approx(expected.loss * len(rows), rel=1e-5)
        else:
            assert (found.correct[i], found.loss_sum[i]) == (0, 0)


def test_curves_are_what_the_models_of_each_step_would_score_with_any_number_of_threads(subject):
    rows, tests = rows_of([9, 0, 20, 3, 4, 30, 7, 8, 12], 1), rows_of([5, 6, 0, 30, 9, 3, 8, 1, 70], 2)
    options = {"steps": 4, "learning_rate": 0.2, "batch_size": BATCH, "seed": 3}
    one, three = (
        adaptation_curves(subject.model, subject.data, rows, subject.weights, tests, threads=threads, **options)
        for threads in (1, 3)
    )
    assert one.loss_sum.tobytes() == three.loss_sum.tobytes()
    models = adapted(subject, rows, subject.weights, 4)
    for step in range(5):
        expected = evaluate_devices(subject.model, models[:, step], subject.data, tests)
        assert (one.correct[:, step] == expected.correct).all()
        assert one.loss_sum[:, step] == pytest.approx(expected.loss_sum, rel=1e-5)
    assert np.isnan(one.accuracy[2]).all()
    assert one.accuracy[0, 2] == one.correct[0, 2] / 5


def test_what_is_no_adaptation_is_refused(subject):
    rows = rows_of([4, 4], 1)
    with pytest.raises(ProgramInputError, match="weights must be"):
        adapted(subject, rows, subject.weights[1:], 1)
    with pytest.raises(ConfigurationError, match="at least 0 steps"):
        adapted(subject, rows, subject.weights, -1)
    with pytest.raises(ConfigurationError, match="no layer 'nowhere'"):
        adapted(subject, rows, subject.weights, 1, frozen=["nowhere"])
    with pytest.raises(ProgramInputError, match="2 devices adapt and 1 are judged"):
        adaptation_curves(
            subject.model, subject.data, rows, subject.weights, rows[:1],
            steps=1, learning_rate=0.1, batch_size=4, seed=1,
        )  # fmt: skip
