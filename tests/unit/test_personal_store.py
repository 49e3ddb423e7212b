"""A personal model on the disk: whole or the one before, for its own program alone, and unreadable without the key."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.checkpoint import CheckpointManager
from client_sdk.checkpoint_file import CheckpointKey, pack
from client_sdk.errors import (
    CheckpointCorrupted,
    CheckpointKeyError,
    CheckpointTooLarge,
    CheckpointTruncated,
    CheckpointVersionError,
    StateDirUnusable,
)
from client_sdk.personal_model import PersonalModel
from client_sdk.personal_store import PersonalModelStore
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.training import TrainingPlan
from tests.checkpoints import Training
from tests.devices import ToyProgram, make_manifest
from tests.faults import DiskModel, FaultyFiles, Killed, disk_full, input_output_error
from tests.personal import bits, make_personal

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
FOLDER = Path("/state/personal")
MANIFEST = make_manifest()


def saved(folder: Path, key: bytes | None = None, seed: int = 0) -> Path:
    store = PersonalModelStore(folder, key=key)
    return folder / f"{store.save(make_personal(seed)):012d}.model"


@KEYS
def test_a_personal_model_is_what_was_saved(tmp_path: Path, key: bytes | None):
    model, store = make_personal(), PersonalModelStore(tmp_path / "personal", key=key)
    assert store.load(MANIFEST) is None
    assert store.versions() == []
    store.save(model)
    again = PersonalModelStore(tmp_path / "personal", key=key)
    assert bits(again.load(MANIFEST)) == bits(again.newest()) == bits(model)
    file = next((tmp_path / "personal").iterdir())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert again.versions()[0].record == model.record
    again.clear()
    again.clear()
    assert list((tmp_path / "personal").iterdir()) == []


@given(seed=st.integers(0, 2**32 - 1), special=st.sampled_from([0.0, -0.0, 1e-45, 3e38]))
def test_every_float_comes_back_to_the_bit(seed: int, special: float):
    model = make_personal(seed)
    model.weights[seed % 9] = special
    assert bits(PersonalModel.from_bytes(model.to_bytes(), 10**6)) == bits(model)


def test_an_encrypted_file_does_not_show_a_weight_or_a_figure(tmp_path: Path):
    model = make_personal()
    words = [model.weights.tobytes(), model.global_weights.tobytes(), b"accuracy", b"personal", b"inner_steps"]
    words += [value.tobytes() for value in (*model.weights, *model.global_weights)]
    plain, sealed = saved(tmp_path / "a").read_bytes(), saved(tmp_path / "b", KEY).read_bytes()
    assert [word in plain for word in words] == [True, True, False, *[True] * (len(words) - 3)]
    assert not any(word in sealed for word in words)


def test_the_weights_are_not_shown():
    shown = repr(make_personal())
    assert "array" not in shown
    assert "weights" not in shown


@KEYS
def test_a_process_killed_at_any_byte_leaves_the_old_model_or_the_new_one(key: bytes | None):
    disk = DiskModel()
    for number in range(3):
        allowed = {bits(make_personal(number)), None if number == 0 else bits(make_personal(number - 1))}
        seen = set()
        for survives in itertools.count():
            dying = copy.deepcopy(disk)
            try:
                PersonalModelStore(FOLDER, key=key, files=FaultyFiles(dying, survives)).save(make_personal(number))
            except Killed:
                pass
            else:
                break
            seen.add(bits(PersonalModelStore(FOLDER, key=key, files=dying).load(MANIFEST)))
            assert len(dying.names(FOLDER)) <= 4
        assert survives > 800, "every byte was a step"
        assert seen == allowed
        disk = dying
        assert len(disk.names(FOLDER)) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_leaves_what_was_saved_last_or_before(seed: int):
    rng, disk = random.Random(seed), DiskModel()
    PersonalModelStore(FOLDER, files=disk).save(make_personal(0))
    allowed = {bits(make_personal(number)) for number in (0, 1)}
    for survives in itertools.count():
        cut = copy.deepcopy(disk)
        files = FaultyFiles(cut, survives, chunk=200)
        with contextlib.suppress(Killed):
            PersonalModelStore(FOLDER, files=files).save(make_personal(1))
        for _ in range(4):
            after = cut.after_power_cut(lambda _what: rng.random() < 0.5)
            found = bits(PersonalModelStore(FOLDER, files=after).load(MANIFEST))
            assert found in (allowed if files.failed else {bits(make_personal(1))})
        if not files.failed:
            break


@pytest.mark.parametrize("fault", [disk_full, input_output_error])
def test_a_disk_that_fails_costs_nothing_but_the_new_model(fault):
    disk = DiskModel()
    PersonalModelStore(FOLDER, files=disk).save(make_personal(0))
    for survives in itertools.count(step=11):
        trial = copy.deepcopy(disk)
        try:
            PersonalModelStore(FOLDER, files=FaultyFiles(trial, survives, fault=fault)).save(make_personal(1))
        except StateDirUnusable as e:
            message = str(e)
        else:
            break
        assert "cannot save the personal models in /state/personal" in message
        assert bits(PersonalModelStore(FOLDER, files=trial).load(MANIFEST)) in {
            bits(make_personal(0)),
            bits(make_personal(1)),
        }
    assert survives > 800


@KEYS
def test_every_truncation_and_every_flipped_byte_falls_back_to_the_model_before(tmp_path: Path, key: bytes | None):
    saved(tmp_path, key, 0)
    newest = saved(tmp_path, key, 1)
    whole = newest.read_bytes()
    damages = [whole[:length] for length in range(0, len(whole), 7)]
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        damages.append(bytes(flipped))
    older = bits(make_personal(0))
    for damaged in damages:
        newest.write_bytes(damaged)
        store = PersonalModelStore(tmp_path, key=key)
        first, *_ = store.versions()
        assert isinstance(first.problem, CheckpointCorrupted | CheckpointTruncated)
        assert first.record is None
        assert bits(store.load(MANIFEST)) == older
        assert not newest.exists(), "it is set aside"
        assert len(list(tmp_path.iterdir())) <= 1 + 2


def test_a_wrong_key_is_told_apart_from_damage_and_nothing_is_lost(tmp_path: Path):
    sealed, plain = saved(tmp_path / "sealed", KEY), saved(tmp_path / "plain")
    for path, key, message in [
        (sealed, OTHER_KEY, "another key"),
        (sealed, None, "gives no key"),
    ]:
        store = PersonalModelStore(path.parent, key=key)
        for use in (lambda s: s.load(MANIFEST), PersonalModelStore.newest, lambda s: s.save(make_personal(1))):
            for _ in range(3):
                with pytest.raises(CheckpointKeyError, match=f"{message}.*; give that key, or clear"):
                    use(store)
        problem = store.versions()[0].problem
        assert isinstance(problem, CheckpointKeyError)
        assert message in str(problem)
    assert bits(PersonalModelStore(sealed.parent, key=KEY).load(MANIFEST)) == bits(make_personal())
    assert PersonalModelStore(plain.parent, key=KEY).load(MANIFEST) is None
    assert not plain.exists(), "once a key is given nothing stays readable"
    with pytest.raises(ConfigurationError, match="32 bytes"):
        PersonalModelStore(tmp_path, key=bytes(16))


def test_a_model_of_another_program_is_never_served_and_stays_where_it_is(tmp_path: Path):
    path = saved(tmp_path)
    other = make_manifest(program=b"another program")
    store = PersonalModelStore(tmp_path)
    assert store.load(other) is None
    assert path.exists()
    store.save(make_personal(1, other))
    assert bits(store.load(other)) == bits(make_personal(1, other))
    assert bits(store.load(MANIFEST)) == bits(make_personal())
    assert bits(store.newest()) == bits(make_personal(1, other))


def test_an_earlier_model_can_be_rolled_back_to_and_so_can_that(tmp_path: Path):
    store = PersonalModelStore(tmp_path)
    for seed in (0, 1):
        store.save(make_personal(seed))
    newest, before = store.versions()
    assert bits(store.roll_back(before.generation)) == bits(make_personal(0)) == bits(store.load(MANIFEST))
    newest, before = store.versions()
    assert bits(store.roll_back(before.generation)) == bits(make_personal(1)) == bits(store.load(MANIFEST))
    with pytest.raises(ConfigurationError, match=r"there is no personal model 1; there are \[4, 3\]"):
        store.roll_back(1)
    path = tmp_path / "000000000003.model"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointTruncated):
        store.roll_back(3)
    assert bits(store.load(MANIFEST)) == bits(make_personal(1))
    assert newest.generation == 3


def test_the_folder_is_bounded(tmp_path: Path):
    store = PersonalModelStore(tmp_path, keep=3)
    for seed in range(9):
        store.save(make_personal(seed))
    assert [version.generation for version in store.versions()] == [9, 8, 7]
    assert store.versions()[0].size == (tmp_path / "000000000009.model").stat().st_size
    with pytest.raises(CheckpointTooLarge):
        PersonalModelStore(tmp_path, max_bytes=100).save(make_personal())
    with pytest.raises(ConfigurationError, match="keep"):
        PersonalModelStore(tmp_path, keep=0)


def test_a_checkpoint_is_no_personal_model_and_the_other_way_round(tmp_path: Path):
    training = Training(ToyProgram(), TrainingPlan(batch_size=4))
    CheckpointManager(tmp_path).save(training.checkpoint(training.begin()))
    (tmp_path / "000000000001.ckpt").rename(tmp_path / "000000000001.model")
    assert isinstance(PersonalModelStore(tmp_path).versions()[0].problem, CheckpointCorrupted)
    path = saved(tmp_path / "personal")
    renamed = path.rename(path.with_suffix(".ckpt"))
    with pytest.raises(CheckpointCorrupted, match="not a checkpoint's"):
        CheckpointManager(renamed.parent).read(renamed)


def rewritten(tmp_path: Path, tensors: dict | None = None, **metadata: str) -> PersonalModelStore:
    """A whole file of another content."""
    frame = decode_frame(make_personal().to_bytes())
    payload = encode_frame(dict(frame.tensors) | (tensors or {}), dict(frame.metadata) | metadata)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "000000000001.model").write_bytes(b"".join(pack(payload, 1, CheckpointKey(KEY), bytes)))
    return PersonalModelStore(tmp_path, key=KEY)


def test_another_format_is_told_apart_from_damage_and_kept(tmp_path: Path):
    store = rewritten(tmp_path, format="2")
    assert isinstance(store.versions()[0].problem, CheckpointVersionError)
    assert store.load(MANIFEST) is None
    assert (tmp_path / "000000000001.model").exists()


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"global": np.zeros(9, np.float32)}, {}),
        ({"personal": np.zeros(8, np.float32)}, {}),
        ({"personal": np.zeros(9, np.int64)}, {}),
        ({"more": np.zeros(9, np.float32)}, {}),
        ({}, {"record": "{}"}),
        ({}, {"more": "?"}),
    ],
    ids=str,
)
def test_a_whole_file_whose_parts_do_not_belong_together_is_damage(tmp_path: Path, tensors: dict, metadata: dict):
    assert isinstance(rewritten(tmp_path, tensors, **metadata).versions()[0].problem, CheckpointCorrupted)
