"""Death at any byte of any write of a checkpoint, power cuts, full and broken disks: the result has the same bits."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from client_sdk.checkpoint import CheckpointManager
from client_sdk.errors import StateDirUnusable
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import TrainingState
from tests.checkpoints import Training, state_bits
from tests.devices import ToyProgram
from tests.faults import DiskModel, FaultyFiles, Killed, disk_full, input_output_error

FOLDER = Path("/state/checkpoints")
KEYS = [None, bytes(range(32))]
# Batches of two slices: every other checkpoint is in the middle of a step.
PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.25, algorithm="scaffold")


def manager(disk: DiskModel, survives: int = -1, key: bytes | None = None, **faults: object) -> CheckpointManager:
    return CheckpointManager(FOLDER, key=key, keep=2, files=FaultyFiles(disk, survives, **faults))


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(ToyProgram(), PLAN)


@pytest.fixture(scope="module")
def states(training: Training) -> list[TrainingState]:
    """After each call."""
    run, found = training.begin(), []
    while not run.finished:
        run.advance()
        found.append(run.snapshot())
    assert [state.slices_done for state in found] == [1, 0, 0]
    return found


@pytest.mark.parametrize("key", KEYS, ids=["plain", "encrypted"])
def test_a_process_killed_at_any_byte_of_any_write_goes_on_to_the_same_bits(
    training: Training, states: list[TrainingState], key: bytes | None
):
    undisturbed = training.undisturbed()
    binding, memory = training.binding, training.memory
    disk = DiskModel()
    for number, state in enumerate(states):
        checkpoint = training.checkpoint(training.begin(state))
        allowed = {state_bits(each) for each in states[max(0, number - 1) : number + 1]} | (
            {None} if not number else set()
        )
        seen = set()
        for survives in itertools.count():
            dying = copy.deepcopy(disk)
            try:
                manager(dying, survives, key).save(checkpoint)
            except Killed:
                pass
            else:
                break
            found = manager(dying, key=key).load(binding)
            seen.add(None if found is None else state_bits(found.state))
            assert found is None or found.memory is None or found.memory.to_bytes() == memory.to_bytes()
            if key is None or survives % 25 == 0:  # the key changes nothing of the life after
                assert training.life(manager(dying, key=key)) == undisturbed
        assert survives > 1500, "every byte was a step"
        assert seen == allowed
        assert len(dying.names(FOLDER)) <= 2
        disk = dying


def test_a_device_that_dies_again_and_again_gets_there(training: Training):
    undisturbed, disk, rng, deaths = training.undisturbed(), DiskModel(), random.Random(1), 0
    while True:
        try:
            assert training.life(manager(disk, rng.randrange(4500))) == undisturbed
            break
        except Killed:
            deaths += 1
            assert len(disk.names(FOLDER)) <= 4
    assert deaths > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_at_any_call_leaves_what_was_saved_last_or_before(
    training: Training, states: list[TrainingState], seed: int
):
    """Whatever of the unsynced names and contents is lost."""
    rng = random.Random(seed)
    disk = DiskModel()
    for number, state in enumerate(states):
        checkpoint = training.checkpoint(training.begin(state))
        allowed = {state_bits(each) for each in states[max(0, number - 1) : number + 1]} | (
            {None} if not number else set()
        )
        for survives in itertools.count():
            cut = copy.deepcopy(disk)
            files = FaultyFiles(cut, survives, chunk=400)
            with contextlib.suppress(Killed):
                CheckpointManager(FOLDER, files=files).save(checkpoint)
            for _ in range(4):
                after = cut.after_power_cut(lambda _what: rng.random() < 0.5)
                found = manager(after).load(training.binding)
                got = None if found is None else state_bits(found.state)
                assert got in (allowed if files.failed else {state_bits(state)}), "a save that returned is durable"
                assert training.life(manager(after)) == training.undisturbed()
            if not files.failed:
                break
        disk = cut


@pytest.mark.parametrize("fault", [disk_full, input_output_error])
@pytest.mark.parametrize("recovers", [True, False])
def test_a_save_that_fails_is_an_error_that_costs_nothing_but_itself(
    training: Training, states: list[TrainingState], fault: Callable[[], OSError], recovers: bool
):
    disk = DiskModel()
    manager(disk).save(training.checkpoint(training.begin(states[0])))
    newer = training.checkpoint(training.begin(states[1]))
    for survives in itertools.count(step=7):
        trial = copy.deepcopy(disk)
        try:
            manager(trial, survives, fault=fault, recovers=recovers).save(newer)
        except StateDirUnusable as e:
            message = str(e)
        else:
            break
        assert "cannot save the checkpoints in /state/checkpoints" in message
        found = manager(trial).load(training.binding)
        assert found is not None
        assert state_bits(found.state) in map(state_bits, states[:2])
        if recovers:
            assert all(name.endswith(".ckpt") for name in trial.names(FOLDER)), "a full disk is not left fuller"
        assert training.life(manager(trial)) == training.undisturbed()
    assert survives > 1500
