"""A training that is left anywhere and goes on from the bytes on the disk ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.checkpoint import Checkpoint, CheckpointManager
from client_sdk.checkpoint_file import CheckpointKey, pack, unpack
from client_sdk.errors import CheckpointCorrupted, CheckpointError
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.training import TrainingState
from tests.checkpoints import Training, state_bits
from tests.devices import ToyProgram
from tests.faults import DiskModel

FOLDER = Path("/state/checkpoints")
MAX_BYTES = 10**6

plans = st.builds(
    TrainingPlan,
    local_epochs=st.integers(1, 3),
    batch_size=st.sampled_from([4, 8, 12, 16, 24]),
    learning_rate=st.floats(0.01, 0.5),
    prox_mu=st.sampled_from([0.0, 0.5]),
    shuffle=st.booleans(),
    max_steps=st.none() | st.integers(1, 8),
    algorithm=st.sampled_from(["fedavg", "fednova"]),
) | st.builds(
    TrainingPlan,
    local_epochs=st.integers(1, 3),
    batch_size=st.sampled_from([4, 8, 12]),
    learning_rate=st.floats(0.01, 0.5),
    max_steps=st.none() | st.integers(1, 8),
    algorithm=st.just("scaffold"),
)
keys = st.none() | st.binary(min_size=32, max_size=32)


@pytest.fixture(scope="module")
def program(softmax_bundle: Path) -> Iterator[Program]:
    opened = load_program(softmax_bundle, "native")
    yield opened
    opened.close()


@settings(max_examples=80)
@given(
    plan=plans,
    num_samples=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    slice_size=st.none() | st.sampled_from([4, 8]),
    interruptions=st.lists(st.integers(0, 6), max_size=4),
    key=keys,
)
def test_an_interrupted_training_ends_with_the_same_bits(
    program: Program,
    plan: TrainingPlan,
    num_samples: int,
    seed: int,
    slice_size: int | None,
    interruptions: list[int],
    key: bytes | None,
):
    training = Training(program, plan, num_samples, seed, slice_size)
    disk = DiskModel()
    for calls in interruptions:
        # Each life is a trainer and a manager of its own: nothing but the disk connects them.
        life = Training(program, plan, num_samples, seed, slice_size)
        manager = CheckpointManager(FOLDER, key=key, files=disk)
        run = life.resumed(manager)
        for _ in range(calls):
            if not run.finished:
                run.advance()
        manager.save(life.checkpoint(run))
    assert training.life(CheckpointManager(FOLDER, key=key, files=disk)) == training.undisturbed()


@settings(max_examples=60)
@given(
    plan=plans, seed=st.integers(0, 2**64 - 1), calls=st.integers(0, 12), key=keys, generation=st.integers(0, 2**63 - 1)
)
def test_a_checkpoint_survives_its_bytes(plan: TrainingPlan, seed: int, calls: int, key: bytes | None, generation: int):
    training = Training(ToyProgram(), plan.model_copy(update={"batch_size": 8}), seed=seed)
    run = training.begin()
    for _ in range(calls):
        if not run.finished:
            run.advance()
    before = training.checkpoint(run)
    wrapped = None if key is None else CheckpointKey(key)
    unpacked = unpack(b"".join(pack(before.to_bytes(), generation, wrapped, bytes)), wrapped, MAX_BYTES)
    after = Checkpoint.from_bytes(unpacked.payload, MAX_BYTES)
    assert unpacked.generation == generation
    assert after.binding == before.binding
    assert state_bits(after.state) == state_bits(before.state)
    assert after.to_bytes() == before.to_bytes()


@given(data=st.binary(max_size=300), magic=st.booleans(), key=keys)
def test_no_bytes_raise_anything_untyped(data: bytes, magic: bool, key: bytes | None):
    data = b"pfckpt\r\n" + data if magic else data
    with pytest.raises(CheckpointError):
        unpack(data, None if key is None else CheckpointKey(key), MAX_BYTES)


@given(data=st.binary(max_size=300))
def test_no_content_raises_anything_untyped(data: bytes):
    with pytest.raises(CheckpointCorrupted):
        Checkpoint.from_bytes(data, MAX_BYTES)


good = {
    "progress": np.zeros(5, np.int64),
    "losses": np.zeros(4),
    "weights": np.zeros(3, np.float32),
    "memory": np.zeros(40, np.uint8),
}
arrays = st.sampled_from([np.zeros(n, d) for n in (0, 3, 4, 5) for d in (np.float32, np.float64, np.int64, np.uint8)])


@given(
    tensors=st.dictionaries(
        st.sampled_from([*good, "accumulator", "other"]), arrays | st.just(np.zeros((1, 3), np.float32))
    ),
    dropped=st.sets(st.sampled_from(list(good))),
    metadata=st.dictionaries(st.sampled_from(["binding", "x"]), st.sampled_from(["", "{}", "null", "[" * 10_000])),
)
def test_no_whole_frame_raises_anything_untyped(tensors: dict, dropped: set, metadata: dict):
    content = {name: array for name, array in (good | tensors).items() if name not in dropped}
    with pytest.raises(CheckpointCorrupted):
        Checkpoint.from_bytes(encode_frame(content, metadata), MAX_BYTES)


@given(header=st.binary(min_size=0, max_size=100), body=st.binary(max_size=50), version=st.integers(0, 3))
def test_no_header_whose_checksum_matches_raises_anything_untyped(header: bytes, body: bytes, version: int):
    summed = b"pfckpt\r\n" + version.to_bytes(4, "little") + len(header).to_bytes(4, "little")
    data = summed + hashlib.sha256(summed + header).digest() + header + body
    with pytest.raises(CheckpointError):
        unpack(data, None, MAX_BYTES)


def test_a_state_is_all_that_there_is():
    """A field that is added to the state has to be added to the checkpoint: else this notices."""
    state = TrainingState(np.ones(9, np.float32), np.full(9, 2, np.float32), 3.0, 4, 5, 6, 7, 8.0, 9, 10.0, 11.0)
    training = Training(ToyProgram(), TrainingPlan())
    found = Checkpoint.from_bytes(Checkpoint(training.binding, state).to_bytes(), MAX_BYTES).state
    assert state_bits(found) == state_bits(state)
    values = [v for v in vars(found).values() if not isinstance(v, np.ndarray)]
    assert values == [float(v) if v in {3, 8, 10, 11} else v for v in range(3, 12)]
