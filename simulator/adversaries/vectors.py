"""What an attacker sends instead of an honest update: the attacks of the literature as pure functions on vectors.

``own`` is the attacker's honest update, float32[d]. ``known`` is what the colluders know, float32[m, d]: the honest
updates of m >= 1 of their own devices, all from one model. Results are float32[d] and finite; sums run in float64 and
in a fixed order, without BLAS, so that the bits do not depend on the number of threads.

None of these functions looks at an honest device's update: the attackers are those of the papers' weaker, realistic
variant, who know their own devices and nothing else.
"""

from __future__ import annotations

import math
from enum import StrEnum
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from simulator.errors import AttackError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_LARGEST: Final = float(np.finfo(np.float32).max)
_NORMAL: Final = NormalDist()


def as_float32(values: Float64Array) -> Float32Array:
    """Round to float32; what lies beyond its range becomes its largest value, so that the update stays finite."""
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float32)


def within(values: Float32Array, max_abs: float) -> Float32Array:
    """Scale a vector down until no value lies beyond ``max_abs``: a server refuses what does, and nobody would see it.

    Args:
        values: float32[d].
        max_abs: Positive.

    Returns:
        float32[d], with the same direction up to rounding; the same array where nothing is to be done.
    """
    reach = float(np.abs(values).max(initial=0.0))
    if reach <= max_abs:
        return values
    # Clipped besides: the rounded product may be one unit too large, and so may float32(max_abs) itself.
    limit = np.float32(max_abs)
    limit = limit if float(limit) <= max_abs else np.nextafter(limit, np.float32(0))
    scaled = (values.astype(np.float64) * (max_abs / reach)).astype(np.float32)
    return np.clip(scaled, -limit, limit)


# --- alone: functions of the attacker's own update ---------------------------------------------------------------


def scaled(own: Float32Array, factor: float) -> Float32Array:
    """``factor * own``: a sign flip where it is negative, model replacement where it is large, nothing where it is 0.

    Source:
        The sign flip of Li et al. 2019, "RSA: Byzantine-robust stochastic aggregation methods"; the scaled update of
        Bagdasaryan et al. 2020, "How to backdoor federated learning".
    """
    return as_float32(own.astype(np.float64) * factor)


def gaussian(own: Float32Array, factor: float, rng: np.random.Generator) -> Float32Array:
    """Noise instead: N(0, s^2) in each coordinate, s = ``factor`` times the update's own root mean square.

    Blanchard et al. draw from N(0, 200^2) whatever the model; relative to the update, one factor means the same for
    every model and every round.

    Source:
        Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient descent".
    """
    wide = own.astype(np.float64)
    stddev = factor * math.sqrt(float(np.mean(wide * wide)))
    return as_float32(stddev * rng.standard_normal(own.size))


# --- together: functions of what the colluders know -------------------------------------------------------------


def alie_z_max(reports: int, attackers: int) -> float:
    """How many standard deviations all attackers may lie off the mean and still pass for the majority.

    ``s = floor(n/2) + 1 - f`` honest updates have to lie further out than the attackers; for normally distributed
    values that is ``z = Phi^-1((n - f - s) / (n - f))``. Few attackers need many supporters: where z would not be
    positive (f = 2 of 10, say) there is no such deviation and the answer is 0.

    Args:
        reports: n, updates in a round.
        attackers: f of them, 1 .. n. From the majority on, one supporter is asked for.

    Raises:
        AttackError: f out of range.

    Source:
        Baruch, Baruch, Goldberg 2019, "A little is enough: circumventing defenses for distributed learning".
    """
    if not 0 < attackers <= reports:
        raise AttackError(f"there must be 1 to {reports} attackers among {reports} reports, got {attackers}")
    honest = max(reports - attackers, 1)
    supporters = max(reports // 2 + 1 - attackers, 1)
    share = (honest - supporters) / honest
    return _NORMAL.inv_cdf(share) if share > 0.5 else 0.0


def a_little_is_enough(known: Float32Array, z: float) -> Float32Array:
    """``mean - z * std``, coordinate by coordinate: hidden in the spread of honest updates.

    Source:
        Baruch, Baruch, Goldberg 2019 (ALIE).
    """
    wide = known.astype(np.float64)
    return as_float32(wide.mean(axis=0) - z * wide.std(axis=0))


def inner_product(known: Float32Array, epsilon: float) -> Float32Array:
    """``-epsilon * mean``: enough of them turn the aggregate's inner product with the true mean negative.

    A small epsilon hides near the origin from rules that look at distances; a large one overturns the mean.

    Source:
        Xie, Koyejo, Gupta 2020, "Fall of empires: breaking Byzantine-tolerant SGD by inner product manipulation".
    """
    return as_float32(-epsilon * known.astype(np.float64).mean(axis=0))


def mimic(known: Float32Array) -> Float32Array:
    """The update of one of their own, repeated by all: the aggregate over-represents that one device's data.

    The one is that which reaches furthest along the direction of largest variance (ties: the lowest row). The paper
    estimates the direction over the rounds and keeps its choice; here every model has its own. The sample of devices
    is the same all the time, so that the choice seldom changes.

    Source:
        Karimireddy, He, Jaggi 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing".
    """
    wide = known.astype(np.float64)
    wide -= wide.mean(axis=0)
    gram = np.array([[float(np.sum(a * b)) for b in wide] for a in wide])
    if not np.any(gram):
        return _row(known, 0)
    # Row i's coordinate along the leading direction is sqrt(eigenvalue) * v_i. The sign of v is arbitrary.
    _, vectors = np.linalg.eigh(gram)
    return _row(known, int(np.argmax(np.round(np.abs(vectors[:, -1]), 9))))


def _row(known: Float32Array, index: int) -> Float32Array:
    return np.array(known[index], np.float32)


class Perturbation(StrEnum):
    """Direction in which min-max and min-sum leave the mean."""

    UNIT = "unit"
    """Against the mean: ``-mean / ||mean||``."""

    STD = "std"
    """Against the standard deviations: ``-std``."""

    SIGN = "sign"
    """Against the mean's signs: ``-sign(mean)``."""


def _direction(wide: Float64Array, mean: Float64Array, perturbation: Perturbation) -> Float64Array:
    match perturbation:
        case Perturbation.UNIT:
            norm = math.sqrt(float(np.sum(mean * mean)))
            return -mean / norm if norm > 0 else np.zeros_like(mean)
        case Perturbation.STD:
            deviations: Float64Array = wide.std(axis=0)
            return -deviations
        case Perturbation.SIGN:
            return -np.sign(mean)


def _squared_distances(wide: Float64Array) -> Float64Array:
    found = np.zeros((len(wide), len(wide)))
    for i, row in enumerate(wide):
        for j in range(i):
            difference = row - wide[j]
            found[i, j] = found[j, i] = np.sum(difference * difference)
    return found


def min_max(known: Float32Array, perturbation: Perturbation = Perturbation.STD) -> Float32Array:
    """As far from the mean as the furthest two known updates are from one another, and no further from any of them.

    ``mean + gamma p`` with the largest gamma for which ``max_i ||mean + gamma p - x_i|| <= max_ij ||x_i - x_j||``.
    Each i gives a quadratic in gamma, so that the paper's search is a formula: the smallest of their larger roots.
    Without a second known update there is no distance to hide in, and the mean is sent.

    Source:
        Shejwalkar, Houmansadr 2021, "Manipulating the Byzantine: optimizing model poisoning attacks and defenses for
        federated learning".
    """
    wide = known.astype(np.float64)
    mean = wide.mean(axis=0)
    direction = _direction(wide, mean, perturbation)
    length = float(np.sum(direction * direction))
    if length == 0:
        return as_float32(mean)
    allowed = float(_squared_distances(wide).max())
    gamma = math.inf
    for row in wide:
        offset = mean - row
        half = float(np.sum(direction * offset)) / length
        # The mean lies within the updates' hull, so the constant term is not positive, up to rounding.
        rest = max((allowed - float(np.sum(offset * offset))) / length, 0.0)
        gamma = min(gamma, -half + math.sqrt(half * half + rest))
    return as_float32(mean + gamma * direction)


def min_sum(known: Float32Array, perturbation: Perturbation = Perturbation.STD) -> Float32Array:
    """As ``min_max`` with sums: the squared distances to all known updates add up to no more than any known one's do.

    ``sum_i ||mean + gamma p - x_i||^2 <= max_i sum_j ||x_i - x_j||^2``; the cross terms cancel at the mean, which
    leaves a square root.

    Source:
        Shejwalkar, Houmansadr 2021.
    """
    wide = known.astype(np.float64)
    mean = wide.mean(axis=0)
    direction = _direction(wide, mean, perturbation)
    length = float(np.sum(direction * direction))
    if length == 0:
        return as_float32(mean)
    allowed = float(_squared_distances(wide).sum(axis=1).max())
    offsets = wide - mean
    spread = float(np.sum(offsets * offsets))
    gamma = math.sqrt(max(allowed - spread, 0.0) / (len(wide) * length))
    return as_float32(mean + gamma * direction)


def common_poison(known: Float32Array, factor: float, rng: np.random.Generator) -> Float32Array:
    """One random direction that all send, ``factor`` times as long as an honest update is on average.

    Copies of one vector lie at distance 0 from each other, which is what rules that look for close neighbours reward.

    Args:
        known: float32[m, d].
        factor: Length beside an honest update's mean norm.
        rng: Draws the direction; the same state for all colluders.

    Source:
        Sybils with one goal, as in Fung, Yoon, Beschastnikh 2020, "The limitations of federated learning in sybil
        settings"; the direction is random here, so that it means the same for every model.
    """
    wide = known.astype(np.float64)
    norm = float(np.mean(np.sqrt(np.sum(wide * wide, axis=1))))
    direction = rng.standard_normal((known.shape[1],))
    direction *= factor * norm / math.sqrt(float(np.sum(direction * direction)))
    return as_float32(direction)
