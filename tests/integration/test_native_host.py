"""The C host of docs/examples: strict C11, no C++, and the same bits as the Python adapter."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from client_sdk.native.build import FOLDER, RUNTIME
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.program import WEIGHTS_FILE
from client_sdk.runtime import load_program
from client_sdk.training import LocalTrainer, TrainingPlan

SOURCE = Path(__file__).resolve().parents[2] / "docs/examples/native_host.c"
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-g")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by a C compiler, against the header and the library and nothing else."""
    program = tmp_path_factory.mktemp("host") / "native_host"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    library = RUNTIME.ensure_built()
    command = [compiler, *FLAGS, f"-I{FOLDER}", str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def train(host: Path, bundle: Path, folder: Path, method: str, batch: int, shape: str) -> subprocess.CompletedProcess:
    arguments = [bundle, method, batch, shape, folder / "x", folder / "y", 0.1, 3, folder / "out"]
    return subprocess.run([str(host), *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["softmax_bundle", "cnn_bundle"])
def test_a_host_in_c_trains_to_the_same_bits(host: Path, name: str, request: pytest.FixtureRequest, tmp_path: Path):
    bundle: Path = request.getfixturevalue(name)
    program = load_program(bundle, "native")
    manifest = program.manifest
    rng = np.random.default_rng(5)
    x = rng.normal(size=(21, *manifest.feature_shape)).astype(np.float32)
    y = rng.integers(0, manifest.num_classes, 21)
    (tmp_path / "x").write_bytes(x.tobytes())
    (tmp_path / "y").write_bytes(y.tobytes())
    done = train(host, bundle, tmp_path, "train_b8", 8, "x".join(map(str, manifest.feature_shape)))
    assert done.returncode == 0, done.stderr

    initial = np.frombuffer(decode_frame((bundle / WEIGHTS_FILE).read_bytes()).payload, np.float32)
    plan = TrainingPlan(local_epochs=3, batch_size=8, learning_rate=0.1, shuffle=False)
    trained = LocalTrainer(program).train(initial, x, y, plan, 0)
    program.close()
    assert (tmp_path / "out").read_bytes() == trained.weights.tobytes()
    assert trained.weights.tobytes() != initial.tobytes()
    assert f"mean loss of the last epoch {trained.last_epoch_loss:.6f}" in done.stdout


def test_a_host_in_c_is_told_what_is_wrong(host: Path, softmax_bundle: Path, tmp_path: Path):
    (tmp_path / "x").write_bytes(bytes(4 * 6 * 3))
    (tmp_path / "y").write_bytes(bytes(8 * 3))
    for method, batch, shape, message in (
        ("train_b9", 8, "6", "no method train_b9"),
        ("train_b8", 4, "6", "inputs do not fit train_b8"),
        ("grad_b8", 8, "6", "takes 4 inputs, 5 are given"),
        ("train_b8", 8, "2x3", "inputs do not fit train_b8"),
    ):
        done = train(host, softmax_bundle, tmp_path, method, batch, shape)
        assert done.returncode == 1
        assert message in done.stderr
