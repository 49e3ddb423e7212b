"""Some steps of gradient descent over a ``Program``: how a model is adapted to a device. No I/O, no clock.

Step k is ``w - lr * mean gradient`` on batch k. Which methods of a program take the steps changes the rounding, and
nothing else: several of them in one call (``adapt``, ``reptile``), one a call (``train``), or one as the sum over
slices of its batch (``grad``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged
from client_sdk.protocol.program import WITH_INNER_STEPS, Float32Array, Manifest, MethodSpec, Program, Role
from client_sdk.training_inputs import BatchBuffer, InnerBuffer, check_examples, check_weights, float32_rate
from client_sdk.training_state import Int64Array, TrainingState, all_finite

Float64Array = npt.NDArray[np.float64]


def descent_method(manifest: Manifest, batch_size: int, steps: int, *, frozen: bool = False) -> MethodSpec:
    """The method that takes these steps in the fewest calls.

    Args:
        manifest: Of the program.
        batch_size: Most examples of a step.
        steps: K.
        frozen: Whether some parameters stay as they are.

    Returns:
        Of those that take several steps in one call that with the fewest that are enough, else that with the most;
        where there is none, what ``Manifest.training_method`` finds.

    Raises:
        UnknownMethod: The program cannot train in batches of this size.
    """
    roles = (Role.ADAPT,) if frozen else (Role.ADAPT, Role.REPTILE)
    several = [m for m in manifest.methods if m.role in roles and m.batch_size == batch_size and m.inner_steps]
    if not several:
        return manifest.training_method(batch_size)
    reach = {m.name: m.inner_steps or 0 for m in several}
    return min(several, key=lambda m: (reach[m.name] < steps, abs(reach[m.name] - steps)))


@dataclass(frozen=True)
class Advance:
    """What one call of a program did.

    Attributes:
        state: How far the training is now.
        losses: Mean loss of each step that the call ended, at the weights before the step.
        last_loss: Mean loss of the call's examples.
    """

    state: TrainingState
    losses: tuple[float, ...]
    last_loss: float


class DescentSteps:
    """K steps as a sequence of program calls, each of which leads from a ``TrainingState`` to the next.

    Of the state it uses the weights, the slices of the step under way, ``steps``, and ``loss_sum`` and ``seen`` over
    all steps.
    """

    def __init__(
        self,
        program: Program,
        method: MethodSpec,
        buffer: BatchBuffer | InnerBuffer,
        *,
        x: Float32Array,
        y: Int64Array,
        batches: Sequence[Int64Array],
        rate: np.float32,
        frozen: Sequence[bool] = (),
    ) -> None:
        """Prepare; the arguments are checked already.

        Args:
            program: What computes.
            method: From ``descent_method``, or smaller ``grad`` slices.
            buffer: The method's.
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``.
            batches: Rows of each step, int64.
            rate: The learning rate.
            frozen: Of each parameter in table order whether it stays as it is; empty for none.
        """
        self._program = program
        self._method = method
        self._buffer = buffer
        self._x, self._y = x, y
        self._batches = batches
        self._rate = rate
        self._rates = np.array([rate])
        self._frozen: npt.NDArray[np.bool_] | None = None
        if any(frozen):
            table = program.manifest.parameters
            if method.role is Role.ADAPT:
                self._rates = np.where(np.array(frozen), np.float32(0), rate).astype(np.float32)
            else:
                self._frozen = np.repeat(np.array(frozen), [p.num_elements for p in table])
        elif method.role is Role.ADAPT:
            self._rates = np.full(len(program.manifest.parameters), rate)

    @property
    def steps_per_call(self) -> int:
        """Steps that a call takes at most; 1 also where it takes only a slice of one."""
        return self._buffer.steps if isinstance(self._buffer, InnerBuffer) else 1

    def slices(self, step: int) -> int:
        """Calls that make this step, where a call makes no more than one."""
        return -(-len(self._batches[step]) // self._method.batch_size)

    def seen(self, steps: int) -> int:
        """Examples of the first steps."""
        return sum(len(rows) for rows in self._batches[:steps])

    def examples(self, steps: int, slices_done: int) -> int:
        """Examples of the first steps and of so many slices of the next."""
        within = 0 if slices_done == 0 else min(slices_done * self._method.batch_size, len(self._batches[steps]))
        return self.seen(steps) + within

    def advance(self, state: TrainingState) -> Advance:
        """Make one program call.

        Raises:
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
        """
        # Overflow is not an accident to warn about: it ends in TrainingDiverged.
        with np.errstate(over="ignore", invalid="ignore"):
            if isinstance(self._buffer, InnerBuffer):
                return self._several(state, self._buffer)
            if self._method.role is Role.TRAIN:
                return self._one(state, self._buffer)
            return self._slice(state, self._buffer)

    def _several(self, state: TrainingState, buffer: InnerBuffer) -> Advance:
        batches = self._batches[state.steps : state.steps + buffer.steps]
        buffer.fill(self._x, self._y, batches)
        inputs = state.weights, self._rates, buffer.x, buffer.y, buffer.mask
        found, loss_sums = self._program.run(self._method.name, *inputs)
        new = found.view(np.float32)
        if self._method.role is Role.REPTILE:
            new += state.weights
        return self._stepped(state, new, loss_sums[: len(batches)].astype(np.float64).tolist())

    def _one(self, state: TrainingState, buffer: BatchBuffer) -> Advance:
        buffer.fill(self._x, self._y, self._batches[state.steps])
        inputs = state.weights, self._rates, buffer.x, buffer.y, buffer.mask
        new, loss_sum = self._program.run(self._method.name, *inputs)
        return self._stepped(state, new.view(np.float32), [float(loss_sum[0])])

    def _slice(self, state: TrainingState, buffer: BatchBuffer) -> Advance:
        picked = self._batches[state.steps]
        summed, total, mean = summed_slice(
            self._program, self._method, buffer, state, x=self._x, y=self._y, picked=picked
        )
        if summed.slices_done * buffer.size < len(picked):
            return Advance(summed, (), mean)
        total /= np.float32(len(picked))
        total *= self._rate
        new = np.subtract(state.weights, total, out=total)
        return replace(self._stepped(state, new, [summed.accumulated_loss]), last_loss=mean)

    def _stepped(self, state: TrainingState, new: Float32Array, loss_sums: list[float]) -> Advance:
        """The state after steps to ``new``, an array of our own."""
        if self._frozen is not None:
            np.copyto(new, state.weights, where=self._frozen)
        sizes = [len(batch) for batch in self._batches[state.steps : state.steps + len(loss_sums)]]
        bad = next((i for i, loss in enumerate(loss_sums) if not math.isfinite(loss)), len(loss_sums) - 1)
        if not (math.isfinite(sum(loss_sums)) and all_finite(new)):
            raise diverged(state.steps + bad + 1, self._rate)
        after = TrainingState(
            new,
            steps=state.steps + len(loss_sums),
            loss_sum=state.loss_sum + sum(loss_sums),
            seen=state.seen + sum(sizes),
        )
        losses = tuple(loss / size for loss, size in zip(loss_sums, sizes, strict=True))
        return Advance(after, losses, sum(loss_sums) / sum(sizes))


def summed_slice(
    program: Program,
    method: MethodSpec,
    buffer: BatchBuffer,
    state: TrainingState,
    *,
    x: Float32Array,
    y: Int64Array,
    picked: Int64Array,
) -> tuple[TrainingState, Float32Array, float]:
    """Add the next slice of a batch to the gradient sums of a state, by one call of ``grad``.

    Args:
        program: What computes.
        method: A ``grad`` method.
        buffer: Its.
        state: Its accumulator is left as it is: it must outlive a call that fails.
        x: float32 ``[n, *feature_shape]``.
        y: int64 ``[n]``.
        picked: Rows of the batch, of which ``state.slices_done`` slices are summed.

    Returns:
        The state with the slice, its new accumulator, and the slice's mean loss.
    """
    at = state.slices_done * buffer.size
    part = picked[at : at + buffer.size]
    buffer.fill(x, y, part)
    grad_sum, loss_sum, _ = program.run(method.name, state.weights, buffer.x, buffer.y, buffer.mask)
    total = grad_sum.view(np.float32)
    return with_gradient(state, total, float(loss_sum[0])), total, float(loss_sum[0]) / len(part)


def with_gradient(state: TrainingState, grad_sum: Float32Array, loss_sum: float) -> TrainingState:
    """The state with these sums added, by ``grad_sum``'s own array."""
    grad_sum += np.float32(0) if state.accumulator is None else state.accumulator
    return replace(
        state,
        accumulator=grad_sum,
        accumulated_loss=state.accumulated_loss + loss_sum,
        slices_done=state.slices_done + 1,
    )


def diverged(step: int, rate: np.float32) -> TrainingDiverged:
    """What is raised where a step leads to infinity."""
    return TrainingDiverged(
        f"training diverged at step {step} (learning rate {rate}): the loss or the weights are not finite"
    )


class Descent:
    """Adapts weights to examples.

    Guarantees: the result depends on the program and the arguments alone, to the bit; the caller's arrays are not
    changed. Input buffers are kept between calls: those of one batch, or of the batches of one call of the program. An
    instance is used by one thread at a time.
    """

    def __init__(self, program: Program, batch_size: int) -> None:
        """Prepare.

        Args:
            program: Has ``adapt`` or ``reptile`` for this batch size, or can train with it.
            batch_size: B, the most examples of a step.
        """
        self._program = program
        self._batch_size = batch_size
        self._buffers: dict[str, BatchBuffer | InnerBuffer] = {}

    def run(
        self,
        weights: Float32Array,
        x: Float32Array,
        y: Int64Array,
        batches: Sequence[Int64Array],
        learning_rate: float,
        *,
        frozen: Collection[str] = (),
        on_call: Callable[[], None] = lambda: None,
    ) -> tuple[Float32Array, Float64Array]:
        """Take one step on each of the batches.

        Args:
            weights: float32 ``[d]``.
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``, labels in ``[0, num_classes)``.
            batches: K of them: rows of the examples, int64 ``[1..B]`` each. None leave the weights as they are, and
                then there need not be examples.
            learning_rate: Of every step.
            frozen: Names of parameters that stay as they are, to the bit.
            on_call: Called before each call of the program, and once at the end; what it raises ends the descent.

        Returns:
            The adapted weights, float32 ``[d]``, an array of their own; and each step's mean loss at the weights before
            it, float64 ``[K]``.

        Raises:
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
            ProgramInputError: Wrong shape or dtype, NaN or infinity, a label or a row out of range.
            UnknownMethod: The program cannot train in batches of this size.
            ConfigurationError: A learning rate that float32 cannot hold, or an unknown name.
        """
        manifest = self._program.manifest
        check_weights(manifest, weights)
        rate = float32_rate(learning_rate)
        stay = _frozen(manifest, frozen)
        losses: list[float] = []
        state = TrainingState(np.ascontiguousarray(weights))
        if len(batches):
            check_examples(manifest, x, y)
            _check_batches(batches, self._batch_size, len(x))
            steps = self.steps(x, y, batches, rate, stay)
            while state.steps < len(batches):
                on_call()
                advance = steps.advance(state)
                state = advance.state
                losses += advance.losses
        on_call()
        adapted = state.weights if len(batches) else weights.copy()
        return adapted, np.array(losses, np.float64)

    def steps(
        self,
        x: Float32Array,
        y: Int64Array,
        batches: Sequence[Int64Array],
        rate: np.float32,
        frozen: Sequence[bool] = (),
        *,
        slice_size: int | None = None,
    ) -> DescentSteps:
        """The steps as calls that somebody else makes; the arguments are checked already.

        Args:
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``.
            batches: Rows of each step.
            rate: The learning rate.
            frozen: As in ``DescentSteps``.
            slice_size: Make each step of ``grad`` calls of this size; None for ``descent_method``.

        Raises:
            UnknownMethod: The program cannot train in such batches or slices.
        """
        manifest = self._program.manifest
        if slice_size is None:
            method = descent_method(manifest, self._batch_size, len(batches), frozen=any(frozen))
        else:
            method = manifest.method(Role.GRAD, slice_size)
        return DescentSteps(
            self._program, method, self.buffer(method), x=x, y=y, batches=batches, rate=rate, frozen=frozen
        )

    def buffer(self, method: MethodSpec) -> BatchBuffer | InnerBuffer:
        """A method's input buffers, made once."""
        found = self._buffers.get(method.name)
        if found is None:
            found = InnerBuffer(method) if method.role in WITH_INNER_STEPS else BatchBuffer.of(method)
            self._buffers[method.name] = found
        return found


def _frozen(manifest: Manifest, names: Collection[str]) -> list[bool]:
    table = [p.name for p in manifest.parameters]
    unknown = sorted(set(names) - set(table))
    if unknown:
        raise ConfigurationError(f"the model has no parameters {unknown} to freeze; it has {table}")
    return [name in names for name in table]


def _check_batches(batches: Sequence[Int64Array], batch_size: int, num_samples: int) -> None:
    for step, rows in enumerate(batches, 1):
        if rows.dtype != np.int64 or rows.ndim != 1 or not 1 <= len(rows) <= batch_size:
            raise ProgramInputError(
                f"the batch of step {step} must be int64[1..{batch_size}], got {rows.dtype}{list(rows.shape)}"
            )
        if rows.min() < 0 or rows.max() >= num_samples:
            raise ProgramInputError(f"the batch of step {step} has rows beyond the {num_samples} examples")
