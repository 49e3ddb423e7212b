"""The manifest says what the program's own bytes say, and what the runtime finds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata

import pytest
import torch

from client_sdk.native.adapter import NativeProgram
from client_sdk.protocol.errors import ConfigurationError, ManifestError
from client_sdk.protocol.program import PROGRAM_FILE, WEIGHTS_FILE, Role
from mobile_export import ProgramBundle, export_program
from mobile_export.blueprint import draw_blueprint, method_kinds
from mobile_export.decompositions import decomposition_table
from mobile_export.manifest import build_manifest, read_methods
from mobile_export.methods import cross_entropy
from mobile_export.toolchain import read_plans
from tests.bundles import BATCH_SIZES, meta_bundle, tiny_bundle, tiny_model


@pytest.fixture(scope="module")
def mlp(tmp_path_factory) -> ProgramBundle:
    return tiny_bundle("mlp", tmp_path_factory.mktemp("bundles") / "mlp")


def test_every_role_and_batch_size_has_its_method(mlp):
    assert [(m.name, m.role, m.batch_size) for m in mlp.manifest.methods] == [
        ("grad_b4", Role.GRAD, 4),
        ("train_b4", Role.TRAIN, 4),
        ("evaluate_b8", Role.EVALUATE, 8),
        ("infer_b4", Role.INFER, 4),
    ]


def test_signatures_are_those_of_the_roles(mlp):
    def signature(role):
        m = mlp.manifest.method(role)
        return (
            [(t.name, t.dtype, t.shape) for t in m.inputs],
            [(t.name, t.dtype, t.shape) for t in m.outputs],
        )

    w, scalar = ("w", "float32", (131,)), ("float32", (1,))
    batch = [("x", "float32", (4, 12)), ("y", "int64", (4,)), ("mask", "float32", (4,))]
    assert signature(Role.GRAD) == (
        [w, *batch],
        [("grad_sum", "float32", (131,)), ("loss_sum", *scalar), ("count", *scalar)],
    )
    assert signature(Role.TRAIN) == ([w, ("lr", *scalar), *batch], [w, ("loss_sum", *scalar)])
    assert signature(Role.INFER) == ([w, batch[0]], [("logits", "float32", (4, 3))])
    assert signature(Role.EVALUATE)[1] == [(n, *scalar) for n in ("loss_sum", "correct", "count")]


def test_hashes_sizes_and_versions_are_those_of_the_files(mlp):
    program = (mlp.path / PROGRAM_FILE).read_bytes()
    manifest = mlp.manifest
    assert manifest.program_sha256 == hashlib.sha256(program).hexdigest()
    assert manifest.program_bytes == len(program)
    assert manifest.initial_weights_sha256 == hashlib.sha256((mlp.path / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert manifest.executorch_version == importlib.metadata.version("executorch")
    assert manifest.torch_version == torch.__version__
    assert (manifest.feature_shape, manifest.num_classes, manifest.num_parameters) == ((12,), 3, 131)


def test_planned_memory_is_what_the_runtime_would_reserve(mlp):
    program = mlp.load("native")
    assert isinstance(program, NativeProgram)
    for m in mlp.manifest.methods:
        assert m.planned_memory_bytes == program.planned_memory_bytes(m.name) > 0
    program.close()


def test_methods_of_several_steps_say_how_many_and_what_they_reserve(tmp_path):
    bundle = meta_bundle(tmp_path / "meta")
    methods = {m.name: m for m in bundle.manifest.methods}
    assert [name for name, m in methods.items() if m.inner_steps is not None] == [
        "adapt_k3_b8",
        "reptile_k3_b8",
        "maml_k3_b8",
        "fomaml_k3_b8",
    ]
    assert {m.inner_steps for m in methods.values()} == {None, 3}
    assert bundle.manifest.adapting_method(Role.MAML, 8, 2).name == "maml_k3_b8"
    maml = {t.name: (t.dtype, t.shape) for t in methods["maml_k3_b8"].inputs}
    assert list(maml) == ["w", "lr", "inner_x", "inner_y", "inner_mask", "x", "y", "mask"]
    assert (maml["inner_x"], maml["inner_y"]) == (("float32", (3, 8, 8, 8)), ("int64", (3, 8)))
    program = bundle.load("native")
    assert isinstance(program, NativeProgram)
    for name, m in methods.items():
        assert m.planned_memory_bytes == program.planned_memory_bytes(name) > 0
    program.close()
    # The graph of every inner step is kept for the second derivative.
    assert methods["maml_k3_b8"].planned_memory_bytes > methods["fomaml_k3_b8"].planned_memory_bytes


@pytest.mark.parametrize(
    ("sizes", "steps", "message"),
    [
        ({Role.MAML: (4,)}, (), r"maml take several steps .* inner_steps=\(5,\) or --inner-steps 5"),
        ({Role.TRAIN: (4,)}, (5,), "inner_steps are for the roles adapt, fomaml, maml, reptile"),
        ({Role.PER_FEDAVG: (4,)}, (5,), "inner_steps are for the roles"),
        ({Role.ADAPT: (4,)}, (0, 5), r"1 \.\. 100, not \[0, 5\]"),
        ({Role.ADAPT: (4,)}, (101,), r"1 \.\. 100"),
    ],
)
def test_steps_that_fit_no_method_are_refused(tmp_path, sizes, steps, message):
    with pytest.raises(ConfigurationError, match=message):
        export_program(tiny_model("softmax"), out_dir=tmp_path / "b", batch_sizes=sizes, inner_steps=steps)
    assert not (tmp_path / "b").exists()


def test_each_number_of_steps_goes_with_each_batch_size():
    kinds = method_kinds({Role.TRAIN: (4,), Role.ADAPT: (8, 2), Role.PER_FEDAVG: (4,)}, (5, 1))
    assert [kind.name for kind in kinds] == [
        "train_b4",
        "adapt_k1_b2",
        "adapt_k1_b8",
        "adapt_k5_b2",
        "adapt_k5_b8",
        "per_fedavg_b4",
    ]


def test_operators_are_those_of_all_methods_and_the_runtime_has_them(mlp):
    methods = {m.name: m for m in read_methods((mlp.path / PROGRAM_FILE).read_bytes())}
    assert set(mlp.manifest.operators) == {o for m in methods.values() for o in m.operators}
    assert "aten::argmax.out" in methods["evaluate_b8"].operators
    assert "aten::argmax.out" not in methods["train_b4"].operators
    assert set(mlp.manifest.operators) <= NativeProgram.operators()


def test_inputs_cost_no_planned_memory(mlp):
    for plan in read_plans((mlp.path / PROGRAM_FILE).read_bytes()):
        assert all(plan.values[i].val.allocation_info is None for i in plan.inputs)
        assert all(plan.values[i].val.allocation_info is not None for i in plan.outputs)


def test_constants_travel_in_the_manifest_and_in_the_program(tmp_path):
    bundle = export_program(
        tiny_model("softmax"),
        out_dir=tmp_path / "b",
        batch_sizes={Role.INFER: (1,)},
        constants={"image_side": 28, "clip_norm": 0.5},
        parity=False,
    )
    assert bundle.manifest.constants == {"image_side": 28, "clip_norm": 0.5}
    names = {m.name for m in read_methods((bundle.path / PROGRAM_FILE).read_bytes())}
    assert names == {"infer_b1", "image_side", "clip_norm"}
    assert [m.name for m in bundle.manifest.methods] == ["infer_b1"]


def test_a_program_whose_signature_is_not_its_roles_is_refused(mlp):
    blueprint = draw_blueprint(
        tiny_model("mlp"),
        cross_entropy,
        batch_sizes=BATCH_SIZES,
        example_batch=None,
        feature_shape=None,
        num_classes=None,
        model_name=None,
        constants={},
        decompositions=decomposition_table(),
        traced=lambda _method: None,
    )
    swapped = dict(blueprint.methods)
    other = next(method for method in swapped.values() if method.kind.role is Role.TRAIN)
    swapped["grad_b4"] = dataclasses.replace(other, graph=swapped["grad_b4"].graph)
    program = (mlp.path / PROGRAM_FILE).read_bytes()
    with pytest.raises(ManifestError, match="grad_b4 takes 4 inputs"):
        build_manifest(program, dataclasses.replace(blueprint, methods=swapped), "key")
