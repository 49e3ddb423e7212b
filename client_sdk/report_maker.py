"""Makes the report of an assignment on this device: within its memory, under its conditions, from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from client_sdk.fulfilment import fulfil
from client_sdk.memory import DeviceMemory
from client_sdk.memory_budget import MemoryBudget
from client_sdk.planner import LocalWork, plan_work
from client_sdk.programs import ReadBlob
from client_sdk.protocol.errors import ManifestError
from client_sdk.protocol.messages import Assignment
from client_sdk.protocol.program import Manifest
from client_sdk.reports import Report, keeps_memory
from client_sdk.stopping import Stopper
from client_sdk.surroundings import Surroundings
from client_sdk.throttle import Governor
from client_sdk.training_loop import TrainingLoop
from client_sdk.trust import check_willing


class ReportMaker:
    """Trains for assignments, one after the other."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    def make(
        self,
        assignment: Assignment,
        report_id: str,
        read: ReadBlob,
        stop: Stopper,
        check: Callable[[], None],
    ) -> tuple[Report, DeviceMemory | None]:
        """Train and build the report; see ``fulfil`` for what is raised.

        Args:
            assignment: What to do.
            report_id: Id of the report.
            read: Blob hash -> bytes.
            stop: Ends training between two calls of the program.
            check: Raises where the report could not count any more (``LeaseExpired``); asked while training, and before
                the report is made: nothing is charged or counted for a dead one.

        Raises:
            PrivacyRefusal: The device will not send what the assignment asks for.
            MemoryBudgetExceeded: It does not fit into the device's memory; said before the program is opened.
        """
        around = self._around
        private = around.local_privacy
        check_willing(assignment, around.trusted, around.store)
        if private is not None:
            private.check(assignment)
        self._check_memory(assignment, read)
        program = around.programs.open(assignment, read)
        report, memory = fulfil(
            assignment,
            report_id,
            device_id=around.store.identity.device_id,
            program=program,
            work=self._plan(program.manifest, assignment),
            read=read,
            data=around.data,
            data_sha256=around.data_sha256,
            former=around.store.memory(assignment.task_id) if keeps_memory(assignment) else None,
            loop=self._loop(stop, check),
            local_privacy=private,
        )
        if private is not None:
            private.name(report.frame)
        return report, memory

    def _check_memory(self, assignment: Assignment, read: ReadBlob) -> None:
        """Refuse what cannot fit before anything of it is loaded."""
        try:
            manifest = Manifest.from_json(bytes(read(assignment.manifest_sha256)))
        except ManifestError:
            return  # an app with a program of its own never reads it; who does will say what is wrong with it
        self._plan(manifest, assignment)

    def _plan(self, manifest: Manifest, assignment: Assignment) -> LocalWork:
        around = self._around
        return plan_work(
            manifest,
            around.profile,
            assignment.plan,
            num_samples=len(around.data[0]),
            memory_fraction=around.memory_fraction,
            # With a limit on the whole process its examples count as well, which are there already.
            baseline_bytes=around.baseline_bytes + sum(array.nbytes for array in around.data),
            budget_bytes=around.memory_limit_bytes,
            compression=assignment.compression,
            secure=assignment.secure,
        )

    def _loop(self, stop: Stopper, check: Callable[[], None]) -> TrainingLoop:
        around = self._around
        governor = None
        if around.power is not None:
            governor = Governor(
                around.power,
                monotonic=around.monotonic,
                # A rest ends with the slice: the time until the next one is rest enough.
                sleep=lambda seconds: around.wait(min(seconds, stop.remaining_s()), stop.event),
            )
        return TrainingLoop(
            checkpoints=around.checkpoints,
            governor=governor,
            budget=None if around.memory_limit_bytes is None else MemoryBudget(around.memory_limit_bytes),
            should_stop=lambda moved: stop.event.is_set() or (moved and stop.is_set()),
            conditions=around.conditions,
            check=check,
            on_event=around.on_event,
            monotonic=around.monotonic,
        )
