"""Processes that meta-learn with an exported program, and are really killed; and that program against eager PyTorch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client_sdk.descent import Descent
from client_sdk.meta_training import MetaTrainer
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from mobile_export.bundle import ProgramBundle
from mobile_export.eager import EagerProgram
from tests.bundles import meta_bundle, meta_model

# Meta-learns with a checkpoint after every call; SIGKILLs its own process before the n-th call of the program.
LIFE = """
import os, signal, sys
from pathlib import Path
from client_sdk.checkpoint import CheckpointManager
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from tests.checkpoints import Training

bundle, folder, algorithm, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

class Dying:
    def __init__(self, program):
        self.manifest, self.run_really = program.manifest, program.run

    def run(self, method, *inputs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.run_really(method, *inputs)

meta = MetaPlan(inner_steps=3 if algorithm == "maml" else 7, query_fraction=0.5, query_batches=3)
plan = TrainingPlan(algorithm=algorithm, batch_size=8, learning_rate=0.1, meta=meta)
training = Training(Dying(load_program(bundle, "native")), plan, num_samples=48)
manager = CheckpointManager(folder)
found = manager.load(training.binding)
print("begun" if found is None else f"resumed {found.state.steps} {found.state.slices_done}")
print(training.life(manager).hex())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ProgramBundle:
    return meta_bundle(tmp_path_factory.mktemp("meta") / "bundle")


def live(bundle: ProgramBundle, folder: Path, algorithm: str, left: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIFE, str(bundle.path), str(folder), algorithm, str(left)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


@pytest.mark.parametrize(("algorithm", "left", "how"), [("maml", 3, "resumed 3 2"), ("reptile", 2, "resumed 3 0")])
def test_a_process_killed_in_the_middle_of_a_session_goes_on_to_the_same_bits(
    bundle: ProgramBundle, tmp_path: Path, algorithm: str, left: int, how: str
):
    killed = live(bundle, tmp_path / "killed", algorithm, left)
    assert killed.returncode == -signal.SIGKILL, f"the planned kill did not happen:\n{killed.stderr}"
    finished = live(bundle, tmp_path / "killed", algorithm, 0)
    undisturbed = live(bundle, tmp_path / "undisturbed", algorithm, 0)
    assert finished.returncode == undisturbed.returncode == 0, finished.stderr + undisturbed.stderr
    assert finished.stdout.splitlines() == [how, undisturbed.stdout.splitlines()[1]]
    assert undisturbed.stdout.startswith("begun")


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_an_exported_program_meta_learns_as_eager_pytorch_does(bundle: ProgramBundle, algorithm: str):
    """K is 2, of methods that take 3 steps: the last is masked."""
    rng = np.random.default_rng(1)
    exported = load_program(bundle.path, "native")
    manifest = exported.manifest
    x = rng.normal(size=(33, *manifest.feature_shape)).astype(np.float32)
    y = rng.integers(0, manifest.num_classes, 33)
    w = rng.normal(0, 0.3, manifest.num_parameters).astype(np.float32)
    meta = MetaPlan(inner_steps=2, query_batches=2, query_fraction=0.4)
    plan = TrainingPlan(algorithm=algorithm, batch_size=8, learning_rate=0.1, meta=meta)
    found, expected = (MetaTrainer(p).train(w, x, y, plan, 3) for p in (exported, EagerProgram(meta_model(), manifest)))
    np.testing.assert_allclose(found.update(plan), expected.update(plan), rtol=1e-3, atol=2e-5)
    assert found.last_epoch_loss == pytest.approx(expected.last_epoch_loss, rel=1e-4)
    exported.close()


def test_frozen_layers_of_an_exported_program_stay_bit_for_bit(bundle: ProgramBundle):
    rng = np.random.default_rng(1)
    exported = load_program(bundle.path, "native")
    manifest = exported.manifest
    x = rng.normal(size=(20, *manifest.feature_shape)).astype(np.float32)
    y = rng.integers(0, manifest.num_classes, 20)
    w = rng.normal(0, 0.3, manifest.num_parameters).astype(np.float32)
    first = manifest.parameters[0]
    batches = [np.arange(8), np.arange(8, 13), np.arange(12, 20), np.arange(4)]
    adapted, losses = Descent(exported, 8).run(w, x, y, batches, 0.1, frozen=[first.name])
    assert adapted[: first.num_elements].tobytes() == w[: first.num_elements].tobytes()
    assert not np.array_equal(adapted[first.num_elements :], w[first.num_elements :])
    assert len(losses) == 4
    exported.close()
