"""Caches of downloaded blobs, by content hash and within a size: of one device in a folder, of many in memory."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Self

from client_sdk.atomic import is_leftover, write_atomically
from client_sdk.files import OS_FILES, FileLayer

_log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20

Buffer = bytes | bytearray | memoryview


class BlobFiles:
    """A cache: what is missing or damaged is downloaded again, what cannot be written is not kept."""

    def __init__(self, folder: Path, max_bytes: int, files: FileLayer = OS_FILES) -> None:
        self._folder = folder
        self._files = files
        self._max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """A blob, checked against its hash and now the most recently used one; a damaged one is removed.

        Raises:
            OSError: The folder cannot be read.
        """
        path = self._folder / sha256
        if self._files.status(path) is None:
            return None
        data = self._files.read(path)
        if hashlib.sha256(data).hexdigest() == sha256:
            self._files.touch(path)
            return data
        _log.warning("cached blob %s is damaged; it will be downloaded again", sha256)
        self._files.unlink(path)
        return None

    def put(self, sha256: str, data: Buffer) -> None:
        """Keep a blob, at the expense of those unused for longest."""
        try:
            write_atomically(self._folder / sha256, data, files=self._files)
            self._evict(keep=sha256)
        except OSError as e:
            _log.warning("blob %s is not cached: %s", sha256, e)

    def _evict(self, keep: str) -> None:
        paths = [self._folder / name for name in self._files.names(self._folder)]
        found = [(path, status) for path in paths if (status := self._files.status(path)) is not None]
        total = sum(status.size for _, status in found)
        for path, status in sorted(found, key=lambda entry: entry[1].modified_ns):
            if total <= self._max_bytes:
                break
            if path.name != keep:
                self._files.unlink(path)
                total -= status.size


class ArrivingBlob(bytearray):
    """A blob while it is downloaded: what has arrived of it is kept in pieces, so that a process that dies goes on.

    Only ``+=`` and ``clear`` are noticed, which is all that ``Transport.fetch`` does. Pieces are whole: what arrived
    since the last one is fetched again. Whether all of it is the blob, its hash says; here nothing is checked. Pieces
    that cannot be written are not kept, which costs time after a death and nothing else.
    """

    def __init__(
        self, folder: Path, sha256: str, files: FileLayer = OS_FILES, *, piece_bytes: int = _PIECE_BYTES
    ) -> None:
        """Take up what an earlier process left, and forget what is left of other blobs.

        Raises:
            OSError: The folder cannot be read.
        """
        super().__init__()
        self._folder = folder
        self._sha256 = sha256
        self._files = files
        self._piece_bytes = piece_bytes
        self._pieces = 0
        self._keeps = True
        found = {name for name in files.names(folder) if not is_leftover(name)}
        while self._name(self._pieces) in found and self._take_up():
            found.remove(self._name(self._pieces))
            self._pieces += 1
        for name in found:
            files.unlink(folder / name)

    def _take_up(self) -> bool:
        """Append the next piece; False where it is damaged, which costs what came after it."""
        try:
            piece = self._files.read(self._folder / self._name(self._pieces))
        except OSError as e:
            _log.warning("a piece of blob %s cannot be read: %s", self._sha256, e)
            return False
        if len(piece) != self._piece_bytes:
            return False
        super().__iadd__(piece)
        return True

    def __iadd__(self, more: Buffer) -> Self:  # type: ignore[override, misc] # fetch appends nothing else
        """Append what has arrived."""
        super().__iadd__(more)
        try:
            while self._keeps and len(self) >= (self._pieces + 1) * self._piece_bytes:
                begin = self._pieces * self._piece_bytes
                piece = bytes(memoryview(self)[begin : begin + self._piece_bytes])
                write_atomically(self._folder / self._name(self._pieces), piece, files=self._files)
                self._pieces += 1
        except OSError as e:
            self._keeps = False  # said once, and not tried again with every chunk
            _log.warning("what arrives of blob %s is not kept: %s", self._sha256, e)
        return self

    def clear(self) -> None:
        """Begin anew: other bytes came than the blob's."""
        super().clear()
        self.forget()

    def forget(self) -> None:
        """Remove the pieces: the blob is in the cache, or wrong. The bytes stay."""
        try:
            for index in range(self._pieces):
                self._files.unlink(self._folder / self._name(index))
        except OSError as e:
            _log.warning("pieces of blob %s stay: %s", self._sha256, e)
        self._pieces = 0

    def _name(self, index: int) -> str:
        return f"{self._sha256}.{index:06d}"


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
