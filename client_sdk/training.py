"""Local training: the arithmetic of a device's epochs over a ``Program``. No I/O, no clock, no global randomness."""

from __future__ import annotations

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError
from client_sdk.protocol.program import Float32Array, MethodSpec, Program, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_inputs import BatchBuffer, check_examples, check_seed, check_weights, float32_rate
from client_sdk.training_run import TrainingRun
from client_sdk.training_state import (
    Controls,
    Int64Array,
    TrainingJob,
    TrainingResult,
    TrainingState,
    all_finite,
    epoch_order,
)

__all__ = [
    "Controls",
    "LocalTrainer",
    "TrainingPlan",
    "TrainingResult",
    "TrainingRun",
    "TrainingState",
    "epoch_order",
]


class LocalTrainer:
    """Trains on a device's own data with plain SGD, FedProx's proximal term or SCAFFOLD's correction.

    Guarantees: the result depends on the program, the weights, the data, the plan and the shuffle seed alone, to the
    bit; the caller's arrays are not changed. Batch buffers are kept between calls. An instance is used by one thread
    at a time.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._batches: dict[int, BatchBuffer] = {}

    def train(
        self,
        weights: Float32Array,
        x: Float32Array,
        y: Int64Array,
        plan: TrainingPlan,
        shuffle_seed: int,
        *,
        controls: Controls | None = None,
        slice_size: int | None = None,
    ) -> TrainingResult:
        """Run the plan's epochs, from beginning to end: see ``begin``.

        Raises:
            TrainingDiverged: Weights or loss stopped being finite; the message names the step.
            ProgramExecutionError: The runtime failed.
            ProgramInputError, UnknownMethod, ConfigurationError: See ``begin``.
        """
        run = self.begin(weights, x, y, plan, shuffle_seed, controls=controls, slice_size=slice_size)
        while not run.finished:
            run.advance()
        return run.result()

    def begin(
        self,
        weights: Float32Array,
        x: Float32Array,
        y: Int64Array,
        plan: TrainingPlan,
        shuffle_seed: int,
        *,
        controls: Controls | None = None,
        slice_size: int | None = None,
        state: TrainingState | None = None,
    ) -> TrainingRun:
        """Begin a training, or go on with one.

        Each step is ``w - lr * (mean gradient + prox_mu * (w - w_global))`` [Li et al. 2020, FedProx], or with
        scaffold ``w - lr * (mean gradient - c_i + c)`` [Karimireddy et al. 2020, option II]. A batch size
        that the program exports for ``train`` takes the fused method; one that is a multiple of an exported ``grad``
        size is made of slices, whose sums equal one big batch. The last batch of an epoch may be short: it is masked,
        and its mean is over the examples that it has.

        Args:
            weights: float32 ``[d]``, the global weights. With a state too: the update is the difference to them.
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``, labels in ``[0, num_classes)``.
            plan: Hyperparameters.
            shuffle_seed: In ``[0, 2**64)``; epoch e is shuffled by Philox with the key (seed, e), so its order does
                not depend on the epochs before it.
            controls: Needed by scaffold, and by nothing else.
            slice_size: Make each batch of ``grad`` calls of this size, the last one masked where it does not divide
                the batch; None for the largest method that fits. The bits depend on it, so that a training goes on
                with the size that it began with.
            state: A snapshot of a training with these very arguments; it goes on bit for bit.

        Returns:
            The training, before its first call or where the state left it. The arrays must not change meanwhile.

        Raises:
            ProgramInputError: No data, wrong shape or dtype, NaN or infinity, or a label out of range.
            UnknownMethod: The program cannot train with this batch or slice size; the message lists what it can.
            ConfigurationError: A seed out of range, a learning rate that float32 cannot hold, control variates
                that are missing or not asked for, or a state that this training does not come to.
        """
        manifest = self._program.manifest
        check_weights(manifest, weights)
        check_examples(manifest, x, y)
        check_seed(shuffle_seed)
        rate = float32_rate(plan.learning_rate)
        self._check_controls(plan, controls)
        method = (
            manifest.training_method(plan.batch_size) if slice_size is None else manifest.method(Role.GRAD, slice_size)
        )
        job = TrainingJob(np.ascontiguousarray(weights), x, y, plan, shuffle_seed, rate, controls)
        return TrainingRun(self._program, method, self._batch(method), job, state)

    def _batch(self, spec: MethodSpec) -> BatchBuffer:
        """The buffers for a method; ``train`` and ``grad`` of one size share them."""
        batch = self._batches.get(spec.batch_size)
        if batch is None:
            batch = self._batches[spec.batch_size] = BatchBuffer.of(spec)
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
            if not all_finite(vector):
                raise ProgramInputError(f"the {name}'s control holds NaN or infinite values")
