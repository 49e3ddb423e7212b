"""The durable state of one task: the engine and the model in memory, the tables and blobs they are a cache of.

``reload`` rebuilds the memory from the disk, ``flush`` writes what the memory changed, inside the caller's transaction.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from sqlalchemy.engine import Connection

from client_sdk.protocol.errors import ConfigurationError, StorageUnavailable, UnknownAssignment
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.aggregation.batch import EncodedUpdate, Update
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.server_state import CONTROL, ServerState
from server_ref.assignments import AssignmentRecord, Closing, ReportFile, RoundPolicy
from server_ref.checkin import AtCheckIn, remember, simulation_key
from server_ref.clock import Clock
from server_ref.models import GlobalModel, decode_model, encode_control, encode_model
from server_ref.release_store import ReleaseStore
from server_ref.reports import ReportEnvelope, ReportSchema, encoded_update, open_report, sealed_shares
from server_ref.rounds import RoundEngine
from server_ref.selection.history import DeviceHistory
from server_ref.selection.ties import KeyedTies
from server_ref.store import database
from server_ref.store.blobs import BlobStore
from server_ref.task import Task

_REPORTS = "reports"
_STATES = "states"
_STEP = "step"
"""Among a round's measurements: hash of the aggregate that it applied."""

_CLIP_NORM = "clip-norm"
"""In the journal: the adaptive clip norm of the newest model."""

_SELECTION_KEY = "selection-key"
"""In the journal: the secret that decides between devices where nothing else does, hex."""


@dataclass(frozen=True)
class RoundOutcome:
    """What a closed buffer leads to.

    Attributes:
        optimizer: The server's next state; its weights are the next model.
        measurements: What the round's record says.
        step: The aggregate that was applied, float64[size], where later rounds correct stale updates by it.
        divergence_json: The divergence detector's next state.
        halted: Why the task ends with this round, if it does.
        clip_norm: The next model's, where it is adaptive.
    """

    optimizer: ServerState
    measurements: Mapping[str, Any]
    step: npt.NDArray[np.float64] | None = None
    divergence_json: str | None = None
    halted: str | None = None
    clip_norm: AdaptiveClipNorm | None = None


class DurableState:
    """One data directory.

    Args:
        folder: Where database and blobs live.
        task: What the folder must belong to.
        policy: The rounds' numbers.
        schema: What reports must look like.
        clock: The server's time.
        quota_bytes: Largest blob storage; None for no limit.
    """

    engine: RoundEngine
    model: GlobalModel
    optimizer: ServerState
    halted: str | None
    divergence_json: str | None
    correction: DelayCorrection | None

    def __init__(
        self,
        folder: Path,
        task: Task,
        *,
        policy: RoundPolicy,
        schema: ReportSchema,
        clock: Clock,
        quota_bytes: int | None = None,
    ) -> None:
        self.folder = folder
        self.task = task
        self.blobs = BlobStore(folder / "blobs", quota_bytes)
        self.db = database.open_database(folder / "pocketfed.db")
        self.releases = ReleaseStore(self.db, self.blobs, clock, task.keeper)
        self._policy = policy
        self._schema = schema
        self._clock = clock
        self._written: database.TaskState
        self._flushed: database.TaskState
        self._first_new = 0
        self._history: DeviceHistory | None = None
        self._selection_key = ""

    def open(self) -> None:
        """Begin the task, or go on with it.

        Raises:
            ConfigurationError: The folder belongs to another task.
        """
        # Blobs first: the rows that name them follow.
        for data in (self.task.program, self.task.manifest_json):
            self.blobs.put_content(data)
        fresh = database.TaskState(self.task.task_id, self.task.identity_json, opened_at=self._clock.now())
        with self.db.begin() as connection:
            found = database.load_task(connection)
            if found is None:
                _model, version = self._store_model(0, self.task.initial_state())
                self.blobs.sync()
                database.save_model(connection, version)
                database.save_task(connection, fresh)
            elif found.task_id != self.task.task_id:
                differences = _differences(found.config_json, fresh.config_json)
                raise ConfigurationError(
                    f"{self.folder} holds another task; it differs in {', '.join(differences)}. "
                    "Use another data_dir, or the task's own settings"
                )
            if database.load_note(connection, _SELECTION_KEY) is None:
                # Of this task, for all its processes; who reads it can draw keys that are asked first.
                database.save_note(connection, _SELECTION_KEY, secrets.token_hex(32))
        self.reload()
        self._delete_orphans()

    def reload(self) -> None:
        """Rebuild the engine and the model from the tables and blobs.

        Raises:
            StorageUnavailable: They cannot be read.
        """
        with self.db.connect() as connection:
            state = database.load_task(connection)
            latest = database.latest_model(connection)
            if state is None or latest is None:
                raise StorageUnavailable("the database has lost its task")
            live = database.load_live_assignments(connection)
            given_back = database.load_given_back(connection, state.opened_at)
            self._first_new = database.next_assignment_number(connection)
            self.releases.reload(connection, latest.version)
            self._history = None
            if self.task.settings.selection.policy != "any":
                self._history = DeviceHistory.load(database.load_device_history(connection))
                self._selection_key = database.load_note(connection, _SELECTION_KEY) or ""
            clip_norm = database.load_note(connection, _CLIP_NORM)
        self.task.current.begin(None if clip_norm is None else AdaptiveClipNorm.model_validate_json(clip_norm))
        if self._clock.is_virtual:
            # Time is written with a round; between two rounds the assignments tell how far it had come.
            self._clock.advance(max([state.clock_now, *(r.issued_at for r in live)]))
        self._written = self._flushed = state
        self.halted, self.divergence_json = state.halted, state.divergence_json
        self.engine = RoundEngine.restore(
            self._policy,
            live,
            virtual_time=self._clock.is_virtual,
            version=latest.version,
            next_number=self._first_new,
            opened_at=state.opened_at,
            invitations=state.invitations,
            halted=state.halted is not None,
            tolerance=self._tolerance,
            given_back=given_back,
        )
        self.model, self._newest = self.load_model(latest), latest
        self.optimizer = self._load_optimizer(latest)
        self.correction = self._load_correction()

    def selection(self) -> AtCheckIn:
        """Who is given work, from what is remembered now; a reload makes it anew."""
        settings = self.task.settings
        participations = None
        if settings.privacy.max_participations is not None:
            with self.db.connect() as connection:
                participations = database.counted_participations(connection)
        key = simulation_key(settings.seed)
        if self._history is not None and not self._clock.is_virtual:
            key = bytes.fromhex(self._selection_key)
        return AtCheckIn(settings, self._history, KeyedTies(key, self.task.task_id), participations)

    def _tolerance(self, round_id: int) -> int:
        return self.task.settings.staleness.tolerance(round_id)

    def flush(self, connection: Connection) -> None:
        """Write what the engine changed since the last flush that became durable, after the blobs that it names."""
        self.blobs.sync()
        changes = self.engine.take_changes()
        if changes:
            database.save_assignments(connection, changes, self._first_new)
        if self._history is not None:
            database.save_device_history(connection, *self._history.take_changes())
        state = replace(
            self._written,
            invitations=self.engine.invitations,
            opened_at=self.engine.opened_at,
            halted=self.halted,
            divergence_json=self.divergence_json,
        )
        if self._clock.is_virtual and state.opened_at != self._written.opened_at:
            state = replace(state, clock_now=self._clock.now())
        if state != self._written:
            database.save_task(connection, state)
        self._flushed = state

    def flushed(self) -> None:
        """The last flush is durable."""
        self._written = self._flushed
        self._first_new = self.engine.next_number

    def commit_round(self, closing: Closing, outcome: RoundOutcome) -> list[str]:
        """Make a closed buffer's model, state and row durable, in one transaction.

        Repeating it after a crash writes the same bits: blobs are named by their content.

        Returns:
            Keys of the blobs that no later step can need.
        """
        model, version = self._store_model(closing.round_id + 1, outcome.optimizer)
        held = [(r, r.report) for r in self.engine.reported if r.report is not None]
        opened_at = self._written.opened_at
        superseded = self.engine.commit(closing, halt=outcome.halted is not None)
        if self._history is not None:
            remember(self._history, closing.counted, closing.round_id)
        self.halted, self.divergence_json = outcome.halted, outcome.divergence_json
        measurements = dict(outcome.measurements)
        if outcome.step is not None:
            measurements[_STEP] = self._store_step(outcome.step)
        with self.db.begin() as connection:
            previous = database.model_version(connection, closing.round_id).state_sha256
            database.save_model(connection, version)
            database.save_round(connection, self._row(closing, opened_at, superseded, measurements))
            if self.task.sharing is not None:
                self.releases.forget(connection, closing.round_id)
            if outcome.clip_norm is not None:
                database.save_note(connection, _CLIP_NORM, outcome.clip_norm.model_dump_json())
            self.flush(connection)
        self.flushed()
        self.task.current.begin(outcome.clip_norm)
        self.model, self.optimizer, self._newest = model, outcome.optimizer, version
        spent = [report.blob_key for record, report in held if self.engine.live(record.assignment_id) is None]
        if previous is not None and previous != version.state_sha256:
            spent.append(_state_key(previous))
        spent += self.releases.committed(closing.round_id)
        if self.correction is not None and outcome.step is not None:
            self.correction.record(outcome.step)
            oldest = self.engine.version - self._memory
            spent += [_state_key(sha256) for sha256 in self._steps(since=oldest - 1, before=oldest)]
        return spent

    def _row(
        self, closing: Closing, opened_at: float, superseded: int, measurements: Mapping[str, Any]
    ) -> database.CommittedRound:
        reports = [r.report for r in closing.counted if r.report is not None]
        return database.CommittedRound(
            round_id=closing.round_id,
            opened_at=opened_at,
            closed_at=closing.closed_at,
            reports=len(reports),
            superseded=superseded,
            total_weight=closing.total_weight,
            bytes_up=sum(self._schema.told_bytes(report.num_bytes) for report in reports),
            train_loss=closing.train_loss,
            accepted_set_sha256=_set_hash(reports),
            measurements_json=json.dumps(measurements, sort_keys=True, separators=(",", ":")),
        )

    def _store_model(self, number: int, optimizer: ServerState) -> tuple[GlobalModel, database.ModelVersion]:
        """Blobs of a model version: what devices download, and what the next step needs."""
        model = encode_model(number, self.task.whole_weights(optimizer), self.task.manifest)
        self.blobs.put_content(model.frame)
        state = optimizer.to_bytes()
        state_sha256 = hashlib.sha256(state).hexdigest()
        self.blobs.put(_state_key(state_sha256), state)
        control = optimizer.tensors.get(CONTROL)
        control_sha256 = None if control is None else self.blobs.put_content(encode_control(control))
        return model, database.ModelVersion(
            number, model.sha256, self._clock.now(), state_sha256=state_sha256, control_sha256=control_sha256
        )

    def _load_optimizer(self, version: database.ModelVersion) -> ServerState:
        if version.state_sha256 is None:
            # Written before optimizers had a state: it begins with this model.
            return self.task.initial_state(self.model.weights)
        data = self.blobs.get(_state_key(version.state_sha256))
        if hashlib.sha256(data).hexdigest() != version.state_sha256:
            raise StorageUnavailable(f"the optimizer's state of model version {version.version} is damaged on disk")
        return ServerState.from_bytes(data)

    def _store_step(self, step: npt.NDArray[np.float64]) -> str:
        data = encode_frame({_STEP: step})
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs.put(_state_key(sha256), data)
        return sha256

    @property
    def _memory(self) -> int:
        """Rounds back that a stale update can reach."""
        return self.task.settings.staleness.max_staleness

    def _load_correction(self) -> DelayCorrection | None:
        damping = self.task.settings.delay_damping
        if damping is None:
            return None
        correction = DelayCorrection(damping=damping, max_staleness=self._memory)
        for sha256 in self._steps(since=self.engine.version - self._memory):
            frame = decode_frame(self.blobs.get(_state_key(sha256)), FrameLimits(max_bytes=2**40))
            correction.record(cast("npt.NDArray[np.float64]", frame.tensors[_STEP]))
        return correction

    def _steps(self, *, since: int = 0, before: int | None = None) -> list[str]:
        """Hashes of the applied aggregates that the rounds of a range recorded, oldest first."""
        with self.db.connect() as connection:
            recorded = database.load_measurements(connection, max(0, since), before)
        found = (json.loads(text).get(_STEP) for text in recorded)
        return [sha256 for sha256 in found if sha256 is not None]

    # --- reading -----------------------------------------------------------------------------------------

    def find(self, assignment_id: str, device_id: str) -> AssignmentRecord:
        """An assignment of this device, live or over.

        Raises:
            UnknownAssignment: There is none.
        """
        record = self.engine.live(assignment_id)
        if record is None:
            with self.db.connect() as connection:
                record = database.load_assignment(connection, assignment_id)
        if record is None or record.device_id != device_id:
            raise UnknownAssignment(f"no assignment {assignment_id} belongs to this device")
        return record

    def encoded(self, record: AssignmentRecord, envelope: ReportEnvelope) -> EncodedUpdate:
        """A report's update with what this server's own record says of it.

        Raises:
            ProtocolError: The report contradicts the record or the task.
        """
        return encoded_update(
            envelope,
            self._schema,
            number=record.number,
            weight=record.weight,
            seed=self.task.compression_seed(record),
        )

    def opened(self, record: AssignmentRecord, envelope: ReportEnvelope) -> Update | None:
        """A report's update, checked; None where it is shared, so that only its form can be.

        Raises:
            ProtocolError: The refusal, by its class.
        """
        if self._schema.layout is not None:
            sealed_shares(envelope, self._schema, seed=self.task.compression_seed(record))
            return None
        return self.task.pipeline.open(self.encoded(record, envelope))

    def load_update(self, record: AssignmentRecord) -> Update:
        """A report's update, read back from its blob and checked again.

        Raises:
            StorageUnavailable: It is missing or damaged.
        """
        return self.task.pipeline.open(self.encoded(record, self._load_report(record)))

    def load_shares(self, record: AssignmentRecord) -> list[memoryview]:
        """The sealed shares of a report, read back from its blob.

        Raises:
            StorageUnavailable: It is missing or damaged.
        """
        return sealed_shares(self._load_report(record), self._schema, seed=self.task.compression_seed(record))

    def _load_report(self, record: AssignmentRecord) -> ReportEnvelope:
        if record.report is None:
            raise StorageUnavailable(f"assignment {record.assignment_id} has no report to read back")
        body = self.blobs.get(record.report.blob_key)
        if hashlib.sha256(body).hexdigest() != record.report.sha256:
            raise StorageUnavailable(f"report {record.report.report_id} is damaged on disk")
        return open_report(body, self._schema)

    def load_model(self, version: database.ModelVersion) -> GlobalModel:
        """A model version's weights."""
        frame = bytes(self.blobs.get_content(version.sha256))
        return decode_model(version.version, frame, self.task.manifest)

    def version(self, number: int) -> database.ModelVersion:
        """A model version's row."""
        if number != self._newest.version:
            with self.db.connect() as connection:
                return database.model_version(connection, number)
        return self._newest

    def _delete_orphans(self) -> None:
        """What was stored but never accepted, or not deleted before the last process died."""
        wanted = {r.report.blob_key for r in self.engine.reported if r.report is not None}
        if self._newest.state_sha256 is not None:
            wanted.add(_state_key(self._newest.state_sha256))
        wanted |= {_state_key(sha256) for sha256 in self._steps(since=self.engine.version - self._memory)}
        for prefix in (_REPORTS, _STATES):
            for key in self.blobs.keys(prefix):
                if key not in wanted:
                    self.blobs.delete(key)
        self.releases.delete_orphans()


def _state_key(sha256: str) -> str:
    """Key of an optimizer's state: not among the blobs that anybody may download by their hash."""
    return f"{_STATES}/{sha256}"


def _set_hash(reports: Sequence[ReportFile]) -> str:
    """Identity of an accepted set: independent of the order of arrival."""
    lines = sorted(f"{r.report_id} {r.sha256}" for r in reports)
    return hashlib.sha256("\n".join(lines).encode("ascii")).hexdigest()


def _differences(old_json: str, new_json: str) -> list[str]:
    old, new = json.loads(old_json), json.loads(new_json)
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
