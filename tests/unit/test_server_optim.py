"""Server optimizers against torch, against scalar formulas, and against today's plain averaging; bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError, InvalidUpdate, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.server_optim import (
    Adagrad,
    Adam,
    OptimizerConfig,
    ServerOptimizer,
    ServerState,
    Sgd,
    Yogi,
    server_optimizer,
)

SIZE, STEPS = 40_000, 12
OPTIMIZERS = [
    Sgd(),
    Sgd(momentum=0.9),
    Sgd(momentum=0.9, nesterov=True),
    Adagrad(),
    Adam(),
    Adam(bias_correction=True),
    Yogi(),
]
OPTIMIZERS += [Adagrad(beta1=0.9)]
ALL = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.title)


def start() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)


def deltas() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(2)
    for step in range(STEPS):
        yield rng.standard_normal(SIZE) * 10.0 ** rng.uniform(-4, 0, SIZE) / (step + 1)


def run(optimizer: ServerOptimizer, kind: UpdateKind = UpdateKind.DELTA, scale: float = 1.0) -> ServerState:
    state = optimizer.initial(start())
    for delta in deltas():
        aggregate = delta * scale if kind is UpdateKind.DELTA else -delta * scale
        state = optimizer.step(state, aggregate, kind)
    return state


# --- torch as an independent oracle ---------------------------------------------------------------------------


def torch_run(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], before: Callable[..., None]) -> np.ndarray:
    """The same steps by a torch optimizer on float64 parameters, whose gradient is minus the delta."""
    weights = torch.tensor(start().astype(np.float64), requires_grad=True)
    optimizer = make([weights])
    for step, delta in enumerate(deltas(), start=1):
        weights.grad = torch.from_numpy(-delta)
        before(optimizer, weights, step)
        optimizer.step()
    return weights.detach().numpy()


def nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True)])
def test_sgd_is_torch_s(momentum, nesterov):
    found = run(Sgd(learning_rate=0.3, momentum=momentum, nesterov=nesterov))
    expected = torch_run(lambda p: torch.optim.SGD(p, lr=0.3, momentum=momentum, nesterov=nesterov), nothing)
    np.testing.assert_allclose(found.master, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3, 0.1])
def test_adagrad_is_torch_s_with_an_accumulator_that_starts_at_the_square_of_epsilon(epsilon):
    found = run(Adagrad(learning_rate=0.05, epsilon=epsilon))
    expected = torch_run(
        lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=epsilon**2, eps=epsilon), nothing
    )
    np.testing.assert_allclose(found.master, expected, rtol=1e-12, atol=1e-12)


def test_adam_with_bias_correction_is_torch_s():
    found = run(Adam(learning_rate=0.05, beta1=0.8, beta2=0.95, epsilon=1e-4, bias_correction=True))
    expected = torch_run(lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-4), nothing)
    np.testing.assert_allclose(found.master, expected, rtol=1e-12, atol=1e-12)


def test_adam_of_the_paper_is_torch_s_with_the_correction_taken_out_of_its_rate_and_epsilon():
    """Its step is lr / c1 * m / (sqrt(v) / sqrt(c2) + eps) with c = 1 - beta**t: undo c1 and c2, start v at eps**2."""
    rate, beta1, beta2, epsilon = 0.05, 0.9, 0.99, 1e-3

    def undo(optimizer: torch.optim.Optimizer, weights: torch.Tensor, step: int) -> None:
        root = math.sqrt(1 - beta2**step)
        optimizer.param_groups[0].update(lr=rate * (1 - beta1**step) / root, eps=epsilon / root)
        if step == 1:
            optimizer.state[weights] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros(SIZE, dtype=torch.float64),
                "exp_avg_sq": torch.full((SIZE,), epsilon**2, dtype=torch.float64),
            }

    found = run(Adam(learning_rate=rate, beta1=beta1, beta2=beta2, epsilon=epsilon))
    expected = torch_run(lambda p: torch.optim.Adam(p, lr=rate, betas=(beta1, beta2), eps=epsilon), undo)
    np.testing.assert_allclose(found.master, expected, rtol=1e-12, atol=1e-12)


def test_yogi_is_the_paper_s_formula_number_by_number():
    rate, beta1, beta2, tau = 0.05, 0.9, 0.99, 1e-3
    found = run(Yogi(learning_rate=rate, beta1=beta1, beta2=beta2, epsilon=tau))
    series = [delta[:20].tolist() for delta in deltas()]
    for j, x in enumerate(start()[:20].tolist()):
        m, v = 0.0, tau**2
        for delta in series:
            m = beta1 * m + (1 - beta1) * delta[j]
            square = delta[j] ** 2
            v = v - (1 - beta2) * square * math.copysign(1.0 if v != square else 0.0, v - square)
            x = x + rate * m / (math.sqrt(v) + tau)  # noqa: PLW2901 - the weight moves
        assert found.master[j] == pytest.approx(x, rel=1e-13)


# --- signs, bits, scales --------------------------------------------------------------------------------------


def plain_step(weights: np.ndarray, aggregate: np.ndarray, kind: UpdateKind, rate: float) -> np.ndarray:
    """Averaging on float32 weights, as it is without any state."""
    sign = 1.0 if kind is UpdateKind.DELTA else -1.0
    return (weights.astype(np.float64) + sign * rate * aggregate).astype(np.float32)


@pytest.mark.parametrize("kind", UpdateKind)
@pytest.mark.parametrize("rate", [1.0, 0.37])
def test_a_first_plain_step_is_the_weighted_sum_computed_in_float64_and_rounded_once(kind, rate):
    weights = start()
    weights[:3] = [0.0, -0.0, 1e-40]
    aggregate = next(deltas())
    aggregate[:3] = [0.0, 0.0, -1e-45]
    optimizer = Sgd(learning_rate=rate)
    found = optimizer.step(optimizer.initial(weights), aggregate, kind).weights
    assert found.tobytes() == plain_step(weights, aggregate, kind, rate).tobytes()


@ALL
def test_a_gradient_is_a_delta_of_the_other_sign(optimizer):
    up, down = run(optimizer), run(optimizer, UpdateKind.GRADIENT)
    assert up.to_bytes() == down.to_bytes()


@ALL
def test_rescaling_changes_no_bit_of_the_weights(optimizer):
    settings = {**vars(optimizer)}
    often = type(optimizer)(**{**settings, "rescale_every": 1})
    never = type(optimizer)(**{**settings, "rescale_every": 0})
    assert run(often).master.tobytes() == run(never).master.tobytes()
    assert run(never).exponent == 0
    assert (run(often).exponent == 0) is (optimizer == Sgd())


@pytest.mark.parametrize("make", [Adagrad, Adam, Yogi])
def test_gradients_whose_squares_leave_float64_train_as_others_do(make):
    """An adaptive step does not depend on the gradient's unit, as long as epsilon is nothing beside the gradient."""
    found = run(make(learning_rate=0.05, epsilon=1e-30), scale=2.0**700)
    expected = run(make(learning_rate=0.05, epsilon=1e-30))
    np.testing.assert_allclose(found.master, expected.master, rtol=1e-9)
    assert found.exponent > 400


@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.5), Sgd()], ids=lambda o: o.title)
def test_sgd_moves_by_the_true_momentum_whatever_its_scale(optimizer):
    state = optimizer.initial(np.zeros(2, np.float32))
    for aggregate in (1e-200, 1e30, 1e-200):
        state = optimizer.step(state, np.array([aggregate, 0.0]), UpdateKind.DELTA)
    assert state.master.tolist() == [pytest.approx(1.5e30 if optimizer.momentum else 1e30, rel=1e-15), 0.0]


def test_small_updates_add_up_in_the_master_where_float32_stands_still():
    optimizer = Sgd()
    state, weights = optimizer.initial(np.ones(3, np.float32)), np.ones(3, np.float32)
    for _ in range(1000):
        state = optimizer.step(state, np.full(3, 3e-8), UpdateKind.DELTA)
        weights = plain_step(weights, np.full(3, 3e-8), UpdateKind.DELTA, 1.0)
    assert weights.tolist() == [1.0] * 3
    assert state.weights.tolist() == [float(np.float32(1.00003))] * 3


@ALL
def test_the_learning_rate_s_factor_scales_the_step(optimizer):
    state = optimizer.initial(start())
    delta = next(deltas())
    whole = optimizer.step(state, delta, UpdateKind.DELTA).master - state.master
    half = optimizer.step(state, delta, UpdateKind.DELTA, learning_rate_scale=0.5).master - state.master
    np.testing.assert_allclose(half, whole / 2, rtol=1e-9, atol=1e-15)
    still = optimizer.step(state, delta, UpdateKind.DELTA, learning_rate_scale=0.0)
    assert (still.step, still.master.tobytes()) == (1, state.master.tobytes())


@ALL
def test_a_step_is_a_value_s_next_value(optimizer):
    state = optimizer.initial(start())
    before = state.to_bytes()
    nexts = [optimizer.step(state, next(deltas()), UpdateKind.DELTA) for _ in range(2)]
    assert nexts[0].to_bytes() == nexts[1].to_bytes()
    assert state.to_bytes() == before
    for tensor in nexts[0].tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 1.0


@ALL
def test_a_restored_state_goes_on_with_the_same_bits(optimizer):
    state = optimizer.initial(start())
    restored = state
    for delta in deltas():
        state = optimizer.step(state, delta, UpdateKind.DELTA)
        restored = optimizer.step(ServerState.from_bytes(restored.to_bytes()), delta, UpdateKind.DELTA)
    assert restored.to_bytes() == state.to_bytes()


def test_foreign_tensors_are_carried_over():
    optimizer = Adam()
    state = optimizer.initial(np.ones(2, np.float32))
    state = ServerState(4, {**state.tensors, "control": np.array([5.0, 6.0])})
    stepped = optimizer.step(state, np.ones(2), UpdateKind.DELTA)
    assert stepped.tensors["control"].tolist() == [5.0, 6.0]
    assert stepped.step == 5


def test_a_model_without_parameters_steps():
    optimizer = Adam()
    assert optimizer.step(optimizer.initial(np.zeros(0, np.float32)), np.zeros(0), UpdateKind.DELTA).size == 0


# --- bad input ------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_aggregate_that_is_not_finite_is_refused(optimizer, bad):
    aggregate = np.zeros(SIZE)
    aggregate[-1] = bad
    with pytest.raises(NonFiniteUpdate):
        optimizer.step(optimizer.initial(start()), aggregate, UpdateKind.DELTA)


@pytest.mark.parametrize("aggregate", [3.5e38, 1e300, 1.7e308])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_that_would_leave_float32_are_refused_and_the_state_lives_on(aggregate, momentum):
    optimizer = Sgd(momentum=momentum)
    state = optimizer.initial(np.ones(2, np.float32))
    with pytest.raises(InvalidUpdate, match="infinite"):
        optimizer.step(state, np.array([0.0, aggregate]), UpdateKind.DELTA)
    assert optimizer.step(state, np.ones(2), UpdateKind.DELTA).weights.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "aggregate", [np.zeros(2), np.zeros((3, 1)), np.zeros(3, np.float32)], ids=["size", "shape", "dtype"]
)
def test_an_aggregate_of_another_shape_is_refused(aggregate):
    optimizer = Sgd()
    with pytest.raises(ShapeMismatch, match=r"float64\[3\]"):
        optimizer.step(optimizer.initial(np.ones(3, np.float32)), aggregate, UpdateKind.DELTA)


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_a_factor_that_is_no_factor_is_refused(factor):
    optimizer = Sgd()
    with pytest.raises(ConfigurationError):
        optimizer.step(
            optimizer.initial(np.ones(1, np.float32)), np.ones(1), UpdateKind.DELTA, learning_rate_scale=factor
        )


def test_a_state_of_another_optimizer_is_refused():
    state = Sgd().initial(np.ones(3, np.float32))
    with pytest.raises(ConfigurationError, match="momentum and second_moment"):
        Adam().step(state, np.ones(3), UpdateKind.DELTA)


def test_weights_that_are_no_weights_are_refused():
    for weights in (np.ones(3), np.ones((3, 1), np.float32)):
        with pytest.raises(ShapeMismatch):
            Sgd().initial(weights)
    with pytest.raises(InvalidUpdate):
        Sgd().initial(np.array([1, np.nan], np.float32))


# --- settings -------------------------------------------------------------------------------------------------


def test_settings_name_an_optimizer_and_leave_it_its_defaults():
    assert server_optimizer(OptimizerConfig()) == Sgd()
    assert server_optimizer(OptimizerConfig(name="adagrad")) == Adagrad()
    assert server_optimizer(OptimizerConfig(name="yogi", beta2=0.9, rescale_every=0)) == Yogi(
        beta2=0.9, rescale_every=0
    )
    config = OptimizerConfig(name="adam", learning_rate=0.1, epsilon=1e-8, bias_correction=True)
    assert server_optimizer(config) == Adam(learning_rate=0.1, epsilon=1e-8, bias_correction=True)
    config = OptimizerConfig(name="sgd", momentum=0.9, nesterov=True)
    assert server_optimizer(config).title == ("sgd on float64 weights, learning rate 1, momentum 0.9, nesterov 1")


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "beta1": 0.9},
        {"name": "adagrad", "beta2": 0.9},
        {"name": "adam", "momentum": 0.9},
        {"name": "yogi", "bias_correction": True},
        {"name": "adamw"},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"momentum": 1.0},
        {"nesterov": True},
        {"name": "adam", "beta2": 1.0},
        {"name": "adam", "epsilon": 0.0},
        {"rescale_every": -1},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Sgd, {"momentum": 1.0}),
        (Sgd, {"nesterov": True}),
        (Sgd, {"learning_rate": math.nan}),
        (Adam, {"beta1": -0.1}),
        (Adam, {"beta2": 1.0}),
        (Yogi, {"beta2": math.nan}),
        (Adagrad, {"epsilon": 0.0}),
    ],
)
def test_optimizers_that_cannot_be_are_refused(make, settings):
    with pytest.raises(ConfigurationError):
        make(**settings)
