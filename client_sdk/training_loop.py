"""Drives one training on a phone: between two calls of the program it looks whether to go on, and keeps what is done.

``TrainingRun`` is the arithmetic and knows nothing of this; here are the reasons to stop (the caller, the time given,
battery, heat, network, user, memory) and the checkpoints from which a later process goes on, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from client_sdk import events
from client_sdk.checkpoint import Checkpoint, CheckpointBinding, CheckpointManager
from client_sdk.checkpoint_schedule import CheckpointSchedule
from client_sdk.errors import DeviceError, Interrupted, TrainingPaused
from client_sdk.memory_budget import MemoryBudget
from client_sdk.throttle import Governor
from client_sdk.training import TrainingResult, TrainingState
from client_sdk.trainings import Training

_log = logging.getLogger("pocketfed.training")

OnEvent = Callable[[events.Event], None]
Keep = Callable[[TrainingState], Checkpoint | None]

APP_REASON: Final = "app"
"""What a pause is put down to where the app's own conditions asked for it."""


class TrainingLoop:
    """One training's surroundings.

    Args:
        checkpoints: Where what is done is kept; None keeps nothing, and a training that stops begins anew.
        governor: Whether the device's conditions allow to go on, and how much it rests; None for always and never.
        budget: What the process may use; None for no limit.
        should_stop: Asked before each call, and told whether one was made already: who has little time left still gets
            somewhere if the first one is always made.
        conditions: The app's own reason not to go on, or None; asked between two optimizer steps.
        check: Asked before each call and once at the end; raises where nothing of this training can count any more.
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
        should_stop: Callable[[bool], bool] = lambda _: False,
        conditions: Callable[[], str | None] = lambda: None,
        check: Callable[[], None] = lambda: None,
        on_event: OnEvent = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        schedule: CheckpointSchedule | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._governor = governor
        self._budget = budget
        self._should_stop = should_stop
        self._conditions = conditions
        self._check = check
        self._on_event = on_event
        self._monotonic = monotonic
        self._schedule = schedule or CheckpointSchedule()

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether a binding is worth its making."""
        return self._checkpoints is not None

    def former(self, binding: CheckpointBinding) -> Checkpoint | None:
        """The newest good checkpoint of this very training; one that cannot be read costs time, not the training."""
        if self._checkpoints is None:
            return None
        try:
            checkpoint = self._checkpoints.load(binding)
        except DeviceError as e:
            self._report_failure(e)
            return None
        if checkpoint is not None:
            self._on_event(events.TrainingResumed(checkpoint.state.epoch, checkpoint.state.steps))
        return checkpoint

    def drive(self, run: Training, keep: Keep) -> TrainingResult:
        """Advance a training to its end.

        Args:
            run: From ``begin_training``.
            keep: Makes the checkpoint of a state; gives None where none are kept.

        Raises:
            Interrupted: ``should_stop`` said so; what was done is kept.
            LeaseExpired: ``check`` said so; nothing is kept.
            TrainingPaused: The conditions do not allow to go on now; what was done is kept.
            MemoryBudgetExceeded: The process has used more than it may.
            ProgramError: See ``begin_training``.
        """
        self._schedule = self._schedule.begun(self._monotonic())
        moved = False
        while not run.finished:
            self._check()
            if self._should_stop(moved):
                self._keep(run, keep, moved=moved)
                raise Interrupted("training was interrupted")
            self._ask_conditions(run, keep, moved=moved)
            began = self._monotonic()
            run.advance()
            moved = True
            now = self._monotonic()
            self._on_event(events.TrainingProgress(run.examples_done, run.total_examples, run.last_loss))
            if self._budget is not None:
                self._budget.check()
            if self._schedule.due(now):
                self._keep(run, keep, moved=moved)
            if self._governor is not None:
                self._governor.after_call(now - began)
        self._check()
        return run.result()

    def _ask_conditions(self, run: Training, keep: Keep, *, moved: bool) -> None:
        own = self._conditions() if run.at_step_boundary else None
        if own is not None:
            self._keep(run, keep, moved=moved)
            raise TrainingPaused(own, reason=APP_REASON)
        if self._governor is None:
            return
        verdict = self._governor.before_call(run.at_step_boundary)
        if not verdict.allowed:
            self._keep(run, keep, moved=moved)
            raise TrainingPaused(verdict.detail, reason=str(verdict.reason))

    def _keep(self, run: Training, keep: Keep, *, moved: bool) -> None:
        """Save a checkpoint. One that cannot be saved costs time after a death, not the training."""
        if not moved:
            return  # it would be the one that this training began with
        if self._checkpoints is None:
            return
        began = self._monotonic()
        try:
            checkpoint = keep(run.snapshot())
            if checkpoint is not None:
                self._checkpoints.save(checkpoint)
        except DeviceError as e:
            self._report_failure(e)
        finally:
            now = self._monotonic()
            self._schedule = self._schedule.saved(now, now - began)

    def _report_failure(self, error: DeviceError) -> None:
        _log.warning("a checkpoint cannot be used: %s", error)
        self._on_event(events.CheckpointFailed(str(error)))
