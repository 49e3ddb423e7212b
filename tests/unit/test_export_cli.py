"""``pocketfed export``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from client_sdk.cli import main
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import Role
from mobile_export import build_model
from mobile_export.bundle import ProgramBundle

OWN = """
import torch
from torch import nn

LAYERS = 3

class Own(nn.Module):
    feature_shape = (5,)

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(5, 2)

    def forward(self, x):
        return self.output(x)

def make():
    return Own()

def squared(logits, y):
    return (logits[:, 0] - y) ** 2

def nothing():
    return None
"""
SMALL = ("--feature-shape", "12", "--classes", "3", "--batch-sizes", "train=4", "infer=2,1")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_models", None)


def export(*arguments: str) -> int:
    return main(["export", *arguments])


def test_it_writes_a_bundle_and_prints_what_it_is(tmp_path, capsys):
    out = tmp_path / "bundle"
    assert export("mlp", "--hidden", "8", *SMALL, "--out", str(out)) == 0
    captured = capsys.readouterr()
    manifest = ProgramBundle.open(out).manifest
    assert [m.name for m in manifest.methods] == ["train_b4", "infer_b1", "infer_b2"]
    assert (manifest.model_name, manifest.num_parameters) == ("mlp", 131)
    for said in (str(out), "131 parameters", "program.pte", "operators", manifest.program_sha256, "parity   passed"):
        assert said in captured.out
    for m in manifest.methods:
        [line] = [text for text in captured.out.splitlines() if text.startswith(m.name)]
        assert line.split()[1:] == [f"{m.planned_memory_bytes / 1024:,.1f}", "KiB"]
    assert captured.err.strip()  # progress, however it is drawn


def test_methods_of_several_steps(tmp_path, capsys):
    out = tmp_path / "bundle"
    sizes = ("--batch-sizes", "adapt=2", "per_fedavg=2")
    assert export("softmax", *SMALL[:4], *sizes, "--inner-steps", "2,1", "--out", str(out)) == 0
    assert [(m.name, m.inner_steps) for m in ProgramBundle.open(out).manifest.methods] == [
        ("adapt_k1_b2", 1),
        ("adapt_k2_b2", 2),
        ("per_fedavg_b2", None),
    ]
    assert export("softmax", *SMALL[:4], *sizes, "--out", str(tmp_path / "none")) == 2
    assert "say how many" in capsys.readouterr().err


def test_the_same_export_comes_from_the_cache(tmp_path, capsys):
    for name in ("a", "b"):
        assert export("softmax", *SMALL, "--out", str(tmp_path / name)) == 0
    assert "from the cache" in capsys.readouterr().out
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_model_and_a_loss_of_ones_own(own, capsys):
    arguments = ("--loss", "own_models:squared", "--batch-sizes", "grad=2", "--seed", "7", "--out", "out")
    assert export("own_models:make", *arguments) == 0
    bundle = ProgramBundle.open(own / "out")
    assert bundle.manifest.model_name == "Own"
    assert (bundle.manifest.feature_shape, bundle.manifest.num_classes) == ((5,), 2)
    assert str(own) not in sys.path
    assert export("own_models:make", *arguments[:-1], "again") == 0
    assert (ProgramBundle.open(own / "again").initial_weights() == bundle.initial_weights()).all()
    assert "from the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("resnet", *SMALL), "softmax, mlp, cnn, byte-mlp, byte-gru"),
        (("softmax", *SMALL, "--hidden", "4"), "use mlp"),
        (("cnn", *SMALL), "grey images"),
        (("own_models:missing", *SMALL), "own_models:missing"),
        (("no_such_module:make", *SMALL), "no_such_module"),
        ((":make", *SMALL), "MODULE:CALLABLE"),
        (("own_models:LAYERS", *SMALL), "not callable"),
        (("own_models:nothing", *SMALL), "NoneType"),
        (("own_models:make", "--hidden", "4"), "--hidden"),
        (("own_models:make", "--feature-shape", "6"), "[1, 6]"),
        (("own_models:make", "--classes", "9"), "2 logits"),
        (("own_models:make", "--loss", "own_models:absent"), "--loss"),
    ],
)
def test_what_cannot_be_exported_is_one_line_on_stderr(own, capsys, arguments, said):
    assert export(*arguments, "--out", "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [text for text in captured.err.splitlines() if text.startswith("error:")]
    assert said in line
    assert not (own / "out").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert export("softmax", *SMALL, "--out", str(tmp_path)) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("mlp",),
        ("mlp", "--out", "o", "--feature-shape", "0"),
        ("mlp", "--out", "o", "--feature-shape", "28xx28"),
        ("mlp", "--out", "o", "--classes", "-1"),
        ("mlp", "--out", "o", "--hidden", "8,"),
        ("mlp", "--out", "o", "--batch-sizes", "train"),
        ("mlp", "--out", "o", "--batch-sizes", "fly=3"),
        ("mlp", "--out", "o", "--batch-sizes", "train=0"),
        ("mlp", "--out", "o", "--runtime", "tpu"),
    ],
)
def test_options_that_cannot_be_read_are_usage_errors(arguments, capsys):
    assert export(*arguments) == 2
    assert "usage: pocketfed export" in capsys.readouterr().err


# --- int8 -----------------------------------------------------------------------------------------------------------


def test_trained_weights_and_an_int8_body(tmp_path, capsys):
    weights = {n: p.detach().numpy() for n, p in build_model("mlp", (12,), 3, seed=3, hidden=(8,)).named_parameters()}
    (tmp_path / "trained.safetensors").write_bytes(encode_frame(weights))
    np.savez(tmp_path / "examples.npz", x=np.random.default_rng(0).random((40, 12), np.float32))
    given = (
        "mlp", "--hidden", "8", "--feature-shape", "12", "--classes", "3", "--batch-sizes", "infer_int8=4",
        "--weights", str(tmp_path / "trained.safetensors"), "--int8-head", "output",
        "--calibration", str(tmp_path / "examples.npz"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert export(*given) == 0
    bundle = ProgramBundle.open(tmp_path / "out")
    assert bundle.initial_weights().tobytes() == np.concatenate([v.ravel() for v in weights.values()]).tobytes()
    assert bundle.manifest.method(Role.INFER_INT8).head == ("output.weight", "output.bias")
    assert "int8     infer_int8_b4: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--int8-head", "output"), "int8 needs both"),
        (("--calibration", "nothing.npz"), "int8 needs both"),
        (("--int8-head", "output", "--calibration", "nothing.npz"), "nothing.npz is not an .npz file"),
        (("--weights", "nothing.safetensors"), "nothing.safetensors is not a readable file of weights"),
        (("--weights", "other.safetensors"), "the model's parameters are"),
    ],
)
def test_what_int8_and_weights_are_not_made_of(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(encode_frame({"output.weight": np.zeros((3, 12), np.float32)}))
    assert export("softmax", *SMALL, *options, "--out", "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
