"""What a meta-learning session is a function of, and the program calls that it is made of beside steps of descent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from client_sdk.descent import Advance, diverged, with_gradient
from client_sdk.meta_methods import meta_of
from client_sdk.protocol.meta_learning import MetaBatches
from client_sdk.protocol.program import Float32Array, MethodSpec, Program, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_inputs import BatchBuffer, InnerBuffer, float32_rate
from client_sdk.training_state import Int64Array, TrainingState, all_finite


@dataclass(frozen=True)
class MetaJob:
    """A session's arguments, checked already.

    Attributes:
        start: float32 ``[d]``, the global weights.
        x: float32 ``[n, *feature_shape]``.
        y: int64 ``[n]``.
        plan: Hyperparameters.
        batches: Rows of the examples.
    """

    start: Float32Array
    x: Float32Array
    y: Int64Array
    plan: TrainingPlan
    batches: MetaBatches

    @property
    def total_steps(self) -> int:
        """K."""
        return meta_of(self.plan).inner_steps

    @property
    def rate(self) -> np.float32:
        """Of adaptation."""
        return float32_rate(self.plan.learning_rate)

    @property
    def meta_rate(self) -> np.float32:
        """Of Per-FedAvg's local meta steps."""
        return float32_rate(meta_of(self.plan).meta_learning_rate, "meta_learning_rate")


class MetaSteps:
    """Per-FedAvg's local meta steps, one a call."""

    steps_per_call = 1

    def __init__(self, program: Program, method: MethodSpec, job: MetaJob) -> None:
        self._program = program
        self._method = method
        self._job = job
        self._rates = np.array([job.rate]), np.array([job.meta_rate])
        self._buffers = [BatchBuffer.of(method, prefix) for prefix in ("inner_", "", "hessian_")]

    def slices(self, _step: int) -> int:
        """Calls that make this step."""
        return 1

    def seen(self, steps: int) -> int:
        """Query examples of the first steps, whose losses are summed."""
        return sum(len(rows) for rows in self._job.batches.query[:steps])

    def examples(self, steps: int, _slices_done: int) -> int:
        """Examples of all three batches of the first steps."""
        drawn = self._job.batches
        return sum(len(rows) for stream in (drawn.support, drawn.query, drawn.hessian) for rows in stream[:steps])

    def advance(self, state: TrainingState) -> Advance:
        """Take one step; see ``MetaRun.advance``."""
        job, k = self._job, state.steps
        picked = job.batches.support[k], job.batches.query[k], job.batches.hessian[k]
        for buffer, rows in zip(self._buffers, picked, strict=True):
            buffer.fill(job.x, job.y, rows)
        arrays = (array for b in self._buffers for array in (b.x, b.y, b.mask))
        new, loss_sum, _ = self._program.run(self._method.name, state.weights, *self._rates, *arrays)
        weights, loss, count = new.view(np.float32), float(loss_sum[0]), len(picked[1])
        if not (math.isfinite(loss) and all_finite(weights)):
            raise diverged(k + 1, job.rate)
        after = TrainingState(weights, steps=k + 1, loss_sum=state.loss_sum + loss, seen=state.seen + count)
        return Advance(after, (loss / count,), loss / count)


class QueryGradient:
    """The gradient over query examples, summed call by call: at weights that are adapted, or that each call adapts."""

    def __init__(self, program: Program, method: MethodSpec, job: MetaJob) -> None:
        """Prepare.

        Args:
            program: What computes.
            method: ``grad``, or ``maml`` or ``fomaml``, which take the steps of adaptation as well.
            job: The session.
        """
        self._program = program
        self._method = method
        self._job = job
        size = method.batch_size
        self._batches = [rows[at : at + size] for rows in job.batches.query for at in range(0, len(rows), size)]
        self._buffer = BatchBuffer.of(method)
        self._inner: InnerBuffer | None = None
        self._inner_examples = 0
        if method.role is not Role.GRAD:
            self._inner = InnerBuffer(method)
            self._inner.fill(job.x, job.y, job.batches.support)  # once: they are the same in every call
            self._inner_examples = sum(len(rows) for rows in job.batches.support)

    @property
    def calls(self) -> int:
        """Calls of the whole meta-gradient."""
        return len(self._batches)

    @property
    def count(self) -> int:
        """Query examples of the whole meta-gradient."""
        return sum(len(rows) for rows in self._batches)

    def examples(self, calls: int) -> int:
        """Examples of the first calls; each adapts anew, where it does."""
        return calls * self._inner_examples + sum(len(rows) for rows in self._batches[:calls])

    def advance(self, state: TrainingState) -> Advance:
        """Make one call; see ``MetaRun.advance``."""
        job, b, rows = self._job, self._buffer, self._batches[state.slices_done]
        b.fill(job.x, job.y, rows)
        inner = self._inner
        adapts = () if inner is None else (np.array([job.rate]), inner.x, inner.y, inner.mask)
        grad_sum, loss_sum, _ = self._program.run(self._method.name, state.weights, *adapts, b.x, b.y, b.mask)
        loss = float(loss_sum[0])
        total = grad_sum.view(np.float32)
        after = with_gradient(state, total, loss)
        if not (math.isfinite(loss) and all_finite(total)):
            raise diverged(job.total_steps, job.rate)
        return Advance(after, (), loss / len(rows))
