"""Reference models: softmax regression, a multi-layer perceptron, a small CNN.

Input convention: ``x`` is float32 ``[B, *feature_shape]`` and each model reshapes it itself, so one data pipeline
feeds all three. The CNN takes grey images as ``(H, W)``, ``(1, H, W)`` or, flattened, ``(H * W,)`` with H = W.
Outputs are logits ``[B, num_classes]``.

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

    Weights and biases are uniform in +-1/sqrt(fan_in), as ``nn.Linear`` draws them, from a generator of their own.

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
