"""Where reports that arrive in chunks wait until they are whole, on the disk.

A file's name says whose it is, for which assignment, how long it will be and which hash it must have; its content is
what has arrived, its length where the device goes on. Nothing else is written, so nothing can disagree.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from client_sdk.protocol.errors import (
    BodyAltered,
    ConfigurationError,
    OversizedBody,
    StorageUnavailable,
    UnknownUpload,
    UploadOffsetMismatch,
)

_log = logging.getLogger("pocketfed.uploads")

_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9a-f]{32})\.([1-9][0-9]{0,12})\.([0-9a-f]{64})")
_LOCKS: Final = 64


@dataclass(frozen=True)
class Upload:
    """What a device has announced."""

    device_id: str
    report_id: str
    assignment_id: str
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.device_id}.{self.report_id}.{self.assignment_id}.{self.num_bytes}.{self.sha256}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The upload that a file is of, if it is one."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match[1], match[2], match[3], int(match[4]), match[5])


class UploadStore:
    """Partial reports in a folder, one for each device, within a total size.

    Guarantees: what ``append`` has returned survives a power cut; a failed write leaves what was there before. Calls
    are safe from any thread.

    Args:
        folder: Where the files are; made if needed.
        max_bytes: What all announced reports may come to.

    Raises:
        ConfigurationError: The folder cannot be made or read.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._mutex = threading.Lock()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._uploads: dict[str, Upload] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in folder.iterdir():
                found = Upload.parse(path.name)
                if found is None or found.device_id in self._uploads:
                    path.unlink()
                else:
                    self._uploads[found.device_id] = found
        except OSError as e:
            raise ConfigurationError(f"cannot use {folder}: {e.strerror or e}; choose another data_dir") from e

    @contextmanager
    def of(self, device_id: str) -> Iterator[None]:
        """Keep a device's upload for oneself: its requests may come twice at once."""
        with self._locks[int(device_id[:8], 16) % _LOCKS]:
            yield

    def begin(self, upload: Upload, prune: Callable[[], None] = lambda: None) -> int:
        """Take up an upload, or go on with it; another one of the same device is forgotten.

        Args:
            upload: What is announced.
            prune: Makes room, if there is none.

        Returns:
            How many of its bytes are there.

        Raises:
            StorageUnavailable: There is no room, or the disk fails.
        """
        if self.find(upload.device_id) == upload:
            return self._size(upload)
        self.drop(upload.device_id)
        if not self._enter(upload):
            prune()
            if not self._enter(upload):
                raise StorageUnavailable(f"no room for another {upload.num_bytes} bytes in uploads")
        try:
            with (self._folder / upload.name).open("wb"):
                pass
            self._sync_folder()
        except OSError as e:
            self.drop(upload.device_id)
            raise StorageUnavailable(f"cannot begin an upload: {e.strerror or e}") from e
        return 0

    def find(self, device_id: str) -> Upload | None:
        """The upload that a device has under way."""
        with self._mutex:
            return self._uploads.get(device_id)

    def append(self, upload: Upload, offset: int, chunk: bytes) -> int:
        """Write a chunk and flush it.

        Returns:
            How many bytes are there now.

        Raises:
            UploadOffsetMismatch: The chunk does not begin where the upload stands; the error says where that is.
            OversizedBody: It reaches beyond the announced end.
            StorageUnavailable: The disk is full or failing; the upload stands where it stood.
        """
        size = self._size(upload)
        if offset != size:
            raise UploadOffsetMismatch(f"the upload stands at byte {size}, the chunk begins at {offset}", offset=size)
        if size + len(chunk) > upload.num_bytes:
            raise OversizedBody(f"the chunk ends beyond the {upload.num_bytes} bytes that were announced")
        try:
            descriptor = os.open(self._folder / upload.name, os.O_WRONLY | os.O_APPEND)
            try:
                _write(descriptor, chunk, size)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise StorageUnavailable(f"cannot store a chunk: {e.strerror or e}") from e
        return size + len(chunk)

    def whole(self, upload: Upload) -> Path:
        """The file of a complete upload, whose bytes are those announced.

        Raises:
            UploadOffsetMismatch: Bytes are missing.
            BodyAltered: It has another hash than announced; the upload is forgotten.
            StorageUnavailable: It cannot be read.
        """
        size = self._size(upload)
        if size < upload.num_bytes:
            raise UploadOffsetMismatch(f"{upload.num_bytes - size} bytes are missing", offset=size)
        path = self._folder / upload.name
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise StorageUnavailable(f"cannot read an upload: {e.strerror or e}") from e
        if sha256 != upload.sha256:
            self.drop(upload.device_id)
            raise BodyAltered("the chunks do not make the report that was announced; send it again")
        return path

    def drop(self, device_id: str, assignment_id: str | None = None) -> None:
        """Forget a device's upload, with ``assignment_id`` one for that only. Harmless where there is none."""
        with self._mutex:
            upload = self._uploads.get(device_id)
            if upload is None or assignment_id not in {None, upload.assignment_id}:
                return
            del self._uploads[device_id]
        try:
            (self._folder / upload.name).unlink(missing_ok=True)
        except OSError as e:  # the next start finds it again
            _log.warning("cannot remove an upload: %s", e)

    def prune(self, is_over: Callable[[Upload], bool]) -> None:
        """Forget the uploads whose assignments are over."""
        with self._mutex:
            uploads = list(self._uploads.values())
        for upload in uploads:
            if is_over(upload):
                self.drop(upload.device_id, upload.assignment_id)

    def _enter(self, upload: Upload) -> bool:
        """Count an upload in, if there is room for all of it."""
        with self._mutex:
            taken = sum(other.num_bytes for other in self._uploads.values())
            if taken + upload.num_bytes > self._max_bytes:
                return False
            self._uploads[upload.device_id] = upload
            return True

    def _size(self, upload: Upload) -> int:
        try:
            return (self._folder / upload.name).stat().st_size
        except FileNotFoundError as e:
            raise UnknownUpload(f"no upload of report {upload.report_id} is under way") from e
        except OSError as e:
            raise StorageUnavailable(f"cannot read an upload: {e.strerror or e}") from e

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, chunk: bytes, size: int) -> None:
    """Append and flush a chunk to a file of this size, or leave the file as it was."""
    try:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
