"""Rules that move a point among the rows, and sums that they and others share.

Both iterative rules do ``v <- v + sum_i a_i (x_i - v)`` with a_i from the distances ``||x_i - v||``. The next distances
are taken from the same columns right after they were moved, so an iteration reads the rows from memory once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import NonFiniteUpdate, ShapeMismatch
from server_ref.aggregation.blocks import run_parts
from server_ref.aggregation.robust.coordinatewise import coordinate_median
from server_ref.aggregation.robust.kernels import move
from server_ref.aggregation.robust.options import RuleOptions
from server_ref.aggregation.robust.reduction import Reduction
from server_ref.aggregation.robust.rows import Rows

Float64Array = npt.NDArray[np.float64]

_GEOMETRIC_ITERATIONS = 50
_TOLERANCE = 1e-6
_SMOOTHING = 1e-6
"""Distances below this part of their median count as that much, so that no weight is infinite."""

_CLIPPING_ITERATIONS = 3
_MAGIC = 1.5 * 2.0**52


def geometric_median(rows: Rows, num_byzantine: int, options: RuleOptions) -> Reduction:
    """The point with the smallest sum of distances to the rows: smoothed Weiszfeld iterations from the median."""
    point = coordinate_median(rows)
    distances = _distances(rows, point)
    floor = _SMOOTHING * float(np.median(distances))
    weights = np.full(len(rows), 1 / len(rows))
    if floor == 0.0:
        # Half of the rows lie on the median: no point is closer to all.
        weights = (distances == 0.0) / np.count_nonzero(distances == 0.0)
        return Reduction(point, num_byzantine, scores=distances, weights=weights)
    limit = options.iterations or _GEOMETRIC_ITERATIONS
    # Steps are measured by the median distance: a sum of distances is what the farthest row wants it to be.
    enough = (options.tolerance or _TOLERANCE) * float(np.median(distances))
    for iteration in range(1, limit + 1):
        inverse = 1 / np.maximum(distances, floor)
        weights = inverse / math.fsum(inverse)
        distances, length = _step(rows, weights, distances, point)
        if length <= enough:
            return Reduction(point, num_byzantine, scores=distances, weights=weights, iterations=iteration)
    return Reduction(point, num_byzantine, scores=distances, weights=weights, iterations=limit, converged=False)


def centered_clipping(
    rows: Rows, num_byzantine: int, options: RuleOptions, centre: Float64Array | None = None
) -> Reduction:
    """The centre plus the mean of the differences from it, each clipped to the radius; again from there.

    Without a centre it starts from the median.
    """
    if centre is None:
        point = coordinate_median(rows)
    elif centre.shape != (rows.size,):
        raise ShapeMismatch(f"the centre is {list(centre.shape)}, the rows have {rows.size} coordinates")
    elif not np.isfinite(centre).all():
        raise NonFiniteUpdate("the centre holds NaN or infinite values")
    else:
        point = np.array(centre, np.float64)
    distances = _distances(rows, point)
    radius = float(np.median(distances)) if options.radius is None else options.radius
    if radius == 0.0:
        # Half of the rows lie on the start, and no step is allowed towards the others.
        return Reduction(point, num_byzantine, scores=distances, weights=(distances == 0.0) / len(rows))
    iterations = options.iterations or _CLIPPING_ITERATIONS
    weights = np.empty(len(rows))
    for _ in range(iterations):
        weights = radius / np.maximum(distances, radius) / len(rows)
        distances, _ = _step(rows, weights, distances, point)
    return Reduction(point, num_byzantine, scores=distances, weights=weights, iterations=iterations)


def mean_of(rows: Rows, selected: Sequence[int]) -> Float64Array:
    """The mean of some rows, float64[d]: the sum to twice float64's digits, divided. Independent of their order."""
    chosen = np.array(selected)
    coarse, fine = _grids(float(rows.peaks[chosen].max()), len(chosen))
    addresses, ones, nothing = rows.addresses[chosen], np.ones(len(chosen)), np.empty(0)
    total = np.zeros(rows.size)

    def work(part: int) -> None:
        begin, end = parts[part]
        move(addresses, rows.wide, rows.size, begin, end, ones, coarse, fine, total, total, nothing)

    parts = rows.column_parts
    run_parts(work, len(parts), elements=len(chosen) * rows.size)
    total /= len(chosen)
    return total


def squared_distances_to(rows: Rows, point: Float64Array) -> Float64Array:
    """float64[n], the squared distances of the rows to a point, float64[d]."""
    return _move(rows, np.zeros(len(rows)), 0.0, point)[:-1]


def _distances(rows: Rows, point: Float64Array) -> Float64Array:
    return np.sqrt(squared_distances_to(rows, point))


def _step(
    rows: Rows, weights: Float64Array, distances: Float64Array, point: Float64Array
) -> tuple[Float64Array, float]:
    """Move the point by the weighted differences; returns the distances to where it is then, and the step's length."""
    # No coordinate of a difference is larger than its norm (up to rounding).
    lengths = np.sqrt(_move(rows, weights, 1.001 * float(np.max(weights * distances)), point))
    return lengths[:-1], float(lengths[-1])


def _move(rows: Rows, weights: Float64Array, largest: float, point: Float64Array) -> Float64Array:
    """Move the point in place; the squared distances to where it is then, and that of the move."""
    coarse, fine = _grids(largest, len(rows))
    parts = rows.column_parts
    squares = np.zeros((len(parts), len(rows) + 1))

    def work(part: int) -> None:
        begin, end = parts[part]
        move(rows.addresses, rows.wide, rows.size, begin, end, weights, coarse, fine, point, point, squares[part])

    run_parts(work, len(parts), elements=rows.elements)
    return np.asarray(squares.sum(axis=0))


def _grids(largest: float, count: int) -> tuple[float, float]:
    """``1.5 * 2**52`` times the grids of the two bins that sum ``count`` addends of at most ``largest`` exactly.

    A bin of grid g takes addends up to ``2**51 g`` and totals up to ``2**53 g``. The first receives the addends
    rounded, the second what that left, at most half a step of the first each.
    """
    if largest == 0.0:
        return 0.0, 0.0
    room = math.frexp(max(count, 4))[1]
    first = max(math.frexp(largest)[1] + room - 51, -1074)
    second = max(first + room - 53, -1074)
    return _MAGIC * 2.0**first, _MAGIC * 2.0**second
