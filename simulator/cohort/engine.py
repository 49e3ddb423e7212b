"""The cohort engine: a fleet's virtual time, played without devices, transports or processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client_sdk.protocol.errors import ProgramError, ProtocolError, StaleReport
from client_sdk.protocol.messages import RetryWindow
from server_ref.assignments import Waiting
from simulator.agenda import Agenda, EventKind
from simulator.cohort.clients import Clients
from simulator.cohort.queue import Broadcast, Job, TrainingQueue
from simulator.cohort.server import CohortServer, wire_bytes
from simulator.cohort.trainer import CohortTrainer
from simulator.fleet import FleetObserver, Patience
from simulator.population import Population, Workload
from simulator.sessions import Outcome, Session, SessionEnd, failure_reason


@dataclass(frozen=True)
class Failure:
    """A session that gave its assignment back.

    Attributes:
        session: The session; its report never arrives.
        error: Why.
    """

    session: Session
    error: ProgramError | ProtocolError


@dataclass(frozen=True)
class _Running:
    session: Session
    job: Job
    broadcast: Broadcast
    bytes_down: int


class CohortEngine:
    """Plays a population against an in-process server; local training happens when a buffer is full, many at a time.

    Check-ins, assignments and arrivals happen in the same order and at the same virtual times as with real devices
    (``VirtualFleet``), so that both engines invite, count and discard the same sessions.

    Guarantees: the result is a function of the arguments, to the bit, on one machine.

    Args:
        server: The rounds.
        clients: The devices' data, memory and reports.
        trainer: Their local training.
        population: Who the devices are.
        num_samples: Training examples of each device.
        work: Device, session of it (0 = its first) -> what that session costs.
        observer: Is told about progress.
        stop: Ends the run at the next event when set.

    Attributes:
        failures: Sessions whose training failed, or whose update nobody would take.
    """

    def __init__(
        self,
        server: CohortServer,
        clients: Clients,
        trainer: CohortTrainer,
        *,
        population: Population,
        num_samples: Sequence[int],
        work: Callable[[int, int], Workload],
        observer: FleetObserver,
        stop: threading.Event,
    ) -> None:
        self.failures: list[Failure] = []
        self._server = server
        self._clients = clients
        settings = server.task.settings
        self._queue = TrainingQueue(trainer, settings.plan, clients.work)
        self._retry = RetryWindow(min_s=settings.retry_min_s, max_s=settings.retry_max_s)
        self._population = population
        self._num_samples = num_samples
        self._work = work
        self._observer = observer
        self._stop = stop
        self._running: dict[int, _Running] = {}
        self._arrived: dict[int, _Running] = {}
        self._patience = Patience(population.devices)

    def run(self) -> bool:
        """Run until the last round is committed.

        Returns:
            True if it is, False if ``stop`` was set first.

        Raises:
            FleetCannotTrain: More sessions than there are devices failed in a row.
        """
        agenda = self._agenda = Agenda(self._population, self._num_samples, self._work)
        while not self._stop.is_set():
            now, kind, _, device = agenda.next()
            if kind is EventKind.ARRIVAL:
                self._arrive(self._running.pop(device), now)
                agenda.rest(device, now)
            elif self._server.finished:
                return True
            else:
                self._check_in(device, now)
        return False

    def _check_in(self, device: int, now: float) -> None:
        if device in self._arrived and self._server.inviting(now):
            # Whoever has reported waits for the commit; whoever could not may be invited again. Only training tells.
            self._deliver(now)
        if device in self._arrived:
            self._agenda.wait(device, now, self._retry)
            return
        duration = self._agenda.duration_s(device, now)
        record = self._server.check_in(device, self._num_samples[device], now, duration)
        if isinstance(record, Waiting):
            self._agenda.wait(device, now, self._retry)
            return
        bytes_down = self._work(device, self._agenda.sessions(device)).bytes_down
        course = self._agenda.begin(device, record.number, now, record.deadline - record.issued_at)
        arrives_s = None if course.duration_s is None else now + course.duration_s
        session = Session(device, record.number, record.round_id, record.model_version, now, arrives_s)
        session.pauses = tuple(pause.reason for pause in course.pauses)
        self._observer.assigned(session)
        if arrives_s is None:
            self._end(session, SessionEnd(Outcome.DROPPED, reason=course.lost))
            return
        job, broadcast = Job(arrives_s, record.number, device, record), self._server.broadcast
        self._queue.assign(job, broadcast)
        self._running[device] = _Running(session, job, broadcast, bytes_down)

    def _arrive(self, running: _Running, now: float) -> None:
        """A report arrives. What is in it does not matter before the buffer is full, so that nobody has trained yet."""
        try:
            self._server.check_fresh(running.job.record, now)
        except StaleReport:
            self._end(running.session, SessionEnd(Outcome.REFUSED, 0, running.bytes_down, StaleReport.slug))
            return
        self._arrived[running.job.device] = running
        if len(self._arrived) == self._server.room:
            self._deliver(now)

    def _deliver(self, now: float) -> None:
        """Train and deliver what has arrived; the buffer closes, unless somebody has nothing to deliver."""
        server, version = self._server, self._server.version
        arrived, self._arrived = self._arrived, {}
        for taken, running in enumerate(arrived.values()):
            # What arrives later than a full synchronous buffer is worthless; an asynchronous one will want it.
            at_most = len(arrived) - taken if server.synchronous else None
            try:
                trained = self._queue.take(running.job, running.broadcast, at_most=at_most)
                update, memory = self._clients.report(running.job, running.broadcast, trained, version)
                server.report(running.job.record, update, trained.train_loss, now)
            except (ProgramError, ProtocolError) as e:
                self._fail(running, e)
            else:
                self._clients.accepted(running.job.device, memory)
                self._end(running.session, SessionEnd(Outcome.ACCEPTED, wire_bytes(update), running.bytes_down))
        if server.version > version:
            self._queue.drop_before(server.oldest_version)
            self._observer.advanced(server.version)

    def _fail(self, running: _Running, error: ProgramError | ProtocolError) -> None:
        self._server.give_up(running.job.record)
        running.session.arrives_s = None
        self.failures.append(Failure(running.session, error))
        self._end(running.session, SessionEnd(Outcome.FAILED, 0, running.bytes_down, failure_reason(error)))

    def _end(self, session: Session, end: SessionEnd) -> None:
        session.end = end
        self._observer.ended(session)
        self._patience.note(end)
