"""What goes into a training: its arrays, checked once, and the buffers in which batches reach a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError
from client_sdk.protocol.program import Float32Array, Manifest, MethodSpec
from client_sdk.training_state import Int64Array, all_finite


def check_weights(manifest: Manifest, weights: Float32Array) -> None:
    """Refuse weights that are not a program's, or not finite.

    Raises:
        ProgramInputError: Wrong shape or dtype, NaN or infinity.
    """
    if weights.dtype != np.float32 or weights.shape != (manifest.num_parameters,):
        raise ProgramInputError(
            f"weights must be float32[{manifest.num_parameters}], got {weights.dtype}{list(weights.shape)}"
        )
    if not all_finite(weights):
        raise ProgramInputError("the weights hold NaN or infinite values")


def check_examples(manifest: Manifest, x: Float32Array, y: Int64Array) -> None:
    """Refuse examples that a program cannot train on.

    Raises:
        ProgramInputError: No data, wrong shape or dtype, NaN or infinity, or a label out of range.
    """
    if x.dtype != np.float32 or x.ndim == 0 or x.shape[1:] != manifest.feature_shape:
        raise ProgramInputError(
            f"features must be float32 of shape [n, {', '.join(map(str, manifest.feature_shape))}], "
            f"got {x.dtype}{list(x.shape)}"
        )
    if len(x) == 0:
        raise ProgramInputError("there is no training data")
    if y.dtype != np.int64 or y.shape != (len(x),):
        raise ProgramInputError(f"labels must be int64[{len(x)}], got {y.dtype}{list(y.shape)}")
    if not all_finite(x):
        raise ProgramInputError("the training data holds NaN or infinite values")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= manifest.num_classes:
        raise ProgramInputError(f"labels must lie in [0, {manifest.num_classes}), got {low} to {high}")


def check_seed(shuffle_seed: int) -> None:
    """Refuse a seed beyond 64 bits.

    Raises:
        ConfigurationError: It is one.
    """
    if not 0 <= shuffle_seed < 2**64:
        raise ConfigurationError(f"shuffle_seed must lie in [0, 2**64), got {shuffle_seed}")


def float32_rate(rate: float, name: str = "learning_rate") -> np.float32:
    """A learning rate as programs take it.

    Raises:
        ConfigurationError: It is zero or infinite as a float32.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(rate)
    if not (np.isfinite(rounded) and rounded > 0):
        raise ConfigurationError(f"{name} {rate} is zero or infinite as a float32")
    return rounded


class BatchBuffer:
    """Input buffers of one batch, filled over and over.

    Args:
        x: float32 ``[B, ...]``.
        y: int64 ``[B]``.
        mask: float32 ``[B]``.
    """

    def __init__(self, x: Float32Array, y: Int64Array, mask: Float32Array) -> None:
        self.size = len(x)
        self.x = x
        self.y = y
        self.mask = mask

    @classmethod
    def of(cls, spec: MethodSpec, prefix: str = "") -> Self:
        """Buffers for the inputs ``x``, ``y`` and ``mask`` of a method, whose names begin with ``prefix``."""
        return cls(*_arrays(spec, prefix))

    def fill(self, x: Float32Array, y: Int64Array, picked: Int64Array) -> None:
        """Gather examples. Unused rows are zeroed: what an earlier batch left must not reach even a masked sum."""
        used = len(picked)
        # mode="clip" writes straight into the buffer; the indices are in range by construction.
        np.take(x, picked, axis=0, out=self.x[:used], mode="clip")
        np.take(y, picked, axis=0, out=self.y[:used], mode="clip")
        self.mask[:used] = 1.0
        for buffer in (self.x, self.y, self.mask):
            buffer[used:] = 0


class InnerBuffer:
    """Input buffers of a method that takes K batches in one call: ``x`` is float32 ``[K, B, ...]``."""

    def __init__(self, spec: MethodSpec) -> None:
        self.x, self.y, self.mask = _arrays(spec, "inner_")
        self.steps = len(self.x)
        self._each = [BatchBuffer(*arrays) for arrays in zip(self.x, self.y, self.mask, strict=True)]

    def fill(self, x: Float32Array, y: Int64Array, batches: Sequence[Int64Array]) -> None:
        """Gather at most K batches; the steps beyond them are masked, and change nothing."""
        none = np.zeros(0, np.int64)
        for i, buffer in enumerate(self._each):
            buffer.fill(x, y, batches[i] if i < len(batches) else none)


def _arrays(spec: MethodSpec, prefix: str) -> tuple[Float32Array, Int64Array, Float32Array]:
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    return (
        np.zeros(shapes[f"{prefix}x"], np.float32),
        np.zeros(shapes[f"{prefix}y"], np.int64),
        np.zeros(shapes[f"{prefix}mask"], np.float32),
    )
