"""What simulated devices remember from report to report, kept so that a resumed run has what an undisturbed one had.

Error feedback and SCAFFOLD make a device's next report depend on its earlier ones. A session that the journal calls
over is not played again on resume, so what it left must be on disk before the journal says so. One that the journal
does not know is played again, and must then find what it found the first time. So each device keeps its two newest
memories, in files named by the reports that left them, and the journal tells which of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from client_sdk.atomic import write_atomically
from client_sdk.blobs import BlobPool
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import DeviceMemory
from client_sdk.store import MemoryDeviceStore
from simulator.errors import ResumeMismatch


class FleetMemory:
    """The memories of a run's devices in one folder.

    Args:
        folder: Where they are; made with the first memory.
        accepted: Device -> assignments of its sessions that the journal knows as accepted, in order.
    """

    def __init__(self, folder: Path, accepted: Mapping[int, Sequence[str]]) -> None:
        self._folder = folder
        self._accepted = accepted
        self._stores: dict[int, _RememberedStore] = {}

    def store(self, device: int, identity: DeviceIdentity, pool: BlobPool) -> MemoryDeviceStore:
        """A device's store, with what the journal says that it remembers.

        Raises:
            ResumeMismatch: That memory is missing or damaged.
        """
        folder = self._folder / str(device)
        accepted = self._accepted.get(device, ())
        newest = former = None
        # Tasks that leave nothing behind have no folder.
        if accepted and self._folder.exists():
            newest = self._read(device, folder / identity.report_id(accepted[-1]))
            earlier = (folder / identity.report_id(assignment_id) for assignment_id in reversed(accepted[:-1]))
            path = next((path for path in earlier if path.exists()), None)
            former = None if path is None else self._read(device, path)
        self._stores[device] = store = _RememberedStore(folder, identity, pool, newest, former)
        return store

    def take_back(self, device: int, assignment_id: str) -> None:
        """The device's newest memory does not count after all, if it is of this assignment's report."""
        self._stores[device].take_back(assignment_id)

    @staticmethod
    def _read(device: int, path: Path) -> DeviceMemory:
        try:
            return DeviceMemory.from_bytes(path.read_bytes())
        except (OSError, ValueError) as e:
            raise ResumeMismatch(
                f"what device {device} remembered is lost ({path}: {e}); the run cannot be resumed, start it anew"
            ) from e


class _RememberedStore(MemoryDeviceStore):
    """Writes down every memory that a report leaves, and keeps the one before it."""

    def __init__(
        self,
        folder: Path,
        identity: DeviceIdentity,
        pool: BlobPool,
        memory: DeviceMemory | None,
        former: DeviceMemory | None,
    ) -> None:
        super().__init__(identity, pool, memory)
        self._folder = folder
        self._former = former

    def stage_memory(self, memory: DeviceMemory) -> None:
        """Write it down; the former ones stay."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / memory.report_id, memory.to_bytes())
        super().stage_memory(memory)

    def settle_memory(self, report_id: str, *, accepted: bool) -> None:
        """Let it count or not; what is older than the one before goes."""
        before, counts = self._memory, accepted and self.has_staged_memory(report_id)
        super().settle_memory(report_id, accepted=accepted)
        if counts:
            self._former = before
            kept = {report_id} if before is None else {report_id, before.report_id}
            for path in self._folder.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)
        elif self._folder.exists():
            (self._folder / report_id).unlink(missing_ok=True)

    def take_back(self, assignment_id: str) -> None:
        """Go back to the memory before; its file stays until the next one counts, for a resume that comes by here."""
        if self._memory is not None and self._memory.report_id == self.identity.report_id(assignment_id):
            self._memory, self._former = self._former, None
