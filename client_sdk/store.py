"""What a device keeps between two runs: its key, its session, the sealed report, the blobs it has downloaded."""

from __future__ import annotations

import fcntl
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from client_sdk.atomic import is_leftover, set_aside, write_atomically
from client_sdk.blobs import DEFAULT_CACHE_BYTES, ArrivingBlob, BlobFiles, BlobPool, Buffer
from client_sdk.checkpoint import CheckpointManager
from client_sdk.errors import StateDirLocked, StateDirUnusable
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import DeviceMemory, MemoryFiles
from client_sdk.participations import ParticipationFile, Participations
from client_sdk.session_state import SessionState

_SEEN_BLOBS = 16
_REPORT = ".frame"
_KEY = re.compile("[0-9a-f]{64}")


class DeviceStore(Protocol):
    """Durable state of one device, used by one thread at a time."""

    @property
    def identity(self) -> DeviceIdentity:
        """The device's key, made on first use and the same ever after."""
        ...

    @property
    def checkpoints(self) -> CheckpointManager | None:
        """Where training under way is kept; None where it dies with the process."""
        ...

    def server_key(self) -> str | None:
        """Public key of the server that this device trusts, hex; None before the first reply."""
        ...

    def pin_server_key(self, key: str) -> None:
        """Make the server's key durable before this returns.

        Raises:
            StateDirUnusable: It could not be written.
        """
        ...

    def load_session(self) -> SessionState | None:
        """The last saved state; None where there is none, or none that can be read."""
        ...

    def save_session(self, state: SessionState) -> None:
        """Make the state durable before this returns.

        Raises:
            StateDirUnusable: It could not be written.
        """
        ...

    def seal(self, report_id: str, frame: Buffer) -> None:
        """Make a report's bytes durable before this returns.

        Raises:
            StateDirUnusable: They could not be written.
        """
        ...

    def sealed(self, report_id: str) -> Buffer | None:
        """The bytes of a sealed report."""
        ...

    def discard(self, report_id: str) -> None:
        """Forget a report; harmless where there is none."""
        ...

    def memory(self, task_id: str) -> DeviceMemory | None:
        """What the device remembers of this task; None where it is nothing, or cannot be read."""
        ...

    def stage_memory(self, memory: DeviceMemory) -> None:
        """Make a report's memory durable before this returns; ``memory`` still answers the former one.

        Raises:
            StateDirUnusable: It could not be written.
        """
        ...

    def has_staged_memory(self, report_id: str) -> bool:
        """Whether the memory of this report is staged, and whole."""
        ...

    def settle_memory(self, report_id: str, *, accepted: bool) -> None:
        """Let the memory of an accepted report replace the former one, or throw it away. May be repeated.

        An accepted report whose memory is lost leaves none: the former one is spent.
        """
        ...

    def participations(self, task_id: str, *, besides: str) -> int:
        """For how many of a task's assignments a secure report was sealed, the assignment ``besides`` not counted.

        Raises:
            StateDirUnusable: They cannot be read, or are damaged.
        """
        ...

    def count_participation(self, task_id: str, assignment_id: str) -> None:
        """Count an assignment durably, before its report is sealed. Counting it again changes nothing.

        Raises:
            StateDirUnusable: It could not be written.
        """
        ...

    def blob(self, sha256: str) -> Buffer | None:
        """A cached blob, checked against its hash; None where it is not (or no longer) there."""
        ...

    def arriving(self, sha256: str) -> bytearray:
        """What has arrived of a blob so far, for ``Transport.fetch`` to go on with; one blob at a time.

        Raises:
            StateDirUnusable: The state cannot be read.
        """
        ...

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Cache a blob, at the expense of those unused for longest. A cache that cannot be written is no error."""
        ...

    def close(self) -> None:
        """Let another process use the state."""
        ...


class FileDeviceStore:
    """A state directory, for a device that is a process of its own.

    Layout: ``identity.key`` (hex, 0600), ``server.key`` (hex), ``session.json``, ``participations.json``,
    ``reports/ID.frame``, ``memory/current`` and ``memory/ID.staged``, ``checkpoints/GENERATION.ckpt``,
    ``blobs/SHA256``, ``arriving/SHA256.PIECE``, ``lock``. Every write is atomic and synced. What is damaged is set
    aside beside the original (``*.damaged``) and logged; but damaged participations and a damaged server key stay
    errors, since a device must not begin to count, or to trust anybody, again.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        checkpoint_key: bytes | None = None,
        files: FileLayer = OS_FILES,
    ) -> None:
        """Open (or make) a state directory and lock it.

        Args:
            folder: The directory.
            cache_bytes: Size of the blob cache.
            checkpoint_key: 32 secret bytes with which checkpoints are encrypted; None leaves them as they are.
            files: Where the state is written; the lock is always the operating system's.

        Raises:
            StateDirLocked: Another process uses it.
            StateDirUnusable: It cannot be created, read or written.
        """
        self.folder = Path(folder)
        self._files = files
        self._reports = self.folder / "reports"
        self._session = self.folder / "session.json"
        self._server_key: str | None = None
        memory, blobs = self.folder / "memory", self.folder / "blobs"
        self._memory = MemoryFiles(memory, files)
        self._participations = ParticipationFile(self.folder / "participations.json", files)
        self._blobs = BlobFiles(blobs, cache_bytes, files)
        self._arriving: ArrivingBlob | None = None
        self._checkpoints = CheckpointManager(self.folder / "checkpoints", key=checkpoint_key, files=files)
        with self._usable("open"):
            for each in (self.folder, self._reports, memory, blobs, self.folder / "arriving"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(self.folder / "lock")
        try:
            with self._usable("read the key in"):
                self._identity = self._load_identity()
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> DeviceIdentity:
        """The device's key."""
        return self._identity

    @property
    def checkpoints(self) -> CheckpointManager:
        """Where training under way is kept."""
        return self._checkpoints

    def server_key(self) -> str | None:
        """The server's key. A damaged one is an error: a device must not begin to trust anybody again.

        Raises:
            StateDirUnusable: It cannot be read, or is damaged.
        """
        if self._server_key is None:
            path = self.folder / "server.key"
            with self._usable("read the server's key in"):
                if self._files.status(path) is None:
                    return None
                key = self._files.read(path).strip().decode("ascii", "replace")
            if _KEY.fullmatch(key) is None:
                raise StateDirUnusable(f"{path} is damaged; remove it to trust the server that answers next")
            self._server_key = key
        return self._server_key

    def pin_server_key(self, key: str) -> None:
        """Make the server's key durable."""
        with self._usable("save the server's key in"):
            write_atomically(self.folder / "server.key", key.encode("ascii") + b"\n", files=self._files)
        self._server_key = key

    def load_session(self) -> SessionState | None:
        """The last saved state; a damaged one is set aside, and the device starts over with its old key."""
        with self._usable("read the session in"):
            if self._files.status(self._session) is None:
                return None
            try:
                state = SessionState.model_validate_json(self._files.read(self._session))
                if state.device_id == self._identity.device_id:
                    return state
                reason = f"it belongs to device {state.device_id}"
            except ValueError as e:
                reason = str(e).partition("\n")[0]
            set_aside(self._session, reason, files=self._files)
            return None

    def save_session(self, state: SessionState) -> None:
        """Make the state durable."""
        with self._usable("save the session in"):
            write_atomically(self._session, state.model_dump_json().encode(), files=self._files)

    def seal(self, report_id: str, frame: Buffer) -> None:
        """Make a report durable."""
        with self._usable("save the report in"):
            write_atomically(self._report(report_id), frame, files=self._files)

    def sealed(self, report_id: str) -> bytes | None:
        """The bytes of a sealed report."""
        with self._usable("read the report in"):
            path = self._report(report_id)
            return None if self._files.status(path) is None else self._files.read(path)

    def discard(self, report_id: str) -> None:  # noqa: ARG002 - all go, see below
        """Forget a report."""
        with self._usable("remove the report from"):
            # At most one assignment is held: whatever else lies here was orphaned by a damaged session, or by a kill.
            for name in self._files.names(self._reports):
                if name.endswith(_REPORT) or is_leftover(name):
                    self._files.unlink(self._reports / name)
            self._files.sync_folder(self._reports)

    def memory(self, task_id: str) -> DeviceMemory | None:
        """What the device remembers of this task; a damaged memory is set aside, and the device goes on without."""
        with self._usable("read the memory in"):
            return self._memory.current(task_id)

    def stage_memory(self, memory: DeviceMemory) -> None:
        """Make a report's memory durable."""
        with self._usable("save the memory in"):
            self._memory.stage(memory)

    def has_staged_memory(self, report_id: str) -> bool:
        """Whether a report's memory is staged."""
        with self._usable("read the memory in"):
            return self._memory.is_staged(report_id)

    def settle_memory(self, report_id: str, *, accepted: bool) -> None:
        """Let a report's memory count, or throw it away."""
        with self._usable("settle the memory in"):
            self._memory.settle(report_id, accepted=accepted)

    def participations(self, task_id: str, *, besides: str) -> int:
        """How often the device took part."""
        with self._usable("read the participations in"):
            return self._participations.load().without(task_id, besides)

    def count_participation(self, task_id: str, assignment_id: str) -> None:
        """Count an assignment durably."""
        with self._usable("save the participations in"):
            self._participations.save(self._participations.load().counting(task_id, assignment_id))

    def blob(self, sha256: str) -> bytes | None:
        """A cached blob; a damaged one is removed, to be downloaded again."""
        with self._usable("read the cache in"):
            return self._blobs.get(sha256)

    def arriving(self, sha256: str) -> bytearray:
        """What has arrived of a blob so far, in this process or an earlier one."""
        with self._usable("read the download in"):
            self._arriving = ArrivingBlob(self.folder / "arriving", sha256, self._files)
            return self._arriving

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Cache a blob."""
        self._blobs.put(sha256, data)
        if data is self._arriving:
            self._arriving.forget()
            self._arriving = None

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _report(self, report_id: str) -> Path:
        return self._reports / f"{report_id}{_REPORT}"

    def _load_identity(self) -> DeviceIdentity:
        path = self.folder / "identity.key"
        if self._files.status(path) is not None:
            try:
                return DeviceIdentity.from_private_bytes(bytes.fromhex(self._files.read(path).decode("ascii")))
            except ValueError:
                # Not the content: it may be most of a secret.
                set_aside(path, "it is not a 32-byte key in hex; the device enrols anew", files=self._files)
        identity = DeviceIdentity.generate()
        write_atomically(path, identity.private_bytes().hex().encode() + b"\n", files=self._files)
        return identity

    @contextmanager
    def _usable(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise StateDirUnusable(
                f"cannot {verb} {self.folder}: {e.strerror or e}; free space there or choose another state directory"
            ) from e


def _lock(path: Path) -> IO[str]:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise StateDirLocked(
            f"{path.parent} is used by another process{f' ({holder})' if holder else ''}; "
            "give each device a state directory of its own"
        ) from e
    file.truncate(0)
    file.write(f"pid {os.getpid()}")
    file.flush()
    return file


class MemoryDeviceStore:
    """State in memory, for tests and simulated devices. Lost with the process, so never for a real device.

    A blob counts as cached only where *this* device has downloaded it, so that bytes on the wire are those of
    separate devices, although the pool holds one copy.
    """

    def __init__(
        self,
        identity: DeviceIdentity | None = None,
        pool: BlobPool | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        self._identity = identity or DeviceIdentity.generate()
        self._pool = pool or BlobPool()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._server_key: str | None = None
        self._state: SessionState | None = None
        self._frames: dict[str, Buffer] = {}
        self._memory = memory
        self._staged: DeviceMemory | None = None
        self._participations = Participations()

    @property
    def identity(self) -> DeviceIdentity:
        """The device's key."""
        return self._identity

    @property
    def checkpoints(self) -> None:
        """None: what is kept in memory dies with the training."""
        return

    def server_key(self) -> str | None:
        """The server's key."""
        return self._server_key

    def pin_server_key(self, key: str) -> None:
        """Keep the server's key."""
        self._server_key = key

    def load_session(self) -> SessionState | None:
        """The last saved state."""
        return self._state

    def save_session(self, state: SessionState) -> None:
        """Keep the state."""
        self._state = state

    def seal(self, report_id: str, frame: Buffer) -> None:
        """Keep a report."""
        self._frames[report_id] = frame

    def sealed(self, report_id: str) -> Buffer | None:
        """The bytes of a sealed report."""
        return self._frames.get(report_id)

    def discard(self, report_id: str) -> None:
        """Forget a report."""
        self._frames.pop(report_id, None)

    def memory(self, task_id: str) -> DeviceMemory | None:
        """What the device remembers of this task."""
        return self._memory if self._memory is not None and self._memory.task_id == task_id else None

    def stage_memory(self, memory: DeviceMemory) -> None:
        """Keep a report's memory."""
        self._staged = memory

    def has_staged_memory(self, report_id: str) -> bool:
        """Whether a report's memory is staged."""
        return self._staged is not None and self._staged.report_id == report_id

    def settle_memory(self, report_id: str, *, accepted: bool) -> None:
        """Let a report's memory count, or throw it away."""
        if accepted and self.has_staged_memory(report_id):
            self._memory = self._staged
        elif accepted and self._memory is not None and self._memory.report_id != report_id:
            self._memory = None
        self._staged = None

    def participations(self, task_id: str, *, besides: str) -> int:
        """How often the device took part."""
        return self._participations.without(task_id, besides)

    def count_participation(self, task_id: str, assignment_id: str) -> None:
        """Count an assignment."""
        self._participations = self._participations.counting(task_id, assignment_id)

    def blob(self, sha256: str) -> Buffer | None:
        """A blob this device has seen, if the pool still has it."""
        return self._pool.get(sha256) if sha256 in self._seen else None

    def arriving(self, sha256: str) -> bytearray:  # noqa: ARG002 - nothing is left of an earlier process
        """Nothing yet."""
        return bytearray()

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Share a blob and remember it as seen."""
        self._pool.put(sha256, data)
        self._seen[sha256] = None
        self._seen.move_to_end(sha256)
        while len(self._seen) > _SEEN_BLOBS:
            self._seen.popitem(last=False)

    def close(self) -> None:
        """Nothing to release."""
