"""Each rewrite computes what the operator it replaces computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch.fx.experimental.proxy_tensor import make_fx

from mobile_export.decompositions import decomposition_table

TABLE = decomposition_table()


def rewritten(function, *inputs):
    """Graph of a function after the rewrites, and what it calls."""
    module = make_fx(function, decomposition_table=dict(TABLE))(*inputs)
    return module, {n.target for n in module.graph.nodes if n.op == "call_function"}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 6, 8), {"kernel_size": 2}),
        ((1, 1, 5, 5), {"kernel_size": 2}),
        ((2, 2, 7, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((2, 2, 7, 7), {"kernel_size": 3, "stride": 1}),
        ((2, 2, 7, 6), {"kernel_size": 2, "ceil_mode": True}),
        ((3, 6, 6), {"kernel_size": 2}),
        ((1, 1, 4, 4), {"kernel_size": 2, "dilation": 2}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_max_pooling_has_its_gradient(shape, options, tied):
    x = torch.zeros(shape) if tied else normal(*shape)

    def gradient(x):
        return torch.func.grad(lambda z: (F.max_pool2d(z, **options) ** 2 + F.max_pool2d(z, **options)).sum())(x)

    module, called = rewritten(gradient, x)
    assert torch.ops.aten.max_pool2d_with_indices_backward.default not in called
    torch.testing.assert_close(module(x), gradient(x))


@pytest.mark.parametrize(
    "pad", [(-1, -1), (-1, 0, 0, -2), (1, -1), (-1, 2, 3, -1), (1, 1, 0, 0), (0, 0), (0, 0, -1, 1)]
)
def test_padding_by_negative_amounts_is_a_slice(pad):
    x = normal(2, 5, 6)
    module, _ = rewritten(lambda z: torch.constant_pad_nd(z, pad, 0.5), x)
    assert torch.equal(module(x), torch.constant_pad_nd(x, pad, 0.5))
    amounts = [n.args[1] for n in module.graph.nodes if n.target is torch.ops.aten.constant_pad_nd.default]
    assert all(min(a) >= 0 for a in amounts)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, 2.0), (0.25, -3)])
@pytest.mark.parametrize("bias", [(4,), (3, 4), (1, 4), (3, 1)])
def test_addmm_is_a_product_and_a_sum(bias, beta, alpha):
    inputs = normal(*bias), normal(3, 5), normal(5, 4)
    module, called = rewritten(lambda c, a, b: torch.addmm(c, a, b, beta=beta, alpha=alpha), *inputs)
    assert torch.ops.aten.addmm.default not in called
    torch.testing.assert_close(module(*inputs), torch.addmm(*inputs, beta=beta, alpha=alpha))


def test_the_gradient_of_relu_is_that_of_autograd():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-38, 3.0, -torch.inf, torch.inf])

    def gradient(x):
        return torch.func.grad(lambda z: (torch.relu(z) * torch.arange(1.0, 8)).sum())(x)

    module, called = rewritten(gradient, x)
    assert torch.ops.aten.threshold_backward.default not in called
    assert torch.equal(module(x), gradient(x))
    assert torch.isnan(module(x * torch.nan)).all() == torch.isnan(gradient(x * torch.nan)).all()


def test_another_threshold_is_left_to_torch():
    x = normal(9)
    module, called = rewritten(torch.func.grad(lambda v: F.threshold(v, 0.5, 7.0).sum()), x)
    assert torch.ops.aten.threshold_backward.default in called
    assert torch.equal(module(x), (x > 0.5).float())


def compared(function, *inputs):
    """The rewritten function's values and gradients are torch's own."""

    def both(*inputs):
        value = function(*inputs)
        weights = torch.arange(1.0, value.numel() + 1).reshape(value.shape) / value.numel()
        gradients = torch.func.grad(
            lambda *z: (function(*z).square() * weights).sum(), argnums=tuple(range(len(inputs)))
        )(*inputs)
        return value, *gradients

    module, called = rewritten(both, *inputs)
    for actual, expected in zip(module(*inputs), both(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return called


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((2, 3, 6, 5), (4, 3, 3, 3), {"padding": 1}),
        ((2, 3, 7, 8), (4, 3, 3, 2), {"stride": 2, "padding": (1, 0)}),
        ((1, 5, 9, 9), (2, 5, 3, 3), {"dilation": 2, "padding": 2}),
        ((3, 2, 4, 4), (5, 2, 1, 1), {"stride": 3}),
        ((2, 2, 6, 6), (3, 2, 5, 5), {"padding": 4, "stride": (2, 1)}),
        ((2, 3, 10), (4, 3, 3), {"padding": 1, "stride": 2}),
    ],
)
def test_a_convolution_and_its_gradients_are_products(x, weight, options):
    convolve = F.conv1d if len(x) == 3 else F.conv2d
    called = compared(lambda a, w, b: convolve(a, w, b, **options), normal(*x), normal(*weight), normal(weight[0]))
    assert torch.ops.aten.mm.default in called
    assert not called & {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}


def test_a_grouped_convolution_is_left_to_torch():
    called = compared(lambda a, w: F.conv2d(a, w, groups=2), normal(2, 4, 5, 5), normal(4, 2, 3, 3))
    assert torch.ops.aten.convolution.default in called


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((2, 3, 5, 4), (3, 2, 3, 2), {}),
        ((2, 3, 5, 4), (3, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0)}),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"stride": 3, "output_padding": 2, "dilation": 2}),
        ((2, 3, 6), (3, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ],
)
def test_a_transposed_convolution_is_a_product(x, weight, options):
    convolve = F.conv_transpose1d if len(x) == 3 else F.conv_transpose2d
    inputs = normal(*x), normal(*weight), normal(weight[1])
    module, called = rewritten(lambda a, w, b: convolve(a, w, b, **options), *inputs)
    torch.testing.assert_close(module(*inputs), convolve(*inputs, **options), rtol=1e-4, atol=1e-4)
    assert torch.ops.aten.convolution.default not in called


def test_an_output_padding_beyond_the_stride_is_left_to_torch():
    def convolve(a, w):
        return F.conv_transpose2d(a, w, dilation=2, output_padding=1)

    inputs = normal(1, 2, 4, 4), normal(2, 3, 2, 2)
    module, called = rewritten(convolve, *inputs)
    torch.testing.assert_close(module(*inputs), convolve(*inputs))
    assert torch.ops.aten.convolution.default in called


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        lambda x, w: F.max_pool2d(F.conv2d(x, w), 2),
        lambda x, w: F.avg_pool2d(F.conv2d(x, w), 3, stride=2, padding=1),
        lambda x, w: torch.relu(F.conv2d(x, w, dilation=2)),
    ],
)
def test_second_derivatives_are_torchs(layer):
    """The product of a Hessian and a vector, which differentiates what the rewrites stand for."""

    def product(x, w, along):
        def slope(x, w):
            by_x, by_w = torch.func.grad(lambda *z: layer(*z).pow(3).sum(), argnums=(0, 1))(x, w)
            return (by_x * along).sum() + by_w.square().sum()

        return torch.func.grad(slope, argnums=(0, 1))(x, w)

    inputs = normal(2, 2, 7, 7), normal(3, 2, 3, 3), normal(2, 2, 7, 7)
    module, called = rewritten(product, *inputs)
    for actual, expected in zip(module(*inputs), product(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert torch.ops.aten.convolution.default not in called


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 6, 8), {"kernel_size": 2}),
        ((2, 2, 7, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((2, 2, 7, 7), {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
        ((2, 2, 7, 6), {"kernel_size": 2, "ceil_mode": True}),
        ((3, 6, 6), {"kernel_size": 2, "divisor_override": 3}),
    ],
)
def test_average_pooling_and_its_gradient(shape, options):
    called = compared(lambda x: F.avg_pool2d(x, **options), normal(*shape))
    assert not called & {torch.ops.aten.avg_pool2d.default, torch.ops.aten.avg_pool2d_backward.default}


def test_positions_of_maxima():
    x = normal(2, 2, 7, 7)
    module, _ = rewritten(lambda z: F.max_pool2d(z, 3, 2, 1, return_indices=True), x)
    for actual, expected in zip(module(x), F.max_pool2d(x, 3, 2, 1, return_indices=True), strict=True):
        assert torch.equal(actual, expected)
