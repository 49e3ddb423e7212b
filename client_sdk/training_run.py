"""One local training under way: a state, and one program call that leads to the next. No I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from client_sdk.errors import IllegalTransition
from client_sdk.protocol.errors import ConfigurationError, TrainingDiverged
from client_sdk.protocol.program import Float32Array, MethodSpec, Program, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_inputs import BatchBuffer
from client_sdk.training_state import (
    Controls,
    Int64Array,
    TrainingJob,
    TrainingResult,
    TrainingState,
    all_finite,
    copied,
    epoch_order,
    quotient,
)


class TrainingRun:
    """A training that goes on by one program call at a time, and can be left after any of them.

    Guarantees: where it is left, and how often, changes no bit of the result. A call that raises has changed nothing.
    Used by one thread at a time; runs of one trainer may take turns.
    """

    def __init__(
        self, program: Program, method: MethodSpec, batch: BatchBuffer, job: TrainingJob, state: TrainingState | None
    ) -> None:
        """Begin, or go on from a state.

        Args:
            program: What computes.
            method: Its method: a fused step, or sums over slices of a batch.
            batch: Buffers of the method's batch size.
            job: What to train; its arrays are not changed.
            state: A snapshot of a run of this very job with this method.

        Raises:
            ConfigurationError: The state is not one that this job comes to.
        """
        self._program = program
        self._method = method
        self._fused = method.role is Role.TRAIN
        self._batch = batch
        self._job = job
        self._rate = np.array([job.rate])
        with np.errstate(over="ignore", invalid="ignore"):
            self._pull = _pull(job.plan, job.start, job.controls, job.rate)
        self._order: tuple[int, Int64Array] | None = None
        self._last_loss = math.nan
        if state is None:
            self._state = TrainingState(job.start)
        else:
            self._check(state)
            self._state = copied(state)

    @property
    def finished(self) -> bool:
        """Whether the plan is done."""
        return self._state.steps == self._job.total_steps

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._state.steps

    @property
    def at_step_boundary(self) -> bool:
        """Whether no step is half done."""
        return self._state.slices_done == 0

    @property
    def examples_done(self) -> int:
        """Examples that have gone through the program, over all epochs."""
        within = 0 if self.at_step_boundary else self._state.slices_done * self._batch.size
        return self._job.examples_after(self._state.steps) + within

    @property
    def total_examples(self) -> int:
        """Examples that the whole training takes."""
        return self._job.examples_after(self._job.total_steps)

    @property
    def last_loss(self) -> float:
        """Mean loss of the examples of the last call; NaN before the first."""
        return self._last_loss

    def advance(self) -> None:
        """Make one program call: a whole fused step, or one slice of an accumulated one.

        Raises:
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
            IllegalTransition: Training is finished.
        """
        if self.finished:
            raise IllegalTransition("training is finished; there is no call left to make")
        # Overflow is not an accident to warn about: it ends in TrainingDiverged.
        with np.errstate(over="ignore", invalid="ignore"):
            self._state, self._last_loss = self._fused_step() if self._fused else self._slice()

    def snapshot(self) -> TrainingState:
        """How far it is; the arrays are copies."""
        return copied(self._state)

    def result(self) -> TrainingResult:
        """What training produced.

        Raises:
            IllegalTransition: It is not finished.
            TrainingDiverged: The update is beyond float32's range.
        """
        if not self.finished:
            raise IllegalTransition(f"training has taken {self.steps} of {self._job.total_steps} steps")
        state, job = self._state, self._job
        with np.errstate(over="ignore", invalid="ignore"):
            delta = state.weights - job.start
            control_delta = None
            if job.controls is not None:
                control_delta = _control_delta(delta, job.controls, state.steps, job.rate)
        if not (all_finite(delta) and (control_delta is None or all_finite(control_delta))):
            raise TrainingDiverged(f"training diverged after step {state.steps}: the update is beyond float32's range")
        return TrainingResult(
            state.weights,
            delta,
            len(job.x),
            state.steps,
            state.first_epoch_loss,
            state.last_epoch_loss,
            control_delta,
        )

    def _fused_step(self) -> tuple[TrainingState, float]:
        """One call of ``train``: the step happens inside the program."""
        state, b = self._state, self._batch
        picked = self._picked()
        b.fill(self._job.x, self._job.y, picked)
        new, loss_sum = self._program.run(self._method.name, state.weights, self._rate, b.x, b.y, b.mask)
        loss = float(loss_sum[0])
        return self._stepped(new.view(np.float32), loss, len(picked)), loss / len(picked)

    def _slice(self) -> tuple[TrainingState, float]:
        """One call of ``grad``; after the last slice of a batch, the step."""
        state, b = self._state, self._batch
        picked = self._picked()
        at = state.slices_done * b.size
        part = picked[at : at + b.size]
        b.fill(self._job.x, self._job.y, part)
        grad_sum, loss_sum, _ = self._program.run(self._method.name, state.weights, b.x, b.y, b.mask)
        # Into the fresh array: the state's own must outlive a call that fails.
        total = grad_sum.view(np.float32)
        total += np.float32(0) if state.accumulator is None else state.accumulator
        loss = state.accumulated_loss + float(loss_sum[0])
        mean = float(loss_sum[0]) / len(part)
        if at + b.size < len(picked):
            return replace(state, accumulator=total, accumulated_loss=loss, slices_done=state.slices_done + 1), mean
        total /= np.float32(len(picked))
        total *= self._rate
        return self._stepped(np.subtract(state.weights, total, out=total), loss, len(picked)), mean

    def _stepped(self, new: Float32Array, batch_loss: float, examples: int) -> TrainingState:
        """The state after a step to ``new``, an array of our own."""
        state, job = self._state, self._job
        if self._pull is not None:
            new -= self._pull(state.weights)
        steps = state.steps + 1
        if not (math.isfinite(batch_loss) and all_finite(new)):
            raise TrainingDiverged(
                f"training diverged at step {steps} (epoch {state.epoch + 1} of {job.plan.local_epochs}, "
                f"learning rate {job.plan.learning_rate}): the loss or the weights are not finite"
            )
        loss_sum, seen = state.loss_sum + batch_loss, state.seen + examples
        after = TrainingState(
            new,
            epoch=state.epoch,
            position=state.position + 1,
            steps=steps,
            loss_sum=loss_sum,
            seen=seen,
            first_epoch_loss=state.first_epoch_loss,
            last_epoch_loss=state.last_epoch_loss,
        )
        epoch_over = after.position == job.batches_per_epoch
        if not epoch_over and steps < job.total_steps:
            return after
        mean = loss_sum / seen
        after = replace(
            after, last_epoch_loss=mean, first_epoch_loss=mean if state.epoch == 0 else state.first_epoch_loss
        )
        return replace(after, epoch=state.epoch + 1, position=0, loss_sum=0.0, seen=0) if epoch_over else after

    def _picked(self) -> Int64Array:
        """Indices of the present batch; the last of an epoch may be short."""
        job, state = self._job, self._state
        if self._order is None or self._order[0] != state.epoch:
            self._order = (state.epoch, epoch_order(len(job.x), job.plan, job.shuffle_seed, state.epoch))
        at = state.position * job.plan.batch_size
        return self._order[1][at : at + job.plan.batch_size]

    def _check(self, state: TrainingState) -> None:
        """Refuse what this job does not come to: going on from it would train something else, or read amiss."""
        job = self._job
        shape = job.start.shape
        vectors = [state.weights] if state.accumulator is None else [state.weights, state.accumulator]
        if any(vector.dtype != np.float32 or vector.shape != shape for vector in vectors):
            raise ConfigurationError(f"a training state of this program has float32{list(shape)} vectors")
        if not all_finite(state.weights):
            raise ConfigurationError("the training state's weights hold NaN or infinite values")
        slices = 0 if self._fused or state.steps == job.total_steps else job.batch_length(state.position) - 1
        epoch, position = divmod(state.steps, job.batches_per_epoch)
        if (
            not 0 <= state.steps <= job.total_steps
            or (state.epoch, state.position) != (epoch, position)
            or state.seen != position * job.plan.batch_size
            or not 0 <= state.slices_done <= slices // self._batch.size
            or (state.accumulator is None) != (state.slices_done == 0)
        ):
            raise ConfigurationError("the training state does not belong to this plan, these data and this slice size")


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
    return quotient(delta, -steps * float(rate)) - controls.server
