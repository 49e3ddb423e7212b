"""Bulyan: Krum chooses, row by row, whom the trimming by coordinate then looks at."""

from __future__ import annotations

import numpy as np

from server_ref.aggregation.robust.coordinatewise import mean_around_median
from server_ref.aggregation.robust.distances import squared_distances
from server_ref.aggregation.robust.kernels import select_one_by_one
from server_ref.aggregation.robust.options import RuleOptions
from server_ref.aggregation.robust.reduction import Reduction
from server_ref.aggregation.robust.rows import Rows


def bulyan(rows: Rows, num_byzantine: int, options: RuleOptions) -> Reduction:
    """Choose n - 2f rows by Krum, each among those left; per coordinate, average the n - 4f nearest to their median.

    Selection costs O(n^3) beside the distances. ``scores`` are Krum's among all rows.
    """
    n = len(rows)
    distances = squared_distances(rows, options)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, : n - 1]
    ascending = np.take_along_axis(distances, order, axis=1)
    chosen = np.empty(max(n - 2 * num_byzantine, 1), np.int32)
    select_one_by_one(np.ascontiguousarray(order, np.int32), ascending, num_byzantine, chosen)
    selected = np.sort(chosen).tolist()
    values = mean_around_median(rows.subset(selected), max(n - 4 * num_byzantine, 1))
    count = min(max(n - num_byzantine - 2, 1), n - 1)
    return Reduction(
        values, num_byzantine, selected=tuple(selected), scores=np.asarray(ascending[:, :count].sum(axis=1))
    )
