"""What a device carries from one report to the next: staged, settled, damaged, and killed at any byte."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client_sdk import memory
from client_sdk.files import OS_FILES
from client_sdk.memory import DeviceMemory, MemoryFiles
from client_sdk.store import DeviceStore, FileDeviceStore, MemoryDeviceStore
from tests.faults import FaultyFiles, Killed

TASK, OTHER_TASK = "f" * 32, "e" * 32
FIRST, SECOND, THIRD = (f"{number:032x}" for number in (1, 2, 3))


def make_memory(report_id: str, task_id: str = TASK) -> DeviceMemory:
    """A memory that says which report it is of."""
    number = int(report_id, 16)
    vectors = {"residual": np.full(3, number, np.float32), "control": np.array([-number], np.float32)}
    return DeviceMemory(task_id, report_id, vectors)


def held(store: DeviceStore, task_id: str = TASK) -> str | None:
    """The report whose memory counts; its vectors are those that were staged."""
    found = store.memory(task_id)
    if found is None:
        return None
    expected = make_memory(found.report_id, task_id).vectors
    assert {n: v.tobytes() for n, v in found.vectors.items()} == {n: v.tobytes() for n, v in expected.items()}
    return found.report_id


def accept(store: DeviceStore, report_id: str, task_id: str = TASK) -> None:
    store.stage_memory(make_memory(report_id, task_id))
    store.settle_memory(report_id, accepted=True)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DeviceStore]:
    opened: DeviceStore = FileDeviceStore(tmp_path / "state") if request.param == "file" else MemoryDeviceStore()
    yield opened
    opened.close()


# --- the transaction, in both stores -------------------------------------------------------------------------


def test_a_memory_counts_from_when_its_report_is_accepted(store: DeviceStore):
    assert held(store) is None
    store.stage_memory(make_memory(FIRST))
    assert held(store) is None
    assert store.has_staged_memory(FIRST)
    store.settle_memory(FIRST, accepted=True)
    assert held(store) == FIRST
    assert not store.has_staged_memory(FIRST)
    accept(store, SECOND)
    assert held(store) == SECOND


def test_the_memory_of_a_report_that_came_to_nothing_is_thrown_away(store: DeviceStore):
    accept(store, FIRST)
    store.stage_memory(make_memory(SECOND))
    store.settle_memory(SECOND, accepted=False)
    assert held(store) == FIRST
    assert not store.has_staged_memory(SECOND)
    store.settle_memory(SECOND, accepted=False)
    assert held(store) == FIRST


def test_settling_twice_is_harmless(store: DeviceStore):
    accept(store, FIRST)
    store.settle_memory(FIRST, accepted=True)
    assert held(store) == FIRST


def test_training_again_replaces_what_was_staged(store: DeviceStore):
    store.stage_memory(make_memory(FIRST))
    accept(store, FIRST)
    assert held(store) == FIRST


def test_an_accepted_report_whose_memory_is_lost_leaves_none(store: DeviceStore):
    """What the former memory held back was sent with it, and must not be sent again."""
    accept(store, FIRST)
    store.settle_memory(SECOND, accepted=True)
    assert held(store) is None
    accept(store, THIRD)
    assert held(store) == THIRD


def test_a_report_without_a_memory_can_be_settled(store: DeviceStore):
    store.settle_memory(FIRST, accepted=False)
    store.settle_memory(FIRST, accepted=True)
    assert held(store) is None


def test_only_the_present_tasks_memory_is_kept(store: DeviceStore):
    accept(store, FIRST)
    assert held(store, OTHER_TASK) is None
    assert held(store) == FIRST, "asking for another task's forgets nothing"
    accept(store, SECOND, OTHER_TASK)
    assert held(store, OTHER_TASK) == SECOND
    assert held(store) is None


def test_what_was_staged_by_a_forgotten_session_leaves_with_the_next_report(store: DeviceStore):
    store.stage_memory(make_memory(FIRST))
    accept(store, SECOND)
    assert not store.has_staged_memory(FIRST)
    assert held(store) == SECOND


def test_a_vector_of_another_length_is_not_used():
    remembered = make_memory(FIRST)
    assert remembered.vector("residual", 3) is remembered.vectors["residual"]
    assert remembered.vector("residual", 4) is None
    assert remembered.vector("momentum", 3) is None


# --- on the disk ---------------------------------------------------------------------------------------------


def test_a_memory_is_there_after_a_restart(tmp_path: Path):
    first = FileDeviceStore(tmp_path)
    accept(first, FIRST)
    first.stage_memory(make_memory(SECOND))
    first.close()
    second = FileDeviceStore(tmp_path)
    assert held(second) == FIRST
    assert second.has_staged_memory(SECOND)
    second.settle_memory(SECOND, accepted=True)
    assert held(second) == SECOND
    assert [p.name for p in (tmp_path / "memory").iterdir()] == ["current"]
    second.close()


def test_a_memory_is_only_what_was_written():
    data = make_memory(FIRST).to_bytes()
    again = DeviceMemory.from_bytes(data)
    assert again.to_bytes() == data
    assert (again.task_id, again.report_id) == (TASK, FIRST)
    for at in range(len(data)):
        with pytest.raises(ValueError, match="checksum"):
            DeviceMemory.from_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            DeviceMemory.from_bytes(data[:at])


@pytest.mark.parametrize("fate", [True, False])
def test_a_process_killed_at_any_step_leaves_the_old_memory_or_the_new(tmp_path: Path, fate: bool):
    """Every byte of a write is a step, and so is every other call of the system."""
    counting = {FIRST, SECOND} if fate else {FIRST}
    survives, seen = 0, set()
    while True:
        (tmp_path / "current").write_bytes(make_memory(FIRST).to_bytes())
        files = MemoryFiles(tmp_path, FaultyFiles(OS_FILES, survives, flushes=False))
        try:
            files.stage(make_memory(SECOND))
            files.settle(SECOND, accepted=fate)
        except Killed:
            pass
        else:
            break
        files = MemoryFiles(tmp_path, FaultyFiles(OS_FILES, chunk=10**6, flushes=False))  # the next process
        present, staged = files.current(TASK), files.is_staged(SECOND)
        assert present is not None
        assert present.report_id in counting
        seen.add((present.report_id, staged))
        if not staged and present.report_id == FIRST:
            files.stage(make_memory(SECOND))  # it trains again
        files.settle(SECOND, accepted=fate)
        settled = files.current(TASK)
        assert settled is not None
        assert settled.report_id == (SECOND if fate else FIRST)
        survives += 1
    assert survives > len(make_memory(SECOND).to_bytes()), "every byte was a step"
    assert seen == {(FIRST, False), (FIRST, True), *((SECOND, False) for _ in range(fate))}


@pytest.mark.parametrize("content", [b"", b"\x00" * 500, b"x", bytes(31)])
def test_a_damaged_memory_is_set_aside_and_the_device_begins_anew(tmp_path: Path, content: bytes, caplog):
    store = FileDeviceStore(tmp_path)
    accept(store, FIRST)
    (tmp_path / "memory" / "current").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert held(store) is None
        assert held(store) is None
    assert len(caplog.records) == 1
    assert "goes on without it" in caplog.text
    assert (tmp_path / "memory" / "current.damaged").read_bytes() == content
    accept(store, SECOND)
    assert held(store) == SECOND
    store.close()


def test_a_frame_that_is_no_memory_is_set_aside(tmp_path: Path, caplog):
    store = FileDeviceStore(tmp_path)
    raw = make_memory(FIRST).to_bytes().replace(b"report_id", b"report-id")
    (tmp_path / "memory" / "current").write_bytes(memory.hashlib.sha256(raw[32:]).digest() + raw[32:])
    assert held(store) is None
    assert "not a device's memory" in caplog.text
    store.close()


def test_a_damaged_staged_memory_does_not_count_as_staged(tmp_path: Path, caplog):
    store = FileDeviceStore(tmp_path)
    accept(store, FIRST)
    store.stage_memory(make_memory(SECOND))
    path = tmp_path / "memory" / f"{SECOND}.staged"
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.has_staged_memory(SECOND)
    assert "checksum" in caplog.text
    accept(store, SECOND)
    assert held(store) == SECOND
    store.close()


def test_a_memory_under_another_reports_name_does_not_count_as_staged(tmp_path: Path):
    store = FileDeviceStore(tmp_path)
    store.stage_memory(make_memory(FIRST))
    (tmp_path / "memory" / f"{FIRST}.staged").rename(tmp_path / "memory" / f"{SECOND}.staged")
    assert not store.has_staged_memory(SECOND)
    store.close()
