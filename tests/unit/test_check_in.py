"""Who may still take part: the limit of participations that a privacy budget rests on."""

from server_ref.assignments import AssignmentRecord, RoundPolicy
from server_ref.checkin import AtCheckIn
from server_ref.config import TaskConfig
from server_ref.rounds import RoundEngine
from server_ref.selection.ties import KeyedTies

POLICY = RoundPolicy(buffer_size=1, concurrency=2, refill_at=1, max_staleness=0, lease_s=10.0, weight_cap=1, rounds=100)


def config(**privacy):
    return TaskConfig(
        bundle="b",
        aggregation={"clip_norm": 1.0},
        privacy={"noise": "server", "noise_multiplier": 1.0, **privacy},
    )


def check_in(settings, *, participations=None):
    return AtCheckIn(settings, None, KeyedTies(bytes(16)), participations)


def record(device, number=0):
    return AssignmentRecord(number, f"{number:032x}", device, 0, 0, 1, 0.0, 10.0, arrival=1.0)


def test_a_device_takes_part_as_often_as_the_budget_says_and_no_more():
    selection, engine = check_in(config(max_participations=2)), RoundEngine(POLICY)
    for number in range(2):
        assert selection.admits("a", engine, 0.0)
        selection.record([record("a", number), record("b", 10 + number)][: 2 - number])
    assert not selection.admits("a", engine, 0.0)
    assert selection.admits("b", engine, 0.0)
    assert selection.admits("c", engine, 0.0)


def test_a_restart_remembers_who_took_part():
    selection = check_in(config(max_participations=3), participations={"a": 3, "b": 2})
    engine = RoundEngine(POLICY)
    assert not selection.admits("a", engine, 0.0)
    assert selection.admits("b", engine, 0.0)


def test_without_a_limit_everybody_may_come_again():
    selection = check_in(config())
    selection.record([record("a", n) for n in range(50)])
    assert selection.admits("a", RoundEngine(POLICY), 0.0)


def test_a_device_that_holds_its_last_assignment_keeps_it():
    selection, engine = check_in(config(max_participations=1)), RoundEngine(POLICY)
    assert selection.admits("a", engine, 0.0)
    engine.check_in("a", 5, 0.0, lambda: "0" * 32)
    selection.record([record("a")])
    assert selection.admits("a", engine, 0.0)
