"""Drives one training on a phone: between two calls of the program it looks whether to go on, and keeps what is done.

``TrainingRun`` is the arithmetic and knows nothing of this; here are the reasons to stop (the caller, the time given,
battery, heat, network, user, memory) and the checkpoints from which a later process goes on, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from client_sdk import events
from client_sdk.checkpoint import Checkpoint, CheckpointBinding, CheckpointManager
from client_sdk.checkpoint_schedule import CheckpointSchedule
from client_sdk.errors import DeviceError, Interrupted, TrainingPaused
from client_sdk.memory_budget import MemoryBudget
from client_sdk.throttle import Governor
from client_sdk.training import TrainingResult, TrainingRun, TrainingState

_log = logging.getLogger("pocketfed.training")

OnEvent = Callable[[events.Event], None]
Keep = Callable[[TrainingState], Checkpoint | None]


class TrainingLoop:
    """One training's surroundings.

    Args:
        checkpoints: Where what is done is kept; None keeps nothing, and a training that stops begins anew.
        governor: Whether the device's conditions allow to go on, and how much it rests; None for always and never.
        budget: What the process may use; None for no limit.
        should_stop: Asked before each call.
        on_event: Told about progress, resuming, and checkpoints that could not be kept.
        monotonic: Seconds of a clock that nobody sets back.
        schedule: How often a checkpoint is kept while training goes on.
    """

    def __init__(
        self,
        *,
        checkpoints: CheckpointManager | None = None,
        governor: Governor | None = None,
        budget: MemoryBudget | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_event: OnEvent = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        schedule: CheckpointSchedule | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._governor = governor
        self._budget = budget
        self._should_stop = should_stop
        self._on_event = on_event
        self._monotonic = monotonic
        self._schedule = schedule or CheckpointSchedule()

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether a binding is worth its making."""
        return self._checkpoints is not None

    def former(self, binding: CheckpointBinding) -> Checkpoint | None:
        """The newest good checkpoint of this very training."""
        if self._checkpoints is None:
            return None
        checkpoint = self._checkpoints.load(binding)
        if checkpoint is not None:
            self._on_event(events.TrainingResumed(checkpoint.state.epoch, checkpoint.state.steps))
        return checkpoint

    def drive(self, run: TrainingRun, keep: Keep) -> TrainingResult:
        """Advance a training to its end.

        Args:
            run: From ``LocalTrainer.begin``.
            keep: Makes the checkpoint of a state; gives None where none are kept.

        Raises:
            Interrupted: ``should_stop`` said so; what was done is kept.
            TrainingPaused: The conditions do not allow to go on now; what was done is kept.
            MemoryBudgetExceeded: The process has used more than it may.
            ProgramError: See ``LocalTrainer.train``.
        """
        self._schedule = self._schedule.begun(self._monotonic())
        while not run.finished:
            if self._should_stop():
                self._keep(run, keep)
                raise Interrupted("training was interrupted")
            self._ask_conditions(run, keep)
            began = self._monotonic()
            run.advance()
            now = self._monotonic()
            self._on_event(events.TrainingProgress(run.examples_done, run.total_examples, run.last_loss))
            if self._budget is not None:
                self._budget.check()
            if self._schedule.due(now):
                self._keep(run, keep)
            if self._governor is not None:
                self._governor.after_call(now - began)
        return run.result()

    def _ask_conditions(self, run: TrainingRun, keep: Keep) -> None:
        if self._governor is None:
            return
        verdict = self._governor.before_call(run.at_step_boundary)
        if not verdict.allowed:
            self._keep(run, keep)
            raise TrainingPaused(verdict.detail, reason=str(verdict.reason))

    def _keep(self, run: TrainingRun, keep: Keep) -> None:
        """Save a checkpoint. One that cannot be saved costs time after a death, not the training."""
        if self._checkpoints is None:
            return
        began = self._monotonic()
        try:
            checkpoint = keep(run.snapshot())
            if checkpoint is not None:
                self._checkpoints.save(checkpoint)
        except DeviceError as e:
            _log.warning("the checkpoint is not kept: %s", e)
            self._on_event(events.CheckpointFailed(str(e)))
        finally:
            now = self._monotonic()
            self._schedule = self._schedule.saved(now, now - began)
