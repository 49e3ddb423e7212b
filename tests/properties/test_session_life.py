"""Whatever fails, and whenever the process dies: one report id per assignment, no sealed report lost, always an end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from client_sdk.client import MobileClient, RunSummary
from client_sdk.errors import BlobHashMismatch, InvalidReply, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import (
    AuthenticationFailed,
    BodyAltered,
    DuplicateReport,
    InvalidUpdate,
    LeaseExpired,
    PocketfedError,
    ServerBusy,
    StaleReport,
    StorageUnavailable,
    TrainingDiverged,
    UnknownAssignment,
    UnknownBlob,
    UnknownDevice,
    UnsupportedVersion,
)
from client_sdk.protocol.messages import Assigned, Finished, ReportReply
from client_sdk.protocol.profile import DeviceProfile
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
from client_sdk.store import MemoryDeviceStore
from tests.devices import NUM_PARAMETERS, WAIT, ToyProgram, ToyServer, make_assignment, make_data

TRANSIENT = [TransportUnavailable, InvalidReply, BlobHashMismatch, ServerBusy, StorageUnavailable, BodyAltered]
OVER = [StaleReport, LeaseExpired, DuplicateReport, UnknownAssignment]
FINAL = [AuthenticationFailed, UnsupportedVersion, InvalidUpdate, UnknownBlob]
ERRORS = [*TRANSIENT, *OVER, *FINAL, UnknownDevice]
REMOTE = (Enrol, CheckIn, Download, Upload, Abandon)
DEVICE = "1" * 32
IDENTITY = DeviceIdentity.from_private_bytes(bytes(range(32)))


class SessionMachine(RuleBasedStateMachine):
    """Random events, in any order that the session allows, with restarts in between."""

    @initialize(seed=st.integers(0, 2**32), attempts=st.integers(1, 5))
    def begin(self, seed: int, attempts: int) -> None:
        self.policy = RetryPolicy(max_attempts=attempts, max_training_failures=2)
        self.rng = random.Random(seed)
        self.assignments = 0
        self.work_left: int | None = None
        self.report_ids: dict[str, set[str]] = {}
        self.sealed: str | None = None
        self.settled = True
        self.open(SessionState(device_id=DEVICE))

    def open(self, state: SessionState) -> None:
        self.session = DeviceSession(state, report_id_of=IDENTITY.report_id, rng=self.rng, policy=self.policy)

    def stopped(self) -> bool:
        return isinstance(self.session.next_action(), Stop)

    def check_in_reply(self) -> Assigned | Finished:
        if self.work_left is not None:
            if self.work_left == 0:
                return Finished(model_version=1)
            self.work_left -= 1
        self.assignments += 1
        return Assigned(assignment=make_assignment(self.assignments))

    @rule()
    @precondition(lambda self: not self.stopped())
    def succeed(self) -> None:
        session = self.session
        match session.next_action():
            case CheckConditions():
                session.on_eligible()
            case Enrol():
                session.on_enrolled()
            case CheckIn():
                session.on_check_in(self.check_in_reply())
            case Download(sha256s=missing):
                session.on_blob(missing[0])
            case Train(assignment=assignment, report_id=report_id):
                self.report_ids.setdefault(assignment.assignment_id, set()).add(report_id)
                session.on_sealed("e" * 64)
                self.sealed, self.settled = report_id, False
            case Upload(report_id=report_id):
                assert report_id == self.sealed
                self.upload(report_id)
            case Abandon():
                session.on_abandoned()
            case Discard(report_id=report_id):
                assert self.settled or report_id != self.sealed, (
                    "a sealed report was discarded before its fate was known"
                )
                session.on_discarded()
                self.sealed, self.settled = None, True
            case Sleep():
                session.on_slept()

    def upload(self, report_id: str) -> None:
        state = self.session.state
        assert state.assignment is not None
        if state.phase is Phase.SEALED:
            self.session.on_upload_started()
            return
        self.settled = True
        self.session.on_uploaded(ReportReply(report_id=report_id, assignment_id=state.assignment.assignment_id))

    @rule(error=st.sampled_from(ERRORS))
    @precondition(lambda self: isinstance(self.session.next_action(), REMOTE))
    def fail(self, error: type[PocketfedError]) -> None:
        if isinstance(self.session.next_action(), Upload) and error in {*OVER, InvalidUpdate}:
            self.settled = True
        self.session.on_failure(error("drawn"))

    @rule(is_fatal=st.booleans())
    @precondition(lambda self: isinstance(self.session.next_action(), Train))
    def fail_training(self, is_fatal: bool) -> None:
        error = TrainingDiverged("drawn")
        self.session.on_training_failed("training-failed", "drawn", error=error if is_fatal else None)

    @rule()
    @precondition(lambda self: isinstance(self.session.next_action(), Train))
    def lose_blobs(self) -> None:
        self.session.on_blobs_lost()

    @rule()
    @precondition(lambda self: isinstance(self.session.next_action(), Upload))
    def lose_report(self) -> None:
        self.session.on_report_lost()
        self.sealed, self.settled = None, True

    @rule()
    @precondition(lambda self: isinstance(self.session.next_action(), CheckIn))
    def no_work(self) -> None:
        self.session.on_check_in(WAIT)

    @rule()
    def restart(self) -> None:
        self.open(SessionState.model_validate_json(self.session.state.model_dump_json()))

    @invariant()
    def one_report_id_per_assignment(self) -> None:
        assert all(len(ids) == 1 for ids in getattr(self, "report_ids", {}).values())

    @invariant()
    def sealed_reports_are_kept(self) -> None:
        if getattr(self, "sealed", None) is not None and not self.settled:
            assert self.session.state.report_id == self.sealed
            assert self.session.state.report_sha256 == "e" * 64
            assert self.session.state.phase in {Phase.SEALED, Phase.UPLOADING}

    def teardown(self) -> None:
        """Once nothing fails any more, the device delivers what it holds and comes to an end."""
        if not hasattr(self, "session"):
            return
        self.work_left = 1
        for _ in range(60):
            if self.stopped():
                if self.session.next_action().cause == "finished":  # type: ignore[union-attr]
                    return
                self.restart()
            self.succeed()
        raise AssertionError(f"no end in sight: {self.session.next_action()}")


def test_the_session_keeps_its_promises_under_any_sequence_of_events():
    run_state_machine_as_test(SessionMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


class Killed(BaseException):
    """The process ends here."""


Fault = tuple[str, type[BaseException] | None]
# What befalls each request in turn: nothing, an error, the process's death; before the server acts or after.
FAULTS = st.lists(
    st.tuples(st.sampled_from(["before", "after"]), st.sampled_from([None, None, Killed, *TRANSIENT, UnknownDevice])),
    max_size=25,
)


class Faults:
    """Plays a script of faults against a server's requests."""

    def __init__(self, server: ToyServer, script: list[Fault]) -> None:
        self.server = server
        self.queue = iter(script)
        self.late: type[BaseException] | None = None
        server.before, server.after = self.before, self.after

    def before(self, _request: str) -> None:
        when, what = next(self.queue, ("before", None))
        self.late = None
        if what is UnknownDevice:
            self.server.enrolled.clear()  # the honest way to meet it: the server lost its devices
        elif what is not None and when == "before":
            raise what("drawn")
        else:
            self.late = what

    def after(self, _request: str) -> None:
        late, self.late = self.late, None
        if late is not None:
            raise late("drawn")


def live(server: ToyServer, store: MemoryDeviceStore, before_run: Callable[[], None] = lambda: None) -> RunSummary:
    """One process of the device, from its saved state to its end."""
    client = MobileClient(
        ToyProgram(server.manifest, before_run),
        DeviceProfile("toy"),
        data=make_data(),
        transport=server.device(IDENTITY.device_id),
        store=store,
        rng=random.Random(0),
        wait=lambda *_: None,
        policy=RetryPolicy(max_attempts=30),
    )
    return client.run()


WORK: dict[str, Callable[[], ToyServer]] = {
    "fedavg": lambda: ToyServer(work=3),
    "compressed": lambda: ToyServer(work=3).compress("topk:0.3"),
    "scaffold": lambda: ToyServer(work=3).scaffold(np.full(NUM_PARAMETERS, 0.25, np.float32)),
}


def remembered(store: MemoryDeviceStore) -> dict[str, bytes] | None:
    memory = store.memory(make_assignment().task_id)
    return None if memory is None else {name: vector.tobytes() for name, vector in memory.vectors.items()}


@settings(max_examples=100, deadline=None)
@given(work=st.sampled_from(list(WORK)), script=FAULTS, kills_in_training=st.sets(st.integers(1, 20), max_size=3))
def test_a_device_that_is_killed_and_cut_off_anywhere_delivers_each_report_once(
    work: str, script: list[Fault], kills_in_training: set[int]
):
    """... and remembers what an undisturbed device does."""
    server = WORK[work]()
    Faults(server, script)
    calls = itertools.count(1)

    def before_run() -> None:
        if next(calls) in kills_in_training:
            raise Killed

    store = MemoryDeviceStore(IDENTITY)
    summary = None
    for _ in range(1 + len(script) + len(kills_in_training)):
        try:
            summary = live(server, store, before_run)
            break
        except Killed:
            continue
    assert summary is not None
    assert summary.cause == "finished"
    assert set(server.reports) == {IDENTITY.report_id(a) for a in server.updates()}
    undisturbed, other = WORK[work](), MemoryDeviceStore(IDENTITY)
    live(undisturbed, other)
    assert len(undisturbed.reports) == 3
    assert server.reports == undisturbed.reports
    assert remembered(store) == remembered(other)
    assert (remembered(store) is None) is (work == "fedavg")
