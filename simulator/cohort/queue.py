"""Local training on demand: assignments wait, and are trained many at a time when the first of them is needed."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from client_sdk.protocol.errors import ProgramError
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan
from server_ref.assignments import AssignmentRecord
from simulator.cohort.trainer import CohortTrainer, LocalWork


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What devices download to train: one version of the model.

    Attributes:
        version: Its number.
        weights: float32[d].
        control: With scaffold float32[d], the server's control variate; else None.
    """

    version: int
    weights: Float32Array
    control: Float32Array | None = None


class Job(NamedTuple):
    """One assignment that will be reported; ordered as its report arrives.

    Attributes:
        arrives_s: Virtual time at which its report arrives.
        number: Number of the assignment.
        device: Who trains.
        record: The assignment.
    """

    arrives_s: float
    number: int
    device: int
    record: AssignmentRecord


@dataclass(frozen=True)
class Trained:
    """Outcome of one assignment's local training.

    Attributes:
        update: float32[update_size], what the device sends before compression.
        steps: Optimizer steps taken.
        train_loss: Mean loss over the last local epoch; of meta-learning see ``CohortResult``.
        personal: float32[p], what the device keeps of its personal layers; None without any.
    """

    update: Float32Array
    steps: int
    train_loss: float
    personal: Float32Array | None = None


class TrainingQueue:
    """Trains assignments of one model version together.

    Memory: one window of updates, besides the ones that the caller still holds. What is given up before it is needed is
    never trained, unless it shared a window with one that was.

    Args:
        trainer: Does the work.
        plan: The devices' local training.
        work_of: A device's work on a broadcast; asked when it is trained.
    """

    def __init__(
        self, trainer: CohortTrainer, plan: TrainingPlan, work_of: Callable[[Job, Broadcast], LocalWork]
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._work_of = work_of
        self._waiting: dict[int, list[Job]] = {}
        self._done: dict[int, dict[int, Trained | ProgramError]] = {}

    def assign(self, job: Job, broadcast: Broadcast) -> None:
        """Take an assignment in."""
        heapq.heappush(self._waiting.setdefault(broadcast.version, []), job)

    def take(self, job: Job, broadcast: Broadcast, *, at_most: int | None = None) -> Trained:
        """The outcome of an assignment, which is forgotten with it. Assignments are taken in order of arrival.

        Args:
            job: Which one.
            broadcast: The model that it was given.
            at_most: How many may be trained for it at once, itself included: as many as can still be needed.

        Raises:
            TrainingDiverged: Its training did.
            NotEnoughExamples: It has too few for what it is asked.
        """
        done = self._done.setdefault(broadcast.version, {})
        if job.number not in done:
            self._train(broadcast, at_most)
        trained = done.pop(job.number)
        if isinstance(trained, ProgramError):
            raise trained
        return trained

    def drop_before(self, version: int) -> None:
        """Give up assignments of older versions: their reports would not be accepted any more."""
        for kept in (self._waiting, self._done):
            for old in [v for v in kept if v < version]:
                del kept[old]

    def _train(self, broadcast: Broadcast, at_most: int | None) -> None:
        waiting, done = self._waiting[broadcast.version], self._done[broadcast.version]
        size = self._trainer.clients_at_once(self._plan)
        size = min(len(waiting), size if at_most is None else min(size, at_most))
        # The soonest: they are needed first, and of those that come late some are never needed at all.
        jobs = [heapq.heappop(waiting) for _ in range(size)]
        work = [self._work_of(job, broadcast) for job in jobs]
        result = self._trainer.train(broadcast.weights, work, self._plan)
        for i, job in enumerate(jobs):
            failure = result.failures.get(i)
            done[job.number] = failure or Trained(
                result.updates[i],
                int(result.steps[i]),
                float(result.last_epoch_losses[i]),
                None if result.personal is None else result.personal[i],
            )
