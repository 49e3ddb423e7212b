"""The functional methods, before any export: sums, masks, the fused step."""

from __future__ import annotations

import pytest
import torch

from client_sdk.protocol.program import Role
from mobile_export.checks import flat_weights, parameter_table
from mobile_export.methods import INPUT_NAMES, OUTPUT_NAMES, Methods, cross_entropy
from tests.bundles import FEATURE_SHAPES, NUM_CLASSES, tiny_model

NAMES = tuple(FEATURE_SHAPES)


def make(name, batch=6):
    """Methods of a tiny model, its weights, and a batch."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *FEATURE_SHAPES[name], generator=generator)
    y = torch.randint(0, NUM_CLASSES, (batch,), generator=generator)
    return Methods(model, cross_entropy, parameter_table(model)), flat_weights(model), x, y


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd(name):
    methods, w, x, y = make(name)
    model = tiny_model(name)
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    grad_sum, loss_sum, count = methods.grad(w, x, y, torch.ones(6))
    torch.testing.assert_close(grad_sum, expected)
    torch.testing.assert_close(loss_sum, loss.detach().reshape(1))
    assert count.tolist() == [6.0]


@pytest.mark.parametrize("role", [Role.GRAD, Role.TRAIN, Role.EVALUATE])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_example_contributes_exactly_nothing_whatever_it_holds(name, role):
    methods, w, x, y = make(name)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1])
    lr = (torch.tensor([0.5]),) if role is Role.TRAIN else ()
    run = methods.function(role)
    zeros = run(w, *lr, x * mask.reshape(-1, *[1] * (x.ndim - 1)), y, mask)
    garbage_x, garbage_y = x.clone(), y.clone()
    garbage_x[1], garbage_x[3], garbage_x[4] = torch.nan, torch.inf, 1e38
    garbage_y[1], garbage_y[3], garbage_y[4] = -1, 2**62, NUM_CLASSES
    garbage = run(w, *lr, garbage_x, garbage_y, mask)
    assert all(torch.equal(a, b) for a, b in zip(zeros, garbage, strict=True))
    alone = run(w, *lr, x[mask > 0], y[mask > 0], torch.ones(3))
    for a, b in zip(garbage, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_fully_masked_batch_changes_nothing(name):
    methods, w, x, y = make(name)
    mask = torch.zeros(6)
    grad_sum, loss_sum, count = methods.grad(w, x * torch.nan, y, mask)
    assert not grad_sum.any()
    assert (float(loss_sum), float(count)) == (0, 0)
    stepped, loss_sum = methods.train(w, torch.tensor([1e3]), x * torch.nan, y, mask)
    assert torch.equal(stepped, w)
    assert float(loss_sum) == 0
    assert [float(v) for v in methods.evaluate(w, x * torch.nan, y, mask)] == [0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_step_is_gradient_descent_on_the_mean(name):
    methods, w, x, y = make(name)
    mask = torch.tensor([1.0, 1, 0, 1, 1, 0])
    grad_sum, loss_sum, count = methods.grad(w, x, y, mask)
    stepped, step_loss = methods.train(w, torch.tensor([0.25]), x, y, mask)
    torch.testing.assert_close(stepped, w - 0.25 * grad_sum / count)
    assert torch.equal(step_loss, loss_sum)


def test_evaluation_counts_the_first_of_equal_logits():
    methods, w, x, _ = make("softmax")
    loss_sum, correct, count = methods.evaluate(w * 0, x, torch.tensor([0, 1, 2, 0, 0, 0]), torch.ones(6))
    torch.testing.assert_close(loss_sum, 6 * torch.log(torch.tensor([3.0])))
    assert (float(correct), float(count)) == (4, 6)


def test_another_loss_takes_the_place_of_cross_entropy():
    model = tiny_model("mlp")
    methods = Methods(model, lambda logits, y: (logits[:, 0] - y) ** 2, parameter_table(model))
    _, w, x, y = make("mlp")
    _, loss_sum, _ = methods.grad(w, x, y, torch.ones(6))
    torch.testing.assert_close(loss_sum, ((model(x)[:, 0] - y) ** 2).sum().detach().reshape(1))


@pytest.mark.parametrize("role", INPUT_NAMES)
def test_a_method_has_the_named_inputs_and_outputs(role):
    methods, w, x, y = make("mlp")
    values = {"w": w, "lr": torch.ones(1), "x": x, "y": y, "mask": torch.ones(6)}
    outputs = methods.function(role)(*(values[n] for n in INPUT_NAMES[role]))
    shapes = dict(zip(OUTPUT_NAMES[role], (tuple(o.shape) for o in outputs), strict=True))
    scalars = {n: s for n, s in shapes.items() if n in {"loss_sum", "count", "correct"}}
    assert set(scalars.values()) <= {(1,)}
    assert shapes.get("logits", (6, NUM_CLASSES)) == (6, NUM_CLASSES)
    assert {shapes[n] for n in ("w", "grad_sum") if n in shapes} <= {tuple(w.shape)}
    assert all(o.dtype is torch.float32 for o in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_to_the_model_or_the_inputs(name):
    methods, w, x, y = make(name)
    before = [t.clone() for t in (w, x, y, flat_weights(methods.model))]
    methods.train(w, torch.ones(1), x, y, torch.ones(6))
    assert all(torch.equal(a, b) for a, b in zip(before, (w, x, y, flat_weights(methods.model)), strict=True))
    assert all(p.grad is None for p in methods.model.parameters())
