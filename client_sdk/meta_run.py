"""One meta-learning session under way: a state, and one program call that leads to the next. No I/O, no clock."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from client_sdk.descent import DescentSteps
from client_sdk.errors import IllegalTransition
from client_sdk.meta_calls import MetaJob, MetaSteps, QueryGradient
from client_sdk.protocol.errors import ConfigurationError, TrainingDiverged
from client_sdk.training_state import TrainingResult, TrainingState, all_finite, copied, quotient


class MetaRun:
    """A meta-learning session under way, with what ``TrainingRun`` has: one program call leads to the next state.

    First come K steps, where there are any of their own, then the calls that sum the gradient over query examples.

    Guarantees: as ``TrainingRun``. Where it is left, and how often, changes no bit of the result, and a call that
    raises has changed nothing.
    """

    def __init__(
        self,
        job: MetaJob,
        steps: DescentSteps | MetaSteps | None,
        query: QueryGradient | None,
        state: TrainingState | None,
    ) -> None:
        """Begin, or go on from a state; see ``MetaTrainer.begin``, which checks all else.

        Raises:
            ConfigurationError: The state is not one that this session comes to.
        """
        self._job = job
        self._steps = steps
        self._query = query
        self._total_steps = job.total_steps
        self._last_loss = math.nan
        if state is None:
            self._state = TrainingState(job.start)
        else:
            self._check(state)
            self._state = copied(state)

    @property
    def finished(self) -> bool:
        """Whether the plan is done."""
        calls = 0 if self._query is None else self._query.calls
        return self._state.steps == self._total_steps and self._state.slices_done == calls

    @property
    def steps(self) -> int:
        """Steps taken; all K from the first call on where a call takes all."""
        return self._state.steps

    @property
    def at_step_boundary(self) -> bool:
        """Whether neither a step nor a meta-gradient is half done."""
        return self._state.slices_done == 0 or self.finished

    @property
    def examples_done(self) -> int:
        """Examples that have gone through the program, each time that they did."""
        return self._examples(self._state.steps, self._state.slices_done)

    @property
    def total_examples(self) -> int:
        """Examples that the whole training takes."""
        return self._examples(self._total_steps, 0 if self._query is None else self._query.calls)

    @property
    def last_loss(self) -> float:
        """Mean loss of the examples of the last call: the query ones where it has any; NaN before the first."""
        return self._last_loss

    def advance(self) -> None:
        """Make one program call.

        Raises:
            TrainingDiverged: Weights, gradient or loss stopped being finite.
            ProgramExecutionError: The runtime failed.
            IllegalTransition: Training is finished.
        """
        if self.finished:
            raise IllegalTransition("training is finished; there is no call left to make")
        # Overflow is not an accident to warn about: it ends in TrainingDiverged.
        with np.errstate(over="ignore", invalid="ignore"):
            if self._steps is not None and self._state.steps < self._total_steps:
                done = self._steps.advance(self._state)
            elif self._query is not None:
                done = self._query.advance(replace(self._state, steps=self._total_steps))
            else:
                raise IllegalTransition("there is nothing to compute")
        self._state, self._last_loss = done.state, done.last_loss

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
            raise IllegalTransition(f"training has taken {self.steps} of {self._total_steps} steps")
        state = self._state
        weights = self._job.start if self._query is not None else state.weights
        gradient = None
        with np.errstate(over="ignore", invalid="ignore"):
            delta = weights - self._job.start
            if self._query is not None and state.accumulator is not None:
                gradient = state.accumulator / np.float32(self._query.count)
                loss = state.accumulated_loss / self._query.count
            else:
                loss = state.loss_sum / state.seen
            if self._job.plan.algorithm == "per-fedavg":
                gradient = quotient(delta, -float(self._job.meta_rate))
        update = delta if gradient is None else gradient
        if not (all_finite(update) and math.isfinite(loss)):
            raise TrainingDiverged(f"training diverged after step {state.steps}: the update is beyond float32's range")
        return TrainingResult(weights, delta, len(self._job.x), state.steps, loss, loss, gradient=gradient)

    def _examples(self, steps: int, slices_done: int) -> int:
        """Examples that have gone through the program after so many steps and slices of what follows."""
        done = 0
        if self._steps is not None:
            done += self._steps.examples(steps, slices_done if steps < self._total_steps else 0)
        if self._query is not None and steps == self._total_steps:
            done += self._query.examples(slices_done)
        return done

    def _check(self, state: TrainingState) -> None:
        """Refuse what this session does not come to: going on from it would train something else, or read amiss."""
        shape = self._job.start.shape
        vectors = [state.weights] if state.accumulator is None else [state.weights, state.accumulator]
        if any(vector.dtype != np.float32 or vector.shape != shape for vector in vectors):
            raise ConfigurationError(f"a training state of this program has float32{list(shape)} vectors")
        if not all_finite(state.weights):
            raise ConfigurationError("the training state's weights hold NaN or infinite values")
        if not self._comes_to(state):
            raise ConfigurationError("the training state does not belong to this plan, these data and this slice size")

    def _comes_to(self, state: TrainingState) -> bool:
        calls = 0 if self._query is None else self._query.calls
        whole = state.steps == self._total_steps
        if self._steps is None:  # the first call takes all steps
            seen, low, most = 0, 1 if whole else 0, calls if whole else 0
            reached = state.steps in {0, self._total_steps}
        else:
            reached = whole or (0 <= state.steps < self._total_steps and state.steps % self._steps.steps_per_call == 0)
            seen, low = self._steps.seen(state.steps), 0
            most = calls if whole or not reached else self._steps.slices(state.steps) - 1
        return (
            reached
            and (state.epoch, state.position, state.seen) == (0, 0, seen)
            and low <= state.slices_done <= most
            and (state.accumulator is None) == (state.slices_done == 0)
        )
