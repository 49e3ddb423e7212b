"""Thousands of devices with a few examples each and a linear model, without writing their updates down.

One local step of softmax regression changes the weights by a sum of outer products: of each example's error and its
features. Norms, inner products and weighted sums of such updates need the errors and, for the norms, the inner products
of one device's examples with each other, which never change. A round of 12,000 devices takes milliseconds so, instead
of the seconds that 12,000 dense vectors take; the sums are the same up to float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from simulator.datasets import Dataset, Split
from simulator.partition import Iid

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def features_of(split: Split) -> Float32Array:
    """float32[n, features + 1]: flattened, with a feature of value 1 whose weight is the bias."""
    flat = split.x.reshape(len(split), -1)
    return np.hstack([flat, np.ones((len(split), 1), np.float32)])


def accuracy(weights: Float64Array, features: Float32Array, labels: Int64Array) -> float:
    """Share of examples told right. ``weights``: float64[features * classes]."""
    scores = features @ weights.reshape(features.shape[1], -1).astype(np.float32)
    return float(np.mean(scores.argmax(axis=1) == labels))


@dataclass(frozen=True, eq=False)
class LinearCohort:
    """The devices' examples, one device's behind the other's.

    Attributes:
        features: float32[n, p], the bias feature included.
        targets: float32[n, classes], one-hot.
        owners: int64[n], ascending: whose each example is.
        sizes: int64[devices], examples of each, 1 and more.
        gram: float32[devices, m, m], inner products of a device's examples; 0 where it has fewer than m.
    """

    features: Float32Array
    targets: Float32Array
    owners: Int64Array
    sizes: Int64Array
    gram: Float32Array

    @classmethod
    def deal(cls, dataset: Dataset, devices: int, seed: int) -> Self:
        """Deal the training split out in equal parts (iid)."""
        parts = Iid().deal(dataset.train.y, devices, np.random.default_rng(seed))
        order = np.concatenate(parts)
        sizes = np.array([len(p) for p in parts], np.int64)
        features = features_of(dataset.train)[order]
        targets = np.eye(dataset.num_classes, dtype=np.float32)[dataset.train.y[order]]
        owners = np.repeat(np.arange(devices, dtype=np.int64), sizes)
        padded = np.zeros((devices, int(sizes.max()), features.shape[1]), np.float32)
        padded[owners, _places(owners, sizes)] = features
        return cls(features, targets, owners, sizes, padded @ padded.transpose(0, 2, 1))

    @property
    def devices(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def size(self) -> int:
        """Coordinates of an update."""
        return int(self.features.shape[1] * self.targets.shape[1])

    def train(self, weights: Float64Array, learning_rate: float) -> ImplicitUpdates:
        """Every device's update (a delta) from one step on the mean loss of its examples."""
        scores = self.features @ weights.reshape(self.features.shape[1], -1).astype(np.float32)
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        scores = self.targets - scores
        scores *= (learning_rate / self.sizes[self.owners])[:, None].astype(np.float32)
        return ImplicitUpdates(self, scores)


@dataclass(frozen=True, eq=False)
class ImplicitUpdates:
    """One update of every device: ``sum_j features_j (x) factors_j`` over its examples, features first.

    Attributes:
        cohort: Whose.
        factors: float32[n, classes].
    """

    cohort: LinearCohort
    factors: Float32Array

    def norms(self) -> Float64Array:
        """L2 norm of each device's update, float64[devices]."""
        c = self.cohort
        padded = np.zeros((c.devices, c.gram.shape[1], self.factors.shape[1]), np.float32)
        padded[c.owners, _places(c.owners, c.sizes)] = self.factors
        squares = ((padded @ padded.transpose(0, 2, 1)) * c.gram).sum(axis=(1, 2), dtype=np.float64)
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))

    def inner(self, vector: Float64Array) -> Float64Array:
        """Inner product of each with one vector, float64[devices]."""
        c = self.cohort
        across = c.features @ vector.reshape(c.features.shape[1], -1).astype(np.float32)
        each = (across * self.factors).sum(axis=1, dtype=np.float64)
        return np.asarray(np.bincount(c.owners, each, c.devices), np.float64)

    def sum(self, weights: Float64Array, members: Int64Array | None = None) -> Float64Array:
        """``sum_i weights_i update_i`` over the members (all by default), float64[size]."""
        c = self.cohort
        weighted = self.factors * weights[c.owners, None].astype(np.float32)
        features = c.features
        if members is not None:
            chosen = np.zeros(c.devices, bool)
            chosen[members] = True
            rows = chosen[c.owners]
            weighted, features = weighted[rows], features[rows]
        return np.asarray(features.T @ weighted, np.float64).reshape(-1)

    def dense(self, devices: Int64Array) -> Float32Array:
        """Some updates written down, float32[len(devices), size]."""
        c = self.cohort
        found = np.zeros((len(devices), c.size), np.float32)
        first = np.concatenate([[0], np.cumsum(c.sizes)])
        for row, device in enumerate(devices):
            mine = slice(first[device], first[device + 1])
            found[row] = (c.features[mine].T @ self.factors[mine]).reshape(-1)
        return found


def _places(owners: Int64Array, sizes: Int64Array) -> Int64Array:
    """The place of each example among its owner's."""
    return np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
