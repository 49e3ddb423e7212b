"""The order of events in virtual time: when each simulated device offers itself, and when its report arrives.

Shared by both engines, so that they play the same fleet: what happens at an event is theirs, when the next one comes
is decided here, by the population's hashes alone. A device whose conditions do not allow it to train does not come.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from client_sdk.protocol.messages import RetryWindow
from simulator.errors import FleetCannotTrain
from simulator.population import Population, Workload
from simulator.traces import Course, FleetTraces

# Nobody came for so long: nobody ever will.
_GIVE_UP_AFTER_S: Final = 14 * 86400.0


class EventKind(IntEnum):
    """Arrivals come before check-ins of the same instant, as the server has it."""

    ARRIVAL = 0
    CHECK_IN = 1


class Event(NamedTuple):
    """Something that is due; ordered as it happens.

    Attributes:
        at: Virtual seconds since the run began.
        kind: What.
        order: Which of the same instant and kind comes first: assignment number of an arrival, device of a check-in.
        device: Whose.
    """

    at: float
    kind: EventKind
    order: int
    device: int


class Agenda:
    """All devices' next events. Every event that is taken schedules the device's next one, so it never runs dry.

    Args:
        population: Who the devices are.
        num_samples: Training examples of each device.
        work: Device, session of it (0 = its first) -> what that session costs.
    """

    def __init__(
        self, population: Population, num_samples: Sequence[int], work: Callable[[int, int], Workload]
    ) -> None:
        self._population = population
        self._traces = FleetTraces(population)
        self._traced = population.profiles.traced
        self._num_samples = num_samples
        self._work = work
        self._check_ins = [0] * population.devices
        self._sessions = [0] * population.devices
        # A device asks many times before it is given work, and its next session takes as long each time, unless the
        # time of day has a say.
        self._next_course: dict[int, tuple[float, Course]] = {}
        self._kept_away = Counter[str]()
        self._last_at = 0.0
        self._events = [
            Event(population.first_check_in_s(device), EventKind.CHECK_IN, device, device)
            for device in range(population.devices)
        ]
        heapq.heapify(self._events)

    def next(self) -> Event:
        """Take the next event; a check-in is counted as one, and comes of a device that may train.

        Raises:
            FleetCannotTrain: No device may for two weeks.
        """
        while True:
            event = heapq.heappop(self._events)
            if event.kind is EventKind.ARRIVAL or not self._stays_away(event):
                self._last_at = event.at
                return event

    def _stays_away(self, event: Event) -> bool:
        """Count a check-in; if the device's conditions are against it, it looks again later."""
        device, now = event.device, event.at
        self._check_ins[device] += 1
        reason = self._traces.against_starting(device, now) if self._traced else None
        if reason is None:
            return False
        self._kept_away[reason] += 1
        if now - self._last_at > _GIVE_UP_AFTER_S:
            commonest = ", ".join(why for why, _ in self._kept_away.most_common(3))
            raise FleetCannotTrain(f"for two weeks of virtual time no device could train ({commonest})")
        at_least = self._traces.look_again_s(device, self._check_ins[device])
        self._schedule_check_in(device, now, at_least=at_least)
        return True

    def sessions(self, device: int) -> int:
        """How many assignments the device has had so far."""
        return self._sessions[device]

    def duration_s(self, device: int, now: float) -> float | None:
        """How long the device's next session takes if it begins now; None if no report comes of it."""
        return self._course(device, now).duration_s

    def _course(self, device: int, now: float) -> Course:
        known = self._next_course.get(device)
        if known is not None and (known[0] == now or not self._traced):
            return known[1]
        session = self._sessions[device]
        course = self._traces.course(device, session, self._num_samples[device], self._work(device, session), now)
        self._next_course[device] = now, course
        return course

    def begin(self, device: int, number: int, now: float, lease_s: float) -> Course:
        """The device has been given an assignment: schedule its report, or its return without one.

        Args:
            device: Which device.
            number: Number of the assignment.
            now: Virtual time.
            lease_s: How long the server waits for the report.

        Returns:
            How the session goes; without a duration if the device vanishes or would be too late.
        """
        course = self._course(device, now).within(lease_s)
        del self._next_course[device]
        self._sessions[device] += 1
        if course.duration_s is None:
            # Back only when the server has given it up: until then it would be handed the same assignment.
            self._schedule_check_in(device, now + lease_s)
        else:
            heapq.heappush(self._events, Event(now + course.duration_s, EventKind.ARRIVAL, number, device))
        return course

    def wait(self, device: int, now: float, retry: RetryWindow) -> None:
        """The device got no work: it comes back after its own pause, and within the server's window at the soonest."""
        fraction = self._population.retry_fraction(device, self._check_ins[device])
        self._schedule_check_in(device, now, at_least=retry.min_s + fraction * (retry.max_s - retry.min_s))

    def rest(self, device: int, now: float) -> None:
        """The device's session is over."""
        self._schedule_check_in(device, now)

    def _schedule_check_in(self, device: int, now: float, *, at_least: float = 0.0) -> None:
        pause = max(self._population.pause_s(device, self._check_ins[device]), at_least)
        heapq.heappush(self._events, Event(round(now + pause, 3), EventKind.CHECK_IN, device, device))
