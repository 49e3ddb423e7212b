"""Selection where devices come by themselves: by turns, by speed, by kind; the same after a restart; nobody starves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.messages import Assigned, Wait
from server_ref.assignments import ReportFile, RoundPolicy
from server_ref.checkin import AtCheckIn
from server_ref.config import TaskConfig
from server_ref.rounds import RoundEngine
from server_ref.selection import jain_index
from server_ref.selection.history import DeviceHistory
from server_ref.selection.ties import KeyedTies
from tests.served import Served

KEY = bytes(range(32))
LATENCY_S = {"high_end": 5.0, "mid_range": 20.0, "low_end": 80.0}


class Rounds:
    """Rounds of five devices; whoever is assigned reports. A restart forgets all but what the table would hold."""

    def __init__(
        self, policy: str, *, restarts: bool = False, rounds: int = 200, patience_s: float | None = 1800.0
    ) -> None:
        selection = {"policy": policy, "patience_s": patience_s}
        self.config = TaskConfig(bundle="b", buffer_size=5, rounds=rounds, lease_s=600.0, selection=selection)
        self.engine = RoundEngine(RoundPolicy(5, 5, 5, 0, 600.0, 1, rounds), virtual_time=False)
        self.restarts = restarts
        self.table: dict[str, dict] = {}
        self.history = DeviceHistory()
        self.selection = self._open()
        self.asked: Counter[str] = Counter()
        self.chosen: list[str] = []

    def _open(self) -> AtCheckIn:
        return AtCheckIn(self.config, self.history, KeyedTies(KEY, "task"))

    def check_in(self, device: str, tier: str, now: float) -> bool:
        """Whether it was given work, which it does at once."""
        if self.restarts:
            for rows in self.history.take_changes():
                self.table |= {row["device_id"]: row for row in rows}
            self.history = DeviceHistory.load(self.table.values())
            self.selection = self._open()
        if not self.selection.admits(device, self.engine, now, tier=tier):
            return False
        record = self.engine.check_in(device, 1, now, lambda: f"{self.engine.next_number:032x}")
        if not hasattr(record, "assignment_id"):
            return False
        self.selection.given(device, self.engine.version)
        self.asked[device] += 1
        self.chosen.append(device)
        later = now + LATENCY_S[tier]
        self.engine.report(record, ReportFile(record.assignment_id, "", 1, 0.5), later)
        closing = self.engine.closing(later)
        if closing is not None:
            self.engine.commit(closing)
            self.selection.remember(closing.counted, closing.round_id)
        return True


def play(
    policy: str, *, hours: int = 12, restarts: bool = False, devices: int = 60, patience_s: float | None = 1800.0
) -> Rounds:
    """Devices that offer themselves every ten minutes; a third only in six hours of the day."""
    rounds = Rounds(policy, restarts=restarts, rounds=10**6, patience_s=patience_s)
    tiers = list(LATENCY_S)
    for minute in range(10, 10 + hours * 60, 10):
        for i in range(devices):
            if i % 3 == 0 and minute // 60 % 24 >= 6:
                continue
            rounds.check_in(f"d{i}", tiers[i % 4 % 3], 60.0 * minute + i)
    return rounds


@pytest.mark.parametrize("policy", ["fair", "fast", "diverse"])
def test_a_restart_before_every_check_in_changes_nothing(policy):
    runs = [play(policy, hours=4, devices=20, patience_s=None, restarts=restarts) for restarts in (True, False)]
    assert runs[0].chosen == runs[1].chosen
    assert len(runs[0].chosen) > 20


def test_fair_is_fairer_than_whoever_comes_first():
    everyday = [f"d{i}" for i in range(60) if i % 3]
    fair, fast = play("fair"), play("fast")
    fairness = {name: jain_index([run.asked[d] for d in everyday]) for name, run in (("fair", fair), ("fast", fast))}
    assert fairness["fair"] > 0.97
    assert fairness["fair"] > fairness["fast"]


@pytest.mark.parametrize("policy", ["fair", "fast", "diverse"])
def test_nobody_who_comes_again_is_starved(policy):
    assert set(play(policy, hours=31 if policy == "fast" else 12).asked) == {f"d{i}" for i in range(60)}


# Sixty devices again, each every ten minutes; every third one from midnight to six only.
WINDOW_H = 6
RARE = {f"d{i}" for i in range(0, 60, 3)}


def days(
    rounds: Rounds, hours: int, gone: frozenset[str] = frozenset(), since: int = 1, apart_s: float = 1.0
) -> list[int]:
    """Devices come one after another, but for those that are gone; model updates in each hour."""
    per_hour = []
    for hour in range(since, since + hours):
        before = rounds.engine.version
        for tick in range(6):
            for i in range(60):
                if f"d{i}" not in gone and not (f"d{i}" in RARE and hour % 24 >= WINDOW_H):
                    rounds.check_in(f"d{i}", "high_end", 3600.0 * hour + 600 * tick + apart_s * i)
        per_hour.append(rounds.engine.version - before)
    return per_hour


def rare_share(patience_s: float | None, apart_s: float) -> float:
    """Their share of the places in the window of the second day, when they have had fewer turns than the others."""
    rounds = Rounds("fair", rounds=10**6, patience_s=patience_s)
    days(rounds, 23, apart_s=apart_s)
    first_day = len(rounds.chosen)
    days(rounds, WINDOW_H, since=24, apart_s=apart_s)
    chosen = rounds.chosen[first_day:]
    assert set(chosen) >= RARE
    return sum(device in RARE for device in chosen) / len(chosen)


@pytest.mark.parametrize("apart_s", [1.0, 10.0])
def test_who_comes_for_few_hours_is_not_passed_over(apart_s):
    """By default nearly all places are theirs until they have caught up, whether all come at once or one by one."""
    assert rare_share(None, apart_s) > 0.95


def test_a_patience_shorter_than_devices_take_to_come_again_asks_whoever_comes_first():
    """Why the default follows what is observed: where all come in the same minute, one of a minute asks everybody."""
    assert rare_share(60.0, 1.0) < 0.85


def test_a_round_that_waits_asks_twice_as_many_each_time():
    rounds = Rounds("fair", rounds=10**6, patience_s=1800.0)
    days(rounds, 4)
    opened, pool = rounds.engine.opened_at, [f"d{i}" for i in range(60)]

    def admitted(waited_s: float) -> int:
        again = AtCheckIn(rounds.config, DeviceHistory.load(stored), KeyedTies(KEY, "task"))
        return sum(again.admits(device, rounds.engine, opened + waited_s) for device in pool)

    new, old = rounds.history.take_changes()
    stored = [*new, *old]
    assert [admitted(s) for s in (0, 1799, 1800, 3599)] == [5, 5, 10, 10]


def test_devices_that_are_gone_hold_up_rounds_for_two_hours_at_most():
    """They had the fewest turns, are chosen every time, and never come; then nobody expects them any more."""
    rounds = Rounds("fair", rounds=10**6, patience_s=None)
    usual = days(rounds, 24, since=WINDOW_H)[12]
    gone = frozenset(f"d{i}" for i in range(1, 60, 3))
    after = days(rounds, 6, gone, since=WINDOW_H + 24)
    assert min(after[2:]) >= usual - 1
    assert min(after) >= 1


@given(st.lists(st.floats(1.0, 3000.0), min_size=1, max_size=20), st.integers(0, 1000))
def test_the_interval_is_that_within_which_three_quarters_come_again(intervals, hour):
    history = DeviceHistory()
    start = 3600.0 * hour
    for i, interval in enumerate(intervals):
        for now in (start, start + interval, start + interval + 1):
            history.offered(f"d{i}", round_id=0, now=now, joined_turns=0, tier=0, stratum=0)
    rows = np.arange(len(intervals))
    assert history.interval_s(rows, hour) == 0.0, "what happens in an hour counts from the next one on"
    found = history.interval_s(rows, hour + 1)
    for i in rows:
        history.offered(f"d{i}", round_id=1, now=start + 3600, joined_turns=0, tier=0, stratum=0)
    assert history.interval_s(rows, hour + 1) == found
    assert sum(i <= found + 1e-6 for i in intervals) >= 0.75 * len(intervals) - 1
    assert sum(i >= found - 1e-6 for i in intervals) >= 0.25 * len(intervals) - 1
    assert min(abs(i - found) for i in intervals) < 1e-6


def test_fast_asks_fast_devices_more_often():
    asked = play("fast").asked
    by_tier = Counter()
    for i in range(60):
        by_tier[list(LATENCY_S)[i % 4 % 3]] += asked[f"d{i}"]
    assert by_tier["high_end"] / 30 > by_tier["low_end"] / 15


def test_fresh_keys_do_not_jump_the_queue():
    rounds = Rounds("fair")
    for lap in range(20):
        for i in range(20):
            rounds.check_in(f"d{i}", "high_end", 1000.0 * lap + 20 * i)
    row = rounds.history
    typical = np.median(row.turns(rounds.engine.version))
    assert typical >= 1
    rounds.check_in("fresh", "high_end", 20_500.0)
    fresh = row.row("fresh")
    assert fresh is not None
    assert int(fresh["joined_turns"][0]) >= typical


def test_the_database_keeps_who_took_part_across_a_restart(tmp_path, softmax_bundle):
    with Served(
        tmp_path,
        softmax_bundle,
        buffer_size=1,
        rounds=30,
        selection={"policy": "fair"},
        divergence={"enabled": False},
    ) as served:
        update = np.full(served.size, 1e-3)

        def turn(name: str) -> bool:
            reply = served.check_in(name)
            if isinstance(reply, Assigned):
                served.report(name, reply.assignment, update)
                return True
            assert isinstance(reply, Wait)
            assert reply.reason == "not-selected"
            return False

        assert turn("a")
        assert turn("b"), "the pool is of one device only, and asks everybody"
        served.restart()
        # Whoever joins later is taken to have had the turns of a typical device.
        assert not any(turn("b") for _ in range(20)), "asking again and again changes nothing"
        assert turn("a")
