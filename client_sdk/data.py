"""A device's own examples: from a file, or from whatever an app holds them in."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.errors import InvalidDataFile
from client_sdk.protocol.errors import ProgramInputError
from client_sdk.protocol.program import Float32Array

Int64Array = npt.NDArray[np.int64]
Examples = tuple[Float32Array, Int64Array]


def load_examples(path: Path) -> Examples:
    """Read ``x`` (float32, examples first) and ``y`` (int64, labels) from an ``.npz`` file; pickles are refused.

    Raises:
        InvalidDataFile: Not such a file, or NaN, or nothing in it.
    """
    try:
        # Opened here, because np.load leaves the file open where it fails.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            named = dict(archive) if isinstance(archive, np.lib.npyio.NpzFile) else {}  # a bare .npy gives an array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as e:
        raise InvalidDataFile(f"{path} is not a readable .npz file of plain arrays: {e}") from e
    if not {"x", "y"} <= set(named):
        raise InvalidDataFile(
            f"{path} holds {sorted(named) or 'no named arrays'}; it must hold x and y, "
            "as np.savez(file, x=..., y=...) writes them"
        )
    x, y = named["x"], named["y"]
    if x.dtype != np.float32:
        raise InvalidDataFile(f"{path}: x is {x.dtype}; save it as float32 (x.astype(np.float32))")
    if y.dtype != np.int64:
        raise InvalidDataFile(f"{path}: y is {y.dtype}; save it as int64 (y.astype(np.int64))")
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        raise InvalidDataFile(f"{path}: x has shape {x.shape} and y {y.shape}; they must be [n, ...] and [n]")
    if len(x) == 0:
        raise InvalidDataFile(f"{path} holds no examples")
    if not np.isfinite(x).all():
        raise InvalidDataFile(f"{path}: x holds NaN or infinite values; clean the data before training on it")
    return np.ascontiguousarray(x), np.ascontiguousarray(y)


def as_examples(local_data: Any) -> Examples:  # noqa: ANN401 - arrays, tensors and loaders have no common type
    """Examples as two arrays.

    Args:
        local_data: A pair ``(x, y)`` of arrays (or CPU tensors), or an iterable of such pairs, batch by batch.

    Raises:
        ProgramInputError: Nothing in it, not numbers, or not as many labels as examples.
    """
    if isinstance(local_data, tuple | list) and len(local_data) == 2 and all(hasattr(a, "shape") for a in local_data):
        batches: Iterable[Any] = [local_data]
    else:
        batches = local_data
    xs, ys = [], []
    try:
        for x, y in batches:
            xs.append(np.asarray(x, np.float32))
            ys.append(np.asarray(y).astype(np.int64, casting="safe", copy=False))
            if xs[-1].shape[:1] != ys[-1].shape:
                raise ProgramInputError(
                    f"features and labels must be as many: {list(xs[-1].shape)} and {list(ys[-1].shape)}"
                )
        if not xs:
            raise ProgramInputError("there is no training data")
        # One batch stays the caller's memory: a fleet of devices holds views, not copies.
        return (xs[0], ys[0]) if len(xs) == 1 else (np.concatenate(xs), np.concatenate(ys))
    except (TypeError, ValueError) as e:
        raise ProgramInputError(f"training data must be pairs of features and integer labels: {e}") from e
