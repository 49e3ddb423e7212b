"""The round engine: who is invited, what is accepted, when a buffer closes. No I/O, no clock, no randomness.

One mechanism serves synchronous and asynchronous rounds, by three numbers: at most ``concurrency`` devices work at
once, new ones are invited in waves (when at least ``refill_at`` slots are free, as many as are free then), and
``buffer_size`` reports make one model update. A synchronous round is ``refill_at == concurrency`` with
``max_staleness == 0``: nobody is invited until the commit frees all slots.

Time is an argument. Where devices state how long they will take (a simulation's virtual time), a report *arrives* at
its assignment's time plus that duration, whenever its bytes really come; a buffer closes with the first
``buffer_size`` reports in the order (arrival, assignment number), and not before every assignment that would arrive
earlier has reported or been given back. On the wall clock a report arrives when it is accepted, and the same rule
closes the buffer at once. So a run's accepted sets depend on virtual time only.

The engine is a cache of the assignments table: ``restore`` rebuilds it, ``take_changes`` says what to write.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from client_sdk.protocol.errors import DuplicateReport, LeaseExpired, StaleReport
from server_ref.assignments import (
    LIVE_STATES,
    AssignmentRecord,
    AssignmentState,
    Closing,
    ReportFile,
    RoundPolicy,
    Waiting,
)


class RoundEngine:
    """State of the open buffer and of all live assignments. Memory: O(concurrency + buffer_size).

    Args:
        policy: The rounds' numbers.
        virtual_time: Whether devices state how long they will take.
        version: Model versions made so far.
        next_number: Number of the next assignment.
        opened_at: When the open buffer was opened.
        halted: Whether the task ended before its last round.
        tolerance: Staleness accepted at a model version, where it changes; never rises. None: ``max_staleness``.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        *,
        virtual_time: bool = False,
        version: int = 0,
        next_number: int = 0,
        opened_at: float = 0.0,
        halted: bool = False,
        tolerance: Callable[[int], int] | None = None,
    ) -> None:
        self.policy = policy
        self._halted = halted
        self._tolerance = tolerance or (lambda _version: policy.max_staleness)
        self.virtual_time = virtual_time
        self.version = version
        self.next_number = next_number
        self.opened_at = opened_at
        self._invitations = 0
        self._live: dict[str, AssignmentRecord] = {}
        self._by_device: dict[str, AssignmentRecord] = {}
        self._changed: dict[int, AssignmentRecord] = {}
        # Views of the live records that keep every event O(log n): whose slot is taken, whose report is there, whose
        # report has arrived by the virtual clock; and what time will change, soonest first.
        self._busy: set[int] = set()
        self._reported: dict[int, AssignmentRecord] = {}
        self._arrived: set[int] = set()
        self._deadlines: list[tuple[float, int, AssignmentRecord]] = []
        self._arrivals: list[tuple[float, int, AssignmentRecord]] = []
        # Virtual time: assignments that were given back when they would have reported, which may lie after the close of
        # a buffer that is committed only now.
        self._given_back: list[AssignmentRecord] = []
        self._latest = -math.inf

    @classmethod
    def restore(
        cls,
        policy: RoundPolicy,
        live: Iterable[AssignmentRecord],
        *,
        virtual_time: bool,
        version: int,
        next_number: int,
        opened_at: float,
        invitations: int = 0,
        halted: bool = False,
        tolerance: Callable[[int], int] | None = None,
        given_back: Iterable[AssignmentRecord] = (),
    ) -> RoundEngine:
        """Rebuild from the table's live rows, and those given back since the open buffer was opened."""
        engine = cls(
            policy,
            virtual_time=virtual_time,
            version=version,
            next_number=next_number,
            opened_at=opened_at,
            halted=halted,
            tolerance=tolerance,
        )
        for record in live:
            engine._enter(record)
        engine._invitations = invitations
        engine._given_back = list(given_back) if virtual_time else []
        return engine

    # --- questions ---------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last round is committed, or the task was halted before it."""
        return self._halted or self.version >= self.policy.rounds

    @property
    def invitations(self) -> int:
        """Devices that the current wave may still invite (state that a restart must keep)."""
        return self._invitations

    @property
    def reported(self) -> list[AssignmentRecord]:
        """Reports waiting in the open buffer, in order of arrival."""
        return sorted(self._reported.values(), key=lambda r: r.order)

    @property
    def outstanding(self) -> int:
        """Number of assignments without a report."""
        return len(self._live) - len(self._reported)

    def closing(self, now: float) -> Closing | None:
        """The buffer's contents if it can close now, else None.

        In virtual time a buffer does not close before the clock has reached its last report's arrival: until then a
        device that checks in could still report earlier.
        """
        size = self.policy.buffer_size
        if self.finished or len(self._reported) < size:
            return None
        reported = self.reported
        last = reported[size - 1]
        if self.virtual_time and last.order[0] > now:
            return None
        if any(r.state is AssignmentState.OUTSTANDING and r.order < last.order for r in self._live.values()):
            return None
        counted = sorted(reported[:size], key=lambda r: r.number)
        return Closing(self.version, tuple(counted), last.order[0])

    def close_pending(self, now: float) -> bool:
        """In virtual time: whether the open buffer closes at or before ``now``, its reports being still on their way.

        A check-in at ``now`` must wait for that commit, or it would be given a model that is already old.
        """
        if not self.virtual_time or self.finished:
            return False
        self._advance(now)
        return len(self._arrived) >= self.policy.buffer_size

    # --- events ------------------------------------------------------------------------------------------

    def check_in(
        self,
        device_id: str,
        num_samples: int,
        now: float,
        new_id: Callable[[], str],
        *,
        duration_s: float | None = None,
    ) -> AssignmentRecord | Waiting:
        """A device offers itself: the assignment it holds already, a new one, or a reason to wait.

        Args:
            device_id: Who asks.
            num_samples: Its declared sample count; the weight is this number capped.
            now: The time.
            new_id: Source of a fresh 128-bit assignment id.
            duration_s: Virtual time only: when its report will arrive, None for never.
        """
        self.expire(now)
        held = self._by_device.get(device_id)
        if held is not None:
            return held if held.state is AssignmentState.OUTSTANDING else Waiting("already-reported")
        wave = self._wave()
        if wave == 0:
            return Waiting("round-full")
        self._invitations = wave - 1
        arrival = None
        if self.virtual_time and duration_s is not None and duration_s <= self.policy.lease_s:
            arrival = now + duration_s
        record = AssignmentRecord(
            number=self.next_number,
            assignment_id=new_id(),
            device_id=device_id,
            round_id=self.version,
            model_version=self.version,
            weight=min(num_samples, self.policy.weight_cap),
            issued_at=now,
            deadline=now + self.policy.lease_s,
            arrival=arrival,
        )
        self.next_number += 1
        self._enter(record)
        self._touch(record)
        return record

    def report(self, record: AssignmentRecord, report: ReportFile, now: float) -> bool:
        """A report for an assignment: accepted (True), or the repetition of the one accepted before (False).

        Args:
            record: The assignment, live or read back from the table.
            report: The durable report.
            now: The time (unused in virtual time, where the assignment knows its arrival).

        Raises:
            DuplicateReport: The assignment has another report.
            LeaseExpired: Past the deadline, or from a device that had dropped out.
            StaleReport: Its round is over, or its model is older than ``max_staleness``.
        """
        if self.is_repetition(record, report.report_id):
            return False
        if record.state is AssignmentState.OUTSTANDING and self._live.get(record.assignment_id) is not record:
            # Read back from the table while its end is still on its way there.
            raise StaleReport(f"assignment {record.assignment_id} is over")
        self.check_fresh(record, now)
        if not self.virtual_time:
            # Later than every report before it, also where the clock was set back in between: a buffer that was full
            # closes with the same reports, whatever comes meanwhile.
            record.arrival = now if now > self._latest else math.nextafter(self._latest, math.inf)
            self._latest = record.arrival
            self._busy.discard(record.number)
        record.report = report
        record.state = AssignmentState.REPORTED
        self._reported[record.number] = record
        self._touch(record)
        return True

    def is_repetition(self, record: AssignmentRecord, report_id: str) -> bool:
        """Whether this very report was accepted before.

        Raises:
            DuplicateReport: Another report was.
        """
        if record.report is None:
            return False
        if record.report.report_id != report_id:
            raise DuplicateReport(f"assignment {record.assignment_id} already has report {record.report.report_id}")
        return True

    def check_fresh(self, record: AssignmentRecord, now: float) -> None:
        """Refuse what is too late, before anything else looks at the report.

        Raises:
            LeaseExpired: Past the deadline.
            StaleReport: Its round is over, or its model is too old.
        """
        if record.state is AssignmentState.EXPIRED:
            raise LeaseExpired(f"the lease of assignment {record.assignment_id} has expired")
        if record.state is not AssignmentState.OUTSTANDING:
            raise StaleReport(f"assignment {record.assignment_id} is {record.state.value}")
        staleness = self.version - record.model_version
        tolerance = self._tolerance(self.version)
        if staleness > tolerance:
            raise StaleReport(
                f"assignment {record.assignment_id} is {staleness} versions old; at most {tolerance} are accepted"
            )
        late = record.arrival is None if self.virtual_time else now > record.deadline
        if late:
            raise LeaseExpired(f"the report for assignment {record.assignment_id} came after its deadline")

    def abandon(self, assignment_id: str) -> None:
        """A device gives an assignment back; unknown or reported ones are left as they are."""
        record = self._live.get(assignment_id)
        if record is not None and record.state is AssignmentState.OUTSTANDING:
            if self.virtual_time:
                self._given_back.append(record)
            self._retire(record, AssignmentState.ABANDONED)

    def expire(self, now: float) -> None:
        """End the leases whose deadline has passed. In virtual time only drop-outs miss it."""
        self._advance(now)
        while self._deadlines and self._deadlines[0][0] < now:
            record = heapq.heappop(self._deadlines)[2]
            missed = record.arrival is None or not self.virtual_time
            if missed and record.state is AssignmentState.OUTSTANDING:
                self._retire(record, AssignmentState.EXPIRED)

    def commit(self, closing: Closing, *, halt: bool = False) -> int:
        """Apply a closed buffer: its reports are counted, the version rises, what became too old is superseded.

        Args:
            closing: The buffer.
            halt: End the task with this round.

        Returns:
            How many assignments were superseded.
        """
        for record in closing.counted:
            record.counted_in = closing.round_id
            self._retire(record, AssignmentState.COUNTED)
        self.version += 1
        self._halted = self._halted or halt
        superseded = 0
        tolerance = self._tolerance(self.version)
        for record in list(self._live.values()):
            too_old = self.version - record.model_version > tolerance
            if too_old or self.finished:
                superseded += 1
                self._retire(record, AssignmentState.SUPERSEDED)
        # Who gave back only after the close was at work then, unless the commit made the assignment worthless.
        self._given_back = [
            r
            for r in self._given_back
            if r.order[0] > closing.closed_at and self.version - r.model_version <= tolerance
        ]
        if not self._live and not self._given_back:
            # Nobody was at work then: what the last wave did not invite is part of the next one.
            self._invitations = 0
        self.opened_at = closing.closed_at
        return superseded

    # --- bookkeeping -------------------------------------------------------------------------------------

    def inviting(self, now: float) -> bool:
        """Whether a device without an assignment would be given one now."""
        self.expire(now)
        return self._wave() > 0

    def holds(self, device_id: str) -> bool:
        """Whether the device has a live assignment."""
        return device_id in self._by_device

    def live(self, assignment_id: str) -> AssignmentRecord | None:
        """The live assignment of this id, if any."""
        return self._live.get(assignment_id)

    def take_changes(self) -> list[AssignmentRecord]:
        """Records changed since the last call, in order of their numbers."""
        changed = [self._changed[n] for n in sorted(self._changed)]
        self._changed.clear()
        return changed

    def _wave(self) -> int:
        """Invitations left in the wave that is on, or in the one that can begin.

        A wave invites as many devices as there were free slots when it began: a slot that falls free meanwhile waits
        for the next wave, or a synchronous round would invite more than ``concurrency`` devices.
        """
        free = self.policy.concurrency - len(self._busy)
        if self._invitations == 0 and free >= self.policy.refill_at:
            return free
        return self._invitations if free > 0 else 0

    def _enter(self, record: AssignmentRecord) -> None:
        self._live[record.assignment_id] = self._by_device[record.device_id] = record
        heapq.heappush(self._deadlines, (record.deadline, record.number, record))
        if record.state is AssignmentState.REPORTED:
            self._reported[record.number] = record
            if record.arrival is not None:
                self._latest = max(self._latest, record.arrival)
        if self.virtual_time:
            # A slot is taken until the report arrives; the server cannot know earlier that none will.
            self._busy.add(record.number)
            busy_until = record.deadline if record.arrival is None else record.arrival
            heapq.heappush(self._arrivals, (busy_until, record.number, record))
        elif record.state is AssignmentState.OUTSTANDING:
            self._busy.add(record.number)

    def _advance(self, now: float) -> None:
        """Virtual time has reached ``now``, which never falls: slots become free, reports arrive."""
        while self._arrivals and self._arrivals[0][0] <= now:
            record = heapq.heappop(self._arrivals)[2]
            self._busy.discard(record.number)
            if record.arrival is not None and record.state in LIVE_STATES:
                self._arrived.add(record.number)

    def _touch(self, record: AssignmentRecord) -> None:
        self._changed[record.number] = record

    def _retire(self, record: AssignmentRecord, state: AssignmentState) -> None:
        record.state = state
        self._live.pop(record.assignment_id, None)
        if self._by_device.get(record.device_id) is record:
            del self._by_device[record.device_id]
        self._busy.discard(record.number)
        self._reported.pop(record.number, None)
        self._arrived.discard(record.number)
        self._touch(record)
