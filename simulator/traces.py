"""The day of a simulated device: when it may train, and how a session goes that its day disturbs.

A profile's traces say what surrounds a device at each virtual time; whether it starts, pauses or goes on is decided by
the SDK's own ``PowerPolicy``, asked as a device asks it. Everything is a function of the seed, the device and the time:
nothing is kept from one question to the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC
from typing import Final

from client_sdk.conditions import Conditions, Network
from client_sdk.power import PauseReason, PowerMonitor
from simulator.population import Phases, Population, Workload, whole_ticks
from simulator.profiles import BatteryTrace, NetworkTrace, Profile

UNAVAILABLE: Final = "unavailable"
"""The app may not run at all in this hour."""
VANISHED: Final = "vanished"
"""The device dropped out and never came back to its session."""
TOO_SLOW: Final = "too-slow"
"""The session would have lasted longer than its lease, without a pause."""

_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S
_SLOT_S: Final = 300.0
"""A user takes a device up, and a network goes away, for such stretches."""
_LOOK_S: Final = 60.0
"""At work a device looks at its conditions so often; the SDK's governor does it more often, in real time."""
_LOOK_AGAIN_S: Final = (300.0, 900.0)
"""One that may not work looks again within this window."""
_RETRY_S: Final = 5.0
"""A transfer that broke off is taken up again after so long; what was sent is not sent again."""
_HORIZON_S: Final = _DAY_S
"""A session that is not over after a day is lost, whatever the lease."""
_MIDNIGHT: Final = 20 * 365 * _DAY_S
"""Virtual time 0 is midnight UTC; some day well after 1970, so that no clock error leads before it."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Training stood still.

    Attributes:
        reason: Why: one of ``PauseReason``, or ``UNAVAILABLE``.
        after_s: Seconds after the assignment.
        trained: Share of the training that was done by then.
    """

    reason: str
    after_s: float
    trained: float


@dataclass(frozen=True, slots=True)
class Course:
    """How a session goes.

    Attributes:
        duration_s: From assignment to report, whole milliseconds; None if there never is one.
        pauses: In order.
        lost: Why there is no report; None if there is one.
    """

    duration_s: float | None
    pauses: tuple[Pause, ...] = ()
    lost: str | None = None

    def within(self, lease_s: float) -> Course:
        """What is left of it if the server waits no longer than this."""
        if self.duration_s is not None and self.duration_s <= lease_s:
            return self
        pauses = tuple(p for p in self.pauses if p.after_s <= lease_s)
        # One that would be back in time but for its pauses is lost to the last of them.
        lost = self.lost or (pauses[-1].reason if pauses else TOO_SLOW)
        return Course(None, pauses, lost)


class FleetTraces:
    """What surrounds the devices of a fleet, and what the policy makes of it. One thread at a time.

    Implements ``client_sdk.conditions.ConditionsSource`` for the device and the time that is asked about.
    """

    def __init__(self, population: Population) -> None:
        self._population = population
        self._policy = population.profiles.policy
        self._monitor = PowerMonitor(self, self._policy, clock=self._device_clock, timezone=UTC)
        self._reading = Conditions()
        self._device = 0
        self._now = 0.0

    def read(self) -> Conditions:
        """What holds for the device that is asked about."""
        return self._reading

    def conditions(self, device: int, now: float, *, drained: float = 0.0) -> Conditions:
        """What surrounds a device.

        Args:
            device: Which.
            now: Virtual time.
            drained: Of the battery, by what it has trained in this session.
        """
        kind = self._population.kind(device)
        local = now + self._offset_s(device, kind)
        hour = int(local // _HOUR_S) % 24
        # Draws for a night hold from noon to noon, so that charging from 22 to 7 is one stretch.
        night = int((local - _DAY_S / 2) // _DAY_S)
        slot = int(now // _SLOT_S)
        level, charging = self._battery(device, kind.battery, local=local, hour=hour, night=night, drained=drained)
        active = kind.user_active
        return Conditions(
            battery_level=level,
            charging=charging,
            user_active=None if active is None else self._population.uniform("user", device, slot) < active[hour],
            network=self._network(device, kind.network, hour, night, slot),
        )

    def against_starting(self, device: int, now: float, *, drained: float = 0.0) -> str | None:
        """Why a device may not begin (or take up again) what it does; None if it may."""
        if not self._available(device, now):
            return UNAVAILABLE
        self._look(device, now, drained)
        if self._reading.network is Network.NONE:
            # Whatever the policy wants: without a network nobody checks in.
            return PauseReason.NETWORK.value
        verdict = self._monitor.start_verdict()
        return None if verdict.allowed or verdict.reason is None else verdict.reason.value

    def against_going_on(self, device: int, now: float, *, drained: float, transfers: bool) -> str | None:
        """Why a device that is at work must pause; None if it need not."""
        if not self._available(device, now):
            return UNAVAILABLE
        self._look(device, now, drained)
        if transfers and self._reading.network is Network.NONE:
            return PauseReason.NETWORK.value
        verdict = self._monitor.judge(self._reading)
        return None if verdict.allowed or verdict.reason is None else verdict.reason.value

    def duty_cycle(self) -> float:
        """Share of the time that the policy lets the device work, by the last reading."""
        return self._policy.duty_cycle(self._reading)

    def is_charging(self) -> bool:
        """By the last reading."""
        return self._reading.charging is True

    def look_again_s(self, device: int, number: int) -> float:
        """How long a device that may not work waits before it looks again; ``number`` counts its looks."""
        low, high = _LOOK_AGAIN_S
        return whole_ticks(low + (high - low) * self._population.uniform("look-again", device, number))

    def course(self, device: int, session: int, num_samples: int, work: Workload, now: float) -> Course:
        """Play a session.

        Args:
            device: Whose.
            session: How many assignments it had before this one.
            num_samples: Examples it holds.
            work: What a session costs.
            now: Virtual time of the assignment.
        """
        population = self._population
        if population.vanishes(device, session):
            return Course(None, lost=VANISHED)
        phases = population.typical_phases(device, num_samples, work)
        factor = population.jitter_of(device, session)
        if not population.kind(device).traced:
            return Course(whole_ticks(phases.total_s * factor))
        return _Play(self, population, device, session=session, phases=phases, factor=factor, now=now).course()

    def reasons_by_hour(self, devices: Iterable[int], *, looks_per_hour: int = 4) -> list[Counter[str | None]]:
        """For each hour of the first virtual day: how often devices could have begun (None), and else why not."""
        chosen = list(devices)
        found = []
        for hour in range(24):
            instants = [_HOUR_S * (hour + (i + 0.5) / looks_per_hour) for i in range(looks_per_hour)]
            found.append(Counter(self.against_starting(device, at) for device in chosen for at in instants))
        return found

    def _look(self, device: int, now: float, drained: float) -> None:
        self._device, self._now = device, now
        self._reading = self.conditions(device, now, drained=drained)

    def _device_clock(self) -> float:
        """Seconds, as the device has it: in its time zone, and wrong."""
        offset_s, skew = self._population.clock_error(self._device)
        zone_s = self._offset_s(self._device, self._population.kind(self._device))
        return _MIDNIGHT + self._now * (1 + skew) + offset_s + zone_s

    def _offset_s(self, device: int, kind: Profile) -> float:
        west, east = kind.utc_offsets_h
        return _HOUR_S * (west + (east - west) * self._population.uniform("utc-offset", device))

    def _available(self, device: int, now: float) -> bool:
        kind = self._population.kind(device)
        if kind.availability is None:
            return True
        number = int((now + self._offset_s(device, kind)) // _HOUR_S)
        return self._population.uniform("available", device, number) < kind.availability[number % 24]

    def _battery(
        self, device: int, trace: BatteryTrace | None, *, local: float, hour: int, night: int, drained: float
    ) -> tuple[float | None, bool | None]:
        if trace is None:
            return None, None
        past = local / _HOUR_S % 1.0
        usual = trace.level[hour] * (1 - past) + trace.level[(hour + 1) % 24] * past
        shift = trace.spread * self._population.normal("battery", device)
        charging = self._population.uniform("charging", device, night) < trace.charging[hour]
        return min(1.0, max(0.0, usual + shift - drained)), charging

    def _network(self, device: int, trace: NetworkTrace | None, hour: int, night: int, slot: int) -> Network:
        if trace is None:
            return Network.UNMETERED
        if self._population.uniform("offline", device, slot) < trace.offline[hour]:
            return Network.NONE
        unmetered = self._population.uniform("unmetered", device, night) < trace.unmetered[hour]
        return Network.UNMETERED if unmetered else Network.METERED


class _LostError(Exception):
    """The session comes to nothing."""


class _Play:
    """One session under way."""

    def __init__(
        self,
        traces: FleetTraces,
        population: Population,
        device: int,
        *,
        session: int,
        phases: Phases,
        factor: float,
        now: float,
    ) -> None:
        self._traces = traces
        self._population = population
        self._kind = population.kind(device)
        self._device = device
        self._session = session
        self._phases = phases
        self._factor = factor
        self._begun = self._now = now
        self._pauses: list[Pause] = []
        self._worked_s = 0.0
        self._trained_s = 0.0
        self._drained = 0.0
        self._looks = 0
        hazard = self._kind.dropouts_per_minute
        self._vanishes_after_s = 60 * -math.log(self._uniform("vanishes")) / hazard if hazard else math.inf

    def course(self) -> Course:
        """From the assignment to its end."""
        p, factor = self._phases, self._factor
        try:
            self._spend(p.startup_s * factor)
            self._spend(p.download_s * factor + self._broken_off("download"), transfers=True)
            self._spend(p.training_s * factor, trains=True)
            self._spend(p.upload_s * factor + self._broken_off("upload"), transfers=True)
        except _LostError as e:
            return Course(None, tuple(self._pauses), str(e))
        return Course(whole_ticks(self._now - self._begun), tuple(self._pauses))

    def _spend(self, seconds: float, *, transfers: bool = False, trains: bool = False) -> None:
        """Work so long; pauses and rests come on top."""
        traces, left = self._traces, seconds
        while left > 1e-9:
            reason = traces.against_going_on(self._device, self._now, drained=self._drained, transfers=transfers)
            if reason is not None:
                self._pause(reason)
                continue
            duty = traces.duty_cycle() if trains else 1.0
            elapsed = min(left / duty, _LOOK_S)
            work = elapsed * duty
            self._now += elapsed
            self._worked_s += work
            left -= work
            if self._worked_s > self._vanishes_after_s:
                raise _LostError(VANISHED)
            if trains:
                self._trained_s += work
                if self._kind.battery is not None and not traces.is_charging():
                    self._drained += self._kind.battery.drain_per_minute * work / 60

    def _pause(self, reason: str) -> None:
        """Wait until the device may begin again; the checkpoint keeps what was trained."""
        whole = self._phases.training_s * self._factor
        self._pauses.append(Pause(reason, self._now - self._begun, self._trained_s / whole if whole else 1.0))
        while True:
            self._now += self._traces.look_again_s(self._device, 1_000_000 * (self._session + 1) + self._looks)
            self._looks += 1
            if self._now - self._begun > _HORIZON_S:
                raise _LostError(reason)
            against = self._traces.against_starting(self._device, self._now, drained=self._drained)
            if against is None:
                # The app wakes and loads its program again.
                self._now += self._phases.startup_s * self._factor
                return

    def _broken_off(self, purpose: str) -> float:
        """Seconds that breaks of a transfer cost."""
        loss = 0.0 if self._kind.network is None else self._kind.network.loss
        if not loss:
            return 0.0
        breaks = int(math.log(self._uniform(purpose)) / math.log(loss))
        return breaks * (_RETRY_S + self._kind.latency_s)

    def _uniform(self, purpose: str) -> float:
        return self._population.uniform(purpose, self._device, self._session)
