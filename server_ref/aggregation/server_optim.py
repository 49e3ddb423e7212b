"""The ``apply`` slot: server optimizers on float64 master weights.

The aggregate of a round is a pseudo-gradient: a delta points where the weights go, a gradient away from there. Its sign
is settled here, once, and everything below speaks of the *direction* D (the delta, or minus the gradient):

| name | momentum m | second moment v | step |
|---|---|---|---|
| sgd | ``mu m + D`` | - | ``lr m`` (nesterov: ``lr (D + mu m)``) |
| adagrad | ``b1 m + (1 - b1) D`` | ``v + D**2`` | ``lr m / (sqrt(v) + eps)`` |
| adam | as adagrad | ``b2 v + (1 - b2) D**2`` | as adagrad |
| yogi | as adagrad | ``v - (1 - b2) D**2 sign(v - D**2)`` | as adagrad |

The adaptive ones follow S. Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2: eps (there tau) is
added outside of the root, v starts at ``eps**2``, and there is no bias correction. With ``bias_correction`` Adam is
that of D. Kingma and J. Ba, "Adam", ICLR 2015: v starts at 0, m and v are divided by ``1 - b1**t`` and ``1 - b2**t``.

What is accumulated is kept near 1 by powers of two (``rescaling``), every ``rescale_every`` steps and whenever an
aggregate would leave the range in which squares are safe. This changes no bit of the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, InvalidUpdate, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Facts
from server_ref.aggregation.optimizer_config import SETTINGS, OptimizerConfig, OptimizerName
from server_ref.aggregation.server_state import (
    MASTER,
    MOMENTUM,
    SECOND_MOMENT,
    Float32Array,
    Float64Array,
    ServerState,
)
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Apply

__all__ = ["Adagrad", "Adam", "OptimizerConfig", "OptimizerName", "ServerOptimizer", "ServerState", "Sgd", "Yogi"]
__all__ += ["server_optimizer"]

_COLUMNS = 2**14
"""Columns at a time: what is temporary stays in the second cache level."""

_SAFE_EXPONENT = 400
"""Directions up to 2**400 on the state's scale can be squared and summed; beyond (or below 2**-400) it is rescaled."""

Columns = Mapping[str, Float64Array]
"""Some columns of a state's tensors."""


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """What the optimizers have in common; implements ``stages.Apply``, which documents the methods.

    Attributes:
        learning_rate: Positive and finite.
        rescale_every: Steps between rescalings of the accumulated tensors; 0: only as needed.
    """

    name: ClassVar[OptimizerName]

    learning_rate: float = 1.0
    rescale_every: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"a server's learning rate is positive and finite, got {self.learning_rate}")

    @property
    def slot(self) -> Slot:
        """``apply``."""
        return Slot.APPLY

    @property
    def title(self) -> str:
        """The optimizer and its parameters."""
        settings = {name: getattr(self, name) for name in sorted(SETTINGS[self.name])}
        shown = [f"{name} {value:g}" for name, value in settings.items() if value]
        return ", ".join([f"{self.name} on float64 weights", f"learning rate {self.learning_rate:g}", *shown])

    def derive(self, facts: Facts) -> Facts:
        """Changes nothing: it is the last stage."""
        return facts

    def initial(self, weights: Float32Array) -> ServerState:
        """State of version 0 for these weights.

        Args:
            weights: float32[d].

        Raises:
            ShapeMismatch: Not float32[d].
            InvalidUpdate: NaN or infinite weights.
        """
        if weights.dtype != np.float32 or weights.ndim != 1:
            raise ShapeMismatch(f"a model's weights are float32[d], not {weights.dtype}{list(weights.shape)}")
        if not np.isfinite(weights).all():
            raise InvalidUpdate("the model holds NaN or infinite weights")
        return ServerState(0, {MASTER: weights.astype(np.float64), **self._accumulated(weights.size)})

    def step(
        self, state: ServerState, aggregate: Float64Array, kind: UpdateKind, *, learning_rate_scale: float = 1.0
    ) -> ServerState:
        """State of the next version; tensors that are not this optimizer's are carried over as they are.

        Args:
            state: The present one; stays as it is.
            aggregate: float64[d].
            kind: A delta is added, a gradient subtracted.
            learning_rate_scale: Factor on the learning rate for this step, from 0.

        Raises:
            ShapeMismatch: Not an aggregate for these weights.
            NonFiniteUpdate: NaN or infinities in the aggregate.
            InvalidUpdate: The next weights would not be finite in float32.
            ConfigurationError: A state of another optimizer, or a factor that is negative or not finite.
        """
        rate = self.learning_rate * learning_rate_scale
        if not 0 <= rate < math.inf:
            raise ConfigurationError(f"a learning rate of {self.learning_rate} times {learning_rate_scale}")
        if aggregate.dtype != np.float64 or aggregate.shape != (state.size,):
            raise ShapeMismatch(
                f"the aggregate of a model of {state.size} parameters is float64[{state.size}], not "
                f"{aggregate.dtype}{list(aggregate.shape)}"
            )
        peak = max(float(aggregate.max(initial=0.0)), -float(aggregate.min(initial=0.0)))  # NaN passes through both
        if not math.isfinite(peak):
            raise NonFiniteUpdate("the aggregate holds NaN or infinite values")
        names = (MASTER, *self._accumulated(0))
        missing = [name for name in names if name not in state.tensors]
        if missing:
            raise ConfigurationError(f"the state is of another optimizer: {self.name} needs {' and '.join(missing)}")
        state = self._at_a_safe_scale(state, peak)
        # Powers of two: multiplying by them rounds nothing.
        to_scale = math.ldexp(1.0 if kind is UpdateKind.DELTA else -1.0, -state.exponent)
        new = {name: np.empty(state.size) for name in names}
        with np.errstate(over="ignore", invalid="ignore"):
            for columns in _blocks(state.size):
                old = {name: state.tensors[name][columns] for name in names}
                out = {name: new[name][columns] for name in names}
                move = self._advance(old, aggregate[columns] * to_scale, out, state)
                np.add(old[MASTER], rate * move, out=out[MASTER])
                if not all(np.isfinite(x.astype(np.float32) if k == MASTER else x).all() for k, x in out.items()):
                    raise InvalidUpdate("the update would make the model's weights infinite or NaN")
        return ServerState(state.step + 1, {**state.tensors, **new}, state.exponent)

    def _at_a_safe_scale(self, state: ServerState, peak: float) -> ServerState:
        exponent = math.frexp(peak)[1] - state.exponent if peak else 0
        due = self.rescale_every and state.step and state.step % self.rescale_every == 0
        return state.rescaled(incoming=peak)[0] if due or abs(exponent) > _SAFE_EXPONENT else state

    @abstractmethod
    def _accumulated(self, size: int) -> dict[str, Float64Array]:
        """What version 0 has accumulated, by name."""

    @abstractmethod
    def _advance(self, old: Columns, direction: Float64Array, out: Columns, state: ServerState) -> Float64Array:
        """Write what is accumulated after this step, and return the move of the master for a learning rate of 1.

        ``old``, ``direction`` and ``out`` are on the state's scale; the move is on that of the weights.
        """


@dataclass(frozen=True)
class Sgd(ServerOptimizer):
    """Stochastic gradient descent; without momentum and at learning rate 1 it is federated averaging.

    Attributes:
        momentum: mu, from 0 to below 1.
        nesterov: Look ahead along the momentum.
    """

    name: ClassVar[OptimizerName] = OptimizerName.SGD

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise ConfigurationError("nesterov looks ahead along the momentum: set one")

    def _accumulated(self, size: int) -> dict[str, Float64Array]:
        return {MOMENTUM: np.zeros(size)} if self.momentum else {}

    def _advance(self, old: Columns, direction: Float64Array, out: Columns, state: ServerState) -> Float64Array:
        if not self.momentum:
            return direction * math.ldexp(1.0, state.exponent)
        momentum = out[MOMENTUM]
        np.multiply(old[MOMENTUM], self.momentum, out=momentum)
        momentum += direction
        move = direction + self.momentum * momentum if self.nesterov else momentum
        return move * math.ldexp(1.0, state.exponent)


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    """Momentum divided by the root of a second moment.

    Attributes:
        beta1: Memory of the momentum, from 0 to below 1.
        epsilon: Added to the root.
    """

    beta1: float = 0.9
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("beta1", self.beta1)
        if not 1e-30 <= self.epsilon <= 1e30:
            raise ConfigurationError(f"epsilon must lie between 1e-30 and 1e30, got {self.epsilon}")

    def _accumulated(self, size: int) -> dict[str, Float64Array]:
        second = {SECOND_MOMENT: np.full(size, self.epsilon**2)}
        return {MOMENTUM: np.zeros(size), **second} if self.beta1 else second

    def _advance(self, old: Columns, direction: Float64Array, out: Columns, state: ServerState) -> Float64Array:
        momentum, second = direction, out[SECOND_MOMENT]
        if self.beta1:
            momentum = out[MOMENTUM]
            np.multiply(old[MOMENTUM], self.beta1, out=momentum)
            momentum += (1 - self.beta1) * direction
        self._second_moment(old[SECOND_MOMENT], direction * direction, second)
        first_share, second_share = self._shares(state.step + 1)
        root = np.sqrt(second / second_share)
        root += math.ldexp(self.epsilon, -state.exponent)
        return momentum / first_share / root

    def _shares(self, _step: int) -> tuple[float, float]:
        """What momentum and second moment are divided by: 1 where the start is not corrected for."""
        return 1.0, 1.0

    @abstractmethod
    def _second_moment(self, old: Float64Array, square: Float64Array, out: Float64Array) -> None:
        """Fold the square of the direction."""


@dataclass(frozen=True)
class Adagrad(_Adaptive):
    """The second moment is the sum of all squares."""

    name: ClassVar[OptimizerName] = OptimizerName.ADAGRAD

    beta1: float = 0.0

    def _second_moment(self, old: Float64Array, square: Float64Array, out: Float64Array) -> None:
        np.add(old, square, out=out)


@dataclass(frozen=True)
class Adam(_Adaptive):
    """The second moment is an exponential mean of the squares.

    Attributes:
        beta2: Its memory, from 0 to below 1.
        bias_correction: Start it at 0 and correct for that, as Kingma and Ba do.
    """

    name: ClassVar[OptimizerName] = OptimizerName.ADAM

    beta2: float = 0.99
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("beta2", self.beta2)

    def _accumulated(self, size: int) -> dict[str, Float64Array]:
        start = super()._accumulated(size)
        return {**start, SECOND_MOMENT: np.zeros(size)} if self.bias_correction else start

    def _shares(self, _step: int) -> tuple[float, float]:
        return (1 - self.beta1**_step, 1 - self.beta2**_step) if self.bias_correction else (1.0, 1.0)

    def _second_moment(self, old: Float64Array, square: Float64Array, out: Float64Array) -> None:
        np.multiply(old, self.beta2, out=out)
        out += (1 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(_Adaptive):
    """The second moment moves towards each square by a step that depends on the square only, not on its distance.

    Attributes:
        beta2: One minus the size of that step.
    """

    name: ClassVar[OptimizerName] = OptimizerName.YOGI

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("beta2", self.beta2)

    def _second_moment(self, old: Float64Array, square: Float64Array, out: Float64Array) -> None:
        np.subtract(old, (1 - self.beta2) * square * np.sign(old - square), out=out)


_CLASSES: Mapping[OptimizerName, type[ServerOptimizer]] = {cls.name: cls for cls in (Sgd, Adagrad, Adam, Yogi)}


def server_optimizer(config: OptimizerConfig, *, learning_rate: float = 1.0) -> ServerOptimizer:
    """The optimizer that settings name.

    Args:
        config: Its settings.
        learning_rate: Where they name none.

    Raises:
        ConfigurationError: Settings that do not go together.
    """
    rate = learning_rate if config.learning_rate is None else config.learning_rate
    settings = {"learning_rate": rate, "rescale_every": config.rescale_every, **config.settings()}
    return _CLASSES[config.name](**settings)  # type: ignore[arg-type]  # the settings are those of this class


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigurationError(f"{name} lies between 0 and below 1, got {value}")


def _blocks(size: int) -> Iterator[slice]:
    return (slice(i, min(i + _COLUMNS, size)) for i in range(0, size, _COLUMNS))


if TYPE_CHECKING:
    _applies: tuple[type[Apply], ...] = (Sgd, Adagrad, Adam, Yogi)
