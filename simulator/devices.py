"""The fleet's devices as SDK clients: real sessions, real HTTP, real programs; only their clock is simulated."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from client_sdk.blobs import BlobPool
from client_sdk.checkpoint import CheckpointManager
from client_sdk.client import MobileClient
from client_sdk.errors import Interrupted
from client_sdk.events import Event, TrainingProgress
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import PERSONAL
from client_sdk.programs import DownloadedPrograms, NamesProgram, ReadBlob
from client_sdk.protocol.errors import (
    DuplicateReport,
    InvalidUpdate,
    MalformedFrame,
    MemoryBudgetExceeded,
    NotEnoughExamples,
    OversizedBody,
    ProgramExecutionError,
    ReportMismatch,
    StaleReport,
    TrainingDiverged,
    UnknownAssignment,
)
from client_sdk.protocol.messages import AbandonRequest, Assignment, VirtualTiming
from client_sdk.protocol.program import Float32Array, Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.session_state import RetryPolicy
from client_sdk.store import MemoryDeviceStore
from client_sdk.transport import Transport
from simulator.adversaries import AttackPlan
from simulator.adversaries.sdk import SdkAttackers
from simulator.adversaries.transport import AdversarialTransport
from simulator.datasets import Split
from simulator.journal import Reply
from simulator.memory import FleetMemory
from simulator.population import Population
from simulator.sessions import Outcome, SessionEnd, failure_reason

# The server had no use for the assignment any more; nothing is wrong with the report.
_OVER: Final = (StaleReport, DuplicateReport, UnknownAssignment)
# What one device sent, or could not make, is its own affair: the others go on. Everything else ends a run.
_OWN_FAULT: Final = (
    InvalidUpdate,
    ReportMismatch,
    MalformedFrame,
    OversizedBody,
    TrainingDiverged,
    NotEnoughExamples,
    ProgramExecutionError,
    MemoryBudgetExceeded,
)


class ThreadPrograms:
    """A program provider for many devices: what the server names is loaded once per thread that trains."""

    def __init__(self, folder: Path, runtime: str) -> None:
        self._folder = folder
        self._runtime = runtime
        self._lock = threading.Lock()
        self._local = threading.local()
        self._all: list[DownloadedPrograms] = []

    def open(self, assignment: NamesProgram, read: ReadBlob) -> Program:
        """The assignment's program, for the calling thread."""
        programs: DownloadedPrograms | None = getattr(self._local, "programs", None)
        if programs is None:
            with self._lock:
                programs = DownloadedPrograms(self._folder / f"worker-{len(self._all)}", self._runtime)
                self._all.append(programs)
            self._local.programs = programs
        return programs.open(assignment, read)

    def close(self) -> None:
        """Release all programs; no thread may be using one."""
        for programs in self._all:
            programs.close()


class SdkDevices:
    """All devices of a fleet against one server. Implements ``fleet.DeviceLink``.

    Memory: one copy of the training data, one of each model and program; a few kilobytes a device besides.
    """

    def __init__(
        self,
        connect: Callable[[DeviceIdentity], Transport],
        population: Population,
        data: Split,
        parts: Sequence[npt.NDArray[np.int64]],
        *,
        runtime: str,
        policy: RetryPolicy | None = None,
        attack: AttackPlan | None = None,
        plans: Sequence[TrainingPlan] | None = None,
        virtual: bool = False,
        memory: FleetMemory | None = None,
    ) -> None:
        """Put the devices together; nothing is sent yet.

        Args:
            connect: Gives each device its way to the server.
            population: Who the devices are.
            data: All training examples, honest.
            parts: Rows of each device.
            runtime: ExecuTorch adapter.
            policy: How devices wait after a failure; by default as real ones do.
            attack: What some devices do instead of what they are told.
            plans: What each device trains, for attackers that rehearse it; None: all the same.
            memory: Where what they remember outlives this process; None: nowhere.
            virtual: Time is simulated: a device that fails says so when ``give_back`` tells it to, not at once.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="pocketfed-simulate-")
        self._programs = ThreadPrograms(Path(self._scratch.name), runtime)
        pool = BlobPool()
        self._memory = memory
        self._attackers: dict[int, AdversarialTransport] = {}
        attackers = None
        if attack is not None:
            attackers = SdkAttackers(
                attack, programs=self._programs, blob=pool.get, data=data, parts=parts, plans=plans
            )
            data = attack.poisoned(data, parts)
        self._stores: list[MemoryDeviceStore] = []
        self._transports: list[Transport] = []
        self._clients: list[MobileClient] = []
        self._interruptions = [_Interruption() for _ in parts]
        for device, rows in enumerate(parts):
            identity = population.identity(device)
            transport = connect(identity)
            if attackers is not None and attackers.plan.attacks(device):
                transport = self._attackers[device] = attackers.transport(device, transport)
            store = MemoryDeviceStore(identity, pool) if memory is None else memory.store(device, identity, pool)
            self._stores.append(store)
            self._transports.append(transport)
            self._clients.append(
                MobileClient(
                    None,
                    population.profile(device),
                    data=(data.x[rows], data.y[rows]),
                    transport=_Unhurried(transport) if virtual else transport,
                    store=store,
                    programs=self._programs,
                    checkpoint_manager=self._checkpoints(device) if population.profiles.traced else None,
                    policy=policy,
                    clock=_wrong_clock(*population.clock_error(device)),
                    on_event=self._interruptions[device],
                )
            )

    def _checkpoints(self, device: int) -> CheckpointManager:
        """Of one that pauses: in this process only, for a run that is taken up again trains anew what was under way."""
        return CheckpointManager(Path(self._scratch.name) / f"device-{device}", keep=1)

    def check_in(self, device: int, timing: VirtualTiming | None) -> Reply:
        """Offer a device for work; it enrols itself before its first time."""
        return self._clients[device].check_in(timing)

    def perform(self, device: int, assignment: Assignment, pauses: Sequence[float] = ()) -> SessionEnd:
        """Download, train, upload; the training is left and taken up again where its pauses are."""
        counters = self._transports[device].counters
        up, down = counters.bytes_up, counters.bytes_down
        if device in self._attackers:
            # The assignment may come from the journal of an earlier process.
            self._attackers[device].expect(assignment)
        outcome, reason = Outcome.ACCEPTED, None
        try:
            self._train(device, assignment, pauses)
        except _OVER as e:
            outcome, reason = Outcome.REFUSED, e.slug
        except _OWN_FAULT as e:
            outcome, reason = Outcome.FAILED, failure_reason(e)
        return SessionEnd(outcome, counters.bytes_up - up, counters.bytes_down - down, reason)

    def _train(self, device: int, assignment: Assignment, pauses: Sequence[float]) -> None:
        client, interruption = self._clients[device], self._interruptions[device]
        for share in pauses:
            try:
                client.perform(assignment, interruption.armed(share))
            except Interrupted:
                continue
            else:
                return  # its last step began before the pause was seen
            finally:
                interruption.disarm()
        client.perform(assignment)

    def give_back(self, device: int, assignment_id: str) -> None:
        """Tell the server that no report will come; saying it again is harmless."""
        self._transports[device].abandon(assignment_id, AbandonRequest(reason="training-failed"))

    def take_back(self, device: int, assignment_id: str) -> None:
        """What the device remembers of a report that came too late is forgotten again."""
        if self._memory is not None:
            self._memory.take_back(device, assignment_id)

    def personal_layers(self, task_id: str) -> dict[int, Float32Array]:
        """Device -> its personal layers, float32[p]; those of devices that have none yet are the model's."""
        memories = {device: store.memory(task_id) for device, store in enumerate(self._stores)}
        return {d: m.vectors[PERSONAL] for d, m in memories.items() if m is not None and PERSONAL in m.vectors}

    def close(self) -> None:
        """Release programs and temporary files."""
        self._programs.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()


class _Interruption:
    """Stops a device's training once a share of it is done; told about the device's events."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._share: float | None = None

    def armed(self, share: float) -> threading.Event:
        """What is set when this share is done."""
        self._stop, self._share = threading.Event(), share
        return self._stop

    def disarm(self) -> None:
        """Let it train to its end."""
        self._share = None

    def __call__(self, event: Event) -> None:
        share = self._share
        if share is not None and isinstance(event, TrainingProgress) and event.examples >= share * event.total_examples:
            self._stop.set()


def _wrong_clock(offset_s: float, skew: float) -> Callable[[], float]:
    """This machine's clock as a device has it."""
    return lambda: time.time() * (1 + skew) + offset_s


class _Unhurried:
    """A device's transport that gives no assignment back.

    In virtual time a device that fails has done so when its report would have arrived. Sooner, the word would free its
    slot for whoever checks in next in *real* time, and a run would not repeat.
    """

    def __init__(self, inner: Transport) -> None:
        self.counters = inner.counters
        self.enrol = inner.enrol
        self.check_in = inner.check_in
        self.latest_model = inner.latest_model
        self.fetch = inner.fetch
        self.upload = inner.upload
        self.close = inner.close

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        """Nothing yet."""
