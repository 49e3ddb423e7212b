"""Reports that arrive in chunks: after a crash on either side the device goes on where it was."""

from __future__ import annotations

import mmap
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Protocol

from client_sdk.protocol.errors import (
    MalformedMessage,
    OversizedBody,
    ProtocolError,
    StorageUnavailable,
    UnknownUpload,
)
from client_sdk.protocol.messages import ReportReply, UploadReply, UploadRequest
from server_ref.upload_store import Upload, UploadStore

MAX_CHUNK_BYTES: Final = 2**20
"""Largest chunk: what one request keeps in memory."""

_REPORT_ID = re.compile("[0-9a-f]{32}")


class Reports(Protocol):
    """Whom a complete report is handed to: the coordinator."""

    @property
    def max_report_bytes(self) -> int:
        """Largest report."""
        ...

    def awaits(self, device_id: str, assignment_id: str, report_id: str) -> bool:
        """Whether this report may still come; False where this very one was accepted.

        Raises:
            ProtocolError: It would be refused, whatever it says: ``UnknownAssignment``, ``StaleReport``,
                ``LeaseExpired``, ``DuplicateReport``.
        """
        ...

    def report(
        self, device_id: str, report_id: str, body: memoryview, *, file: Path | None = None
    ) -> Future[ReportReply]:
        """Take a report; ``file`` has the same bytes, flushed."""
        ...


class Uploads:
    """What devices ask about reports that they send in chunks.

    Args:
        store: Where the chunks are.
        reports: Where the reports go.
    """

    def __init__(self, store: UploadStore, reports: Reports) -> None:
        self.store = store
        self._reports = reports

    def begin(self, device_id: str, report_id: str, request: UploadRequest) -> UploadReply:
        """Announce a report, or ask where it stands; may be repeated.

        Raises:
            MalformedMessage: Not a report id.
            OversizedBody: No report of this task is so long.
            StorageUnavailable: There is no room for it now.
            ProtocolError: As ``Reports.awaits``.
        """
        if _REPORT_ID.fullmatch(report_id) is None:
            raise MalformedMessage("a report id is 128 bits in lower-case hex")
        if request.num_bytes > self._reports.max_report_bytes:
            raise OversizedBody(
                f"the report has {request.num_bytes} bytes; at most {self._reports.max_report_bytes} are accepted"
            )
        if not self._reports.awaits(device_id, request.assignment_id, report_id):
            # It is here already: there is nothing to send but the question whether it is.
            return _at(request.num_bytes)
        with self.store.of(device_id):
            return _at(self.store.begin(_upload(device_id, report_id, request), self.prune))

    def append(self, device_id: str, report_id: str, offset: str, chunk: bytes) -> UploadReply:
        """Take a chunk; it is durable when this returns.

        Raises:
            MalformedMessage: The offset is no number.
            UnknownUpload: The report was not announced, or its upload is over.
            ProtocolError: As ``UploadStore.append`` and ``Reports.awaits``.
        """
        if not offset.isascii() or not offset.isdecimal() or len(offset) > 18:
            raise MalformedMessage("a chunk's offset is a number")
        with self.store.of(device_id):
            upload = self.store.find(device_id)
            if upload is None or upload.report_id != report_id:
                raise UnknownUpload(f"no upload of report {report_id} is under way")
            # Before the disk is asked: what is too late is not worth it.
            self._reports.awaits(device_id, upload.assignment_id, report_id)
            return _at(self.store.append(upload, int(offset), chunk))

    def complete(self, device_id: str, report_id: str, request: UploadRequest) -> Future[ReportReply]:
        """Hand a complete report on, as if it had come in one piece; may be repeated.

        Raises:
            UnknownUpload, UploadOffsetMismatch: Chunks are missing.
            BodyAltered: They make another report than the one announced.
            ProtocolError: The report's refusal.
        """
        with self.store.of(device_id):
            upload = _upload(device_id, report_id, request)
            if not self._reports.awaits(device_id, request.assignment_id, report_id):
                accepted: Future[ReportReply] = Future()
                accepted.set_result(ReportReply(report_id=report_id, assignment_id=request.assignment_id))
                return accepted
            if self.store.find(device_id) != upload:
                raise UnknownUpload(f"no upload of report {report_id} is under way")
            path = self.store.whole(upload)
            try:
                reply = self._reports.report(device_id, report_id, _mapped(path), file=path)
            except ProtocolError as e:
                self._refused(upload, e)
                raise
        reply.add_done_callback(lambda done: self._refused(upload, done.exception()))
        return reply

    def _refused(self, upload: Upload, error: BaseException | None) -> None:
        """An accepted report is a blob by now, and a refused one is refused for good."""
        if error is None or (isinstance(error, ProtocolError) and not error.retryable):
            self.store.drop(upload.device_id, upload.assignment_id)

    def prune(self) -> None:
        """Forget what can no longer become a report."""
        self.store.prune(self._is_over)

    def _is_over(self, upload: Upload) -> bool:
        try:
            return not self._reports.awaits(upload.device_id, upload.assignment_id, upload.report_id)
        except ProtocolError:
            return True


def _upload(device_id: str, report_id: str, request: UploadRequest) -> Upload:
    return Upload(device_id, report_id, request.assignment_id, request.num_bytes, request.sha256)


def _at(offset: int) -> UploadReply:
    return UploadReply(offset=offset, max_chunk_bytes=MAX_CHUNK_BYTES)


def _mapped(path: Path) -> memoryview:
    """A file's bytes without reading them: pages come and go as they are looked at. Nobody shortens a whole upload.

    Raises:
        StorageUnavailable: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as e:
        raise StorageUnavailable(f"cannot read an upload: {e.strerror or e}") from e
