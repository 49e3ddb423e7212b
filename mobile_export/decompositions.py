"""Operators that ExecuTorch lacks or computes wrongly, rewritten with operators it computes right.

The table extends torch's own core ATen decompositions. Each entry says what goes wrong without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

DecompositionTable = Mapping[torch._ops.OperatorBase, Callable[..., Any]]  # noqa: SLF001 - torch names it nowhere else


def max_pool2d_backward(  # noqa: PLR0917 - the operator's own signature
    grad_output: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Gradient of 2-D max-pooling: scatter each output gradient to the position of its maximum.

    ExecuTorch's kernel adds into an output that it never zeroes, so its result depends on stale memory and is wrong
    without any error from the second call on.
    """
    del kernel_size, stride, padding, dilation, ceil_mode  # the indices hold all that matters
    planes = (*x.shape[:-2], math.prod(x.shape[-2:]))
    windows = (*indices.shape[:-2], math.prod(indices.shape[-2:]))
    zeros = torch.zeros(planes, dtype=grad_output.dtype)
    return zeros.scatter_add(-1, indices.reshape(windows), grad_output.reshape(windows)).reshape(x.shape)


def constant_pad_nd(x: Tensor, pad: list[int], value: float = 0.0) -> Tensor:
    """Padding whose negative amounts (the gradient of a positive padding) become slices.

    ExecuTorch's kernel refuses negative amounts when it runs.
    """
    if min(pad, default=0) >= 0:
        return NotImplemented  # to torch: leave this call as it is
    for axis in range(len(pad) // 2):
        before, after = (min(0, amount) for amount in pad[2 * axis : 2 * axis + 2])
        dim = x.ndim - 1 - axis
        x = x.narrow(dim, -before, x.shape[dim] + before + after)
    if max(pad) <= 0:
        return x
    positive = [max(0, amount) for amount in pad]
    padded: Tensor = torch.constant_pad_nd(x, positive, value)
    return padded


def decomposition_table() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """Torch's core ATen decompositions with the entries of this module."""
    table: dict[torch._ops.OperatorBase, Callable[..., Any]] = dict(torch.export.default_decompositions())
    table[aten.max_pool2d_with_indices_backward.default] = max_pool2d_backward
    table[aten.constant_pad_nd.default] = constant_pad_nd
    return table
