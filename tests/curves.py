"""Seeded curves of training, honest and diverging: losses and norms of aggregates, round by round."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from server_ref.aggregation.monitoring import DivergenceDetector, DivergenceState, Health

ROUNDS = 500
BREAK = 150
"""Round after which a diverging curve diverges."""

SHAPES = ("exponential", "power law", "to zero", "flat", "with a bump", "overfitting")


def honest(shape: str, noise: float, seed: int, rounds: int = ROUNDS) -> tuple[np.ndarray, np.ndarray]:
    """Losses and norms with log-normal noise of this standard deviation."""
    t = np.arange(rounds)
    decay = np.exp(-t / 60)
    bump = np.exp(-(((t - 200) / 15.0) ** 2))
    losses, norms = {
        "exponential": (2.3 * decay + 0.3, decay + 0.05),
        "power law": (2.3 / np.sqrt(1 + t), 1 / np.sqrt(1 + t)),
        "to zero": (2.3 * np.exp(-t / 20), np.exp(-t / 20) + 1e-6),
        "flat": (np.full(rounds, 2.3), np.ones(rounds)),
        "with a bump": ((2.3 * decay + 0.3) * (1 + 0.5 * bump), (decay + 0.05) * (1 + 2 * bump)),
        "overfitting": (2.3 * decay + 0.3 + 0.0004 * t, decay + 0.05),
    }[shape]
    rng = np.random.default_rng([seed, SHAPES.index(shape)])
    return tuple(curve * np.exp(noise * rng.standard_normal(rounds)) for curve in (losses, norms))


def diverging(growth: float, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An honest curve whose loss and norm grow by this factor in every round after ``BREAK``."""
    losses, norms = honest("exponential", noise, seed, ROUNDS)
    grown = growth ** np.clip(np.arange(ROUNDS) - BREAK, 0, 200)
    return losses * grown, norms * grown


def oscillating(growth: float, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A loss that swings around an honest one, ever wider: a step size just beyond the stability bound."""
    losses, norms = honest("exponential", noise, seed, ROUNDS)
    t = np.arange(ROUNDS) - BREAK
    swing = np.where(t > 0, 0.1 * growth ** np.clip(t, 0, 200), 0.0)
    return losses * (1 + swing * (-1.0) ** t) ** 2, norms * (1 + swing)


def states(
    losses: np.ndarray, norms: np.ndarray, detector: DivergenceDetector | None = None
) -> Iterator[DivergenceState]:
    """The detector's state after each round."""
    detector, state = detector or DivergenceDetector(), DivergenceState()
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        state = detector.next(state, loss=loss, norm=norm)
        yield state


def diverged_at(losses: np.ndarray, norms: np.ndarray) -> int | None:
    """First round in which divergence is found; None if it never is."""
    found = enumerate(states(losses, norms))
    return next((number for number, state in found if state.health is Health.DIVERGED), None)
