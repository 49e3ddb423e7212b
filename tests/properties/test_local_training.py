"""Local training of a real program, held against plain float64 SGD written out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.program import Manifest, Program, Role
from client_sdk.protocol.training import TrainingPlan, normaliser, update_size
from client_sdk.runtime import load_program
from client_sdk.training import Controls, LocalTrainer, TrainingResult

FEATURES, CLASSES, D = 6, 3, 21
FUSED, SLICED = (4, 8), (12, 16, 24, 40)

plans = st.builds(
    TrainingPlan,
    local_epochs=st.integers(1, 3),
    batch_size=st.sampled_from(FUSED + SLICED),
    learning_rate=st.floats(0.01, 0.5),
    prox_mu=st.sampled_from([0.0, 0.01, 0.5]),
    shuffle=st.booleans(),
    max_steps=st.none() | st.integers(1, 12),
)
sizes = st.integers(1, 50)
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def program(softmax_bundle: Path) -> Iterator[Program]:
    opened = load_program(softmax_bundle, "native")
    yield opened
    opened.close()


def dataset(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, features and labels."""
    rng = np.random.default_rng(seed % 2**32)
    w = rng.normal(0, 0.3, D).astype(np.float32)
    return w, rng.normal(size=(n, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, n)


def loss_and_gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Sums over the examples of softmax regression, in float64."""
    z = x.astype(np.float64) @ w[: CLASSES * FEATURES].reshape(CLASSES, FEATURES).T + w[CLASSES * FEATURES :]
    z -= z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    residual = np.exp(log_p) - np.eye(CLASSES)[y]
    gradient = np.concatenate([(residual.T @ x).ravel(), residual.sum(axis=0)])
    return -log_p[np.arange(len(y)), y].sum(), gradient


def reference(
    w0: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    plan: TrainingPlan,
    seed: int,
    controls: Controls | None = None,
) -> TrainingResult:
    """What the plan means; with controls, option II as the paper writes it."""
    w0 = w0.astype(np.float64)
    c, c_i = (0.0, 0.0) if controls is None else (v.astype(np.float64) for v in (controls.server, controls.device))
    w, n, steps, epoch_losses = w0.copy(), len(y), 0, []
    for epoch in range(plan.local_epochs):
        order = np.arange(n)
        if plan.shuffle:
            order = np.random.Generator(np.random.Philox(key=seed + 2**64 * epoch)).permutation(n)
        losses, seen = 0.0, 0
        for at in range(0, n, plan.batch_size):
            if steps == plan.max_steps:
                break
            picked = order[at : at + plan.batch_size]
            loss, gradient = loss_and_gradient(w, x[picked], y[picked])
            w = w - plan.learning_rate * (gradient / len(picked) + plan.prox_mu * (w - w0) - c_i + c)
            losses, seen, steps = losses + loss, seen + len(picked), steps + 1
        if seen:
            epoch_losses.append(losses / seen)
    new_c_i = c_i - c + (w0 - w) / (steps * plan.learning_rate)
    return TrainingResult(w, w - w0, n, steps, epoch_losses[0], epoch_losses[-1], new_c_i - c_i)


@settings(max_examples=80)
@given(plan=plans, n=sizes, seed=seeds)
def test_training_is_sgd(program: Program, plan: TrainingPlan, n: int, seed: int):
    w, x, y = dataset(n, seed)
    found = LocalTrainer(program).train(w, x, y, plan, seed)
    expected = reference(w, x, y, plan, seed)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.delta, expected.delta, rtol=2e-5, atol=2e-5)
    assert (found.num_samples, found.steps) == (n, expected.steps)
    assert math.isclose(found.first_epoch_loss, expected.first_epoch_loss, rel_tol=1e-4)
    assert math.isclose(found.last_epoch_loss, expected.last_epoch_loss, rel_tol=1e-4)


@settings(max_examples=40)
@given(plan=plans, n=sizes, seed=seeds)
def test_training_twice_gives_the_same_bits_and_changes_no_input(
    program: Program, plan: TrainingPlan, n: int, seed: int
):
    w, x, y = dataset(n, seed)
    before = [a.tobytes() for a in (w, x, y)]
    for a in (w, x, y):
        a.flags.writeable = False
    trainer = LocalTrainer(program)
    first = trainer.train(w, x, y, plan, seed)
    # Other work in between, with other batch sizes, leaves traces in the reused buffers.
    trainer.train(*dataset(7, seed + 1), TrainingPlan(batch_size=8, local_epochs=1), seed)
    trainer.train(*dataset(3, seed + 2), TrainingPlan(batch_size=4, local_epochs=1), seed)
    second = trainer.train(w, x, y, plan, seed)
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.delta.tobytes() == second.delta.tobytes()
    assert (first.first_epoch_loss, first.last_epoch_loss) == (second.first_epoch_loss, second.last_epoch_loss)
    assert [a.tobytes() for a in (w, x, y)] == before


@settings(max_examples=40)
@given(plan=plans, n=sizes, seed=seeds)
def test_the_delta_is_the_difference_to_the_bit(program: Program, plan: TrainingPlan, n: int, seed: int):
    w, x, y = dataset(n, seed)
    result = LocalTrainer(program).train(w, x, y, plan, seed)
    assert result.weights.dtype == result.delta.dtype == np.float32
    assert (result.weights - w).tobytes() == result.delta.tobytes()


class GradOnly:
    """A program without its fused steps."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def manifest(self) -> Manifest:
        manifest = self._program.manifest
        return manifest.model_copy(update={"methods": tuple(m for m in manifest.methods if m.role is not Role.TRAIN)})

    def run(self, method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return self._program.run(method, *inputs)

    def close(self) -> None:
        self._program.close()


@settings(max_examples=40)
@given(plan=plans, n=sizes, seed=seeds)
def test_the_fused_step_and_the_gradient_primitive_agree(program: Program, plan: TrainingPlan, n: int, seed: int):
    plan = plan.model_copy(update={"batch_size": 8})
    w, x, y = dataset(n, seed)
    fused = LocalTrainer(program).train(w, x, y, plan, seed)
    sliced = LocalTrainer(GradOnly(program)).train(w, x, y, plan, seed)
    np.testing.assert_allclose(fused.weights, sliced.weights, rtol=1e-5, atol=1e-6)
    assert fused.steps == sliced.steps


@settings(max_examples=20)
@given(n=sizes, seed=seeds, mu=st.floats(0.1, 5.0))
def test_the_proximal_term_holds_the_weights_back(program: Program, n: int, seed: int, mu: float):
    w, x, y = dataset(n, seed)
    free = TrainingPlan(local_epochs=4, batch_size=8, learning_rate=0.1)
    held = free.model_copy(update={"prox_mu": mu})
    trainer = LocalTrainer(program)
    distance = [float(np.linalg.norm(trainer.train(w, x, y, p, seed).delta)) for p in (free, held)]
    assert distance[1] < distance[0]


@settings(max_examples=20)
@given(n=sizes, seed=seeds)
def test_one_step_does_not_feel_the_proximal_term(program: Program, n: int, seed: int):
    w, x, y = dataset(n, seed)
    plan = TrainingPlan(local_epochs=1, batch_size=8, max_steps=1)
    trainer = LocalTrainer(program)
    free = trainer.train(w, x, y, plan, seed)
    held = trainer.train(w, x, y, plan.model_copy(update={"prox_mu": 3.0}), seed)
    assert free.weights.tobytes() == held.weights.tobytes()


@settings(max_examples=20)
@given(n=st.integers(9, 50), seed=seeds)
def test_the_seed_decides_the_order(program: Program, n: int, seed: int):
    w, x, y = dataset(n, seed)
    plan = TrainingPlan(local_epochs=1, batch_size=4)
    trainer = LocalTrainer(program)
    one = trainer.train(w, x, y, plan, seed)
    other = trainer.train(w, x, y, plan, seed ^ 1)
    assert one.weights.tobytes() != other.weights.tobytes()


# --- scaffold ------------------------------------------------------------------------------------------------


def make_controls(seed: int, scale: float = 0.3) -> Controls:
    rng = np.random.default_rng([seed % 2**32, 1])
    server, device = rng.normal(0, scale, (2, D)).astype(np.float32)
    return Controls(server, device)


plain_plans = plans.map(lambda plan: plan.model_copy(update={"prox_mu": 0.0}))
scaffold_plans = plain_plans.map(lambda plan: plan.model_copy(update={"algorithm": "scaffold"}))


@settings(max_examples=60)
@given(plan=scaffold_plans, n=sizes, seed=seeds)
def test_scaffold_is_sgd_with_the_correction_and_option_two(program: Program, plan: TrainingPlan, n: int, seed: int):
    w, x, y = dataset(n, seed)
    controls = make_controls(seed)
    found = LocalTrainer(program).train(w, x, y, plan, seed, controls=controls)
    expected = reference(w, x, y, plan, seed, controls)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=2e-5, atol=2e-5)
    # One step of lr 0.01 divides float32's noise in the delta by it.
    np.testing.assert_allclose(found.control_delta, expected.control_delta, rtol=1e-4, atol=2e-4)
    assert found.update(plan).tobytes() == found.delta.tobytes() + found.control_delta.tobytes()


@settings(max_examples=40)
@given(plan=plain_plans, n=sizes, seed=seeds, same=st.booleans())
def test_scaffold_with_equal_controls_takes_the_very_steps_of_fedavg(
    program: Program, plan: TrainingPlan, n: int, seed: int, same: bool
):
    w, x, y = dataset(n, seed)
    equal = make_controls(seed).server if same else np.zeros(D, np.float32)
    trainer = LocalTrainer(program)
    plain = trainer.train(w, x, y, plan, seed)
    scaffold = plan.model_copy(update={"algorithm": "scaffold"})
    corrected = trainer.train(w, x, y, scaffold, seed, controls=Controls(equal, equal))
    assert corrected.weights.tobytes() == plain.weights.tobytes()
    assert corrected.delta.tobytes() == plain.delta.tobytes() == plain.update(plan).tobytes()
    assert (corrected.steps, corrected.last_epoch_loss) == (plain.steps, plain.last_epoch_loss)


@settings(max_examples=40)
@given(plan=scaffold_plans, n=sizes, seed=seeds)
def test_a_control_becomes_the_mean_gradient_of_the_steps_whatever_it_was(
    program: Program, plan: TrainingPlan, n: int, seed: int
):
    """Option II in other words: the corrections cancel, what stays is the mean of the gradients on the way."""

    class Recorded(GradOnly):
        """Notes the mean gradient of each call."""

        def __init__(self, program: Program) -> None:
            super().__init__(program)
            self.sums: list[np.ndarray] = []
            self.counts: list[float] = []

        def run(self, method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
            outputs = super().run(method, *inputs)
            self.sums.append(outputs[0].astype(np.float64))
            self.counts.append(float(inputs[-1].sum()))
            return outputs

    plan = plan.model_copy(update={"batch_size": 8, "local_epochs": 1})
    w, x, y = dataset(n, seed)
    controls = make_controls(seed)
    recorded = Recorded(program)
    result = LocalTrainer(recorded).train(w, x, y, plan, seed, controls=controls)
    mean = np.mean([g / k for g, k in zip(recorded.sums, recorded.counts, strict=True)], axis=0)
    np.testing.assert_allclose(controls.device + result.control_delta, mean, rtol=1e-4, atol=2e-4)


@settings(max_examples=20)
@given(seed=seeds)
def test_the_corrections_of_all_devices_cancel(program: Program, seed: int):
    """With c the mean of the c_i, one step from the same weights moves the fleet's mean as if there were none."""
    rng = np.random.default_rng(seed % 2**32)
    # Multiples of 2^-10: their mean over four devices and all differences are exact.
    own = (rng.integers(-512, 512, (4, D)) / 1024).astype(np.float32)
    server = own.mean(axis=0, dtype=np.float64).astype(np.float32)
    plan = TrainingPlan(batch_size=8, learning_rate=0.25, max_steps=1)
    scaffold = plan.model_copy(update={"algorithm": "scaffold"})
    w, _, _ = dataset(1, seed)
    trainer = LocalTrainer(program)
    moved = np.zeros(D)
    for device in range(4):
        _, x, y = dataset(8, seed + device)
        plain = trainer.train(w, x, y, plan, seed)
        corrected = trainer.train(w, x, y, scaffold, seed, controls=Controls(server, own[device]))
        moved += corrected.delta.astype(np.float64) - plain.delta
    np.testing.assert_allclose(moved, 0, atol=2e-6)


# --- fednova -------------------------------------------------------------------------------------------------


@given(
    steps=st.integers(1, 300),
    rate=st.floats(1e-4, 0.5),
    mu=st.just(0.0) | st.floats(1e-6, 1.9),
)
def test_the_normaliser_is_the_weight_of_all_steps_in_the_delta(steps: int, rate: float, mu: float):
    """[Wang et al. 2020]: the k-th gradient of tau is shrunk by every proximal step that follows it."""
    plan = TrainingPlan(learning_rate=rate, prox_mu=mu, algorithm="fednova")
    pull = Fraction(rate * mu)
    exact = sum((1 - pull) ** k for k in range(steps))
    assert math.isclose(normaliser(plan, steps), exact, rel_tol=1e-12)
    assert normaliser(plan.model_copy(update={"algorithm": "fedavg"}), steps) == 1


@settings(max_examples=40)
@given(plan=plans, n=sizes, seed=seeds)
def test_fednova_sends_the_delta_over_its_normaliser(program: Program, plan: TrainingPlan, n: int, seed: int):
    nova = plan.model_copy(update={"algorithm": "fednova"})
    w, x, y = dataset(n, seed)
    plain = LocalTrainer(program).train(w, x, y, plan, seed)
    result = LocalTrainer(program).train(w, x, y, nova, seed)
    assert result.weights.tobytes() == plain.weights.tobytes()
    divisor = normaliser(nova, result.steps)
    expected = (result.delta.astype(np.float64) / divisor).astype(np.float32)
    assert result.update(nova).tobytes() == expected.tobytes()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValidationError, match="prox_mu has no meaning with scaffold"):
        TrainingPlan(algorithm="scaffold", prox_mu=0.1)
    with pytest.raises(ValidationError, match="must not overshoot"):
        TrainingPlan(algorithm="fednova", learning_rate=0.5, prox_mu=2.0)
    assert update_size(TrainingPlan(algorithm="scaffold"), D) == 2 * D
    assert update_size(TrainingPlan(algorithm="fednova"), D) == D
