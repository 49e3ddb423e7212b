"""File layers that fail: a process that dies at any byte, a disk that is full or broken, a power cut.

``FaultyFiles`` goes in front of another layer, the real files or a ``DiskModel``, which knows what is durable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client_sdk.files import FileLayer, FileStatus


class Killed(BaseException):
    """The process ends here."""


def disk_full() -> OSError:
    """What a write says when there is no space."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def input_output_error() -> OSError:
    """What a broken disk says."""
    return OSError(errno.EIO, os.strerror(errno.EIO))


class FaultyFiles:
    """Another layer, until its n-th step; a written byte is a step, and so is every other call that changes something.

    A step that fails has done nothing: to die after a call is to die before the next one.
    """

    def __init__(
        self,
        files: FileLayer,
        survives: int = -1,
        *,
        chunk: int = 1,
        fault: Callable[[], BaseException] = Killed,
        recovers: bool = False,
        flushes: bool = True,
    ) -> None:
        """Let so many steps succeed.

        Args:
            files: What does the steps.
            survives: Steps before the fault; negative for none.
            chunk: Bytes that one step writes.
            fault: What the step raises that fails, and each one after it.
            recovers: Only that one step fails.
            flushes: False where nothing but kills is in question, which lose nothing that was written: a thousand
                real flushes take their time.
        """
        self._files = files
        self.left = survives
        self.chunk = chunk
        self._fault = fault
        self._recovers = recovers
        self._flushes = flushes
        self.steps = 0
        self.failed = False

    def _step(self) -> None:
        if self.left == 0:
            self.failed = True
            self.left = -1 if self._recovers else 0
            raise self._fault()
        self.left -= 1
        self.steps += 1

    def create(self, path: Path, mode: int) -> int:
        self._step()
        return self._files.create(path, mode)

    def write(self, handle: int, data: memoryview) -> int:
        """As many steps as are left, in one call of the layer behind."""
        if self.left == 0:
            self._step()
        steps = -(-len(data) // self.chunk)
        if self.left > 0:
            steps = min(steps, self.left)
            self.left -= steps
        self.steps += steps
        return self._files.write(handle, data[: steps * self.chunk])

    def fsync(self, handle: int) -> None:
        self._step()
        if self._flushes:
            self._files.fsync(handle)

    def close(self, handle: int) -> None:
        self._files.close(handle)  # a dead process closes its files too

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        self._files.rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        self._files.unlink(path)

    def make_folder(self, folder: Path) -> None:
        self._step()
        self._files.make_folder(folder)

    def sync_folder(self, folder: Path) -> None:
        self._step()
        if self._flushes:
            self._files.sync_folder(folder)

    def touch(self, path: Path) -> None:
        self._step()
        self._files.touch(path)

    def names(self, folder: Path) -> list[str]:
        return self._files.names(folder)

    def status(self, path: Path) -> FileStatus | None:
        return self._files.status(path)

    def read(self, path: Path) -> bytes:
        return self._files.read(path)


@dataclass
class _Inode:
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    modified_ns: int = 0


_Names = dict[Path, _Inode]
Keep = Callable[[Literal["name", "content"]], bool]


class DiskModel:
    """Files in memory that know which bytes and which names would outlive a power cut."""

    def __init__(self) -> None:
        self._now: _Names = {}
        self._synced: _Names = {}
        self._pending: list[tuple[Path, Callable[[_Names], object]]] = []
        self._open: dict[int, _Inode] = {}
        self._clock = 0

    def after_power_cut(self, keep: Keep) -> DiskModel:
        """The disk when the power is back.

        Args:
            keep: Asked for each change of a name that no ``sync_folder`` followed, and for the content of each file
                that no ``fsync`` followed, whether it made it to the disk. Of a content that did not, the file system
                shows the length, or a part of it, and zeros.
        """
        names = dict(self._synced)
        for _, change in self._pending:
            if keep("name"):
                change(names)
        after = DiskModel()
        for path, inode in names.items():
            content = bytes(inode.content)
            if content != inode.synced and not keep("content"):
                content = bytes(len(content)) if keep("content") else content[: len(content) // 2]
            after.put(path, content)
        return after

    def put(self, path: Path, content: bytes) -> None:
        """A file that is durable."""
        self._now[path] = self._synced[path] = _Inode(bytearray(content), content, self._tick())

    def create(self, path: Path, mode: int) -> int:
        assert mode == 0o600
        handle = len(self._open)
        if path in self._now:
            inode = self._now[path]
            inode.content.clear()
        else:
            inode = _Inode()
            self._change(path.parent, lambda names: names.__setitem__(path, inode))
        inode.modified_ns = self._tick()
        self._open[handle] = inode
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        self._open[handle].content += data
        return len(data)

    def fsync(self, handle: int) -> None:
        inode = self._open[handle]
        inode.synced = bytes(inode.content)

    def close(self, handle: int) -> None:
        """A number is not given twice."""

    def rename(self, source: Path, target: Path) -> None:
        if source not in self._now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
        inode = self._now[source]

        def change(names: _Names) -> None:
            names.pop(source, None)
            names[target] = inode

        self._change(target.parent, change)

    def unlink(self, path: Path) -> None:
        if path in self._now:
            self._change(path.parent, lambda names: names.pop(path, None))

    def make_folder(self, folder: Path) -> None:
        """Folders are there."""

    def sync_folder(self, folder: Path) -> None:
        for parent, change in self._pending:
            if parent == folder:
                change(self._synced)
        self._pending = [entry for entry in self._pending if entry[0] != folder]

    def touch(self, path: Path) -> None:
        self._now[path].modified_ns = self._tick()

    def names(self, folder: Path) -> list[str]:
        return [path.name for path in self._now if path.parent == folder]

    def status(self, path: Path) -> FileStatus | None:
        inode = self._now.get(path)
        return None if inode is None else FileStatus(len(inode.content), inode.modified_ns)

    def read(self, path: Path) -> bytes:
        return bytes(self._now[path].content)

    def _change(self, folder: Path, change: Callable[[_Names], object]) -> None:
        change(self._now)
        self._pending.append((folder, change))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
