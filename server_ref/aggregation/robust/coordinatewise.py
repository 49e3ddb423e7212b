"""Rules by coordinate: median, trimmed mean, and the mean of the values that are nearest to the median."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server_ref.aggregation.blocks import run_parts
from server_ref.aggregation.robust.kernels import BLOCK, mean_by_network, mean_of_nearest
from server_ref.aggregation.robust.networks import MAX_ROWS, network
from server_ref.aggregation.robust.options import RuleOptions
from server_ref.aggregation.robust.reduction import Reduction
from server_ref.aggregation.robust.rows import Rows

Float64Array = npt.NDArray[np.float64]


def median(rows: Rows, num_byzantine: int, _options: RuleOptions) -> Reduction:
    """The median of each coordinate; of an even number, the mean of the two in the middle."""
    return Reduction(coordinate_median(rows), num_byzantine)


def trimmed_mean(rows: Rows, num_byzantine: int, _options: RuleOptions) -> Reduction:
    """The mean of each coordinate without its f smallest and f largest values."""
    n = len(rows)
    return Reduction(_mean_of_order(rows, num_byzantine, n - num_byzantine), num_byzantine)


def coordinate_median(rows: Rows) -> Float64Array:
    """float64[d]; equal to ``np.median`` of the rows as float64."""
    n = len(rows)
    return _mean_of_order(rows, (n - 1) // 2, n // 2 + 1)


def mean_around_median(rows: Rows, nearest: int) -> Float64Array:
    """The mean of the values that are nearest to the median of each coordinate; of two equally near the smaller."""
    return _mean_of_order(rows, 0, len(rows), nearest)


def _mean_of_order(rows: Rows, low: int, high: int, nearest: int | None = None) -> Float64Array:
    """Mean of the order statistics from low to high, or of those of them that are nearest to their median.

    They are added in ascending order in float64, so no permutation of the rows changes a bit.
    """
    nearest = high - low if nearest is None else nearest
    out = np.empty(rows.size)
    parts = rows.column_parts
    if rows.wide or len(rows) > MAX_ROWS:

        def work(part: int) -> None:
            _by_sorting(rows, *parts[part], low, high, nearest, out)

    else:
        comparators = network(len(rows), low, high)

        def work(part: int) -> None:
            mean_by_network(rows.addresses, rows.size, *parts[part], comparators, low, high, nearest, out)

    run_parts(work, len(parts), elements=rows.elements)
    return out


def _by_sorting(rows: Rows, first: int, last: int, low: int, high: int, nearest: int, out: Float64Array) -> None:  # noqa: PLR0917 - as the kernel
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        block = np.stack([vector[start:stop] for vector in rows.vectors], axis=1)
        block.sort(axis=1)
        mean_of_nearest(np.ascontiguousarray(block.T[low:high], np.float64), nearest, out[start:stop])
