"""Gradient descent over a program: the same steps by whichever methods it has, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.descent import Descent, descent_method
from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged, UnknownMethod
from client_sdk.protocol.program import Role
from client_sdk.runtime import load_program
from tests.meta import (
    BODY,
    PARAMETERS,
    MetaProgram,
    Oracle,
    make_examples,
    make_manifest,
    make_weights,
    method,
    with_roles,
)

B, RATE = 4, 0.3
WAYS = {
    "adapt": with_roles(Role.ADAPT),
    "reptile": with_roles(Role.REPTILE),
    "train": with_roles(Role.TRAIN),
    "grad": with_roles(Role.GRAD),
    "slices": make_manifest([method(Role.GRAD, 2)]),
}


def draw_batches(k: int, n: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(n, rng.integers(1, min(B, n) + 1), replace=False) for _ in range(k)]


@settings(max_examples=25)
@given(
    way=st.sampled_from(sorted(WAYS)),
    k=st.integers(0, 8),
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_way_takes_the_same_steps(way: str, k: int, n: int, seed: int):
    w, (x, y), batches = make_weights(seed), make_examples(n, seed), draw_batches(k, n, seed)
    adapted, losses = Descent(MetaProgram(WAYS[way]), B).run(w, x, y, batches, RATE)
    expected, expected_losses = Oracle(x, y).adapted(torch.tensor(w, dtype=torch.float64), batches, RATE)
    np.testing.assert_allclose(adapted, expected.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-6)
    assert losses.shape == (k,)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_no_steps_leave_the_weights_bit_for_bit_and_need_no_examples(way: str):
    w = make_weights()
    w[:3] = [-0.0, 1e-45, 3.4e38]
    x, y = make_examples(0)
    adapted, losses = Descent(MetaProgram(WAYS[way]), B).run(w, x, y, [], RATE)
    assert adapted.tobytes() == w.tobytes()
    assert not np.shares_memory(adapted, w)
    assert losses.shape == (0,)


@settings(max_examples=15)
@given(way=st.sampled_from(["adapt", "train", "grad", "slices"]), k=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_frozen_parameters_stay_bit_for_bit_and_the_others_learn_as_if_they_were_constants(way: str, k: int, seed: int):
    w, (x, y), batches = make_weights(seed), make_examples(9, seed), draw_batches(k, 9, seed)
    frozen = [p.name for p in PARAMETERS if p.name.startswith("body.")]
    adapted, _ = Descent(MetaProgram(WAYS[way]), B).run(w, x, y, batches, RATE, frozen=frozen)
    assert adapted[:BODY].tobytes() == w[:BODY].tobytes()
    body, head, oracle = (torch.tensor(part, dtype=torch.float64) for part in (w[:BODY], w[BODY:], w))
    for rows in batches:
        now = torch.cat([body, head]).requires_grad_()
        head = head - RATE * torch.autograd.grad(Oracle(x, y).mean_loss(now, rows), now)[0][BODY:]
    np.testing.assert_allclose(adapted[BODY:], head, rtol=1e-4, atol=1e-5)
    assert len(oracle) == len(adapted)


def test_more_steps_than_the_program_takes_at_once_are_several_calls_and_fewer_are_masked():
    w, (x, y) = make_weights(), make_examples()
    for k, calls in ((1, 1), (3, 1), (4, 2), (7, 3)):
        program = MetaProgram()
        asked = []
        Descent(program, B).run(w, x, y, draw_batches(k, 20, k), RATE, on_call=lambda asked=asked: asked.append(1))
        assert program.calls == ["adapt_k3_b4"] * calls
        assert len(asked) == calls + 1


def test_the_fewest_steps_that_are_enough_are_chosen():
    several = make_manifest([method(Role.ADAPT, 4, k) for k in (5, 2, 9)] + [method(Role.REPTILE, 4, 3)])
    names = [descent_method(several, 4, k).name for k in (1, 2, 3, 5, 6, 9, 20)]
    assert names == ["adapt_k2_b4", "adapt_k2_b4", "reptile_k3_b4", "adapt_k5_b4", *["adapt_k9_b4"] * 3]
    assert descent_method(several, 4, 3, frozen=True).name == "adapt_k5_b4"
    with pytest.raises(UnknownMethod):
        descent_method(several, 8, 3)


def test_it_can_be_ended_between_any_two_calls_and_done_again():
    w, (x, y), batches = make_weights(), make_examples(), draw_batches(5, 20, 1)
    descent = Descent(MetaProgram(WAYS["slices"]), B)
    whole = descent.run(w, x, y, batches, RATE)[0]
    calls = sum(-(-len(batch) // 2) for batch in batches)
    for last in range(calls + 1):
        left = iter(range(last))

        def stop(left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            descent.run(w, x, y, batches, RATE, on_call=stop)
        assert descent.run(w, x, y, batches, RATE)[0].tobytes() == whole.tobytes()


def put(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, x, y, b: (put(w, np.nan), x, y, b), "weights hold NaN"),
        (lambda w, x, y, b: (w[1:], x, y, b), "weights must be"),
        (lambda w, x, y, b: (w, put(x, np.inf), y, b), "data holds NaN or infinite"),
        (lambda w, x, y, b: (w, x[:0], y[:0], b), "no training data"),
        (lambda w, x, y, b: (w, x, put(y, 3), b), "labels must lie in"),
        (lambda w, x, y, b: (w, x, y, [*b, np.array([20])]), "step 2 has rows beyond"),
        (lambda w, x, y, b: (w, x, y, [*b, np.array([-1])]), "step 2 has rows beyond"),
        (lambda w, x, y, _: (w, x, y, [np.zeros(0, np.int64)]), r"step 1 must be int64\[1..4\]"),
        (lambda w, x, y, _: (w, x, y, [np.arange(5)]), r"step 1 must be int64\[1..4\]"),
        (lambda w, x, y, _: (w, x, y, [np.arange(2.0)]), r"step 1 must be int64\[1..4\], got float64"),
    ],
)
def test_what_cannot_be_descended_on_is_refused(spoil: Callable, message: str):
    given_ = spoil(make_weights(), *make_examples(), [np.arange(4)])
    with pytest.raises(ProgramInputError, match=message):
        Descent(MetaProgram(), B).run(*given_, RATE)


def test_rates_and_names_that_are_none_are_refused():
    given_ = make_weights(), *make_examples(), [np.arange(4)]
    with pytest.raises(ConfigurationError, match="as a float32"):
        Descent(MetaProgram(), B).run(*given_, 1e-60)
    with pytest.raises(ConfigurationError, match=r"no parameters \['head'\] to freeze"):
        Descent(MetaProgram(), B).run(*given_, RATE, frozen=["head"])


@pytest.mark.parametrize("way", sorted(WAYS))
def test_divergence_is_told_with_the_step(way: str):
    batches = [np.arange(4)] * 9
    with pytest.raises(TrainingDiverged, match=r"diverged at step [1-9] "):
        Descent(MetaProgram(WAYS[way]), B).run(make_weights(), *make_examples(), batches, 3e38)


def test_an_exported_program_descends_as_plain_softmax_regression_does(softmax_bundle: Path):
    program = load_program(softmax_bundle, "native")
    manifest = program.manifest
    rng = np.random.default_rng(0)
    w = rng.normal(size=manifest.num_parameters).astype(np.float32)
    x, y = rng.normal(size=(10, *manifest.feature_shape)).astype(np.float32), rng.integers(0, 3, 10)
    batches = draw_batches(6, 10, 0)
    adapted, _ = Descent(program, B).run(w, x, y, batches, RATE)
    expected = w.astype(np.float64)
    for rows in batches:
        z = x[rows] @ expected[:18].reshape(3, 6).T + expected[18:]
        error = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(3)[y[rows]]
        expected = expected - RATE / len(rows) * np.concatenate([(error.T @ x[rows]).ravel(), error.sum(axis=0)])
    np.testing.assert_allclose(adapted, expected, rtol=1e-4, atol=1e-5)
    program.close()
