"""A device that remembers: error feedback and SCAFFOLD over several reports, through kills, refusals and damage."""

from __future__ import annotations

import copy
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk import MobileClient, events
from client_sdk.client import RunSummary
from client_sdk.errors import BundleMismatch, TransportUnavailable
from client_sdk.files import OS_FILES
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import CONTROL, RESIDUAL, DeviceMemory
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import (
    BodyAltered,
    ConfigurationError,
    InvalidUpdate,
    LeaseExpired,
    PocketfedError,
    ProgramInputError,
)
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import CONTROL_TENSOR
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.session_state import Phase, RetryPolicy
from client_sdk.store import DeviceStore, FileDeviceStore, MemoryDeviceStore
from client_sdk.training import Controls, LocalTrainer, TrainingResult
from tests.devices import NUM_PARAMETERS, ToyProgram, ToyServer, make_assignment, make_data, make_model, sha
from tests.faults import FaultyFiles, Killed

IDENTITY = DeviceIdentity.from_private_bytes(bytes(range(32)))
TASK = make_assignment().task_id
CONTROL_OF_SERVER = np.linspace(-0.2, 0.3, NUM_PARAMETERS, dtype=np.float32)
LINE = "topk:0.3"
CODEC = Codec(CompressionSpec.parse(LINE), NUM_PARAMETERS)
MODES: dict[str, Callable[[ToyServer], ToyServer]] = {
    "compressed": lambda server: server.compress(LINE),
    "scaffold": lambda server: server.scaffold(CONTROL_OF_SERVER),
    "personal layers": lambda server: server.keep("bias"),
}


def live(server: ToyServer, store: DeviceStore, told: list[events.Event] | None = None, **changes: Any) -> RunSummary:
    """One process of the device, from its saved state to its end."""
    settings: dict[str, Any] = {"policy": RetryPolicy(max_attempts=4), "wait": lambda *_: None} | changes
    client = MobileClient(
        ToyProgram(server.manifest),
        DeviceProfile("toy"),
        data=make_data(),
        transport=server.device(store.identity.device_id),
        store=store,
        rng=random.Random(0),
        on_event=(told if told is not None else []).append,
        **settings,
    )
    return client.run()


def train(controls: Controls | None = None, **changes: Any) -> TrainingResult:
    """Honest training of any of the server's assignments."""
    assignment = make_assignment(1)
    plan = assignment.plan.model_copy(update=changes)
    weights = np.frombuffer(decode_frame(make_model()).payload, np.float32)
    return LocalTrainer(ToyProgram()).train(weights, *make_data(), plan, assignment.shuffle_seed, controls=controls)


def vectors(store: DeviceStore) -> dict[str, bytes]:
    """What the device remembers."""
    memory = store.memory(TASK)
    return {} if memory is None else {name: vector.tobytes() for name, vector in memory.vectors.items()}


def in_order(server: ToyServer) -> list[np.ndarray]:
    """The reports' tensors in the order of their assignments."""
    return [tensor for _, tensor in sorted(server.updates().items())]


def open_store(folder: Path, survives: int = -1, chunk: int = 10**6) -> FileDeviceStore:
    """The state directory of the one device of these tests."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity.key").write_text(IDENTITY.private_bytes().hex())
    return FileDeviceStore(folder, files=FaultyFiles(OS_FILES, survives, chunk=chunk, flushes=False))


# --- what is sent --------------------------------------------------------------------------------------------


def test_what_a_report_leaves_out_comes_with_the_next_bit_for_bit():
    server, store = ToyServer(work=4).compress(LINE), MemoryDeviceStore(IDENTITY)
    delta = train().delta
    residual = np.zeros(NUM_PARAMETERS, np.float32)
    for number in range(4):
        server.work = number + 1
        live(server, store)
        decoded = CODEC.decode(in_order(server)[number].tobytes(), 7)
        assert np.count_nonzero(decoded) <= 2
        memory = store.memory(TASK)
        assert memory is not None
        assert list(memory.vectors) == [RESIDUAL]
        assert np.array_equal(decoded + memory.vectors[RESIDUAL], delta + residual)
        residual = memory.vectors[RESIDUAL]
    assert np.any(residual)


def test_scaffold_sends_both_deltas_and_adds_the_second_to_its_own_control():
    server, store = ToyServer(work=3).scaffold(CONTROL_OF_SERVER), MemoryDeviceStore(IDENTITY)
    own = np.zeros(NUM_PARAMETERS, np.float32)
    for number in range(3):
        server.work = number + 1
        live(server, store)
        expected = train(Controls(CONTROL_OF_SERVER, own), algorithm="scaffold")
        assert expected.control_delta is not None
        sent = in_order(server)[number]
        assert sent.tobytes() == expected.delta.tobytes() + expected.control_delta.tobytes()
        own = own + expected.control_delta
        memory = store.memory(TASK)
        assert memory is not None
        assert {name: v.tobytes() for name, v in memory.vectors.items()} == {CONTROL: own.tobytes()}
    assert in_order(server)[1].tobytes() != in_order(server)[0].tobytes(), "the control changed what was trained"


def test_fednova_sends_the_normalised_delta_and_remembers_nothing():
    server, store = ToyServer(), MemoryDeviceStore(IDENTITY)
    server.amend = {"plan": make_assignment().plan.model_copy(update={"algorithm": "fednova"})}
    live(server, store)
    result = train()
    assert in_order(server)[0].tobytes() == (result.delta.astype(np.float64) / result.steps).astype("<f4").tobytes()
    assert store.memory(TASK) is None


def test_another_model_version_keeps_the_memory_and_another_task_does_not():
    server, store = ToyServer(work=1).compress(LINE), MemoryDeviceStore(IDENTITY)
    live(server, store)
    residual = vectors(store)
    server.work, server.amend["model_version"] = 2, 41
    live(server, store)
    assert vectors(store) != residual
    decoded = CODEC.decode(in_order(server)[1].tobytes(), 7)
    carried = train().delta + np.frombuffer(residual[RESIDUAL], np.float32)
    assert np.array_equal(decoded + np.frombuffer(vectors(store)[RESIDUAL], np.float32), carried)
    server.work, server.amend["task_id"] = 3, "e" * 32
    live(server, store)
    assert in_order(server)[2].tobytes() == in_order(server)[0].tobytes(), "it began anew"
    assert store.memory(TASK) is None


def test_the_savings_of_a_report_are_told():
    told: list[events.Event] = []
    server = ToyServer(work=1).compress(LINE)
    live(server, MemoryDeviceStore(IDENTITY), told)
    (uploaded,) = (e for e in told if isinstance(e, events.Uploaded))
    (_, frame) = next(iter(server.reports.values()))
    assert (uploaded.num_bytes, uploaded.dense_bytes) == (len(frame), 4 * NUM_PARAMETERS)


def test_a_later_process_still_tells_them(tmp_path: Path):
    server, store = ToyServer(work=1).compress(LINE), open_store(tmp_path)
    seal_and_stop(server, store)
    store.close()
    store, told = open_store(tmp_path), []
    live(server, store, told)
    assert [e.dense_bytes for e in told if isinstance(e, events.Uploaded)] == [4 * NUM_PARAMETERS]
    assert not any(isinstance(e, events.TrainingProgress) for e in told)
    store.close()


# --- reports that come to nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [LeaseExpired, InvalidUpdate])
def test_a_report_that_was_not_accepted_leaves_the_memory_as_it_was(mode: str, error: type[PocketfedError]):
    server, store = MODES[mode](ToyServer(work=1)), MemoryDeviceStore(IDENTITY)
    live(server, store)
    before, first = vectors(store), dict(server.reports)
    assert before

    def refuse(name: str) -> None:
        if name == "upload":
            server.outstanding.clear()
            raise error("no")

    server.work, server.before = 2, refuse
    live(server, store)
    assert (vectors(store), server.reports) == (before, first)
    server.work, server.before = 3, lambda _: None
    live(server, store)
    undisturbed, other = MODES[mode](ToyServer(work=2)), MemoryDeviceStore(IDENTITY)
    live(undisturbed, other)
    assert vectors(store) == vectors(other)
    assert in_order(server)[-1].tobytes() == in_order(undisturbed)[-1].tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_an_altered_body_is_sent_again_and_the_memory_counts_once(mode: str):
    server, store = MODES[mode](ToyServer(work=2)), MemoryDeviceStore(IDENTITY)
    alter = iter([True, True, True, False, True])

    def altered(name: str) -> None:
        if name == "upload" and next(alter, False):
            raise BodyAltered

    server.before = altered
    assert live(server, store).reports == 2
    undisturbed, other = MODES[mode](ToyServer(work=2)), MemoryDeviceStore(IDENTITY)
    live(undisturbed, other)
    assert (server.reports, vectors(store)) == (undisturbed.reports, vectors(other))


# --- kills and damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_device_killed_at_any_step_of_its_disk_sends_and_remembers_the_same(tmp_path: Path, mode: str):
    """The second report of a device: at every call of the system, and in the middle of what it writes."""
    origin = MODES[mode](ToyServer(work=1))
    store = open_store(tmp_path / "origin")
    live(origin, store)
    store.close()
    origin.work = 2
    undisturbed, memory = copy.deepcopy(origin), MemoryDeviceStore(IDENTITY)
    live(MODES[mode](ToyServer(work=1)), memory)
    live(undisturbed, memory)
    first, second = vectors_of(tmp_path / "origin"), vectors(memory)
    assert first != second
    survives, seen = 0, set()
    while True:
        folder = tmp_path / "device"
        shutil.copytree(tmp_path / "origin", folder)
        server, store = copy.deepcopy(origin), open_store(folder, survives, chunk=400)
        try:
            live(server, store)
        except Killed:
            killed = True
        else:
            killed = False
        store.close()
        store = open_store(folder)
        seen.add((len(server.reports) == 2, vectors(store) == second))
        assert vectors(store) in (first, second)
        live(server, store)
        assert server.reports == undisturbed.reports
        assert vectors(store) == second
        store.close()
        shutil.rmtree(folder)
        if not killed:
            break
        survives += 1
    assert survives > 50
    assert seen == {(False, False), (True, False), (True, True)}, "never a memory whose report the server does not hold"


def vectors_of(folder: Path) -> dict[str, bytes]:
    store = open_store(folder)
    try:
        return vectors(store)
    finally:
        store.close()


def seal_and_stop(server: ToyServer, store: DeviceStore) -> None:
    """A process that ends with a report on its disk that the server does not hold."""

    def offline(name: str) -> None:
        if name == "upload":
            raise TransportUnavailable("offline")

    server.before = offline
    assert live(server, store).cause == "gave-up"
    server.before = lambda _: None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", ["staged", "frame", "both"])
def test_a_sealed_report_without_its_memory_is_trained_again(tmp_path: Path, mode: str, damage: str, caplog):
    server, store = MODES[mode](ToyServer(work=2)), open_store(tmp_path)
    undisturbed, other = MODES[mode](ToyServer(work=2)), MemoryDeviceStore(IDENTITY)
    live(undisturbed, other)
    seal_and_stop(server, store)
    store.close()
    if damage != "frame":
        (path,) = (tmp_path / "memory").glob("*.staged")
        path.write_bytes(path.read_bytes()[:50])
    if damage != "staged":
        (path,) = (tmp_path / "reports").glob("*.frame")
        path.write_bytes(path.read_bytes()[:50])
    store = open_store(tmp_path)
    live(server, store)
    assert (server.reports, vectors(store)) == (undisturbed.reports, vectors(other))
    assert ("checksum" in caplog.text) is (damage == "staged"), "a report that is damaged itself is not asked for more"
    store.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_memory_is_set_aside_and_the_device_begins_anew(tmp_path: Path, mode: str, caplog):
    server, store = MODES[mode](ToyServer(work=1)), open_store(tmp_path)
    live(server, store)
    once = vectors(store)
    (tmp_path / "memory" / "current").write_bytes(b"damaged")
    server.work = 2
    with caplog.at_level(logging.WARNING):
        live(server, store)
    assert "goes on without it" in caplog.text
    assert vectors(store) == once, "the second report was made like a first one"
    assert in_order(server)[0].tobytes() == in_order(server)[1].tobytes()
    store.close()


def test_a_memory_of_another_size_is_not_used():
    server, store = ToyServer(work=1).compress(LINE), MemoryDeviceStore(IDENTITY)
    store.stage_memory(DeviceMemory(TASK, "1" * 32, {RESIDUAL: np.ones(3, np.float32)}))
    store.settle_memory("1" * 32, accepted=True)
    live(server, store)
    assert np.array_equal(
        CODEC.decode(in_order(server)[0].tobytes(), 7) + np.frombuffer(vectors(store)[RESIDUAL], np.float32),
        train().delta,
    )


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.SEALED])
def test_a_report_sealed_before_an_upgrade_is_made_again(phase: Phase):
    """An older version wrote fewer facts, which the server refuses for good."""
    server, store = ToyServer(work=1), MemoryDeviceStore(IDENTITY)
    seal_and_stop(server, store)
    state = store.load_session()
    assert state is not None
    assert state.report_id is not None
    sealed = store.sealed(state.report_id)
    assert sealed is not None
    frame = decode_frame(sealed)
    new = {"algorithm", "compression", "compression_seed"}
    older = encode_frame(frame.tensors, {k: v for k, v in frame.metadata.items() if k not in new})
    store.seal(state.report_id, older)
    report_sha256 = sha(older) if phase is Phase.SEALED else None
    store.save_session(state.model_copy(update={"phase": phase, "report_sha256": report_sha256}))
    assert live(server, store).reports == 1
    assert [bytes(frame) for _, frame in server.reports.values()] == [bytes(sealed)]


# --- assignments that cannot be fulfilled --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compression": "zip:9"}, ConfigurationError, "there is no method 'zip:9'"),
        ({"compression": "topk:1e-1"}, BundleMismatch, "not as topk:0.1"),
        ({"compression": LINE, "max_report_bytes": 10}, BundleMismatch, "does not fit"),
    ],
)
def test_a_compression_that_the_device_cannot_do_is_given_back(
    changes: dict[str, Any], error: type[PocketfedError], message: str
):
    server = ToyServer()
    server.amend = changes
    summary = live(server, MemoryDeviceStore(IDENTITY))
    assert summary.cause == "refused"
    assert isinstance(summary.error, error)
    assert message in str(summary.error)
    assert len(server.abandoned) == 1
    assert server.reports == {}


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"garbage", PocketfedError),
        (encode_frame({CONTROL_TENSOR: np.zeros(NUM_PARAMETERS + 1, np.float32)}), BundleMismatch),
        (encode_frame({CONTROL_TENSOR: np.zeros(NUM_PARAMETERS)}), BundleMismatch),
        (encode_frame({"c": np.zeros(NUM_PARAMETERS, np.float32)}), BundleMismatch),
        (
            encode_frame({n: np.zeros(NUM_PARAMETERS, np.float32) for n in (CONTROL_TENSOR, "more")}),
            BundleMismatch,
        ),
        (encode_frame({CONTROL_TENSOR: np.full(NUM_PARAMETERS, np.nan, np.float32)}), ProgramInputError),
    ],
)
def test_a_control_that_is_none_is_given_back(frame: bytes, error: type[PocketfedError]):
    server = ToyServer().scaffold(CONTROL_OF_SERVER)
    server.blobs[sha(frame)] = frame
    server.amend["control_sha256"] = sha(frame)
    summary = live(server, MemoryDeviceStore(IDENTITY))
    assert summary.cause == "refused"
    assert isinstance(summary.error, error)
    assert server.reports == {}
    assert len(server.abandoned) == 1
