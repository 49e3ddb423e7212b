"""The session machine: every arrow, tried without a network."""

from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from client_sdk.errors import (
    BlobHashMismatch,
    IllegalTransition,
    InvalidReply,
    StateDirUnusable,
    TransportUnavailable,
    is_transient,
)
from client_sdk.protocol.errors import (
    AuthenticationFailed,
    BodyAltered,
    DuplicateReport,
    LeaseExpired,
    NonFiniteUpdate,
    PocketfedError,
    ReportMismatch,
    ServerBusy,
    StaleReport,
    StorageUnavailable,
    UnknownAssignment,
    UnknownBlob,
    UnknownDevice,
    UnsupportedVersion,
)
from client_sdk.protocol.messages import Assigned, Finished, ReportReply
from client_sdk.protocol.training import TrainingPlan
from client_sdk.session import DeviceSession
from client_sdk.session_state import (
    Abandon,
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
from tests.devices import WAIT, make_assignment

DEVICE = "1" * 32
ASSIGNMENT = make_assignment(7)
MANIFEST, PROGRAM, MODEL = ASSIGNMENT.manifest_sha256, ASSIGNMENT.program_sha256, ASSIGNMENT.model_sha256
FRAME_HASH = "e" * 64


def report_id_of(assignment_id: str) -> str:
    return assignment_id[::-1]


REPORT = report_id_of(ASSIGNMENT.assignment_id)
ACCEPTED = ReportReply(report_id=REPORT, assignment_id=ASSIGNMENT.assignment_id)


def session(state: SessionState | None = None, *, max_reports: int | None = None, **policy: float) -> DeviceSession:
    return DeviceSession(
        state or SessionState(device_id=DEVICE),
        report_id_of=report_id_of,
        rng=random.Random(0),
        policy=RetryPolicy(**policy),
        max_reports=max_reports,
    )


def reach(phase: Phase, **kwargs) -> DeviceSession:
    """A session that was led to a phase by ordinary events."""
    machine = session(**kwargs)
    steps = [
        (Phase.ELIGIBLE, machine.on_eligible),
        (Phase.ELIGIBLE, machine.on_enrolled),
        (Phase.ASSIGNED, lambda: machine.on_check_in(Assigned(assignment=ASSIGNMENT))),
        (Phase.DOWNLOADING, lambda: machine.on_blob(MANIFEST)),
        (Phase.DOWNLOADING, lambda: machine.on_blob(PROGRAM)),
        (Phase.TRAINING, lambda: machine.on_blob(MODEL)),
        (Phase.SEALED, lambda: machine.on_sealed(FRAME_HASH)),
        (Phase.UPLOADING, machine.on_upload_started),
        (Phase.DONE, lambda: machine.on_uploaded(ACCEPTED)),
    ]
    if phase is Phase.ABANDONING:
        machine = reach(Phase.TRAINING, **kwargs)
        machine.on_training_failed("training-failed", "loss is NaN")
        return machine
    if phase is Phase.CHECKED_IN:
        machine = reach(Phase.ELIGIBLE, **kwargs)
        machine.on_check_in(WAIT)
        return machine
    if phase is Phase.IDLE:
        return machine
    reached = [i for i, (p, _) in enumerate(steps) if p is phase]
    last = reached[-1] if phase is Phase.ELIGIBLE else reached[0]
    for _, step in steps[: last + 1]:
        step()
    assert machine.state.phase is phase
    return machine


def test_a_life_without_trouble():
    machine = session()
    assert machine.next_action() == CheckConditions()
    machine.on_eligible()
    assert machine.next_action() == Enrol()
    machine.on_enrolled()
    assert machine.next_action() == CheckIn()
    machine.on_check_in(Assigned(assignment=ASSIGNMENT))
    assert machine.next_action() == Download((MANIFEST, PROGRAM, MODEL))
    machine.on_blob(PROGRAM)
    assert machine.next_action() == Download((MANIFEST, MODEL))
    machine.on_blob(MANIFEST)
    machine.on_blob(MODEL)
    assert machine.next_action() == Train(ASSIGNMENT, REPORT)
    machine.on_sealed(FRAME_HASH)
    assert machine.next_action() == Upload(REPORT)
    machine.on_upload_started()
    assert machine.next_action() == Upload(REPORT)
    machine.on_uploaded(ACCEPTED)
    assert machine.next_action() == Discard(REPORT, accepted=True, detail="")
    machine.on_discarded()
    assert machine.state == SessionState(device_id=DEVICE, enrolled=True, reports=1)
    machine.on_eligible()
    machine.on_check_in(Finished(model_version=3))
    assert isinstance(stop := machine.next_action(), Stop)
    assert stop.cause == "finished"


def test_asking_for_the_next_action_changes_nothing():
    for phase in Phase:
        machine = reach(phase)
        assert machine.next_action() == machine.next_action()


@pytest.mark.parametrize("phase", list(Phase))
def test_a_saved_state_goes_on_in_another_process(phase: Phase):
    machine = reach(phase)
    resumed = session(SessionState.model_validate_json(machine.state.model_dump_json()))
    assert resumed.state == machine.state.resumed()
    assert resumed.next_action() == machine.next_action()


def test_an_ineligible_device_waits_and_looks_again():
    machine = session()
    machine.on_ineligible("battery is low", (30, 60))
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert 30 <= sleep.delay_s <= 60
    assert sleep.reason == "battery is low"
    machine.on_slept()
    assert machine.next_action() == CheckConditions()


@pytest.mark.parametrize("phase", [Phase.ASSIGNED, Phase.DOWNLOADING, Phase.TRAINING, Phase.SEALED, Phase.UPLOADING])
def test_a_step_that_is_not_allowed_now_is_paused_as_often_as_need_be_and_then_repeated(phase: Phase):
    machine = reach(phase, max_attempts=2)
    action = machine.next_action()
    for _ in range(20):
        machine.on_paused("the battery is at 12%", (30, 60))
        sleep = machine.next_action()
        assert isinstance(sleep, Sleep)
        assert 30 <= sleep.delay_s <= 60
        machine.on_slept()
        assert machine.next_action() == action
    assert machine.state.phase is phase
    assert machine.state.attempts == machine.state.training_failures == 0


def test_a_wait_that_has_begun_goes_on_in_another_process():
    machine = reach(Phase.CHECKED_IN)
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert sleep.left_s(now=1e6) == sleep.delay_s
    machine.on_sleep_begun(1000.0 + sleep.delay_s)
    machine.on_sleep_begun(5000.0)  # once begun it is not prolonged
    resumed = session(SessionState.model_validate_json(machine.state.model_dump_json())).next_action()
    assert isinstance(resumed, Sleep)
    assert resumed.left_s(now=1002.0) == pytest.approx(sleep.delay_s - 2)
    assert resumed.left_s(now=1e6) == 0
    assert resumed.left_s(now=-1e6) == sleep.delay_s, "a clock that was set back does not prolong it"


def test_a_server_without_work_is_asked_again_within_its_window():
    machine = reach(Phase.ELIGIBLE)
    machine.on_check_in(WAIT)
    assert machine.state.phase is Phase.CHECKED_IN
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert 5 <= sleep.delay_s <= 10
    assert (sleep.min_s, sleep.max_s, sleep.reason) == (5, 10, "round-full")
    machine.on_slept()
    assert machine.next_action() == CheckConditions()


EVENTS = {
    "on_eligible": (),
    "on_ineligible": ("r", (1, 2)),
    "on_paused": ("r", (1, 2)),
    "on_sleep_begun": (5.0,),
    "on_enrolled": (),
    "on_check_in": (WAIT,),
    "on_blob": (MANIFEST,),
    "on_sealed": (FRAME_HASH,),
    "on_training_failed": ("no-memory", ""),
    "on_blobs_lost": (),
    "on_upload_started": (),
    "on_uploaded": (ACCEPTED,),
    "on_report_lost": (),
    "on_abandoned": (),
    "on_assignment_over": ("",),
    "on_discarded": (),
    "on_slept": (),
    "on_failure": (TransportUnavailable("gone"),),
}
LEGAL = {
    Phase.IDLE: {"on_eligible", "on_ineligible"},
    Phase.ELIGIBLE: {"on_check_in", "on_failure"},
    Phase.CHECKED_IN: {"on_sleep_begun", "on_slept"},
    Phase.ASSIGNED: {"on_blob", "on_failure", "on_assignment_over", "on_paused"},
    Phase.DOWNLOADING: {"on_failure", "on_assignment_over", "on_paused"},  # the manifest is there already
    Phase.TRAINING: {"on_sealed", "on_training_failed", "on_blobs_lost", "on_assignment_over", "on_paused"},
    Phase.SEALED: {"on_upload_started", "on_report_lost", "on_failure", "on_assignment_over", "on_paused"},
    Phase.UPLOADING: {
        "on_upload_started",
        "on_uploaded",
        "on_report_lost",
        "on_failure",
        "on_assignment_over",
        "on_paused",
    },
    Phase.ABANDONING: {"on_abandoned", "on_failure", "on_assignment_over"},
    Phase.DONE: {"on_discarded"},
}


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", list(EVENTS))
def test_an_event_is_taken_where_it_belongs_and_refused_elsewhere(phase: Phase, event: str):
    machine = reach(phase)
    before = machine.state
    if event in LEGAL[phase]:
        getattr(machine, event)(*EVENTS[event])
    else:
        with pytest.raises(IllegalTransition):
            getattr(machine, event)(*EVENTS[event])
        assert machine.state == before


@pytest.mark.parametrize("phase", [Phase.ELIGIBLE, Phase.ASSIGNED, Phase.DOWNLOADING, Phase.UPLOADING])
@pytest.mark.parametrize(
    "error",
    [
        TransportUnavailable("x"),
        InvalidReply("x"),
        BlobHashMismatch("x"),
        ServerBusy("x"),
        StorageUnavailable("x"),
        BodyAltered("x"),
    ],
)
def test_a_transient_failure_pauses_and_then_repeats_the_step(phase: Phase, error: PocketfedError):
    machine = reach(phase)
    action = machine.next_action()
    machine.on_failure(error)
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert 0 <= sleep.delay_s <= sleep.max_s
    machine.on_slept()
    assert machine.next_action() == action
    assert machine.state.phase is phase


def test_waits_grow_up_to_their_cap_and_are_drawn_below_their_ceiling():
    machine = reach(Phase.UPLOADING, base_s=1, cap_s=20, max_attempts=100)
    ceilings, delays = [], []
    for _ in range(8):
        machine.on_failure(TransportUnavailable("x"))
        sleep = machine.next_action()
        assert isinstance(sleep, Sleep)
        ceilings.append(sleep.max_s)
        delays.append(sleep.delay_s)
        machine.on_slept()
    assert ceilings == [1, 2, 4, 8, 16, 20, 20, 20]
    assert all(0 <= d <= c for d, c in zip(delays, ceilings, strict=True))
    assert len(set(delays)) == len(delays)


def test_waits_cannot_overflow():
    pause = RetryPolicy(cap_s=300).draw(random.Random(0), 10**6, None, asked=False)
    assert pause.max_s == 300


def test_the_servers_window_replaces_our_own():
    machine = reach(Phase.UPLOADING)
    machine.on_failure(ServerBusy("later", retry_after_s=(100, 200)))
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert 100 <= sleep.delay_s <= 200


def test_no_server_can_put_a_device_to_sleep_for_good():
    machine = reach(Phase.UPLOADING)
    machine.on_failure(ServerBusy("never", retry_after_s=(1e9, 1e9)))
    sleep = machine.next_action()
    assert isinstance(sleep, Sleep)
    assert sleep.delay_s == RetryPolicy().max_wait_s


def test_a_pause_that_the_server_asked_for_survives_a_restart_and_our_own_does_not():
    asked, own = reach(Phase.UPLOADING), reach(Phase.UPLOADING)
    asked.on_failure(ServerBusy("later", retry_after_s=(100, 200)))
    own.on_failure(TransportUnavailable("x"))
    assert session(asked.state).next_action() == asked.next_action()
    assert session(own.state).next_action() == Upload(REPORT)


@pytest.mark.parametrize("phase", [Phase.ELIGIBLE, Phase.ASSIGNED, Phase.UPLOADING])
def test_failures_in_a_row_are_bounded_and_lose_nothing(phase: Phase):
    machine = reach(phase, max_attempts=3)
    before = machine.next_action()
    for _ in range(2):
        machine.on_failure(TransportUnavailable("no route"))
        machine.on_slept()
    machine.on_failure(TransportUnavailable("no route"))
    stop = machine.next_action()
    assert isinstance(stop, Stop)
    assert stop.cause == "gave-up"
    assert "no route" in stop.detail
    assert session(machine.state).next_action() == before


def test_a_proxy_that_alters_every_body_is_left_after_a_bounded_number_of_attempts():
    machine = reach(Phase.UPLOADING, max_attempts=3)
    attempts = 0
    while isinstance(action := machine.next_action(), Upload | Sleep):
        if isinstance(action, Sleep):
            machine.on_slept()
        else:
            attempts += 1
            machine.on_failure(BodyAltered())
    assert isinstance(action, Stop)
    assert (attempts, action.cause) == (3, "gave-up")
    assert isinstance(action.error, BodyAltered)
    assert session(machine.state).next_action() == Upload(REPORT), "the report is kept for a better network"


def test_scaffold_waits_for_the_servers_control_too():
    control = "9" * 64
    plan = TrainingPlan(algorithm="scaffold")
    assignment = make_assignment(7, plan=plan, control_sha256=control)
    machine = reach(Phase.ELIGIBLE)
    machine.on_check_in(Assigned(assignment=assignment))
    assert machine.next_action() == Download((MANIFEST, PROGRAM, MODEL, control))
    for blob in (control, MANIFEST, PROGRAM):
        machine.on_blob(blob)
    assert machine.next_action() == Download((MODEL,))
    machine.on_blob(MODEL)
    assert machine.next_action() == Train(assignment, REPORT)


def test_progress_forgives_earlier_failures():
    machine = reach(Phase.ASSIGNED, max_attempts=2)
    for blob in (MANIFEST, PROGRAM, MODEL):
        machine.on_failure(TransportUnavailable("x"))
        machine.on_slept()
        machine.on_blob(blob)
    assert machine.next_action() == Train(ASSIGNMENT, REPORT)


@pytest.mark.parametrize("error", [StaleReport(), LeaseExpired(), DuplicateReport(), UnknownAssignment()])
@pytest.mark.parametrize("phase", [Phase.SEALED, Phase.UPLOADING, Phase.ABANDONING])
def test_an_assignment_that_is_over_is_dropped_and_the_device_goes_on(phase: Phase, error: PocketfedError):
    machine = reach(phase)
    machine.on_failure(error)
    discard = machine.next_action()
    assert isinstance(discard, Discard)
    assert (discard.report_id, discard.accepted) == (REPORT, False)
    machine.on_discarded()
    assert machine.next_action() == CheckConditions()
    assert machine.state.reports == 0


def test_one_lost_race_does_not_slow_a_device_down_but_losing_again_does():
    machine = session()
    machine.on_eligible()
    machine.on_enrolled()
    waits = []
    for number in range(4):
        assignment = make_assignment(number)
        machine.on_check_in(Assigned(assignment=assignment))
        for blob in (MANIFEST, PROGRAM, MODEL):
            machine.on_blob(blob)
        machine.on_sealed(FRAME_HASH)
        machine.on_failure(StaleReport())
        machine.on_discarded()
        action = machine.next_action()
        waits.append(action.max_s if isinstance(action, Sleep) else 0)
        if isinstance(action, Sleep):
            machine.on_slept()
        machine.on_eligible()
    assert waits == [0, 1, 2, 4]


@pytest.mark.parametrize("phase", [Phase.ELIGIBLE, Phase.SEALED, Phase.UPLOADING, Phase.ABANDONING])
def test_a_server_that_forgot_the_device_enrols_it_again_and_the_step_is_repeated(phase: Phase):
    machine = reach(phase)
    action = machine.next_action()
    machine.on_failure(UnknownDevice())
    assert machine.next_action() == Enrol()
    machine.on_enrolled()
    assert machine.next_action() == action


def test_a_server_that_forgets_the_device_over_and_over_is_left():
    machine = reach(Phase.ELIGIBLE, max_attempts=4)
    enrolments = 0
    while not isinstance(action := machine.next_action(), Stop):
        match action:
            case Enrol():
                enrolments += 1
                machine.on_enrolled()
            case CheckIn():
                machine.on_failure(UnknownDevice())
            case Sleep():
                machine.on_slept()
    assert action.cause == "gave-up"
    assert enrolments == 3


@pytest.mark.parametrize("error", [NonFiniteUpdate("bad"), ReportMismatch("bad")])
def test_a_report_that_can_never_be_accepted_is_given_back_and_the_reason_told(error: PocketfedError):
    machine = reach(Phase.UPLOADING)
    machine.on_failure(error)
    # The slot is free at once, not only when the lease ends.
    assert machine.next_action() == Abandon(machine.state.assignment.assignment_id, "training-failed")
    machine.on_abandoned()
    assert machine.next_action() == Discard(REPORT, accepted=False, detail=str(error))
    machine.on_discarded()
    stop = machine.next_action()
    assert isinstance(stop, Stop)
    assert (stop.cause, stop.error) == ("refused", error)


@pytest.mark.parametrize("error", [AuthenticationFailed("x"), UnsupportedVersion("x"), StateDirUnusable("x")])
@pytest.mark.parametrize("phase", [Phase.ELIGIBLE, Phase.ASSIGNED, Phase.UPLOADING])
def test_any_other_refusal_stops_the_device_and_keeps_its_state(phase: Phase, error: PocketfedError):
    machine = reach(phase)
    before = machine.state
    machine.on_failure(error)
    stop = machine.next_action()
    assert isinstance(stop, Stop)
    assert (stop.cause, stop.error) == ("refused", error)
    assert machine.state == before


def test_the_answer_to_an_enrolment_cannot_make_a_device_drop_its_report():
    machine = reach(Phase.UPLOADING)
    machine.on_failure(UnknownDevice())
    assert machine.next_action() == Enrol()
    machine.on_failure(StaleReport("a lie"))
    assert isinstance(machine.next_action(), Stop)
    assert machine.state.phase is Phase.UPLOADING


def test_an_acknowledgement_of_another_report_does_not_count():
    machine = reach(Phase.UPLOADING)
    machine.on_uploaded(ReportReply(report_id="9" * 32, assignment_id=ASSIGNMENT.assignment_id))
    assert machine.state.phase is Phase.UPLOADING
    assert isinstance(machine.next_action(), Sleep)


def test_a_model_that_is_gone_gives_the_assignment_back():
    machine = reach(Phase.DOWNLOADING)
    machine.on_failure(UnknownBlob("no such blob"))
    assert machine.next_action() == Abandon(ASSIGNMENT.assignment_id, "interrupted")


def test_failed_training_gives_the_assignment_back_and_the_device_tries_another():
    machine = reach(Phase.TRAINING)
    machine.on_training_failed("no-memory", "out of memory")
    assert machine.next_action() == Abandon(ASSIGNMENT.assignment_id, "no-memory")
    machine.on_abandoned()
    assert machine.next_action() == Discard(REPORT, accepted=False, detail="out of memory")
    machine.on_discarded()
    assert machine.next_action() == CheckConditions()


def test_training_that_can_never_succeed_stops_the_device_after_giving_back():
    machine = reach(Phase.TRAINING)
    error = PocketfedError("no such operator")
    machine.on_training_failed("training-failed", "no such operator", error=error)
    machine.on_abandoned()
    machine.on_discarded()
    stop = machine.next_action()
    assert isinstance(stop, Stop)
    assert (stop.cause, stop.error) == ("refused", error)


def test_training_failures_in_a_row_are_bounded():
    machine = session(max_training_failures=3)
    failures = 0
    while not isinstance(action := machine.next_action(), Stop):
        match action:
            case CheckConditions():
                machine.on_eligible()
            case Enrol():
                machine.on_enrolled()
            case CheckIn():
                machine.on_check_in(Assigned(assignment=make_assignment(failures)))
            case Download(sha256s=missing):
                machine.on_blob(missing[0])
            case Train():
                failures += 1
                machine.on_training_failed("training-failed", "loss is NaN")
            case Abandon():
                machine.on_abandoned()
            case Discard():
                machine.on_discarded()
            case Sleep():
                machine.on_slept()
    assert (action.cause, failures) == ("gave-up", 3)


def test_an_abandonment_that_does_not_get_through_is_left_to_the_lease():
    machine = reach(Phase.ABANDONING, max_attempts=2)
    machine.on_failure(TransportUnavailable("x"))
    machine.on_slept()
    machine.on_failure(TransportUnavailable("x"))
    assert machine.next_action() == Discard(REPORT, accepted=False, detail="loss is NaN")
    refused = reach(Phase.ABANDONING)
    refused.on_failure(UnsupportedVersion("x"))
    assert isinstance(refused.next_action(), Discard)


def test_lost_blobs_are_fetched_again_and_a_lost_report_is_trained_again_under_its_id():
    machine = reach(Phase.TRAINING)
    machine.on_blobs_lost()
    assert machine.next_action() == Download((MANIFEST, PROGRAM, MODEL))
    machine = reach(Phase.UPLOADING)
    machine.on_report_lost()
    assert machine.next_action() == Train(ASSIGNMENT, REPORT)


def test_a_disk_that_loses_every_report_is_noticed():
    machine = reach(Phase.SEALED, max_attempts=3)
    trainings = 0
    while not isinstance(action := machine.next_action(), Stop):
        if isinstance(action, Train):
            trainings += 1
            machine.on_sealed(FRAME_HASH)
        else:
            machine.on_report_lost()
    assert (action.cause, trainings) == ("gave-up", 2)


def test_a_blob_that_nobody_waits_for_is_refused():
    machine = reach(Phase.ASSIGNED)
    with pytest.raises(IllegalTransition, match="not one that the assignment waits for"):
        machine.on_blob("0" * 64)


def test_model_and_program_may_be_the_same_blob():
    machine = reach(Phase.ELIGIBLE)
    machine.on_check_in(Assigned(assignment=make_assignment(1, model_sha256=PROGRAM)))
    assert machine.next_action() == Download((MANIFEST, PROGRAM))


def test_the_lease_ending_drops_the_assignment():
    machine = reach(Phase.TRAINING)
    machine.on_assignment_over("the lease ended")
    assert machine.next_action() == Discard(REPORT, accepted=False, detail="the lease ended")


def test_the_number_of_reports_is_counted_from_the_start_of_the_process():
    machine = reach(Phase.DONE, max_reports=1)
    machine.on_discarded()
    machine.on_eligible()
    stop = machine.next_action()
    assert isinstance(stop, Stop)
    assert stop.cause == "enough-reports"
    again = session(machine.state, max_reports=1)
    again.on_eligible()
    assert again.next_action() == CheckIn()


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "training"},
        {"phase": "sealed", "assignment": ASSIGNMENT.model_dump(), "report_id": REPORT},
        {"assignment": ASSIGNMENT.model_dump()},
        {"report_id": REPORT},
        {"phase": "dreaming"},
        {"format": 2},
        {"attempts": -1},
        {"surprise": 1},
    ],
)
def test_a_state_that_no_machine_can_be_in_is_refused(changes: dict):
    with pytest.raises(ValidationError):
        SessionState.model_validate({"device_id": DEVICE} | changes)


def test_what_is_not_known_to_be_transient_is_permanent():
    assert not is_transient(PocketfedError("x"))
    assert not is_transient(StateDirUnusable("x"))
    assert is_transient(TransportUnavailable("x"))
