"""What holds for a whole process that runs programs: no torch, little memory, one notice when it falls back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys
import numpy as np
from client_sdk.runtime import load_program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import LocalTrainer

program = load_program({bundle!r}, {runtime!r}, threads={threads})
rng = np.random.default_rng(0)
x = rng.normal(size=(20, *program.manifest.feature_shape)).astype(np.float32)
w = rng.normal(0, 0.1, program.manifest.num_parameters).astype(np.float32)
plan = TrainingPlan(local_epochs=3, batch_size=8)
result = LocalTrainer(program).train(w, x, rng.integers(0, 3, 20), plan, 7)
print(result.weights.tobytes().hex())
"""


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; a variable set to None is removed."""
    merged = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={k: v for k, v in merged.items() if v is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def no_compiler(tmp_path: Path) -> dict[str, str | None]:
    """An environment of a machine that never built the shim and cannot."""
    return {"PATH": str(tmp_path), "CXX": None, "POCKETFED_CACHE": str(tmp_path / "cache")}


def train(bundle: Path, runtime: str, threads: int = 1) -> str:
    return TRAIN.format(bundle=str(bundle), runtime=runtime, threads=threads)


def test_native_training_loads_neither_torch_nor_the_executorch_package(softmax_bundle: Path):
    done = run_python(
        train(softmax_bundle, "native")
        + "heavy = [m for m in sys.modules if m.split('.')[0] in {'torch', 'executorch', 'numba', 'scipy'}]\n"
        + "print(heavy)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"
    assert done.stderr == ""


def test_a_native_training_process_stays_small(cnn_bundle: Path):
    # VmHWM and not ru_maxrss: the latter is inherited from the process that forked this one.
    done = run_python(
        train(cnn_bundle, "native")
        + "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[1]) < 120 * 1024


def test_all_runtimes_and_thread_counts_train_to_the_same_bits(cnn_bundle: Path):
    done = [
        run_python(train(cnn_bundle, *choice))
        for choice in [("native", 1), ("native", 2), ("pybindings", 1), ("pybindings", 2)]
    ]
    assert [d.returncode for d in done] == [0] * 4, done
    assert len({d.stdout for d in done}) == 1


def test_without_a_compiler_the_official_bindings_take_over_and_one_notice_says_why(
    softmax_bundle: Path, tmp_path: Path
):
    done = run_python(
        "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
        + train(softmax_bundle, "auto")
        + f"other = load_program({str(softmax_bundle)!r})\n"
        + "print(type(program).__name__, type(other).__name__)\n",
        **no_compiler(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "PybindingsProgram PybindingsProgram"
    notices = [line for line in done.stderr.splitlines() if line.startswith("pocketfed.runtime")]
    assert len(notices) == 1
    assert "WARNING" in notices[0]
    assert "no C++17 compiler was found" in notices[0]
    assert "apt install g++" in notices[0]


def test_without_a_compiler_native_is_refused_when_asked_for(softmax_bundle: Path, tmp_path: Path):
    done = run_python(train(softmax_bundle, "native"), **no_compiler(tmp_path))
    assert done.returncode == 1
    assert "RuntimeUnavailable: no C++17 compiler was found" in done.stderr


@pytest.mark.parametrize("blocked", ["torch", "executorch.extension.pybindings._C"])
def test_without_compiler_and_bindings_both_remedies_are_named(softmax_bundle: Path, tmp_path: Path, blocked: str):
    # A module set to None in sys.modules makes its import fail, as if it were not installed.
    done = run_python(
        f"import sys; sys.modules[{blocked!r}] = None\n" + train(softmax_bundle, "auto"), **no_compiler(tmp_path)
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert "RuntimeUnavailable: no ExecuTorch runtime can run here" in error
    assert "apt install g++" in error
    assert "pip install torch" in error
