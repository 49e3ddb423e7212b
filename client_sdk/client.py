"""The facade an app embeds: train on local data, and take part in a server's rounds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from client_sdk import events
from client_sdk.checkpoint import CheckpointManager
from client_sdk.data import as_examples
from client_sdk.errors import Interrupted
from client_sdk.executor import ActionExecutor
from client_sdk.footprint import BASELINE_BYTES
from client_sdk.halves import asked, performed
from client_sdk.local_training import LocalTraining, Weights
from client_sdk.planner import MEMORY_FRACTION
from client_sdk.power import PowerMonitor
from client_sdk.privacy import LocalPrivacy
from client_sdk.programs import EmbeddedProgram, ProgramProvider
from client_sdk.protocol.errors import ConfigurationError, PocketfedError
from client_sdk.protocol.messages import Assigned, Assignment, Finished, ReportReply, VirtualTiming, Wait
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import WorkerGradient
from client_sdk.session import DeviceSession
from client_sdk.session_state import (
    Phase,
    RetryPolicy,
    SessionState,
    Sleep,
    Stop,
)
from client_sdk.stopping import Stopper
from client_sdk.store import DeviceStore, MemoryDeviceStore
from client_sdk.surroundings import MAX_BLOB_BYTES, OnEvent, Surroundings
from client_sdk.transport import Transport
from client_sdk.trust import trusted_aggregators

# How long a device rests between the slice in which it gave up and the next one that tries again.
_AFTER_GIVING_UP_S = (300.0, 3600.0)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended, and after how many accepted reports.

    ``cause`` is ``finished`` (the task is), ``enough-reports``, ``stopped`` (by the caller), ``out-of-time`` (the
    budget of ``run_for``), ``gave-up`` (the same step failed too often) or ``refused`` (waiting cannot help); ``error``
    is what the last two are about. ``again_after_s`` is how soon it makes sense to run again, where there may be more
    to do: 0 at once, None where there is not.
    """

    cause: str
    detail: str
    reports: int
    error: PocketfedError | None = None
    again_after_s: float | None = None


class MobileClient:
    """One device.

    Without a transport it trains locally (``train_local_model``). With one it also takes part in a server's task:
    ``run`` is the whole life, ``run_for`` a slice of it, as phones hand out time; ``check_in`` and ``perform`` are its
    two halves, for who schedules many devices. One thread at a time uses a client; which one may change between calls.

    Attributes:
        training_paused: Whether training is under way and paused, by the device's conditions or by the caller.
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
        monotonic: Callable[[], float] = time.monotonic,
        conditions: Callable[[], str | None] = lambda: None,
        power_monitor: PowerMonitor | None = None,
        checkpoint_manager: CheckpointManager | None = None,
        memory_fraction: float = MEMORY_FRACTION,
        baseline_bytes: int = BASELINE_BYTES["native"],
        memory_limit_bytes: int | None = None,
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
            monotonic: Seconds of a clock that nobody sets back, for budgets and rests.
            conditions: The app's own reason why the device may not work now ("the user opted out"), or None.
            power_monitor: Battery, heat, network and user: training starts and goes on as its policy allows, and rests
                as its duty cycle says. None leaves all that to the app.
            checkpoint_manager: Keeps training under way; by default the store's own, which a state directory has.
            memory_fraction: Part of the profile's memory that training is planned for; what does not fit is refused.
            baseline_bytes: What this process takes besides: an app gives its own
                (``client_sdk.memory_budget.resident_bytes``).
            memory_limit_bytes: What this process may use at most: planned for, and looked at after each call.
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
        self._monotonic = monotonic
        self._wait = wait or _wait
        self._memory_fraction = memory_fraction
        self._baseline_bytes = baseline_bytes
        self._memory_limit_bytes = memory_limit_bytes
        self._app_event = on_event
        self._policy = policy
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._store = store or MemoryDeviceStore()
        self._power = power_monitor
        self._checkpoints = checkpoint_manager or self._store.checkpoints
        self.training_paused = False
        self._not_before: float | None = None
        self._data = None if data is None else as_examples(data)
        self._conditions = conditions
        self._executor: ActionExecutor | None = None
        if transport is not None:
            if programs is None or self._data is None:
                raise ConfigurationError("a device that talks to a server needs data, and a program or a provider")
            around = Surroundings(
                transport=transport,
                store=self._store,
                programs=programs,
                data=self._data,
                profile=device_profile,
                clock=clock,
                monotonic=monotonic,
                wait=self._wait,
                on_event=self._on_event,
                conditions=conditions,
                power=power_monitor,
                checkpoints=self._checkpoints,
                memory_fraction=memory_fraction,
                baseline_bytes=baseline_bytes,
                memory_limit_bytes=memory_limit_bytes,
                max_blob_bytes=max_blob_bytes,
                trusted=trusted_aggregators(aggregator_keys, min_threshold),
                local_privacy=local_privacy,
            )
            self._executor = ActionExecutor(around, self._open_session(None))

    @property
    def power_monitor(self) -> PowerMonitor | None:
        """What is asked before and during work; None where the app sees to that itself."""
        return self._power

    @property
    def checkpoint_manager(self) -> CheckpointManager | None:
        """Where training under way is kept; None where a training that stops begins anew."""
        return self._checkpoints

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

        Where there is a checkpoint manager, a training that was paused, interrupted or killed goes on from its last
        checkpoint when the same call is made again, and ends in the same bits.

        Args:
            local_data: ``(x, y)`` or an iterable of such batches; x float32 ``[n, ...]``, y int64 ``[n]``.
            server_model_version: Version that the weights have; comes back in the metadata.
            weights: Where to start: flat float32 ``[d]``, or name -> array.
            plan: Epochs, batch size, learning rate; by default what the device's tier and memory allow
                (``num_local_epochs``, ``batch_size``).
            shuffle_seed: Seed of the order of examples.
            should_stop: Asked between two calls of the program.

        Returns:
            The model delta (trained minus given weights) per parameter, of kind ``DELTA``; None if ``should_stop`` or
            the power monitor said so, and then nothing has changed. With fednova it is the plain delta too: the
            metadata's ``local_steps`` is the plan's ``normaliser``, by which ``GradientAggregator`` divides.

        Raises:
            ConfigurationError: No program or no weights, or scaffold, which needs a server's control variate.
            ProgramInputError: Data or weights that do not fit the program.
            MemoryBudgetExceeded: The plan does not fit into the device's memory.
            TrainingDiverged: Weights or loss stopped being finite.
        """
        start = weights if weights is not None else self._weights
        if start is None:
            raise ConfigurationError("local training needs a program and weights; pass both to MobileClient")
        update = self._local(self._embedded()).train(
            start,
            as_examples(local_data),
            model_version=server_model_version,
            plan=plan,
            shuffle_seed=shuffle_seed,
            should_stop=should_stop or (lambda: False),
        )
        self.training_paused = update is None
        return update

    @property
    def batch_size(self) -> int:
        """Examples of one step that the device's memory allows, as planned from the program's manifest."""
        return self._local(self._embedded()).work().plan.batch_size

    @property
    def num_local_epochs(self) -> int:
        """Passes over the data that suit the device's tier."""
        return self._local(self._embedded()).work().plan.local_epochs

    @property
    def gradient_accumulation_steps(self) -> int:
        """Calls of the program that one step of ``batch_size`` takes."""
        return self._local(self._embedded()).work().accumulation_steps

    def _embedded(self) -> Program:
        if self._program is None:
            raise ConfigurationError("local training needs a program and weights; pass both to MobileClient")
        return self._program

    def _local(self, program: Program) -> LocalTraining:
        never = threading.Event()
        return LocalTraining(
            program,
            self._profile,
            power=self._power,
            # Apart from those of a server's assignment, which may be under way as well.
            checkpoints=None if self._checkpoints is None else self._checkpoints.within("local"),
            memory_fraction=self._memory_fraction,
            baseline_bytes=self._baseline_bytes,
            memory_limit_bytes=self._memory_limit_bytes,
            on_event=self._on_event,
            clock=self._clock,
            monotonic=self._monotonic,
            sleep=lambda seconds: self._wait(seconds, never),
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
            TrainingPaused: The app or the device's conditions do not allow to work now; the caller decides when to
                come again.
            PocketfedError: The server refuses the device, or cannot be reached in the policy's number of attempts.
        """
        return asked(self._revived(), virtual)

    def perform(self, assignment: Assignment, stop: threading.Event | None = None) -> ReportReply:
        """Fulfil an assignment: download, train, seal, upload; returns when the server holds the report.

        An assignment that this device does not hold (its state was lost, an earlier process took it) is taken over.

        Args:
            assignment: From ``check_in``.
            stop: Ends training between two calls of the program.

        Raises:
            StaleReport, LeaseExpired, DuplicateReport, UnknownAssignment: It came too late; the report is dropped.
            ProgramError, BundleMismatch: It cannot be trained here; the server has it back.
            Interrupted: ``stop`` was set; ``perform`` again goes on.
            TrainingPaused: The app or the device's conditions do not allow to go on now; likewise.
            PocketfedError: Anything else that waiting did not help.
        """
        return performed(self._revived(), assignment, Stopper(stop))

    def run(self, max_reports: int | None = None, stop: threading.Event | None = None) -> RunSummary:
        """Take part until the task is finished, ``max_reports`` are accepted, or ``stop`` is set.

        State is saved at each step; a later ``run``, in this process or another, goes on from there.

        Raises:
            StateDirUnusable: The state could not be saved.
        """
        return self._run(Stopper(stop), max_reports)

    def run_for(
        self, budget_s: float, *, max_reports: int | None = None, stop: threading.Event | None = None
    ) -> RunSummary:
        """Take part for a slice of time, as a phone's scheduler hands it out; call it again for the next one.

        Work ends at the first step boundary after the budget, with a checkpoint of a training under way; a wait that
        is longer than what is left ends the slice at once. Nothing is lost between two slices, in one process or in
        several. A request that is under way is not cut off: allow the transport's timeout on top.

        Args:
            budget_s: Seconds from now.
            max_reports: Leave after so many accepted reports.
            stop: Ends the slice early (the system wants the time back).

        Returns:
            With the cause ``out-of-time``, and in ``again_after_s`` when it makes sense to come again.

        Raises:
            StateDirUnusable: The state could not be saved.
            ConfigurationError: A budget that is not positive.
        """
        if not budget_s > 0:
            raise ConfigurationError(f"a budget of {budget_s} seconds leaves no time to work")
        early_s = 0.0 if self._not_before is None else self._not_before - self._clock()
        if 0 < early_s <= _AFTER_GIVING_UP_S[1]:
            # Else a host that hands out one slice after the other would take, and fail, one assignment after the other.
            return RunSummary("gave-up", "it gave up in an earlier slice, and rests", 0, again_after_s=early_s)
        self._not_before = None
        return self._run(Stopper(stop, budget_s=budget_s, monotonic=self._monotonic), max_reports)

    def _run(self, stop: Stopper, max_reports: int | None) -> RunSummary:
        executor = self._networked()
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
            self.training_paused = session.state.phase is Phase.TRAINING
        summary = self._summary(session, end, session.state.reports - before, stopped=stop.event.is_set())
        self._on_event(events.Finished(summary.cause, summary.detail, summary.reports))
        return summary

    def _summary(self, session: DeviceSession, end: Stop | None, reports: int, *, stopped: bool) -> RunSummary:
        if end is not None:
            again = None
            if end.cause == "gave-up":
                again = self._rng.uniform(*_AFTER_GIVING_UP_S)
                self._not_before = self._clock() + again
            return RunSummary(end.cause, end.detail, reports, end.error, again)
        action = session.next_action()
        again = action.left_s(self._clock()) if isinstance(action, Sleep) else 0.0
        cause, why = ("stopped", "stopped by the caller") if stopped else ("out-of-time", "time is up")
        return RunSummary(cause, f"{why}; the state is kept", reports, again_after_s=again)

    # --- pieces ---

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Paused) and event.step == "training":
            self.training_paused = True
        elif isinstance(event, events.TrainingProgress):
            self.training_paused = False
        self._app_event(event)

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


def _wait(delay_s: float, stop: threading.Event) -> None:
    stop.wait(delay_s)
