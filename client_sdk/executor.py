"""Does what a session asks for: the only place where its actions meet the network, the disk and the program."""

from __future__ import annotations

import hashlib
import logging

from client_sdk import events
from client_sdk.blobs import Buffer
from client_sdk.errors import (
    BundleMismatch,
    DeviceError,
    IllegalTransition,
    Interrupted,
    PrivacyRefusal,
    StateDirUnusable,
    TrainingPaused,
)
from client_sdk.memory import DeviceMemory
from client_sdk.power import PauseReason
from client_sdk.protocol.errors import (
    ConfigurationError,
    LeaseExpired,
    MemoryBudgetExceeded,
    NotEnoughExamples,
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
from client_sdk.report_maker import ReportMaker
from client_sdk.reports import Report, dense_bytes, is_report_of, keeps_memory
from client_sdk.session import DeviceSession
from client_sdk.session_state import (
    PAUSABLE,
    Abandon,
    AbandonReason,
    Action,
    CheckConditions,
    CheckIn,
    Discard,
    Download,
    Enrol,
    Phase,
    Sleep,
    Stop,
    Train,
    Upload,
)
from client_sdk.stopping import Stopper
from client_sdk.surroundings import Surroundings
from client_sdk.training_loop import APP_REASON
from client_sdk.trust import is_trusted

_log = logging.getLogger(__name__)

MAX_MANIFEST_BYTES = 4 * 2**20
# How soon an ineligible device looks again whether it may work.
_LOOK_AGAIN_S = (30.0, 300.0)
# Failures that another model or another plan may not bring again. All others lie in the device, its data or the task.
_PASSING = (TrainingDiverged, ProgramExecutionError, UpdateOutOfRange, MemoryBudgetExceeded, NotEnoughExamples)


class ActionExecutor:
    """Executes a session's actions one by one and saves its state after each.

    Attributes:
        around: What the actions meet.
        session: The machine; replaceable between two actions.
        cause: The last error, which explains why an assignment was dropped.
        held_back: Why the last action was not done: the device's conditions, or the app's. None where it was.
    """

    def __init__(self, around: Surroundings, session: DeviceSession) -> None:
        self.around = around
        self.session = session
        self.cause: PocketfedError | None = None
        self.held_back: TrainingPaused | None = None
        self._partial: dict[str, bytearray] = {}
        self._fetched: dict[str, Buffer] = {}
        self._sealed: tuple[str, Report] | None = None
        self._made: tuple[str, Report, DeviceMemory | None] | None = None
        self._reports = ReportMaker(around)

    def execute(
        self, action: Action, stop: Stopper, virtual: VirtualTiming | None = None
    ) -> Assigned | Wait | Finished | None:
        """Do one action, tell the session, save it.

        Args:
            action: The session's ``next_action()``; not ``Stop``.
            stop: Ends a wait, and training between two calls of the program.
            virtual: Simulated time of a check-in.

        Returns:
            The server's answer where the action was a check-in that got one.

        Raises:
            Interrupted: ``stop`` was set; the session stands where it stood.
            StateDirUnusable: The state could not be saved.
        """
        reply = None
        self.held_back = None
        if isinstance(action, Download | Train) and self._lease_is_over():
            self._drop(LeaseExpired("the lease ended before the report was ready"))
        elif isinstance(action, PAUSABLE) and self._is_paused(action):
            pass
        elif isinstance(action, Enrol | CheckIn | Download | Upload | Abandon):
            reply = self._try_remotely(action, virtual)
        else:
            self._do_locally(action, stop)
        self.save()
        return reply

    def save(self) -> None:
        """Make the session's state durable."""
        self.around.store.save_session(self.session.state)

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
                    self.around.transport.abandon(assignment_id, AbandonRequest(reason=reason))
                    self.session.on_abandoned()
        except StateDirUnusable:
            raise
        except (ProtocolError, DeviceError) as e:
            if not isinstance(action, Abandon):  # what led to abandoning says more
                self.cause = e
            self.session.on_failure(e)
        return None

    def _is_paused(self, action: Download | Train | Upload) -> bool:
        """Pause a step that the app or the device's conditions do not allow now."""
        own = self.around.conditions()
        if own is not None:
            self._pause(action, TrainingPaused(own, reason=APP_REASON))
            return True
        power = self.around.power
        if power is None:
            return False
        # Training is the dear step, and begins anew after a pause: it needs what a start needs.
        verdict = power.start_verdict() if isinstance(action, Train) else power.continue_verdict()
        # A report that is ready costs little to send, and much to lose: the network alone holds it back.
        if verdict.allowed or (isinstance(action, Upload) and verdict.reason is not PauseReason.NETWORK):
            return False
        self._pause(action, TrainingPaused(verdict.detail, reason=str(verdict.reason)))
        return True

    def _pause(self, action: Download | Train | Upload, why: TrainingPaused) -> None:
        step = {Download: "download", Train: "training", Upload: "upload"}[type(action)]
        self.held_back = why
        self.around.on_event(events.Paused(step, why.reason, str(why)))
        self.session.on_paused(str(why), _LOOK_AGAIN_S)

    def _do_locally(self, action: CheckConditions | Train | Discard | Sleep | Stop, stop: Stopper) -> None:
        match action:
            case CheckConditions():
                self._check_conditions()
            case Train():
                self._train(action, stop)
            case Discard():
                self._discard(action)
            case Sleep():
                self._sleep(action, stop)
            case Stop():
                raise IllegalTransition("Stop is for whoever drives the session")

    def _lease_is_over(self) -> bool:
        return self.session.state.is_lease_over(self.around.clock())

    def _check_lease(self) -> None:
        if self._lease_is_over():
            raise LeaseExpired("the lease ended before the report was ready")

    def _check_conditions(self) -> None:
        own = self.around.conditions()
        why = None if own is None else TrainingPaused(own, reason=APP_REASON)
        if why is None and self.around.power is not None:
            verdict = self.around.power.start_verdict()
            why = None if verdict.allowed else TrainingPaused(verdict.detail, reason=str(verdict.reason))
        if why is None:
            self.session.on_eligible()
        else:
            self.held_back = why
            self.session.on_ineligible(str(why), _LOOK_AGAIN_S)

    def _enrol(self) -> None:
        identity = self.around.store.identity
        tier = self.around.profile.device_type
        self.around.transport.enrol(EnrolRequest(public_key=identity.public_key.hex(), tier=tier))
        self.session.on_enrolled()
        self.around.on_event(events.Enrolled(identity.device_id))

    def _check_in(self, virtual: VirtualTiming | None) -> Assigned | Wait | Finished:
        samples = len(self.around.data[0])
        if self.around.local_privacy is not None:
            samples = self.around.local_privacy.told_samples(samples)
        request = CheckInRequest(num_samples=samples, virtual=virtual)
        reply = self.around.transport.check_in(request)
        if isinstance(reply, Assigned):
            self.around.on_event(events.CheckedIn(reply.assignment))
        # A virtual lease says nothing about this machine's clock.
        self.session.on_check_in(reply, now=self.around.clock() if virtual is None else None)
        return reply

    def _download(self, sha256: str) -> None:
        assignment = self.session.state.assignment
        is_manifest = assignment is not None and sha256 == assignment.manifest_sha256
        data, size = self.fetch(sha256, MAX_MANIFEST_BYTES if is_manifest else self.around.max_blob_bytes)
        self._fetched[sha256] = data
        self.session.on_blob(sha256)
        self.around.on_event(events.Downloaded(sha256, size))

    def fetch(self, sha256: str, max_bytes: int) -> tuple[Buffer, int]:
        """A blob, from the device's cache or from the server, and how many bytes of it had to come.

        Raises:
            ProtocolError, DeviceError: It did not come; what arrived of it is where the next attempt goes on.
            StateDirUnusable: The state cannot be read.
        """
        data = self._fetched.get(sha256)  # where the disk would not keep it
        if data is None:
            data = self.around.store.blob(sha256)
        if data is not None:
            return data, 0
        # What a cut connection leaves here is where the next attempt goes on.
        buffer = self._partial.get(sha256)
        if buffer is None:
            buffer = self._partial[sha256] = self.around.store.arriving(sha256)
        self.around.transport.fetch(sha256, buffer, max_bytes=max_bytes)
        arrived = self._partial.pop(sha256)
        self.around.store.put_blob(sha256, arrived)
        return arrived, len(arrived)

    def _train(self, action: Train, stop: Stopper) -> None:
        try:
            if self.recover_sealed():
                return
            made = self._make(action, stop)
        except (TrainingPaused, LeaseExpired, _BlobLost) as e:
            self._leave(action, e)
        except Interrupted:
            raise
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
            self._seal(action.assignment, action.report_id, *made)
            self._made = None

    def _make(self, action: Train, stop: Stopper) -> tuple[Report, DeviceMemory | None]:
        """The report, made once: if the disk does not take it, making it anew would be charged anew."""
        if self._made is None or self._made[0] != action.report_id:
            made = self._reports.make(action.assignment, action.report_id, self._blob, stop, self._check_lease)
            self._made = (action.report_id, *made)
        return self._made[1:]

    def _leave(self, action: Train, why: TrainingPaused | LeaseExpired | _BlobLost) -> None:
        match why:
            case TrainingPaused():
                self._pause(action, why)
            case LeaseExpired():
                self._drop(why)
            case _:
                self.session.on_blobs_lost()

    def _drop(self, error: PocketfedError) -> None:
        self.cause = error
        self.session.on_assignment_over(str(error))

    def recover_sealed(self) -> bool:
        """Whether an earlier process was killed after its report was durable and before the session said so."""
        state = self.session.state
        if state.phase is not Phase.TRAINING or state.assignment is None or state.report_id is None:
            return False
        sealed = self._usable_report(state.assignment, state.report_id)
        if sealed is None:
            return False
        self.session.on_sealed(hashlib.sha256(sealed).hexdigest())
        return True

    def _seal(self, assignment: Assignment, report_id: str, report: Report, memory: DeviceMemory | None) -> None:
        # In this order: a sealed report may be sent, so it is counted, and what it leaves is there.
        if assignment.secure is not None:
            self.around.store.count_participation(assignment.task_id, assignment.assignment_id)
        if memory is not None:
            self.around.store.stage_memory(memory)
        self.around.store.seal(report_id, report.frame)
        report_sha256 = hashlib.sha256(report.frame).hexdigest()
        # This process need not read and hash again what it has just written.
        self._sealed = (report_sha256, report)
        self.session.on_sealed(report_sha256)
        self._fetched.clear()

    def _usable_report(self, assignment: Assignment, report_id: str) -> Buffer | None:
        """A sealed report that may be sent: whole, ours, to those we trust, and with the memory that it leaves."""
        store = self.around.store
        frame = store.sealed(report_id)
        if frame is None or not is_report_of(frame, assignment, report_id):
            return None
        if not is_trusted(assignment, self.around.trusted):
            return None
        private = self.around.local_privacy
        if private is not None and not private.covers(frame):
            return None
        return frame if not keeps_memory(assignment) or store.has_staged_memory(report_id) else None

    def _blob(self, sha256: str) -> Buffer:
        data = self._fetched.get(sha256)
        if data is None:
            data = self.around.store.blob(sha256)
        assignment = self.session.state.assignment
        if assignment is not None and sha256 == assignment.program_sha256:
            self._fetched.pop(sha256, None)  # about to be loaded: the runtime has its own copy
        if data is None:
            raise _BlobLost
        return data

    def _upload(self, report_id: str) -> None:
        state = self.session.state
        report = None if state.assignment is None else self._sealed_report(state.assignment, report_id)
        if report is None:
            self.around.store.discard(report_id)
            self.session.on_report_lost()
            return
        self.session.on_upload_started()
        self.save()
        self.session.on_uploaded(self.around.transport.upload(report_id, report.frame))
        if self.session.state.accepted and state.assignment is not None:
            size = len(report.frame)
            self.around.on_event(events.Uploaded(report_id, state.assignment, size, report.dense_bytes))

    def _sealed_report(self, assignment: Assignment, report_id: str) -> Report | None:
        """The report that the session has sealed, if it may be sent."""
        report_sha256 = self.session.state.report_sha256
        if self._sealed is not None and self._sealed[0] == report_sha256:
            return self._sealed[1]
        frame = self._usable_report(assignment, report_id)
        if frame is None or hashlib.sha256(frame).hexdigest() != report_sha256:
            return None
        return Report(frame, dense_bytes(frame, assignment, self.around.store.blob(assignment.manifest_sha256)))

    def _sleep(self, action: Sleep, stop: Stopper) -> None:
        now = self.around.clock()
        left_s = action.left_s(now)
        self.session.on_sleep_begun(now + left_s)
        self.save()
        self.around.on_event(events.Waiting(left_s, action.reason))
        if left_s > stop.remaining_s():
            raise Interrupted("the wait is longer than the time that is left")
        self.around.wait(left_s, stop.event)
        if stop.is_set():
            raise Interrupted("interrupted while waiting")
        self.session.on_slept()

    def _discard(self, action: Discard) -> None:
        assignment = self.session.state.assignment
        counts = action.accepted and assignment is not None and keeps_memory(assignment)
        self.around.store.settle_memory(action.report_id, accepted=counts)
        self.around.store.discard(action.report_id)
        self._clear_checkpoints()
        self._made = None
        self._partial.clear()
        self._fetched.clear()
        self._sealed = None
        self.session.on_discarded()
        if not action.accepted and assignment is not None:
            self.around.on_event(events.Dropped(assignment, action.detail))

    def _clear_checkpoints(self) -> None:
        try:
            if self.around.checkpoints is not None:
                self.around.checkpoints.clear()
        except DeviceError as e:  # of no use to anybody, and displaced by those of the next training
            _log.warning("the checkpoints of the assignment stay: %s", e)


class _BlobLost(Exception):
    """A blob left the cache between its download and its use."""
