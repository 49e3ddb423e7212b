"""What a device carries from one report to the next.

That is its residual (error feedback), its control variate (SCAFFOLD) and its personal layers.

The memory belongs to the report it was made with: it counts from when the server has accepted that report. So a new
memory is *staged* under the report's id before the report is sealed, and *settled* once the report's fate is known:
accepted, it replaces the old one in one rename; else it is thrown away and the old one stays. A process that dies
anywhere in between finds the old memory or the new one, and the one that belongs to what the server holds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from client_sdk.atomic import is_leftover, replace_durably, set_aside, write_atomically
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.frames import decode_frame, encode_frame

_log = logging.getLogger(__name__)

RESIDUAL = "residual"
"""What error feedback left out of the reports so far: float32 of the update's length."""
NOISED_RESIDUAL = "noised-residual"
"""Likewise, of reports with local privacy. Another name, because it may only ever be made of noised updates: what was
left out of reports before the device had local privacy is dropped, never added to a later one."""
CONTROL = "control"
"""SCAFFOLD's control variate of this device: float32[d]."""
PERSONAL = "personal"
"""Its personal layers as the training of the report left them: float32 of ``SharedLayers.personal_of``'s length. Never
sent; the task's next training starts from them, and an app may serve them with the shared layers."""

_DIGEST_BYTES = 32
_CURRENT = "current"
_STAGED = ".staged"

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DeviceMemory:
    """Named vectors of one task.

    Attributes:
        task_id: Whose memory it is; another task begins with none.
        report_id: The report that it was made with.
        vectors: Name -> float32 array of one dimension.
    """

    task_id: str
    report_id: str
    vectors: Mapping[str, Float32Array]

    def vector(self, name: str, size: int) -> Float32Array | None:
        """One of the vectors, if it is there and of this length."""
        found = self.vectors.get(name)
        return found if found is not None and len(found) == size else None

    def to_bytes(self) -> bytes:
        """SHA-256 of a frame, then the frame: damage anywhere is noticed."""
        frame = encode_frame(dict(self.vectors), {"task_id": self.task_id, "report_id": self.report_id})
        return hashlib.sha256(frame).digest() + frame

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read ``to_bytes``; the vectors are read-only views into ``data``.

        Raises:
            ValueError: Damaged, or something else.
        """
        frame = memoryview(data)[_DIGEST_BYTES:]
        if hashlib.sha256(frame).digest() != bytes(data[:_DIGEST_BYTES]):
            raise ValueError("its checksum does not match")
        try:
            decoded = decode_frame(frame)
            vectors = {name: np.frombuffer(tensor, np.float32) for name, tensor in decoded.tensors.items()}
            return cls(decoded.metadata["task_id"], decoded.metadata["report_id"], vectors)
        except (ProtocolError, KeyError) as e:
            raise ValueError("it is not a device's memory") from e


class MemoryFiles:
    """One device's memory in a folder: ``current``, and ``REPORT_ID.staged`` until its report's fate is known.

    Only one task's memory is kept: settling a report of another task replaces it. All methods raise ``OSError``.
    """

    def __init__(self, folder: Path, files: FileLayer = OS_FILES) -> None:
        self._folder = folder
        self._files = files
        self._current = folder / _CURRENT

    def current(self, task_id: str) -> DeviceMemory | None:
        """The memory that counts; a damaged one is set aside."""
        memory = self._read(self._current)
        if memory is not None and memory.task_id != task_id:
            _log.info("the memory of task %s does not serve task %s", memory.task_id, task_id)
            return None
        return memory

    def stage(self, memory: DeviceMemory) -> None:
        """Make a memory durable under its report's id; it does not count yet."""
        write_atomically(self._staged(memory.report_id), memory.to_bytes(), files=self._files)

    def is_staged(self, report_id: str) -> bool:
        """Whether the memory of a report is there and whole; a damaged one is set aside."""
        memory = self._read(self._staged(report_id))
        return memory is not None and memory.report_id == report_id

    def settle(self, report_id: str, *, accepted: bool) -> None:
        """Let a report's memory count, or throw it away. Repeating it is harmless."""
        staged = self._staged(report_id)
        if accepted:
            try:
                replace_durably(staged, self._current, files=self._files)
            except FileNotFoundError:
                self._settled_before_or_lost(report_id)
        # At most one assignment is held, so whatever else is staged was orphaned by a damaged session, or by a kill.
        for name in self._files.names(self._folder):
            if name.endswith(_STAGED) or is_leftover(name):
                self._files.unlink(self._folder / name)
        self._files.sync_folder(self._folder)

    def _settled_before_or_lost(self, report_id: str) -> None:
        memory = self._read(self._current)
        if memory is not None and memory.report_id != report_id:
            # What it holds back was sent with the accepted report: it must not be sent a second time.
            reason = f"it was overtaken by report {report_id}, whose own memory is lost"
            set_aside(self._current, reason, files=self._files)

    def _read(self, path: Path) -> DeviceMemory | None:
        if self._files.status(path) is None:
            return None
        try:
            return DeviceMemory.from_bytes(self._files.read(path))
        except ValueError as e:
            set_aside(path, f"{e}; the device goes on without it", files=self._files)
            return None

    def _staged(self, report_id: str) -> Path:
        return self._folder / f"{report_id}{_STAGED}"
