"""Canaries: clients that send what is easiest to recognise, in or out by a coin each.

Every canary has coordinates of its own, so that its direction is orthogonal to all others' and its updates keep few
coordinates; and it sends far more than the clip norm, so that a mechanism that forgets to clip shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

LENGTH: Final = 10.0
"""Norm of what canaries send, over the clip norm."""

Norms = Callable[[int], Float64Array]
"""For a round, the norm of what each canary sends, float64[count]; 0 for one that stays silent in it."""


@dataclass(frozen=True, eq=False)
class Canaries:
    """Orthogonal unit directions on disjoint coordinates.

    Attributes:
        size: Coordinates of an update.
        places: int64 (count, width), the coordinates of each.
        signs: float64 (count, width), +1 or -1.
    """

    size: int
    places: npt.NDArray[np.int64]
    signs: Float64Array

    @classmethod
    def draw(cls, count: int, size: int, random: np.random.Generator) -> Self:
        """Canaries at random places.

        Raises:
            ConfigurationError: Fewer coordinates than canaries.
        """
        width = min(size // max(count, 1), 20)
        if count < 1 or width < 1:
            raise ConfigurationError(f"{count} canaries need as many coordinates and more, there are {size}")
        places = random.permutation(size)[: count * width].reshape(count, width)
        return cls(size, places, random.choice([-1.0, 1.0], size=(count, width)))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.places)

    def updates(self, included: BoolArray, norms: Float64Array) -> Iterator[Float32Array]:
        """One update a canary, float32[size]: its direction times its norm, or zero for one that is out."""
        for places, signs, length, present in zip(self.places, self.signs, norms, included, strict=True):
            update = np.zeros(self.size, np.float32)
            if present:
                update[places] = signs * (length / np.sqrt(len(places)))
            yield update

    def along(self, vector: Float64Array) -> Float64Array:
        """Inner products of a vector with all directions, float64[count]."""
        return np.asarray((vector[self.places] * self.signs).sum(axis=1) / np.sqrt(self.places.shape[1]))


def always(count: int, clip_norm: float) -> Norms:
    """Every canary in every round."""
    return lambda _round: np.full(count, LENGTH * clip_norm)


def every_other(count: int, clip_norm: float) -> Norms:
    """Every canary in rounds 0, 2, ...: what two rounds have in common cancels out."""
    return lambda round_id: np.full(count, 0.0 if round_id % 2 else LENGTH * clip_norm)


def ladder(count: int, clip_norm: float) -> Norms:
    """Every canary has a norm of its own around the clip norm, another in every round: a quantile shows whose it is."""
    # By the golden section, so that rounds find their quantile at canaries far from one another.
    stride = max(1, round(count * 0.618))

    def norms(round_id: int) -> Float64Array:
        ranks = (np.arange(count) + round_id * stride) % count
        return np.asarray(clip_norm * (0.5 + ranks / count))

    return norms
