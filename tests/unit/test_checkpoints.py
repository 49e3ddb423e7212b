"""What a checkpoint holds, what is wrong with a file, and what is kept."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_sdk.checkpoint import Checkpoint, CheckpointManager, data_fingerprint
from client_sdk.checkpoint_file import CheckpointKey, unpack
from client_sdk.checkpoint_schedule import CheckpointSchedule
from client_sdk.errors import (
    CheckpointCorrupted,
    CheckpointError,
    CheckpointKeyError,
    CheckpointMismatch,
    CheckpointTooLarge,
    CheckpointTruncated,
    CheckpointVersionError,
    IllegalTransition,
    StateDirUnusable,
)
from client_sdk.files import OsFiles
from client_sdk.memory import RESIDUAL
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.training import TrainingPlan
from tests.checkpoints import Training, state_bits
from tests.devices import ToyProgram
from tests.faults import input_output_error

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
PLAN = TrainingPlan(local_epochs=2, batch_size=8, learning_rate=0.25)


@pytest.fixture
def training() -> Training:
    return Training(ToyProgram(), PLAN)


@pytest.fixture
def half(training: Training) -> Checkpoint:
    """In the middle of the first step."""
    run = training.begin()
    run.advance()
    return training.checkpoint(run)


def saved(folder: Path, checkpoint: Checkpoint, key: bytes | None = None) -> Path:
    CheckpointManager(folder, key=key).save(checkpoint)
    return max(folder.iterdir())


def problem(path: Path, key: bytes | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(path.parent, key=key).read(path)
    return caught.value


# --- a training under way ------------------------------------------------------------------------------------


def test_a_training_can_be_watched(training: Training):
    run = training.begin()
    assert (run.finished, run.steps, run.examples_done, run.total_examples) == (False, 0, 0, 22)
    assert np.isnan(run.last_loss)
    seen = []
    while not run.finished:
        run.advance()
        seen.append((run.steps, run.examples_done, run.at_step_boundary))
        assert run.last_loss > 0
    assert seen == [(0, 4, False), (1, 8, True), (2, 11, True), (2, 15, False), (3, 19, True), (4, 22, True)]
    with pytest.raises(IllegalTransition, match="finished"):
        run.advance()


def test_a_result_is_there_only_at_the_end(training: Training):
    with pytest.raises(IllegalTransition, match="0 of 4 steps"):
        training.begin().result()


@pytest.mark.parametrize("call", range(6))
def test_a_call_that_fails_has_changed_nothing(call: int):
    program = ToyProgram()
    training = Training(program, PLAN)
    expected = training.undisturbed()
    run = training.begin()

    def fail() -> None:
        raise RuntimeError

    for _ in range(call):
        run.advance()
    before = state_bits(run.snapshot())
    program.before_run = fail
    with pytest.raises(RuntimeError):
        run.advance()
    assert state_bits(run.snapshot()) == before
    program.before_run = lambda: None
    while not run.finished:
        run.advance()
    assert training.begin(run.snapshot()).finished
    assert run.result().weights.tobytes() == expected[: 4 * len(training.weights)]


def test_a_snapshot_is_the_callers(training: Training):
    run = training.begin()
    run.advance()
    mine = run.snapshot()
    mine.weights[:] = 7
    assert mine.accumulator is not None
    mine.accumulator[:] = 7
    again = run.snapshot()
    assert 7 not in again.weights
    assert 7 not in again.accumulator


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": -1},
        {"steps": 5},
        {"epoch": 1},
        {"position": 1},
        {"seen": 3},
        {"slices_done": 0},
        {"slices_done": 2},
        {"accumulator": None},
        {"weights": np.zeros(8, np.float32)},
        {"weights": np.zeros(9)},
        {"weights": np.full(9, np.nan, np.float32)},
        {"accumulator": np.zeros(8, np.float32)},
    ],
    ids=str,
)
def test_a_state_that_a_training_does_not_come_to_is_refused(training: Training, half: Checkpoint, changes: dict):
    with pytest.raises(ConfigurationError, match="training state"):
        training.begin(replace(half.state, **changes))


def test_slices_of_another_size_are_another_training(training: Training, half: Checkpoint):
    other = Training(ToyProgram(), PLAN.model_copy(update={"batch_size": 4}), slice_size=4)
    with pytest.raises(ConfigurationError):
        other.begin(half.state)
    assert not half.binding.differences(training.binding)
    assert half.binding.differences(other.binding) == ("plan", "slice_size")


# --- what is in a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_checkpoint_is_what_was_saved(tmp_path: Path, training: Training, half: Checkpoint, key: bytes | None):
    manager = CheckpointManager(tmp_path / "folder", key=key)
    assert not manager.has_checkpoint()
    assert manager.load(training.binding) is None
    manager.save(half)
    assert manager.has_checkpoint()
    found = CheckpointManager(tmp_path / "folder", key=key).load(training.binding)
    assert found is not None
    assert found.binding == half.binding
    assert state_bits(found.state) == state_bits(half.state)
    assert found.memory is not None
    assert found.memory.to_bytes() == training.memory.to_bytes()
    file = next((tmp_path / "folder").iterdir())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (half.state.weights.tobytes() in file.read_bytes()) is (key is None)
    assert (RESIDUAL.encode() in file.read_bytes()) is (key is None)
    manager.clear()
    manager.clear()
    assert not manager.has_checkpoint()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_checkpoint_without_memory_or_accumulator(tmp_path: Path):
    training = Training(ToyProgram(), PLAN, with_memory=False)
    path = saved(tmp_path, training.checkpoint(training.begin()))
    found = CheckpointManager(tmp_path).read(path)
    assert (found.memory, found.state.accumulator) == (None, None)
    assert np.isnan(found.state.first_epoch_loss)


def test_files_of_the_first_format_are_read_for_ever(tmp_path: Path):
    """Bytes as the release wrote them that introduced the format."""
    binding = Training(ToyProgram(), PLAN).binding
    plain = Path(__file__).parents[1] / "vectors" / "checkpoint-1.ckpt"
    (tmp_path / "000000000001.ckpt").write_bytes(plain.read_bytes())
    found = CheckpointManager(tmp_path).read(tmp_path / "000000000001.ckpt")
    assert found.state.weights.tolist() == [0.5, -0.25, 0.0]
    assert found.state.accumulator.tolist() == [1.0, 2.0, 3.0]
    assert (found.state.slices_done, found.state.steps, found.state.seen) == (1, 4, 16)
    assert found.binding.plan == binding.plan
    assert found.memory.vectors[RESIDUAL].tolist() == [0.125]
    CheckpointManager(tmp_path / "again").save(found)
    assert (tmp_path / "again" / "000000000001.ckpt").read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_every_truncation_is_detected(tmp_path: Path, half: Checkpoint, key: bytes | None):
    data = saved(tmp_path, half, key).read_bytes()
    wrapped = None if key is None else CheckpointKey(key)
    for length in range(len(data)):
        with pytest.raises(CheckpointTruncated):
            unpack(data[:length], wrapped, 10**6)
    with pytest.raises(CheckpointCorrupted, match="1 bytes follow"):
        unpack(data + b"\0", wrapped, 10**6)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_every_single_flipped_bit_is_detected(tmp_path: Path, half: Checkpoint, key: bytes | None):
    data = bytearray(saved(tmp_path, half, key).read_bytes())
    wrapped = None if key is None else CheckpointKey(key)
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            # Of the header's own length nothing is known before it is read.
            with pytest.raises((CheckpointCorrupted, CheckpointTruncated) if 12 <= at < 16 else CheckpointCorrupted):
                unpack(data, wrapped, 10**6)
            data[at] ^= 1 << bit
    unpack(data, wrapped, 10**6)


def reheaded(data: bytes, version: int | None = None, body_length: int | None = None) -> bytes:
    """A whole file with another version or declared length, and a checksum that matches."""
    header = bytearray(data[48:112])
    if body_length is not None:
        header[16:24] = body_length.to_bytes(8, "little")
    summed = data[:8] + (data[8:12] if version is None else struct.pack("<I", version)) + data[12:16]
    return summed + hashlib.sha256(summed + header).digest() + bytes(header) + data[112:]


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (2, "newer"), (2**32 - 1, "newer")])
def test_another_version_is_told_apart_from_damage(tmp_path: Path, half: Checkpoint, version: int, age: str):
    path = saved(tmp_path, half)
    assert reheaded(path.read_bytes()) == path.read_bytes()
    path.write_bytes(reheaded(path.read_bytes(), version))
    assert isinstance(problem(path), CheckpointVersionError)
    assert f"format {version}, {age} than 1" in str(problem(path))
    assert CheckpointManager(tmp_path).load(half.binding) is None
    assert path.exists(), "the release that wrote it may come back"


def test_a_declared_length_is_refused_before_anything_is_allocated(tmp_path: Path, half: Checkpoint):
    path = saved(tmp_path, half)
    path.write_bytes(reheaded(path.read_bytes(), body_length=2**62))
    assert isinstance(problem(path), CheckpointTooLarge)
    os.truncate(path, 2**40)  # a sparse file
    assert isinstance(problem(path), CheckpointTooLarge)


def test_keys_are_told_apart_from_damage(tmp_path: Path, half: Checkpoint):
    plain, sealed = saved(tmp_path / "plain", half), saved(tmp_path / "sealed", half, KEY)
    for path, key, message in [
        (sealed, OTHER_KEY, "another key"),
        (sealed, None, "gives no key"),
        (plain, KEY, "not encrypted"),
    ]:
        assert isinstance(problem(path, key), CheckpointKeyError)
        assert message in str(problem(path, key))
        assert CheckpointManager(path.parent, key=key).load(half.binding) is None
    assert sealed.exists(), "the key may come back"


@pytest.mark.parametrize("use", ["load", "save"])
def test_once_a_key_is_given_nothing_stays_readable(tmp_path: Path, half: Checkpoint, use: str):
    """Also of damaged and half-written files; what another key encrypted stays as it is."""
    other = saved(tmp_path, half, OTHER_KEY)
    whole = saved(tmp_path, half)
    data = whole.read_bytes()
    (tmp_path / "000000000007.ckpt.damaged").write_bytes(data[:300])
    (tmp_path / ".000000000003.ckpt.tmp").write_bytes(data[:-1])
    manager = CheckpointManager(tmp_path, key=KEY, keep=3)
    manager.load(half.binding) if use == "load" else manager.save(half)
    assert other.exists()
    left = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(left) == (1 if use == "load" else 2)
    assert not any(half.state.weights.tobytes() in content for content in left)


def test_plain_files_that_could_not_be_removed_are_removed_the_next_time(tmp_path: Path, half: Checkpoint, caplog):
    class ReadOnly(OsFiles):
        holds = True

        def unlink(self, path: Path) -> None:
            if self.holds:
                raise OSError(errno.EROFS, "read-only")
            super().unlink(path)

    path, files = saved(tmp_path, half), ReadOnly()
    manager = CheckpointManager(tmp_path, key=KEY, files=files)
    assert manager.load(half.binding) is None
    assert "could not be removed" in caplog.text
    files.holds = False
    assert manager.load(half.binding) is None
    assert not path.exists()


def test_no_nonce_is_used_twice_and_the_key_is_not_shown(tmp_path: Path, half: Checkpoint):
    manager = CheckpointManager(tmp_path, key=KEY, keep=5)
    for _ in range(5):
        manager.save(half)
    heads = [path.read_bytes()[72:100] for path in tmp_path.iterdir()]
    assert len({head[:12] for head in heads}) == len({head[12:] for head in heads}) == 5
    assert repr(CheckpointKey(KEY)) == "CheckpointKey(<redacted>)"
    assert KEY.hex() not in repr(vars(manager))
    assert repr(KEY) not in repr(vars(manager))
    with pytest.raises(ConfigurationError, match="32 bytes, got 16"):
        CheckpointManager(tmp_path, key=bytes(16))


def test_a_header_is_authenticated(tmp_path: Path, half: Checkpoint):
    """Whoever can write the file, but has not the key, cannot make an old generation the newest."""
    path = saved(tmp_path, half, KEY)
    data = bytearray(path.read_bytes())
    data[48 + 8] += 1
    path = path.with_name("000000000002.ckpt")
    path.write_bytes(reheaded(bytes(data)))
    assert isinstance(problem(path, KEY), CheckpointCorrupted)


def test_another_model_data_or_assignment_is_told_apart(tmp_path: Path, half: Checkpoint):
    saved(tmp_path, half)
    changes = {
        "assignment_id": "0" * 32,
        "model_sha256": "0" * 64,
        "program_sha256": "0" * 64,
        "parameter_table_sha256": "0" * 64,
        "data_sha256": "0" * 64,
        "plan": PLAN.model_copy(update={"learning_rate": 0.5}),
        "shuffle_seed": 6,
        "slice_size": 4,
    }
    for name, value in changes.items():
        other = half.binding.model_copy(update={name: value})
        assert half.binding.differences(other) == (name,)
        assert CheckpointManager(tmp_path).load(other) is None
    assert "differs in data_sha256" in str(CheckpointMismatch(("data_sha256",)))
    assert CheckpointManager(tmp_path).load(half.binding) is not None


def test_data_have_a_fingerprint_of_their_values(training: Training):
    x, y = training.x, training.y
    same = data_fingerprint(x, y)
    assert data_fingerprint(np.asfortranarray(x), np.repeat(y, 2)[::2]) == same
    changed = x.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    assert (
        len({same, data_fingerprint(changed, y), data_fingerprint(x, y[::-1]), data_fingerprint(x[:-1], y[:-1])}) == 4
    )


# --- what is kept --------------------------------------------------------------------------------------------


def test_a_damaged_generation_is_set_aside_and_the_one_before_serves(tmp_path: Path, training: Training, caplog):
    manager = CheckpointManager(tmp_path)
    run = training.begin()
    for _ in range(3):
        run.advance()
        manager.save(training.checkpoint(run))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000002.ckpt", "000000000003.ckpt"]
    newest = tmp_path / "000000000003.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    newest_file, older = manager.inspect()
    assert (newest_file.path, type(newest_file.problem)) == (newest, CheckpointTruncated)
    assert (older.problem, older.binding) == (None, training.binding)
    found = manager.load(training.binding)
    assert found is not None
    assert found.state.steps == 1
    assert "000000000003.ckpt cannot be used" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000002.ckpt", "000000000003.ckpt.damaged"]
    resumed = training.begin(found.state)
    while not resumed.finished:
        resumed.advance()
    assert resumed.result().weights.tobytes() == training.undisturbed()[: 4 * 9]


class BadSectors(OsFiles):
    """Cannot read some files, and renames none while ``renames`` is False."""

    def __init__(self, *names: str, renames: bool = True) -> None:
        self.bad = names
        self.renames = renames

    def read(self, path: Path) -> bytes:
        if path.name in self.bad:
            raise input_output_error()
        return super().read(path)

    def rename(self, source: Path, target: Path) -> None:
        if not self.renames:
            raise input_output_error()
        super().rename(source, target)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_generation_that_cannot_be_read_costs_time_and_nothing_else(
    tmp_path: Path, training: Training, key: bytes | None, caplog
):
    run, manager = training.begin(), CheckpointManager(tmp_path, key=key)
    for _ in range(2):
        run.advance()
        manager.save(training.checkpoint(run))
    older, newest = sorted(path.name for path in tmp_path.iterdir())
    found = CheckpointManager(tmp_path, key=key, files=BadSectors(newest)).load(training.binding)
    assert found is not None
    assert found.state.slices_done == 1
    assert f"{newest} does not serve" in caplog.text
    nothing = CheckpointManager(tmp_path, key=key, files=BadSectors(newest, older))
    assert nothing.load(training.binding) is None
    nothing.save(training.checkpoint(run))
    assert nothing.load(training.binding) is not None


def test_a_damaged_generation_that_cannot_be_set_aside_does_not_hide_the_older(
    tmp_path: Path, training: Training, half: Checkpoint, caplog
):
    manager = CheckpointManager(tmp_path, files=BadSectors(renames=False))
    saved(tmp_path, half)
    newest = saved(tmp_path, half)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert manager.load(training.binding) is not None
    assert "cannot be set aside" in caplog.text


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, half: Checkpoint):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateDirUnusable):
        CheckpointManager(tmp_path / "file").load(half.binding)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_trainings_of_two_kinds_do_not_displace_one_another(
    tmp_path: Path, training: Training, half: Checkpoint, key: bytes | None
):
    outer = CheckpointManager(tmp_path / "folder", key=key)
    inner = outer.within("local")
    inner.save(half)
    assert not outer.has_checkpoint()
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "folder", tmp_path / "folder" / "local")] == [
        0o700,
        0o700,
    ]
    for _ in range(3):
        outer.save(half)
    assert inner.load(training.binding) is not None
    outer.clear()
    assert (outer.has_checkpoint(), inner.has_checkpoint()) == (False, True)
    outer.save(half)
    inner.clear()
    assert (outer.has_checkpoint(), inner.has_checkpoint()) == (True, False)
    for name in ("", "..", "a/b", "/a", "000000000001.ckpt", "Local", "x.damaged"):
        with pytest.raises(ConfigurationError, match="does not name a folder"):
            outer.within(name)


def test_whatever_happens_the_folder_is_bounded(tmp_path: Path, training: Training, half: Checkpoint):
    manager = CheckpointManager(tmp_path)
    for _ in range(8):
        manager.save(half)
        path = max(p for p in tmp_path.iterdir() if p.suffix == ".ckpt")
        path.write_bytes(b"damaged")
        (tmp_path / f".{path.name}.tmp").write_bytes(b"left by a kill")
        manager.load(training.binding)
    assert len(list(tmp_path.iterdir())) <= 2 + 2
    manager.save(half)
    assert manager.load(training.binding) is not None
    manager.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_another_generations_name_is_damaged(tmp_path: Path, half: Checkpoint):
    path = saved(tmp_path, half)
    assert isinstance(problem(path.rename(tmp_path / "000000000009.ckpt")), CheckpointCorrupted)


def test_a_checkpoint_beyond_the_bound_is_not_written(tmp_path: Path, half: Checkpoint):
    def no_nonce(_: int) -> bytes:
        raise AssertionError("it was encrypted to no end")

    small = CheckpointManager(tmp_path, key=KEY, max_bytes=1000, random_bytes=no_nonce)
    with pytest.raises(CheckpointTooLarge, match=r"has 15\d\d bytes; at most 1000"):
        small.save(half)
    assert not small.has_checkpoint()
    largest = saved(tmp_path, half, KEY).stat().st_size
    CheckpointManager(tmp_path, key=KEY, max_bytes=largest).save(half)
    with pytest.raises(CheckpointTooLarge):
        CheckpointManager(tmp_path, key=KEY, max_bytes=largest - 1).save(half)
    assert small.load(half.binding) is None
    assert small.has_checkpoint(), "an app with a larger bound may come back"
    with pytest.raises(ConfigurationError, match="keep"):
        CheckpointManager(tmp_path, keep=0)


# --- when ----------------------------------------------------------------------------------------------------


def test_a_save_is_due_after_the_period_or_later_where_it_is_dear():
    schedule = CheckpointSchedule(period_s=10, max_fraction=0.02)
    assert not schedule.due(1e9), "nothing has begun"
    schedule = schedule.begun(100)
    assert [schedule.due(now) for now in (100, 109.9, 110)] == [False, False, True]
    cheap = schedule.saved(110.1, 0.1)
    assert [cheap.due(now) for now in (120, 120.2)] == [False, True]
    dear = schedule.saved(112, 2)
    assert [dear.due(now) for now in (122, 211.9, 212)] == [False, False, True]
    for wrong in ({"period_s": 0}, {"max_fraction": 0}, {"max_fraction": 1.5}):
        with pytest.raises(ConfigurationError, match=re.escape("period_s > 0")):
            CheckpointSchedule(**wrong)
