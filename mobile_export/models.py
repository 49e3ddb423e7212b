"""Reference models: softmax regression, a multi-layer perceptron, a small CNN, and two that tell the next byte.

Input convention: ``x`` is float32 ``[B, *feature_shape]`` and each model reshapes it itself, so one data pipeline
feeds all. The CNN takes grey images as ``(H, W)``, ``(1, H, W)`` or, flattened, ``(H * W,)`` with H = W. The models of
text take T ids as numbers 0 .. num_classes - 1, in a float32 ``(T,)``. Outputs are logits ``[B, num_classes]``.

Initial weights depend on the seed alone: no model reads or advances torch's global generator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.nn.utils import skip_init

from client_sdk.protocol.errors import ConfigurationError


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose values are still undefined; ``skip_init`` leaves the global generator alone."""
    return cast("nn.Linear", skip_init(nn.Linear, in_features, out_features))  # type: ignore[no-untyped-call] # torch


class SoftmaxRegression(nn.Module):
    """One linear layer over the flattened features."""

    def __init__(self, feature_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        self.output = _linear(math.prod(feature_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ``x [B, ...]``."""
        return cast("Tensor", self.output(x.flatten(1)))


class MLP(nn.Module):
    """ReLU layers of the widths in ``hidden``, then a linear one."""

    def __init__(self, feature_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        widths = (math.prod(feature_shape), *hidden)
        self.hidden = nn.ModuleList(_linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = _linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ``x [B, ...]``."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return cast("Tensor", self.output(x))


class Im2colConv2d(nn.Module):
    """A 3x3 convolution, stride 1, same size, zero padding: ``[B, C, H, W] -> [B, out_channels, H, W]``.

    What ``nn.Conv2d(.., 3, padding=1)`` computes, with its weight as the matrix ``[out_channels, C * 9]`` that
    windows are multiplied with.
    """

    KERNEL = 3

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels * self.KERNEL**2))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x [B, C, H, W]``."""
        kernel = self.weight.reshape(len(self.weight), -1, self.KERNEL, self.KERNEL)
        return F.conv2d(x, kernel, self.bias, padding=self.KERNEL // 2)


class CNN(nn.Module):
    """Two convolutions with ReLU and 2x2 max-pooling, one hidden layer, one output layer.

    26,698 parameters for 28x28 images and ten classes, 3,658 for 8x8.
    """

    CHANNELS = (8, 16)

    def __init__(self, feature_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (32,)) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        self.height, self.width = _image_size(feature_shape)
        first, second = self.CHANNELS
        self.conv1 = Im2colConv2d(1, first)
        self.conv2 = Im2colConv2d(first, second)
        pooled = (self.height // 4) * (self.width // 4)
        self.head = MLP((second * pooled,), num_classes, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of grey images ``x [B, *feature_shape]``."""
        x = x.reshape(x.shape[0], 1, self.height, self.width)
        # ReLU after pooling gives the same values on a quarter of the elements.
        x = torch.relu(F.max_pool2d(self.conv1(x), 2))
        x = torch.relu(F.max_pool2d(self.conv2(x), 2))
        return cast("Tensor", self.head(x))


class ByteEmbedding(nn.Module):
    """A vector for each id: ``[B, T]`` ids as float32 -> ``[B, T, width]``, by a product with their one-hot form.

    ``nn.Embedding`` wants integers, and its gradient an operator that programs lack. The one-hot form is made by
    operators that are fast in a program: ``relu(1 - |x - id|)``, exactly 1 at the id and 0 elsewhere.
    """

    def __init__(self, ids: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ids, width))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of the ids ``x [B, T]``."""
        ids = torch.arange(len(self.weight), dtype=x.dtype)
        one_hot = torch.relu(1 - (x.unsqueeze(-1) - ids).abs())
        return one_hot @ self.weight


class ByteMLP(nn.Module):
    """The id that follows T others: their vectors side by side, one hidden layer, one output layer.

    26,944 parameters for 16 bytes.
    """

    WIDTH = 8

    def __init__(self, feature_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        self.embedding = ByteEmbedding(num_classes, self.WIDTH)
        self.head = MLP((self.WIDTH * _context(feature_shape),), num_classes, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ids ``x [B, T]``."""
        return cast("Tensor", self.head(self.embedding(x)))


class ByteGRU(nn.Module):
    """The id that follows T others, by a gated recurrent unit that reads one after another [Cho et al. 2014].

    As ``nn.GRU`` computes it, in plain operators: gates r and z, and the candidate, side by side in each matrix.
    """

    WIDTH = 8

    def __init__(self, feature_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (48,)) -> None:
        super().__init__()
        if len(hidden) != 1:
            raise ConfigurationError(f"byte-gru has one recurrent layer, not widths {hidden}")
        self.feature_shape = feature_shape
        self.steps, self.state = _context(feature_shape), hidden[0]
        self.embedding = ByteEmbedding(num_classes, self.WIDTH)
        self.reads = _linear(self.WIDTH, 3 * self.state)
        self.recurs = _linear(self.state, 3 * self.state)
        self.output = _linear(self.state, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ids ``x [B, T]``."""
        read = self.reads(self.embedding(x))
        state = torch.zeros_like(read[:, 0, : self.state])
        for step in range(self.steps):
            r_in, z_in, n_in = read[:, step].split(self.state, dim=-1)
            r_own, z_own, n_own = self.recurs(state).split(self.state, dim=-1)
            update = torch.sigmoid(z_in + z_own)
            candidate = torch.tanh(n_in + torch.sigmoid(r_in + r_own) * n_own)
            state = candidate + update * (state - candidate)
        return cast("Tensor", self.output(state))


def _context(feature_shape: tuple[int, ...]) -> int:
    """Number of ids in an example of text."""
    if len(feature_shape) != 1:
        raise ConfigurationError(f"a model of text takes ids in a row, (T,), not {feature_shape}")
    return feature_shape[0]


def _image_size(feature_shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width that a feature shape stands for."""
    match feature_shape:
        case (pixels,):
            size = (math.isqrt(pixels), math.isqrt(pixels))
        case (height, width) | (1, height, width):
            size = (height, width)
        case _:
            size = (0, 0)
    if math.prod(size) != math.prod(feature_shape) or min(size) < 4:
        raise ConfigurationError(
            f"the cnn takes grey images of at least 4x4 pixels: (H, W), (1, H, W) or (H * W,) with H = W; "
            f"not {feature_shape}"
        )
    return size


@dataclass(frozen=True)
class ReferenceModel:
    """An entry of the registry.

    Attributes:
        build: ``(feature_shape, num_classes, hidden)`` -> module with undefined values.
        default_hidden: Widths of the hidden layers unless the caller names others.
        summary: One line for ``--help``.
    """

    build: Callable[[tuple[int, ...], int, tuple[int, ...]], nn.Module]
    default_hidden: tuple[int, ...]
    summary: str


REFERENCE_MODELS: Mapping[str, ReferenceModel] = MappingProxyType(
    {
        "softmax": ReferenceModel(
            lambda shape, classes, _hidden: SoftmaxRegression(shape, classes), (), "softmax regression"
        ),
        "mlp": ReferenceModel(MLP, (64,), "multi-layer perceptron, one hidden layer of 64 by default"),
        "cnn": ReferenceModel(CNN, (32,), "two im2col convolutions with max-pooling, for grey images"),
        "byte-mlp": ReferenceModel(ByteMLP, (64,), "next byte of a text: embedded bytes, one hidden layer"),
        "byte-gru": ReferenceModel(ByteGRU, (48,), "next byte of a text: a gated recurrent unit"),
    }
)


def build_model(
    name: str,
    feature_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    hidden: tuple[int, ...] | None = None,
) -> nn.Module:
    """Build a reference model with seeded weights.

    Weights and biases are uniform in +-1/sqrt(fan_in), as ``nn.Linear`` draws them, from a generator of their own; a
    one-hot input has a fan-in of 1.

    Args:
        name: A key of ``REFERENCE_MODELS``.
        feature_shape: Shape of one example, without the batch axis.
        num_classes: Number of logits.
        seed: The same seed gives the same bits.
        hidden: Widths of the hidden layers instead of the model's default.

    Raises:
        ConfigurationError: Unknown name, or a shape or width that the model cannot take.
    """
    entry = REFERENCE_MODELS.get(name)
    if entry is None:
        raise ConfigurationError(
            f"no reference model is called {name!r}; there are {', '.join(sorted(REFERENCE_MODELS))}"
        )
    widths = entry.default_hidden if hidden is None else hidden
    if name == "softmax" and widths:
        raise ConfigurationError("softmax has no hidden layer; use mlp")
    if not feature_shape or min((*feature_shape, num_classes, *widths)) < 1:
        raise ConfigurationError(
            f"features {feature_shape}, classes {num_classes} and hidden widths {widths} must all be at least 1"
        )
    model = entry.build(tuple(feature_shape), num_classes, tuple(widths))
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | Im2colConv2d):
            bound = 1 / math.sqrt(module.weight.shape[1])
            for tensor in (module.weight, module.bias):
                tensor.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, ByteEmbedding):
            module.weight.uniform_(-1, 1, generator=generator)
