"""Processes that adapt a model and are really killed, at chosen calls of the program, writes and renames."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Adapts the model of version argv[3]; SIGKILLs its own process at the n-th event of a kind; then says what serves.
LIFE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from client_sdk import DeviceProfile, PersonalizationConfig, PersonalizedMobileClient, PersonalModelStore
from client_sdk import files
from client_sdk.runtime import load_program

bundle, folder, version = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
point, countdown = sys.argv[4], int(sys.argv[5])

def at(name):
    global countdown
    if name == point:
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

class Dying(files.OsFiles):
    def write(self, handle, data):
        at("write")
        if point == "half-write":
            super().write(handle, data[: len(data) // 2])
            at("half-write")
        return super().write(handle, data)

    def fsync(self, handle):
        at("fsync")
        super().fsync(handle)

    def rename(self, source, target):
        at("rename")
        super().rename(source, target)
        at("renamed")

class Program:
    def __init__(self, program):
        self.program, self.manifest = program, program.manifest

    def run(self, method, *inputs):
        at("call")
        return self.program.run(method, *inputs)

program = Program(load_program(bundle, "native"))
rng = np.random.default_rng(0)
data = rng.normal(size=(20, 6)).astype(np.float32), rng.integers(0, 3, 20)
weights = np.random.default_rng(version).normal(0, 0.3, program.manifest.num_parameters).astype(np.float32)
store = PersonalModelStore(folder, key=bytes(range(32)), files=Dying())
config = PersonalizationConfig(inner_steps=5, inner_lr=0.2)
client = PersonalizedMobileClient(
    program, DeviceProfile("phone"), data=data, personal_models=store, personalization_config=config
)
if version:
    client.on_global_model(weights, version)
print(client.personal_model.record.model_version, client.personal_model.weights.tobytes().hex())
"""

KILLS = [("call", 4), ("half-write", 1), ("fsync", 1), ("rename", 1)]


def live(bundle: Path, folder: Path, version: int, point: str = "never", countdown: int = 0) -> str | None:
    """What a process says in the end; None where it was killed."""
    command = [sys.executable, "-c", LIFE, *map(str, (bundle, folder, version, point, countdown))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def old(softmax_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a personal model of version 1, and what it serves."""
    folder = tmp_path_factory.mktemp("old")
    served = live(softmax_bundle, folder, 1)
    assert served is not None
    return folder, served


@pytest.mark.parametrize(("point", "countdown"), KILLS, ids=str)
def test_a_process_killed_while_it_adapts_leaves_the_old_model_to_the_bit(
    softmax_bundle: Path, tmp_path: Path, old: tuple[Path, str], point: str, countdown: int
):
    folder = shutil.copytree(old[0], tmp_path / "personal")
    assert live(softmax_bundle, folder, 2, point, countdown) is None, "the planned kill did not happen"
    assert live(softmax_bundle, folder, 0) == old[1]


def test_a_process_killed_once_the_new_model_is_there_serves_it(
    softmax_bundle: Path, tmp_path: Path, old: tuple[Path, str]
):
    folder = shutil.copytree(old[0], tmp_path / "personal")
    assert live(softmax_bundle, folder, 2, "renamed", 1) is None
    assert live(softmax_bundle, folder, 0) == live(softmax_bundle, tmp_path / "undisturbed", 2) != old[1]
