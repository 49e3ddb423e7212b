"""How training examples are dealt out to devices.

A partition is an exact cover: every example goes to one device, every device gets at least one. It follows from the
labels (or the groups), the number of devices and the seed alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.errors import PartitionError

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

FORMS = "iid, dirichlet:ALPHA (e.g. dirichlet:0.5), shards:K (e.g. shards:2), by-group (e.g. one language a device)"


@dataclass(frozen=True)
class Iid:
    """Equal parts of one shuffle."""

    def __str__(self) -> str:
        return "iid"

    def deal(self, labels: Labels, devices: int, rng: np.random.Generator) -> list[Rows]:
        """Sizes differ by at most one."""
        return np.array_split(rng.permutation(len(labels)), devices)


@dataclass(frozen=True)
class Dirichlet:
    """Every class is split over the devices by its own Dirichlet(alpha) draw.

    The smaller ``alpha``, the fewer classes (and the more uneven the sizes) a device sees.

    Source:
        Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
        classification"; the per-class form of Yurochkin et al. 2019.
    """

    alpha: float

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha:g}"

    def deal(self, labels: Labels, devices: int, rng: np.random.Generator) -> list[Rows]:
        """Devices that the draw leaves empty take one example from the largest ones."""
        parts: list[list[Rows]] = [[] for _ in range(devices)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(devices, self.alpha))
            # A tiny alpha underflows to 0/0: the limit of the draw is everything on one device.
            if not np.all(np.isfinite(shares)):
                shares = np.zeros(devices)
                shares[rng.integers(devices)] = 1.0
            cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        return _fill_empty([rng.permutation(np.concatenate(part)) for part in parts])


@dataclass(frozen=True)
class Shards:
    """Sorted by label, cut into ``devices * per_device`` shards, ``per_device`` of them dealt to each device.

    Source:
        McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data" (the
        pathological non-IID partition).
    """

    per_device: int

    def __str__(self) -> str:
        return f"shards:{self.per_device}"

    def deal(self, labels: Labels, devices: int, rng: np.random.Generator) -> list[Rows]:
        """Shard sizes differ by at most one."""
        shards = devices * self.per_device
        if shards > len(labels):
            raise PartitionError(
                f"{devices} devices x {self.per_device} shards need {shards} examples, there are {len(labels)}"
            )
        # Shuffle first, so that which examples of a class share a shard depends on the seed.
        rows = rng.permutation(len(labels))
        rows = rows[np.argsort(labels[rows], kind="stable")]
        pieces = np.array_split(rows, shards)
        dealt = rng.permutation(shards).reshape(devices, self.per_device)
        return [rng.permutation(np.concatenate([pieces[i] for i in mine])) for mine in dealt]


@dataclass(frozen=True)
class ByGroup:
    """Every device has examples of one group, such as a language; groups have as many devices as one another."""

    def __str__(self) -> str:
        return "by-group"

    def deal(self, groups: Labels, devices: int, rng: np.random.Generator) -> list[Rows]:
        """Device i has the i-th group, counted round and round; sizes within a group differ by at most one."""
        present = np.unique(groups)
        if devices < len(present):
            raise PartitionError(f"{devices} devices cannot have one each of {len(present)} groups; use more")
        parts: list[Rows] = [np.empty(0, np.int64)] * devices
        for at, group in enumerate(present):
            rows = rng.permutation(np.flatnonzero(groups == group))
            mine = range(at, devices, len(present))
            if len(rows) < len(mine):
                raise PartitionError(f"group {group} has {len(rows)} examples for {len(mine)} devices; use fewer")
            for device, part in zip(mine, np.array_split(rows, len(mine)), strict=True):
                parts[device] = part
        return parts


Partition = Iid | Dirichlet | Shards | ByGroup


def _fill_empty(parts: list[Rows]) -> list[Rows]:
    """Give each empty part one row of the then largest part (ties: the lowest device)."""
    sizes = np.array([len(p) for p in parts])
    for device in np.flatnonzero(sizes == 0):
        donor = int(np.argmax(sizes))
        parts[device], parts[donor] = parts[donor][-1:], parts[donor][:-1]
        sizes[device], sizes[donor] = 1, sizes[donor] - 1
    return parts


def parse_partition(text: str) -> Partition:
    """Parse the command line's form.

    >>> parse_partition("dirichlet:0.5")
    Dirichlet(alpha=0.5)

    Raises:
        PartitionError: Another form, or a parameter out of range; the message names the forms.
    """
    if text == "iid":
        return Iid()
    if text == "by-group":
        return ByGroup()
    if match := re.fullmatch(r"dirichlet:(\d+\.?\d*(?:e-?\d+)?|\.\d+)", text):
        alpha = float(match[1])
        if 1e-6 <= alpha <= 1e6:
            return Dirichlet(alpha)
        raise PartitionError(f"dirichlet's ALPHA must lie in 1e-6 .. 1e6, got {match[1]}")
    if match := re.fullmatch(r"shards:(\d{1,6})", text):
        per_device = int(match[1])
        if per_device >= 1:
            return Shards(per_device)
        raise PartitionError("shards' K must be at least 1")
    raise PartitionError(f"unknown partition {text!r}; the forms are {FORMS}")


def deal(partition: Partition, labels: Labels, devices: int, seed: int, groups: Labels | None = None) -> list[Rows]:
    """Deal the examples out.

    Args:
        partition: How.
        labels: int64[n].
        devices: Number of devices, 1 .. n.
        seed: Fixes the outcome.
        groups: int64[n], of a data set that has them.

    Returns:
        One array of row numbers per device: disjoint, none empty, together all of 0 .. n - 1.

    Raises:
        PartitionError: More devices (or shards) than examples, or a partition by groups of data that has none.
    """
    if devices < 1:
        raise PartitionError("at least one device is needed")
    if devices > len(labels):
        raise PartitionError(f"{devices} devices cannot each get one of {len(labels)} training examples; use fewer")
    if isinstance(partition, ByGroup):
        if groups is None:
            raise PartitionError("by-group is for data that comes in groups, such as the languages of manpages")
        labels = groups
    rng = np.random.default_rng([seed, 0x7061_7274])
    return [np.asarray(part, dtype=np.int64) for part in partition.deal(labels, devices, rng)]
