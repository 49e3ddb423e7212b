"""What a device keeps between two runs: its key, its session, the sealed report, the blobs it has downloaded."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from client_sdk.atomic import sync_folder, write_atomically
from client_sdk.errors import StateDirLocked, StateDirUnusable
from client_sdk.identity import DeviceIdentity
from client_sdk.session_state import SessionState

_log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 256 * 2**20
_SEEN_BLOBS = 16

Buffer = bytes | bytearray | memoryview


class DeviceStore(Protocol):
    """Durable state of one device, used by one thread at a time."""

    @property
    def identity(self) -> DeviceIdentity:
        """The device's key, made on first use and the same ever after."""
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

    def blob(self, sha256: str) -> Buffer | None:
        """A cached blob, checked against its hash; None where it is not (or no longer) there."""
        ...

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Cache a blob, at the expense of those unused for longest. A cache that cannot be written is no error."""
        ...

    def close(self) -> None:
        """Let another process use the state."""
        ...


class FileDeviceStore:
    """A state directory, for a device that is a process of its own.

    Layout: ``identity.key`` (hex, 0600), ``session.json``, ``reports/ID.frame``, ``blobs/SHA256``, ``lock``. Every
    write is atomic and synced. What is damaged is set aside beside the original (``*.damaged``) and logged.
    """

    def __init__(self, folder: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Open (or make) a state directory and lock it.

        Args:
            folder: The directory.
            cache_bytes: Size of the blob cache.

        Raises:
            StateDirLocked: Another process uses it.
            StateDirUnusable: It cannot be created, read or written.
        """
        self.folder = Path(folder)
        self._reports = self.folder / "reports"
        self._blobs = self.folder / "blobs"
        self._session = self.folder / "session.json"
        self._cache_bytes = cache_bytes
        with self._usable("open"):
            for each in (self.folder, self._reports, self._blobs):
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

    def load_session(self) -> SessionState | None:
        """The last saved state; a damaged one is set aside, and the device starts over with its old key."""
        with self._usable("read the session in"):
            if not self._session.exists():
                return None
            try:
                state = SessionState.model_validate_json(self._session.read_bytes())
                if state.device_id == self._identity.device_id:
                    return state
                reason = f"it belongs to device {state.device_id}"
            except ValueError as e:
                reason = str(e).partition("\n")[0]
            _set_aside(self._session, reason)
            return None

    def save_session(self, state: SessionState) -> None:
        """Make the state durable."""
        with self._usable("save the session in"):
            write_atomically(self._session, state.model_dump_json().encode())

    def seal(self, report_id: str, frame: Buffer) -> None:
        """Make a report durable."""
        with self._usable("save the report in"):
            write_atomically(self._report(report_id), frame)

    def sealed(self, report_id: str) -> bytes | None:
        """The bytes of a sealed report."""
        with self._usable("read the report in"):
            path = self._report(report_id)
            return path.read_bytes() if path.exists() else None

    def discard(self, report_id: str) -> None:
        """Forget a report."""
        with self._usable("remove the report from"):
            # At most one assignment is held, so whatever else lies here was orphaned by a damaged session.
            for path in (self._report(report_id), *self._reports.glob("*.frame")):
                path.unlink(missing_ok=True)
            sync_folder(self._reports)

    def blob(self, sha256: str) -> bytes | None:
        """A cached blob; a damaged one is removed, to be downloaded again."""
        path = self._blobs / sha256
        with self._usable("read the cache in"):
            if not path.exists():
                return None
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                os.utime(path)
                return data
            _log.warning("cached blob %s is damaged; it will be downloaded again", sha256)
            path.unlink(missing_ok=True)
            return None

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Cache a blob."""
        try:
            write_atomically(self._blobs / sha256, data)
            self._evict(keep=sha256)
        except OSError as e:
            _log.warning("blob %s is not cached: %s", sha256, e)

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _report(self, report_id: str) -> Path:
        return self._reports / f"{report_id}.frame"

    def _evict(self, keep: str) -> None:
        files = [(path, path.stat()) for path in self._blobs.iterdir() if path.name != keep]
        total = (self._blobs / keep).stat().st_size + sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self._cache_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size

    def _load_identity(self) -> DeviceIdentity:
        path = self.folder / "identity.key"
        if path.exists():
            try:
                return DeviceIdentity.from_private_bytes(bytes.fromhex(path.read_text("ascii")))
            except ValueError:
                # Not the content: it may be most of a secret.
                _set_aside(path, "it is not a 32-byte key in hex; the device enrols anew")
        identity = DeviceIdentity.generate()
        write_atomically(path, identity.private_bytes().hex().encode() + b"\n")
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


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    _log.warning("%s cannot be used (%s); kept as %s", path, reason, aside.name)


class BlobPool:
    """Blobs that many simulated devices share, so that a thousand of them hold one copy; safe between threads."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._blobs: OrderedDict[str, Buffer] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, sha256: str) -> Buffer | None:
        """A blob, now the most recently used one."""
        with self._lock:
            data = self._blobs.get(sha256)
            if data is not None:
                self._blobs.move_to_end(sha256)
            return data

    def put(self, sha256: str, data: Buffer) -> None:
        """Keep a blob; the least recently used ones leave when the pool is full."""
        with self._lock:
            if sha256 in self._blobs:
                return
            self._blobs[sha256] = data
            self._bytes += len(data)
            while self._bytes > self._max_bytes:
                _, gone = self._blobs.popitem(last=False)
                self._bytes -= len(gone)


class MemoryDeviceStore:
    """State in memory, for tests and simulated devices. Lost with the process, so never for a real device.

    A blob counts as cached only where *this* device has downloaded it, so that bytes on the wire are those of
    separate devices, although the pool holds one copy.
    """

    def __init__(self, identity: DeviceIdentity | None = None, pool: BlobPool | None = None) -> None:
        self._identity = identity or DeviceIdentity.generate()
        self._pool = pool or BlobPool()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._state: SessionState | None = None
        self._frames: dict[str, Buffer] = {}

    @property
    def identity(self) -> DeviceIdentity:
        """The device's key."""
        return self._identity

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

    def blob(self, sha256: str) -> Buffer | None:
        """A blob this device has seen, if the pool still has it."""
        return self._pool.get(sha256) if sha256 in self._seen else None

    def put_blob(self, sha256: str, data: Buffer) -> None:
        """Share a blob and remember it as seen."""
        self._pool.put(sha256, data)
        self._seen[sha256] = None
        self._seen.move_to_end(sha256)
        while len(self._seen) > _SEEN_BLOBS:
            self._seen.popitem(last=False)

    def close(self) -> None:
        """Nothing to release."""
