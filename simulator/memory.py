"""What simulated devices remember from report to report, kept so that a resumed run has what an undisturbed one had.

Error feedback and SCAFFOLD make a device's next report depend on its earlier ones. A session that the journal calls
over is not played again on resume, so what it left must be on disk before the journal says so. One that the journal
does not know is played again, and must then find what it found the first time. So each device keeps its two newest
memories, in files named by the reports that left them, and the journal tells which of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        accepted: Device -> assignment of its last session that the journal knows as accepted.
    """

    def __init__(self, folder: Path, accepted: Mapping[int, str]) -> None:
        self._folder = folder
        self._accepted = accepted

    def store(self, device: int, identity: DeviceIdentity, pool: BlobPool) -> MemoryDeviceStore:
        """A device's store, with what the journal says that it remembers.

        Raises:
            ResumeMismatch: That memory is missing or damaged.
        """
        return _RememberedStore(self._folder / str(device), identity, pool, self._before(device, identity))

    def _before(self, device: int, identity: DeviceIdentity) -> DeviceMemory | None:
        assignment_id = self._accepted.get(device)
        # Tasks that leave nothing behind have no folder.
        if assignment_id is None or not self._folder.exists():
            return None
        path = self._folder / str(device) / identity.report_id(assignment_id)
        try:
            return DeviceMemory.from_bytes(path.read_bytes())
        except (OSError, ValueError) as e:
            raise ResumeMismatch(
                f"what device {device} remembered is lost ({path}: {e}); the run cannot be resumed, start it anew"
            ) from e


class _RememberedStore(MemoryDeviceStore):
    """Writes down every memory that a report leaves, and keeps the one before it."""

    def __init__(self, folder: Path, identity: DeviceIdentity, pool: BlobPool, memory: DeviceMemory | None) -> None:
        super().__init__(identity, pool, memory)
        self._folder = folder
        self._newest = None if memory is None else memory.report_id

    def stage_memory(self, memory: DeviceMemory) -> None:
        """Write it down; the former ones stay."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / memory.report_id, memory.to_bytes())
        super().stage_memory(memory)

    def settle_memory(self, report_id: str, *, accepted: bool) -> None:
        """Let it count or not; what is older than the one before goes."""
        counts = accepted and self.has_staged_memory(report_id)
        super().settle_memory(report_id, accepted=accepted)
        if not self._folder.exists():
            return
        if not counts:
            (self._folder / report_id).unlink(missing_ok=True)
            return
        for path in self._folder.iterdir():
            if path.name not in {self._newest, report_id}:
                path.unlink(missing_ok=True)
        self._newest = report_id
