"""Local training: the arithmetic of a device's epochs over a ``Program``. No I/O, no clock, no global randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged
from client_sdk.protocol.program import Float32Array, MethodSpec, Program, Role
from client_sdk.protocol.training import TrainingPlan, normaliser

__all__ = ["Controls", "LocalTrainer", "TrainingPlan", "TrainingResult", "epoch_order"]

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

    Attributes:
        weights: float32 ``[d]``, the local weights.
        delta: float32 ``[d]``, ``weights`` minus the weights that training started from.
        num_samples: Examples in the local data set (also where ``max_steps`` ended training before it saw all).
        steps: Optimizer steps taken.
        first_epoch_loss: Mean loss per example over the first epoch, each batch measured before its step.
        last_epoch_loss: The same over the last epoch, or over as much of it as ``max_steps`` let happen.
        control_delta: With scaffold float32 ``[d]``: what to add to the device's control variate, else None.
    """

    weights: Float32Array
    delta: Float32Array
    num_samples: int
    steps: int
    first_epoch_loss: float
    last_epoch_loss: float
    control_delta: Float32Array | None = None

    def update(self, plan: TrainingPlan) -> Float32Array:
        """What a device sends: float32 ``[d]``, or ``[2 d]`` with scaffold; see ``TrainingPlan.algorithm``."""
        if self.control_delta is not None:
            return np.concatenate([self.delta, self.control_delta])
        divisor = normaliser(plan, self.steps)
        return self.delta if divisor == 1 else _quotient(self.delta, divisor)


class LocalTrainer:
    """Trains on a device's own data with plain SGD, FedProx's proximal term or SCAFFOLD's correction.

    Guarantees: the result depends on the program, the weights, the data, the plan and the shuffle seed alone, to the
    bit; the caller's arrays are not changed. Batch buffers are kept between calls. An instance is used by one thread
    at a time.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._batches: dict[int, _Batch] = {}

    def train(
        self,
        weights: Float32Array,
        x: Float32Array,
        y: Int64Array,
        plan: TrainingPlan,
        shuffle_seed: int,
        *,
        controls: Controls | None = None,
    ) -> TrainingResult:
        """Run the plan's epochs.

        Each step is ``w - lr * (mean gradient + prox_mu * (w - w_global))`` [Li et al. 2020, FedProx], or with
        scaffold ``w - lr * (mean gradient - c_i + c)`` [Karimireddy et al. 2020, option II]. A batch size
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
            controls: Needed by scaffold, and by nothing else.

        Raises:
            ProgramInputError: No data, wrong shape or dtype, NaN or infinity, or a label out of range.
            UnknownMethod: The program cannot train with this batch size; the message lists what it can.
            ConfigurationError: A seed out of range, a learning rate that float32 cannot hold, or control variates
                that are missing or not asked for.
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
        """
        self._check_data(weights, x, y)
        if not 0 <= shuffle_seed < 2**64:
            raise ConfigurationError(f"shuffle_seed must lie in [0, 2**64), got {shuffle_seed}")
        rate = _float32_rate(plan)
        self._check_controls(plan, controls)
        step = self._step_for(plan, x, y, rate)
        num_samples = len(x)
        w = start = np.ascontiguousarray(weights)
        steps = 0
        first_epoch_loss = last_epoch_loss = math.nan
        # Overflow is not an accident to warn about: it ends in TrainingDiverged below.
        with np.errstate(over="ignore", invalid="ignore"):
            pull = _pull(plan, start, controls, rate)
            for epoch in range(plan.local_epochs):
                loss_sum, seen = 0.0, 0
                for picked in _batches(num_samples, plan, shuffle_seed, epoch):
                    before = w
                    w, batch_loss = step.run(before, picked)
                    if pull is not None:
                        w -= pull(before)
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
            control_delta = None if controls is None else _control_delta(delta, controls, steps, rate)
        if not (_all_finite(delta) and (control_delta is None or _all_finite(control_delta))):
            raise TrainingDiverged(f"training diverged after step {steps}: the update is beyond float32's range")
        return TrainingResult(w, delta, num_samples, steps, first_epoch_loss, last_epoch_loss, control_delta)

    def _step_for(
        self, plan: TrainingPlan, x: Float32Array, y: Int64Array, rate: np.float32
    ) -> _FusedStep | _SlicedStep:
        method = self._program.manifest.training_method(plan.batch_size)
        kind = _FusedStep if method.role is Role.TRAIN else _SlicedStep
        return kind(self._program, method.name, self._batch(method), x, y, np.array([rate]))

    def _batch(self, spec: MethodSpec) -> _Batch:
        """The buffers for a method; ``train`` and ``grad`` of one size share them."""
        batch = self._batches.get(spec.batch_size)
        if batch is None:
            *_, x, y, _mask = spec.inputs
            batch = self._batches[spec.batch_size] = _Batch(x.shape, y.shape)
        return batch

    def _check_controls(self, plan: TrainingPlan, controls: Controls | None) -> None:
        if (plan.algorithm == "scaffold") != (controls is not None):
            missing = "needs" if controls is None else "takes no"
            raise ConfigurationError(f"{plan.algorithm} {missing} control variates; scaffold trains with a server's")
        if controls is None:
            return
        size = self._program.manifest.num_parameters
        for name, vector in (("server", controls.server), ("device", controls.device)):
            if vector.dtype != np.float32 or vector.shape != (size,):
                raise ProgramInputError(
                    f"the {name}'s control must be float32[{size}], got {vector.dtype}{list(vector.shape)}"
                )
            if not _all_finite(vector):
                raise ProgramInputError(f"the {name}'s control holds NaN or infinite values")

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


def epoch_order(num_samples: int, plan: TrainingPlan, shuffle_seed: int, epoch: int) -> Int64Array:
    """The order in which an epoch sees the examples, int64[num_samples]: whoever trains alike shuffles alike."""
    if plan.shuffle:
        return np.random.Generator(np.random.Philox(key=shuffle_seed | epoch << 64)).permutation(num_samples)
    return np.arange(num_samples)


def _batches(num_samples: int, plan: TrainingPlan, seed: int, epoch: int) -> Iterator[Int64Array]:
    """Indices of each batch of one epoch; the last may be short."""
    order = epoch_order(num_samples, plan, seed, epoch)
    for at in range(0, num_samples, plan.batch_size):
        yield order[at : at + plan.batch_size]


def _float32_rate(plan: TrainingPlan) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        rate = np.float32(plan.learning_rate)
    if not (np.isfinite(rate) and rate > 0):
        raise ConfigurationError(f"learning_rate {plan.learning_rate} is zero or infinite as a float32")
    return rate


def _pull(
    plan: TrainingPlan, start: Float32Array, controls: Controls | None, rate: np.float32
) -> Callable[[Float32Array], Float32Array] | None:
    """What to take off the weights after each step, given those before it; None where a step is plain SGD."""
    if controls is not None:
        correction = (controls.server - controls.device) * rate
        return lambda _before: correction
    # Rounded once, from the exact product, so that the prox rate does not depend on the order of factors.
    prox_rate = np.float32(plan.learning_rate * plan.prox_mu)
    if prox_rate == 0:
        return None
    drift = np.empty_like(start)

    def proximal(before: Float32Array) -> Float32Array:
        np.subtract(before, start, out=drift)
        return np.multiply(drift, prox_rate, out=drift)

    return proximal


def _control_delta(delta: Float32Array, controls: Controls, steps: int, rate: np.float32) -> Float32Array:
    """Option II, ``c_i+ = c_i - c + (x - y_i) / (K lr)``, as what it adds to ``c_i``.

    The server adds up these numbers and the device adds the same ones, so that its control variate is the sum of what
    it sent.
    """
    return _quotient(delta, -steps * float(rate)) - controls.server


def _quotient(values: Float32Array, divisor: float) -> Float32Array:
    """Each value over a float64 divisor, rounded to float32 at the end alone; no float64 array is made."""
    return np.divide(values, divisor, out=np.empty_like(values), dtype=np.float64, casting="same_kind")


def _all_finite(values: Float32Array) -> bool:
    """Whether no element is NaN or infinite; the extremes tell, without a temporary of the array's size."""
    return math.isfinite(values.min()) and math.isfinite(values.max())
