"""Operators that ExecuTorch lacks, computes wrongly or slowly, rewritten with operators it computes right and fast.

Each entry says what goes wrong without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NotImplementedType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from mobile_export.convolutions import convolution, convolution_backward
from mobile_export.pooling import (
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d_with_indices,
    max_pool2d_with_indices_backward,
)

aten = torch.ops.aten

DecompositionTable = Mapping[torch._ops.OpOverload[Any, Any], Callable[..., Any]]  # noqa: SLF001 - torch names the type nowhere else


def constant_pad_nd(x: Tensor, pad: list[int], value: float = 0.0) -> Tensor | NotImplementedType:
    """Padding whose negative amounts (the gradient of a positive padding) become slices.

    ExecuTorch's kernel refuses negative amounts when it runs.
    """
    if min(pad, default=0) >= 0:
        # Tells torch to leave this call as it is.
        return NotImplemented  # type: ignore[no-any-return]  # typeshed: Any outside of operators
    for axis in range(len(pad) // 2):
        before, after = (min(0, amount) for amount in pad[2 * axis : 2 * axis + 2])
        dim = x.ndim - 1 - axis
        x = x.narrow(dim, -before, x.shape[dim] + before + after)
    if max(pad) <= 0:
        return x
    positive = [max(0, amount) for amount in pad]
    padded: Tensor = F.pad(x, positive, value=value)
    return padded


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)`` as a product and a sum.

    ExecuTorch has an optimised kernel for ``mm`` and none for ``addmm``: in two linear layers this is three times
    as fast.
    """
    product = a @ b
    if alpha != 1:
        product = product * alpha
    return product + (bias if beta == 1 else bias * beta)


def threshold_backward(grad_output: Tensor, x: Tensor, threshold: float) -> Tensor | NotImplementedType:
    """Gradient of ReLU: ``grad_output`` times 1 where ``x`` is positive and 0 elsewhere.

    ExecuTorch's comparisons and selections are portable kernels, five times slower than these operators. (The one
    difference: an infinite gradient of an inactive unit becomes NaN instead of 0.)
    """
    if threshold != 0:
        # Tells torch to leave this call as it is.
        return NotImplemented  # type: ignore[no-any-return]  # typeshed: Any outside of operators
    return grad_output * torch.relu(torch.sign(x))


def decomposition_table() -> dict[torch._ops.OpOverload[Any, Any], Callable[..., Any]]:
    """The rewrites of this module, by operator; applied while a method is traced, before torch's own."""
    return {
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
        aten.avg_pool2d.default: avg_pool2d,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten.constant_pad_nd.default: constant_pad_nd,
        aten.addmm.default: addmm,
        aten.threshold_backward.default: threshold_backward,
    }
