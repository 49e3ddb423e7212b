"""The server of a cohort run: its round engine and its pipeline, without its durability and its HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.program import Float32Array
from server_ref.aggregation.batch import Aggregate, EncodedUpdate, Update
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.server_state import CONTROL, ServerState
from server_ref.assignments import AssignmentRecord, Closing, ReportFile, Waiting
from server_ref.checkin import AtCheckIn
from server_ref.closing import close_buffer
from server_ref.durable import RoundOutcome
from server_ref.evaluation import Evaluation
from server_ref.models import GlobalModel, encode_model
from server_ref.private_buffer import MemoryReleases, release_once
from server_ref.rounds import RoundEngine
from server_ref.task import Task
from simulator.cohort.queue import Broadcast
from simulator.view import CommittedRound, Measurements

# An update at a time costs three passes over the sum, many at once share them.
_FOLDED_AT_ONCE = 32


@dataclass(frozen=True)
class Scoring:
    """How models are scored: every n-th, and the last one."""

    evaluate: Callable[[Float32Array], Evaluation]
    every: int = 1


class CohortServer:
    """Rounds on virtual time, from check-ins to models, by the objects that the reference server uses.

    Whoever drives it calls in virtual order: reports as they arrive, check-ins of the same instant after them. Then a
    buffer is complete with its last report, and closes at once.

    Args:
        task: What is trained, and how.
        scoring: Scores new models; None for none.
        device_id: Number of a device -> how the server knows it; selection draws by it.
        tier: Number of a device -> what it says of itself.
        on_model: Told of every model, the initial one included: its number, and its weights, float32[d].

    Attributes:
        task: As given.
        rounds: All committed rounds.
        counted: Assignment numbers that each of them counted, in order.
        optimizer: The server's state.
        correction: What stale updates are corrected by, if anything.
        divergence_json: The divergence detector's state.
        halted: Why training ended before its last round, if it did.
    """

    def __init__(
        self,
        task: Task,
        *,
        scoring: Scoring | None = None,
        device_id: Callable[[int], str] = str,
        tier: Callable[[int], DeviceTier] = lambda _device: DeviceTier.MID_RANGE,
        on_model: Callable[[int, Float32Array], None] = lambda _number, _weights: None,
    ) -> None:
        settings = task.settings
        self.task = task
        self.rounds: list[CommittedRound] = []
        self.counted: list[list[int]] = []
        self.optimizer: ServerState = task.initial_state()
        self.correction = (
            None
            if settings.delay_damping is None
            else DelayCorrection(damping=settings.delay_damping, max_staleness=settings.staleness.max_staleness)
        )
        self.divergence_json: str | None = None
        self.halted: str | None = None
        self._engine = RoundEngine(settings.policy(), virtual_time=True, tolerance=settings.staleness.tolerance)
        self._selection = AtCheckIn.simulated(settings, task.task_id)
        self._scoring = scoring
        self._device_id = device_id
        self._tier = tier
        self._on_model = on_model
        self._model: GlobalModel = encode_model(0, task.whole_weights(self.optimizer), task.manifest)
        self._broadcast = self._announce()
        self._begin_buffer()

    # --- questions ---------------------------------------------------------------------------------------

    @property
    def model(self) -> GlobalModel:
        """The newest model."""
        return self._model

    @property
    def broadcast(self) -> Broadcast:
        """What a device that is given work now has to download."""
        return self._broadcast

    @property
    def finished(self) -> bool:
        """Whether the last round is committed, or training was halted."""
        return self._engine.finished

    @property
    def version(self) -> int:
        """Number of the newest model."""
        return self._engine.version

    @property
    def oldest_version(self) -> int:
        """No older model's updates are accepted any more."""
        return max(0, self._engine.version - self._engine.policy.max_staleness)

    @property
    def room(self) -> int:
        """How many reports the open buffer still takes."""
        return self._engine.policy.buffer_size - self._count

    @property
    def synchronous(self) -> bool:
        """Whether only reports of the newest model count."""
        return self._engine.policy.max_staleness == 0

    def inviting(self, now: float) -> bool:
        """Whether a device without an assignment would be given one now."""
        return self._engine.inviting(now)

    # --- events ------------------------------------------------------------------------------------------

    def check_in(
        self, device: int, num_samples: int, now: float, duration_s: float | None
    ) -> AssignmentRecord | Waiting:
        """A device without an assignment offers itself, before the task is finished.

        Args:
            device: Its number.
            num_samples: Examples it holds.
            now: Virtual time.
            duration_s: When its report would arrive; None for never.
        """
        engine, device_id = self._engine, self._device_id(device)
        tier = self._tier(device).value
        if not self._selection.admits(device_id, engine, now, num_samples=num_samples, tier=tier):
            return Waiting("not-selected")
        found = engine.check_in(
            device_id, num_samples, now, lambda: f"{engine.next_number:032x}", duration_s=duration_s
        )
        if not isinstance(found, Waiting):
            self._selection.given(device_id, engine.version)
        return found

    def check_fresh(self, record: AssignmentRecord, now: float) -> None:
        """Whether a report for this assignment would be accepted.

        Raises:
            StaleReport: Its round is over, or its model is too old.
        """
        self._engine.check_fresh(record, now)

    def give_up(self, record: AssignmentRecord) -> None:
        """A device gives its assignment back."""
        self._engine.abandon(record.assignment_id)

    def report(self, record: AssignmentRecord, update: EncodedUpdate, train_loss: float, now: float) -> None:
        """A report arrives; if it is the buffer's last, the next model is made of it.

        Args:
            record: The assignment that it answers.
            update: What was sent, with the weight and the staleness of the record.
            train_loss: Mean loss over the device's last local epoch.
            now: Virtual time.

        Raises:
            StaleReport: It comes too late.
            ProtocolError: Another refusal of the pipeline, by its class.
        """
        engine = self._engine
        engine.check_fresh(record, now)
        admitted = self.task.pipeline.admit(update, engine.version)
        stated = math.nan if self.task.settings.withholds_loss else train_loss
        engine.report(record, ReportFile(record.assignment_id, "", wire_bytes(update), stated), now)
        self._count += 1
        self._pending.append(admitted)
        if len(self._pending) == _FOLDED_AT_ONCE:
            self._fold_pending()
        closing = engine.closing(now)
        if closing is not None:
            self._commit(closing)

    # --- rounds ------------------------------------------------------------------------------------------

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The open buffer's aggregate: reports came in order, so that it holds those that count and no others."""
        self._fold_pending()
        task = self.task
        if task.privacy is None or task.keeper is None:
            return task.pipeline.finish(self._fold)
        return release_once(
            task.keeper,
            task.privacy,
            MemoryReleases(),
            round_id=version,
            reduce=lambda: task.pipeline.finish(self._fold),
            counted=counted,
        )

    def _begin_buffer(self) -> None:
        self._fold = self.task.pipeline.start()
        self._pending: list[Update] = []
        self._count = 0

    def _fold_pending(self) -> None:
        self._fold.add(self._pending)
        self._pending = []

    def _commit(self, closing: Closing) -> None:
        engine = self._engine
        opened_at = engine.opened_at
        outcome = close_buffer(self.task, self, self, closing)
        discarded = engine.commit(closing, halt=outcome.halted is not None)
        self.optimizer = outcome.optimizer
        self.divergence_json, self.halted = outcome.divergence_json, outcome.halted
        self.task.current.begin(outcome.clip_norm)
        if self.correction is not None and outcome.step is not None:
            self.correction.record(outcome.step)
        self._selection.remember(closing.counted, closing.round_id)
        self._selection.record(closing.counted)
        self._model = encode_model(engine.version, self.task.whole_weights(self.optimizer), self.task.manifest)
        self._broadcast = self._announce()
        self._begin_buffer()
        self.counted.append([record.number for record in closing.counted])
        self.rounds.append(self._record(closing, outcome, opened_at, discarded))

    def _record(self, closing: Closing, outcome: RoundOutcome, opened_at: float, discarded: int) -> CommittedRound:
        """What the server's history would say of the round."""
        score = self._score()
        reports = [r.report for r in closing.counted if r.report is not None]
        return CommittedRound(
            round_id=closing.round_id,
            model_version=self._engine.version,
            model_sha256=self._model.sha256,
            reports=len(reports),
            discarded=discarded,
            train_loss=closing.train_loss,
            opened_at_s=opened_at,
            closed_at_s=closing.closed_at,
            validation_accuracy=None if score is None else score.accuracy,
            validation_loss=None if score is None else score.loss,
            bytes_up=sum(report.num_bytes for report in reports),
            measurements=Measurements.model_validate(dict(outcome.measurements)),
        )

    def _announce(self) -> Broadcast:
        self._on_model(self._model.version, self._model.weights)
        control = self.optimizer.tensors.get(CONTROL)
        return Broadcast(
            self._engine.version, self._model.weights, None if control is None else control.astype(np.float32)
        )

    def _score(self) -> Evaluation | None:
        version = self._engine.version
        if self._scoring is None or not (self._engine.finished or version % self._scoring.every == 0):
            return None
        return self._scoring.evaluate(self._model.weights)


def wire_bytes(update: EncodedUpdate) -> int:
    """Bytes of an update's payload; a frame's header and the messages around it are not counted."""
    payload = update.payload
    return payload.nbytes if isinstance(payload, np.ndarray | memoryview) else len(payload)
