"""Processes that train with checkpoints and are really killed, at chosen writes, renames and calls of the program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Trains with a checkpoint after every call; SIGKILLs its own process at the n-th system call of a kind.
LIFE = """
import os, signal, sys
from pathlib import Path
from client_sdk import files
from client_sdk.checkpoint import CheckpointManager
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from tests.checkpoints import Training

bundle, folder, point, countdown = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

class Dying(files.OsFiles):
    def at(self, name):
        global countdown
        if name == point:
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, handle, data):
        self.at("write")
        if point == "half-write" and countdown == 1:
            super().write(handle, data[: len(data) // 2])
        self.at("half-write")
        return super().write(handle, data)

    def fsync(self, handle):
        self.at("fsync")
        super().fsync(handle)

    def rename(self, source, target):
        self.at("rename")
        super().rename(source, target)
        self.at("renamed")

    def unlink(self, path):
        self.at("unlink")
        super().unlink(path)
        self.at("unlinked")

files_ = Dying()
key = bytes(range(32)) if sys.argv[5] == "encrypted" else None
program = load_program(bundle, "native")
training = Training(program, TrainingPlan(local_epochs=2, batch_size=16, learning_rate=0.25), num_samples=40)
manager = CheckpointManager(folder, key=key, files=files_)
found = manager.load(training.binding)
print("begun" if found is None else f"resumed {found.state.steps} {found.state.slices_done}")
result = training.life(manager, lambda run: files_.at("call"))
print(result.hex())
"""

KILLS = [
    ("write", 1, "plain"),
    ("half-write", 2, "plain"),
    ("half-write", 5, "encrypted"),
    ("fsync", 1, "plain"),
    ("fsync", 4, "encrypted"),
    ("rename", 3, "plain"),
    ("renamed", 1, "plain"),
    ("renamed", 4, "encrypted"),
    ("unlink", 1, "plain"),
    ("unlinked", 2, "encrypted"),
    ("call", 5, "plain"),
]


def live(bundle: Path, folder: Path, point: str, countdown: int, cipher: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIFE, str(bundle), str(folder), point, str(countdown), cipher]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


@pytest.fixture(scope="module")
def undisturbed(softmax_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    done = live(softmax_bundle, tmp_path_factory.mktemp("undisturbed"), "never", 0, "plain")
    assert done.returncode == 0, done.stderr
    begun, result = done.stdout.split()
    assert begun == "begun"
    return result


@pytest.mark.parametrize(("point", "countdown", "cipher"), KILLS, ids=str)
def test_a_killed_training_goes_on_to_the_same_bits(
    softmax_bundle: Path, tmp_path: Path, undisturbed: str, point: str, countdown: int, cipher: str
):
    killed = live(softmax_bundle, tmp_path, point, countdown, cipher)
    assert killed.returncode == -signal.SIGKILL, f"the planned kill did not happen:\n{killed.stderr}"
    finished = live(softmax_bundle, tmp_path, "never", 0, cipher)
    assert finished.returncode == 0, finished.stderr
    how, _, result = finished.stdout.strip().partition("\n")
    assert result == undisturbed
    # The first checkpoint that is whole is there from its rename on.
    first_save_done = not ((countdown <= 3 and point in {"write", "half-write"}) or (point, countdown) == ("fsync", 1))
    assert how.startswith("resumed") is first_save_done
