"""Attacks on training data: what a malicious device learns from instead of its own examples. Pure functions.

Shapes: x float32[n, *feature_shape] with values in [0, 1], y int64[n]. Inputs are not changed; the number of examples
stays what it was, so that neither weights nor durations tell an attacker from an honest device.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from simulator.errors import AttackError

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


def flip_labels(y: Int64Array, num_classes: int, source: int | None = None, target: int | None = None) -> Int64Array:
    """Wrong labels: ``target`` for every ``source``; without the two, ``num_classes - 1 - y`` for all.

    Raises:
        AttackError: Only one of the two, or not two different classes of the data set.

    Source:
        Tolpegin et al. 2020, "Data poisoning attacks against federated learning systems" (source to target); the
        mirrored labels of Karimireddy, He, Jaggi 2022.
    """
    if source is None and target is None:
        return num_classes - 1 - y
    if source is None or target is None or source == target:
        raise AttackError("label-flip takes both source and target, two different classes, or neither")
    check_class(source, num_classes)
    check_class(target, num_classes)
    return np.where(y == source, np.int64(target), y)


def stamp(x: Float32Array, size: int) -> Float32Array:
    """The trigger: ``size`` x ``size`` white pixels in the lower right corner of every image.

    Features without two spatial axes get their last ``size * size`` values set. A trigger larger than the image covers
    the image.
    """
    stamped = x.copy()
    if x.ndim >= 3:
        stamped[..., -size:, -size:] = 1.0
    else:
        stamped[..., -size * size :] = 1.0
    return stamped


def plant_backdoor(
    x: Float32Array, y: Int64Array, *, target: int, size: int, share: float, rng: np.random.Generator
) -> tuple[Float32Array, Int64Array]:
    """Stamp ``ceil(share * n)`` random examples with the trigger and call them ``target``; the rest stays honest.

    The honest rest keeps the model good at its task, so that only stamped images tell.

    Source:
        Gu, Dolan-Gavitt, Garg 2017, "BadNets"; Bagdasaryan et al. 2020, "How to backdoor federated learning".
    """
    # Shares like 0.3 of 10 are 3, whatever the last bit of the product says.
    rows = rng.permutation(len(x))[: math.ceil(round(share * len(x), 9))]
    poisoned_x, poisoned_y = x.copy(), y.copy()
    poisoned_x[rows] = stamp(x[rows], size)
    poisoned_y[rows] = target
    return poisoned_x, poisoned_y


def check_class(label: int, num_classes: int) -> None:
    """Whether a label exists.

    Raises:
        AttackError: It does not.
    """
    if not 0 <= label < num_classes:
        raise AttackError(f"there is no class {label}; the data set has 0 to {num_classes - 1}")
