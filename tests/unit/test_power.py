"""When a device may train: thresholds, hysteresis, what unknown means, quiet hours, and how a reason is ranked."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.conditions import Conditions, ConditionsSource, Network, ScriptedSource, ThermalStatus, TimelineSource
from client_sdk.power import ALLOWED, PauseReason, PowerMonitor, PowerPolicy, QuietHours, Verdict

NOON = time(12)
FINE = Conditions(
    battery_level=0.8,
    charging=False,
    temperature_c=30.0,
    thermal=ThermalStatus.NONE,
    load=0.1,
    user_active=False,
    network=Network.UNMETERED,
)
POLICY = PowerPolicy()

conditions = st.builds(
    Conditions,
    battery_level=st.none() | st.floats(0, 1) | st.sampled_from([0.05, 0.15, 0.2, 0.3, 0.5]),
    charging=st.none() | st.booleans(),
    temperature_c=st.none() | st.floats(-20, 90) | st.sampled_from([36.0, 38.0, 40.0, 42.0, 48.0]),
    thermal=st.none() | st.sampled_from(ThermalStatus),
    load=st.none() | st.floats(0, 8),
    user_active=st.none() | st.booleans(),
    network=st.sampled_from(Network),
)
policies = st.builds(
    PowerPolicy,
    require_charging=st.booleans(),
    require_unmetered=st.booleans(),
    require_idle=st.booleans(),
    max_start_load=st.none() | st.just(0.5),
    quiet_hours=st.sampled_from([(), (QuietHours(begin=time(11), end=time(13)),)]),
)


def monitor(source: ConditionsSource, **policy: object) -> PowerMonitor:
    return PowerMonitor(source, PowerPolicy(**policy), clock=lambda: 0.0, timezone=UTC)


def may_start(**changes: object) -> Verdict:
    return POLICY.start_verdict(replace(FINE, **changes), NOON)


def may_continue(**changes: object) -> Verdict:
    return POLICY.continue_verdict(replace(FINE, **changes), NOON)


def test_without_arguments_it_looks_at_this_machine():
    here = PowerMonitor()
    level = here.battery_level
    assert level is None or 0 <= level <= 1
    assert isinstance(here.is_connected_to_wifi(), bool)
    assert here.is_device_active() is False, "the files of a system do not say who uses it"
    assert here.can_start_training() is here.start_verdict().allowed
    assert here.can_continue_training() is here.continue_verdict().allowed


def test_the_specifications_questions():
    on_wifi = monitor(ScriptedSource(FINE))
    assert (on_wifi.battery_level, on_wifi.is_connected_to_wifi(), on_wifi.is_device_active()) == (0.8, True, False)
    assert on_wifi.can_start_training()
    assert on_wifi.can_continue_training()
    in_use = monitor(ScriptedSource(replace(FINE, user_active=True, network=Network.METERED)))
    assert (in_use.is_connected_to_wifi(), in_use.is_device_active()) == (False, True)
    assert not in_use.can_start_training()
    assert not in_use.can_continue_training()


@pytest.mark.parametrize(
    ("percent", "starts", "continues"), [(21, 1, 1), (20, 1, 1), (19, 0, 1), (16, 0, 1), (15, 0, 0)]
)
def test_it_starts_at_20_percent_and_pauses_at_15(percent: int, starts: int, continues: int):
    assert may_start(battery_level=percent / 100).allowed == starts
    assert may_continue(battery_level=percent / 100).allowed == continues


def test_a_battery_that_hovers_does_not_switch_training_on_and_off():
    """At the edge a level flickers by a percent; between the thresholds the answer is what it was."""
    training, switches = True, 0
    for percent in (17, 16, 15, 16, 17, 16, 18, 19, 18, 19):
        verdict = (may_continue if training else may_start)(battery_level=percent / 100)
        switches += verdict.allowed != training
        training = verdict.allowed
    assert (training, switches) == (False, 1)


@pytest.mark.parametrize(
    ("changes", "reason", "hard"),
    [
        ({"battery_level": 0.15}, PauseReason.BATTERY_LOW, False),
        ({"battery_level": 0.05}, PauseReason.BATTERY_EMPTY, True),
        ({"battery_level": 0.05, "charging": True}, PauseReason.BATTERY_LOW, False),
        ({"temperature_c": 42.0}, PauseReason.HOT, False),
        ({"temperature_c": 48.0}, PauseReason.OVERHEATED, True),
        ({"thermal": ThermalStatus.SEVERE}, PauseReason.HOT, False),
        ({"thermal": ThermalStatus.CRITICAL}, PauseReason.OVERHEATED, True),
        ({"user_active": True}, PauseReason.USER_ACTIVE, False),
        ({"network": Network.METERED}, PauseReason.NETWORK, False),
        # A hard reason is told before a soft one: it decides how fast to stop.
        ({"user_active": True, "battery_level": 0.01}, PauseReason.BATTERY_EMPTY, True),
    ],
)
def test_what_ends_training(changes: dict, reason: PauseReason, hard: bool):
    verdict = may_continue(**changes)
    assert (verdict.allowed, verdict.reason, verdict.hard) == (False, reason, hard)
    assert verdict.detail
    assert may_start(**changes) == verdict


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"battery_level": 0.19}, PauseReason.BATTERY_LOW),
        ({"temperature_c": 38.1}, PauseReason.HOT),
        ({"thermal": ThermalStatus.MODERATE}, PauseReason.HOT),
        ({"network": Network.NONE}, PauseReason.NETWORK),
        ({"network": Network.UNKNOWN}, PauseReason.NETWORK),
    ],
)
def test_what_keeps_training_from_starting_but_does_not_end_it(changes: dict, reason: PauseReason):
    verdict = may_start(**changes)
    assert (verdict.allowed, verdict.reason) == (False, reason)
    assert may_continue(**changes) == ALLOWED


def test_a_phone_at_the_edge_of_warm_may_start():
    assert may_start(temperature_c=38.0, thermal=ThermalStatus.LIGHT) == ALLOWED


def test_nothing_known_is_a_machine_on_mains():
    nothing = Conditions()
    assert POLICY.continue_verdict(nothing, NOON) == ALLOWED
    # Only the price of an upload is not taken on trust.
    assert POLICY.start_verdict(nothing, NOON).reason is PauseReason.NETWORK
    relaxed = PowerPolicy(require_unmetered=False, require_charging=True, max_start_load=0.1)
    assert relaxed.start_verdict(nothing, NOON) == ALLOWED


def test_charging_load_network_and_user_are_asked_where_the_policy_wants_them():
    asked = PowerPolicy(require_charging=True, max_start_load=0.5)
    assert asked.continue_verdict(FINE, NOON).reason is PauseReason.NOT_CHARGING
    assert asked.continue_verdict(replace(FINE, charging=True), NOON) == ALLOWED
    busy = replace(FINE, charging=True, load=0.6)
    assert asked.start_verdict(busy, NOON).reason is PauseReason.BUSY
    assert asked.continue_verdict(busy, NOON) == ALLOWED, "training is a load of its own"
    lax = PowerPolicy(require_unmetered=False, require_idle=False)
    assert lax.start_verdict(replace(FINE, network=Network.METERED, user_active=True), NOON) == ALLOWED


@given(policies, conditions)
def test_what_may_start_may_continue(policy: PowerPolicy, now: Conditions):
    """Else training would begin and pause at once, for ever."""
    if policy.start_verdict(now, NOON).allowed:
        assert policy.continue_verdict(now, NOON).allowed


@given(policies, conditions)
def test_a_refusal_has_a_reason_and_only_a_refusal_is_hard(policy: PowerPolicy, now: Conditions):
    for verdict in (policy.start_verdict(now, NOON), policy.continue_verdict(now, NOON)):
        assert verdict.allowed == (verdict.reason is None) == (verdict.detail == "")
        assert not (verdict.allowed and verdict.hard)


@given(conditions, st.floats(0, 1), st.floats(-20, 90), st.sampled_from(ThermalStatus))
def test_the_duty_cycle_never_rises_as_things_get_worse(
    now: Conditions, level: float, heat: float, thermal: ThermalStatus
):
    share = POLICY.duty_cycle(now)
    assert 0 < share <= 1
    if now.battery_level is not None and level <= now.battery_level:
        assert POLICY.duty_cycle(replace(now, battery_level=level)) <= share
    if now.temperature_c is not None and heat >= now.temperature_c:
        assert POLICY.duty_cycle(replace(now, temperature_c=heat)) <= share
    if now.thermal is not None and thermal >= now.thermal:
        assert POLICY.duty_cycle(replace(now, thermal=thermal)) <= share
    assert POLICY.duty_cycle(replace(now, charging=True)) >= share


def test_it_throttles_below_20_percent():
    assert POLICY.duty_cycle(FINE) == 1
    assert POLICY.duty_cycle(replace(FINE, battery_level=0.19)) == 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        {"start_battery": 0.15},
        {"empty_battery": 0.15},
        {"max_temperature_c": 38.0},
        {"critical_temperature_c": 42.0},
        {"max_thermal": ThermalStatus.CRITICAL},
        {"max_start_thermal": ThermalStatus.SEVERE},
        {"duty_by_battery": ((0.2, 0.5), (0.4, 0.25))},
        {"duty_by_battery": ((0.4, 0.5), (0.2, 0.25))},
        {"duty_by_temperature": ((36.0, 0.25), (40.0, 0.5))},
        {"duty_by_temperature": ((36.0, 0.0),)},
        {"start_battery": float("nan")},
        {"quiet_hours": ({"begin": "22:00", "end": "22:00"},)},
        {"quiet_hours": ({"begin": "22:00Z", "end": "23:00Z"},)},
        {"wifi": True},
    ],
)
def test_a_policy_without_hysteresis_or_sense_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        PowerPolicy(**wrong)


def test_a_policy_can_be_read_from_a_file_of_settings():
    policy = PowerPolicy.model_validate_json(
        '{"quiet_hours": [{"begin": "22:00", "end": "06:30"}], "start_battery": 0.5}'
    )
    assert policy.quiet_hours == (QuietHours(begin=time(22), end=time(6, 30)),)
    assert PowerPolicy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    ("at", "by_day", "by_night"),
    [("08:59", False, False), ("09:00", True, False), ("16:59", True, False), ("17:00", False, False),
     ("21:59", False, False), ("22:00", False, True), ("23:59", False, True), ("00:00", False, True),
     ("05:59", False, True), ("06:00", False, False)],
)  # fmt: skip
def test_quiet_hours_include_their_begin_and_not_their_end_also_over_midnight(at: str, by_day: bool, by_night: bool):
    local = time.fromisoformat(at)
    assert QuietHours(begin=time(9), end=time(17)).include(local) is by_day
    assert QuietHours(begin=time(22), end=time(6)).include(local) is by_night


def quiet_at(zone: str, instant: str, begin: time, end: time) -> bool:
    policy = PowerPolicy(quiet_hours=(QuietHours(begin=begin, end=end),))
    at = datetime.fromisoformat(instant).timestamp()
    verdict = PowerMonitor(ScriptedSource(FINE), policy, clock=lambda: at, timezone=ZoneInfo(zone)).continue_verdict()
    assert verdict.allowed or verdict.reason is PauseReason.QUIET_HOURS
    return not verdict.allowed


def test_the_hours_are_the_users_own():
    assert quiet_at("Asia/Tokyo", "2026-07-01T14:00:00Z", time(22), time(6))  # 23:00 there
    assert not quiet_at("America/New_York", "2026-07-01T14:00:00Z", time(22), time(6))  # 10:00 there


def test_an_hour_that_happens_twice_is_quiet_twice():
    """Berlin, 25 October 2026: at 01:00 UTC the clocks go back from 03:00 to 02:00."""
    found = [quiet_at("Europe/Berlin", f"2026-10-25T0{h}:30:00Z", time(2), time(3)) for h in range(3)]
    assert found == [True, True, False]


def test_an_hour_that_clocks_skip_is_not_made_up_for():
    """Berlin, 29 March 2026: at 01:00 UTC the clocks jump from 02:00 to 03:00."""
    found = [quiet_at("Europe/Berlin", f"2026-03-29T0{h}:30:00Z", time(2), time(3)) for h in range(3)]
    assert found == [False, False, False]
    assert quiet_at("Europe/Berlin", "2026-03-29T00:30:00Z", time(1), time(4))
    assert quiet_at("Europe/Berlin", "2026-03-29T01:30:00Z", time(1), time(4))
    assert not quiet_at("Europe/Berlin", "2026-03-29T02:30:00Z", time(1), time(4))


def test_a_script_is_read_one_by_one_and_then_stays():
    source = ScriptedSource(FINE, Conditions(), FINE)
    assert [source.read() for _ in range(5)] == [FINE, Conditions(), FINE, FINE, FINE]
    assert source.reads == 5


def test_a_timeline_holds_each_change_until_the_next():
    now = 0.0
    day, night = Conditions(charging=False), Conditions(charging=True)
    once = TimelineSource([(10, day), (20, night)], lambda: now)
    daily = TimelineSource([(10, day), (20, night)], lambda: now, period_s=24)
    for at, expected_once, expected_daily in [(0, day, night), (10, day, day), (20, night, night), (36, night, day)]:
        now = float(at)
        assert (once.read(), daily.read()) == (expected_once, expected_daily)


@pytest.mark.parametrize(
    ("changes", "period_s"),
    [([], None), ([(1, FINE), (1, FINE)], None), ([(2, FINE), (1, FINE)], None), ([(24, FINE)], 24)],
)
def test_a_timeline_out_of_order_is_refused(changes: list, period_s: float | None):
    with pytest.raises(ValueError, match="timeline"):
        TimelineSource(changes, lambda: 0.0, period_s=period_s)


@pytest.mark.parametrize(
    "wrong",
    [
        {"battery_level": 1.01},
        {"battery_level": float("nan")},
        {"temperature_c": 1e3},
        {"load": float("inf")},
        {"load": -1},
    ],
)
def test_a_reading_that_is_none_is_refused(wrong: dict):
    with pytest.raises(ValueError, match="must"):
        Conditions(**wrong)


def test_androids_worst_statuses_are_critical():
    assert [ThermalStatus.of_android(n) for n in range(7)] == [
        *ThermalStatus,
        ThermalStatus.CRITICAL,
        ThermalStatus.CRITICAL,
    ]
    with pytest.raises(ValueError, match="-1"):
        ThermalStatus.of_android(-1)
