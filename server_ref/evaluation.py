"""Validation of each new model, through the exported program: the server needs no torch.

``Evaluator`` is the seam: an operator with another idea of validation passes another object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Program, Role


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on held-out data. ``accuracy`` in [0, 1]; ``loss`` is the mean per example."""

    accuracy: float
    loss: float
    num_examples: int


class Evaluator(Protocol):
    """Scores a weight vector."""

    def evaluate(self, weights: npt.NDArray[np.float32]) -> Evaluation:
        """Score float32[d] weights. Called from one thread at a time."""
        ...


def load_examples(path: Path, feature_shape: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Read an ``.npz`` with ``x`` and ``y``.

    Returns:
        x float32[n, *feature_shape] and y int64[n], n >= 1.

    Raises:
        ConfigurationError: Unreadable, incomplete, empty, of the wrong shape, or holding NaN.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            x = np.ascontiguousarray(archive["x"], dtype=np.float32)
            y = np.ascontiguousarray(archive["y"], dtype=np.int64)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigurationError(f"{path} is not an .npz file with arrays x and y: {e}") from e
    if x.ndim < 1 or len(x) == 0 or x.shape[1:] != feature_shape or y.shape != (len(x),):
        raise ConfigurationError(
            f"{path}: expected x[n, {', '.join(map(str, feature_shape))}] and y[n], n >= 1; "
            f"got x{list(x.shape)} and y{list(y.shape)}"
        )
    if not np.isfinite(x).all():
        raise ConfigurationError(f"{path}: x holds NaN or infinite values")
    return x, y


class ProgramEvaluator:
    """Runs the program's ``evaluate`` method over the validation data, in batches with a mask.

    Args:
        program: A loaded program with an ``evaluate`` method.
        x: float32[n, ...].
        y: int64[n].
    """

    def __init__(self, program: Program, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> None:
        self._program = program
        self._method = program.manifest.method(Role.EVALUATE)
        size = self._method.batch_size
        padding = -len(x) % size
        self._x = np.concatenate([x, np.zeros((padding, *x.shape[1:]), np.float32)])
        self._y = np.concatenate([y, np.zeros(padding, np.int64)])
        self._mask = np.concatenate([np.ones(len(x), np.float32), np.zeros(padding, np.float32)])

    @classmethod
    def open(cls, bundle: Path, data: Path) -> ProgramEvaluator:
        """Load a bundle's program and the validation data.

        Raises:
            ConfigurationError: The data does not fit.
            ProgramError: The program cannot be run here.
        """
        # Deferred: the only place where the server touches the device's runtime, and only if it evaluates.
        from client_sdk.runtime import load_program  # noqa: PLC0415

        program = load_program(bundle)
        x, y = load_examples(data, program.manifest.feature_shape)
        return cls(program, x, y)

    def evaluate(self, weights: npt.NDArray[np.float32]) -> Evaluation:
        """Score float32[d] weights."""
        loss = correct = count = 0.0
        size = self._method.batch_size
        for start in range(0, len(self._x), size):
            part = slice(start, start + size)
            outputs = self._program.run(self._method.name, weights, self._x[part], self._y[part], self._mask[part])
            batch = [float(o.reshape(-1)[0]) for o in outputs]
            loss, correct, count = loss + batch[0], correct + batch[1], count + batch[2]
        return Evaluation(correct / count, loss / count, int(count))
