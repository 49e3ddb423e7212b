"""The life of one device, as a state machine without any I/O.

``next_action`` says what to do, the ``on_...`` methods take what came of it. Nothing here waits, sends or writes, so
each arrow can be tried without a network, and a state that was saved at any point goes on in another process.

=============  ===================  ==========================================================
phase          next action          leaves by
=============  ===================  ==========================================================
idle           CheckConditions      eligible -> eligible; ineligible -> pause
eligible       CheckIn              assigned -> assigned; wait -> checked-in; finished -> stop
checked-in     Sleep                slept -> idle
assigned       Download             blob -> downloading
downloading    Download (the rest)  last blob -> training
training       Train                sealed -> sealed; training failed -> abandoning; blobs lost -> assigned
sealed         Upload               upload started -> uploading; report lost -> training
uploading      Upload               uploaded -> done; over -> done (dropped); refused -> abandoning; lost -> training
abandoning     Abandon              abandoned -> done (dropped)
done           Discard              discarded -> idle, or stop
=============  ===================  ==========================================================

Two things lie across the phases: an unenrolled device enrols before its next signed request, and after a transient
failure the session pauses (``Sleep``) and then repeats the same step. Failures in a row are bounded. A download, a
training or an upload that the device's conditions do not allow now is paused in the same way, as often as need be.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from client_sdk.errors import IllegalTransition, InvalidReply, is_transient, retry_window
from client_sdk.protocol.errors import (
    DuplicateReport,
    InvalidUpdate,
    MalformedFrame,
    OversizedBody,
    PocketfedError,
    ReportMismatch,
    StaleReport,
    UnknownAssignment,
    UnknownBlob,
    UnknownDevice,
)
from client_sdk.protocol.messages import Assigned, Assignment, Finished, ReportReply, Wait
from client_sdk.session_state import (
    PAUSABLE,
    REMOTE,
    SIGNED_PHASES,
    WITH_ASSIGNMENT,
    Abandon,
    AbandonReason,
    Action,
    CheckConditions,
    CheckIn,
    Discard,
    Download,
    Enrol,
    Phase,
    RetryPolicy,
    SessionState,
    Sleep,
    Stop,
    Train,
    Upload,
)

# The assignment is over on the server's side: nothing that the device still does with it can count.
_OVER = (StaleReport, DuplicateReport, UnknownAssignment)
# This very report can never be accepted; keeping it would only repeat the refusal.
_REFUSED = (InvalidUpdate, ReportMismatch, MalformedFrame, OversizedBody)


class DeviceSession:
    """The machine: a ``SessionState`` and the rules that change it.

    Guarantees: at most one report id per assignment; a sealed report stays until the server accepted it or refused it
    for good; every sequence of failures ends in a pause or a stop.
    """

    def __init__(
        self,
        state: SessionState,
        *,
        report_id_of: Callable[[str], str],
        rng: random.Random,
        policy: RetryPolicy | None = None,
        max_reports: int | None = None,
    ) -> None:
        """Start from a fresh or a saved state.

        Args:
            state: Where to go on; its counters of failures start anew.
            report_id_of: Assignment id -> report id, always the same (``DeviceIdentity.report_id``).
            rng: Source of jitter; nothing secret depends on it.
            policy: Waits and bounds.
            max_reports: Stop after so many accepted reports, counted from now.
        """
        self._state = state.resumed()
        self._report_id_of = report_id_of
        self._rng = rng
        self._policy = policy or RetryPolicy()
        self._stop: Stop | None = None
        self._stop_after_discard: Stop | None = None
        self._last_report = None if max_reports is None else state.reports + max_reports

    @property
    def state(self) -> SessionState:
        """What to save."""
        return self._state

    def next_action(self) -> Action:
        """What to do now; the same answer until an event comes."""
        state = self._state
        if self._stop is not None:
            return self._stop
        if state.pause is not None:
            pause = state.pause
            return Sleep(pause.min_s, pause.max_s, pause.delay_s, pause.reason, pause.ends_at)
        if not state.enrolled and state.phase in SIGNED_PHASES:
            return Enrol()
        if state.phase is Phase.ELIGIBLE:
            return CheckIn()
        if state.assignment is None or state.report_id is None:
            return CheckConditions()
        return self._assignment_action(state, state.assignment, state.report_id)

    @staticmethod
    def _assignment_action(state: SessionState, assignment: Assignment, report_id: str) -> Action:
        match state.phase:
            case Phase.ASSIGNED | Phase.DOWNLOADING:
                return Download(_missing(state, assignment))
            case Phase.TRAINING:
                return Train(assignment, report_id)
            case Phase.ABANDONING:
                return Abandon(assignment.assignment_id, state.abandon_reason)
            case Phase.DONE:
                return Discard(report_id, state.accepted, state.detail)
            case _:
                return Upload(report_id)

    # --- events ---

    def on_eligible(self) -> None:
        """The device may work now."""
        self._expect(CheckConditions)
        enough = self._last_report is not None and self._state.reports >= self._last_report
        if enough:
            self._stop = Stop("enough-reports", "the number of reports asked for is delivered")
        else:
            self._move(phase=Phase.ELIGIBLE)

    def on_ineligible(self, reason: str, window: tuple[float, float]) -> None:
        """The device may not work now; look again within the window."""
        self._expect(CheckConditions)
        self._move(pause=self._policy.draw(self._rng, 1, window, reason, asked=False))

    def on_paused(self, reason: str, window: tuple[float, float]) -> None:
        """The step in hand may not go on now (battery, heat, network, user); look again within the window.

        It is no failure: what was done so far is kept, and the lease alone bounds how often this may happen.
        """
        if not isinstance(self.next_action(), PAUSABLE):
            raise IllegalTransition(f"{type(self.next_action()).__name__} is not paused: {reason}")
        self._move(pause=self._policy.draw(self._rng, 1, window, reason, asked=False))

    def on_enrolled(self) -> None:
        """The server knows the key. The step that needed it is still to be done."""
        self._expect(Enrol)
        self._move(enrolled=True)

    def on_check_in(self, reply: Assigned | Wait | Finished, *, now: float | None = None) -> None:
        """The check-in's answer.

        Args:
            reply: What the server said.
            now: What the device's clock says, where that clock means anything: the lease runs on it. However long the
                server wants to wait, the device works for ``RetryPolicy.max_lease_s`` at most.
        """
        self._expect(CheckIn)
        match reply:
            case Assigned(assignment=assignment):
                self._move(
                    phase=Phase.ASSIGNED,
                    assignment=assignment,
                    report_id=self._report_id_of(assignment.assignment_id),
                    lease_begun_at=now,
                    lease_ends_at=None if now is None else now + min(assignment.lease_s, self._policy.max_lease_s),
                    attempts=0,
                )
            case Wait(reason=reason, retry=retry):
                window = (retry.min_s, retry.max_s)
                pause = self._policy.draw(self._rng, 1, window, reason, asked=True)
                self._move(phase=Phase.CHECKED_IN, pause=pause, attempts=0)
            case Finished(model_version=version, halted=halted):
                self._move(phase=Phase.IDLE, attempts=0)
                ended = "was halted because it diverged" if halted else "is finished"
                self._stop = Stop("finished", f"the task {ended}; its model has version {version}")

    def on_blob(self, sha256: str) -> None:
        """One blob of the assignment is on the device."""
        self._expect(Download)
        state = self._state
        if state.assignment is None or sha256 not in _missing(state, state.assignment):
            raise IllegalTransition(f"blob {sha256} is not one that the assignment waits for")
        blobs = (*state.blobs, sha256)
        complete = not _missing(state.model_copy(update={"blobs": blobs}), state.assignment)
        self._move(phase=Phase.TRAINING if complete else Phase.DOWNLOADING, blobs=blobs, attempts=0)

    def on_blobs_lost(self) -> None:
        """A blob that was on the device is gone (evicted, damaged): fetch again what is missing."""
        self._expect(Train)
        self._move(phase=Phase.ASSIGNED, blobs=())

    def on_sealed(self, report_sha256: str) -> None:
        """The report is durable on the device."""
        self._expect(Train)
        self._move(phase=Phase.SEALED, report_sha256=report_sha256)

    def on_training_failed(self, reason: AbandonReason, detail: str, *, error: PocketfedError | None = None) -> None:
        """The assignment cannot be fulfilled.

        Args:
            reason: What the server is told.
            detail: What happened, for whoever reads the device's log.
            error: Given where trying another assignment is pointless: the session stops after giving this one back.
        """
        self._expect(Train)
        self._give_up(reason, detail)
        if error is not None:
            self._stop_after_discard = Stop("refused", detail, error)

    def on_upload_started(self) -> None:
        """The report's bytes are about to leave: from here on the server may hold them."""
        self._expect(Upload)
        self._move(phase=Phase.UPLOADING)

    def on_uploaded(self, reply: ReportReply) -> None:
        """The server has the report."""
        self._expect(Upload, Phase.UPLOADING)
        state = self._state
        if state.assignment is None or (reply.report_id, reply.assignment_id) != (
            state.report_id,
            state.assignment.assignment_id,
        ):
            self.on_failure(InvalidReply("the server acknowledged another report than the one that was sent"))
            return
        self._move(
            phase=Phase.DONE, accepted=True, detail="", reports=state.reports + 1, fruitless=0, training_failures=0
        )

    def on_report_lost(self) -> None:
        """The sealed report's bytes are gone or damaged: train again, under the same report id."""
        self._expect(Upload)
        attempts = self._state.attempts + 1
        self._move(phase=Phase.TRAINING, report_sha256=None, attempts=attempts)
        if attempts >= self._policy.max_attempts:
            self._stop = Stop("gave-up", f"the sealed report was lost {attempts} times; is the disk sound?")

    def on_abandoned(self) -> None:
        """The server took the assignment back."""
        self._expect(Abandon)
        self._drop(self._state.detail)

    def on_assignment_over(self, reason: str) -> None:
        """The lease ended, or the caller gives the assignment up without telling anyone (a phone switched off)."""
        if self._state.phase not in WITH_ASSIGNMENT or self._state.phase is Phase.DONE:
            raise IllegalTransition(f"phase {self._state.phase} holds no assignment")
        self._drop(reason)

    def on_discarded(self) -> None:
        """Nothing is left of the assignment."""
        self._expect(Discard)
        self._stop = self._stop_after_discard
        fruitless = self._state.fruitless
        # One lost race is normal (over-selection); a device that loses every race need not hurry into the next.
        pause = (
            self._policy.draw(self._rng, fruitless - 1, None, self._state.detail, asked=False)
            if fruitless > 1
            else None
        )
        self._move(
            phase=Phase.IDLE,
            assignment=None,
            lease_begun_at=None,
            lease_ends_at=None,
            report_id=None,
            report_sha256=None,
            blobs=(),
            accepted=False,
            detail="",
            pause=pause,
            attempts=0,
        )

    def on_sleep_begun(self, ends_at: float) -> None:
        """The wait has begun, and ends then on the device's clock: a process that is killed does not wait anew."""
        self._expect(Sleep)
        pause = self._state.pause
        if pause is not None and pause.ends_at is None:
            self._move(pause=pause.model_copy(update={"ends_at": ends_at}))

    def on_slept(self) -> None:
        """The pause is over."""
        self._expect(Sleep)
        phase = Phase.IDLE if self._state.phase is Phase.CHECKED_IN else self._state.phase
        self._move(phase=phase, pause=None)

    def on_failure(self, error: PocketfedError) -> None:
        """The present action (enrol, check in, download, upload or abandon) failed."""
        action = self.next_action()
        if not isinstance(action, REMOTE):
            raise IllegalTransition(f"{type(action).__name__} cannot fail remotely: {error}")
        if isinstance(error, UnknownDevice) and not isinstance(action, Enrol):
            self._move(enrolled=False)
            self._back_off(error, pause_from=2)
        elif isinstance(action, Upload | Abandon) and isinstance(error, _OVER):
            self._drop(str(error))
        elif isinstance(action, Upload) and isinstance(error, _REFUSED):
            # Another device may have the slot now, not only when the lease ends.
            self._give_up("training-failed", str(error))
            self._stop_after_discard = Stop("refused", str(error), error)
        elif isinstance(action, Download) and isinstance(error, UnknownBlob):
            self._give_up("interrupted", str(error))
        elif is_transient(error):
            self._back_off(error)
        elif isinstance(action, Abandon):
            self._drop(self._state.detail)
        else:
            self._stop = Stop("refused", str(error), error)

    # --- pieces ---

    def _back_off(self, error: PocketfedError, *, pause_from: int = 1) -> None:
        attempts = self._state.attempts + 1
        window = retry_window(error)
        pause = self._policy.draw(self._rng, attempts, window, str(error), asked=window is not None)
        if attempts < self._policy.max_attempts:
            self._move(attempts=attempts, pause=pause if attempts >= pause_from else None)
        elif self._state.phase is Phase.ABANDONING:
            # The lease frees the slot; nothing of ours is lost.
            self._drop(self._state.detail)
        else:
            self._move(attempts=attempts)
            self._stop = Stop("gave-up", f"{attempts} attempts failed; the last one: {error}", error)

    def _give_up(self, reason: AbandonReason, detail: str) -> None:
        failures = self._state.training_failures + 1
        self._move(phase=Phase.ABANDONING, abandon_reason=reason, detail=detail, training_failures=failures, attempts=0)
        if failures >= self._policy.max_training_failures:
            self._stop_after_discard = Stop("gave-up", f"{failures} assignments failed; the last one: {detail}")

    def _drop(self, detail: str) -> None:
        self._move(
            phase=Phase.DONE, accepted=False, detail=detail, fruitless=self._state.fruitless + 1, pause=None, attempts=0
        )

    def _expect(self, action: type[Action], phase: Phase | None = None) -> None:
        present = self.next_action()
        if not isinstance(present, action) or phase not in (None, self._state.phase):
            raise IllegalTransition(
                f"the event belongs to {action.__name__}; the session ({self._state.phase}) waits for "
                f"{type(present).__name__}"
            )

    def _move(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)


def _missing(state: SessionState, assignment: Assignment) -> tuple[str, ...]:
    # Small first: a manifest or program that does not fit is found out before the model is paid for.
    wanted = dict.fromkeys(
        (assignment.manifest_sha256, assignment.program_sha256, assignment.model_sha256, assignment.control_sha256)
    )
    return tuple(sha256 for sha256 in wanted if sha256 is not None and sha256 not in state.blobs)
