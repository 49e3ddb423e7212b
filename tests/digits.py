"""Softmax regression on the 8 x 8 digits, divided among workers: a small real problem for tests of aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.datasets import load_digits

from client_sdk.protocol.updates import WorkerGradient

CLASSES, FEATURES = 10, 64
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """One worker's examples."""

    x: np.ndarray
    y: np.ndarray


@cache
def shards(workers: int, seed: int = 0) -> tuple[Shard, ...]:
    """All 1797 examples, shuffled and divided evenly."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    return tuple(Shard(x[part] / 16.0, y[part]) for part in np.array_split(order, workers))


def start() -> State:
    return {"w": np.zeros((FEATURES, CLASSES)), "b": np.zeros(CLASSES)}


def log_probabilities(state: State, x: np.ndarray) -> np.ndarray:
    scores = x @ state["w"] + state["b"]
    scores -= scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def loss(state: State, parts: tuple[Shard, ...]) -> float:
    """Mean cross-entropy over all shards."""
    losses = [-log_probabilities(state, s.x)[np.arange(len(s.y)), s.y] for s in parts]
    return float(np.concatenate(losses).mean())


def accuracy(state: State, parts: tuple[Shard, ...]) -> float:
    """Share of the examples that are told right."""
    return float(np.concatenate([log_probabilities(state, s.x).argmax(axis=1) == s.y for s in parts]).mean())


def gradient(state: State, shard: Shard) -> State:
    """float32, as a device sends it."""
    error = np.exp(log_probabilities(state, shard.x))
    error[np.arange(len(shard.y)), shard.y] -= 1
    error /= len(shard.y)
    return {"w": (shard.x.T @ error).astype(np.float32), "b": error.sum(axis=0).astype(np.float32)}


def worker(name: str, state: State, shard: Shard) -> WorkerGradient:
    return WorkerGradient(name, gradient(state, shard), len(shard.y), timestamp=0.0)


def rounds_to(losses: list[float], target: float) -> float:
    """Rounds until the loss is first this low, between two rounds by interpolation; infinite if it never is."""
    for i, value in enumerate(losses):
        if value <= target:
            return i if i == 0 else i - 1 + (losses[i - 1] - target) / (losses[i - 1] - value)
    return float("inf")
