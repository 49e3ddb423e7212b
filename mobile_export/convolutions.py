"""Convolutions as matrix products of tensors whose batch axis comes last, in place of ExecuTorch's own kernels.

ExecuTorch's convolution and its gradient are portable loops, twenty times slower than these products. What makes the
products fast is the layout: an image batch is ``[C, H, W, B]`` inside of a convolution, so

- a shifted window is a slice whose rows are runs of ``W * B`` floats, copied whole;
- all examples make one product ``[C_out, C * k] @ [C * k, H * W * B]``, and its result has the layout that the next
  layer wants: the transposes in between cancel (see ``mobile_export.simplify``);
- no operand of a gradient needs to be transposed, since ``a @ b^T`` has a kernel of its own.

Kernel columns and kernel rows are taken apart: the tensor of all column shifts is ``k`` times as large as the image,
not ``k**2`` times, and each kernel row adds a product with a slice of it. The gradient makes them anew instead of
keeping them, which takes less time than the memory is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import NotImplementedType

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from mobile_export.layout import batch_first, batch_last, placed, strided

# Up to so many rows of a window matrix all kernel rows share one product: it takes as long as one kernel row's alone.
_THIN = 32


@dataclass(frozen=True)
class _Geometry:
    """One convolution: sizes as ``(vertical, horizontal)``."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    image: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.image, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    def groups_of_rows(self, channels: int) -> list[slice]:
        """Kernel rows that share one product."""
        rows, columns = self.kernel
        size = rows if channels * rows * columns <= _THIN else 1
        return [slice(a, b) for a, b in pairwise([*range(0, rows, size), rows])]


def convolution(  # noqa: PLR0917 - the operator's own signature
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor | NotImplementedType:
    """A 1-D or 2-D convolution ``[B, C, ...] -> [B, C_out, ...]`` as products of its windows.

    A transposed one is the gradient of another by its image. Second derivatives of convolutions are made of both.
    Grouped ones stay what they are: right, but slow.
    """
    unusual = transposed and any(more >= step for more, step in zip(output_padding, stride, strict=True))
    if groups != 1 or x.ndim not in {3, 4} or x.numel() == 0 or unusual:
        # Tells torch to leave this call as it is.
        return NotImplemented  # type: ignore[no-any-return]  # typeshed: Any outside of operators
    if transposed:
        return _transposed(x, weight, bias, stride, padding, dilation, output_padding)
    flat = x.ndim == 3
    x, weight, geometry = _two_dimensional(x, weight, stride, padding, dilation)
    channels, batch = x.shape[1], x.shape[0]
    shifted = _column_shifts(batch_last(x), geometry)
    total: Tensor | None = None
    for rows in geometry.groups_of_rows(channels):
        product = _kernel_rows(weight, rows) @ _windows(shifted, rows, geometry)
        total = product if total is None else total + product
    if total is None:
        raise AssertionError("a kernel has rows")
    if bias is not None:
        total = total + bias[:, None]
    result = batch_first(total.reshape(-1, *geometry.out, batch))
    return result.squeeze(2) if flat else result


def convolution_backward(  # noqa: PLR0917 - the operator's own signature
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | NotImplementedType:
    """Gradients of a convolution by its input, weight and bias, as far as ``output_mask`` wants them."""
    del bias_sizes, output_padding
    if transposed or groups != 1 or x.ndim not in {3, 4} or x.numel() == 0:
        # Tells torch to leave this call as it is.
        return NotImplemented  # type: ignore[no-any-return]  # typeshed: Any outside of operators
    x_shape, weight_shape = x.shape, weight.shape
    grad_output = grad_output.unsqueeze(2) if x.ndim == 3 else grad_output
    x, weight, geometry = _two_dimensional(x, weight, stride, padding, dilation)
    g = batch_last(grad_output).reshape(weight.shape[0], -1)
    by_x = batch_first(_by_image(g, weight, geometry)).reshape(x_shape) if output_mask[0] else None
    by_weight = _by_weight(g, batch_last(x), weight, geometry).reshape(weight_shape) if output_mask[1] else None
    # A product with ones: four times as fast as ExecuTorch's sum.
    by_bias = (g @ torch.ones(1, g.shape[1]).t()).reshape(-1) if output_mask[2] else None
    return by_x, by_weight, by_bias


def _transposed(  # noqa: PLR0917 - most of the operator's arguments
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
) -> Tensor:
    """The image gradient of the convolution with this weight ``[C, C_out, ...]``, where ``x`` is its result's."""
    flat, (out_channels, *sizes) = x.ndim == 3, weight.shape[1:]
    image = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + more
        for n, s, p, d, k, more in zip(x.shape[2:], stride, padding, dilation, sizes, output_padding, strict=True)
    ]
    like = x.new_empty(len(x), out_channels, *image)
    _, weight, geometry = _two_dimensional(like, weight, stride, padding, dilation)
    g = batch_last(x.unsqueeze(2) if flat else x).reshape(len(weight), -1)
    result = _by_image(g, weight, geometry)
    result = batch_first(result if bias is None else result + bias[:, None, None, None])
    return result.squeeze(2) if flat else result


def _two_dimensional(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor, _Geometry]:
    """A 1-D convolution is a 2-D one of height 1."""
    if x.ndim == 3:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    kernel, image = weight.shape[2:], x.shape[2:]
    sizes = ((int(a), int(b)) for a, b in (kernel, stride, padding, dilation, image))
    return x, weight, _Geometry(*sizes)


def _column_shifts(x: Tensor, geometry: _Geometry) -> Tensor:
    """Every kernel column's view of ``x [C, H, W, B]``, and the padding: ``[C * columns, H_padded, W_out * B]``."""
    (above, beside), (_, columns) = geometry.padding, geometry.kernel
    if above or beside:
        x = F.pad(x, (0, 0, beside, beside, above, above))
    width = geometry.out[1]
    shifts = [strided(x, 2, j * geometry.dilation[1], geometry.stride[1], width) for j in range(columns)]
    return torch.stack(shifts, dim=1).reshape(len(x) * columns, x.shape[1], width * x.shape[3])


def _windows(shifted: Tensor, rows: slice, geometry: _Geometry) -> Tensor:
    """The window matrix of some kernel rows: ``[C * columns * rows, H_out * W_out * B]``."""
    height = geometry.out[0]
    shifts = [
        strided(shifted, 1, i * geometry.dilation[0], geometry.stride[0], height) for i in range(rows.start, rows.stop)
    ]
    return torch.stack(shifts, dim=1).reshape(len(shifted) * len(shifts), height * shifted.shape[2])


def _kernel_rows(weight: Tensor, rows: slice) -> Tensor:
    """The weight's entries in the order of ``_windows``: ``[C_out, C * columns * rows]``."""
    return weight[:, :, rows].transpose(2, 3).reshape(len(weight), -1)


def _by_weight(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """Gradient ``[C_out, C, rows, columns]``; ``g [C_out, H_out * W_out * B]``, ``x [C, H, W, B]``."""
    (out_channels, channels, _, columns), shifted = weight.shape, _column_shifts(x, geometry)
    parts = [
        (g @ _windows(shifted, rows, geometry).t()).reshape(out_channels, channels, columns, -1)
        for rows in geometry.groups_of_rows(channels)
    ]
    return torch.cat(parts, dim=3).transpose(2, 3)


def _by_image(g: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """Gradient ``[C, H, W, B]``: what each kernel column, and then each kernel row, adds where it looked."""
    _, channels, rows, columns = weight.shape
    (row_stride, column_stride), (above, beside) = geometry.stride, geometry.padding
    (row_step, column_step), (height, width) = geometry.dilation, geometry.image
    across: Tensor | None = None
    for j in range(columns):
        kernel = weight[:, :, :, j].permute(2, 1, 0).reshape(rows * channels, -1)
        part = (kernel @ g).reshape(rows * channels, *geometry.out, -1)
        part = placed(part, 2, j * column_step - beside, column_stride, width)
        across = part if across is None else across + part
    if across is None:
        raise AssertionError("a kernel has columns")
    total: Tensor | None = None
    for i in range(rows):
        part = placed(across[i * channels : (i + 1) * channels], 1, i * row_step - above, row_stride, height)
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("a kernel has rows")
    return total
