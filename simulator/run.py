"""One simulation, from its configuration to its report."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import ConfigurationError, PocketfedError
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, Manifest
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.session_state import RetryPolicy
from client_sdk.transport import HttpTransport, Transport, open_client
from server_ref.evaluation import ProgramEvaluator
from server_ref.task import Task
from simulator.adversaries import AttackPlan
from simulator.config import SimulationConfig
from simulator.devices import SdkDevices
from simulator.embedded import EmbeddedServer
from simulator.ending import Ending, played, results_of
from simulator.fleet import VirtualFleet
from simulator.folder import AGGREGATORS_FOLDER, JOURNAL_FILE, MEMORY_FOLDER, RunFolder
from simulator.interrupt import stop_on_interrupt
from simulator.journal import Journal
from simulator.loopback import LoopbackConnections, LoopbackTransport
from simulator.memory import FleetMemory
from simulator.monitor import Display, RunMonitor
from simulator.personalization.held_out import check_tests
from simulator.personalization.of_run import flat_weights, models_of, personalization_of
from simulator.population import Workload
from simulator.prepare import Fleet, Prepared, check_fit, write_server
from simulator.progress import SilentDisplay
from simulator.report import write_report
from simulator.results import SimulationResults
from simulator.sessions import Outcome, Session, VirtualRounds
from simulator.view import ServerView, TaskView
from simulator.wall import WallFleet

# The server scores models in the background; the last ones may still be under way when the last round is committed.
_SCORED_WITHIN_S: Final = 120.0
_SCORE_POLL_S: Final = 0.02

# Our own server, a process away: if it does not answer soon, it is gone.
_IMPATIENT: Final = RetryPolicy(base_s=0.05, cap_s=0.5, max_attempts=5)

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes the outcome of a repeatable run.

    Attributes:
        runtime: ExecuTorch adapter: ``auto``, ``native`` or ``pybindings``.
        workers: Training threads.
        display: Shows progress.
        say: Is told about the stages, one line each.
    """

    runtime: str = "auto"
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    display: Display = field(default_factory=SilentDisplay)
    say: Say = field(default=lambda _line: None)


def run_simulation(folder: RunFolder, options: RunOptions, fleet: Fleet | None = None) -> SimulationResults:
    """Run (or resume) the simulation that a folder is for, and write its results and report there.

    Args:
        folder: Configuration and place of the run.
        options: How to carry it out.
        fleet: Devices and data of the caller's own, instead of what the configuration names.

    Returns:
        What ``results.json`` says. ``status`` is ``interrupted`` if a signal ended the run early; the folder can
        then be resumed.

    Raises:
        PocketfedError: Set-up failed (a folder that was empty is empty again), or the run broke off (it can be
            resumed).
    """
    config = folder.config
    try:
        fleet = fleet or Fleet.of(config)
        if fleet.attack is None:
            fleet = replace(fleet, attack=AttackPlan.of(config, fleet.dataset.num_classes))
        if config.adaptation is not None:
            check_tests(fleet)
    except PocketfedError:
        if folder.fresh:
            folder.discard()
        raise
    options.say(
        f"data: {config.dataset}, {len(fleet.dataset.train)} training examples dealt {config.partition} to "
        f"{config.devices} devices"
    )
    journal_file = folder.path / JOURNAL_FILE
    if config.engine == "cohort":
        # It is as quick to play anew what a journal would say.
        journal_file.unlink(missing_ok=True)
    with Journal(journal_file) as journal:
        monitor, ending = _Attempt(folder, options, fleet, journal).run()
        if not ending.finished:
            journal.record_pause(monitor.open_round_s)
        adapted = personalization_of(folder, fleet, ending.models, threads=options.workers, say=options.say)
        results = results_of(config, fleet, monitor, ending, workers=options.workers, personalization=adapted)
    results.write(folder.path)
    write_report(
        folder.path,
        results,
        label_counts=fleet.label_counts(),
        sessions=monitor.sessions,
        counted=ending.counted,
        tier_of=fleet.population.tier,
    )
    return results


@dataclass(frozen=True)
class _Attempt:
    """One process' part of a run."""

    folder: RunFolder
    options: RunOptions
    fleet: Fleet
    journal: Journal

    def run(self) -> tuple[RunMonitor, Ending]:
        """By the engine and the server that the configuration names."""
        config = self.folder.config
        if config.engine == "cohort":
            return self.cohort()
        return self.embedded() if config.server is None else self.foreign(config.server)

    def cohort(self) -> tuple[RunMonitor, Ending]:
        """In this process, trained in batches, in virtual time."""
        from simulator.cohort.run import CohortSetting  # noqa: PLC0415 - torch, where devices need none

        options = self.options
        with self._beginning():
            setting = CohortSetting.prepare(self.folder, self.fleet, options.say)
        options.say("devices: trained in batches in this process, on virtual time")
        return setting.play(self.journal, options.display, options.say, threads=options.workers)

    def embedded(self) -> tuple[RunMonitor, Ending]:
        """Against a server of our own, in virtual time."""
        with self._beginning():
            prepared = Prepared.of(self.folder, self.fleet, self.options.say)
        with contextlib.ExitStack() as stack:
            with self._beginning():
                aggregators = self._aggregators(prepared.task, stack)
                server_config = write_server(self.folder, self.fleet.dataset, prepared.settings, aggregators)
            self.options.say("server: starting on loopback, on virtual time")
            return self._against(server_config, prepared)

    def _aggregators(self, task: Task, stack: contextlib.ExitStack) -> dict[str, Any] | None:
        """Start aggregators in processes of their own, where the run asks for them: what the server is told of them."""
        if task.sharing is None or self.folder.config.aggregators == "embedded":
            return None
        from server_ref.secure.launch import (  # noqa: PLC0415 - for runs that ask for it
            COORDINATOR_FILE,
            PEERS_FILE,
            launch_aggregators,
        )

        place = self.folder.path / AGGREGATORS_FOLDER
        sharing = task.sharing
        self.options.say(f"aggregators: starting {sharing.pinned.num_aggregators} processes on loopback")
        processes = launch_aggregators(
            sharing.pinned,
            place,
            suite=sharing.suite,
            task=sharing.binding(task.task_id, task.manifest.parameter_table_sha256),
        )
        stack.enter_context(processes)
        return {
            "mode": "remote",
            "urls": [port.url for port in processes.ports],
            "peers_file": f"../{AGGREGATORS_FOLDER}/{PEERS_FILE}",
            "key_file": f"../{AGGREGATORS_FOLDER}/{COORDINATOR_FILE}",
        }

    def _against(self, server_config: Path, prepared: Prepared) -> tuple[RunMonitor, Ending]:
        """Against the server that a configuration starts."""
        config, population = self.folder.config, self.fleet.population
        with (
            EmbeddedServer(server_config) as server,
            ServerView(server.url) as view,
            contextlib.closing(LoopbackConnections(server.url)) as connections,
            self._devices(
                lambda identity: LoopbackTransport(connections, identity), _IMPATIENT, prepared.plans
            ) as link,
            stop_on_interrupt(self.options.say) as stop,
        ):
            self.options.say(f"server: {server.url}; log in {server.log}")
            monitor = self._monitor(view, of_rounds=config.rounds, cohort=config.cohort_size)
            fleet = VirtualFleet(
                population,
                num_samples=self.fleet.num_samples,
                work=lambda device, session: prepared.costs.workload(prepared.plans[device], session),
                link=link,
                journal=self.journal,
                observer=monitor,
                workers=self.options.workers,
                stop=stop,
                rounds=VirtualRounds(config.cohort_size, config.staleness.tolerance),
            )
            try:
                finished, stuck = played(fleet.run)
                ending = self._end(view, monitor, prepared.bundle.path, finished=finished, stuck=stuck)
                ending = replace(ending, plans=prepared.plans)
                if ending.finished and config.adaptation is not None:
                    initial, own = prepared.bundle.initial_weights(), link.personal_layers(prepared.task.task_id)
                    models = models_of(view, initial, own, of_rounds=config.rounds)
                    ending = replace(ending, models=models)
            except PocketfedError:
                # The cause, where the server is gone; else the error itself.
                server.check()
                raise
        return monitor, ending

    def foreign(self, url: str) -> tuple[RunMonitor, Ending]:
        """Against somebody else's server, in real time."""
        config = self.folder.config
        with contextlib.ExitStack() as stack:
            with self._beginning():
                view = stack.enter_context(ServerView(url))
                bundle = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pocketfed-bundle-")))
                task = self._foreign_task(view, url, bundle)
            of_rounds = min(config.rounds, task.rounds - task.model_version)
            self.options.say(
                f"server: {url} (its own clock, rounds and training plan; this run is not repeatable), "
                f"{of_rounds} rounds from model version {task.model_version} on"
            )
            # One connection for each worker, one for the check-ins.
            http = stack.enter_context(open_client(url, max_connections=self.options.workers + 1))
            with (
                self._devices(lambda identity: HttpTransport(url, identity, client=http), None) as link,
                stop_on_interrupt(self.options.say) as stop,
            ):
                monitor = self._monitor(
                    view, of_rounds=of_rounds, cohort=task.buffer_size, first_version=task.model_version
                )
                fleet = WallFleet(
                    self.fleet.population,
                    link=link,
                    observer=monitor,
                    workers=self.options.workers,
                    stop=stop,
                    from_version=task.model_version,
                    until_version=task.model_version + of_rounds,
                    work=Workload(1.0, 0, 0, config.plan),
                )
                finished, stuck = played(fleet.run)
                return monitor, self._end(view, monitor, bundle, finished=finished, stuck=stuck)

    def _foreign_task(self, view: ServerView, url: str, bundle: Path) -> TaskView:
        """The server's task, and its program unpacked into ``bundle``."""
        task = view.task()
        if task.virtual_clock:
            raise ConfigurationError(
                f"the server at {url} runs on a simulation's virtual clock, which only the process that started it may "
                'drive; start a server with clock = "wall"'
            )
        (bundle / MANIFEST_FILE).write_bytes(view.blob(task.manifest_sha256))
        (bundle / PROGRAM_FILE).write_bytes(view.blob(task.program_sha256))
        check_fit(Manifest.from_json((bundle / MANIFEST_FILE).read_bytes()), self.fleet.dataset)
        return task

    @contextlib.contextmanager
    def _beginning(self) -> Iterator[None]:
        """Leaves nothing of a run that never began, so that the same command can be given again."""
        try:
            yield
        except BaseException:
            if self.folder.fresh:
                self.folder.discard()
            raise

    def _devices(
        self,
        connect: Callable[[DeviceIdentity], Transport],
        policy: RetryPolicy | None,
        plans: Sequence[TrainingPlan] | None = None,
    ) -> SdkDevices:
        fleet, virtual = self.fleet, self.folder.config.server is None
        return SdkDevices(
            connect,
            fleet.population,
            fleet.honest_data,
            fleet.parts,
            runtime=self.options.runtime,
            policy=policy,
            attack=fleet.attack,
            plans=plans,
            virtual=virtual,
            memory=FleetMemory(self.folder.path / MEMORY_FOLDER, self.journal.accepted()) if virtual else None,
        )

    def _monitor(self, view: ServerView, *, of_rounds: int, cohort: int, first_version: int = 0) -> RunMonitor:
        return RunMonitor(
            view.rounds,
            self.journal,
            self.options.display,
            of_rounds=of_rounds,
            cohort=cohort,
            dense_report_bytes=view.task().dense_report_bytes,
            first_version=first_version,
        )

    def _end(self, view: ServerView, monitor: RunMonitor, bundle: Path, *, finished: bool, stuck: str | None) -> Ending:
        """Wait for the last validation figures; after the last round, read the test split, once."""
        patience = threading.Event()
        polls = round(_SCORED_WITHIN_S / _SCORE_POLL_S) if finished else 1
        while not monitor.refresh() and (polls := polls - 1) > 0:
            patience.wait(_SCORE_POLL_S)
        task = view.task()
        program = load_program(bundle, self.options.runtime)
        try:
            evaluation = None
            if finished:
                test = self.fleet.dataset.test
                weights = flat_weights(view.blob(task.model_sha256))
                evaluation = ProgramEvaluator(program, test.x, test.y).evaluate(weights)
            return Ending(
                finished=finished,
                model_sha256=task.model_sha256 if task.model_version > 0 else None,
                evaluation=evaluation,
                counted=_counted(self.folder.config, monitor),
                parameters=program.manifest.num_parameters,
                server=self.folder.config.server or "embedded",
                runtime=type(program).__name__.removesuffix("Program").lower(),
                halted=task.halted or stuck,
                pipeline=task.pipeline,
                privacy=task.privacy,
                secrecy=task.secure,
            )
        finally:
            program.close()


def _counted(config: SimulationConfig, monitor: RunMonitor) -> list[list[Session]]:
    if config.server is None:
        return monitor.counted(config.staleness.tolerance)
    # A foreign server does not tell whose reports it counted; those that it took, it counted or may still count.
    return [[s for s in monitor.sessions if s.end is not None and s.end.outcome is Outcome.ACCEPTED]]
