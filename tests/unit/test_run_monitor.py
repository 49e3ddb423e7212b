"""What a run's monitor makes of its sessions: who counted, who was refused and why, and whose reports were excluded."""

from __future__ import annotations

import pytest

from client_sdk.protocol.profile import DeviceTier
from simulator.journal import Journal
from simulator.monitor import RunMonitor, participation, slow_share
from simulator.population import Population
from simulator.progress import SilentDisplay
from simulator.sessions import Outcome, Session, SessionEnd
from simulator.view import CommittedRound

HASH = "0" * 64


def committed(round_id, reports, **changes):
    values = {
        "round_id": round_id, "model_version": round_id + 1, "model_sha256": HASH, "reports": reports, "discarded": 0,
        "opened_at_s": 0.0, "closed_at_s": 1.0, "validation_accuracy": 0.5, "validation_loss": 1.0, "bytes_up": 100,
    }  # fmt: skip
    return CommittedRound(**{**values, **changes})


def session(number, device, arrives_s, outcome=Outcome.ACCEPTED, reason=None, round_id=0):
    return Session(device, number, round_id, round_id, 0.0, arrives_s, SessionEnd(outcome, 10, 20, reason))


@pytest.fixture
def monitor(tmp_path):
    rounds = [
        committed(0, 2, measurements={"excluded": [1], "clipped": 1, "norm_median": 1.5, "num_byzantine": 1}),
        committed(1, 1),
    ]
    with Journal(tmp_path / "journal") as journal:
        made = RunMonitor(
            lambda since: rounds[since:], journal, SilentDisplay(), of_rounds=2, cohort=2, dense_report_bytes=400
        )
        for s in (
            session(0, 5, 1.0),
            session(1, 6, 2.0),
            session(2, 7, 3.0, Outcome.REFUSED, "stale-report"),
            session(3, 8, 4.0),  # its upload beat the commit on this machine; it came too late all the same
            session(4, 9, None, Outcome.FAILED, "update-out-of-range"),
            session(5, 1, None, Outcome.DROPPED),
            session(6, 5, 9.0, round_id=1),
        ):
            made.assigned(s)
            made.ended(s)
        made.advanced(2)
        yield made


def test_reasons_are_counted_and_a_late_report_is_stale_however_its_upload_went(monitor):
    counted = monitor.counted(lambda _version: 0)
    assert [[s.number for s in sessions] for sessions in counted] == [[0, 1], [6]]
    assert monitor.refusals(counted) == {"stale-report": 2, "update-out-of-range": 1}


def test_a_failed_session_is_no_delivered_one_but_its_bytes_count(monitor):
    standing = monitor.standing()
    assert standing.sessions == 5
    assert standing.bytes_up == 60


def test_what_compression_saved_is_known_while_the_run_goes_on(monitor):
    assert standing_saved(monitor) == pytest.approx(1 - 200 / (3 * 400))


def standing_saved(monitor):
    return monitor.standing().saved


def test_exclusions_are_told_apart_by_who_attacks(monitor):
    counted = monitor.counted(lambda _version: 0)
    first, second = monitor.round_results(counted, lambda device: device in {6, 9})
    assert (first.attackers, first.excluded_attackers, first.excluded) == (1, 1, (1,))
    assert (first.clipped, first.norm_median, first.num_byzantine) == (1, 1.5, 1)
    assert (second.attackers, second.excluded_attackers) == (0, 0)
    assert [r.attackers for r in monitor.round_results()] == [0, 0]


def test_sessions_are_told_apart_by_tier(monitor):
    population = Population(1, 10)
    rows = monitor.tier_results(population, monitor.counted(lambda _version: 0))
    total = {kind: sum(getattr(row, kind) for row in rows) for kind in ("counted", "late", "dropped", "refused")}
    assert total == {"counted": 3, "late": 2, "dropped": 1, "refused": 1}
    assert {row.examples for row in rows} == {None}


def test_the_work_of_a_tier_is_what_its_counted_sessions_trained(monitor):
    population = Population(1, 10)
    rows = monitor.tier_results(population, monitor.counted(lambda _version: 0), examples=[10**d for d in range(10)])
    # Device 5 counted twice, device 6 once; what came late or never was work for nothing.
    assert sum(row.examples for row in rows) == 2 * 10**5 + 10**6
    assert {row.tier for row in rows if row.examples} == {population.tier(5), population.tier(6)}


def test_slow_devices_are_the_stragglers_or_else_the_lowest_tier(monitor):
    counted = monitor.counted(lambda _version: 0)
    fleet = Population(1, 10, stragglers=0.2)
    times = participation(fleet, counted)
    assert times == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0]
    slow = fleet.slow_devices
    assert slow_share(fleet, [1 if d in slow else 2 for d in range(10)]) == 0.5
    plain = Population(1, 10)
    low = {d for d in range(10) if plain.tier(d) is DeviceTier.LOW_END}
    assert slow_share(plain, [3 if d in low else 4 for d in range(10)]) == 0.75
    assert slow_share(plain, [0] * 10) is None
