"""Krum and Multi-Krum on exact integer distances: what both the plain and the secret path select, without rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ShapeMismatch
from server_ref.aggregation.robust import RULES, RuleOptions
from server_ref.aggregation.robust.limits import rows_to_average, tolerated

Int64Array = npt.NDArray[np.int64]

_HALF: Final = 31
_FITS: Final = 1 << 62


@dataclass(frozen=True)
class IntegerSelection:
    """Which updates count.

    Attributes:
        selected: Positions, ascending.
        scores: Of each update: the sum of the squared distances to its nearest others.
        num_byzantine: Dishonest updates that were assumed.
    """

    selected: tuple[int, ...]
    scores: tuple[int, ...]
    num_byzantine: int


def integer_krum(
    distances: Sequence[int] | Int64Array, num_rows: int, num_byzantine: int, *, m: int | None = 1
) -> IntegerSelection:
    """Select by Krum's score; of equal ones the first position.

    Args:
        distances: Squared, of each pair (0, 1), (0, 2), ..., (n - 2, n - 1).
        num_rows: n.
        num_byzantine: f; n >= 2f + 3.
        m: How many to select: 1 for Krum; None for Multi-Krum's n - f - 2, or up to n - f.

    Raises:
        TooManyByzantine: n < 2f + 3.
        ShapeMismatch: Another number of distances, or a negative one.
        ConfigurationError: A negative f, or m beyond n - f.
    """
    rule = "krum" if m == 1 else "multi-krum"
    f = tolerated(RULES[rule], num_rows, num_byzantine, RuleOptions())
    count = 1 if m == 1 else rows_to_average(num_rows, f, RuleOptions(m=m))
    if len(distances) != num_rows * (num_rows - 1) // 2:
        raise ShapeMismatch(f"{len(distances)} distances of {num_rows} updates")
    neighbours = min(max(num_rows - f - 2, 1), num_rows - 1)
    scores = _scores(distances, num_rows, neighbours)
    # Python's sort is stable, and integers of any size compare exactly.
    selected = tuple(sorted(sorted(range(num_rows), key=scores.__getitem__)[:count]))
    return IntegerSelection(selected, tuple(scores), f)


def _scores(distances: Sequence[int] | Int64Array, num_rows: int, neighbours: int) -> list[int]:
    if len(distances) and min(distances) < 0:
        raise ShapeMismatch("a squared distance is negative")
    upper = np.triu_indices(num_rows, 1)
    if len(distances) and max(distances) >= _FITS:
        wide = np.zeros((num_rows, num_rows), object)
        wide[upper] = list(map(int, distances))
        wide += wide.T
        # Its own distance of 0 is the smallest of each row.
        return [sum(sorted(row)[1 : neighbours + 1]) for row in wide.tolist()]
    square = np.zeros((num_rows, num_rows), np.int64)
    square[upper] = distances
    square += square.T
    nearest = np.sort(square, axis=1)[:, 1 : neighbours + 1]
    # In halves of 31 bits, whose sums fit for up to 2^31 updates.
    high, low = nearest >> _HALF, nearest & ((1 << _HALF) - 1)
    return [(int(h) << _HALF) + int(x) for h, x in zip(high.sum(axis=1), low.sum(axis=1), strict=True)]
