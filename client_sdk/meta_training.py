"""Meta-learning on a device: its meta-gradient, or its steps. No I/O, no clock, no global randomness.

What each algorithm sends is in ``client_sdk.protocol.meta_learning``, and which methods of a program it takes in
``client_sdk.meta_methods``.
"""

from __future__ import annotations

import numpy as np

from client_sdk.descent import Descent, DescentSteps
from client_sdk.meta_calls import MetaJob, MetaSteps, QueryGradient
from client_sdk.meta_methods import meta_methods, meta_of
from client_sdk.meta_run import MetaRun
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches
from client_sdk.protocol.program import Float32Array, Program, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training_inputs import check_examples, check_seed, check_weights, float32_rate
from client_sdk.training_state import Int64Array, TrainingResult, TrainingState


class MetaTrainer:
    """Does on a device's own data what maml, fomaml, reptile and per-fedavg ask for.

    Guarantees: as ``LocalTrainer``. The result depends on the program, the weights, the data, the plan and the shuffle
    seed alone, to the bit; the caller's arrays are not changed.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def train(
        self, weights: Float32Array, x: Float32Array, y: Int64Array, plan: TrainingPlan, shuffle_seed: int
    ) -> TrainingResult:
        """Train from beginning to end: see ``begin``.

        Raises:
            TrainingDiverged: Weights, gradient or loss stopped being finite.
            ProgramExecutionError: The runtime failed.
            NotEnoughExamples, ProgramInputError, UnknownMethod, ConfigurationError: See ``begin``.
        """
        run = self.begin(weights, x, y, plan, shuffle_seed)
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
        slice_size: int | None = None,
        state: TrainingState | None = None,
    ) -> MetaRun:
        """Begin a training, or go on with one.

        Which examples adapt and which judge is a matter of the examples (``ExampleSplit``); the batches of the session
        are drawn by the shuffle seed (``MetaBatches``).

        Args:
            weights: float32 ``[d]``, the global weights.
            x: float32 ``[n, *feature_shape]``.
            y: int64 ``[n]``, labels in ``[0, num_classes)``.
            plan: Hyperparameters, with ``meta``.
            shuffle_seed: In ``[0, 2**64)``.
            slice_size: As in ``meta_methods``. The bits depend on it.
            state: A snapshot of a training with these very arguments; it goes on bit for bit.

        Returns:
            The training, before its first call or where the state left it. The arrays must not change meanwhile.

        Raises:
            NotEnoughExamples: Fewer than two different ones; reptile needs one.
            ProgramInputError: No data, wrong shape or dtype, NaN or infinity, or a label out of range.
            UnknownMethod: The program was not exported for this plan; the message says how to.
            ConfigurationError: A plan without ``meta``, a seed out of range, a rate that float32 cannot hold, or a
                state that this training does not come to.
        """
        manifest = self._program.manifest
        check_weights(manifest, weights)
        check_examples(manifest, x, y)
        check_seed(shuffle_seed)
        methods = meta_methods(manifest, plan, slice_size)
        batches = _batches(x, y, plan, shuffle_seed)
        job = MetaJob(np.ascontiguousarray(weights), x, y, plan, batches)
        rate = float32_rate(plan.learning_rate)
        steps: DescentSteps | MetaSteps | None = None
        if methods.steps is not None and methods.steps.role is Role.PER_FEDAVG:
            steps = MetaSteps(self._program, methods.steps, job)
        elif methods.steps is not None:
            steps = Descent(self._program, plan.batch_size).steps(x, y, batches.support, rate, slice_size=slice_size)
        query = None if methods.query is None else QueryGradient(self._program, methods.query, job)
        return MetaRun(job, steps, query, state)


def _batches(x: Float32Array, y: Int64Array, plan: TrainingPlan, seed: int) -> MetaBatches:
    meta = meta_of(plan)
    match plan.algorithm:
        case "reptile":  # judges nothing: all examples adapt, and which of them are equal does not matter
            split = ExampleSplit(np.arange(len(x)), np.zeros(0, np.int64))
        case "maml" | "fomaml" | "per-fedavg":
            split = ExampleSplit.of(x, y, meta.query_fraction)
        case _:
            raise ConfigurationError(f"{plan.algorithm} is not meta-learning")
    return MetaBatches.of(plan.algorithm, meta, split, batch_size=plan.batch_size, seed=seed, shuffle=plan.shuffle)
