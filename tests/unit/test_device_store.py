"""A device's durable state: killed at any byte, damaged, full, shared by mistake."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client_sdk.atomic import write_atomically
from client_sdk.blobs import ArrivingBlob, BlobPool
from client_sdk.errors import StateDirLocked, StateDirUnusable
from client_sdk.files import OS_FILES, FileLayer, OsFiles
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import DeviceMemory
from client_sdk.session_state import Phase, SessionState
from client_sdk.store import FileDeviceStore, MemoryDeviceStore
from tests.devices import make_assignment, sha
from tests.faults import DiskModel, FaultyFiles, Killed, disk_full, input_output_error


def test_a_write_killed_at_any_step_leaves_the_old_content_or_the_new(tmp_path: Path):
    path = tmp_path / "file"
    old, new = b"old content", b"the new content, longer"
    path.write_bytes(old)
    seen = []
    for survives in range(1000):
        try:
            write_atomically(path, new, files=FaultyFiles(OS_FILES, survives, flushes=False))
        except Killed:
            seen.append(path.read_bytes())
            path.write_bytes(old)
        else:
            break
    assert set(seen) == {old, new}
    assert seen == sorted(seen, key=lambda content: content == new), "once the new content is there it stays"
    assert len(seen) > len(new)
    assert path.read_bytes() == new
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_short_write_by_the_system_is_continued(tmp_path: Path):
    class ShortWrites(OsFiles):
        def write(self, handle: int, data: memoryview) -> int:
            return super().write(handle, data[:7])

    write_atomically(tmp_path / "file", bytes(range(150)), bytes(range(150, 200)), files=ShortWrites())
    assert (tmp_path / "file").read_bytes() == bytes(range(200))


def lost_or_kept(mask: int) -> Callable[[str], bool]:
    """Answers of the disk after a power cut: one bit each."""
    bits = (mask >> position & 1 == 1 for position in itertools.count())
    return lambda _what: next(bits)


def test_a_power_cut_at_any_step_leaves_the_old_content_or_the_new_whatever_was_lost():
    path, old, new = Path("/state/file"), b"old content", b"the new content, longer"
    seen = set()
    for mask in range(2**5):
        for survives in itertools.count():
            disk = DiskModel()
            disk.put(path, old)
            try:
                write_atomically(path, new, files=FaultyFiles(disk, survives))
            except Killed:
                seen.add(content := disk.after_power_cut(lost_or_kept(mask)).read(path))
                assert content in (old, new)
            else:
                assert disk.after_power_cut(lost_or_kept(mask)).read(path) == new, "what returned is durable"
                break
    assert seen == {old, new}


def test_the_disk_model_loses_what_was_not_synced():
    """Else the test above would not see a missing flush: it is the model of what ``write_atomically`` is for."""
    path, disk = Path("/state/file"), DiskModel()
    disk.put(path, b"old content")
    handle = disk.create(Path("/state/new"), 0o600)
    disk.write(handle, memoryview(b"content"))
    disk.rename(Path("/state/new"), path)
    assert disk.read(path) == b"content"
    assert disk.after_power_cut(lambda _: False).read(path) == b"old content"
    assert disk.after_power_cut(lambda what: what == "name").read(path) == b"con"
    assert disk.after_power_cut(lambda _: True).read(path) == b"content"


@pytest.mark.parametrize("fault", [disk_full, input_output_error])
@pytest.mark.parametrize("recovers", [True, False])
def test_a_failed_write_is_an_error_that_leaves_no_debris(tmp_path: Path, fault: Callable[[], OSError], recovers: bool):
    path, old, new = tmp_path / "file", b"old content", b"the new content, longer"
    for survives in itertools.count():
        path.write_bytes(old)
        files = FaultyFiles(OS_FILES, survives, fault=fault, recovers=recovers, flushes=False)
        try:
            write_atomically(path, new, files=files)
        except OSError as e:
            code = e.errno
        else:
            break
        assert code == fault().errno
        # The last two steps are the rename and its flush.
        assert path.read_bytes() == (new if survives == len(new) + 3 else old)
        if recovers:
            assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert survives == len(new) + 4


def test_a_new_file_is_private(tmp_path: Path):
    write_atomically(tmp_path / "file", b"secret")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def some_state(store: FileDeviceStore | MemoryDeviceStore, **changes: object) -> SessionState:
    return SessionState(device_id=store.identity.device_id, enrolled=True, reports=5).model_copy(update=changes)


def sealed_state(store: FileDeviceStore) -> SessionState:
    return some_state(
        store,
        phase=Phase.SEALED,
        assignment=make_assignment(3),
        report_id="2" * 32,
        report_sha256="e" * 64,
    )


def some_memory(number: int, task_id: str = "f" * 32) -> DeviceMemory:
    """The memory that the report of this number leaves."""
    vectors = {"residual": np.full(2, number, np.float32), "control": np.array([-number], np.float32)}
    return DeviceMemory(task_id, f"{number:032x}", vectors)


def test_everything_is_there_after_a_restart(tmp_path: Path):
    first = FileDeviceStore(tmp_path / "a" / "b")
    state = sealed_state(first)
    first.save_session(state)
    first.seal("2" * 32, b"frame")
    first.put_blob(sha(b"blob"), b"blob")
    first.close()
    second = FileDeviceStore(tmp_path / "a" / "b")
    assert second.identity.device_id == first.identity.device_id
    assert second.load_session() == state
    assert second.sealed("2" * 32) == b"frame"
    assert second.blob(sha(b"blob")) == b"blob"
    second.discard("2" * 32)
    assert second.sealed("2" * 32) is None
    second.discard("2" * 32)
    second.close()


def test_a_new_device_has_nothing(tmp_path: Path):
    store = FileDeviceStore(tmp_path)
    assert store.load_session() is None
    assert store.sealed("2" * 32) is None
    assert store.blob("0" * 64) is None
    store.close()


def test_the_key_is_private_and_never_shown(tmp_path: Path):
    store = FileDeviceStore(tmp_path / "state")
    key = tmp_path / "state" / "identity.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert store.identity.private_bytes().hex() not in repr(store.identity)
    assert key.read_text().strip() == store.identity.private_bytes().hex()
    store.close()


def test_a_session_truncated_anywhere_is_set_aside_and_the_key_survives(tmp_path: Path, caplog):
    store = FileDeviceStore(tmp_path)
    store.save_session(sealed_state(store))
    path = tmp_path / "session.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.load_session() is None
        assert not path.exists()
        assert (tmp_path / "session.json.damaged").read_bytes() == whole[:length]
    assert len(caplog.records) == len(whole)
    assert "session.json" in caplog.text
    path.write_bytes(whole)
    assert store.load_session() == sealed_state(store)
    store.close()


@pytest.mark.parametrize("content", [b"\x00" * 50, b"null", b"[]", b'{"format": 2}', b"\xff\xfe", b"[" * 100_000])
def test_a_session_that_is_something_else_is_set_aside(tmp_path: Path, content: bytes, caplog):
    store = FileDeviceStore(tmp_path)
    (tmp_path / "session.json").write_bytes(content)
    assert store.load_session() is None
    assert store.load_session() is None
    assert len(caplog.records) == 1
    store.close()


def test_a_session_of_another_device_is_not_taken_over(tmp_path: Path, caplog):
    store = FileDeviceStore(tmp_path)
    store.save_session(SessionState(device_id="0" * 32))
    assert store.load_session() is None
    assert "belongs to device" in caplog.text
    store.close()


def test_a_damaged_key_means_a_new_device_and_says_so_without_showing_it(tmp_path: Path, caplog):
    first = FileDeviceStore(tmp_path)
    secret = first.identity.private_bytes().hex()
    first.save_session(some_state(first))
    first.close()
    (tmp_path / "identity.key").write_text(secret[:-1])
    second = FileDeviceStore(tmp_path)
    assert second.identity.device_id != first.identity.device_id
    assert second.load_session() is None
    assert "enrols anew" in caplog.text
    assert secret[:20] not in caplog.text
    second.close()


def test_a_damaged_blob_is_downloaded_again(tmp_path: Path, caplog):
    store = FileDeviceStore(tmp_path)
    name = sha(b"blob")
    store.put_blob(name, b"blob")
    (tmp_path / "blobs" / name).write_bytes(b"blub")
    assert store.blob(name) is None
    assert "damaged" in caplog.text
    store.put_blob(name, b"blob")
    assert store.blob(name) == b"blob"
    store.close()


def test_the_cache_keeps_what_was_used_last(tmp_path: Path):
    store = FileDeviceStore(tmp_path, cache_bytes=250)
    blobs = [bytes([i]) * 100 for i in range(4)]
    for age, blob in enumerate(blobs[:2]):
        store.put_blob(sha(blob), blob)
        os.utime(tmp_path / "blobs" / sha(blob), (1000 + age, 1000 + age))
    assert store.blob(sha(blobs[0])) == blobs[0]  # now the younger one
    store.put_blob(sha(blobs[2]), blobs[2])
    assert store.blob(sha(blobs[1])) is None
    assert store.blob(sha(blobs[0])) == blobs[0]
    big = b"x" * 1000
    store.put_blob(sha(big), big)
    assert [p.name for p in (tmp_path / "blobs").iterdir()] == [sha(big)]
    store.close()


def test_orphaned_reports_leave_with_the_next_one(tmp_path: Path):
    store = FileDeviceStore(tmp_path)
    store.seal("1" * 32, b"orphan")
    store.seal("2" * 32, b"frame")
    store.discard("2" * 32)
    assert list((tmp_path / "reports").iterdir()) == []
    store.close()


def test_two_processes_cannot_use_one_state_directory(tmp_path: Path):
    store = FileDeviceStore(tmp_path)
    code = f"from client_sdk.store import FileDeviceStore; FileDeviceStore({str(tmp_path)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StateDirLocked" in other.stderr
    assert f"pid {os.getpid()}" in other.stderr
    assert "state directory of its own" in other.stderr
    with pytest.raises(StateDirLocked):
        FileDeviceStore(tmp_path)
    store.close()
    FileDeviceStore(tmp_path).close()


def test_a_lock_left_by_a_killed_process_is_free(tmp_path: Path):
    code = (
        "import os, signal; from client_sdk.store import FileDeviceStore; "
        f"s = FileDeviceStore({str(tmp_path)!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    FileDeviceStore(tmp_path).close()


def test_a_state_directory_that_is_a_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "state").write_text("")
    with pytest.raises(StateDirUnusable, match=r"state.*choose another state directory"):
        FileDeviceStore(tmp_path / "state")


def test_on_a_full_disk_state_is_an_error_and_the_cache_is_not(tmp_path: Path, caplog):
    FileDeviceStore(tmp_path).close()
    store = FileDeviceStore(tmp_path, files=FaultyFiles(OS_FILES, 0, fault=disk_full))
    with pytest.raises(StateDirUnusable, match="No space left"):
        store.save_session(some_state(store))
    with pytest.raises(StateDirUnusable, match="No space left"):
        store.stage_memory(some_memory(1))
    with pytest.raises(StateDirUnusable, match="No space left"):
        store.seal("2" * 32, b"frame")
    with caplog.at_level(logging.WARNING):
        store.put_blob("0" * 64, b"blob")
    assert "not cached" in caplog.text
    store.close()


def test_a_directory_whose_key_cannot_be_written_does_not_stay_locked(tmp_path: Path):
    with pytest.raises(StateDirUnusable):
        FileDeviceStore(tmp_path, files=FaultyFiles(OS_FILES, 0, fault=disk_full))
    FileDeviceStore(tmp_path).close()


def test_in_memory_a_blob_counts_as_cached_only_where_this_device_downloaded_it():
    pool = BlobPool()
    one, two = MemoryDeviceStore(pool=pool), MemoryDeviceStore(pool=pool)
    blob = bytearray(b"blob")
    one.put_blob("a", blob)
    assert one.blob("a") is blob
    assert two.blob("a") is None
    two.put_blob("a", bytearray(b"blob"))
    assert two.blob("a") is blob, "the pool holds one copy"


def test_a_full_pool_forgets_what_was_used_longest_ago():
    pool = BlobPool(max_bytes=10)
    store = MemoryDeviceStore(pool=pool)
    store.put_blob("a", b"aaaa")
    store.put_blob("b", b"bbbb")
    assert store.blob("a") == b"aaaa"
    store.put_blob("c", b"cccc")
    assert store.blob("b") is None
    assert store.blob("a") == b"aaaa"
    store.put_blob("d", b"d" * 11)
    assert store.blob("d") is None


def test_a_device_remembers_a_bounded_number_of_blobs():
    store = MemoryDeviceStore()
    for i in range(40):
        store.put_blob(str(i), b"x")
    assert store.blob("39") == b"x"
    assert store.blob("0") is None


def test_a_pool_serves_many_threads():
    pool = BlobPool(max_bytes=1000)

    def use() -> None:
        for i in range(2000):
            pool.put(str(i % 50), b"x" * 40)
            data = pool.get(str((i + 7) % 50))
            assert data is None or len(data) == 40

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(pool.get(str(i)) is not None for i in range(50)) == 25


def test_an_identity_is_rebuilt_from_its_bytes_and_derives_the_same_ids():
    identity = DeviceIdentity.generate()
    again = DeviceIdentity.from_private_bytes(identity.private_bytes())
    assert again.device_id == identity.device_id
    assert again.report_id("1" * 32) == identity.report_id("1" * 32)
    assert identity.report_id("1" * 32) != identity.report_id("2" * 32)
    assert DeviceIdentity.generate().report_id("1" * 32) != identity.report_id("1" * 32)
    with pytest.raises(ValueError, match="32"):
        DeviceIdentity.from_private_bytes(b"short")


BLOB = np.random.default_rng(5).bytes(10_500)
BLOB_SHA256 = hashlib.sha256(BLOB).hexdigest()


def arrive(folder: Path, files: FileLayer = OS_FILES, up_to: int = len(BLOB)) -> ArrivingBlob:
    """A download that takes up what is there, in chunks of 700 bytes, up to some length."""
    blob = ArrivingBlob(folder, BLOB_SHA256, files, piece_bytes=1000)
    assert bytes(blob) == BLOB[: len(blob)]
    while len(blob) < up_to:
        blob += BLOB[len(blob) : min(len(blob) + 700, up_to)]
    return blob


@pytest.mark.parametrize("up_to", [0, 700, 999, 1000, 2100, 9999, 10_500])
def test_a_download_goes_on_in_another_process_from_its_last_piece(tmp_path: Path, up_to: int):
    assert bytes(arrive(tmp_path, up_to=up_to)) == BLOB[:up_to]
    assert len(ArrivingBlob(tmp_path, BLOB_SHA256, piece_bytes=1000)) == up_to // 1000 * 1000
    assert bytes(arrive(tmp_path)) == BLOB


def test_a_download_that_dies_at_any_write_goes_on_with_right_bytes(tmp_path: Path):
    survives = 0
    while True:
        folder = tmp_path / str(survives)
        folder.mkdir()
        try:
            arrive(folder, FaultyFiles(OS_FILES, survives, chunk=333, flushes=False))
            break
        except Killed:
            assert bytes(arrive(folder)) == BLOB
        survives += 1
    assert survives > 50


def test_pieces_of_another_blob_or_of_another_length_are_forgotten(tmp_path: Path):
    arrive(tmp_path)
    assert len(ArrivingBlob(tmp_path, "0" * 64, piece_bytes=1000)) == 0
    assert list(tmp_path.iterdir()) == []
    arrive(tmp_path)
    (tmp_path / f"{BLOB_SHA256}.000003").write_bytes(b"short")
    assert len(ArrivingBlob(tmp_path, BLOB_SHA256, piece_bytes=1000)) == 3000
    assert len(list(tmp_path.iterdir())) == 3


def test_a_blob_that_was_not_the_one_named_begins_anew_and_a_cached_one_leaves_no_pieces(tmp_path: Path):
    arrive(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []
    with closing(FileDeviceStore(tmp_path / "state")) as store:
        data = store.arriving(BLOB_SHA256)
        data += BLOB * 300
        assert len(list((tmp_path / "state" / "arriving").iterdir())) == 3
        store.put_blob(BLOB_SHA256, data)
        assert list((tmp_path / "state" / "arriving").iterdir()) == []


def test_a_full_disk_keeps_no_pieces_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert bytes(arrive(tmp_path, FaultyFiles(OS_FILES, 3, fault=disk_full))) == BLOB
    assert len([r for r in caplog.records if "is not kept" in r.getMessage()]) == 1


class BadSector(OsFiles):
    """One piece that cannot be read."""

    def read(self, path: Path) -> bytes:
        if path.name.endswith(".000004"):
            raise input_output_error()
        return super().read(path)


def test_a_piece_that_cannot_be_read_costs_what_came_after_it_and_not_the_device(tmp_path: Path):
    arrive(tmp_path)
    assert len(ArrivingBlob(tmp_path, BLOB_SHA256, BadSector(), piece_bytes=1000)) == 4000
    assert bytes(arrive(tmp_path)) == BLOB
