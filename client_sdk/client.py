"""The facade an app embeds: train on local data, and take part in a server's rounds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk import events
from client_sdk.data import as_examples
from client_sdk.errors import IllegalTransition, Interrupted
from client_sdk.executor import MAX_BLOB_BYTES, ActionExecutor, OnEvent, Surroundings
from client_sdk.privacy import LocalPrivacy
from client_sdk.programs import EmbeddedProgram, ProgramProvider
from client_sdk.protocol.errors import ConfigurationError, PocketfedError, ProgramInputError, StaleReport
from client_sdk.protocol.messages import Assigned, Assignment, Finished, ReportReply, VirtualTiming, Wait
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Float32Array, Manifest, Program, Role
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.protocol.updates import LOCAL_STEPS, UpdateKind, WorkerGradient
from client_sdk.session import DeviceSession
from client_sdk.session_state import (
    WITH_ASSIGNMENT,
    Action,
    CheckIn,
    Discard,
    Phase,
    RetryPolicy,
    SessionState,
    Sleep,
    Stop,
)
from client_sdk.store import DeviceStore, MemoryDeviceStore
from client_sdk.training import LocalTrainer
from client_sdk.transport import Transport
from client_sdk.trust import trusted_aggregators
from client_sdk.watch import WatchedProgram

Weights = Float32Array | Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class RunSummary:
    """How a run ended, and after how many accepted reports.

    ``cause`` is ``finished`` (the task is), ``enough-reports``, ``stopped`` (by the caller), ``gave-up`` (the same
    step failed too often) or ``refused`` (waiting cannot help); ``error`` is what the last two are about.
    """

    cause: str
    detail: str
    reports: int
    error: PocketfedError | None = None


class MobileClient:
    """One device.

    Without a transport it trains locally (``train_local_model``). With one it also takes part in a server's task:
    ``run`` is the whole life; ``check_in`` and ``perform`` are its two halves, for who schedules many devices.
    One thread at a time uses a client; which one may change between calls.
    """

    def __init__(
        self,
        program: Program | None,
        device_profile: DeviceProfile,
        *,
        weights: Weights | None = None,
        data: Any = None,  # noqa: ANN401 - arrays, tensors and loaders have no common type
        transport: Transport | None = None,
        store: DeviceStore | None = None,
        programs: ProgramProvider | None = None,
        policy: RetryPolicy | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
        wait: Callable[[float, threading.Event], None] | None = None,
        conditions: Callable[[], str | None] = lambda: None,
        on_event: OnEvent = lambda _: None,
        max_blob_bytes: int = MAX_BLOB_BYTES,
        aggregator_keys: Sequence[str] | None = None,
        min_threshold: int | None = None,
        local_privacy: LocalPrivacy | None = None,
    ) -> None:
        """Put a device together; nothing is sent or loaded yet.

        Args:
            program: What trains; may be None where ``programs`` is given.
            device_profile: Who the device is and what it can spend.
            weights: Weights that ``train_local_model`` starts from where it is given none.
            data: The device's examples: ``(x, y)`` or an iterable of such pairs; needed for a server's task.
            transport: The server.
            store: Durable state; in memory by default, which is only for tests and simulations.
            programs: Where the programs of assignments come from; by default ``program`` is the only one.
            policy: Waits and bounds.
            rng: Jitter of the waits.
            clock: Seconds; must go on across restarts, since leases are noted in it.
            wait: Waits some seconds or until the event is set.
            conditions: Why the device may not work now (power, network, ...), or None.
            on_event: Told about everything in ``client_sdk.events``, in the calling thread.
            max_blob_bytes: Largest program or model that is downloaded.
            aggregator_keys: Public sealing keys (hex, that of aggregator 1 first) of those it trusts: an assignment
                that would send its update to anyone else, or in the clear, is refused. None trusts the server's word.
            min_threshold: With ``aggregator_keys``: so many of them must be needed at least to read an update; by
                default more than half.
            local_privacy: The noise that each report gets on this device, and the ledger that it is charged to; None
                for none. ``train_local_model`` returns what was trained, without noise.
        """
        if programs is None and program is not None:
            programs = EmbeddedProgram(program)
        self._program = program
        self._profile = device_profile
        self._weights = weights
        self._clock = clock
        self._on_event = on_event
        self._policy = policy
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._store = store or MemoryDeviceStore()
        self._executor: ActionExecutor | None = None
        if transport is not None:
            if programs is None or data is None:
                raise ConfigurationError("a device that talks to a server needs data, and a program or a provider")
            self._executor = ActionExecutor(
                Surroundings(
                    transport=transport,
                    store=self._store,
                    programs=programs,
                    data=as_examples(data),
                    tier=device_profile.device_type,
                    clock=clock,
                    wait=wait or _wait,
                    on_event=on_event,
                    conditions=conditions,
                    max_blob_bytes=max_blob_bytes,
                    trusted=trusted_aggregators(aggregator_keys, min_threshold),
                    local_privacy=local_privacy,
                ),
                self._open_session(None),
            )

    # --- local ---

    def train_local_model(
        self,
        local_data: Any,  # noqa: ANN401 - arrays, tensors and loaders have no common type
        server_model_version: int = 0,
        *,
        weights: Weights | None = None,
        plan: TrainingPlan | None = None,
        shuffle_seed: int = 0,
        should_stop: Callable[[], bool] | None = None,
    ) -> WorkerGradient | None:
        """Train on local data and return what changed.

        Args:
            local_data: ``(x, y)`` or an iterable of such batches; x float32 ``[n, ...]``, y int64 ``[n]``.
            server_model_version: Version that the weights have; comes back in the metadata.
            weights: Where to start: flat float32 ``[d]``, or name -> array.
            plan: Epochs, batch size, learning rate; by default one epoch in the program's largest batches.
            shuffle_seed: Seed of the order of examples.
            should_stop: Asked between two steps.

        Returns:
            The model delta (trained minus given weights) per parameter, of kind ``DELTA``; None if ``should_stop``
            said so, and then nothing has changed. With fednova it is the plain delta too: the metadata's
            ``local_steps`` is the plan's ``normaliser``, by which ``GradientAggregator`` divides.

        Raises:
            ConfigurationError: No program or no weights, or scaffold, which needs a server's control variate.
            ProgramInputError: Data or weights that do not fit the program.
            TrainingDiverged: Weights or loss stopped being finite.
        """
        start = weights if weights is not None else self._weights
        if self._program is None or start is None:
            raise ConfigurationError("local training needs a program and weights; pass both to MobileClient")
        manifest = self._program.manifest
        x, y = as_examples(local_data)
        plan = plan or TrainingPlan(batch_size=manifest.method(Role.TRAIN).batch_size)
        trainer = LocalTrainer(WatchedProgram(self._program, should_stop=should_stop))
        try:
            result = trainer.train(_flat(start, manifest), x, y, plan, shuffle_seed)
        except Interrupted:
            return None
        return WorkerGradient(
            worker_id=self._profile.device_id,
            gradients=_named(result.delta, manifest),
            num_samples=result.num_samples,
            timestamp=self._clock(),
            metadata={
                "model_version": server_model_version,
                "device_type": self._profile.device_type.value,
                LOCAL_STEPS: normaliser(plan, result.steps) if plan.algorithm == "fednova" else result.steps,
                "train_loss": result.last_epoch_loss,
            },
            kind=UpdateKind.DELTA,
        )

    # --- in a server's task ---

    @property
    def state(self) -> SessionState:
        """Where the device stands."""
        return self._networked().session.state

    def check_in(self, virtual: VirtualTiming | None = None) -> Assigned | Wait | Finished:
        """Ask the server for work, enrolling first where needed.

        An assignment that was taken but not fulfilled is forgotten: the server hands it out again while it stands. A
        sealed report is not: its assignment is the answer, without asking. A pause that is still on is cut short,
        because the caller decides when to come.

        Args:
            virtual: Simulated time, for a server with the virtual clock.

        Raises:
            PocketfedError: The server refuses the device, or cannot be reached in the policy's number of attempts.
        """
        executor = self._revived()
        never = threading.Event()
        state = executor.session.state
        if state.phase in {Phase.SEALED, Phase.UPLOADING} and state.assignment is not None:
            return Assigned(assignment=state.assignment)
        if state.phase in WITH_ASSIGNMENT and state.phase is not Phase.DONE:
            executor.session.on_assignment_over("the device checks in again")
        action = executor.session.next_action()
        if isinstance(action, Discard):
            executor.execute(action, never)
        if isinstance(executor.session.next_action(), Sleep):
            executor.session.on_slept()
        while True:
            reply = executor.execute(self._proceed(executor), never, virtual)
            if reply is not None:
                return reply

    def perform(self, assignment: Assignment, stop: threading.Event | None = None) -> ReportReply:
        """Fulfil an assignment: download, train, seal, upload; returns when the server holds the report.

        An assignment that this device does not hold (its state was lost, an earlier process took it) is taken over.

        Args:
            assignment: From ``check_in``.
            stop: Ends training between two steps.

        Raises:
            StaleReport, LeaseExpired, DuplicateReport, UnknownAssignment: It came too late; the report is dropped.
            ProgramError, BundleMismatch: It cannot be trained here; the server has it back.
            Interrupted: ``stop`` was set; ``perform`` again goes on.
            PocketfedError: Anything else that waiting did not help.
        """
        executor = self._revived()
        stop = stop or threading.Event()
        self._take_over(executor, assignment)
        executor.cause = None
        while True:
            action = self._proceed(executor)
            executor.execute(action, stop)
            if isinstance(action, Discard):
                if action.accepted:
                    return ReportReply(report_id=action.report_id, assignment_id=assignment.assignment_id)
                raise executor.cause or StaleReport(action.detail)

    def run(self, max_reports: int | None = None, stop: threading.Event | None = None) -> RunSummary:
        """Take part until the task is finished, ``max_reports`` are accepted, or ``stop`` is set.

        State is saved at each step; a later ``run``, in this process or another, goes on from there.

        Raises:
            StateDirUnusable: The state could not be saved.
        """
        executor = self._networked()
        stop = stop or threading.Event()
        session = executor.session = self._open_session(max_reports)
        before = session.state.reports
        end: Stop | None = None
        try:
            while not stop.is_set() and end is None:
                action = session.next_action()
                if isinstance(action, Stop):
                    end = action
                else:
                    executor.execute(action, stop)
        except Interrupted:
            pass
        reports = session.state.reports - before
        summary = (
            RunSummary("stopped", "stopped by the caller; the state is kept", reports)
            if end is None
            else RunSummary(end.cause, end.detail, reports, end.error)
        )
        self._on_event(events.Finished(summary.cause, summary.detail, reports))
        return summary

    # --- pieces ---

    def _networked(self) -> ActionExecutor:
        if self._executor is None:
            raise ConfigurationError("this client has no transport; pass one to MobileClient to talk to a server")
        return self._executor

    def _revived(self) -> ActionExecutor:
        """The executor; after a stop (server gone, task finished) with a session that tries again."""
        executor = self._networked()
        if isinstance(executor.session.next_action(), Stop):
            executor.session = self._open_session(None)
        return executor

    def _open_session(self, max_reports: int | None) -> DeviceSession:
        identity = self._store.identity
        return DeviceSession(
            self._store.load_session() or SessionState(device_id=identity.device_id),
            report_id_of=identity.report_id,
            rng=self._rng,
            policy=self._policy,
            max_reports=max_reports,
        )

    @staticmethod
    def _proceed(executor: ActionExecutor) -> Action:
        action = executor.session.next_action()
        if isinstance(action, Stop):
            raise action.error or executor.cause or PocketfedError(action.detail)
        return action

    def _take_over(self, executor: ActionExecutor, assignment: Assignment) -> None:
        held = executor.session.state.assignment
        if held is not None and held.assignment_id != assignment.assignment_id:
            raise IllegalTransition(
                f"the device holds assignment {held.assignment_id}; check in before performing "
                f"{assignment.assignment_id}"
            )
        while executor.session.state.phase not in WITH_ASSIGNMENT:
            action = self._proceed(executor)
            if isinstance(action, CheckIn):
                executor.session.on_check_in(Assigned(assignment=assignment))
            elif isinstance(action, Sleep):
                executor.session.on_slept()
            else:
                executor.execute(action, threading.Event())


def _wait(delay_s: float, stop: threading.Event) -> None:
    stop.wait(delay_s)


def _flat(weights: Weights, manifest: Manifest) -> Float32Array:
    """Flat weights in parameter-table order."""
    if not isinstance(weights, Mapping):
        return np.asarray(weights, np.float32)
    expected = {p.name: p.shape for p in manifest.parameters}
    found = {name: np.shape(array) for name, array in weights.items()}
    if found != expected:
        raise ProgramInputError(f"weights must be {expected}, got {found}")
    return np.concatenate([np.ravel(np.asarray(weights[p.name], np.float32)) for p in manifest.parameters])


def _named(flat: Float32Array, manifest: Manifest) -> dict[str, Float32Array]:
    """Parameter name -> view into a flat vector."""
    return {p.name: flat[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in manifest.parameters}
