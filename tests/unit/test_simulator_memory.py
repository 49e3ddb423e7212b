"""Memories of simulated devices on disk: which of them counts is the journal's to say."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.blobs import BlobPool
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import RESIDUAL, DeviceMemory
from simulator.errors import ResumeMismatch
from simulator.memory import FleetMemory

IDENTITY = DeviceIdentity.from_private_bytes(bytes(range(32)))
FIRST, SECOND, THIRD = (f"{n:032x}" for n in range(3))


def memory_of(assignment_id, value):
    vectors = {RESIDUAL: np.full(3, value, np.float32)}
    return DeviceMemory("task", IDENTITY.report_id(assignment_id), vectors)


def fleet_of(folder, *accepted):
    fleet = FleetMemory(folder, {4: accepted})
    return fleet, fleet.store(4, IDENTITY, BlobPool())


def store_of(folder, *accepted):
    return fleet_of(folder, *accepted)[1]


def deliver(store, assignment_id, value, *, accepted=True):
    store.stage_memory(memory_of(assignment_id, value))
    store.settle_memory(IDENTITY.report_id(assignment_id), accepted=accepted)


def remembered(store):
    found = store.memory("task")
    return None if found is None else float(found.vectors[RESIDUAL][0])


def test_a_resumed_device_has_the_memory_of_its_last_session_that_the_journal_knows(tmp_path):
    store = store_of(tmp_path / "memory")
    assert remembered(store) is None
    for assignment_id, value in ((FIRST, 1.0), (SECOND, 2.0), (THIRD, 3.0)):
        deliver(store, assignment_id, value)
    assert remembered(store) == 3.0
    assert remembered(store_of(tmp_path / "memory", FIRST, SECOND, THIRD)) == 3.0
    # Killed between the upload and the journal's line: the third session is played again, from the second's memory.
    again = store_of(tmp_path / "memory", FIRST, SECOND)
    assert remembered(again) == 2.0
    deliver(again, THIRD, 3.0)
    assert remembered(again) == 3.0
    assert len(list((tmp_path / "memory" / "4").iterdir())) == 2, "no more than two are kept"


def test_a_refused_report_leaves_the_memory_as_it_was(tmp_path):
    store = store_of(tmp_path / "memory")
    deliver(store, FIRST, 1.0)
    deliver(store, SECOND, 2.0, accepted=False)
    assert remembered(store) == 1.0
    assert remembered(store_of(tmp_path / "memory", FIRST)) == 1.0


def test_a_memory_that_is_lost_or_damaged_ends_the_resume_with_a_word(tmp_path):
    folder = tmp_path / "memory"
    deliver(store_of(folder), FIRST, 1.0)
    with pytest.raises(ResumeMismatch, match=r"device 4 remembered is lost .*start it anew"):
        store_of(folder, SECOND)
    (path,) = (folder / "4").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeMismatch, match="checksum"):
        store_of(folder, FIRST)


def test_a_task_that_leaves_nothing_behind_writes_nothing(tmp_path):
    store = store_of(tmp_path / "memory", FIRST)
    store.settle_memory(IDENTITY.report_id(SECOND), accepted=False)
    assert remembered(store) is None
    assert not (tmp_path / "memory").exists()


def test_a_report_that_was_late_in_virtual_time_leaves_no_trace_also_after_a_resume(tmp_path):
    folder = tmp_path / "memory"
    fleet, store = fleet_of(folder)
    deliver(store, FIRST, 1.0)
    deliver(store, SECOND, 2.0)
    fleet.take_back(4, FIRST)
    assert remembered(store) == 2.0, "only the newest can be taken back"
    fleet.take_back(4, SECOND)
    assert remembered(store) == 1.0
    # Killed here: the journal knows both as accepted, and the replay takes the second one back again.
    fleet, store = fleet_of(folder, FIRST, SECOND)
    assert remembered(store) == 2.0
    fleet.take_back(4, SECOND)
    assert remembered(store) == 1.0
    deliver(store, THIRD, 3.0)
    assert remembered(store_of(folder, FIRST, SECOND, THIRD)) == 3.0
    assert {path.name for path in (folder / "4").iterdir()} == {IDENTITY.report_id(FIRST), IDENTITY.report_id(THIRD)}
