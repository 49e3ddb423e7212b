"""The fleet in virtual time: one discrete-event loop, many training threads, and a result that no thread can change.

Events (a device checks in, a report arrives) are taken in virtual order by one thread, which alone sends check-ins.
What a check-in leads to, training and upload, runs in a thread pool at its own pace; when virtual time reaches the
report's arrival, the loop waits until the upload has really happened. The server closes its buffers by the same
virtual times, so that which reports count does not depend on how fast this machine or its threads are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, Protocol

from client_sdk.protocol.messages import Assigned, Assignment, Finished, VirtualTiming
from simulator.agenda import Agenda, EventKind
from simulator.errors import FleetCannotTrain
from simulator.journal import Journal, Reply
from simulator.population import Population, Workload
from simulator.sessions import Outcome, Session, SessionEnd, VirtualRounds

_STOP_POLL_S: Final = 0.1


class DeviceLink(Protocol):
    """The fleet's view of its devices: which of them does what. Implemented over the client SDK."""

    def check_in(self, device: int, timing: VirtualTiming | None) -> Reply:
        """Offer a device for work. Called by one thread, in virtual order."""
        ...

    def perform(self, device: int, assignment: Assignment, pauses: Sequence[float] = ()) -> SessionEnd:
        """Train and deliver the report. Called by worker threads, never twice at once for one device.

        ``pauses`` are the shares of the training after which it is left and taken up again, in order.

        A report that came too late, and one that was refused or could not be made, are ends like any other; what else
        goes wrong is raised, and ends the run.
        """
        ...

    def give_back(self, device: int, assignment_id: str) -> None:
        """Tell the server that a session failed. Called by one thread, in virtual order, perhaps more than once."""
        ...

    def take_back(self, device: int, assignment_id: str) -> None:
        """A report that was delivered came too late in virtual time: the device goes on as if it had been refused."""
        ...


class FleetObserver(Protocol):
    """Told what happens, in the loop's thread. During a replay it is told again."""

    def assigned(self, session: Session) -> None:
        """A device got work."""
        ...

    def ended(self, session: Session) -> None:
        """A report arrived, was refused, or will never come."""
        ...

    def advanced(self, rounds_committed: int) -> None:
        """The server is known to have committed this many rounds of the run."""
        ...


class Patience:
    """Ends a run in which nobody delivers anything any more.

    Args:
        devices: So many sessions in a row may fail.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._in_vain = 0

    def note(self, end: SessionEnd) -> None:
        """A session has ended.

        Raises:
            FleetCannotTrain: One failure too many.
        """
        if end.outcome is Outcome.ACCEPTED:
            self._in_vain = 0
        if end.outcome is Outcome.FAILED:
            self._in_vain += 1
        if self._in_vain > self._devices:
            raise FleetCannotTrain(f"{self._in_vain} sessions in a row came to nothing, the last one by {end.reason}")


class SessionPool:
    """Runs sessions in worker threads and notes their ends in the journal."""

    def __init__(self, link: DeviceLink, journal: Journal, workers: int) -> None:
        self._link = link
        self._journal = journal
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="device")

    def start(self, device: int, assignment: Assignment, pauses: Sequence[float] = ()) -> Future[SessionEnd]:
        """Begin a session, or take over the end that the journal knows."""
        known = self._journal.done.pop(assignment.assignment_id, None)
        if known is None:
            return self._pool.submit(self._perform, device, assignment, pauses)
        future: Future[SessionEnd] = Future()
        future.set_result(known)
        return future

    def _perform(self, device: int, assignment: Assignment, pauses: Sequence[float]) -> SessionEnd:
        end = self._link.perform(device, assignment, pauses)
        self._journal.record_done(assignment.assignment_id, end)
        return end

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
        work: Callable[[int, int], Workload],
        link: DeviceLink,
        journal: Journal,
        observer: FleetObserver,
        workers: int,
        stop: threading.Event,
        rounds: VirtualRounds,
    ) -> None:
        """Prepare a fleet; ``run`` starts it.

        Args:
            population: Who the devices are.
            num_samples: Training examples of each device.
            work: Device, session of it (0 = its first) -> what that session costs.
            link: How devices talk to the server.
            journal: Answers of an earlier run, and the place for new ones.
            observer: Is told about progress.
            workers: Training threads.
            stop: Ends the run at the next event when set.
            rounds: The server's rounds in virtual time.
        """
        self._rounds = rounds
        self._population = population
        self._num_samples = num_samples
        self._work = work
        self._link = link
        self._journal = journal
        self._observer = observer
        self._workers = workers
        self._stop = stop
        self._version = 0
        self._patience = Patience(population.devices)
        self._running: dict[int, tuple[Session, str, Future[SessionEnd]]] = {}

    def run(self) -> bool:
        """Run until the server says that the task is finished.

        Returns:
            True if it is finished, False if ``stop`` was set first.

        Raises:
            ResumeMismatch: The journal does not fit this configuration.
            FleetCannotTrain: More sessions than there are devices failed in a row.
            PocketfedError: What else went wrong in a session.
        """
        self._agenda = Agenda(self._population, self._num_samples, self._work)
        pool = SessionPool(self._link, self._journal, self._workers)
        try:
            return self._loop(pool)
        finally:
            pool.close()

    def _loop(self, pool: SessionPool) -> bool:
        while not self._stop.is_set():
            now, kind, _, device = self._agenda.next()
            if kind is EventKind.ARRIVAL:
                if not self._arrive(device):
                    return False
                self._agenda.rest(device, now)
                continue
            reply = self._check_in(device, now)
            if isinstance(reply, Finished):
                self._observer.advanced(reply.model_version)
                return True
            if isinstance(reply, Assigned):
                self._begin(pool, device, now, reply.assignment)
            else:
                self._agenda.wait(device, now, reply.retry)
        return False

    def _check_in(self, device: int, now: float) -> Reply:
        reply = self._journal.replay(device, now)
        if reply is None:
            timing = VirtualTiming(now_s=now, duration_s=self._agenda.duration_s(device, now))
            reply = self._link.check_in(device, timing)
            self._journal.record_reply(device, now, reply)
        return reply

    def _begin(self, pool: SessionPool, device: int, now: float, assignment: Assignment) -> None:
        if assignment.model_version > self._version:
            self._version = assignment.model_version
            self._observer.advanced(self._version)
        course = self._agenda.begin(device, assignment.assignment_number, now, assignment.lease_s)
        arrives_s = None if course.duration_s is None else now + course.duration_s
        session = Session.of(device, assignment, now, arrives_s)
        session.pauses = tuple(pause.reason for pause in course.pauses)
        if arrives_s is None:
            session.end = SessionEnd(Outcome.DROPPED, reason=course.lost)
            self._observer.assigned(session)
            self._observer.ended(session)
            return
        self._observer.assigned(session)
        # A pause in a transfer leaves no training to interrupt.
        shares = [pause.trained for pause in course.pauses if 0 < pause.trained < 1]
        self._running[device] = (session, assignment.assignment_id, pool.start(device, assignment, shares))

    def _arrive(self, device: int) -> bool:
        """Wait for the real upload; False if the run was stopped meanwhile."""
        session, assignment_id, future = self._running[device]
        while not wait([future], timeout=_STOP_POLL_S).done:
            if self._stop.is_set():
                return False
        del self._running[device]
        session.end = future.result()
        if session.end.outcome is Outcome.FAILED:
            # Now, and also in a replay: nobody knows whether the server heard it before the process died.
            self._link.give_back(device, assignment_id)
            session.arrives_s = None
        elif not self._rounds.arrive(session.model_version) and session.end.outcome is Outcome.ACCEPTED:
            self._link.take_back(device, assignment_id)
        self._observer.ended(session)
        self._patience.note(session.end)
        return True
