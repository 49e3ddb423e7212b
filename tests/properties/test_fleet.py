"""Which reports count depends on the seed alone: not on threads, not on interruptions, not on the round's numbers.

The server's own round engine answers the check-ins, in process: what is missing is HTTP and training.
"""

import random
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import PocketfedError, StaleReport
from client_sdk.protocol.messages import Assigned, Assignment, F32Encoding, Finished, RetryWindow, Wait
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from server_ref.assignments import ReportFile, RoundPolicy, Waiting
from server_ref.rounds import RoundEngine
from simulator.errors import FleetCannotTrain, ResumeMismatch
from simulator.fleet import VirtualFleet
from simulator.journal import Journal
from simulator.population import Population, Workload
from simulator.sessions import Outcome, SessionEnd, VirtualRounds, counted_sessions

WORK = Workload(flops_per_example=3e5, bytes_down=100_000, bytes_up=100_000, plan=TrainingPlan())
HASH = "0" * 64


class CrashError(Exception):
    """The simulator's process dies."""


class EngineLink:
    """Devices talking straight to a round engine; the accepted set of every round is kept."""

    def __init__(self, policy):
        self.engine = RoundEngine(policy, virtual_time=True)
        self.accepted = []
        self.taken_back = set()
        self.fails = lambda _number: False
        self._records = {}
        self.calls = 0
        self.crash_at = None
        self.before = True
        self._changed = threading.Condition()

    def check_in(self, device, timing):
        with self._changed:
            self.calls += 1
            if self.calls == self.crash_at and self.before:
                raise CrashError
            while self.engine.close_pending(timing.now_s):
                if closing := self.engine.closing(timing.now_s):
                    self.engine.commit(closing)
                    self.accepted.append((closing.closed_at, [(r.number, r.device_id) for r in closing.counted]))
                else:
                    assert self._changed.wait(10), "no upload ever came"
            reply = self._answer(device, timing)
            if self.calls == self.crash_at:
                raise CrashError
            return reply

    def _answer(self, device, timing):
        if self.engine.finished:
            return Finished(model_version=self.engine.version)
        record = self.engine.check_in(
            f"d{device}",
            device + 1,
            timing.now_s,
            lambda: f"{self.engine.next_number:032x}",
            duration_s=timing.duration_s,
        )
        if isinstance(record, Waiting):
            return Wait(reason=record.reason, retry=RetryWindow(min_s=2, max_s=10))
        self._records[record.assignment_id] = record
        return Assigned(
            assignment=Assignment(
                assignment_id=record.assignment_id,
                assignment_number=record.number,
                task_id="0" * 32,
                round_id=record.round_id,
                model_version=record.model_version,
                model_sha256=HASH,
                program_sha256=HASH,
                manifest_sha256=HASH,
                parameter_table_sha256=HASH,
                kind=UpdateKind.DELTA,
                encoding=F32Encoding(max_abs=1.0),
                weight=record.weight,
                plan=WORK.plan,
                shuffle_seed=record.number,
                lease_s=self.engine.policy.lease_s,
                max_report_bytes=1000,
            )
        )

    def perform(self, device, assignment, pauses=()):  # noqa: ARG002 - the fleet's interface
        assert assignment.weight == device + 1
        # Uneven work, so that threads finish in another order than they began.
        sum(range(random.randrange(2000)))
        with self._changed:
            report_id = assignment.assignment_id[::-1]
            record = self._records[assignment.assignment_id]
            if self.fails(assignment.assignment_number):
                return SessionEnd(Outcome.FAILED, 100, 200, "update-out-of-range")
            try:
                self.engine.report(record, ReportFile(report_id, HASH, 100, 0.0), 0.0)
            except StaleReport:
                return SessionEnd(Outcome.REFUSED, 100, 200)
            self._changed.notify_all()
        return SessionEnd(Outcome.ACCEPTED, 100, 200)

    def give_back(self, device, assignment_id):  # noqa: ARG002 - the fleet's interface
        with self._changed:
            self.engine.abandon(assignment_id)
            self._changed.notify_all()

    def take_back(self, device, assignment_id):  # noqa: ARG002 - the fleet's interface
        self.taken_back.add(self._records[assignment_id].number)


class Watcher:
    """Remembers what the fleet says."""

    def __init__(self):
        self.sessions, self.versions, self.ends = [], [], []

    def assigned(self, session):
        self.sessions.append(session)

    def ended(self, session):
        self.ends.append(session.end.outcome)

    def advanced(self, rounds_committed):
        self.versions.append(rounds_committed)


def run(link, journal_path, population, workers=1, *, stop=None, watcher=None):
    watcher = watcher or Watcher()
    with Journal(journal_path) as journal:
        fleet = VirtualFleet(
            population,
            num_samples=[d % 7 + 1 for d in range(population.devices)],
            work=lambda _device, _session: WORK,
            link=link,
            journal=journal,
            observer=watcher,
            workers=workers,
            stop=stop or threading.Event(),
            rounds=VirtualRounds(link.engine.policy.buffer_size, lambda _version: link.engine.policy.max_staleness),
        )
        finished = fleet.run()
    return finished, watcher


@st.composite
def policies(draw):
    buffer_size = draw(st.integers(1, 6))
    if draw(st.booleans()):
        concurrency = draw(st.integers(buffer_size, 10))
        refill_at, max_staleness = concurrency, 0
    else:
        concurrency = draw(st.integers(1, 10))
        refill_at, max_staleness = draw(st.integers(1, concurrency)), draw(st.integers(1, 5))
    return RoundPolicy(buffer_size, concurrency, refill_at, max_staleness, 120.0, 100, draw(st.integers(1, 4)))


populations = st.builds(Population, st.integers(0, 999), st.integers(12, 25), dropout=st.sampled_from([0.0, 0.1, 0.4]))


@settings(max_examples=60, deadline=None)
@given(policies(), populations, st.integers(2, 5))
def test_threads_do_not_change_what_is_accepted(policy, population, workers):
    with tempfile.TemporaryDirectory() as folder:
        one, many = EngineLink(policy), EngineLink(policy)
        assert run(one, Path(folder) / "one", population)[0]
        assert run(many, Path(folder) / "many", population, workers)[0]
    assert len(one.accepted) == policy.rounds
    assert one.accepted == many.accepted


@settings(max_examples=60, deadline=None)
@given(policies(), populations, st.integers(2, 5))
def test_threads_do_not_change_what_devices_remember(policy, population, workers):
    """A report may beat its round's commit on one machine and not on another; in virtual time it is late on both."""
    remembered = []
    for threads in (1, workers):
        link = EngineLink(policy)
        with tempfile.TemporaryDirectory() as folder:
            _, watcher = run(link, Path(folder) / "j", population, threads)
        over = [s for s in watcher.sessions if s.end is not None]
        remembered.append({s.number for s in over if s.end.outcome is Outcome.ACCEPTED} - link.taken_back)
    assert remembered[0] == remembered[1]
    counted = {number for _, numbers in link.accepted for number, _ in numbers}
    assert counted <= remembered[0]


@settings(max_examples=60, deadline=None)
@given(policies(), populations)
def test_what_counted_is_told_from_virtual_times_alone(policy, population):
    link = EngineLink(policy)
    with tempfile.TemporaryDirectory() as folder:
        _, watcher = run(link, Path(folder) / "j", population, 2)
    told = counted_sessions(
        watcher.sessions, [len(counted) for _, counted in link.accepted], lambda _: policy.max_staleness
    )
    assert [[n for n, _ in counted] for _, counted in link.accepted] == [
        sorted(s.number for s in counted) for counted in told
    ]


@settings(max_examples=60, deadline=None)
@given(policies(), populations, st.integers(2, 5), st.integers(2, 7))
def test_reports_that_are_refused_for_what_is_in_them_end_no_run_and_change_with_no_thread(
    policy, population, workers, every
):
    def fails(number):
        return number % every == 0

    told = []
    with tempfile.TemporaryDirectory() as folder:
        links = [EngineLink(policy), EngineLink(policy)]
        for link, threads in zip(links, (1, workers), strict=True):
            link.fails = fails
            finished, watcher = run(link, Path(folder) / str(threads), population, threads)
            assert finished
            told = counted_sessions(
                watcher.sessions, [len(counted) for _, counted in link.accepted], lambda _: policy.max_staleness
            )
    one, many = (link.accepted for link in links)
    assert len(one) == policy.rounds
    assert one == many
    assert [[n for n, _ in counted] for _, counted in one] == [sorted(s.number for s in counted) for counted in told]
    assert not [n for _, counted in one for n, _ in counted if fails(n)]


def test_a_fleet_of_which_nobody_delivers_anything_says_so(tmp_path):
    link = EngineLink(synchronous())
    link.fails = lambda _number: True
    with pytest.raises(FleetCannotTrain, match=r"21 sessions in a row .* update-out-of-range"):
        run(link, tmp_path / "j", Population(5, 20))


@settings(max_examples=60, deadline=None)
@given(policies(), populations, st.integers(1, 60), st.booleans(), st.integers(0, 40), st.sampled_from([3, 7, 10**9]))
def test_a_run_that_dies_anywhere_resumes_to_the_same_accepted_sets(
    policy, population, crash_at, before, torn, fails_every
):
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = EngineLink(policy), EngineLink(policy)
        undisturbed.fails = disturbed.fails = lambda number: number % fails_every == 1
        run(undisturbed, Path(folder) / "undisturbed", population)
        journal = Path(folder) / "disturbed"
        disturbed.crash_at, disturbed.before = crash_at, before
        try:
            run(disturbed, journal, population, 2)
        except CrashError:
            with journal.open("ab") as f:
                f.write(b'{"device":3,"at":12.5,"reply":{"status":"wa'[:torn])
            finished, watcher = run(disturbed, journal, population, 2)
            assert finished
            assert watcher.versions[-1] == policy.rounds
    assert disturbed.accepted == undisturbed.accepted


def synchronous(**changes):
    values = {"buffer_size": 4, "concurrency": 4, "refill_at": 4, "max_staleness": 0, "lease_s": 120.0}
    return RoundPolicy(**{**values, "weight_cap": 100, "rounds": 3, **changes})


def test_over_selection_takes_the_first_to_arrive(tmp_path):
    link = EngineLink(synchronous(concurrency=8, refill_at=8, rounds=1))
    _, watcher = run(link, tmp_path / "j", Population(5, 20))
    ((_, counted),) = link.accepted
    assert len(watcher.sessions) > 4, "more were invited than needed"
    arrivals = sorted((s.arrives_s, s.number) for s in watcher.sessions)
    assert [number for number, _ in counted] == sorted(number for _, number in arrivals[:4])


def test_drop_outs_are_seen_and_not_waited_for(tmp_path):
    link = EngineLink(synchronous(concurrency=8, refill_at=8))
    finished, watcher = run(link, tmp_path / "j", Population(5, 20, dropout=0.4))
    assert finished
    assert Outcome.DROPPED in watcher.ends


def test_the_replay_asks_the_server_nothing(tmp_path):
    link = EngineLink(synchronous())
    run(link, tmp_path / "j", Population(5, 20))
    calls = link.calls
    finished, watcher = run(link, tmp_path / "j", Population(5, 20))
    assert finished
    assert link.calls == calls
    assert watcher.versions == [1, 2, 3]


def test_stop_ends_the_run_and_the_rest_follows_later(tmp_path):
    stop = threading.Event()
    link = EngineLink(synchronous())
    undisturbed = EngineLink(synchronous())
    run(undisturbed, tmp_path / "u", Population(5, 20))

    class StopAfterFirstRound(Watcher):
        def advanced(self, rounds_committed):
            super().advanced(rounds_committed)
            stop.set()

    assert not run(link, tmp_path / "j", Population(5, 20), 2, stop=stop, watcher=StopAfterFirstRound())[0]
    assert len(link.accepted) == 1
    assert run(link, tmp_path / "j", Population(5, 20))[0]
    assert link.accepted == undisturbed.accepted


def test_a_journal_of_another_fleet_is_refused(tmp_path):
    run(EngineLink(synchronous()), tmp_path / "j", Population(5, 20))
    with pytest.raises(ResumeMismatch, match="cannot be resumed"):
        run(EngineLink(synchronous()), tmp_path / "j", Population(6, 20))


@pytest.mark.parametrize("damage", [b"{}\n", b"not json\n", b'{"pocketfed-journal":2}\n'])
def test_a_damaged_journal_is_refused(tmp_path, damage):
    run(EngineLink(synchronous()), tmp_path / "j", Population(5, 20))
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(damage + data)
    with pytest.raises(ResumeMismatch, match="damaged or of another version"):
        Journal(tmp_path / "j")


def test_what_ends_a_session_other_than_lateness_ends_the_run(tmp_path):
    link = EngineLink(synchronous())

    def refuse(_device, _assignment, _pauses):
        raise PocketfedError("no such program")

    link.perform = refuse
    with pytest.raises(PocketfedError, match="no such program"):
        run(link, tmp_path / "j", Population(5, 20))
