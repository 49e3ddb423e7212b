"""Does what a session asks for: the only place where its actions meet the network, the disk and the program."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from client_sdk import events
from client_sdk.blobs import Buffer
from client_sdk.data import Examples
from client_sdk.errors import (
    BundleMismatch,
    DeviceError,
    IllegalTransition,
    Interrupted,
    PrivacyRefusal,
    StateDirUnusable,
)
from client_sdk.fulfilment import fulfil
from client_sdk.memory import DeviceMemory
from client_sdk.privacy import LocalPrivacy
from client_sdk.programs import ProgramProvider
from client_sdk.protocol.errors import (
    ConfigurationError,
    LeaseExpired,
    MemoryBudgetExceeded,
    PocketfedError,
    ProgramError,
    ProgramExecutionError,
    ProtocolError,
    TrainingDiverged,
    UpdateOutOfRange,
)
from client_sdk.protocol.messages import (
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInRequest,
    EnrolRequest,
    Finished,
    VirtualTiming,
    Wait,
)
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.program import Program
from client_sdk.reports import Report, dense_bytes, is_report_of, keeps_memory
from client_sdk.session import DeviceSession
from client_sdk.session_state import (
    Abandon,
    AbandonReason,
    Action,
    CheckConditions,
    CheckIn,
    Discard,
    Download,
    Enrol,
    Sleep,
    Stop,
    Train,
    Upload,
)
from client_sdk.store import DeviceStore
from client_sdk.transport import Transport
from client_sdk.trust import TrustedAggregators, check_willing, is_trusted
from client_sdk.watch import WatchedProgram

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_BLOB_BYTES = 256 * 2**20
# How soon an ineligible device looks again whether it may work.
_LOOK_AGAIN_S = (30.0, 300.0)
# Failures that another model or another plan may not bring again. All others lie in the device, its data or the task.
_PASSING = (TrainingDiverged, ProgramExecutionError, UpdateOutOfRange, MemoryBudgetExceeded)

OnEvent = Callable[[events.Event], None]


@dataclass
class Surroundings:
    """What a device works with.

    ``conditions`` says why it may not work now, or None. ``trusted`` are those it sends shares to, and nothing to
    anyone else; None for whomever the server names.
    """

    transport: Transport
    store: DeviceStore
    programs: ProgramProvider
    data: Examples
    tier: DeviceTier
    clock: Callable[[], float]
    wait: Callable[[float, threading.Event], None]
    on_event: OnEvent
    conditions: Callable[[], str | None] = field(default=lambda: None)
    max_blob_bytes: int = MAX_BLOB_BYTES
    trusted: TrustedAggregators | None = None
    local_privacy: LocalPrivacy | None = None


class ActionExecutor:
    """Executes a session's actions one by one and saves its state after each.

    Attributes:
        session: The machine; replaceable between two actions.
        cause: The last error, which explains why an assignment was dropped.
    """

    def __init__(self, around: Surroundings, session: DeviceSession) -> None:
        self._around = around
        self.session = session
        self.cause: PocketfedError | None = None
        self._partial: dict[str, bytearray] = {}
        self._fetched: dict[str, Buffer] = {}
        self._sealed: tuple[str, Report] | None = None

    def execute(
        self, action: Action, stop: threading.Event, virtual: VirtualTiming | None = None
    ) -> Assigned | Wait | Finished | None:
        """Do one action, tell the session, save it.

        Args:
            action: The session's ``next_action()``; not ``Stop``.
            stop: Ends a wait, and training between two steps.
            virtual: Simulated time of a check-in.

        Returns:
            The server's answer where the action was a check-in that got one.

        Raises:
            Interrupted: ``stop`` was set; the session stands where it stood.
            StateDirUnusable: The state could not be saved.
        """
        reply = None
        if isinstance(action, Download | Train) and self._lease_is_over():
            self.cause = LeaseExpired("the lease ended before the report was ready")
            self.session.on_assignment_over(str(self.cause))
        elif isinstance(action, Enrol | CheckIn | Download | Upload | Abandon):
            reply = self._try_remotely(action, virtual)
        else:
            self._do_locally(action, stop)
        self.save()
        return reply

    def save(self) -> None:
        """Make the session's state durable."""
        self._around.store.save_session(self.session.state)

    def _try_remotely(
        self, action: Enrol | CheckIn | Download | Upload | Abandon, virtual: VirtualTiming | None
    ) -> Assigned | Wait | Finished | None:
        try:
            match action:
                case Enrol():
                    self._enrol()
                case CheckIn():
                    return self._check_in(virtual)
                case Download(sha256s=sha256s):
                    self._download(sha256s[0])
                case Upload(report_id=report_id):
                    self._upload(report_id)
                case Abandon(assignment_id=assignment_id, reason=reason):
                    self._around.transport.abandon(assignment_id, AbandonRequest(reason=reason))
                    self.session.on_abandoned()
        except StateDirUnusable:
            raise
        except (ProtocolError, DeviceError) as e:
            if not isinstance(action, Abandon):  # what led to abandoning says more
                self.cause = e
            self.session.on_failure(e)
        return None

    def _do_locally(self, action: CheckConditions | Train | Discard | Sleep | Stop, stop: threading.Event) -> None:
        match action:
            case CheckConditions():
                self._check_conditions()
            case Train(assignment=assignment, report_id=report_id):
                self._train(assignment, report_id, stop)
            case Discard():
                self._discard(action)
            case Sleep(delay_s=delay_s, reason=reason):
                self._sleep(delay_s, reason, stop)
            case Stop():
                raise IllegalTransition("Stop is for whoever drives the session")

    def _lease_is_over(self) -> bool:
        ends_at = self.session.state.lease_ends_at
        return ends_at is not None and self._around.clock() > ends_at

    def _check_conditions(self) -> None:
        reason = self._around.conditions()
        if reason is None:
            self.session.on_eligible()
        else:
            self.session.on_ineligible(reason, _LOOK_AGAIN_S)

    def _enrol(self) -> None:
        identity = self._around.store.identity
        self._around.transport.enrol(EnrolRequest(public_key=identity.public_key.hex(), tier=self._around.tier))
        self.session.on_enrolled()
        self._around.on_event(events.Enrolled(identity.device_id))

    def _check_in(self, virtual: VirtualTiming | None) -> Assigned | Wait | Finished:
        samples = len(self._around.data[0])
        if self._around.local_privacy is not None:
            samples = self._around.local_privacy.told_samples(samples)
        request = CheckInRequest(num_samples=samples, virtual=virtual)
        reply = self._around.transport.check_in(request)
        ends_at = None
        if isinstance(reply, Assigned):
            # A virtual lease says nothing about this machine's clock.
            ends_at = self._around.clock() + reply.assignment.lease_s if virtual is None else None
            self._around.on_event(events.CheckedIn(reply.assignment))
        self.session.on_check_in(reply, lease_ends_at=ends_at)
        return reply

    def _download(self, sha256: str) -> None:
        assignment = self.session.state.assignment
        data = self._around.store.blob(sha256)
        size = 0
        if data is None:
            is_manifest = assignment is not None and sha256 == assignment.manifest_sha256
            limit = MAX_MANIFEST_BYTES if is_manifest else self._around.max_blob_bytes
            # What a cut connection leaves here is where the next attempt goes on.
            buffer = self._partial.setdefault(sha256, bytearray())
            self._around.transport.fetch(sha256, buffer, max_bytes=limit)
            data = self._partial.pop(sha256)
            size = len(data)
            self._around.store.put_blob(sha256, data)
        self._fetched[sha256] = data
        self.session.on_blob(sha256)
        self._around.on_event(events.Downloaded(sha256, size))

    def _train(self, assignment: Assignment, report_id: str, stop: threading.Event) -> None:
        try:
            sealed = self._usable_report(assignment, report_id)
            if sealed is not None:
                # Killed after the report was durable and before the session said so.
                self.session.on_sealed(hashlib.sha256(sealed).hexdigest())
                return
            report, memory = self._make_report(assignment, report_id, stop)
        except Interrupted:
            raise
        except _BlobLost:
            self.session.on_blobs_lost()
        except MemoryError:
            self.session.on_training_failed("no-memory", "the device ran out of memory while it trained")
        except _PASSING as e:
            self.cause = e
            reason: AbandonReason = "no-memory" if isinstance(e, MemoryBudgetExceeded) else "training-failed"
            self.session.on_training_failed(reason, str(e))
        except (ProgramError, ProtocolError, BundleMismatch, PrivacyRefusal, ConfigurationError) as e:
            self.cause = e
            reason = "privacy" if isinstance(e, PrivacyRefusal) else "training-failed"
            self.session.on_training_failed(reason, str(e), error=e)
        else:
            # In this order: a sealed report may be sent, so it is counted, and what it leaves is there.
            if assignment.secure is not None:
                self._around.store.count_participation(assignment.task_id, assignment.assignment_id)
            if memory is not None:
                self._around.store.stage_memory(memory)
            self._around.store.seal(report_id, report.frame)
            report_sha256 = hashlib.sha256(report.frame).hexdigest()
            # This process need not read and hash again what it has just written.
            self._sealed = (report_sha256, report)
            self.session.on_sealed(report_sha256)
            self._fetched.clear()

    def _make_report(
        self, assignment: Assignment, report_id: str, stop: threading.Event
    ) -> tuple[Report, DeviceMemory | None]:
        private = self._around.local_privacy
        check_willing(assignment, self._around.trusted, self._around.store)
        if private is not None:
            private.check(assignment)
        program = self._around.programs.open(assignment, self._blob)
        self._fetched.pop(assignment.program_sha256, None)  # loaded: the runtime has its own copy
        data = self._around.data
        report, memory = fulfil(
            assignment,
            report_id,
            device_id=self._around.store.identity.device_id,
            program=self._watched(program, assignment, len(data[0]), stop),
            read=self._blob,
            data=data,
            former=self._around.store.memory(assignment.task_id) if keeps_memory(assignment) else None,
            local_privacy=private,
        )
        if private is not None:
            private.name(report.frame)
        return report, memory

    def _usable_report(self, assignment: Assignment, report_id: str) -> Buffer | None:
        """A sealed report that may be sent: whole, ours, to those we trust, and with the memory that it leaves."""
        store = self._around.store
        frame = store.sealed(report_id)
        if frame is None or not is_report_of(frame, assignment, report_id):
            return None
        if not is_trusted(assignment, self._around.trusted):
            return None
        private = self._around.local_privacy
        if private is not None and not private.covers(frame):
            return None
        return frame if not keeps_memory(assignment) or store.has_staged_memory(report_id) else None

    def _watched(self, program: Program, assignment: Assignment, samples: int, stop: threading.Event) -> Program:
        plan = assignment.plan
        total = samples * plan.local_epochs
        if plan.max_steps is not None:
            total = min(total, plan.max_steps * plan.batch_size)
        done = 0

        def progress(examples: int, loss: float) -> None:
            nonlocal done
            done += examples
            self._around.on_event(events.TrainingProgress(done, total, loss))

        return WatchedProgram(program, should_stop=stop.is_set, progress=progress)

    def _blob(self, sha256: str) -> Buffer:
        data = self._fetched.get(sha256)
        if data is None:
            data = self._around.store.blob(sha256)
        if data is None:
            raise _BlobLost
        return data

    def _upload(self, report_id: str) -> None:
        state = self.session.state
        report = None if state.assignment is None else self._sealed_report(state.assignment, report_id)
        if report is None:
            self._around.store.discard(report_id)
            self.session.on_report_lost()
            return
        self.session.on_upload_started()
        self.save()
        self.session.on_uploaded(self._around.transport.upload(report_id, report.frame))
        if self.session.state.accepted and state.assignment is not None:
            size = len(report.frame)
            self._around.on_event(events.Uploaded(report_id, state.assignment, size, report.dense_bytes))

    def _sealed_report(self, assignment: Assignment, report_id: str) -> Report | None:
        """The report that the session has sealed, if it may be sent."""
        report_sha256 = self.session.state.report_sha256
        if self._sealed is not None and self._sealed[0] == report_sha256:
            return self._sealed[1]
        frame = self._usable_report(assignment, report_id)
        if frame is None or hashlib.sha256(frame).hexdigest() != report_sha256:
            return None
        return Report(frame, dense_bytes(frame, assignment, self._around.store.blob(assignment.manifest_sha256)))

    def _sleep(self, delay_s: float, reason: str, stop: threading.Event) -> None:
        self._around.on_event(events.Waiting(delay_s, reason))
        self._around.wait(delay_s, stop)
        if stop.is_set():
            raise Interrupted("interrupted while waiting")
        self.session.on_slept()

    def _discard(self, action: Discard) -> None:
        assignment = self.session.state.assignment
        counts = action.accepted and assignment is not None and keeps_memory(assignment)
        self._around.store.settle_memory(action.report_id, accepted=counts)
        self._around.store.discard(action.report_id)
        self._partial.clear()
        self._fetched.clear()
        self._sealed = None
        self.session.on_discarded()
        if not action.accepted and assignment is not None:
            self._around.on_event(events.Dropped(assignment, action.detail))


class _BlobLost(Exception):
    """A blob left the cache between its download and its use."""
