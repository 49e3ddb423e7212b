"""Robust rules written down as the papers have them: slow, in exact arithmetic where it matters, sharing no code."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def squared_distances(rows: np.ndarray) -> list[list[Fraction]]:
    exact = [[Fraction(float(x)) for x in row] for row in rows]
    return [[sum(((a - b) ** 2 for a, b in zip(x, y, strict=True)), Fraction(0)) for y in exact] for x in exact]


def krum_scores(distances: list[list[Fraction]], f: int, among: list[int] | None = None) -> dict[int, Fraction]:
    """Scores of the rows in ``among`` (default: all), each against the others there."""
    among = list(range(len(distances))) if among is None else among
    count = min(max(len(among) - f - 2, 1), len(among) - 1)
    return {i: sum(sorted(distances[i][j] for j in among if j != i)[:count], Fraction(0)) for i in among}


def best(scores: dict[int, Fraction], m: int) -> list[int]:
    return sorted(sorted(scores, key=lambda i: (scores[i], i))[:m])


def mean(rows: np.ndarray) -> list[float]:
    """Per column, the exactly rounded sum divided by the number of rows."""
    return [math.fsum(column) / len(rows) for column in rows.astype(np.float64).T.tolist()]


def krum(rows: np.ndarray, f: int) -> int:
    return best(krum_scores(squared_distances(rows), f), 1)[0]


def multi_krum(rows: np.ndarray, f: int, m: int) -> list[int]:
    return best(krum_scores(squared_distances(rows), f), m)


def bulyan(rows: np.ndarray, f: int) -> tuple[list[int], list[float]]:
    distances = squared_distances(rows)
    left, chosen = list(range(len(rows))), []
    while len(chosen) < max(len(rows) - 2 * f, 1):
        chosen += best(krum_scores(distances, f, left), 1)
        left.remove(chosen[-1])
    nearest = max(len(rows) - 4 * f, 1)
    values = []
    for column in rows[sorted(chosen)].T.tolist():
        exact = sorted(map(Fraction, column))
        middle = (exact[(len(exact) - 1) // 2] + exact[len(exact) // 2]) / 2
        kept = sorted(exact, key=lambda x, middle=middle: (abs(x - middle), x))[:nearest]
        values.append(float(sum(kept) / nearest))
    return sorted(chosen), values


def trimmed_mean(rows: np.ndarray, f: int) -> np.ndarray:
    kept = np.sort(rows.astype(np.float64), axis=0)[f : len(rows) - f]
    # As numpy's mean of a matrix of several columns; of a single one it would add in another order.
    return np.add.accumulate(kept)[-1] / len(kept)


def median(rows: np.ndarray) -> np.ndarray:
    return np.median(rows.astype(np.float64), axis=0)


def geometric_median(rows: np.ndarray, iterations: int = 300) -> np.ndarray:
    rows = rows.astype(np.float64)
    point = np.median(rows, axis=0)
    for _ in range(iterations):
        inverse = 1 / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-12)
        point = (inverse[:, None] * rows).sum(axis=0) / inverse.sum()
    return point


def sum_of_distances(rows: np.ndarray, point: np.ndarray) -> float:
    return math.fsum(np.linalg.norm(rows.astype(np.float64) - point, axis=1))


def centered_clipping(rows: np.ndarray, radius: float, iterations: int, centre: np.ndarray) -> np.ndarray:
    rows, point = rows.astype(np.float64), centre.astype(np.float64)
    for _ in range(iterations):
        differences = rows - point
        lengths = np.linalg.norm(differences, axis=1)
        factors = np.array([1.0 if length <= radius else radius / length for length in lengths])
        point = point + (factors[:, None] * differences).mean(axis=0)
    return point


def nearest_neighbor_mixing(rows: np.ndarray, f: int) -> list[list[int]]:
    distances = squared_distances(rows)
    n = len(rows)
    return [sorted(range(n), key=lambda j, i=i: (j != i, distances[i][j], j))[: n - f] for i in range(n)]
