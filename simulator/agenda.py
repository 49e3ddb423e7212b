"""The order of events in virtual time: when each simulated device offers itself, and when its report arrives.

Shared by both engines, so that they play the same fleet: what happens at an event is theirs, when the next one comes
is decided here, by the population's hashes alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from client_sdk.protocol.messages import RetryWindow
from simulator.population import Population, Workload


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
        work: Session number of a device (0 = its first) -> what that session costs.
    """

    def __init__(self, population: Population, num_samples: Sequence[int], work: Callable[[int], Workload]) -> None:
        self._population = population
        self._num_samples = num_samples
        self._work = work
        self._check_ins = [0] * population.devices
        self._sessions = [0] * population.devices
        # A device asks many times before it is given work, and its next session takes as long each time.
        self._next_duration: dict[int, float | None] = {}
        self._events = [
            Event(population.first_check_in_s(device), EventKind.CHECK_IN, device, device)
            for device in range(population.devices)
        ]
        heapq.heapify(self._events)

    def next(self) -> Event:
        """Take the next event; a check-in is counted as one."""
        event = heapq.heappop(self._events)
        if event.kind is EventKind.CHECK_IN:
            self._check_ins[event.device] += 1
        return event

    def sessions(self, device: int) -> int:
        """How many assignments the device has had so far."""
        return self._sessions[device]

    def duration_s(self, device: int) -> float | None:
        """How long the device's next session will take; None if it vanishes in it."""
        if device not in self._next_duration:
            session = self._sessions[device]
            self._next_duration[device] = self._population.duration_s(
                device, session, self._num_samples[device], self._work(session)
            )
        return self._next_duration[device]

    def begin(self, device: int, number: int, now: float, lease_s: float) -> float | None:
        """The device has been given an assignment: schedule its report, or its return without one.

        Args:
            device: Which device.
            number: Number of the assignment.
            now: Virtual time.
            lease_s: How long the server waits for the report.

        Returns:
            When the report arrives; None if it never will, because the device vanishes or would be too late.
        """
        duration = self.duration_s(device)
        del self._next_duration[device]
        self._sessions[device] += 1
        if duration is None or duration > lease_s:
            # Back only when the server has given it up: until then it would be handed the same assignment.
            self._schedule_check_in(device, now + lease_s)
            return None
        heapq.heappush(self._events, Event(now + duration, EventKind.ARRIVAL, number, device))
        return now + duration

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
