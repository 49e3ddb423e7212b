"""What local training is a function of, how far it is, and what it produces: values, with no program in sight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan, normaliser

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Controls:
    """SCAFFOLD's control variates, float32 ``[d]`` each: estimates of the mean gradient over all devices and here.

    Attributes:
        server: ``c``, as the server broadcast it.
        device: ``c_i``, this device's own; zeros before its first accepted report.
    """

    server: Float32Array
    device: Float32Array


@dataclass(frozen=True)
class TrainingResult:
    """What local training produced.

    With meta-learning both losses are the one that is reported: maml and fomaml have the mean loss of the query
    examples after adaptation, reptile that of all its steps, per-fedavg that of the query examples of all its steps.

    Attributes:
        weights: float32 ``[d]``, the local weights; with maml and fomaml those that training started from.
        delta: float32 ``[d]``, ``weights`` minus the weights that training started from.
        num_samples: Examples in the local data set (also where ``max_steps`` ended training before it saw all).
        steps: Optimizer steps taken.
        first_epoch_loss: Mean loss per example over the first epoch, each batch measured before its step.
        last_epoch_loss: The same over the last epoch, or over as much of it as ``max_steps`` let happen.
        control_delta: With scaffold float32 ``[d]``: what to add to the device's control variate, else None.
        gradient: With maml, fomaml and per-fedavg float32 ``[d]``, see ``client_sdk.protocol.meta_learning``; else
            None.
    """

    weights: Float32Array
    delta: Float32Array
    num_samples: int
    steps: int
    first_epoch_loss: float
    last_epoch_loss: float
    control_delta: Float32Array | None = None
    gradient: Float32Array | None = None

    def update(self, plan: TrainingPlan) -> Float32Array:
        """What a device sends of ``plan.update_kind``: float32 ``[d]``, or ``[2 d]`` with scaffold."""
        if self.gradient is not None:
            return self.gradient
        if self.control_delta is not None:
            return np.concatenate([self.delta, self.control_delta])
        divisor = normaliser(plan, self.steps)
        return self.delta if divisor == 1 else quotient(self.delta, divisor)


@dataclass(frozen=True)
class TrainingState:
    """How far a training is, between two program calls: with the arguments it began with, all that it depends on.

    There is no optimizer beyond the weights, and no generator to remember: each epoch's order is a function of the
    shuffle seed and the epoch (see ``epoch_order``).

    Meta-learning has one epoch of K steps, in which no position is counted: ``loss_sum`` and ``seen`` are over all of
    them. Once they are taken the accumulator and its two numbers are those of the query examples.

    Attributes:
        weights: float32 ``[d]``, after the last whole step.
        accumulator: float32 ``[d]``, the gradient sums of the step under way; None between two steps.
        accumulated_loss: Its examples' loss sum so far.
        slices_done: Its program calls so far.
        epoch: Epochs done.
        position: Batches of the present epoch done.
        steps: Steps taken, over all epochs.
        loss_sum: The loss of the present epoch's examples, each batch measured before its step.
        seen: How many examples that are.
        first_epoch_loss: As in ``TrainingResult``; NaN until that epoch is over.
        last_epoch_loss: Likewise.
    """

    weights: Float32Array
    accumulator: Float32Array | None = None
    accumulated_loss: float = 0.0
    slices_done: int = 0
    epoch: int = 0
    position: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    first_epoch_loss: float = math.nan
    last_epoch_loss: float = math.nan


@dataclass(frozen=True)
class TrainingJob:
    """What a training is a function of, checked already.

    Attributes:
        start: float32 ``[d]``, the global weights.
        x: float32 ``[n, *feature_shape]``.
        y: int64 ``[n]``.
        plan: Hyperparameters.
        shuffle_seed: In ``[0, 2**64)``.
        rate: The learning rate in float32.
        controls: With scaffold.
    """

    start: Float32Array
    x: Float32Array
    y: Int64Array
    plan: TrainingPlan
    shuffle_seed: int
    rate: np.float32
    controls: Controls | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return -(-len(self.x) // self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        every = self.plan.local_epochs * self.batches_per_epoch
        return every if self.plan.max_steps is None else min(every, self.plan.max_steps)

    def batch_length(self, position: int) -> int:
        """Examples in the batch at this position of an epoch."""
        return min(self.plan.batch_size, len(self.x) - position * self.plan.batch_size)

    def examples_after(self, steps: int) -> int:
        """Examples that so many steps have taken."""
        epochs, rest = divmod(steps, self.batches_per_epoch)
        return epochs * len(self.x) + rest * self.plan.batch_size  # rest < batches_per_epoch: these are full batches


def copied(state: TrainingState) -> TrainingState:
    """A state whose arrays are its own."""
    accumulator = None if state.accumulator is None else state.accumulator.copy()
    return replace(state, weights=state.weights.copy(), accumulator=accumulator)


def epoch_order(num_samples: int, plan: TrainingPlan, shuffle_seed: int, epoch: int) -> Int64Array:
    """The order in which an epoch sees the examples, int64[num_samples]: whoever trains alike shuffles alike."""
    if plan.shuffle:
        return np.random.Generator(np.random.Philox(key=shuffle_seed | epoch << 64)).permutation(num_samples)
    return np.arange(num_samples)


def quotient(values: Float32Array, divisor: float) -> Float32Array:
    """Each value over a float64 divisor, rounded to float32 at the end alone; no float64 array is made."""
    return np.divide(values, divisor, out=np.empty_like(values), dtype=np.float64, casting="same_kind")


def all_finite(values: Float32Array) -> bool:
    """Whether no element is NaN or infinite; the extremes tell, without a temporary of the array's size."""
    return math.isfinite(values.min()) and math.isfinite(values.max())
