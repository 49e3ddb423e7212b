"""The models of text as exported programs: on ids they compute what PyTorch computes, and they learn a language."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.protocol.program import Role
from mobile_export import EagerProgram, build_model, export_program

CONTEXT, IDS, BATCH = 4, 12, 4


@pytest.fixture(scope="module", params=["byte-mlp", "byte-gru"])
def exported(request, tmp_path_factory):
    """A tiny model and its bundle, which has passed the parity gate."""
    model = build_model(request.param, (CONTEXT,), IDS, seed=0, hidden=(6,))
    bundle = export_program(
        model,
        out_dir=tmp_path_factory.mktemp("text") / request.param,
        batch_sizes={Role.TRAIN: (BATCH,), Role.EVALUATE: (BATCH,), Role.INFER: (BATCH,)},
        model_name=f"tiny-{request.param}",
    )
    return model, bundle


def test_the_parity_gate_passes(exported):
    _, bundle = exported
    assert bundle.parity is not None
    assert bundle.parity.worst.error <= 1e-5


def test_every_method_agrees_with_pytorch_on_ids(exported):
    model, bundle = exported
    program, eager = bundle.load(), EagerProgram(model, bundle.manifest)
    rng = np.random.default_rng(0)
    w = bundle.initial_weights()
    ids = rng.integers(0, IDS, (BATCH, CONTEXT)).astype(np.float32)
    given = {
        "w": w,
        "x": ids,
        "y": rng.integers(0, IDS, BATCH),
        "mask": np.array([1, 1, 0, 1], np.float32),
        "lr": np.full(1, 0.5, np.float32),
    }
    for method in bundle.manifest.methods:
        inputs = [given[spec.name] for spec in method.inputs]
        for ours, theirs in zip(program.run(method.name, *inputs), eager.run(method.name, *inputs), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_the_program_learns_what_follows(exported):
    _, bundle = exported
    program = bundle.load()
    # A language of four ids in turn.
    ids = (np.arange(BATCH)[:, None] + np.arange(CONTEXT)) % BATCH
    batch = ids.astype(np.float32), (np.arange(BATCH) + CONTEXT) % BATCH, np.ones(BATCH, np.float32)
    w = bundle.initial_weights()
    before, _, _ = program.run(f"evaluate_b{BATCH}", w, *batch)
    for _ in range(60):
        w, _ = program.run(f"train_b{BATCH}", w, np.full(1, 1.0, np.float32), *batch)
    after, correct, _ = program.run(f"evaluate_b{BATCH}", w, *batch)
    assert after.item() < 0.1 * before.item()
    assert correct.item() == BATCH


def test_adapting_to_a_text_passes_the_parity_gate(tmp_path):
    # What these two go through is all that the other methods of meta-learning do.
    roles = (Role.ADAPT, Role.MAML)
    bundle = export_program(
        build_model("byte-mlp", (CONTEXT,), IDS, seed=0, hidden=(6,)),
        out_dir=tmp_path / "out",
        batch_sizes=dict.fromkeys(roles, (BATCH,)),
        inner_steps=(2,),
    )
    assert bundle.parity is not None
    assert bundle.parity.worst.error <= 1e-5


@pytest.mark.slow
def test_adapting_to_all_bytes_passes_the_parity_gate(tmp_path):
    """Few rows of a large embedding see a batch: steps as long as the gate's first ones lead to where float32 ends."""
    bundle = export_program(
        build_model("byte-mlp", (16,), 256, seed=0),
        out_dir=tmp_path / "out",
        batch_sizes={Role.MAML: (16,)},
        inner_steps=(5,),
    )
    assert bundle.parity is not None
    assert bundle.parity.worst.error <= 1e-5
    assert bundle.parity.redrawn > 0
