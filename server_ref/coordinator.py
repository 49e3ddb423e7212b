"""The coordinator: the round engine, the stores and the sum, joined. All calls are safe from any thread.

Every change goes through the writer's thread: an operation moves the engine, the batch's transaction makes the move
durable, then futures resolve, then the buffer closes if it can. After a crash ``start`` rebuilds the same state from
the tables and blobs, and closing again reaches the same bits.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from client_sdk.protocol.errors import (
    DuplicateReport,
    MalformedMessage,
    ProtocolError,
    ReportMismatch,
    UnknownBlob,
    UnknownDevice,
)
from client_sdk.protocol.messages import (
    Assigned,
    Assignment,
    CheckInReply,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    Finished,
    ModelReply,
    ReportReply,
    RetryWindow,
    Wait,
)
from client_sdk.protocol.signing import device_id_of
from server_ref import status
from server_ref.aggregation.batch import Update
from server_ref.assignments import AssignmentRecord, Closing, ReportFile, Waiting
from server_ref.background import Background
from server_ref.buffers import Buffers
from server_ref.checkin import AtCheckIn
from server_ref.clock import Clock
from server_ref.closing import AWAITED, close_buffer
from server_ref.config import ServerConfig
from server_ref.durable import DurableState
from server_ref.evaluation import Evaluator
from server_ref.metrics import Metrics
from server_ref.postponed import Postponed
from server_ref.private_buffer import Buffer
from server_ref.recipe import max_payload_bytes
from server_ref.reports import ReportSchema, open_report
from server_ref.server_identity import KEY_FILE, ServerIdentity
from server_ref.store import database
from server_ref.store.writer import GroupCommitWriter
from server_ref.task import Task, load_task
from server_ref.upload_store import UploadStore
from server_ref.uploads import Uploads

_log = logging.getLogger("pocketfed.coordinator")
_SHA256 = re.compile("[0-9a-f]{64}")


class Coordinator:
    """One task's coordinator over one data directory.

    Args:
        config: Checked configuration.
        clock: Wall clock, or the virtual one of a simulation.
        new_id: Source of 128-bit ids, hex; assignment ids need not be secret, only unique.
        evaluator: Scores new models; None for no evaluation.
        on_event: Called with the name of each durable step, in the thread that made it. For logs and fault tests.
    """

    def __init__(
        self,
        config: ServerConfig,
        clock: Clock,
        new_id: Callable[[], str],
        *,
        evaluator: Evaluator | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self.task: Task = load_task(config.task)
        self._clock = clock
        self._new_id = new_id
        self._on_event = on_event or (lambda _name: None)
        self._lock = threading.RLock()
        manifest = self.task.manifest
        self._schema = ReportSchema(
            update_size=self.task.pipeline.entry.size,
            parameter_table_sha256=manifest.parameter_table_sha256,
            kind=self.task.kind,
            plan=config.task.plan,
            compression=self.task.compression,
            max_payload_bytes=max_payload_bytes(config.task, manifest, self.task.sharing),
            max_header_bytes=config.max_header_bytes,
            withholds_loss=config.task.withholds_loss,
            layout=None if self.task.sharing is None else self.task.sharing.layout,
            private=self.task.privacy is not None,
        )
        self._state = DurableState(
            config.data_dir,
            self.task,
            policy=config.task.policy(),
            schema=self._schema,
            clock=clock,
            quota_bytes=config.blob_quota_bytes,
        )
        self.uploads = Uploads(UploadStore(config.data_dir / "uploads", config.upload_bytes), self)
        self.identity, new_key = ServerIdentity.open(config.data_dir)
        if new_key:
            _log.warning("a new key for signing replies is in %s", config.data_dir / KEY_FILE)
        self._writer = GroupCommitWriter(self._state.db, self)
        self._background = Background(evaluator, self._evaluated, self._state.blobs.delete)
        self._buffers = Buffers(config, self.task, self._state)
        self._buffer: Buffer
        self._postponed = Postponed(lambda: self._writer.submit(lambda _connection: None))
        self._to_fold: list[tuple[AssignmentRecord, Update]] = []
        self._batch_ids: dict[str, str] = {}
        self._deferred: list[tuple[str, CheckInRequest, Future[CheckInReply]]] = []
        self._devices: dict[str, tuple[str, str]] = {}
        self._selection: AtCheckIn

    # --- life --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the data directory's task, or begin it; then accept calls.

        Raises:
            ConfigurationError: The directory belongs to a different task.
        """
        self._state.open()
        self._buffer = self._buffers.open()
        self._selection = self._state.selection()
        self._writer.start()
        self._background.start()
        with self._state.db.connect() as connection:
            for version in database.unevaluated_models(connection):
                self._background.evaluate(version.version, self._state.load_model(version).weights)
        self.uploads.prune()
        # A buffer that was full when the last process died closes now.
        self._writer.submit(lambda _connection: None).result()
        _log.info(
            "replies are signed by the key %s; a device that is given it trusts no other", self.identity.public_key
        )
        manifest, engine = self.task.manifest, self._state.engine
        _log.info(
            "task %s: %s with %d parameters, model version %d of %d, %d reports a round",
            self.task.task_id,
            manifest.model_name,
            manifest.num_parameters,
            engine.version,
            engine.policy.rounds,
            engine.policy.buffer_size,
        )

    def stop(self) -> None:
        """Finish what is queued and close the stores."""
        self._postponed.stop()
        self._background.stop()
        self._writer.stop()
        self._buffers.close()
        self._state.db.dispose()

    @property
    def max_report_bytes(self) -> int:
        """Largest report body that can be one of this task's."""
        return self._schema.max_bytes

    # --- what devices ask --------------------------------------------------------------------------------

    def enrol(self, request: EnrolRequest) -> Future[EnrolReply]:
        """Make a device known. Its id follows from its key, so repeating it changes nothing."""
        device_id = device_id_of(bytes.fromhex(request.public_key))

        def run(connection: Connection) -> EnrolReply:
            database.enrol(connection, device_id, request.public_key, request.tier.value, self._clock.now())
            return EnrolReply(device_id=device_id, server_key=self.identity.public_key)

        def remember(done: Future[EnrolReply]) -> None:
            if not done.cancelled() and done.exception() is None:
                with self._lock:
                    self._devices[device_id] = (request.public_key, request.tier.value)

        future = self._writer.submit(run)
        future.add_done_callback(remember)
        return future

    def device(self, device_id: str) -> tuple[str, str]:
        """Public key (hex) and tier of a device.

        Raises:
            UnknownDevice: Never enrolled here.
        """
        with self._lock:
            known = self._devices.get(device_id)
        if known is None:
            with self._state.db.connect() as connection:
                known = database.load_device(connection, device_id)
            if known is None:
                raise UnknownDevice(f"device {device_id} is not enrolled here")
            with self._lock:
                self._devices[device_id] = known
        return known

    def check_in(self, device_id: str, request: CheckInRequest) -> Future[CheckInReply]:
        """Offer work to a device.

        The future fails with MalformedMessage if the request's idea of time is not the server's.
        """
        reply: Future[CheckInReply] = Future()
        if (request.virtual is not None) != self._clock.is_virtual:
            kind = "virtual" if self._clock.is_virtual else "wall"
            reply.set_exception(MalformedMessage(f"this server runs on the {kind} clock"))
            return reply
        self._submit_check_in(device_id, request, reply)
        return reply

    def awaits(self, device_id: str, assignment_id: str, report_id: str) -> bool:
        """Whether this report may still come; False where this very one was accepted.

        Raises:
            ProtocolError: It would be refused, whatever it says.
        """
        return self._is_new(self._state.find(assignment_id, device_id), report_id)

    def _is_new(self, record: AssignmentRecord, report_id: str) -> bool:
        with self._lock:
            if self._state.engine.is_repetition(record, report_id):
                return False
            self._state.engine.check_fresh(record, self._clock.now())
            return True

    def report(
        self, device_id: str, report_id: str, body: bytes | memoryview, *, file: Path | None = None
    ) -> Future[ReportReply]:
        """Take a report: check it, store it, accept it. Runs in the caller's thread up to the last step.

        Args:
            device_id: Who sent it.
            report_id: Under which id.
            body: Its bytes.
            file: Where they are, flushed, on the disk of the data directory: then they are not written again.

        Raises:
            ProtocolError: The refusal, by its class.
        """
        try:
            envelope = open_report(body, self._schema)
            facts = envelope.facts
            if facts.report_id != report_id:
                raise ReportMismatch("the report id in the frame is not that of the request")
            record = self._state.find(facts.assignment_id, device_id)
            if not self._is_new(record, report_id):
                self.metrics.reports.labels("repeated").inc()
                return _resolved(_accepted(report_id, record))
            if int(facts.model_version) != record.model_version:
                raise ReportMismatch(
                    f"assignment {record.assignment_id} is for model version {record.model_version}, "
                    f"the report says {facts.model_version}"
                )
            update = self._state.opened(record, envelope)
            sha256 = hashlib.sha256(body).hexdigest()
            stored = ReportFile(report_id, sha256, len(body), envelope.train_loss)
            if file is None:
                self._state.blobs.put(stored.blob_key, bytes(body))
            else:
                self._state.blobs.put_file(stored.blob_key, file)
            self._on_event("report-stored")
            return self._writer.submit(
                lambda connection: self._accept(connection, record.assignment_id, device_id, stored, update)
            )
        except ProtocolError as e:
            self.metrics.reports.labels(e.slug).inc()
            raise

    def abandon(self, device_id: str, assignment_id: str) -> Future[None]:
        """Take an assignment back from a device that cannot finish it."""
        self._state.find(assignment_id, device_id)
        self.uploads.store.drop(device_id, assignment_id)

        def run(_connection: Connection) -> None:
            with self._lock:
                self._state.engine.abandon(assignment_id)

        return self._writer.submit(run)

    # --- what anybody may read ---------------------------------------------------------------------------

    def latest_model(self) -> ModelReply:
        """The newest model, for a device that adapts or serves it; never waits."""
        task, model = self.task, self._state.model
        return ModelReply(
            task_id=task.task_id,
            model_version=model.version,
            model_sha256=model.sha256,
            program_sha256=task.manifest.program_sha256,
            manifest_sha256=task.manifest_sha256,
            parameter_table_sha256=task.manifest.parameter_table_sha256,
            plan=task.settings.plan,
        )

    def current_model(self, sha256: str) -> bytes | None:
        """The newest model's bytes, if that is what the hash names; never waits."""
        model = self._state.model
        return model.frame if sha256 == model.sha256 else None

    def blob(self, sha256: str) -> bytes:
        """A model, program or manifest by content hash, read from disk.

        Raises:
            UnknownBlob: No such blob.
        """
        if _SHA256.fullmatch(sha256) is None:
            raise UnknownBlob("a blob's name is its SHA-256 in lower-case hex")
        return bytes(self._state.blobs.get_content(sha256))

    def describe(self) -> dict[str, Any]:
        """The task and where it stands."""
        with self._lock:
            found = status.describe(self._state, embedded=self.config.aggregators.mode == "embedded")
        return found | {"server_key": self.identity.public_key}

    def history(self, since: int) -> list[dict[str, Any]]:
        """Committed rounds from ``since`` on, oldest first."""
        return status.history(self._state, since)

    def is_ready(self) -> bool:
        """Whether the database answers."""
        with self._state.db.connect() as connection:
            return database.load_task(connection) is not None

    def refresh_metrics(self) -> None:
        """Bring the gauges up to date, for a scrape."""
        with self._lock:
            self.metrics.outstanding.set(self._state.engine.outstanding)
            self.metrics.buffered.set(len(self._state.engine.reported))
            self.metrics.round.set(self._state.engine.version)
            self.metrics.halted.set(self._state.halted is not None)
        with self._state.db.connect() as connection:
            self.metrics.devices.set(database.count_devices(connection))

    # --- operations, in the writer's thread --------------------------------------------------------------

    def _submit_check_in(self, device_id: str, request: CheckInRequest, reply: Future[CheckInReply]) -> None:
        def run(_connection: Connection) -> CheckInReply | None:
            with self._lock:
                result = self._check_in(device_id, request)
                if result is None:
                    # A buffer closes before this check-in, and its reports are on their way: ask again after them.
                    self._deferred.append((device_id, request, reply))
                return result

        def done(operation: Future[CheckInReply | None]) -> None:
            error = operation.exception()
            if error is not None:
                reply.set_exception(error)
                return
            result = operation.result()
            if result is not None:
                reply.set_result(result)

        self._writer.submit(run).add_done_callback(done)

    def _check_in(self, device_id: str, request: CheckInRequest) -> CheckInReply | None:
        engine = self._state.engine
        duration = None
        now = self._clock.now()
        if request.virtual is not None:
            now = self._clock.advance(request.virtual.now_s)
            duration = request.virtual.duration_s
            if engine.close_pending(now):
                return None
        if engine.finished:
            return CheckInReply(reply=Finished(model_version=engine.version, halted=self._state.halted is not None))
        tier = self.device(device_id)[1]
        if not self._selection.admits(device_id, engine, now, num_samples=request.num_samples, tier=tier):
            return CheckInReply(reply=Wait(reason="not-selected", retry=self._retry()))
        before = engine.next_number
        found = engine.check_in(device_id, request.num_samples, now, self._new_id, duration_s=duration)
        if isinstance(found, Waiting):
            return CheckInReply(reply=Wait(reason=found.reason, retry=self._retry()))
        if engine.next_number > before:
            self._selection.given(device_id, engine.version)
            self.metrics.assignments.labels(tier).inc()
        return CheckInReply(reply=Assigned(assignment=self._offer(found, now)))

    def _retry(self) -> RetryWindow:
        return RetryWindow(min_s=self.config.task.retry_min_s, max_s=self.config.task.retry_max_s)

    def _offer(self, record: AssignmentRecord, now: float) -> Assignment:
        version = self._state.version(record.model_version)
        return self.task.assignment(
            record,
            model_sha256=version.sha256,
            control_sha256=version.control_sha256,
            now=now,
            max_report_bytes=self._schema.max_bytes,
            secure=self._buffers.announced,
        )

    def _accept(
        self, connection: Connection, assignment_id: str, device_id: str, file: ReportFile, update: Update | None
    ) -> ReportReply:
        with self._lock:
            record = self._state.find(assignment_id, device_id)
            try:
                self._check_new_id(connection, record, file.report_id)
                accepted = self._state.engine.report(record, file, self._clock.now())
            except ProtocolError as e:
                self.metrics.reports.labels(e.slug).inc()
                self._background.delete(file.blob_key)
                raise
            if accepted:
                self._batch_ids[file.report_id] = assignment_id
                if update is not None:
                    self._to_fold.append((record, update))
                self.metrics.reports.labels("accepted").inc()
                self.metrics.report_bytes.inc(self._schema.told_bytes(file.num_bytes))
                self.metrics.dense_bytes.inc(4 * self._schema.update_size)
            elif record.report is not None and record.report.blob_key != file.blob_key:
                self._background.delete(file.blob_key)
            return _accepted(file.report_id, record)

    def _check_new_id(self, connection: Connection, record: AssignmentRecord, report_id: str) -> None:
        """Refuse the id of another assignment's report: the table would, and everybody in the batch with it."""
        holder = self._batch_ids.get(report_id) or database.assignment_of_report(connection, report_id)
        if holder not in {None, record.assignment_id}:
            raise DuplicateReport(f"report id {report_id} was used before: draw a new one")

    # --- the writer's hooks ------------------------------------------------------------------------------

    def flush(self, connection: Connection) -> None:
        """Write what this batch changed."""
        with self._lock:
            self._state.flush(connection)

    def after_commit(self) -> None:
        """Fold what is durable now, close the buffer if it can close, and answer the check-ins that waited."""
        with self._lock:
            self._state.flushed()
            folding, self._to_fold = self._to_fold, []
            self._batch_ids.clear()
        self._on_event("batch-committed")
        version = self._state.engine.version
        for record, update in folding:
            self._buffer.fold(record, update, version)
            self._on_event("report-folded")
        if not self._close_what_is_full():
            return
        with self._lock:
            if self._state.engine.close_pending(self._clock.now()):
                return
            deferred, self._deferred = self._deferred, []
        for device_id, request, reply in deferred:
            self._submit_check_in(device_id, request, reply)

    def reload(self) -> None:
        """Forget what was not durable; the sum is rebuilt when a buffer closes."""
        with self._lock:
            self._state.reload()
            self._selection = self._state.selection()
            self._buffer.reset()
            self._to_fold.clear()
            self._batch_ids.clear()

    def _close_what_is_full(self) -> bool:
        """Close buffers as long as one is full; False where that has to wait for aggregators."""
        try:
            while (closing := self._state.engine.closing(self._clock.now())) is not None:
                if self._postponed.waiting:
                    return False
                self._close(closing)
                self._postponed.done()
        except AWAITED as e:
            _log.warning("the round closes later: %s", e)
            self._postponed.again()
            return False
        return True

    def _close(self, closing: Closing) -> None:
        """Turn a full buffer into the next model.

        Only this thread changes the state, so that nobody who reads it has to wait for the sum: aggregators may take
        minutes to say that they do not answer.
        """
        started = time.perf_counter()
        outcome = close_buffer(self.task, self._state, self._buffer, closing)
        self._on_event("buffer-summed")
        with self._lock:
            spent = self._state.commit_round(closing, outcome)
            self._buffer.reset()
            self._selection.record(closing.counted)
            model = self._state.model
        for key in spent:
            self._background.delete(key)
        self.uploads.prune()
        self._background.evaluate(model.version, model.weights)
        self.metrics.commit_seconds.observe(time.perf_counter() - started)
        self.metrics.observe_round(outcome.measurements)
        self._on_event("round-committed")
        _log.info("round %d: %d reports made model %s", closing.round_id, len(closing.counted), model.sha256[:12])
        if outcome.halted is not None:
            _log.error("the task is halted: %s", outcome.halted)

    def _evaluated(self, version: int, accuracy: float | None, loss: float) -> None:
        if accuracy is None:
            self.metrics.evaluation_failures.inc()
            return
        self.metrics.accuracy.set(accuracy)
        self.metrics.loss.set(loss)
        self._writer.submit(lambda connection: database.save_evaluation(connection, version, accuracy, loss))


def _accepted(report_id: str, record: AssignmentRecord) -> ReportReply:
    return ReportReply(report_id=report_id, assignment_id=record.assignment_id)


def _resolved(reply: ReportReply) -> Future[ReportReply]:
    future: Future[ReportReply] = Future()
    future.set_result(reply)
    return future
