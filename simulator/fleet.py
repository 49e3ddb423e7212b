"""The fleet in virtual time: one discrete-event loop, many training threads, and a result that no thread can change.

Events (a device checks in, a report arrives) are taken in virtual order by one thread, which alone sends check-ins.
What a check-in leads to, training and upload, runs in a thread pool at its own pace; when virtual time reaches the
report's arrival, the loop waits until the upload has really happened. The server closes its buffers by the same
virtual times, so that which reports count does not depend on how fast this machine or its threads are.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, Protocol

from client_sdk.protocol.errors import PocketfedError, StaleReport
from client_sdk.protocol.messages import Assigned, Assignment, Finished, VirtualTiming
from simulator.journal import Journal, Reply
from simulator.population import Population, Workload

_STOP_POLL_S: Final = 0.1


class Outcome(StrEnum):
    """How a session ended, as the device sees it."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    """Its round was over (over-selection) or its model too old."""
    DROPPED = "dropped"
    """The device vanished, or would have been later than its lease."""


class DeviceLink(Protocol):
    """The fleet's view of its devices: which of them does what. Implemented over the client SDK."""

    def check_in(self, device: int, timing: VirtualTiming | None) -> Reply:
        """Offer a device for work. Called by one thread, in virtual order."""
        ...

    def perform(self, device: int, assignment: Assignment) -> None:
        """Train and deliver the report. Called by worker threads, never twice at once for one device.

        Raises:
            ProtocolError: The server's final refusal.
        """
        ...


class FleetObserver(Protocol):
    """Told what happens, in the loop's thread. During a replay it is told again."""

    def assigned(self, session: Session) -> None:
        """A device got work."""
        ...

    def ended(self, session: Session) -> None:
        """A report arrived, or was refused."""
        ...

    def advanced(self, rounds_committed: int) -> None:
        """The server is known to have committed this many rounds of the run."""
        ...


@dataclass
class Session:
    """One assignment, from check-in to report.

    Attributes:
        device: Number of the device.
        assignment: What it was asked to do.
        started_s: Virtual time of the assignment (wall-clock time since the start, on a foreign server).
        arrives_s: When its report arrives; None if it never will.
        outcome: None while it lasts.
    """

    device: int
    assignment: Assignment
    started_s: float
    arrives_s: float | None
    outcome: Outcome | None = None
    future: Future[Outcome] | None = field(default=None, repr=False)


class _Kind(IntEnum):
    """Arrivals come before check-ins of the same instant, as the server has it."""

    ARRIVAL = 0
    CHECK_IN = 1


class SessionPool:
    """Runs sessions in worker threads and notes their ends in the journal."""

    def __init__(self, link: DeviceLink, journal: Journal, workers: int) -> None:
        self._link = link
        self._journal = journal
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="device")

    def start(self, session: Session) -> None:
        """Begin, or take over the end that the journal knows."""
        known = self._journal.done.pop(session.assignment.assignment_id, None)
        if known is not None:
            session.future = Future()
            session.future.set_result(Outcome(known))
        else:
            session.future = self._pool.submit(self._perform, session.device, session.assignment)

    def _perform(self, device: int, assignment: Assignment) -> Outcome:
        try:
            self._link.perform(device, assignment)
            outcome = Outcome.ACCEPTED
        except StaleReport:
            outcome = Outcome.REFUSED
        self._journal.record_done(assignment.assignment_id, outcome.value)
        return outcome

    def close(self) -> None:
        """Forget what has not begun, wait for what runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class VirtualFleet:
    """Drives a population against a server that runs on the virtual clock.

    Guarantees:
        With equal configuration and seed, the same check-ins are sent in the same order with the same times, and the
        same sessions are delivered, whatever ``workers`` and the machine's speed; also across interruptions, where
        the journal is kept.
    """

    def __init__(
        self,
        population: Population,
        *,
        num_samples: Sequence[int],
        work: Callable[[int], Workload],
        link: DeviceLink,
        journal: Journal,
        observer: FleetObserver,
        workers: int,
        stop: threading.Event,
    ) -> None:
        """Prepare a fleet; ``run`` starts it.

        Args:
            population: Who the devices are.
            num_samples: Training examples of each device.
            work: Session number of a device (0 = its first) -> what that session costs.
            link: How devices talk to the server.
            journal: Answers of an earlier run, and the place for new ones.
            observer: Is told about progress.
            workers: Training threads.
            stop: Ends the run at the next event when set.
        """
        self._population = population
        self._num_samples = num_samples
        self._work = work
        self._link = link
        self._journal = journal
        self._observer = observer
        self._workers = workers
        self._stop = stop
        self._check_ins = [0] * population.devices
        self._sessions = [0] * population.devices
        self._version = 0
        self._events: list[tuple[float, _Kind, int, Session | None]] = []

    def run(self) -> bool:
        """Run until the server says that the task is finished.

        Returns:
            True if it is finished, False if ``stop`` was set first.

        Raises:
            ResumeMismatch: The journal does not fit this configuration.
            PocketfedError: Whatever ended a session other than a late report.
        """
        self._events = [
            (self._population.first_check_in_s(device), _Kind.CHECK_IN, device, None)
            for device in range(self._population.devices)
        ]
        heapq.heapify(self._events)
        pool = SessionPool(self._link, self._journal, self._workers)
        try:
            return self._loop(pool)
        finally:
            pool.close()

    def _loop(self, pool: SessionPool) -> bool:
        # Every event schedules the device's next one, so the queue never runs dry.
        while not self._stop.is_set():
            now, _, device, session = heapq.heappop(self._events)
            if session is not None:
                if not self._arrive(session):
                    return False
                self._schedule_check_in(device, now)
                continue
            reply = self._check_in(device, now)
            if isinstance(reply, Finished):
                self._observer.advanced(reply.model_version)
                return True
            if isinstance(reply, Assigned):
                self._begin(pool, device, now, reply.assignment)
            else:
                low, high = reply.retry.min_s, reply.retry.max_s
                fraction = self._population.retry_fraction(device, self._check_ins[device])
                self._schedule_check_in(device, now, at_least=low + fraction * (high - low))
        return False

    def _duration(self, device: int) -> float | None:
        session = self._sessions[device]
        return self._population.duration_s(device, session, self._num_samples[device], self._work(session))

    def _check_in(self, device: int, now: float) -> Reply:
        self._check_ins[device] += 1
        reply = self._journal.replay(device, now)
        if reply is None:
            reply = self._link.check_in(device, VirtualTiming(now_s=now, duration_s=self._duration(device)))
            self._journal.record_reply(device, now, reply)
        return reply

    def _begin(self, pool: SessionPool, device: int, now: float, assignment: Assignment) -> None:
        if assignment.model_version > self._version:
            self._version = assignment.model_version
            self._observer.advanced(self._version)
        duration = self._duration(device)
        self._sessions[device] += 1
        if duration is None or duration > assignment.lease_s:
            session = Session(device, assignment, now, None, Outcome.DROPPED)
            self._observer.assigned(session)
            self._observer.ended(session)
            # Back only when the server has given it up: until then it would be handed the same assignment.
            self._schedule_check_in(device, now + assignment.lease_s)
            return
        session = Session(device, assignment, now, now + duration)
        self._observer.assigned(session)
        pool.start(session)
        heapq.heappush(self._events, (now + duration, _Kind.ARRIVAL, device, session))

    def _arrive(self, session: Session) -> bool:
        """Wait for the real upload; False if the run was stopped meanwhile."""
        future = session.future
        if future is None:
            raise PocketfedError(f"session of device {session.device} was never started")
        while not wait([future], timeout=_STOP_POLL_S).done:
            if self._stop.is_set():
                return False
        session.outcome = future.result()
        session.future = None
        self._observer.ended(session)
        return True

    def _schedule_check_in(self, device: int, now: float, *, at_least: float = 0.0) -> None:
        pause = max(self._population.pause_s(device, self._check_ins[device]), at_least)
        heapq.heappush(self._events, (round(now + pause, 3), _Kind.CHECK_IN, device, None))
