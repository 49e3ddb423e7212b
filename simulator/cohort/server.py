"""The server of a cohort run: its round engine and its pipeline, without its durability and its HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from client_sdk.protocol.errors import InvalidUpdate
from client_sdk.protocol.program import Float32Array, Manifest
from server_ref.aggregation.batch import EncodedUpdate, Update
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.server_state import CONTROL, ServerState
from server_ref.evaluation import Evaluation
from server_ref.models import GlobalModel, encode_model
from server_ref.rounds import AssignmentRecord, Closing, ReportFile, RoundEngine, RoundPolicy, Waiting
from simulator.cohort.queue import Broadcast
from simulator.view import CommittedRound

# An update at a time costs three passes over the sum, many at once share them.
_FOLDED_AT_ONCE = 32


@dataclass(frozen=True)
class Scoring:
    """How models are scored: every n-th, and the last one."""

    evaluate: Callable[[Float32Array], Evaluation]
    every: int = 1


class CohortServer:
    """Rounds on virtual time, from check-ins to models, by the objects that the reference server uses.

    Whoever drives it calls in virtual order: every report at its arrival, and check-ins of the same instant after it.
    Then a buffer is complete with its last report, and closes at once.

    Args:
        policy: The rounds' numbers.
        pipeline: What is done to a buffer.
        manifest: Lays the model out.
        weights: float32[d], the first model.
        scoring: Scores new models; None for none.

    Attributes:
        rounds: All committed rounds.
        counted: Assignment numbers that each of them counted, in order.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        pipeline: Pipeline,
        manifest: Manifest,
        weights: Float32Array,
        *,
        scoring: Scoring | None = None,
    ) -> None:
        self.rounds: list[CommittedRound] = []
        self.counted: list[list[int]] = []
        self._engine = RoundEngine(policy, virtual_time=True)
        self._pipeline = pipeline
        self._manifest = manifest
        self._scoring = scoring
        self._state: ServerState = pipeline.optimizer.initial(weights)
        self._model: GlobalModel = encode_model(0, self._state.weights, manifest)
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
        """Whether the last round is committed."""
        return self._engine.finished

    @property
    def version(self) -> int:
        """Number of the newest model."""
        return self._engine.version

    @property
    def oldest_version(self) -> int:
        """Oldest model version whose updates are still accepted."""
        return max(0, self._engine.version - self._engine.policy.max_staleness)

    @property
    def room(self) -> int | None:
        """How many reports of the newest model can still count; None where later buffers take them too."""
        policy = self._engine.policy
        return None if policy.max_staleness else policy.buffer_size - self._count

    # --- events ------------------------------------------------------------------------------------------

    def check_in(
        self, device: int, num_samples: int, now: float, duration_s: float | None
    ) -> AssignmentRecord | Waiting:
        """A device offers itself, before the task is finished."""
        engine = self._engine
        return engine.check_in(
            str(device), num_samples, now, lambda: f"{engine.next_number:032x}", duration_s=duration_s
        )

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
            update: Its number, payload, seed and normaliser; weight and staleness are taken from the record.
            train_loss: Mean loss over the device's last local epoch.
            now: Virtual time.

        Raises:
            StaleReport: It comes too late.
            ProtocolError: Another refusal of the pipeline, by its class.
        """
        engine = self._engine
        engine.check_fresh(record, now)
        staleness = engine.version - record.model_version
        admitted = self._pipeline.admit(replace(update, weight=record.weight, staleness=staleness), engine.version)
        engine.report(record, ReportFile(record.assignment_id, "", wire_bytes(update), train_loss), now)
        self._count += 1
        self._ages.append(staleness)
        self._pending.append(admitted)
        if len(self._pending) == _FOLDED_AT_ONCE:
            self._fold_pending()
        closing = engine.closing(now)
        if closing is not None:
            self._commit(closing)

    # --- rounds ------------------------------------------------------------------------------------------

    def _begin_buffer(self) -> None:
        self._fold = self._pipeline.start()
        self._pending: list[Update] = []
        self._ages: list[int] = []
        self._count = 0

    def _fold_pending(self) -> None:
        self._fold.add(self._pending)
        self._pending = []

    def _commit(self, closing: Closing) -> None:
        engine = self._engine
        opened_at = engine.opened_at
        self._fold_pending()
        try:
            aggregate = self._pipeline.finish(self._fold)
            self._state = self._pipeline.apply(self._state, aggregate, staleness=self._ages, round_id=closing.round_id)
        except InvalidUpdate:
            # The reports are spent either way; the old weights live on, as they do on the server.
            pass
        discarded = engine.commit(closing)
        self._model = encode_model(engine.version, self._state.weights, self._manifest)
        self._broadcast = self._announce()
        self._begin_buffer()
        self.counted.append([record.number for record in closing.counted])
        score = self._score()
        self.rounds.append(
            CommittedRound(
                round_id=closing.round_id,
                model_version=engine.version,
                model_sha256=self._model.sha256,
                reports=len(closing.counted),
                discarded=discarded,
                train_loss=_train_loss(closing),
                opened_at_s=opened_at,
                closed_at_s=closing.closed_at,
                validation_accuracy=None if score is None else score.accuracy,
                validation_loss=None if score is None else score.loss,
            )
        )

    def _announce(self) -> Broadcast:
        control = self._state.tensors.get(CONTROL)
        return Broadcast(
            self._engine.version, self._state.weights, None if control is None else control.astype(np.float32)
        )

    def _score(self) -> Evaluation | None:
        version = self._engine.version
        if self._scoring is None or not (self._engine.finished or version % self._scoring.every == 0):
            return None
        return self._scoring.evaluate(self._state.weights)


def wire_bytes(update: EncodedUpdate) -> int:
    """Bytes of an update's payload; a frame's header and the messages around it are not counted."""
    payload = update.payload
    return payload.nbytes if isinstance(payload, np.ndarray | memoryview) else len(payload)


def _train_loss(closing: Closing) -> float:
    """The weighted mean of what the devices reported."""
    weight = sum(record.weight for record in closing.counted)
    return sum(r.weight * r.report.train_loss for r in closing.counted if r.report is not None) / weight
