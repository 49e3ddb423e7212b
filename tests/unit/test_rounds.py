"""The round engine's rules, one by one."""

from __future__ import annotations

import itertools

import pytest

from client_sdk.protocol.errors import ConfigurationError, DuplicateReport, LeaseExpired, StaleReport
from server_ref.assignments import AssignmentRecord, AssignmentState, ReportFile, RoundPolicy, Waiting
from server_ref.rounds import RoundEngine

SYNC = RoundPolicy(buffer_size=3, concurrency=4, refill_at=4, max_staleness=0, lease_s=60.0, weight_cap=100, rounds=5)
ASYNC = RoundPolicy(buffer_size=2, concurrency=3, refill_at=1, max_staleness=2, lease_s=60.0, weight_cap=100, rounds=50)


class Driver:
    """An engine with ids that count up."""

    def __init__(self, policy: RoundPolicy, **options: object) -> None:
        self.engine = RoundEngine(policy, **options)
        self._ids = (f"{i:032x}" for i in itertools.count())

    def check_in(self, device: str, now: float = 0.0, *, samples: int = 10, duration_s: float | None = None):
        return self.engine.check_in(device, samples, now, lambda: next(self._ids), duration_s=duration_s)

    def assign(self, device: str, now: float = 0.0, **options: object) -> AssignmentRecord:
        found = self.check_in(device, now, **options)
        assert isinstance(found, AssignmentRecord)
        return found

    def report(self, record: AssignmentRecord, now: float = 1.0, report_id: str | None = None) -> bool:
        file = ReportFile(report_id or f"{record.number:032x}", "0" * 64, 100, 0.5)
        return self.engine.report(record, file, now)

    def close(self, now: float = 1.0) -> list[int]:
        closing = self.engine.closing(now)
        assert closing is not None
        self.engine.commit(closing)
        return [r.number for r in closing.counted]


@pytest.mark.parametrize(
    ("field", "value"),
    [("buffer_size", 0), ("concurrency", 0), ("refill_at", 9), ("lease_s", 0.0), ("max_staleness", -1), ("rounds", 0)],
)
def test_numbers_that_cannot_work_are_refused(field, value):
    settings = vars(SYNC) | {field: value}
    with pytest.raises(ConfigurationError):
        RoundPolicy(**settings)


def test_a_synchronous_round_invites_once_and_closes_with_the_buffer():
    driver = Driver(SYNC)
    records = [driver.assign(f"d{i}") for i in range(4)]
    assert driver.check_in("d4") == Waiting("round-full")
    driver.report(records[2])
    driver.report(records[0])
    assert driver.check_in("d4") == Waiting("round-full"), "no refill before the commit"
    assert driver.engine.closing(1.0) is None
    driver.report(records[3])
    assert driver.close() == [0, 2, 3]
    assert driver.engine.version == 1
    assert driver.assign("d0", 2.0).model_version == 1


def test_slots_that_fall_free_during_a_wave_wait_for_the_next_one():
    driver = Driver(SYNC)
    first = driver.assign("d0")
    driver.report(first)
    # Its slot is free again, but the round invites four devices in all.
    rest = [driver.assign(f"d{i}") for i in (1, 2, 3)]
    assert driver.check_in("d4") == Waiting("round-full")
    for record in rest[:2]:
        driver.report(record)
    driver.close()
    assert [driver.assign(f"e{i}", 2.0).model_version for i in range(4)] == [1] * 4
    assert driver.check_in("e4", 2.0) == Waiting("round-full")


def test_a_round_that_closes_before_its_wave_ends_leaves_the_next_one_whole():
    driver = Driver(SYNC)
    for i in range(3):
        driver.report(driver.assign(f"d{i}"))
    driver.close()
    records = [driver.assign(f"e{i}", 2.0) for i in range(4)]
    assert driver.check_in("e4", 2.0) == Waiting("round-full")
    assert [r.round_id for r in records] == [1] * 4


def test_a_restart_goes_on_with_the_wave():
    driver = Driver(SYNC)
    records = [driver.assign(f"d{i}") for i in range(2)]
    driver.report(records[0])
    engine = driver.engine
    driver.engine = RoundEngine.restore(
        SYNC, records, virtual_time=False, version=0, next_number=2, opened_at=0.0, invitations=engine.invitations
    )
    driver.assign("d2")
    driver.assign("d3")
    assert driver.check_in("d4") == Waiting("round-full")


def test_over_selected_devices_are_superseded_by_the_commit():
    driver = Driver(SYNC)
    records = [driver.assign(f"d{i}") for i in range(4)]
    for record in records[:3]:
        driver.report(record)
    driver.close()
    assert records[3].state is AssignmentState.SUPERSEDED
    with pytest.raises(StaleReport):
        driver.report(records[3])


def test_drop_outs_beyond_the_over_selection_are_replaced():
    driver = Driver(SYNC)
    records = [driver.assign(f"d{i}") for i in range(4)]
    driver.report(records[0])
    driver.report(records[1])
    assert driver.check_in("late", 50.0) == Waiting("round-full")
    # Both leases end; all four slots are free and the buffer still lacks one report.
    late = driver.assign("late", 61.0)
    driver.report(late, 62.0)
    assert driver.close(62.0) == [0, 1, 4]


def test_an_asynchronous_buffer_refills_while_others_work():
    driver = Driver(ASYNC)
    records = [driver.assign(f"d{i}") for i in range(3)]
    driver.report(records[0])
    replacement = driver.assign("d3")
    driver.report(replacement)
    assert driver.close() == [0, 3]
    # d1 is one version behind now, which is within the tolerance.
    driver.report(records[1], 2.0)
    assert records[1].state is AssignmentState.REPORTED


def test_reports_older_than_the_tolerance_are_refused():
    driver = Driver(ASYNC)
    slow = driver.assign("slow")
    for round_id in range(3):
        for device in ("a", "b"):
            driver.report(driver.assign(f"{device}{round_id}"))
        driver.close()
    with pytest.raises(StaleReport):
        driver.report(slow)


def test_a_device_holds_one_assignment_and_reports_once_a_buffer():
    driver = Driver(SYNC)
    record = driver.assign("d0")
    assert driver.check_in("d0") is record, "asking again gives the same assignment"
    driver.report(record)
    assert driver.check_in("d0") == Waiting("already-reported")


def test_the_same_report_again_is_harmless_and_another_is_refused():
    driver = Driver(SYNC)
    record = driver.assign("d0")
    assert driver.report(record, report_id="a" * 32) is True
    assert all(driver.report(record, report_id="a" * 32) is False for _ in range(100))
    with pytest.raises(DuplicateReport):
        driver.report(record, report_id="b" * 32)
    assert len(driver.engine.reported) == 1


def test_a_report_after_its_deadline_is_refused():
    driver = Driver(SYNC)
    record = driver.assign("d0")
    with pytest.raises(LeaseExpired):
        driver.report(record, 60.5)
    driver.check_in("d1", 61.0)
    assert record.state is AssignmentState.EXPIRED


def test_an_abandoned_assignment_frees_its_device():
    driver = Driver(ASYNC)
    record = driver.assign("d0")
    driver.engine.abandon(record.assignment_id)
    with pytest.raises(StaleReport):
        driver.report(record)
    assert driver.assign("d0").number == 1


def test_weights_are_capped_sample_counts():
    driver = Driver(SYNC)
    assert driver.assign("small", samples=7).weight == 7
    assert driver.assign("boastful", samples=10**9).weight == 100


def test_the_task_ends_after_its_last_round():
    driver = Driver(RoundPolicy(**(vars(SYNC) | {"rounds": 1})))
    records = [driver.assign(f"d{i}") for i in range(4)]
    for record in records[:3]:
        driver.report(record)
    driver.close()
    assert driver.engine.finished
    assert driver.engine.closing(9.0) is None


def test_changes_name_every_record_that_moved_once():
    driver = Driver(SYNC)
    records = [driver.assign(f"d{i}") for i in range(3)]
    driver.report(records[1])
    assert [r.number for r in driver.engine.take_changes()] == [0, 1, 2]
    assert driver.engine.take_changes() == []
    driver.report(records[0])
    assert [r.number for r in driver.engine.take_changes()] == [0]


class TestVirtualTime:
    """A buffer closes by simulated arrival, whatever the real order."""

    def test_the_earliest_arrivals_are_counted_not_the_first_uploads(self):
        driver = Driver(SYNC, virtual_time=True)
        durations = (40.0, 10.0, 30.0, 20.0)
        records = [driver.assign(f"d{i}", 0.0, duration_s=d) for i, d in enumerate(durations)]
        for record in (records[0], records[2], records[1]):
            driver.report(record)
        assert driver.engine.close_pending(30.0)
        assert driver.engine.closing(30.0) is None, "assignment 3 arrives at 20 and is still on its way"
        driver.report(records[3])
        closing = driver.engine.closing(30.0)
        assert closing is not None
        assert [r.number for r in closing.counted] == [1, 2, 3]
        assert closing.closed_at == 30.0

    def test_a_full_buffer_waits_until_the_clock_has_reached_its_last_arrival(self):
        driver = Driver(SYNC, virtual_time=True)
        for i in range(3):
            driver.report(driver.assign(f"d{i}", 0.0, duration_s=50.0))
        assert driver.engine.closing(49.0) is None, "a device checking in at 49 could still report before 50"
        early = driver.assign("early", 5.0, duration_s=1.0)
        driver.report(early)
        closing = driver.engine.closing(50.0)
        assert closing is not None
        assert [r.number for r in closing.counted] == [0, 1, 3]

    def test_equal_arrivals_go_to_the_lowest_assignment_number(self):
        driver = Driver(SYNC, virtual_time=True)
        records = [driver.assign(f"d{i}", 0.0, duration_s=10.0) for i in range(4)]
        for record in reversed(records):
            driver.report(record)
        closing = driver.engine.closing(10.0)
        assert closing is not None
        assert [r.number for r in closing.counted] == [0, 1, 2]

    def test_a_drop_out_holds_its_slot_until_the_lease_ends(self):
        driver = Driver(SYNC, virtual_time=True)
        for i in range(3):
            driver.assign(f"d{i}", 0.0, duration_s=None)
        last = driver.assign("d3", 0.0, duration_s=5.0)
        driver.report(last)
        assert driver.check_in("d4", 59.0, duration_s=1.0) == Waiting("round-full")
        assert isinstance(driver.check_in("d4", 60.5, duration_s=1.0), AssignmentRecord)

    def test_a_device_slower_than_its_lease_counts_as_dropped(self):
        driver = Driver(SYNC, virtual_time=True)
        record = driver.assign("slow", 0.0, duration_s=61.0)
        with pytest.raises(LeaseExpired):
            driver.report(record)


def test_who_gives_back_after_the_close_was_at_work_when_it_closed():
    """In virtual time a commit can come after events that lie behind it; it must not see them. Also after a restart."""
    policy = RoundPolicy(
        buffer_size=1, concurrency=3, refill_at=3, max_staleness=1, lease_s=60.0, weight_cap=100, rounds=9
    )
    invitations = {}
    for name in ("after", "before", "restarted"):
        driver = Driver(policy, virtual_time=True)
        hopeless = driver.assign("a", 0.0, duration_s=2.0 if name == "before" else 20.0)
        good = driver.assign("b", 1.0, duration_s=9.0)
        driver.report(good)
        driver.engine.abandon(hopeless.assignment_id)
        if name == "restarted":
            driver.engine = RoundEngine.restore(
                policy,
                [good],
                virtual_time=True,
                version=0,
                next_number=2,
                opened_at=0.0,
                invitations=driver.engine.invitations,
                given_back=[hopeless],
            )
        assert driver.close(25.0) == [good.number]
        invitations[name] = driver.engine.invitations
    assert invitations == {"after": 1, "before": 0, "restarted": 1}


def test_a_full_buffer_closes_with_the_same_reports_also_where_the_clock_is_set_back():
    """What was released for a set must be committed for it, whatever comes between a crash and the next attempt."""
    engine = RoundEngine(RoundPolicy(**(vars(SYNC) | {"buffer_size": 2})))
    records = [engine.check_in(device, 1, 100.0, iter([f"{n:032x}"]).__next__) for n, device in enumerate("abc")]
    for n in (1, 2):
        engine.report(records[n], ReportFile(f"{n:032x}", "0" * 64, 10, 0.0), 100.0 + n)
    before = [r.number for r in engine.closing(103.0).counted]
    restored = RoundEngine.restore(
        engine.policy,
        [engine.live(r.assignment_id) for r in records],
        virtual_time=False,
        version=0,
        next_number=3,
        opened_at=0.0,
    )
    late = restored.live(records[0].assignment_id)
    restored.report(late, ReportFile("f" * 32, "0" * 64, 10, 0.0), 50.0)
    assert [r.number for r in restored.closing(51.0).counted] == before
