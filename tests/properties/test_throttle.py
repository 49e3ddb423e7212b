"""The governor: within how many calls a condition that failed ends training, and what share of time it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.conditions import Conditions, Network, ScriptedSource, ThermalStatus
from client_sdk.power import ALLOWED, PauseReason, PowerMonitor, PowerPolicy
from client_sdk.throttle import Governor

FINE = Conditions(battery_level=0.9, charging=False, temperature_c=25.0, network=Network.UNMETERED)
IN_USE = replace(FINE, user_active=True)
BURNING = replace(FINE, thermal=ThermalStatus.CRITICAL)


class Machine:
    """Conditions that change when told to, and a clock that only calls and rests move."""

    def __init__(self, **policy: object) -> None:
        self.now = 0.0
        self.conditions = FINE
        self.reads = 0
        self.rests: list[float] = []
        self.governor = Governor(
            PowerMonitor(self, PowerPolicy(**policy)), monotonic=lambda: self.now, sleep=self.sleep
        )

    def read(self) -> Conditions:
        self.reads += 1
        return self.conditions

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def call(self, seconds: float = 0.01) -> None:
        self.now += seconds
        self.governor.after_call(seconds)

    def calls_until_stopped(self, slices: int, *, start: int = 0, most: int = 1000) -> int:
        """Calls that are granted from here on, where every ``slices``-th begins a step."""
        for n in range(most):
            if not self.governor.before_call(at_step_boundary=(start + n) % slices == 0).allowed:
                return n
            self.call()
        raise AssertionError(f"{most} calls were granted")


@given(
    every=st.integers(1, 9), grace=st.integers(0, 9), slices=st.integers(1, 12), before=st.integers(0, 30)
)  # fmt: skip
def test_a_soft_reason_ends_training_within_the_stated_calls(every: int, grace: int, slices: int, before: int):
    machine = Machine(check_every_calls=every, grace_calls=grace)
    for n in range(before):
        assert machine.governor.before_call(at_step_boundary=n % slices == 0) == ALLOWED
        machine.call()
    machine.conditions = IN_USE
    granted = machine.calls_until_stopped(slices, start=before)
    assert granted <= every - 1 + grace


@given(slices=st.integers(1, 12), before=st.integers(0, 30))
def test_a_soft_reason_waits_for_the_step_boundary_where_that_is_near(slices: int, before: int):
    machine = Machine(check_every_calls=1, grace_calls=12)
    for n in range(before):
        machine.governor.before_call(at_step_boundary=n % slices == 0)
    machine.conditions = IN_USE
    granted = machine.calls_until_stopped(slices, start=before)
    assert (before + granted) % slices == 0, "no half of a step is lost"
    assert granted < slices


@given(every=st.integers(1, 9), before=st.integers(0, 30), grace=st.integers(0, 9))
def test_a_hard_reason_ends_training_at_the_next_look_boundary_or_not(every: int, before: int, grace: int):
    machine = Machine(check_every_calls=every, grace_calls=grace)
    for _ in range(before):
        machine.governor.before_call(at_step_boundary=False)
        machine.call()
    machine.conditions = BURNING
    assert machine.calls_until_stopped(10**9, start=1) <= every - 1


def test_a_hard_reason_ends_a_grace():
    machine = Machine(check_every_calls=4, grace_calls=9)
    machine.conditions = IN_USE
    granted = machine.governor.before_call(at_step_boundary=False)
    assert (granted.allowed, granted.reason, granted.hard) == (True, PauseReason.USER_ACTIVE, False)
    machine.conditions = BURNING
    stopped = machine.governor.before_call(at_step_boundary=False)
    assert (stopped.allowed, stopped.reason, stopped.hard) == (False, PauseReason.OVERHEATED, True)


def test_a_reason_that_passes_within_its_grace_is_forgiven():
    machine = Machine(check_every_calls=4, grace_calls=2)
    for _ in range(5):
        machine.conditions = IN_USE
        while not (granted := machine.governor.before_call(at_step_boundary=False)).reason:
            machine.call()
        assert granted.allowed, "each reason has its whole grace"
        machine.conditions = FINE
        assert machine.governor.before_call(at_step_boundary=False) == ALLOWED


@given(every=st.integers(1, 20), calls=st.integers(1, 100))
def test_the_conditions_are_read_once_in_so_many_calls(every: int, calls: int):
    machine = Machine(check_every_calls=every, check_every_s=1e9)
    for _ in range(calls):
        machine.governor.before_call(at_step_boundary=True)
        machine.call()
    assert machine.reads == -(-calls // every)


def test_slow_calls_are_looked_at_more_often():
    machine = Machine(check_every_calls=100, check_every_s=10.0)
    for _ in range(10):
        machine.governor.before_call(at_step_boundary=True)
        machine.call(10.0)
    assert machine.reads == 10


@given(st.lists(st.floats(0.001, 2.0), min_size=20, max_size=60), st.sampled_from([25.0, 36.0, 38.0, 40.0]))
def test_the_share_of_time_at_work_is_the_duty_cycle(calls: Sequence[float], degrees: float):
    """Measured by the clock that work and rests move, as a battery or a thermometer would."""
    machine = Machine()
    machine.conditions = replace(FINE, temperature_c=degrees)
    duty = PowerPolicy().duty_cycle(machine.conditions)
    for seconds in calls:
        machine.governor.before_call(at_step_boundary=True)
        machine.call(seconds)
    worked = sum(calls)
    assert machine.governor.worked_s == pytest.approx(worked)
    assert machine.governor.rested_s == pytest.approx(sum(machine.rests))
    # At most the shortest rest is still owed.
    assert machine.now == pytest.approx(worked / duty, abs=0.051)
    assert all(rest >= 0.05 for rest in machine.rests)


def test_the_hotter_the_longer_it_takes():
    def time_for_a_hundred_calls(degrees: float) -> float:
        machine = Machine()
        machine.conditions = replace(FINE, temperature_c=degrees)
        for _ in range(100):
            machine.governor.before_call(at_step_boundary=True)
            machine.call(0.1)
        return machine.now

    taken = [time_for_a_hundred_calls(degrees) for degrees in (25, 36, 38, 40)]
    assert taken == pytest.approx([10, 13.3, 20, 40], rel=0.01)


def test_the_duty_follows_the_newest_reading():
    source = ScriptedSource(FINE, replace(FINE, battery_level=0.25), replace(FINE, battery_level=0.25, charging=True))
    rests: list[float] = []
    governor = Governor(
        PowerMonitor(source, PowerPolicy(check_every_calls=1)), monotonic=lambda: 0.0, sleep=rests.append
    )
    for _ in range(3):
        governor.before_call(at_step_boundary=True)
        governor.after_call(1.0)
    assert rests == [1.0], "only the reading at 25 % that was not charging"
