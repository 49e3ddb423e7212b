"""What devices will see next: examples that judge their models, and that nobody ever trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from simulator.datasets import Split
from simulator.days import evenly
from simulator.errors import NothingToJudge
from simulator.prepare import Fleet

Int64Array = npt.NDArray[np.int64]
SplitName = Literal["validation", "test"]
SPLITS: Final[tuple[SplitName, ...]] = get_args(SplitName)

MOST_DEVICES: Final = 200
"""So many adapt and are judged: enough to tell shares within a few per cent, and over in seconds."""

PER_DEVICE: Final = 50
"""Examples that judge a device: its accuracy is told in steps of two points."""


@dataclass(frozen=True)
class DeviceTests:
    """Examples that judge some devices.

    Attributes:
        devices: Numbers of the devices.
        data: All examples, in the devices' own styles where they have one.
        rows: Of each of the devices, int64[n], rows of ``data``.
    """

    devices: tuple[int, ...]
    data: Split
    rows: tuple[Int64Array, ...]


def judged_devices(fleet: Fleet) -> list[int]:
    """The devices that adapt and are judged: the honest ones, or as many as ``MOST_DEVICES`` of them, evenly picked.

    Raises:
        NothingToJudge: All of them attack.
    """
    attack = fleet.attack
    honest = [d for d in range(len(fleet.parts)) if attack is None or not attack.attacks(d)]
    if not honest:
        raise NothingToJudge("all devices attack: there is nobody whom adaptation could serve")
    return [honest[i] for i in evenly(len(honest), MOST_DEVICES)]


def check_tests(fleet: Fleet) -> None:
    """Whether all of them can be judged, before a run begins.

    Raises:
        NothingToJudge: One cannot.
    """
    for split in SPLITS:
        device_tests(fleet, judged_devices(fleet), split=split, per_device=1)


def device_tests(
    fleet: Fleet,
    devices: Sequence[int],
    *,
    split: SplitName,
    per_device: int = PER_DEVICE,
) -> DeviceTests:
    """Draw what each device will see next.

    Guarantees: no training example is among them, for they come from a split that was held out. A device's classes have
    the shares that they have among its training examples, to within one example (where a data set has groups, such as
    languages, its groups have). Its style is the one that its training examples were laid in, with noise of its own.
    The draw follows from the fleet's seed, the split and the device alone.

    A class that the split has too few of is gone through once more, each example as often as any other but for one: the
    number of examples and the shares of the classes stay, and the figure is as coarse as the distinct examples are few.
    A class of which the split has none is left to the device's others.

    Args:
        fleet: The devices and their data.
        devices: Numbers of those that are judged.
        split: ``validation`` while training goes on; ``test`` once, at its end.
        per_device: Examples for each.

    Raises:
        NothingToJudge: A device none of whose classes is in the split.
    """
    held_out = fleet.dataset.validation if split == "validation" else fleet.dataset.test
    stock = {int(kind): np.flatnonzero(_kinds(held_out) == kind) for kind in np.unique(_kinds(held_out))}
    learned = _kinds(fleet.dataset.train)
    drawn = []
    for device in devices:
        rng = _generator(fleet.population.seed, split, device)
        kinds, counts = np.unique(learned[fleet.parts[device]], return_counts=True)
        there = np.array([int(kind) in stock for kind in kinds], np.bool_)
        if not there.any():
            raise NothingToJudge(f"device {device} has only classes of which the {split} split has no example")
        shares = apportioned(counts[there], per_device)
        pieces = [
            np.resize(rng.permutation(stock[int(kind)]), share)
            for kind, share in zip(kinds[there], shares, strict=True)
        ]
        drawn.append(np.concatenate(pieces))
    return _in_styles(fleet, devices, held_out, drawn)


def apportioned(counts: Int64Array, total: int) -> Int64Array:
    """Whole numbers in about these proportions: largest remainders, ties to the first.

    Example:
        >>> apportioned(np.array([1, 1, 4]), 9)
        array([2, 1, 6])
    """
    exact = counts * total / counts.sum()
    found: Int64Array = np.floor(exact).astype(np.int64)
    found[np.argsort(found - exact, kind="stable")[: total - int(found.sum())]] += 1
    return found


def _kinds(split: Split) -> Int64Array:
    return split.y if split.groups is None else split.groups


def _generator(seed: int, split: str, device: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"pocketfed-device-tests-v1:{seed}:{split}:{device}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _in_styles(fleet: Fleet, devices: Sequence[int], held_out: Split, drawn: Sequence[Int64Array]) -> DeviceTests:
    styles = [fleet.style(device) for device in devices]
    if all(style is None for style in styles):
        return DeviceTests(tuple(devices), held_out, tuple(drawn))
    x = np.concatenate([held_out.x[rows] for rows in drawn])
    ends = np.cumsum([len(rows) for rows in drawn])
    own = [np.arange(end - len(rows), end) for end, rows in zip(ends, drawn, strict=True)]
    for style, rows in zip(styles, own, strict=True):
        if style is not None:
            # The noise of these pictures is not that of the training pictures.
            x[rows] = replace(style, noise_seed=style.noise_seed ^ 1).apply(x[rows])
    return DeviceTests(tuple(devices), Split(x, np.concatenate([held_out.y[rows] for rows in drawn])), tuple(own))
