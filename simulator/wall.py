"""The fleet in real time, for a server that is not the simulator's own.

Such a server runs on its own clock and accepts no simulated times, so devices come when they would really come, and
which reports count depends on the network and the machine: a run of this kind is not repeatable.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from client_sdk.protocol.messages import Assigned, Finished
from simulator.fleet import DeviceLink, FleetObserver, Patience
from simulator.population import Population, Workload
from simulator.sessions import Outcome, Session, SessionEnd

_STOP_POLL_S: Final = 0.1


class WallFleet:
    """Drives a population against a server on the wall clock, until the server's task or the wanted rounds are done."""

    def __init__(
        self,
        population: Population,
        *,
        link: DeviceLink,
        observer: FleetObserver,
        workers: int,
        stop: threading.Event,
        from_version: int,
        until_version: int,
        work: Workload,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a fleet; ``run`` starts it.

        Args:
            population: Who the devices are; of its times only the drop-outs are used.
            link: How devices talk to the server.
            observer: Is told about progress.
            workers: Training threads.
            stop: Ends the run at the next event when set.
            from_version: Model version at the start.
            until_version: Model version at which the run is over.
            work: What a session costs (only whether it drops out matters here).
            clock: Seconds.
        """
        self._population = population
        self._link = link
        self._observer = observer
        self._workers = workers
        self._stop = stop
        self._until = until_version
        self._work = work
        self._clock = clock
        self._begun = clock()
        self._check_ins = [0] * population.devices
        self._sessions = [0] * population.devices
        self._version = from_version
        self._due: list[tuple[float, int]] = []
        self._ended: queue.SimpleQueue[tuple[Session, Future[SessionEnd]]] = queue.SimpleQueue()
        self._running = 0
        self._patience = Patience(population.devices)

    def run(self) -> bool:
        """Run until the last round.

        Returns:
            True if it is committed, False if ``stop`` was set first.

        Raises:
            FleetCannotTrain: More sessions than there are devices failed in a row.
            PocketfedError: What else went wrong in a session.
        """
        self._due = [(0.0, device) for device in range(self._population.devices)]
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="device")
        try:
            while not self._stop.is_set():
                # A device that had to wait for a thread would let its lease run out.
                self._collect(block=self._running > self._workers)
                if self._due and self._due[0][0] <= self._now():
                    if self._offer(pool, heapq.heappop(self._due)[1]):
                        return True
                elif self._running:
                    self._collect(block=True)
                else:
                    self._stop.wait(min(_STOP_POLL_S, self._due[0][0] - self._now()) if self._due else _STOP_POLL_S)
            return False
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _now(self) -> float:
        return self._clock() - self._begun

    def _offer(self, pool: ThreadPoolExecutor, device: int) -> bool:
        """One check-in; True where the run is over."""
        self._check_ins[device] += 1
        reply = self._link.check_in(device, None)
        if isinstance(reply, Finished):
            self._advance(reply.model_version)
            return True
        if not isinstance(reply, Assigned):
            low, high = reply.retry.min_s, reply.retry.max_s
            fraction = self._population.retry_fraction(device, self._check_ins[device])
            heapq.heappush(self._due, (self._now() + low + fraction * (high - low), device))
            return False
        assignment = reply.assignment
        self._advance(assignment.model_version)
        if self._version >= self._until:
            return True
        session = Session.of(device, assignment, self._now(), None)
        number, self._sessions[device] = self._sessions[device], self._sessions[device] + 1
        self._observer.assigned(session)
        if self._population.duration_s(device, number, 1, self._work) is None:
            session.end = SessionEnd(Outcome.DROPPED)
            self._observer.ended(session)
            heapq.heappush(self._due, (self._now() + assignment.lease_s, device))
            return False
        self._running += 1
        future = pool.submit(self._link.perform, device, assignment)
        future.add_done_callback(lambda done: self._ended.put((session, done)))
        return False

    def _advance(self, version: int) -> None:
        if version > self._version:
            self._observer.advanced(version)
            self._version = version

    def _collect(self, *, block: bool) -> None:
        """Take note of ended sessions; with ``block``, wait a moment for one."""
        while self._running:
            try:
                session, future = self._ended.get(timeout=_STOP_POLL_S if block else 0)
            except queue.Empty:
                return
            block = False
            self._running -= 1
            session.end = future.result()
            if session.end.outcome is not Outcome.FAILED:
                session.arrives_s = self._now()
            self._observer.ended(session)
            self._patience.note(session.end)
            heapq.heappush(self._due, (self._now(), session.device))
