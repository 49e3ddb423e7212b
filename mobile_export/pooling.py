"""2-D pooling and its gradient as arithmetic on slices, in place of ExecuTorch's own kernels.

ExecuTorch's max-pooling is a portable loop, ten times slower than maxima of slices. Its gradient adds into an output
that it never zeroes, so its result depends on stale memory and is wrong without any error from the second call on. The
gradient of average pooling has no kernel at all.

A window's entries meet one after another, in the order in which eager PyTorch scans them: the first of several equal
maxima wins, and gets all of the gradient. (The one difference to PyTorch: an infinite entry makes its gradient NaN.)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NotImplementedType

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from mobile_export.layout import batch_first, batch_last, placed, strided

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a pooling lie; sizes as ``(vertical, horizontal)``."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    image: tuple[int, int]
    out: tuple[int, int]

    @property
    def tile(self) -> bool:
        """Whether each entry of the image lies in at most one window."""
        return self.kernel == self.stride and self.dilation == (1, 1)

    def offsets(self) -> list[tuple[int, int]]:
        """Positions inside a window, row by row."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]

    def entries(self, x: Tensor, fill: float) -> list[Tensor]:
        """The entry at each offset of all windows, of ``x [C, H, W, B]``: ``[C, H_out, W_out, B]`` each."""
        (above, beside), (below, behind) = self.padding, self._margin()
        if above or beside or below or behind:
            x = F.pad(x, (0, 0, beside, behind, above, below), value=fill)
        columns = [strided(x, 2, j * self.dilation[1], self.stride[1], self.out[1]) for j in range(self.kernel[1])]
        return [strided(columns[j], 1, i * self.dilation[0], self.stride[0], self.out[0]) for i, j in self.offsets()]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The transpose of ``entries``: ``[C, H, W, B]``, the sum of what each offset of all windows adds."""
        (rows, columns), (height, width) = self.kernel, self.image
        if self.tile:
            lines = [torch.stack(parts[i * columns : (i + 1) * columns], dim=3).flatten(2, 3) for i in range(rows)]
            whole = torch.stack(lines, dim=2).flatten(1, 2)
            return placed(placed(whole, 1, -self.padding[0], 1, height), 2, -self.padding[1], 1, width)
        total = torch.zeros(())
        for i in range(rows):
            line = torch.zeros(())
            for j in range(columns):
                part = parts[i * columns + j]
                line = line + placed(part, 2, j * self.dilation[1] - self.padding[1], self.stride[1], width)
            total = total + placed(line, 1, i * self.dilation[0] - self.padding[0], self.stride[0], height)
        return total

    def _margin(self) -> tuple[int, int]:
        """Rows below and columns behind the image that the last windows reach into."""
        below, behind = (
            max(0, (o - 1) * s + d * (k - 1) + 1 - n - p)
            for o, s, d, k, n, p in zip(
                self.out, self.stride, self.dilation, self.kernel, self.image, self.padding, strict=True
            )
        )
        return below, behind


def max_pool2d_with_indices(  # noqa: PLR0917 - the operator's own signature
    x: Tensor,
    kernel_size: list[int],
    stride: list[int] = [],  # noqa: B006 - the operator's own default
    padding: list[int] = [0],  # noqa: B006
    dilation: list[int] = [1],  # noqa: B006
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor] | NotImplementedType:
    """Maxima of all windows of ``x [(B,) C, H, W]``, and their positions ``row * W + column``."""
    if x.dtype != torch.float32:
        # Tells torch to leave this call as it is.
        return NotImplemented  # type: ignore[no-any-return]  # typeshed: Any outside of operators
    images, windows = _four_dimensional(x, kernel_size, stride, padding, dilation, ceil_mode)
    entries = windows.entries(batch_last(images), _LOWEST)
    best, winner = entries[0], torch.zeros_like(entries[0], dtype=torch.int64)
    for number, entry in enumerate(entries[1:], start=1):
        winner = torch.where(entry > best, number, winner)
        best = torch.maximum(best, entry)
    # Dead code unless the model asks for the positions.
    positions = batch_first(_positions(winner, windows))
    maxima = batch_first(best)
    return (maxima, positions) if x.ndim == 4 else (maxima[0], positions[0])


def max_pool2d_with_indices_backward(  # noqa: PLR0917 - the operator's own signature
    grad_output: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Gradient of max-pooling: each output's gradient goes to the position of its maximum."""
    del indices  # found anew: arithmetic with zeros and ones is faster than a scatter
    images, windows = _four_dimensional(x, kernel_size, stride, padding, dilation, ceil_mode)
    entries = windows.entries(batch_last(images), _LOWEST)
    best, comparisons = entries[0], []
    for entry in entries[1:]:
        comparisons.append((entry, best))
        best = torch.maximum(best, entry)
    left = batch_last(grad_output if x.ndim == 4 else grad_output[None])
    parts: list[Tensor] = []
    for entry, before in reversed(comparisons):
        parts.append(left * torch.relu(torch.sign(entry - before)))
        left = left - parts[-1]
    gradient = batch_first(windows.spread([left, *parts[::-1]]))
    return gradient if x.ndim == 4 else gradient[0]


def avg_pool2d(  # noqa: PLR0917 - the operator's own signature
    x: Tensor,
    kernel_size: list[int],
    stride: list[int] = [],  # noqa: B006 - the operator's own default
    padding: list[int] = [0],  # noqa: B006
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Means of all windows of ``x [(B,) C, H, W]``."""
    images, windows = _four_dimensional(x, kernel_size, stride, padding, [1], ceil_mode)
    first, *others = windows.entries(batch_last(images), 0.0)
    for entry in others:
        first = first + entry
    means = batch_first(first * _shares(windows, count_include_pad, divisor_override))
    return means if x.ndim == 4 else means[0]


def avg_pool2d_backward(  # noqa: PLR0917 - the operator's own signature
    grad_output: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Gradient of average pooling: every entry of a window gets the same share."""
    _, windows = _four_dimensional(x, kernel_size, stride, padding, [1], ceil_mode)
    g = batch_last(grad_output if x.ndim == 4 else grad_output[None])
    g = g * _shares(windows, count_include_pad, divisor_override)
    gradient = batch_first(windows.spread([g] * len(windows.offsets())))
    return gradient if x.ndim == 4 else gradient[0]


def _four_dimensional(  # noqa: PLR0917 - the operators' own arguments
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, _Windows]:
    """The image batch, and the windows of a pooling whose sizes may be given once for both directions."""
    images = x if x.ndim == 4 else x[None]
    image = (int(images.shape[2]), int(images.shape[3]))
    kernels, strides, pads, steps = _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation)
    height, width = (
        _out_size(n, k, s, p, d, ceil_mode) for n, k, s, p, d in zip(image, kernels, strides, pads, steps, strict=True)
    )
    return images, _Windows(kernels, strides, pads, steps, image, (height, width))


def _pair(size: list[int]) -> tuple[int, int]:
    return int(size[0]), int(size[-1])


def _out_size(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:  # noqa: PLR0917
    reach = n + 2 * padding - dilation * (kernel - 1) - 1
    size = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must begin inside of the image or before it.
    return size - 1 if ceil_mode and (size - 1) * stride >= n + padding else size


def _positions(winner: Tensor, windows: _Windows) -> Tensor:
    """Position in the image of the entry with number ``winner`` of each window."""
    columns = windows.kernel[1]
    row, column = torch.div(winner, columns, rounding_mode="floor"), winner % columns
    tops = torch.arange(windows.out[0])[:, None, None] * windows.stride[0] - windows.padding[0]
    lefts = torch.arange(windows.out[1])[:, None] * windows.stride[1] - windows.padding[1]
    return (tops + row * windows.dilation[0]) * windows.image[1] + lefts + column * windows.dilation[1]


def _shares(windows: _Windows, count_include_pad: bool, divisor: int | None) -> Tensor | float:
    """One over the number of entries that each window is averaged over: a number, or ``[H_out, W_out, 1]``."""
    if divisor is not None:
        return 1 / divisor
    counts = []
    for o, s, k, n, p in zip(windows.out, windows.stride, windows.kernel, windows.image, windows.padding, strict=True):
        low, high = (-p, n + p) if count_include_pad else (0, n)
        counts.append([min(i * s - p + k, high) - max(i * s - p, low) for i in range(o)])
    if all(count == windows.kernel[axis] for axis, sizes in enumerate(counts) for count in sizes):
        return 1 / (windows.kernel[0] * windows.kernel[1])
    return 1 / (torch.tensor(counts[0])[:, None, None] * torch.tensor(counts[1])[:, None])
