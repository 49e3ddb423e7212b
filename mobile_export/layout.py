"""Image batches with the batch axis last, ``[C, H, W, B]``: the layout in which ExecuTorch is fast.

Its kernels copy runs of memory fast and single elements slowly, and the run of a slice along an image's axis is all
that lies behind this axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def batch_last(x: Tensor) -> Tensor:
    """``[B, C, H, W] -> [C, H, W, B]``."""
    return x.permute(1, 2, 3, 0)


def batch_first(x: Tensor) -> Tensor:
    """``[C, H, W, B] -> [B, C, H, W]``."""
    return x.permute(3, 0, 1, 2)


def strided(x: Tensor, dim: int, start: int, step: int, count: int) -> Tensor:
    """``count`` entries of ``x`` along ``dim``: ``start``, ``start + step``, .."""
    stop = start + step * (count - 1) + 1
    if step == 1:
        return x.narrow(dim, start, count)
    return torch.ops.aten.slice.Tensor(x, dim, start, stop, step)  # type: ignore[no-any-return] # torch


def placed(x: Tensor, dim: int, start: int, step: int, size: int) -> Tensor:
    """The transpose of ``strided``: the entries of ``x`` at ``start``, ``start + step``, .. among ``size`` zeros.

    Entries that fall outside (``start`` may be negative) are left out.
    """
    if step > 1:
        apart = torch.stack([x, *[torch.zeros_like(x)] * (step - 1)], dim=dim + 1)
        x = apart.flatten(dim, dim + 1).narrow(dim, 0, (x.shape[dim] - 1) * step + 1)
    stop = start + x.shape[dim]
    first, last = max(0, -start), x.shape[dim] - max(0, stop - size)
    if last <= first:
        return torch.zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])
    if (first, last) != (0, x.shape[dim]):
        x = x.narrow(dim, first, last - first)
    before, after = max(0, start), max(0, size - stop)
    if before or after:
        x = F.pad(x, (*(0, 0) * (x.ndim - 1 - dim), before, after))
    return x
