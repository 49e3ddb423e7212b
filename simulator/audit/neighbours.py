"""The neighbouring-data test: does one client ever move an outcome by more than the sensitivity that is claimed?

Noise is calibrated to a claimed sensitivity; a claim that is too small is a privacy bug that no accountant notices. For
each claim, cohorts are built to be as bad as possible, one client's update is changed, and the two outcomes (before
noise) are compared. A claim that fails is refuted; one that passes was merely not refuted by these cohorts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from server_ref.aggregation import Adjacency

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

SLACK: Final = 1e-6
"""Relative: rounding of the outcome (float32 updates, float64 sums), far below what a wrong claim misses by."""


@dataclass(frozen=True)
class Claim:
    """A sensitivity that some part of the product claims.

    Attributes:
        name: Of the part.
        adjacency: Which cohorts are neighbours.
        sensitivity: L2.
        outcome: From a cohort, float32 (clients, size) as the clients send it, to what noise would be added to.
        clip_norm: To which updates are clipped somewhere on the way.
        kept: Coordinates that a compressed update has; ``size`` where nothing is left out.
        clients: In a cohort.
        size: Coordinates of an update.
    """

    name: str
    adjacency: Adjacency
    sensitivity: float
    outcome: Callable[[Float32Array], Float64Array]
    clip_norm: float
    kept: int
    clients: int
    size: int


@dataclass(frozen=True)
class Verdict:
    """What the worst pair of neighbours showed.

    Attributes:
        claim: What was tested.
        moved: L2 distance of their outcomes.
        pairs: How many pairs were tried.
    """

    claim: Claim
    moved: float
    pairs: int

    @property
    def attained(self) -> float:
        """The distance as a part of the claimed sensitivity."""
        return self.moved / self.claim.sensitivity

    @property
    def holds(self) -> bool:
        """Whether the claim was not refuted."""
        return self.attained <= 1 + SLACK


def check(claim: Claim, seed: int = 0) -> Verdict:
    """Try the claim's neighbours.

    Args:
        claim: What is claimed.
        seed: Of the cohorts that are drawn at random.
    """
    worst, pairs = 0.0, 0
    for one, other in neighbours(claim, seed):
        distance = float(np.linalg.norm(claim.outcome(one) - claim.outcome(other)))
        # NaN would compare as "not larger" and pass.
        worst = distance if not math.isfinite(distance) else max(worst, distance)
        pairs += 1
        if not math.isfinite(worst):
            return Verdict(claim, math.inf, pairs)
    return Verdict(claim, worst, pairs)


def neighbours(claim: Claim, seed: int) -> Iterator[tuple[Float32Array, Float32Array]]:
    """Pairs of cohorts that differ in client 0 only."""
    ends = list(_updates(claim))
    if claim.adjacency is Adjacency.REPLACE_ONE:
        changes = [(a, b) for i, a in enumerate(ends) for b in [-a, *ends[:i]]]
    else:
        changes = [(a, np.zeros_like(a)) for a in ends]
    for cohort in _cohorts(claim, seed):
        for before, after in changes:
            one, other = cohort.copy(), cohort.copy()
            one[0], other[0] = before, after
            yield one, other


def _updates(claim: Claim) -> Iterator[Float32Array]:
    """What one client may send: as long as allowed or far longer, on few coordinates or on all, or on others."""
    supports = [(0, 1), (0, claim.kept), (0, claim.size), (claim.kept, min(2 * claim.kept, claim.size))]
    for start, stop in sorted({s for s in supports if s[0] < s[1]}):
        update = np.zeros(claim.size, np.float32)
        update[start:stop] = claim.clip_norm / math.sqrt(stop - start)
        yield update
    yield np.full(claim.size, 1e6 * claim.clip_norm, np.float32)


def _cohorts(claim: Claim, seed: int) -> Sequence[Float32Array]:
    """The other clients: silent, random, or in two opposite camps between which one vote decides."""
    random = np.random.default_rng(seed)
    shape = (claim.clients, claim.size)
    spread = random.standard_normal(shape)
    spread *= claim.clip_norm / np.linalg.norm(spread, axis=1, keepdims=True)
    first = np.zeros(claim.size)
    first[: claim.kept] = claim.clip_norm / math.sqrt(claim.kept)
    camps = np.where(np.arange(claim.clients)[:, None] % 2, first, -first)
    return [np.zeros(shape, np.float32), spread.astype(np.float32), camps.astype(np.float32)]
