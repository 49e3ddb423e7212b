"""What the devices' days did to a run: in its results, its report and its last words, and only where there are days."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from client_sdk.power import PauseReason
from simulator import figures_days, traces
from simulator.days import days_of
from simulator.population import Population, examples_trained
from simulator.profiles import FleetProfiles, read_profiles
from simulator.results import DaysResult
from simulator.sessions import Outcome, Session, SessionEnd
from simulator.summary import summary_of
from tests.unit.test_simulator_report import CONFIG, drawn, report, results, words_of


def fleet(devices=40, **day):
    """One kind of device, whose day is given."""
    kind = read_profiles("steady").profile[0].model_dump() | {"name": "only", "share": 1.0} | day
    return Population(3, devices, profiles=FleetProfiles.model_validate({"profile": [kind]}))


def session(*pauses, outcome=None, reason=None):
    made = Session(0, 0, 0, 0, 0.0, None if outcome is Outcome.DROPPED else 5.0, pauses=pauses)
    if outcome is not None:
        made.end = SessionEnd(outcome, reason=reason)
    return made


def days(**changes):
    by_night = tuple(0.9 if hour < 6 else 0.2 for hour in range(24))
    values = {
        "devices": 40, "may_start": by_night, "kept_away": {"user-active": tuple(1 - share for share in by_night)},
        "paused": 7, "resumed": 4, "pauses": {"user-active": 8, "network": 1},
        "lost": {"vanished": 3, "user-active": 2},
    }  # fmt: skip
    return DaysResult(**{**values, **changes})


# --- results.json --------------------------------------------------------------------------------------------


def test_a_fleet_that_is_always_available_has_no_days():
    assert days_of(Population(1, 10), [session(outcome=Outcome.ACCEPTED)]) is None


def test_availability_is_told_hour_by_hour():
    found = days_of(fleet(availability=["0-6"]), [])
    assert found.may_start == (1.0,) * 6 + (0.0,) * 18
    assert found.kept_away == {traces.UNAVAILABLE: (0.0,) * 6 + (1.0,) * 18}
    assert found.devices == 40


def test_the_shares_of_an_hour_are_those_of_all_devices_looked_at():
    found = days_of(Population(2, 30, profiles=read_profiles("phones")), [])
    for hour in range(24):
        away = sum(shares[hour] for shares in found.kept_away.values())
        assert found.may_start[hour] + away == pytest.approx(1)
    commonness = [sum(shares) for shares in found.kept_away.values()]
    assert commonness == sorted(commonness, reverse=True)
    assert len(commonness) > 1


def test_of_a_large_fleet_some_are_looked_at_evenly_picked():
    large = fleet(52, availability=0.5)
    found = days_of(large, [], most_devices=5)
    picked = traces.FleetTraces(large).reasons_by_hour([0, 10, 20, 31, 41])
    assert found.devices == 5
    assert found.may_start == tuple(hour[None] / hour.total() for hour in picked)


def test_pauses_and_losses_are_counted_by_reason():
    found = days_of(
        fleet(availability=0.5),
        [
            session(outcome=Outcome.ACCEPTED),
            session("network", "user-active", outcome=Outcome.ACCEPTED),
            session("network", outcome=Outcome.REFUSED, reason="stale-report"),
            session("network", outcome=Outcome.DROPPED, reason="network"),
            session("user-active", outcome=Outcome.DROPPED, reason="vanished"),
            session(outcome=Outcome.DROPPED, reason="vanished"),
            session("user-active"),  # under way when the run ended; its end is known
        ],
    )
    assert (found.paused, found.resumed) == (5, 3)
    assert found.pauses == {"network": 3, "user-active": 3}
    assert found.lost == {"vanished": 2, "network": 1}


@pytest.mark.parametrize("changes", [{"may_start": (0.5,) * 23}, {"kept_away": {"busy": (2.0,) * 24}}, {"devices": 0}])
def test_days_that_cannot_be_are_refused(changes):
    with pytest.raises(ValidationError):
        days(**changes)


@pytest.mark.parametrize(("epochs", "steps", "trained"), [(1, None, 10), (3, None, 30), (3, 2, 16), (1, 9, 10)])
def test_a_session_trains_its_examples_in_every_epoch_up_to_its_steps(epochs, steps, trained):
    plan = CONFIG.plan.model_copy(update={"local_epochs": epochs, "batch_size": 8, "max_steps": steps})
    assert examples_trained(plan, 10) == trained


# --- report.html ---------------------------------------------------------------------------------------------


def test_a_report_without_days_has_no_section_of_them(tmp_path):
    text = report(tmp_path, results())
    assert not {"availability", "disturbances", "work"} & set(drawn(text))
    assert "The devices' day" not in words_of(text)
    assert "from midnight on" not in words_of(text)


def test_a_day_is_drawn_and_told(tmp_path):
    text = report(tmp_path, results(days=days()))
    words = words_of(text)
    assert "virtual time 0:30 from midnight on" in words
    assert "most may start between 0:00 and 1:00 (90 %), fewest between 6:00 and 7:00 (20 %)" in words
    assert "7 sessions stood still, 9 times in all; 4 of them were taken up again" in words
    assert "5 sessions never reported: vanished for good 3, in use 2." in words
    assert "high end: 25 % of the devices, 75 % of the examples trained" in words
    hours = drawn(text)["availability"]["data"]
    assert [trace["name"] for trace in hours] == ["may start", "in use"]
    for hour in range(24):
        assert sum(trace["y"][hour] for trace in hours) == pytest.approx(100)


def test_pauses_and_losses_share_their_reasons_the_commonest_on_top(tmp_path):
    lost, paused = drawn(report(tmp_path, results(days=days())))["disturbances"]["data"]
    assert lost["y"] == paused["y"] == ["no network it may use", "vanished for good", "in use"]
    assert (lost["x"], paused["x"]) == ([0, 3, 2], [1, 0, 8])


def test_the_tiers_shares_of_work_add_up(tmp_path):
    figure = drawn(report(tmp_path, results(days=days())))["work"]
    assert {trace["name"]: trace["customdata"] for trace in figure["data"]} == {
        "devices": [1, 2, 1],
        "sessions": [5, 3, 3],
        "reports in a model": [4, 2, 0],
        "examples trained for them": [48, 16, 0],
    }
    assert all(sum(trace["y"]) == pytest.approx(100, abs=0.05) for trace in figure["data"])


def test_a_quiet_day_says_so(tmp_path):
    text = report(tmp_path, results(days=days(paused=0, resumed=0, pauses={}, lost={})))
    assert "disturbances" not in drawn(text)
    assert "availability" in drawn(text)


def test_every_reason_has_a_name():
    reasons = {*PauseReason, traces.UNAVAILABLE, traces.VANISHED, traces.TOO_SLOW}
    assert set(figures_days.REASON_NAMES) == reasons


# --- the last words ------------------------------------------------------------------------------------------


def test_the_last_words_tell_of_pauses_and_losses_where_there_were_any():
    def lines(facts):
        return {line[:16].strip(): line[16:] for line in summary_of(facts, Path("runs/x"))}

    told = lines(results(days=days()))
    assert told["paused"] == "7 sessions (in use 8, no network it may use 1); 4 went on"
    assert told["lost"] == "5 sessions (vanished for good 3, in use 2)"
    quiet = lines(results(days=days(paused=0, resumed=0, pauses={}, lost={})))
    assert not {"paused", "lost"} & set(quiet)


def test_results_with_days_are_read_back(tmp_path):
    facts = results(days=days())
    assert type(facts).read(facts.write(tmp_path)) == facts
