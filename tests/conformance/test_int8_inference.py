"""Int8 methods, in each runtime: logits near the float model's, with whatever head is given.

And the gate that an export goes through: each way in which int8 could be wrong is planted, and found.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from client_sdk.protocol.errors import ConfigurationError, ManifestError
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Manifest, Role, body_hash
from client_sdk.runtime import load_program
from mobile_export import EagerProgram, Int8Body, ParityError, UnsupportedModel, build_model, export_program
from mobile_export.blueprint import draw_blueprint
from mobile_export.checks import parameter_table
from mobile_export.decompositions import decomposition_table
from mobile_export.int8 import MIN_EXAMPLES, quantise
from mobile_export.int8_parity import FLOAT_TOLERANCE, ROUNDING_TOLERANCE, check_int8
from mobile_export.int8_toolchain import lower_int8
from mobile_export.methods import cross_entropy
from mobile_export.toolchain import emit
from tests.bundles import FEATURE_SHAPES, int8_body, int8_bundle, tiny_model

HEADS = {"mlp": ("output.weight", "output.bias"), "cnn": ("head.output.weight", "head.output.bias")}


@pytest.fixture(scope="module", params=sorted(HEADS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(name, tmp_path_factory):
    return int8_bundle(name, tmp_path_factory.mktemp("int8") / "bundle")


@pytest.fixture(scope="module", params=["native", "pybindings"])
def program(bundle, request):
    opened = load_program(bundle.path, request.param)
    yield opened
    opened.close()


def layers(manifest: Manifest) -> SharedLayers:
    return SharedLayers(manifest.parameters, manifest.method(Role.INFER_INT8).head)


def heads(bundle, count=3):
    rng = np.random.default_rng(0)
    own = layers(bundle.manifest).personal_of(bundle.initial_weights())
    return [own, *(rng.normal(scale=0.3, size=own.shape).astype(np.float32) for _ in range(count - 1))]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_the_manifest_says_what_the_head_is_and_which_body_is_frozen(name, bundle):
    weights = bundle.initial_weights()
    for method in (m for m in bundle.manifest.methods if m.role is Role.INFER_INT8):
        assert method.head == HEADS[name]
        assert method.body_sha256 == body_hash(layers(bundle.manifest).gather(weights))
        assert [t.name for t in method.inputs] == ["head", "x"]
        assert method.inputs[0].shape == layers(bundle.manifest).personal_of(weights).shape
        assert [t.name for t in method.outputs] == ["logits"]


def test_logits_are_near_the_float_model_with_any_head(name, bundle, program):
    eager = EagerProgram(tiny_model(name), bundle.manifest)
    x = int8_body(name).examples[:4]
    for head in heads(bundle):
        w = layers(bundle.manifest).with_personal(bundle.initial_weights(), head)
        [exact] = eager.run("infer_b4", w, x)
        [logits] = program.run("infer_int8_b4", head, x)
        assert 0 < relative(logits, exact) < FLOAT_TOLERANCE


def test_the_head_is_float_and_linear(bundle, program):
    """Twice a head gives twice the logits, to float32's last bits: nothing of it was rounded to int8."""
    x = np.random.default_rng(1).random((4, *bundle.manifest.feature_shape), np.float32)
    a, b = heads(bundle)[1:]
    [la], [lb], [both] = (program.run("infer_int8_b4", h, x) for h in (a, b, a + b))
    np.testing.assert_allclose(both, la + lb, rtol=1e-5, atol=1e-6)


def test_an_example_has_the_same_logits_in_every_batch(mlp):
    x = np.random.default_rng(2).random((4, 12), np.float32)
    head = heads(mlp)[1]
    program = load_program(mlp.path, "native")
    [together] = program.run("infer_int8_b4", head, x)
    alone = np.concatenate([program.run("infer_int8_b1", head, x[i : i + 1])[0] for i in range(4)])
    program.close()
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_the_bits_do_not_depend_on_what_ran_before(bundle, program):
    rng = np.random.default_rng(3)
    x = rng.random((4, *bundle.manifest.feature_shape), np.float32)
    head = heads(bundle)[0]
    [first] = program.run("infer_int8_b4", head, x)
    for _ in range(3):
        program.run("infer_int8_b4", -head, -7 * x)
        program.run("infer_b4", rng.normal(size=bundle.manifest.num_parameters).astype(np.float32), x)
        assert program.run("infer_int8_b4", head, x)[0].tobytes() == first.tobytes()


def test_both_runtimes_compute_the_same(bundle):
    x = int8_body(bundle.manifest.model_name.removeprefix("tiny-")).examples[:4]
    found = []
    for runtime in ("native", "pybindings"):
        opened = load_program(bundle.path, runtime)
        found.append(opened.run("infer_int8_b4", heads(bundle)[1], x)[0])
        opened.close()
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_the_gate_says_what_it_measured(bundle):
    measured = {m.method: m for m in bundle.parity.int8}
    assert set(measured) == {m.name for m in bundle.manifest.methods if m.role is Role.INFER_INT8}
    for one in measured.values():
        assert one.rounding_error <= ROUNDING_TOLERANCE
        assert 0 < one.float_error <= FLOAT_TOLERANCE
        assert one.agreement >= 0.9
        assert one.examples == 40


def test_the_body_takes_a_byte_a_parameter(tmp_path):
    """A 784-64-10 perceptron: 50,176 weights of the body."""
    model = build_model("mlp", (784,), 10, seed=0)
    body = Int8Body(("output",), np.random.default_rng(0).random((MIN_EXAMPLES, 784), np.float32))
    before = [p.detach().clone() for p in model.parameters()]
    steps = []
    bundle = export_program(
        model,
        out_dir=tmp_path / "out",
        batch_sizes={Role.INFER: (1,), Role.INFER_INT8: (1, 8)},
        int8=body,
        use_cache=False,
        progress=steps.append,
    )
    assert [s.done for s in steps] == list(range(1, steps[-1].total + 1))
    assert 50_176 < bundle.manifest.program_bytes < 2 * 50_176  # both batch sizes have the one body
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- the gate -------------------------------------------------------------------------------------------------------


class Altered:
    """A program whose int8 methods get, or give, something else."""

    def __init__(self, program, *, head=lambda head: head, x=lambda x: x, logits=lambda logits: logits):
        self.program, self.manifest = program, program.manifest
        self.head, self.x, self.logits = head, x, logits

    def run(self, method, head, x):
        return (self.logits(self.program.run(method, self.head(head), self.x(x))[0]),)

    def close(self):
        self.program.close()


@pytest.fixture(scope="module")
def quantised():
    model = tiny_model("mlp")
    return quantise(model, parameter_table(model), FEATURE_SHAPES["mlp"], int8_body("mlp"), (4,))[4]


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return int8_bundle("mlp", tmp_path_factory.mktemp("gate") / "bundle")


def gate(bundle, graph, *, model=None, body=None, program=None, **alter):
    opened = program or Altered(load_program(bundle.path, "native"), **alter)
    try:
        return check_int8(
            opened,
            bundle.manifest.method(Role.INFER_INT8, 4),
            graph,
            model or tiny_model("mlp"),
            body or int8_body("mlp"),
        )
    finally:
        opened.close()


def test_the_gate_passes_what_is_right(mlp, quantised):
    assert gate(mlp, quantised.graph).agreement >= 0.9


@pytest.mark.parametrize(
    "alter",
    [
        {"logits": lambda logits: logits * 1.02},
        {"logits": lambda logits: logits + 0.02},
        {"logits": lambda logits: logits * np.nan},
        {"logits": lambda logits: np.roll(logits, 1, axis=0)},
        {"x": lambda x: 1.02 * x},
        {"head": lambda head: head.astype(np.float16).astype(np.float32) * np.float32(1.02)},
    ],
)
def test_a_backend_that_computes_something_else_is_found(mlp, quantised, alter):
    with pytest.raises(ParityError, match="against the quantised graph"):
        gate(mlp, quantised.graph, **alter)


def test_a_head_that_is_not_the_inputs_is_found(mlp, quantised):
    stale = layers(mlp.manifest).personal_of(mlp.initial_weights())
    with pytest.raises(ParityError, match="against the quantised graph"):
        gate(mlp, quantised.graph, head=lambda _: stale)


def test_a_scale_that_is_wrong_in_the_program_is_found(mlp, quantised):
    """A really exported program, whose scales were changed before it was lowered."""
    model = tiny_model("mlp")
    wrong = quantise(model, parameter_table(model), FEATURE_SHAPES["mlp"], int8_body("mlp"), (4,))[4]
    rescaled = 0
    for node in wrong.graph.graph.nodes:
        if "quantize_per_tensor" in str(node.target):
            node.args = (node.args[0], node.args[1] / 4, *node.args[2:])
            rescaled += 1
    assert rescaled == 4
    wrong.graph.recompile()
    buffer = emit({"infer_int8_b4": lower_int8(wrong.graph, wrong.inputs)}, {})
    with pytest.raises(ParityError, match="against the quantised graph"):
        gate(mlp, quantised.graph, program=_program(mlp, buffer))
    # Wrong in the graph as well: the backend computes what it was told, and that is far from the model.
    with pytest.raises(ParityError, match="against the float model"):
        gate(mlp, wrong.graph, program=_program(mlp, buffer))


def _program(bundle, buffer):
    from client_sdk.native.adapter import NativeProgram  # noqa: PLC0415 - only here

    methods = (bundle.manifest.method(Role.INFER_INT8, 4),)
    return NativeProgram(bundle.manifest.model_copy(update={"methods": methods}), buffer)


def test_another_model_than_the_quantised_one_is_found(mlp, quantised):
    with pytest.raises(ParityError, match="against the float model"):
        gate(mlp, quantised.graph, model=tiny_model("mlp", seed=1))


def test_calibration_on_examples_unlike_those_held_out_is_refused(tmp_path):
    """A range that is too narrow saturates; the examples that calibration did not see show it."""
    examples = np.random.default_rng(0).random((40, 12), np.float32)
    examples[::5] *= 30
    with pytest.raises(ParityError, match="against the float model"):
        export_program(
            tiny_model("mlp"),
            out_dir=tmp_path / "out",
            batch_sizes={Role.INFER_INT8: (4,)},
            int8=Int8Body(("output",), examples),
        )
    assert not (tmp_path / "out").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def attempt(tmp_path, model=None, *, sizes=((Role.INFER_INT8, (4,)),), **body):
    body = {"head": ("output",), "examples": int8_body("mlp").examples} | body
    return export_program(
        model or tiny_model("mlp"), out_dir=tmp_path / "out", batch_sizes=dict(sizes), int8=Int8Body(**body)
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"head": ("outputs",)}, "no layer 'outputs'"),
        ({"head": ("hidden", "output")}, "all layers are personal"),
        ({"head": ("hidden",)}, "output.bias, output.weight come after the head"),
        ({"head": ("output.weight",)}, "output.bias come after the head, or together with it"),
        ({"examples": np.zeros((40, 11), np.float32)}, r"'n >= 20', 12\], not float32 \[40, 11\]"),
        ({"examples": np.zeros((19, 12), np.float32)}, "n >= 20"),
        ({"examples": np.zeros((40, 12))}, "not float64"),
        ({"examples": np.full((40, 12), np.nan, np.float32)}, "NaN"),
    ],
)
def test_a_body_that_does_not_fit_the_model_is_refused(tmp_path, body, message):
    with pytest.raises(ConfigurationError, match=message):
        attempt(tmp_path, **body)


def test_batch_sizes_and_body_come_together(tmp_path):
    with pytest.raises(ConfigurationError, match="infer_int8"):
        attempt(tmp_path, sizes=((Role.INFER, (4,)),))
    with pytest.raises(ConfigurationError, match="int8="):
        export_program(tiny_model("mlp"), out_dir=tmp_path / "out", batch_sizes={Role.INFER_INT8: (4,)})


def test_a_model_with_nothing_to_quantise_is_refused(tmp_path):
    class Scaled(nn.Module):
        feature_shape = (12,)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))
            self.output = nn.Linear(12, 3)

        def forward(self, x):
            return self.output(torch.sin(x - self.scale))

    with pytest.raises(UnsupportedModel, match="no layer before the head output can be quantised"):
        attempt(tmp_path, Scaled())


def test_a_manifest_whose_head_is_not_its_input_is_refused(mlp):
    method = mlp.manifest.method(Role.INFER_INT8, 4)
    for change in (
        {"head": method.head[::-1]},
        {"head": method.head[:1]},
        {"head": None},
        {"body_sha256": None},
        {"role": Role.INFER},
    ):
        spoilt = mlp.manifest.model_copy(update={"methods": (method.model_copy(update=change),)})
        with pytest.raises(ManifestError, match="head"):
            Manifest.from_json(spoilt.to_json())


def test_other_examples_are_another_export():
    body = int8_body("mlp")
    other = dataclasses.replace(body, examples=body.examples * np.float32(1.5))
    first, same, second = (
        draw_blueprint(
            tiny_model("mlp"),
            cross_entropy,
            batch_sizes={Role.INFER_INT8: (4,)},
            example_batch=None,
            feature_shape=None,
            num_classes=None,
            model_name=None,
            constants={},
            decompositions=decomposition_table(),
            int8=body,
            traced=lambda _: None,
        )
        for body in (body, body, other)
    )
    assert first.content_key() == same.content_key() != second.content_key()
    hashes = {b.methods["infer_int8_b4"].body_sha256 for b in (first, same, second)}
    assert len(hashes) == 1
