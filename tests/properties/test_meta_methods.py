"""Laws of the methods of meta-learning: what K steps change, and what a gradient through them is a gradient of.

The last part asks exported programs, against derivatives that are not made by differentiating: differences of losses
in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from client_sdk.protocol.program import Manifest, MethodSpec, Role, TensorSpec, parameter_table_hash
from mobile_export import EagerProgram, ProgramBundle, export_program
from mobile_export.blueprint import MethodKind
from mobile_export.checks import flat_weights, parameter_table
from mobile_export.meta_methods import META_INPUT_NAMES, META_OUTPUT_NAMES, MetaMethods
from mobile_export.methods import Methods, cross_entropy
from mobile_export.parity import parameter_error, relative_error
from tests.bundles import FEATURE_SHAPES, NUM_CLASSES, tiny_model

MODELS = {name: tiny_model(name) for name in FEATURE_SHAPES}
TABLES = {name: parameter_table(model) for name, model in MODELS.items()}
PLAIN = {name: Methods(model, cross_entropy, TABLES[name]) for name, model in MODELS.items()}
META = {name: MetaMethods(methods) for name, methods in PLAIN.items()}
ROLES = list(META_INPUT_NAMES)


def masked(rng, shape, kept):
    """A mask that keeps about this part, and of a step everything or nothing now and then."""
    mask = (rng.random(shape) < kept).astype("f4")
    if len(shape) == 2:
        mask[rng.random(shape[0]) < 0.25] = 0
    return torch.from_numpy(mask)


@st.composite
def calls(draw, *, role=None, names=tuple(FEATURE_SHAPES)):
    """A model's name, a role, its K, and inputs by name: masks of all kinds, rates at which steps are felt."""
    name, role = draw(st.sampled_from(sorted(names))), role or draw(st.sampled_from(ROLES))
    batch, steps = draw(st.integers(1, 4)), None if role is Role.PER_FEDAVG else draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = draw(st.sampled_from([0.0, 0.5, 1.0]))
    initial = flat_weights(MODELS[name])
    values = {
        "w": initial * torch.from_numpy(rng.uniform(0.5, 1.5, len(initial)).astype("f4")),
        "lr": torch.tensor([draw(st.sampled_from([0.0, 0.1, 0.5]))]),
        "meta_lr": torch.tensor([0.5]),
        "rates": torch.from_numpy(rng.choice([0.0, 0.1, 0.4], len(TABLES[name])).astype("f4")),
    }
    for prefix, shape in (
        ("", (batch,)),
        ("inner_", (batch,) if steps is None else (steps, batch)),
        ("hessian_", (batch,)),
    ):
        values[f"{prefix}x"] = torch.from_numpy(rng.standard_normal((*shape, *FEATURE_SHAPES[name])).astype("f4"))
        values[f"{prefix}y"] = torch.from_numpy(rng.integers(0, NUM_CLASSES, shape))
        values[f"{prefix}mask"] = masked(rng, shape, kept)
    return name, MethodKind(role, batch, steps), values


def run(name, kind, values):
    """Outputs of a method by name."""
    outputs = META[name].function(kind.role)(*(values[n] for n in META_INPUT_NAMES[kind.role]))
    return dict(zip(META_OUTPUT_NAMES[kind.role], outputs, strict=True))


def manifest_of(name, kind, values, outputs) -> Manifest:
    """A manifest for the oracle alone: no program stands behind it."""
    table = TABLES[name]

    def specs(tensors):
        return tuple(
            TensorSpec(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape)) for n, t in tensors
        )

    method = MethodSpec(
        name=kind.name,
        role=kind.role,
        batch_size=kind.batch_size,
        inner_steps=kind.inner_steps,
        inputs=specs((n, values[n]) for n in META_INPUT_NAMES[kind.role]),
        outputs=specs(outputs.items()),
        planned_memory_bytes=0,
    )
    return Manifest(
        model_name=name,
        program_sha256="0" * 64,
        program_bytes=1,
        initial_weights_sha256="0" * 64,
        executorch_version="",
        torch_version="",
        content_key="",
        operators=(),
        parameters=table,
        parameter_table_sha256=parameter_table_hash(table),
        feature_shape=FEATURE_SHAPES[name],
        num_classes=NUM_CLASSES,
        methods=(method,),
    )


@settings(max_examples=25)
@given(calls())
def test_the_oracle_agrees_though_it_shares_no_code(call):
    name, kind, values = call
    outputs = run(name, kind, values)
    eager = EagerProgram(MODELS[name], manifest_of(name, kind, values, outputs))
    expected = eager.run(kind.name, *(values[n].numpy() for n in META_INPUT_NAMES[kind.role]))
    for (output, a), e in zip(outputs.items(), expected, strict=True):
        if output == "delta":
            # What is left of two vectors of the length of w.
            np.testing.assert_allclose(a.numpy(), e, atol=1e-5)
        elif output in {"w", "grad_sum"}:
            assert parameter_error(a.numpy(), e, TABLES[name])[1] <= 1e-3
        else:
            assert relative_error(a.numpy(), e) <= 1e-4


@settings(max_examples=25)
@given(calls())
def test_a_masked_example_contributes_exactly_nothing_whatever_it_holds(call):
    name, kind, values = call
    expected = run(name, kind, values)
    garbage = dict(values)
    for prefix in ("", "inner_", "hessian_"):
        dropped = values[f"{prefix}mask"] == 0
        garbage[f"{prefix}x"], garbage[f"{prefix}y"] = values[f"{prefix}x"].clone(), values[f"{prefix}y"].clone()
        garbage[f"{prefix}x"][dropped] = torch.nan
        garbage[f"{prefix}y"][dropped] = 2**40
    for output, actual in run(name, kind, garbage).items():
        assert torch.equal(actual, expected[output])
        assert torch.isfinite(actual).all()


@settings(max_examples=25)
@given(calls(), st.data())
def test_a_masked_step_is_no_step(call, data):
    """So one method serves every number of steps up to its K."""
    name, kind, values = call
    if kind.inner_steps is None or kind.inner_steps == 1:
        return
    step = data.draw(st.integers(0, kind.inner_steps - 1))
    without, fewer = dict(values), dict(values)
    without["inner_mask"] = values["inner_mask"].clone()
    without["inner_mask"][step] = 0
    others = [k for k in range(kind.inner_steps) if k != step]
    for n in ("inner_x", "inner_y", "inner_mask"):
        fewer[n] = values[n][others]
    expected = run(name, MethodKind(kind.role, kind.batch_size, kind.inner_steps - 1), fewer)
    for output, actual in run(name, kind, without).items():
        if output == "loss_sums":
            assert actual[step] == 0
            actual = actual[others]  # noqa: PLW2901 - the steps that were taken
        torch.testing.assert_close(actual, expected[output])


@settings(max_examples=25)
@given(calls(role=Role.ADAPT))
def test_no_step_and_no_rate_leave_the_weights_bit_for_bit(call):
    name, kind, values = call
    nowhere = run(
        name, kind, {**values, "inner_mask": torch.zeros_like(values["inner_mask"]), "rates": values["rates"] + 9}
    )
    assert nowhere["w"].numpy().tobytes() == values["w"].numpy().tobytes()
    assert not nowhere["loss_sums"].any()
    adapted = run(name, kind, values)["w"]
    for p, rate in zip(TABLES[name], values["rates"], strict=True):
        if rate == 0:
            own = slice(p.offset, p.offset + p.num_elements)
            assert adapted[own].numpy().tobytes() == values["w"][own].numpy().tobytes()


@settings(max_examples=25)
@given(calls(role=Role.ADAPT))
def test_adapting_is_training_step_by_step(call):
    name, kind, values = call
    w, losses = values["w"], []
    for x, y, mask in zip(values["inner_x"], values["inner_y"], values["inner_mask"], strict=True):
        w, loss = PLAIN[name].train(w, values["lr"], x, y, mask)
        losses.append(loss)
    alike = values["lr"].expand(len(TABLES[name])).clone()
    adapted = run(name, kind, {**values, "rates": alike})
    torch.testing.assert_close(adapted["w"], w)
    torch.testing.assert_close(adapted["loss_sums"], torch.cat(losses))
    moved = run(name, MethodKind(Role.REPTILE, kind.batch_size, kind.inner_steps), values)
    assert torch.equal(moved["delta"], adapted["w"] - values["w"])
    assert torch.equal(moved["loss_sums"], adapted["loss_sums"])


@settings(max_examples=25)
@given(calls(role=Role.REPTILE))
def test_one_step_of_reptile_is_the_mean_gradient(call):
    name, kind, values = call
    one = {n: v[:1] if n.startswith("inner_") else v for n, v in values.items()}
    delta = run(name, MethodKind(Role.REPTILE, kind.batch_size, 1), one)["delta"]
    grad_sum, _, count = PLAIN[name].grad(values["w"], *(one[f"inner_{n}"][0] for n in ("x", "y", "mask")))
    torch.testing.assert_close(delta, -values["lr"] * grad_sum / count.clamp(min=1), rtol=1e-4, atol=1e-6)


@settings(max_examples=25)
@given(calls(role=Role.FOMAML))
def test_first_order_is_the_gradient_at_the_adapted_weights(call):
    name, kind, values = call
    alike = values["lr"].expand(len(TABLES[name])).clone()
    adapted = run(name, MethodKind(Role.ADAPT, kind.batch_size, kind.inner_steps), {**values, "rates": alike})["w"]
    expected = PLAIN[name].grad(adapted, values["x"], values["y"], values["mask"])
    for actual, e in zip(run(name, kind, values).values(), expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(calls(role=Role.MAML))
def test_without_adaptation_both_orders_are_the_plain_gradient(call):
    name, kind, values = call
    values = {**values, "inner_mask": torch.zeros_like(values["inner_mask"]), "lr": torch.tensor([0.7])}
    expected = PLAIN[name].grad(values["w"], values["x"], values["y"], values["mask"])
    for role in (Role.MAML, Role.FOMAML):
        for actual, e in zip(
            run(name, MethodKind(role, kind.batch_size, kind.inner_steps), values).values(), expected, strict=True
        ):
            torch.testing.assert_close(actual, e, rtol=1e-5, atol=1e-6)


# --- exported programs against differences of losses ----------------------------------------------------------------

STEPS, BATCH, CLASSES, FEATURES = 2, 4, 3, 4


class Smooth(nn.Module):
    """A perceptron whose losses have all derivatives: 4-3-3, 27 parameters."""

    feature_shape = (FEATURES,)

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 3)
        self.output = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.output(torch.tanh(self.hidden(x)))


def smooth():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Smooth()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> ProgramBundle:
    return export_program(
        smooth(),
        out_dir=tmp_path_factory.mktemp("smooth") / "bundle",
        batch_sizes=dict.fromkeys((Role.MAML, Role.FOMAML, Role.PER_FEDAVG, Role.ADAPT, Role.GRAD), (BATCH,)),
        inner_steps=(STEPS,),
        model_name="smooth",
    )


@pytest.fixture(scope="module")
def program(bundle):
    program = bundle.load()
    yield program
    program.close()


@pytest.fixture(scope="module")
def given_inputs(bundle):
    """A call that adapts far: weights twice the initial ones, a large rate, a masked example in each batch."""
    rng = np.random.default_rng(1)
    values = {"w": 2 * bundle.initial_weights(), "lr": np.array([0.8], "f4"), "meta_lr": np.array([0.3], "f4")}
    for prefix, shape in (("", (BATCH,)), ("inner_", (STEPS, BATCH)), ("hessian_", (BATCH,))):
        values[f"{prefix}x"] = rng.standard_normal((*shape, FEATURES)).astype("f4")
        values[f"{prefix}y"] = rng.integers(0, CLASSES, shape)
        values[f"{prefix}mask"] = np.ones(shape, "f4")
        values[f"{prefix}mask"][..., -1] = 0
        values[f"{prefix}x"][..., -1, :] = np.nan
    return values


def called(program, method, values):
    spec = program.manifest.method(method)
    outputs = program.run(spec.name, *(values[s.name] for s in spec.inputs))
    return {s.name: o for s, o in zip(spec.outputs, outputs, strict=True)}


def loss_of(w, values, prefix="", step=None):
    """Sum of the kept examples' losses at float64 weights, differentiable once."""
    model = smooth().double()
    at, pieces = 0, {}
    for n, p in model.named_parameters():
        pieces[n] = w[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    x, y, keep = (
        torch.from_numpy(values[f"{prefix}{n}"] if step is None else values[f"{prefix}{n}"][step])
        for n in ("x", "y", "mask")
    )
    logits = functional_call(model, pieces, (x[keep > 0].double(),))
    return F.cross_entropy(logits, y[keep > 0], reduction="sum")


def descended(w, values, steps):
    """Weights after inner steps, in float64; nothing is differentiated through them."""
    for prefix, step, count in steps:
        w = w.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(w, values, prefix, step), w)
        w = w - float(values["lr"][0]) / count * gradient
    return w.detach()


def differences(function, w, step=1e-5):
    """Gradient of a scalar function by central differences, each of the fourth order."""
    gradient = torch.zeros_like(w)
    for i in range(len(w)):
        shift = torch.zeros_like(w)
        shift[i] = step
        near, far = (function(w + k * shift) - function(w - k * shift) for k in (1, 2))
        gradient[i] = (8 * near - far) / (12 * step)
    return gradient


INNER = [("inner_", k, BATCH - 1) for k in range(STEPS)]


def test_the_exported_maml_is_the_slope_of_the_loss_after_all_steps(program, given_inputs):
    """Were one of the inner steps taken for a constant, this would fail: FOMAML, which takes all so, is far off."""
    w = torch.from_numpy(given_inputs["w"]).double()
    slope = differences(lambda v: loss_of(descended(v, given_inputs, INNER), given_inputs), w).numpy()
    second, first = (called(program, role, given_inputs) for role in (Role.MAML, Role.FOMAML))
    assert relative_error(second["grad_sum"], slope) < 1e-5
    assert relative_error(first["grad_sum"], slope) > 0.1
    for outputs in (first, second):
        expected = float(loss_of(descended(w, given_inputs, INNER), given_inputs))
        assert float(outputs["loss_sum"][0]) == pytest.approx(expected, rel=1e-5)
        assert float(outputs["count"][0]) == BATCH - 1


@pytest.mark.parametrize("constant", range(STEPS))
def test_no_step_is_taken_for_a_constant(program, given_inputs, constant):
    """What the gradient would be with one step detached differs by more than the test above allows."""
    w = torch.from_numpy(given_inputs["w"]).double().requires_grad_()
    v = w
    for k, (prefix, step, count) in enumerate(INNER):
        (gradient,) = torch.autograd.grad(loss_of(v, given_inputs, prefix, step), v, create_graph=True)
        v = v - float(given_inputs["lr"][0]) / count * (gradient.detach() if k == constant else gradient)
    (weakened,) = torch.autograd.grad(loss_of(v, given_inputs), w)
    assert relative_error(called(program, Role.MAML, given_inputs)["grad_sum"], weakened.numpy()) > 0.02


def test_the_exported_first_order_is_the_gradient_at_the_adapted_weights(program, given_inputs):
    rates = np.full(len(program.manifest.parameters), given_inputs["lr"][0], "f4")
    adapted = called(program, Role.ADAPT, {**given_inputs, "rates": rates})["w"]
    expected = called(program, Role.GRAD, {**given_inputs, "w": adapted})
    actual = called(program, Role.FOMAML, given_inputs)
    for name in ("grad_sum", "loss_sum", "count"):
        assert relative_error(actual[name], expected[name]) < 1e-5
    exact = descended(torch.from_numpy(given_inputs["w"]).double(), given_inputs, INNER)
    assert relative_error(adapted, exact.numpy()) < 1e-6


def test_the_exported_local_meta_step_uses_the_hessian_of_the_third_batch(program, given_inputs):
    values = dict(
        given_inputs,
        inner_x=given_inputs["inner_x"][0],
        inner_y=given_inputs["inner_y"][0],
        inner_mask=given_inputs["inner_mask"][0],
    )
    w, size = torch.from_numpy(values["w"]).double(), BATCH - 1
    adapted = descended(w, values, [("inner_", None, size)]).requires_grad_()
    (g,) = torch.autograd.grad(loss_of(adapted, values) / size, adapted)

    def expected(curving):
        hessian = torch.autograd.functional.hessian(lambda v: loss_of(v, values, curving) / size, w)
        return w - 0.3 * (g - 0.8 * hessian @ g)

    outputs = called(program, Role.PER_FEDAVG, values)
    moved = outputs["w"] - values["w"]
    assert relative_error(moved, (expected("hessian_") - w).numpy()) < 1e-5
    # Not of the first batch, and not left out.
    assert relative_error(moved, (expected("inner_") - w).numpy()) > 0.05
    assert relative_error(moved, (-0.3 * g).numpy()) > 0.05
    assert float(outputs["loss_sum"][0]) == pytest.approx(float(loss_of(adapted.detach(), values)), rel=1e-5)
    assert float(outputs["count"][0]) == size
