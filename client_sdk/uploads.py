"""A large report goes up in chunks, and after a cut it goes on where the server stands."""

from __future__ import annotations

import hashlib
from typing import Final, Protocol

from client_sdk.blobs import Buffer
from client_sdk.errors import InvalidReply, TransportUnavailable
from client_sdk.protocol.errors import MalformedFrame, UnknownUpload, UploadOffsetMismatch
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import ReportReply, UploadReply, UploadRequest

CHUNK_BYTES: Final = 2**20
"""What a phone's network carries in one piece more often than not, and a server keeps in memory without a thought."""
_MAX_RESUMES: Final = 5


class UploadRequests(Protocol):
    """The three requests that an upload is made of; each may be repeated."""

    def announce(self, report_id: str, request: UploadRequest) -> UploadReply:
        """Say what will come, and ask how much of it is there."""
        ...

    def send_chunk(self, report_id: str, offset: int, chunk: memoryview) -> UploadReply:
        """Send the bytes from ``offset`` on."""
        ...

    def complete(self, report_id: str, request: UploadRequest) -> ReportReply:
        """Have the whole report accepted."""
        ...


def upload_in_chunks(to: UploadRequests, report_id: str, frame: Buffer, *, chunk_bytes: int) -> ReportReply:
    """Deliver a report, beginning where the server says that it stands.

    A cut is answered by asking and going on, a few times and only as long as that gets further; whoever calls again
    later goes on from there too, in this process or another: all that is remembered is on the server.

    Args:
        to: The server.
        report_id: Under which id.
        frame: The sealed report.
        chunk_bytes: Largest chunk to send; the server may want smaller ones.

    Raises:
        MalformedFrame: It is not a report's frame.
        InvalidReply: The server stands where it cannot.
        TransportUnavailable, ProtocolError: As the requests.
    """
    view = memoryview(frame).cast("B")
    request = UploadRequest(
        assignment_id=_assignment_of(view), num_bytes=len(view), sha256=hashlib.sha256(view).hexdigest()
    )
    reached = resumes = 0
    while True:
        offset = 0
        try:
            state = to.announce(report_id, request)
            offset = _plausible(state, at_least=0, size=len(view))
            while offset < len(view):
                chunk = view[offset : offset + min(chunk_bytes, state.max_chunk_bytes)]
                state = to.send_chunk(report_id, offset, chunk)
                offset = _plausible(state, at_least=offset + len(chunk), size=len(view))
            return to.complete(report_id, request)
        except (TransportUnavailable, UnknownUpload, UploadOffsetMismatch):
            if resumes == _MAX_RESUMES or offset <= reached:
                raise
            reached = offset
            resumes += 1


def _plausible(state: UploadReply, *, at_least: int, size: int) -> int:
    if not at_least <= state.offset <= size:
        raise InvalidReply(f"the upload of {size} bytes stands at {state.offset}, and must have reached {at_least}")
    return state.offset


def _assignment_of(frame: memoryview) -> str:
    try:
        return decode_frame(frame).metadata["assignment_id"]
    except KeyError as e:
        raise MalformedFrame("the report does not name its assignment") from e
