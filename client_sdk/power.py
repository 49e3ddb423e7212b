"""Whether a device may train now: the policy, and the monitor that asks it.

Thresholds to start are stricter than those to continue, so that a device at the edge does not switch on and off. What
is unknown (docs/device-resources.md has the table):

- battery: the machine runs on mains, so nothing is asked of a battery;
- temperature, thermal status, load, user: nothing speaks against training;
- network: metered, where the policy wants an unmetered one to start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, tzinfo
from datetime import time as time_of_day
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.conditions import Conditions, ConditionsSource, Network, ThermalStatus
from client_sdk.sysfs import SysfsSource

Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Celsius = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Duty = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class PauseReason(StrEnum):
    """Why a device may not train now: a bounded label, fit for metrics and for telling the user."""

    BATTERY_LOW = "battery-low"
    BATTERY_EMPTY = "battery-empty"
    NOT_CHARGING = "not-charging"
    HOT = "hot"
    OVERHEATED = "overheated"
    USER_ACTIVE = "user-active"
    BUSY = "busy"
    NETWORK = "network"
    QUIET_HOURS = "quiet-hours"


@dataclass(frozen=True)
class Verdict:
    """What the policy says.

    Attributes:
        allowed: Whether to go on.
        reason: Why not. An allowed verdict with a reason is a soft "no" in its grace: training ends soon.
        detail: The reason with its figures, for a log or a user.
        hard: Whether to stop before the next call, step boundary or not.
    """

    allowed: bool
    reason: PauseReason | None = None
    detail: str = ""
    hard: bool = False


ALLOWED = Verdict(allowed=True)


class QuietHours(BaseModel):
    """A stretch of each day, in local time, in which a device does not train: from ``begin`` until before ``end``.

    It may run over midnight. An instant is quiet if the local clock then shows a quiet time of day; so when clocks go
    back, a quiet hour that happens twice is quiet twice, and one that clocks skip is not made up for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: time_of_day
    end: time_of_day

    @model_validator(mode="after")
    def _some_hours(self) -> Self:
        if self.begin == self.end:
            raise ValueError("quiet hours begin and end at different times of day")
        if self.begin.tzinfo is not None or self.end.tzinfo is not None:
            raise ValueError("quiet hours are in local time; give them no time zone")
        return self

    def include(self, at: time_of_day) -> bool:
        """Whether a local time of day is quiet."""
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end


class PowerPolicy(BaseModel):
    """When a device trains, and how hard. The defaults are for a phone; each field says what it asks.

    Starting needs everything below; continuing needs less. Soft reasons (battery low, not charging any more, hot, user
    active, metered network, quiet hours) end training at the next step boundary, at most ``grace_calls`` calls later;
    hard ones (overheated, battery nearly empty) before the next call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_battery: Level = Field(0.20, description="start at this level or above")
    continue_battery: Level = Field(0.15, description="continue above this level; at it, training pauses")
    empty_battery: Level = Field(0.05, description="at this level or below, and not charging: stop at once")
    require_charging: bool = Field(False, description="only while charging")
    require_unmetered: bool = Field(
        True, description="start on an unmetered network only; pause once the network is known to be metered"
    )
    require_idle: bool = Field(True, description="not while somebody uses the device")
    max_start_load: float | None = Field(
        None, gt=0, description="start with at most so many runnable processes per core; training itself is one"
    )
    max_start_temperature_c: Celsius = Field(38.0, description="start at this temperature or below")
    max_temperature_c: Celsius = Field(42.0, description="continue below this temperature")
    critical_temperature_c: Celsius = Field(48.0, description="at this temperature or above: stop at once")
    max_start_thermal: ThermalStatus = Field(ThermalStatus.LIGHT, description="start at this status or below")
    max_thermal: ThermalStatus = Field(ThermalStatus.MODERATE, description="continue at this status or below")
    quiet_hours: tuple[QuietHours, ...] = Field((), description="when not to train, in local time")
    duty_by_battery: tuple[tuple[Level, Duty], ...] = Field(
        ((0.20, 0.25), (0.30, 0.50), (0.50, 0.75)),
        description="(level, share of time at work at this level or below), unless charging",
    )
    duty_by_temperature: tuple[tuple[Celsius, Duty], ...] = Field(
        ((36.0, 0.75), (38.0, 0.50), (40.0, 0.25)),
        description="(degrees Celsius, share of time at work at this temperature or above)",
    )
    duty_by_thermal: tuple[tuple[ThermalStatus, Duty], ...] = Field(
        ((ThermalStatus.LIGHT, 0.50), (ThermalStatus.MODERATE, 0.25)),
        description="(status, share of time at work at this status or above)",
    )
    check_every_calls: int = Field(4, ge=1, description="look at the conditions before every so many program calls")
    check_every_s: float = Field(10.0, gt=0, description="but after so many seconds in any case")
    grace_calls: int = Field(16, ge=0, description="calls that a soft reason leaves to reach a step boundary")

    @model_validator(mode="after")
    def _with_hysteresis(self) -> Self:
        if not self.empty_battery < self.continue_battery < self.start_battery:
            raise ValueError("battery thresholds must satisfy empty < continue < start")
        if not self.max_start_temperature_c < self.max_temperature_c < self.critical_temperature_c:
            raise ValueError("temperatures must satisfy max_start < max < critical")
        if not self.max_start_thermal <= self.max_thermal < ThermalStatus.CRITICAL:
            raise ValueError("thermal statuses must satisfy max_start <= max < CRITICAL")
        # The nearer to the limit, the less: a table that is out of order would speed up as it gets worse.
        _check_duty("duty_by_battery", [(level, duty) for level, duty in self.duty_by_battery], falls=False)
        _check_duty("duty_by_temperature", list(self.duty_by_temperature), falls=True)
        _check_duty("duty_by_thermal", list(self.duty_by_thermal), falls=True)
        return self

    def start_verdict(self, now: Conditions, local: time_of_day) -> Verdict:
        """Whether training may begin.

        Guarantees: where this allows, ``continue_verdict`` of the same reading does, too.

        Args:
            now: A reading.
            local: The local time of day.
        """
        going_on = self.continue_verdict(now, local)
        return next(self._against_starting(now), ALLOWED) if going_on.allowed else going_on

    def continue_verdict(self, now: Conditions, local: time_of_day) -> Verdict:
        """Whether training that is under way may go on; hard reasons come before soft ones."""
        return next(self._at_once(now), None) or next(self._softly(now, local), ALLOWED)

    def duty_cycle(self, now: Conditions) -> float:
        """The share of time to spend at work, in (0, 1]: the least that any of the three tables says.

        Guarantees: it never rises with heat, and never falls with the battery's level or with charging.
        """
        shares = [1.0]
        if now.battery_level is not None and now.charging is not True:
            shares += [duty for level, duty in self.duty_by_battery if now.battery_level <= level]
        if now.temperature_c is not None:
            shares += [duty for degrees, duty in self.duty_by_temperature if now.temperature_c >= degrees]
        if now.thermal is not None:
            shares += [duty for status, duty in self.duty_by_thermal if now.thermal >= status]
        return min(shares)

    def _at_once(self, now: Conditions) -> Iterator[Verdict]:
        level, degrees, thermal = now.battery_level, now.temperature_c, now.thermal
        if thermal is not None and thermal >= ThermalStatus.CRITICAL:
            yield _stop(PauseReason.OVERHEATED, "the system reports critical heat")
        if degrees is not None and degrees >= self.critical_temperature_c:
            yield _stop(PauseReason.OVERHEATED, f"{degrees:.1f} C; {self.critical_temperature_c:g} C is critical")
        if level is not None and level <= self.empty_battery and now.charging is not True:
            yield _stop(PauseReason.BATTERY_EMPTY, f"the battery is at {level:.0%}")

    def _softly(self, now: Conditions, local: time_of_day) -> Iterator[Verdict]:
        level, degrees, thermal = now.battery_level, now.temperature_c, now.thermal
        if level is not None and level <= self.continue_battery:
            yield _pause(
                PauseReason.BATTERY_LOW,
                f"the battery is at {level:.0%}; going on needs over {self.continue_battery:.0%}",
            )
        if degrees is not None and degrees >= self.max_temperature_c:
            yield _pause(PauseReason.HOT, f"{degrees:.1f} C; going on needs less than {self.max_temperature_c:g} C")
        if thermal is not None and thermal > self.max_thermal:
            yield _pause(PauseReason.HOT, f"the system reports {thermal.name.lower()} heat")
        if self.require_charging and level is not None and now.charging is not True:
            yield _pause(PauseReason.NOT_CHARGING, "the battery is not charging")
        if self.require_idle and now.user_active is True:
            yield _pause(PauseReason.USER_ACTIVE, "the device is in use")
        if self.require_unmetered and now.network is Network.METERED:
            yield _pause(PauseReason.NETWORK, "the network is metered")
        for hours in self.quiet_hours:
            if hours.include(local):
                yield _pause(PauseReason.QUIET_HOURS, f"quiet from {hours.begin:%H:%M} to {hours.end:%H:%M}")

    def _against_starting(self, now: Conditions) -> Iterator[Verdict]:
        """What starting needs beyond continuing."""
        level, degrees, thermal = now.battery_level, now.temperature_c, now.thermal
        if level is not None and level < self.start_battery:
            yield _pause(
                PauseReason.BATTERY_LOW, f"the battery is at {level:.0%}; starting needs {self.start_battery:.0%}"
            )
        if degrees is not None and degrees > self.max_start_temperature_c:
            yield _pause(PauseReason.HOT, f"{degrees:.1f} C; starting needs at most {self.max_start_temperature_c:g} C")
        if thermal is not None and thermal > self.max_start_thermal:
            yield _pause(PauseReason.HOT, f"the system reports {thermal.name.lower()} heat")
        if self.max_start_load is not None and now.load is not None and now.load > self.max_start_load:
            yield _pause(PauseReason.BUSY, f"{now.load:.2f} runnable processes per core")
        # A known metered network speaks against continuing already.
        if self.require_unmetered and now.network in {Network.NONE, Network.UNKNOWN}:
            yield _pause(PauseReason.NETWORK, f"the network is {now.network.value}; starting needs an unmetered one")


class PowerMonitor:
    """Reads the conditions and asks the policy: what the app, the session and the training loop look at.

    Each property and each verdict is one reading of the source. One thread at a time uses an instance.
    """

    def __init__(
        self,
        source: ConditionsSource | None = None,
        policy: PowerPolicy | None = None,
        *,
        clock: Callable[[], float] = time.time,
        timezone: tzinfo | None = None,
    ) -> None:
        """Monitor a device.

        Args:
            source: Where readings come from; by default what Linux and Android tell in ``/sys`` and ``/proc``.
            policy: By default that of a phone: the specification's thresholds.
            clock: Unix seconds, for the quiet hours.
            timezone: Of the quiet hours; by default the system's.
        """
        self._source = source or SysfsSource()
        self.policy = policy or PowerPolicy()
        self._clock = clock
        self._timezone = timezone

    def read(self) -> Conditions:
        """What holds now."""
        return self._source.read()

    @property
    def battery_level(self) -> float | None:
        """In [0, 1]; None where there is no battery, or none that can be read."""
        return self.read().battery_level

    def is_connected_to_wifi(self) -> bool:
        """Whether the network is known to be unmetered: Wi-Fi, or a cable."""
        return self.read().network is Network.UNMETERED

    def is_device_active(self) -> bool:
        """Whether somebody is known to be using the device."""
        return self.read().user_active is True

    def can_start_training(self) -> bool:
        """Whether training may begin now."""
        return self.start_verdict().allowed

    def can_continue_training(self) -> bool:
        """Whether training that is under way may go on."""
        return self.continue_verdict().allowed

    def start_verdict(self) -> Verdict:
        """Whether training may begin now, and why not."""
        return self.policy.start_verdict(self.read(), self._local_time())

    def continue_verdict(self) -> Verdict:
        """Whether training that is under way may go on, and why not."""
        return self.judge(self.read())

    def judge(self, now: Conditions) -> Verdict:
        """``continue_verdict`` of a reading that was taken already."""
        return self.policy.continue_verdict(now, self._local_time())

    def _local_time(self) -> time_of_day:
        # An instant has one local reading, also in the hour that happens twice.
        return datetime.fromtimestamp(self._clock(), self._timezone).time()


def _stop(reason: PauseReason, detail: str) -> Verdict:
    return Verdict(allowed=False, reason=reason, detail=detail, hard=True)


def _pause(reason: PauseReason, detail: str) -> Verdict:
    return Verdict(allowed=False, reason=reason, detail=detail)


def _check_duty(name: str, rows: list[tuple[float, float]], *, falls: bool) -> None:
    """The key rises strictly; the share falls with it (heat), or rises (battery)."""
    for (key, share), (next_key, next_share) in pairwise(rows):
        if key >= next_key or (share < next_share if falls else share > next_share):
            raise ValueError(f"{name} must be in rising order, with the least work nearest to the limit")
