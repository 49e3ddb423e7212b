"""Reports in chunks: what is on the disk, who may add to it, and what a kill at any byte leaves."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import (
    BodyAltered,
    ConfigurationError,
    InvalidUpdate,
    LeaseExpired,
    MalformedMessage,
    OversizedBody,
    ProtocolError,
    ServerBusy,
    StorageUnavailable,
    UnknownAssignment,
    UnknownUpload,
    UploadOffsetMismatch,
)
from client_sdk.protocol.messages import ReportReply, UploadRequest
from server_ref import upload_store
from server_ref.upload_store import Upload, UploadStore
from server_ref.uploads import MAX_CHUNK_BYTES, Uploads

DEVICE, OTHER = "d" * 32, "e" * 32
REPORT, ASSIGNMENT = "1" * 32, "2" * 32
FRAME = bytes(i % 251 for i in range(1000))


def upload_of(frame: bytes = FRAME, **changes: Any) -> Upload:
    facts = {"device_id": DEVICE, "report_id": REPORT, "assignment_id": ASSIGNMENT}
    return Upload(**(facts | {"num_bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()} | changes))


def request_of(frame: bytes = FRAME, **changes: Any) -> UploadRequest:
    facts = {"assignment_id": ASSIGNMENT, "num_bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}
    return UploadRequest(**(facts | changes))


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path, 10_000)


# --- the store ---


def test_chunks_become_the_announced_bytes(store: UploadStore):
    upload = upload_of()
    assert store.begin(upload) == 0
    assert store.append(upload, 0, FRAME[:300]) == 300
    assert store.append(upload, 300, FRAME[300:]) == 1000
    assert store.whole(upload).read_bytes() == FRAME


def test_a_chunk_that_does_not_fit_says_where_the_next_one_begins(store: UploadStore):
    upload = upload_of()
    store.begin(upload)
    store.append(upload, 0, FRAME[:300])
    for offset in (0, 299, 301, 10**17):
        with pytest.raises(UploadOffsetMismatch) as caught:
            store.append(upload, offset, FRAME[300:310])
        assert caught.value.offset == 300
    with pytest.raises(OversizedBody):
        store.append(upload, 300, FRAME)
    with pytest.raises(UploadOffsetMismatch, match="700 bytes are missing"):
        store.whole(upload)
    assert store.append(upload, 300, FRAME[300:]) == 1000, "nothing of it was written"


def test_what_has_arrived_is_there_after_a_restart(store: UploadStore, tmp_path: Path):
    upload = upload_of()
    store.begin(upload)
    store.append(upload, 0, FRAME[:700])
    again = UploadStore(tmp_path, 10_000)
    assert again.find(DEVICE) == upload
    assert again.begin(upload) == 700
    again.append(upload, 700, FRAME[700:])
    assert again.whole(upload).read_bytes() == FRAME


def test_another_hash_than_the_announced_one_starts_over(store: UploadStore):
    upload = upload_of(sha256="0" * 64)
    store.begin(upload)
    store.append(upload, 0, FRAME)
    with pytest.raises(BodyAltered) as caught:
        store.whole(upload)
    assert caught.value.retryable
    assert store.begin(upload) == 0


@pytest.mark.parametrize(
    "change", [{"report_id": "3" * 32}, {"assignment_id": "4" * 32}, {"sha256": "5" * 64}, {"num_bytes": 999}]
)
def test_a_device_has_one_upload_at_a_time(store: UploadStore, tmp_path: Path, change: dict[str, Any]):
    first = upload_of()
    store.begin(first)
    store.append(first, 0, FRAME[:700])
    second = replace(first, **change)
    assert store.begin(second) == 0
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
    assert store.begin(first) == 0


def test_devices_do_not_get_in_each_others_way(store: UploadStore):
    mine, theirs = upload_of(), upload_of(device_id=OTHER)
    store.begin(mine)
    store.begin(theirs)
    store.append(mine, 0, FRAME)
    assert store.begin(theirs) == 0
    store.drop(OTHER)
    assert store.whole(mine).read_bytes() == FRAME


def test_the_room_is_bounded_by_what_is_announced(store: UploadStore):
    uploads = [upload_of(device_id=f"{i:032x}", num_bytes=4000) for i in range(3)]
    store.begin(uploads[0])
    store.begin(uploads[1])
    with pytest.raises(StorageUnavailable, match="no room") as caught:
        store.begin(uploads[2])
    assert caught.value.retryable
    assert store.begin(uploads[0]) == 0, "who is in stays in"
    store.drop(uploads[0].device_id)
    assert store.begin(uploads[2]) == 0
    assert store.begin(uploads[0], prune=lambda: store.prune(lambda u: u == uploads[1])) == 0, "room can be made"


def test_dropping_one_assignments_upload_leaves_anothers(store: UploadStore, tmp_path: Path):
    store.begin(upload_of())
    store.drop(DEVICE, "9" * 32)
    assert store.find(DEVICE) == upload_of()
    store.drop(DEVICE, ASSIGNMENT)
    store.drop(DEVICE)
    assert store.find(DEVICE) is None
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_uploads_are_removed(tmp_path: Path):
    (tmp_path / "noise").write_bytes(b"x")
    (tmp_path / (upload_of().name + "x")).write_bytes(b"x")
    UploadStore(tmp_path, 10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_a_configuration_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="choose another data_dir"):
        UploadStore(tmp_path / "file", 10_000)


class Killed(BaseException):
    """The process ends here."""


class DyingOs:
    """The ``os`` module until so many bytes are written: then the process dies, or the disk is full."""

    def __init__(self, survives: int, *, full: bool = False) -> None:
        self.left, self.full = survives, full

    def write(self, descriptor: int, data: memoryview) -> int:
        written = os.write(descriptor, data[: min(self.left, 7)])
        self.left -= written
        if written == 0:
            if self.full:
                raise OSError(28, "No space left on device")
            raise Killed
        return written

    def fsync(self, _descriptor: int) -> None:
        """What a dead process wrote is there; a thousand flushes take their time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@given(size=st.integers(1, 60), chunks=st.lists(st.integers(1, 20), max_size=20), kill_at=st.integers(0, 60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_server_killed_at_any_byte_goes_on_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, chunks: list[int], kill_at: int
):
    """Whatever was written is a beginning of the report, and what had been acknowledged is part of it."""
    frame = FRAME[:size]
    upload = upload_of(frame)
    lengths: Iterator[int] = iter(chunks)

    def send(store: UploadStore) -> int:
        offset = store.begin(upload)
        while offset < size:
            acknowledged.append(offset)
            offset = store.append(upload, offset, frame[offset : offset + next(lengths, size)])
        return offset

    acknowledged = [0]
    UploadStore(tmp_path, 10_000).drop(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(upload_store, "os", DyingOs(kill_at))
        try:
            send(UploadStore(tmp_path, 10_000))
        except Killed:
            pass
        else:
            assert kill_at >= size
    left = (tmp_path / upload.name).read_bytes()
    assert frame.startswith(left)
    assert len(left) >= acknowledged[-1]
    again = UploadStore(tmp_path, 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(upload_store, "os", DyingOs(10**6))
        assert again.begin(upload) == len(left)
        assert send(again) == size
    assert again.whole(upload).read_bytes() == frame


@pytest.mark.parametrize("survives", [0, 1, 8, 99])
def test_a_full_disk_leaves_what_was_there(store: UploadStore, monkeypatch: pytest.MonkeyPatch, survives: int):
    upload = upload_of()
    store.begin(upload)
    store.append(upload, 0, FRAME[:300])
    with monkeypatch.context() as patch:
        patch.setattr(upload_store, "os", DyingOs(survives, full=True))
        with pytest.raises(StorageUnavailable, match="No space left"):
            store.append(upload, 300, FRAME[300:400])
    assert store.begin(upload) == 300
    store.append(upload, 300, FRAME[300:])
    assert store.whole(upload).read_bytes() == FRAME


# --- what devices ask ---


@dataclass
class FakeReports:
    """Whom complete reports are handed to."""

    max_report_bytes: int = 5000
    accepted: set[str] = field(default_factory=set)
    refuses: ProtocolError | None = None
    fails: ProtocolError | None = None
    taken: list[tuple[str, str, bytes]] = field(default_factory=list)
    files: list[Path | None] = field(default_factory=list)

    def awaits(self, device_id: str, assignment_id: str, report_id: str) -> bool:
        if assignment_id != ASSIGNMENT or device_id not in {DEVICE, OTHER}:
            raise UnknownAssignment(assignment_id)
        if self.refuses is not None:
            raise self.refuses
        return report_id not in self.accepted

    def report(
        self, device_id: str, report_id: str, body: memoryview, *, file: Path | None = None
    ) -> Future[ReportReply]:
        assert file is not None
        assert file.read_bytes() == body
        if self.fails is not None:
            raise self.fails
        self.taken.append((device_id, report_id, bytes(body)))
        self.accepted.add(report_id)
        future: Future[ReportReply] = Future()
        future.set_result(ReportReply(report_id=report_id, assignment_id=ASSIGNMENT))
        return future


@pytest.fixture
def reports() -> FakeReports:
    return FakeReports()


@pytest.fixture
def uploads(store: UploadStore, reports: FakeReports) -> Uploads:
    return Uploads(store, reports)


def test_a_report_in_chunks_is_taken_once(uploads: Uploads, reports: FakeReports, tmp_path: Path):
    assert uploads.begin(DEVICE, REPORT, request_of()).offset == 0
    reply = uploads.append(DEVICE, REPORT, "0", FRAME[:600])
    assert (reply.offset, reply.max_chunk_bytes) == (600, MAX_CHUNK_BYTES)
    assert uploads.begin(DEVICE, REPORT, request_of()).offset == 600, "asking changes nothing"
    uploads.append(DEVICE, REPORT, "600", FRAME[600:])
    for _ in range(3):
        answer = uploads.complete(DEVICE, REPORT, request_of()).result()
        assert answer == ReportReply(report_id=REPORT, assignment_id=ASSIGNMENT)
        assert uploads.begin(DEVICE, REPORT, request_of()).offset == 1000
    assert reports.taken == [(DEVICE, REPORT, FRAME)]
    assert list(tmp_path.iterdir()) == [], "nothing is left of the upload"


def test_nobody_adds_to_anothers_upload(uploads: Uploads):
    uploads.begin(DEVICE, REPORT, request_of())
    with pytest.raises(UnknownUpload):
        uploads.append(OTHER, REPORT, "0", FRAME)
    with pytest.raises(UnknownUpload):
        uploads.complete(OTHER, REPORT, request_of())
    with pytest.raises(UnknownUpload):
        uploads.append(DEVICE, "3" * 32, "0", FRAME)
    with pytest.raises(UnknownAssignment):
        uploads.begin(OTHER, REPORT, request_of(assignment_id="9" * 32))
    with pytest.raises(UnknownUpload):
        uploads.complete(DEVICE, REPORT, request_of(sha256="0" * 64))


def test_what_is_too_late_is_refused_before_the_disk_is_asked(uploads: Uploads, reports: FakeReports):
    uploads.begin(DEVICE, REPORT, request_of())
    reports.refuses = LeaseExpired("over")
    for ask in (
        lambda: uploads.begin(DEVICE, REPORT, request_of()),
        lambda: uploads.append(DEVICE, REPORT, "0", FRAME),
        lambda: uploads.complete(DEVICE, REPORT, request_of()),
    ):
        with pytest.raises(LeaseExpired):
            ask()
    uploads.prune()
    assert uploads.store.find(DEVICE) is None


def test_a_report_longer_than_the_tasks_is_refused_at_once(uploads: Uploads):
    with pytest.raises(OversizedBody, match="at most 5000"):
        uploads.begin(DEVICE, REPORT, request_of(num_bytes=5001))


@pytest.mark.parametrize("report_id", ["", "1" * 31, "A" * 32, "../" + "1" * 29, "1" * 32 + "\n", "1" * 30 + "/x"])
def test_a_report_id_is_never_a_path(uploads: Uploads, report_id: str, tmp_path: Path):
    with pytest.raises(MalformedMessage):
        uploads.begin(DEVICE, report_id, request_of())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", ["-1", "", "x", "1.0", "\u00b2", "\u0661", " 0", "9" * 19])
def test_an_offset_is_a_number(uploads: Uploads, offset: str):
    uploads.begin(DEVICE, REPORT, request_of())
    with pytest.raises(MalformedMessage):
        uploads.append(DEVICE, REPORT, offset, FRAME)


@pytest.mark.parametrize(("error", "kept"), [(ServerBusy("full"), True), (InvalidUpdate("no"), False)])
def test_a_refused_report_is_kept_only_where_it_may_still_be_taken(
    uploads: Uploads, reports: FakeReports, error: ProtocolError, kept: bool
):
    uploads.begin(DEVICE, REPORT, request_of())
    uploads.append(DEVICE, REPORT, "0", FRAME)
    reports.fails = error
    with pytest.raises(type(error)):
        uploads.complete(DEVICE, REPORT, request_of())
    assert (uploads.store.find(DEVICE) is not None) is kept


def test_requests_that_come_twice_at_once_leave_one_report(uploads: Uploads, reports: FakeReports):
    """A proxy repeats, a device runs into its own retry: the one that comes late is told where the upload stands."""
    uploads.begin(DEVICE, REPORT, request_of())
    barrier = threading.Barrier(4)
    refused: list[int] = []

    def send() -> None:
        barrier.wait()
        offset = 0
        while offset < len(FRAME):
            try:
                offset = uploads.append(DEVICE, REPORT, str(offset), FRAME[offset : offset + 100]).offset
            except UploadOffsetMismatch as e:
                offset = e.offset or 0
                refused.append(offset)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    uploads.complete(DEVICE, REPORT, request_of()).result()
    assert reports.taken == [(DEVICE, REPORT, FRAME)]
    assert refused, "somebody came second"
