"""Selection where devices come by themselves: by turns, by speed, by kind; the same after a restart; nobody starves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

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

    def __init__(self, policy: str, *, restarts: bool = False, rounds: int = 200) -> None:
        self.config = TaskConfig(
            bundle="b", buffer_size=5, rounds=rounds, lease_s=600.0, selection={"policy": policy, "patience_s": 1800.0}
        )
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


def play(policy: str, *, hours: int = 12, restarts: bool = False) -> Rounds:
    """Sixty devices that offer themselves every ten minutes; a third only in six hours of the day."""
    rounds = Rounds(policy, restarts=restarts, rounds=10**6)
    tiers = list(LATENCY_S)
    for minute in range(10, 10 + hours * 60, 10):
        for i in range(60):
            if i % 3 == 0 and minute // 60 % 24 >= 6:
                continue
            rounds.check_in(f"d{i}", tiers[i % 4 % 3], 60.0 * minute + i)
    return rounds


@pytest.mark.parametrize("policy", ["fair", "fast", "diverse"])
def test_a_restart_before_every_check_in_changes_nothing(policy):
    assert play(policy, hours=3, restarts=True).chosen == play(policy, hours=3).chosen


def test_fair_is_fairer_than_whoever_comes_first():
    everyday = [f"d{i}" for i in range(60) if i % 3]
    fair, fast = play("fair"), play("fast")
    fairness = {name: jain_index([run.asked[d] for d in everyday]) for name, run in (("fair", fair), ("fast", fast))}
    assert fairness["fair"] > 0.97
    assert fairness["fair"] > fairness["fast"]


@pytest.mark.parametrize("policy", ["fair", "fast", "diverse"])
def test_nobody_who_comes_again_is_starved(policy):
    assert set(play(policy, hours=31 if policy == "fast" else 12).asked) == {f"d{i}" for i in range(60)}


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
