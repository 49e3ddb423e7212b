"""From a full buffer to what a round leaves behind. Reads the state, changes nothing."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import numpy as np

from client_sdk.protocol.errors import PocketfedError, StorageUnavailable
from server_ref.aggregation.batch import Aggregate
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.errors import PrivacyBudgetExhausted
from server_ref.aggregation.monitoring import DivergenceDetector, DivergenceState, Health
from server_ref.aggregation.server_state import ServerState
from server_ref.assignments import AssignmentRecord, Closing
from server_ref.durable import RoundOutcome
from server_ref.secure.errors import AnswersInconsistent, BudgetSpent, NotEnoughAggregators
from server_ref.task import Task

AWAITED: Final = (NotEnoughAggregators, AnswersInconsistent)
"""More aggregators have to answer first: nothing was released and nothing is lost, the same buffer closes later."""

SPENT: Final = (PrivacyBudgetExhausted, BudgetSpent)
"""Nothing is released any more: the task is over."""

_log = logging.getLogger("pocketfed.coordinator")


class Standing(Protocol):
    """What a round starts from, durable or not."""

    @property
    def optimizer(self) -> ServerState:
        """The server's state."""
        ...

    @property
    def correction(self) -> DelayCorrection | None:
        """What stale updates are corrected by, if anything."""
        ...

    @property
    def divergence_json(self) -> str | None:
        """The divergence detector's state; None before the first round."""
        ...


class Reducible(Protocol):
    """A buffer that can be turned into an aggregate."""

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The aggregate of exactly these reports, for the model after ``version``."""
        ...


def close_buffer(task: Task, state: Standing, buffer: Reducible, closing: Closing) -> RoundOutcome:
    """Reduce, correct, release and apply a buffer, and see whether training is still on course.

    A buffer that cannot be aggregated or applied leaves the model as it is: its reports are spent either way, the old
    weights live on, and the round's record says why.

    Raises:
        StorageUnavailable: A report cannot be read back; nothing is lost, the buffer closes later.
        NotEnoughAggregators, AnswersInconsistent: As that: more aggregators have to answer first.
    """
    ages = [closing.round_id - r.model_version for r in closing.counted]
    optimizer, step, norm, clip_norm = state.optimizer, None, None, task.clip_norm
    measurements: dict[str, Any] = {"staleness": {}}
    if clip_norm is not None:
        measurements["clip_norm"] = clip_norm.clip_norm
    try:
        aggregate = buffer.reduce(closing.counted, closing.round_id)
        measurements |= aggregate.measurements
        if clip_norm is not None and aggregate.indicator is not None:
            # Of a release, whatever comes of it below.
            clip_norm = clip_norm.after(aggregate.indicator, aggregate.count)
        if state.correction is not None:
            aggregate = _corrected(task, state.correction, aggregate, closing, ages)
            step = aggregate.values * task.pipeline.schedule.learning_rate_scale(ages, closing.round_id)
        norm = float(np.linalg.norm(aggregate.values[: optimizer.size]))
        measurements["aggregate_norm"] = norm
        optimizer = task.pipeline.apply(optimizer, aggregate, staleness=ages, round_id=closing.round_id)
    except (StorageUnavailable, *AWAITED):
        raise
    except SPENT as e:
        _log.error("round %d is not released: %s", closing.round_id, e)
        measurements["unchanged"] = type(e).__name__
        return RoundOutcome(
            optimizer, measurements, divergence_json=state.divergence_json, halted=str(e), clip_norm=clip_norm
        )
    except PocketfedError as e:
        _log.error("round %d leaves the model unchanged: %s", closing.round_id, e)
        measurements["unchanged"] = type(e).__name__
        step = None
    outcome = RoundOutcome(optimizer, measurements, step=step, clip_norm=clip_norm)
    return _watched(task, state, outcome, closing, norm)


def _corrected(
    task: Task, correction: DelayCorrection, aggregate: Aggregate, closing: Closing, ages: list[int]
) -> Aggregate:
    """The aggregate as if its updates had been computed on the present model, to first order."""
    schedule, facts = task.pipeline.schedule, task.pipeline.admitted
    scales = [r.weight * schedule.scale(age, closing.round_id) for r, age in zip(closing.counted, ages, strict=True)]
    denominator = (facts.constant_denominator or sum(r.weight for r in closing.counted)) * facts.max_scale
    return replace(aggregate, values=correction.correct(aggregate.values, ages, scales, denominator))


def _stated(loss: float) -> float:
    """What a device says of its loss, as far as it can be put in order: anybody may say anything.

    One below 0 is as good as none, and no reason to stop a task.
    """
    return max(0.0, loss) if math.isfinite(loss) else math.inf


def _watched(task: Task, state: Standing, outcome: RoundOutcome, closing: Closing, norm: float | None) -> RoundOutcome:
    """The outcome with the divergence detector's verdict.

    What it looks at is known when the buffer closes, so that a run that diverges is halted in the same round whenever
    it is repeated: the aggregate's norm, and the median of the losses that devices report (a minority of them cannot
    move it far). NaN is a loss that its device withheld.
    """
    settings = task.settings.divergence
    if not settings.enabled:
        return outcome
    loss = None
    if not task.settings.withholds_loss:
        losses = [r.report.train_loss for r in closing.counted if r.report]
        stated = [_stated(loss) for loss in losses if not math.isnan(loss)]
        loss = statistics.median(stated) if stated else None
    detector = DivergenceDetector(factor=settings.factor, patience=settings.patience)
    before = (
        DivergenceState()
        if state.divergence_json is None
        else DivergenceState.model_validate_json(state.divergence_json)
    )
    after = detector.next(before, loss=loss, norm=norm)
    halted = after.reason if after.health is Health.DIVERGED else None
    return replace(outcome, divergence_json=after.model_dump_json(), halted=halted)
