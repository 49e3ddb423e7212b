"""The open buffer of asynchronous aggregation: who is in it, how old each is, and what comes out when it is full."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from client_sdk.protocol.errors import ConfigurationError, DuplicateReport, ReportMismatch, StaleReport
from server_ref.aggregation.batch import Aggregate, Update
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.stages import Fold, Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """What a buffer is told of an update, values apart.

    Attributes:
        worker_id: Who sent it; one update each in a buffer.
        model_version: The round whose model it was computed on.
        report_id: What stays the same when it is sent again; None if it cannot be told.
    """

    worker_id: str
    model_version: int
    report_id: Hashable | None = None


@dataclass(frozen=True)
class _Member:
    """An update in the buffer: its age, and the integer it is multiplied by."""

    staleness: int
    factor: int
    report_id: Hashable | None


class UpdateBuffer:
    """Accepts updates of any age that a schedule admits; every ``size`` of them make an aggregate.

    Guarantees: what is refused, or fails on its way, leaves no trace. The aggregate's bits depend on the accepted
    updates and their ages, not on the order in which they came (as far as the pipeline's reduce stage does not either).
    One thread at a time.

    Args:
        size: Updates that make an aggregate.
        schedule: What ages are admitted, and what they cost.
        max_staleness: Oldest age that the schedule ever admits.
        delay: Corrects each mean by what its updates had not seen; None: no correction.
    """

    def __init__(self, size: int, schedule: Schedule, max_staleness: int, *, delay: DelayCorrection | None) -> None:
        self.size = size
        self.round_id = 0
        self._schedule = schedule
        self._max_staleness = max_staleness
        self._delay = delay
        self._fold: Fold | None = None
        self._members: dict[str, _Member] = {}
        self._reports: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def resize(self, size: int, schedule: Schedule) -> None:
        """Let a buffer that is empty be full with another number of updates; what it remembers stays.

        Raises:
            ConfigurationError: There are updates in it.
        """
        if self._members:
            raise ConfigurationError("a buffer that has updates keeps its size")
        self.size, self._schedule = size, schedule

    def clear(self) -> None:
        """Forget the updates in it, as if they had never come."""
        for member in self._members.values():
            self._reports.pop(member.report_id, None)
        self._fold, self._members = None, {}

    def check(self, submission: Submission) -> None:
        """Everything that can be refused without a look at the values; age first.

        Raises:
            ReportMismatch: A model that does not exist yet.
            StaleReport: Too old.
            DuplicateReport: This worker is in the buffer already, or this report was accepted before.
        """
        staleness = self.round_id - submission.model_version
        if staleness < 0:
            raise ReportMismatch(
                f"the update claims model version {submission.model_version}; the newest is {self.round_id}"
            )
        if not self._schedule.admits(staleness, self.round_id):
            raise StaleReport(
                f"the update is {staleness} versions old, beyond what is accepted in round {self.round_id}"
            )
        if submission.worker_id in self._members:
            raise DuplicateReport("this worker's update is in the buffer already")
        if submission.report_id is not None and submission.report_id in self._reports:
            raise DuplicateReport("this report was accepted before")

    def accept(
        self, submission: Submission, opened: Update, pipeline: Pipeline, release: Callable[[Aggregate], T]
    ) -> T | None:
        """Take an update in that ``check`` has let pass.

        Args:
            submission: What it is.
            opened: Its values, from ``pipeline.open``.
            pipeline: The same one for all updates of a buffer.
            release: What is done to the aggregate of a full buffer. If it raises, the update was never accepted.

        Returns:
            What ``release`` returns, if this update filled the buffer; the next one is then open.
        """
        staleness = self.round_id - submission.model_version
        update = pipeline.age(opened, staleness, self.round_id)
        fold = self._fold or pipeline.start()
        fold.add([update])
        self._members[submission.worker_id] = _Member(staleness, update.weight * update.scale, submission.report_id)
        self._fold = fold
        released = None
        if len(self._members) == self.size:
            try:
                aggregate = self._finish(pipeline, fold)
                released = release(aggregate)
            except BaseException:
                fold.discard([update])
                del self._members[submission.worker_id]
                raise
            self._open_next(aggregate)
        if submission.report_id is not None:
            self._reports[submission.report_id] = submission.model_version
        return released

    def _finish(self, pipeline: Pipeline, fold: Fold) -> Aggregate:
        aggregate = pipeline.finish(fold)
        values = aggregate.values
        members = list(self._members.values())
        ages = [member.staleness for member in members]
        if self._delay is not None:
            facts = pipeline.admitted
            denominator = (facts.constant_denominator or aggregate.total_weight) * facts.max_scale
            values = self._delay.correct(values, ages, [member.factor for member in members], denominator)
        scale = self._schedule.learning_rate_scale(ages, self.round_id)
        measurements: dict[str, Any] = {"round_id": self.round_id, "learning_rate_scale": scale}
        return replace(aggregate, values=values * scale, measurements={**aggregate.measurements, **measurements})

    def _open_next(self, aggregate: Aggregate) -> None:
        if self._delay is not None:
            self._delay.record(aggregate.values)
        self._fold, self._members = None, {}
        self.round_id += 1
        # A report older than that is refused for its age.
        oldest = self.round_id - self._max_staleness
        self._reports = {report: version for report, version in self._reports.items() if version >= oldest}
