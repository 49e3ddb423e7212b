"""Krum and Multi-Krum: the rows that are nearest to their nearest others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server_ref.aggregation.robust.centres import mean_of
from server_ref.aggregation.robust.distances import distances_to_peers, squared_distances
from server_ref.aggregation.robust.limits import rows_to_average
from server_ref.aggregation.robust.options import DistanceMode, RuleOptions
from server_ref.aggregation.robust.reduction import Reduction
from server_ref.aggregation.robust.rows import Rows

Float64Array = npt.NDArray[np.float64]


def krum(rows: Rows, num_byzantine: int, options: RuleOptions) -> Reduction:
    """The row with the lowest score; of several, the first."""
    return _mean_of_best(rows, krum_scores(rows, num_byzantine, options), 1, num_byzantine)


def multi_krum(rows: Rows, num_byzantine: int, options: RuleOptions) -> Reduction:
    """The mean of the m rows with the lowest scores; ties go to the first."""
    count = rows_to_average(len(rows), num_byzantine, options)
    return _mean_of_best(rows, krum_scores(rows, num_byzantine, options), count, num_byzantine)


def krum_scores(rows: Rows, num_byzantine: int, options: RuleOptions) -> Float64Array:
    """Sum of the squared distances to the n - f - 2 nearest other rows (of sampled peers, the same part of them).

    At least one other counts, if there is one. Squared distances are added from the smallest on.
    """
    n = len(rows)
    wanted = n - num_byzantine - 2
    if options.mode is DistanceMode.SAMPLED:
        others = distances_to_peers(rows, options)
        # Of r peers as many as r/(n - 1) of the n - f - 2.
        wanted = round(wanted * others.shape[1] / max(n - 1, 1))
    else:
        others = squared_distances(rows, options)
        np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    count = min(max(wanted, 1), n - 1, others.shape[1])
    return np.asarray(others[:, :count].sum(axis=1))


def _mean_of_best(rows: Rows, scores: Float64Array, count: int, num_byzantine: int) -> Reduction:
    selected = np.sort(np.argsort(scores, kind="stable")[:count])
    weights = np.zeros(len(rows))
    weights[selected] = 1 / count
    values = rows.vectors[int(selected[0])].astype(np.float64) if count == 1 else mean_of(rows, selected.tolist())
    return Reduction(values, num_byzantine, selected=tuple(selected.tolist()), scores=scores, weights=weights)
