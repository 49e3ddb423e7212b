"""What a robust rule gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reduction:
    """The outcome of a rule, and what it made of each row.

    Attributes:
        values: float64[d].
        num_byzantine: Dishonest rows that the rule assumed.
        degraded: The caller assumed more than the rule stands; ``num_byzantine`` is the most that it does.
        selected: Rows that the outcome is made of, ascending; None where every row has a say in every coordinate.
            After mixing: the rows whose mixtures were selected.
        scores: float64[n], smaller is more central. Krum: sum of the squared distances to the nearest rows.
            Geometric median, centred clipping: distance to the outcome. None for the rules by coordinate. After
            mixing: the score of the mixture that the row belongs to (nearest neighbours: its own).
        weights: float64[n], how much each row counts: ``values`` is the weighted sum of the rows for Krum, Multi-Krum
            and the geometric median (they sum to 1); centred clipping: the length of the last step towards the row,
            as a part of the distance and divided by n. None for the rules by coordinate.
        iterations: Passes of an iterative rule; 0 for the others.
        converged: Whether an iterative rule stopped because it had arrived; True for the others.
    """

    values: Float64Array
    num_byzantine: int
    degraded: bool = False
    selected: tuple[int, ...] | None = None
    scores: Float64Array | None = None
    weights: Float64Array | None = None
    iterations: int = 0
    converged: bool = True
