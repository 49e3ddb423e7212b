"""Local training: the arithmetic of a device's epochs over a ``Program``. No I/O, no clock, no global randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged
from client_sdk.protocol.program import Float32Array, MethodSpec, Program, Role
from client_sdk.protocol.training import TrainingPlan

__all__ = ["LocalTrainer", "TrainingPlan", "TrainingResult"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingResult:
    """What local training produced.

    Attributes:
        weights: float32 ``[d]``, the local weights.
        delta: float32 ``[d]``, ``weights`` minus the weights that training started from.
        num_samples: Examples in the local data set (also where ``max_steps`` ended training before it saw all).
        steps: Optimizer steps taken.
        first_epoch_loss: Mean loss per example over the first epoch, each batch measured before its step.
        last_epoch_loss: The same over the last epoch, or over as much of it as ``max_steps`` let happen.
    """

    weights: Float32Array
    delta: Float32Array
    num_samples: int
    steps: int
    first_epoch_loss: float
    last_epoch_loss: float


class LocalTrainer:
    """Trains on a device's own data with plain SGD, with or without FedProx's proximal term.

    Guarantees: the result depends on the program, the weights, the data, the plan and the shuffle seed alone, to the
    bit; the caller's arrays are not changed. Batch buffers are kept between calls. An instance is used by one thread
    at a time.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._batches: dict[int, _Batch] = {}

    def train(
        self, weights: Float32Array, x: Float32Array, y: Int64Array, plan: TrainingPlan, shuffle_seed: int
    ) -> TrainingResult:
        """Run the plan's epochs.

        Each step is ``w - lr * (mean gradient + prox_mu * (w - w_global))`` [Li et al. 2020, FedProx]. A batch size
        that the program exports for ``train`` takes the fused method; one that is a multiple of an exported ``grad``
        size is made of slices, whose sums equal one big batch. The last batch of an epoch may be short: it is masked,
        and its mean is over the examples that it has.

        Args:
            weights: float32 ``[d]``, the global weights.
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``, labels in ``[0, num_classes)``.
            plan: Hyperparameters.
            shuffle_seed: In ``[0, 2**64)``; epoch e is shuffled by Philox with the key (seed, e), so its order does
                not depend on the epochs before it.

        Raises:
            ProgramInputError: No data, wrong shape or dtype, NaN or infinity, or a label out of range.
            UnknownMethod: The program cannot train with this batch size; the message lists what it can.
            ConfigurationError: A seed out of range, or a learning rate that float32 cannot hold.
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
        """
        self._check_data(weights, x, y)
        if not 0 <= shuffle_seed < 2**64:
            raise ConfigurationError(f"shuffle_seed must lie in [0, 2**64), got {shuffle_seed}")
        step = self._step_for(plan, x, y)
        num_samples = len(x)
        w = start = np.ascontiguousarray(weights)
        # Rounded once, from the exact product, so that the prox rate does not depend on the order of factors.
        prox_rate = np.float32(plan.learning_rate * plan.prox_mu)
        drift = np.empty_like(start) if prox_rate > 0 else None
        steps = 0
        first_epoch_loss = last_epoch_loss = math.nan
        # Overflow is not an accident to warn about: it ends in TrainingDiverged below.
        with np.errstate(over="ignore", invalid="ignore"):
            for epoch in range(plan.local_epochs):
                loss_sum, seen = 0.0, 0
                for picked in _batches(num_samples, plan, shuffle_seed, epoch):
                    before = w
                    w, batch_loss = step.run(before, picked)
                    if drift is not None and steps > 0:  # the drift is zero before the first step
                        np.subtract(before, start, out=drift)
                        drift *= prox_rate
                        w -= drift
                    steps += 1
                    if not (math.isfinite(batch_loss) and _all_finite(w)):
                        raise TrainingDiverged(
                            f"training diverged at step {steps} (epoch {epoch + 1} of {plan.local_epochs}, "
                            f"learning rate {plan.learning_rate}): the loss or the weights are not finite"
                        )
                    loss_sum += batch_loss
                    seen += len(picked)
                    if steps == plan.max_steps:
                        break
                last_epoch_loss = loss_sum / seen
                if epoch == 0:
                    first_epoch_loss = last_epoch_loss
                if steps == plan.max_steps:
                    break
            delta = w - start
        if not _all_finite(delta):
            raise TrainingDiverged(f"training diverged after step {steps}: the update is beyond float32's range")
        return TrainingResult(w, delta, num_samples, steps, first_epoch_loss, last_epoch_loss)

    def _step_for(self, plan: TrainingPlan, x: Float32Array, y: Int64Array) -> _FusedStep | _SlicedStep:
        with np.errstate(over="ignore", under="ignore"):
            rate = np.array([plan.learning_rate], np.float32)
        if not (np.isfinite(rate[0]) and rate[0] > 0):
            raise ConfigurationError(f"learning_rate {plan.learning_rate} is zero or infinite as a float32")
        method = self._program.manifest.training_method(plan.batch_size)
        kind = _FusedStep if method.role is Role.TRAIN else _SlicedStep
        return kind(self._program, method.name, self._batch(method), x, y, rate)

    def _batch(self, spec: MethodSpec) -> _Batch:
        """The buffers for a method; ``train`` and ``grad`` of one size share them."""
        batch = self._batches.get(spec.batch_size)
        if batch is None:
            *_, x, y, _mask = spec.inputs
            batch = self._batches[spec.batch_size] = _Batch(x.shape, y.shape)
        return batch

    def _check_data(self, weights: Float32Array, x: Float32Array, y: Int64Array) -> None:
        manifest = self._program.manifest
        if weights.dtype != np.float32 or weights.shape != (manifest.num_parameters,):
            raise ProgramInputError(
                f"weights must be float32[{manifest.num_parameters}], got {weights.dtype}{list(weights.shape)}"
            )
        if x.dtype != np.float32 or x.ndim == 0 or x.shape[1:] != manifest.feature_shape:
            raise ProgramInputError(
                f"features must be float32 of shape [n, {', '.join(map(str, manifest.feature_shape))}], "
                f"got {x.dtype}{list(x.shape)}"
            )
        if len(x) == 0:
            raise ProgramInputError("there is no training data")
        if y.dtype != np.int64 or y.shape != (len(x),):
            raise ProgramInputError(f"labels must be int64[{len(x)}], got {y.dtype}{list(y.shape)}")
        if not _all_finite(weights):
            raise ProgramInputError("the weights hold NaN or infinite values")
        if not _all_finite(x):
            raise ProgramInputError("the training data holds NaN or infinite values")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= manifest.num_classes:
            raise ProgramInputError(f"labels must lie in [0, {manifest.num_classes}), got {low} to {high}")


class _Batch:
    """Input buffers of one batch size, filled over and over."""

    def __init__(self, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
        self.size = x_shape[0]
        self.x = np.zeros(x_shape, np.float32)
        self.y = np.zeros(y_shape, np.int64)
        self.mask = np.zeros(self.size, np.float32)

    def fill(self, x: Float32Array, y: Int64Array, picked: Int64Array) -> None:
        """Gather examples. Unused rows are zeroed: what an earlier batch left must not reach even a masked sum."""
        used = len(picked)
        # mode="clip" writes straight into the buffer; the indices are in range by construction.
        np.take(x, picked, axis=0, out=self.x[:used], mode="clip")
        np.take(y, picked, axis=0, out=self.y[:used], mode="clip")
        self.mask[:used] = 1.0
        for buffer in (self.x, self.y, self.mask):
            buffer[used:] = 0


@dataclass(frozen=True)
class _FusedStep:
    """One call of ``train``: the step happens inside the program."""

    program: Program
    method: str
    batch: _Batch
    x: Float32Array
    y: Int64Array
    rate: Float32Array

    def run(self, w: Float32Array, picked: Int64Array) -> tuple[Float32Array, float]:
        """New weights (a fresh array) and the batch's loss sum."""
        b = self.batch
        b.fill(self.x, self.y, picked)
        new, loss_sum = self.program.run(self.method, w, self.rate, b.x, b.y, b.mask)
        return new.view(np.float32), float(loss_sum[0])


@dataclass(frozen=True)
class _SlicedStep:
    """One big batch from the sums of several ``grad`` calls, then the step here."""

    program: Program
    method: str
    batch: _Batch
    x: Float32Array
    y: Int64Array
    rate: Float32Array

    def run(self, w: Float32Array, picked: Int64Array) -> tuple[Float32Array, float]:
        """New weights (a fresh array) and the batch's loss sum."""
        b = self.batch
        total = np.zeros_like(w)
        loss = 0.0
        for at in range(0, len(picked), b.size):
            b.fill(self.x, self.y, picked[at : at + b.size])
            grad_sum, loss_sum, _ = self.program.run(self.method, w, b.x, b.y, b.mask)
            loss += float(loss_sum[0])
            total += grad_sum.view(np.float32)
        total /= np.float32(len(picked))
        total *= self.rate
        return np.subtract(w, total, out=total), loss


def _batches(num_samples: int, plan: TrainingPlan, seed: int, epoch: int) -> Iterator[Int64Array]:
    """Indices of each batch of one epoch; the last may be short."""
    if plan.shuffle:
        order = np.random.Generator(np.random.Philox(key=seed | epoch << 64)).permutation(num_samples)
    else:
        order = np.arange(num_samples)
    for at in range(0, num_samples, plan.batch_size):
        yield order[at : at + plan.batch_size]


def _all_finite(values: Float32Array) -> bool:
    """Whether no element is NaN or infinite; the extremes tell, without a temporary of the array's size."""
    return math.isfinite(values.min()) and math.isfinite(values.max())
