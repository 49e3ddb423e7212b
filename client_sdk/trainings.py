"""The training that a plan asks for, whichever algorithm it is: begun in one place, driven in one way."""

from __future__ import annotations

from typing import Protocol

from client_sdk.data import Examples
from client_sdk.meta_training import MetaTrainer
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Float32Array, Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import LocalTrainer
from client_sdk.training_state import Controls, TrainingResult, TrainingState


class Training(Protocol):
    """A training under way: ``TrainingRun`` or ``MetaRun``, which say what is raised and guaranteed."""

    @property
    def finished(self) -> bool:
        """Whether the plan is done."""
        ...

    @property
    def steps(self) -> int:
        """Steps taken."""
        ...

    @property
    def at_step_boundary(self) -> bool:
        """Whether nothing is half done."""
        ...

    @property
    def examples_done(self) -> int:
        """Examples that have gone through the program."""
        ...

    @property
    def total_examples(self) -> int:
        """Examples that the whole training takes."""
        ...

    @property
    def last_loss(self) -> float:
        """Mean loss of the examples of the last call; NaN before the first."""
        ...

    def advance(self) -> None:
        """Make one program call."""
        ...

    def snapshot(self) -> TrainingState:
        """How far it is; the arrays are copies."""
        ...

    def result(self) -> TrainingResult:
        """What training produced."""
        ...


def begin_training(
    program: Program,
    weights: Float32Array,
    examples: Examples,
    plan: TrainingPlan,
    shuffle_seed: int,
    *,
    controls: Controls | None = None,
    slice_size: int | None = None,
    state: TrainingState | None = None,
) -> Training:
    """Begin a training, or go on with one: see ``LocalTrainer.begin`` and, with ``plan.meta``, ``MetaTrainer.begin``.

    Raises:
        ConfigurationError: Controls that the plan's algorithm does not take, and see there.
        NotEnoughExamples, ProgramInputError, UnknownMethod: See there.
    """
    if plan.meta is None:
        return LocalTrainer(program).begin(
            weights, *examples, plan, shuffle_seed, controls=controls, slice_size=slice_size, state=state
        )
    if controls is not None:
        raise ConfigurationError(f"{plan.algorithm} takes no control variates; scaffold trains with a server's")
    return MetaTrainer(program).begin(weights, *examples, plan, shuffle_seed, slice_size=slice_size, state=state)
