"""What a device computes for maml, fomaml, reptile and per-fedavg, held against the definitions in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.checkpoint import Checkpoint
from client_sdk.errors import IllegalTransition
from client_sdk.meta_training import MetaTrainer
from client_sdk.protocol.errors import (
    ConfigurationError,
    NotEnoughExamples,
    ProgramInputError,
    TrainingDiverged,
    UnknownMethod,
)
from client_sdk.protocol.meta_learning import META_ALGORITHMS, ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.program import Manifest, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from client_sdk.training import TrainingResult
from client_sdk.trainings import begin_training
from tests.checkpoints import Training, bits, state_bits
from tests.meta import D, MetaProgram, Oracle, make_examples, make_manifest, make_weights, method, with_roles

B, RATE, BETA = 4, 0.3, 0.1
# Algorithm and what the program has; K_max is 3.
WAYS: dict[str, tuple[str, Manifest]] = {
    "maml": ("maml", with_roles(Role.MAML)),
    "fomaml": ("fomaml", with_roles(Role.FOMAML)),
    "fomaml by train and grad": ("fomaml", with_roles(Role.TRAIN, Role.GRAD)),
    "fomaml by slices": ("fomaml", make_manifest([method(Role.GRAD, 2)])),
    "fomaml by adapt and slices": ("fomaml", make_manifest([method(Role.ADAPT, 4, 2), method(Role.GRAD, 1)])),
    "reptile": ("reptile", with_roles(Role.REPTILE)),
    "reptile by adapt": ("reptile", with_roles(Role.ADAPT)),
    "reptile by train": ("reptile", with_roles(Role.TRAIN)),
    "reptile by slices": ("reptile", make_manifest([method(Role.GRAD, 2)])),
    "per-fedavg": ("per-fedavg", with_roles(Role.PER_FEDAVG)),
}


def make_plan(algorithm: str, **meta: float) -> TrainingPlan:
    settings_ = {"inner_steps": 3, "query_fraction": 0.4, "meta_learning_rate": BETA} | meta
    return TrainingPlan(algorithm=algorithm, batch_size=B, learning_rate=RATE, meta=MetaPlan(**settings_))


def expected(plan: TrainingPlan, w: np.ndarray, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """The update and the loss, from the definitions."""
    oracle, meta = Oracle(x, y), plan.meta
    split = ExampleSplit.of(x, y, meta.query_fraction, require_query=plan.algorithm != "reptile")
    drawn = MetaBatches.of(plan.algorithm, meta, split, batch_size=B, seed=seed, shuffle=plan.shuffle)
    if plan.algorithm == "per-fedavg":
        return oracle.per_fedavg(w, drawn.support, drawn.query, drawn.hessian, RATE, meta.meta_learning_rate)
    if plan.algorithm == "reptile":
        start = torch.tensor(w, dtype=torch.float64)
        adapted, losses = oracle.adapted(start, drawn.support, RATE)
        counts = [len(rows) for rows in drawn.support]
        return (adapted.detach() - start).numpy(), float(np.average(losses, weights=counts))
    first_order = plan.algorithm == "fomaml"
    return oracle.meta_gradient(w, drawn.support, drawn.query, RATE, first_order=first_order)


def train(way: str, plan: TrainingPlan, w: np.ndarray, x: np.ndarray, y: np.ndarray, seed: int) -> TrainingResult:
    return MetaTrainer(MetaProgram(WAYS[way][1])).train(w, x, y, plan, seed)


def close(actual: np.ndarray, wanted: np.ndarray, scale: float = 1.0) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-5 * scale)


@settings(max_examples=100)
@given(
    way=st.sampled_from(sorted(WAYS)),
    k=st.integers(1, 3),
    n=st.integers(2, 30),
    query_batches=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_session_is_what_the_definition_says(way: str, k: int, n: int, query_batches: int, seed: int):
    w, (x, y) = make_weights(seed % 2**32), make_examples(n, seed % 2**32)
    plan = make_plan(WAYS[way][0], inner_steps=k, query_batches=query_batches)
    result = train(way, plan, w, x, y, seed)
    update, loss = expected(plan, w, x, y, seed)
    # A sum of K gradients is read off a difference of weights, over beta.
    close(result.update(plan), update, 1 / BETA if plan.algorithm == "per-fedavg" else 1)
    assert result.last_epoch_loss == result.first_epoch_loss == pytest.approx(loss, rel=1e-4)
    assert (result.steps, result.num_samples) == (k, n)
    assert plan.update_kind is (UpdateKind.DELTA if way.startswith("reptile") else UpdateKind.GRADIENT)


@pytest.mark.parametrize("way", ["reptile", "reptile by adapt", "fomaml by adapt and slices"])
def test_more_steps_than_one_call_takes_are_several_calls(way: str):
    w, (x, y) = make_weights(), make_examples()
    plan = make_plan(WAYS[way][0], inner_steps=8, query_batches=2)
    close(train(way, plan, w, x, y, 5).update(plan), expected(plan, w, x, y, 5)[0])


def test_maml_is_of_second_order_and_fomaml_of_first():
    w, (x, y) = make_weights(), make_examples()
    # The same batches: what differs is the curvature.
    gradients = [train(name, make_plan(name), w, x, y, 5).gradient for name in ("maml", "fomaml")]
    assert np.linalg.norm(gradients[0] - gradients[1]) > 0.1 * np.linalg.norm(gradients[0])


@settings(max_examples=25)
@given(way=st.sampled_from([w for w in sorted(WAYS) if w.startswith("reptile")]), seed=st.integers(0, 2**32 - 1))
def test_reptile_with_one_step_on_all_examples_is_a_gradient_step(way: str, seed: int):
    w, (x, y) = make_weights(seed), make_examples(B, seed)
    plan = make_plan("reptile", inner_steps=1)
    v = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(Oracle(x, y).mean_loss(v, np.arange(B)), v)[0]
    close(train(way, plan, w, x, y, seed).update(plan), -RATE * gradient.numpy())


def test_an_update_of_per_fedavg_with_the_rate_of_its_local_steps_leads_to_the_local_weights():
    w, (x, y) = make_weights(), make_examples()
    result = train("per-fedavg", make_plan("per-fedavg"), w, x, y, 5)
    np.testing.assert_allclose(w - BETA * result.gradient, result.weights, atol=1e-6)


def test_the_callers_arrays_stay_as_they_are():
    for way, (algorithm, _) in WAYS.items():
        w, (x, y) = make_weights(), make_examples()
        before = [a.tobytes() for a in (w, x, y)]
        train(way, make_plan(algorithm), w, x, y, 5)
        assert [a.tobytes() for a in (w, x, y)] == before


# --- few examples ---------------------------------------------------------------------------------------------


def test_reptile_adapts_with_a_single_example_and_the_others_say_that_none_can_judge():
    w, (x, y) = make_weights(), make_examples(1)
    for way, (algorithm, _) in WAYS.items():
        plan = make_plan(algorithm)
        if algorithm == "reptile":
            close(train(way, plan, w, x, y, 5).update(plan), expected(plan, w, x, y, 5)[0])
        else:
            with pytest.raises(NotEnoughExamples, match="at least two different examples"):
                train(way, plan, w, np.repeat(x, 7, axis=0), np.repeat(y, 7), 5)
        with pytest.raises(ProgramInputError, match="no training data"):
            train(way, plan, w, x[:0], y[:0], 5)


@settings(max_examples=25)
@given(way=st.sampled_from(sorted(WAYS)), n=st.integers(2, 9))
def test_examples_of_one_class_are_enough(way: str, n: int):
    w, (x, _) = make_weights(), make_examples(n)
    y, plan = np.full(n, 2), make_plan(WAYS[way][0])
    close(train(way, plan, w, x, y, 5).update(plan), expected(plan, w, x, y, 5)[0], 1 / BETA)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "per-fedavg"])
def test_what_judges_never_adapts(algorithm: str):
    """Query examples of which one is changed change the gradient, but no batch that adapts."""
    w, (x, y) = make_weights(), make_examples()
    split = ExampleSplit.of(x, y, 0.4)
    seen: list[np.ndarray] = []

    class Watching(MetaProgram):
        def run(self, name: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
            names = [s.name for s in self.manifest.named(name).inputs]
            seen.extend(
                a.reshape(-1, 3)
                for n, a in zip(names, map(np.copy, inputs), strict=True)
                if n in {"inner_x", "hessian_x"}
            )
            return super().run(name, *inputs)

    MetaTrainer(Watching()).train(w, x, y, make_plan(algorithm), 5)
    adapting = {row.tobytes() for batch in seen for row in batch if row.any()}
    assert adapting <= {row.tobytes() for row in x[split.support]}
    assert not adapting & {row.tobytes() for row in x[split.query]}


# --- left and gone on with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_session_goes_on_bit_for_bit_from_any_of_its_calls(way: str):
    algorithm, manifest = WAYS[way]
    k = 5 if algorithm == "reptile" or "adapt" in way else 3
    plan = make_plan(algorithm, inner_steps=k, query_batches=3)
    training = Training(MetaProgram(manifest), plan, num_samples=19)
    whole = training.undisturbed()
    run = training.begin()
    done = [run.examples_done]
    while not run.finished:
        run.advance()
        done.append(run.examples_done)
        kept = Checkpoint.from_bytes(training.checkpoint(run).to_bytes(), 1 << 20)
        assert state_bits(kept.state) == state_bits(run.snapshot())
        again = training.begin(kept.state)
        assert (again.finished, again.steps, again.examples_done) == (run.finished, run.steps, run.examples_done)
        while not again.finished:
            again.advance()
        assert bits(again.result()) == whole
    assert bits(run.result()) == whole
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, run.total_examples)
    with pytest.raises(IllegalTransition):
        run.advance()


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_call_that_fails_has_changed_nothing(way: str):
    algorithm, manifest = WAYS[way]
    training = Training(MetaProgram(manifest), make_plan(algorithm, query_batches=3), num_samples=19)
    whole = training.undisturbed()
    failing = iter(range(10**6))

    def before_run() -> None:
        if next(failing) % 2 == 0:
            raise OSError("the runtime failed")

    training.program = MetaProgram(manifest, before_run)
    run = training.begin()
    while not run.finished:
        before = state_bits(run.snapshot())
        with pytest.raises(OSError, match="runtime failed"):
            run.advance()
        assert state_bits(run.snapshot()) == before
        run.advance()
    assert bits(run.result()) == whole


def other(state: object, **changes: object) -> object:
    return type(state)(**(vars(state) | changes))


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: other(s, steps=s.steps + 1),
        lambda s: other(s, steps=-1),
        lambda s: other(s, slices_done=s.slices_done + 9),
        lambda s: other(s, accumulator=None if s.accumulator is not None else np.zeros(D, np.float32)),
        lambda s: other(s, weights=s.weights[1:]),
        lambda s: other(s, weights=np.full(D, np.nan, np.float32)),
        lambda s: other(s, epoch=1),
        lambda s: other(s, position=1),
        lambda s: other(s, seen=s.seen + 1),
    ],
)
def test_a_state_that_a_session_does_not_come_to_is_refused(way: str, spoil: Callable):
    algorithm, manifest = WAYS[way]
    training = Training(MetaProgram(manifest), make_plan(algorithm, query_batches=3), num_samples=19)
    run = training.begin()
    run.advance()
    with pytest.raises(ConfigurationError, match="training state"):
        training.begin(spoil(run.snapshot()))


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "roles", "message"),
    [
        ("maml", (Role.FOMAML, Role.GRAD, Role.TRAIN), r"no maml method.*--batch-sizes maml=4 --inner-steps 3"),
        ("fomaml", (Role.MAML, Role.TRAIN), r"no fomaml method.*--batch-sizes fomaml=4 --inner-steps 3"),
        ("per-fedavg", (Role.MAML,), r"no per_fedavg method.*--batch-sizes per_fedavg=4"),
        ("reptile", (Role.MAML,), "cannot train with batch size 4"),
    ],
)
def test_a_program_without_the_methods_is_refused_by_what_it_lacks(algorithm: str, roles: tuple, message: str):
    with pytest.raises(UnknownMethod, match=message):
        MetaTrainer(MetaProgram(with_roles(*roles))).begin(make_weights(), *make_examples(), make_plan(algorithm), 5)


def test_more_steps_than_maml_was_exported_for_are_refused():
    with pytest.raises(UnknownMethod, match=r"maml_k3_b4 \(3 steps\)"):
        MetaTrainer(MetaProgram()).begin(make_weights(), *make_examples(), make_plan("maml", inner_steps=4), 5)


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_seeds_rates_and_data_are_checked_as_for_ordinary_training(algorithm: str):
    trainer, plan, w, (x, y) = MetaTrainer(MetaProgram()), make_plan(algorithm), make_weights(), make_examples()
    with pytest.raises(ConfigurationError, match="shuffle_seed"):
        trainer.begin(w, x, y, plan, 2**64)
    with pytest.raises(ConfigurationError, match="as a float32"):
        trainer.begin(w, x, y, plan.model_copy(update={"learning_rate": 1e-60}), 0)
    with pytest.raises(ProgramInputError, match="NaN"):
        trainer.begin(w, np.where(x > 2, np.nan, x).astype(np.float32) * np.float32(np.inf), y, plan, 0)
    with pytest.raises(ProgramInputError, match="NaN"):
        trainer.begin(np.full_like(w, np.nan), x, y, plan, 0)
    with pytest.raises(ProgramInputError, match="labels"):
        trainer.begin(w, x, y + 1, plan, 0)


def test_a_meta_rate_beyond_float32_and_a_plan_that_is_none_are_refused():
    plan = make_plan("per-fedavg", meta_learning_rate=1e-60)
    with pytest.raises(ConfigurationError, match="meta_learning_rate 1e-60"):
        MetaTrainer(MetaProgram()).begin(make_weights(), *make_examples(), plan, 0)
    with pytest.raises(ConfigurationError, match="fedavg is not meta-learning"):
        MetaTrainer(MetaProgram()).begin(make_weights(), *make_examples(), TrainingPlan(), 0)


@pytest.mark.parametrize("algorithm", ["maml", "per-fedavg"])
def test_what_is_not_made_of_slices_refuses_a_slice_size(algorithm: str):
    with pytest.raises(ConfigurationError, match="not made of slices"):
        begin_training(MetaProgram(), make_weights(), make_examples(), make_plan(algorithm), 5, slice_size=4)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_divergence_is_told(way: str):
    plan = make_plan(WAYS[way][0]).model_copy(update={"learning_rate": 3e38})
    w, (x, y) = make_weights(), make_examples(seed=3)
    with pytest.raises(TrainingDiverged, match="diverged"):
        train(way, plan, w, x * 100, y, 5)
