"""Transposes are copies in ExecuTorch: there are fewer of them after the pass, and the values are the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch.fx.experimental.proxy_tensor import make_fx

from mobile_export.simplify import simplify

TRANSPOSES = (torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def moved(module) -> int:
    """Elements that the graph's transposes copy."""
    return sum(n.meta["val"].numel() for n in module.graph.nodes if n.target in TRANSPOSES and "val" in n.meta)


def simplified(function, *inputs):
    """The graph after the pass (traced again, so that new nodes know their shapes), and what it moved before."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    before = moved(module)
    simplify(module)
    return make_fx(module, tracing_mode="fake")(*inputs), before


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_a_linear_layer_and_its_gradient(batch):
    def layer(w, x):
        return torch.func.grad_and_value(lambda v: F.linear(x, v).square().sum())(w)

    w, x = normal(20, 30), normal(batch, 30)
    module, before = simplified(layer, w, x)
    for actual, expected in zip(module(w, x), layer(w, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert moved(module) < before
    assert not [n for n in module.graph.nodes if n.target in TRANSPOSES and n.args[0].target in TRANSPOSES]


@pytest.mark.parametrize("shapes", [((3, 4), (4, 50)), ((50, 4), (4, 3)), ((4, 4), (4, 4)), ((2, 60), (60, 2))])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_a_product_of_transposes_never_moves_more_than_before(shapes, batched, left, right):
    def product(a, b):
        a = a.transpose(-1, -2) if left else a
        b = b.transpose(-1, -2) if right else b
        return torch.bmm(a, b) if batched else torch.mm(a, b)

    outer = (6,) if batched else ()
    a = normal(*outer, *(shapes[0][::-1] if left else shapes[0]))
    b = normal(*outer, *(shapes[1][::-1] if right else shapes[1]))
    module, before = simplified(product, a, b)
    torch.testing.assert_close(module(a, b), product(a, b))
    assert moved(module) <= before


def test_a_transpose_that_others_use_too_stays():
    def function(a, b):
        flipped = b.t()
        return torch.mm(a, flipped), flipped * 2

    a, b = normal(2, 8), normal(90, 8)
    module, _ = simplified(function, a, b)
    for actual, expected in zip(module(a, b), function(a, b), strict=True):
        torch.testing.assert_close(actual, expected)


def test_swapping_other_axes_in_between_cancels_nothing():
    x = normal(2, 3, 4, 4)
    module, _ = simplified(lambda z: z.transpose(1, 2).transpose(-1, -2).transpose(2, 3).transpose(0, 1), x)
    assert torch.equal(module(x), x.transpose(1, 2).transpose(0, 1))


def test_other_axes_are_no_transpose():
    a, b = normal(3, 2, 4), normal(3, 5, 4)
    module, _ = simplified(lambda x, y: torch.bmm(x, y.transpose(1, 2)) + x.transpose(0, 1).sum(), a, b)
    torch.testing.assert_close(module(a, b), torch.bmm(a, b.transpose(1, 2)) + a.sum())
