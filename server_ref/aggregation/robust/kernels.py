"""The compiled inner loops of the robust rules, but for pairwise distances (``tiles``).

Rows come as addresses of separate float32 or float64 buffers (``wide``), are read in blocks of columns that stay in the
cache, and are widened to float64 there: no rule holds a second matrix, and each kernel has one signature.

**Sums that do not depend on the order of rows.** ``move`` rounds every addend to two grids of powers of two, as the
exact accumulators do: the additions are then exact, so that any permutation of the rows gives the same bits.

``fastmath`` stays off, but for ``_squared_distance``, whose sum may be regrouped by the optimiser into vectors: the
same way for every row. The kernels release the GIL and start no thread; what they compute for a column (or for the
slice of columns that they are given) does not depend on who else computes what. Signatures are explicit, so importing
this module compiles them; the machine code is cached.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.np.numpy_support import carray

from server_ref.aggregation.kernels import pointer_to

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

BLOCK = 256
"""Columns at a time: 100 rows of them take 100 KiB as keys, a thousand 1 MiB."""

MEAN_BLOCK = 64
"""Columns at a time where every row is read many times: a thousand widened rows take 512 KiB."""

_float32_at = pointer_to(types.float32)
_float64_at = pointer_to(types.float64)

_WITHOUT_SIGN = np.int64(0x7FFFFFFFFFFFFFFF)
_WITHOUT_SIGN_32 = np.int32(0x7FFFFFFF)


@njit(nogil=True)
def load(address: np.uint64, wide: bool, size: int, start: int, out: Float64Array) -> None:
    """Write columns ``start <= c < start + out.size`` of the row of ``size`` elements at ``address`` as float64."""
    if wide:
        x = carray(_float64_at(address), (size,))[start : start + out.size]
        for j in range(out.size):
            out[j] = x[j]
    else:
        y = carray(_float32_at(address), (size,))[start : start + out.size]
        for j in range(out.size):
            out[j] = np.float64(y[j])


@njit("void(uint64[::1], boolean, int64, int64, int64, float64[::1])", cache=True, nogil=True)
def largest_magnitudes(  # noqa: PLR0917 - as above
    addresses: UInt64Array,
    wide: bool,
    size: int,
    first: int,
    last: int,
    peaks: Float64Array,
) -> None:
    """Write the largest magnitude in each of the rows ``first <= i < last``; NaN or infinity if there is one."""
    values = np.empty(BLOCK)
    for i in range(first, last):
        # Bits of a magnitude are ordered like it, infinity and every NaN above all finite values.
        top = np.int64(0)
        for start in range(0, size, BLOCK):
            part = values[: min(BLOCK, size - start)]
            load(addresses[i], wide, size, start, part)
            bits = part.view(np.int64)
            for j in range(bits.size):
                top = max(top, bits[j] & _WITHOUT_SIGN)
        peaks[i] = np.int64(top).view(np.float64)


# --- order statistics -------------------------------------------------------------------------------------------


@njit(nogil=True)
def _mirrored(bits: np.int32) -> np.int32:
    """From a float32's bits to an integer of the same order (-0.0 below 0.0), and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _WITHOUT_SIGN_32))


@njit(nogil=True)
def _mean_of_nearest(ordered: Float64Array, nearest: int, out: Float64Array) -> None:
    """Per column, the mean of the ``nearest`` of the ascending values that are closest to their median.

    They are neighbours in the order. Of two equally close ones the smaller is taken. They are added in ascending order.
    """
    k, columns = ordered.shape
    out[:] = 0.0
    if nearest == k:
        for i in range(k):
            for c in range(columns):
                out[c] += ordered[i, c]
    else:
        begin = np.zeros(columns, np.int64)
        low, high = ordered[(k - 1) // 2], ordered[k // 2]
        for s in range(k - nearest):
            # The condition holds for the first values of s and then never again, so counting finds where it ends.
            for c in range(columns):
                middle = (low[c] + high[c]) / 2
                begin[c] += ordered[s + nearest, c] - middle < middle - ordered[s, c]
        for i in range(k):
            for c in range(columns):
                if begin[c] <= i < begin[c] + nearest:
                    out[c] += ordered[i, c]
    for c in range(columns):
        out[c] /= nearest


@njit("void(float64[:, ::1], int64, float64[::1])", cache=True, nogil=True)
def mean_of_nearest(ordered: Float64Array, nearest: int, out: Float64Array) -> None:
    """As ``mean_by_network``, of values that are sorted already: float64[k, columns], all of them wanted."""
    _mean_of_nearest(ordered, nearest, out)


@njit(
    "void(uint64[::1], int64, int64, int64, int32[:, ::1], int64, int64, int64, float64[::1])", cache=True, nogil=True
)
def mean_by_network(  # noqa: PLR0917 - as above
    addresses: UInt64Array,
    size: int,
    first: int,
    last: int,
    comparators: Int32Array,
    low: int,
    high: int,
    nearest: int,
    out: Float64Array,
) -> None:
    """Write, for the columns ``first <= c < last``, a mean of order statistics.

    Args:
        addresses: Where each row (float32[size]) begins.
        size: Columns in all.
        first: First column.
        last: One past the last column.
        comparators: A network that brings the order statistics ``low <= i < high`` of n values into place.
        low: First order statistic that is wanted.
        high: One past the last.
        nearest: How many of them count: those that are nearest to their median.
        out: float64[size].
    """
    n = addresses.size
    keys = np.empty((n, BLOCK), np.int32)
    ordered = np.empty((high - low, BLOCK))
    for start in range(first, last, BLOCK):
        width = min(BLOCK, last - start)
        for i in range(n):
            x = carray(_float32_at(addresses[i]), (size,))[start : start + width]
            row = keys[i]
            for c in range(width):
                row[c] = _mirrored(np.float32(x[c]).view(np.int32))
            for c in range(width, BLOCK):
                row[c] = np.int32(0)
        for t in range(comparators.shape[0]):
            a = keys[comparators[t, 0]]
            b = keys[comparators[t, 1]]
            for c in range(BLOCK):
                u, v = a[c], b[c]
                a[c] = min(u, v)
                b[c] = max(u, v)
        for i in range(low, high):
            row = keys[i]
            for c in range(BLOCK):
                ordered[i - low, c] = np.float64(np.int32(_mirrored(row[c])).view(np.float32))
        mean = np.empty(BLOCK)
        _mean_of_nearest(ordered, nearest, mean)
        out[start : start + width] = mean[:width]


# --- weighted sums, and distances to one point --------------------------------------------------------------------


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _squared_distance(x: Float64Array, y: Float64Array) -> float:
    total = 0.0
    for j in range(x.size):
        difference = x[j] - y[j]
        total += difference * difference
    return total


@njit(
    "void(uint64[::1], boolean, int64, int64, int64, float64[::1], float64, float64, float64[::1], float64[::1], "
    "float64[::1])",
    cache=True,
    nogil=True,
)
def move(  # noqa: PLR0917 - as above
    addresses: UInt64Array,
    wide: bool,
    size: int,
    first: int,
    last: int,
    weights: Float64Array,
    coarse: float,
    fine: float,
    point: Float64Array,
    moved: Float64Array,
    squares: Float64Array,
) -> None:
    """Write ``moved = point + sum_i weights[i] (row_i - point)``, ``||row_i - moved||^2`` and ``||moved - point||^2``.

    Only the columns ``first <= c < last`` are looked at and written; the squares of several slices add up.

    Args:
        addresses: Where each row begins.
        wide: Whether the rows are float64; float32 otherwise.
        size: Columns in all.
        first: First column.
        last: One past the last column.
        weights: One a row; rows of weight 0 are not read for the sum.
        coarse: ``1.5 * 2**52`` times the grid of the first bin; the grids come from ``centres.grids``.
        fine: Likewise of the second bin.
        point: float64[size].
        moved: Output, float64[size]; may be ``point`` itself.
        squares: Output, float64[rows + 1], that of the move last; or of length 0 if it is not wanted.
    """
    row = np.empty(BLOCK)
    head = np.empty(BLOCK)
    tail = np.empty(BLOCK)
    squares[:] = 0.0
    for start in range(first, last, BLOCK):
        width = min(BLOCK, last - start)
        here = row[:width]
        at = point[start : start + width]
        to = moved[start : start + width]
        head[:] = 0.0
        tail[:] = 0.0
        for i in range(addresses.size):
            weight = weights[i]
            if weight == 0.0:
                continue
            load(addresses[i], wide, size, start, here)
            for c in range(width):
                addend = weight * (here[c] - at[c])
                part = (addend + coarse) - coarse
                head[c] += part
                tail[c] += ((addend - part) + fine) - fine
        for c in range(width):
            head[c] += tail[c]
            tail[c] = 0.0
            to[c] = at[c] + head[c]
        if squares.size:
            squares[addresses.size] += _squared_distance(head[:width], tail[:width])
            for i in range(addresses.size):
                load(addresses[i], wide, size, start, here)
                squares[i] += _squared_distance(here, to)


# --- mixing, sketching --------------------------------------------------------------------------------------------


@njit(nogil=True)
def _mean_of(rows: Float64Array, members: Int32Array, mean: Float64Array) -> None:
    """The mean of some rows, added one after the other."""
    mean[:] = 0.0
    fours = members.size // 4 * 4
    for t in range(0, fours, 4):
        # Four in one pass: the sum is loaded and stored a quarter as often.
        w, x = rows[members[t]], rows[members[t + 1]]
        y, z = rows[members[t + 2]], rows[members[t + 3]]
        for c in range(MEAN_BLOCK):
            mean[c] = (((mean[c] + w[c]) + x[c]) + y[c]) + z[c]
    for t in range(fours, members.size):
        w = rows[members[t]]
        for c in range(MEAN_BLOCK):
            mean[c] += w[c]
    mean /= members.size


@njit("void(uint64[::1], boolean, int64, int64, int64, int32[::1], int64[::1], uint64[::1])", cache=True, nogil=True)
def write_means(  # noqa: PLR0917 - as above
    addresses: UInt64Array,
    wide: bool,
    size: int,
    first: int,
    last: int,
    members: Int32Array,
    starts: Int64Array,
    targets: UInt64Array,
) -> None:
    """Write means of rows into other rows of their dtype, for the columns ``first <= c < last``.

    Args:
        addresses: Where each row begins.
        wide: Whether all rows are float64; float32 otherwise.
        size: Columns in all.
        first: First column.
        last: One past the last column.
        members: The rows of one mean after the other, added in this order in float64.
        starts: int64[means + 1], where each mean's rows begin in ``members``.
        targets: Where each mean is written.
    """
    n = addresses.size
    rows = np.zeros((n, MEAN_BLOCK))
    mean = np.empty(MEAN_BLOCK)
    for start in range(first, last, MEAN_BLOCK):
        width = min(MEAN_BLOCK, last - start)
        for i in range(n):
            load(addresses[i], wide, size, start, rows[i, :width])
        for k in range(targets.size):
            _mean_of(rows, members[starts[k] : starts[k + 1]], mean)
            if wide:
                y = carray(_float64_at(targets[k]), (size,))[start : start + width]
                for c in range(width):
                    y[c] = mean[c]
            else:
                x = carray(_float32_at(targets[k]), (size,))[start : start + width]
                for c in range(width):
                    x[c] = np.float32(mean[c])


@njit("void(uint64[::1], boolean, int64, int64, int64, int8[::1], int64[::1], float64[:, ::1])", cache=True, nogil=True)
def write_sketches(  # noqa: PLR0917 - as above
    addresses: UInt64Array,
    wide: bool,
    size: int,
    first: int,
    last: int,
    signs: npt.NDArray[np.int8],
    shifts: Int64Array,
    sketches: Float64Array,
) -> None:
    """Write the CountSketches of the rows ``first <= i < last``; see ``distances``.

    Args:
        addresses: Where each row begins.
        wide: Whether the rows are float64; float32 otherwise.
        size: Columns in all.
        first: First row.
        last: One past the last row.
        signs: int8[size], 1 or -1.
        shifts: Where each stretch of k columns begins in the sketch; k = columns of ``sketches``.
        sketches: float64[rows, k].
    """
    k = sketches.shape[1]
    values = np.empty(k)
    for i in range(first, last):
        sketch = sketches[i]
        sketch[:] = 0.0
        for block in range(shifts.size):
            start = block * k
            width = min(k, size - start)
            load(addresses[i], wide, size, start, values[:width])
            sign = signs[start : start + width]
            turn = min(width, k - shifts[block])
            onto = sketch[shifts[block] :]
            for c in range(turn):
                onto[c] += values[c] * sign[c]
            for c in range(turn, width):
                sketch[c - turn] += values[c] * sign[c]


# --- Bulyan -------------------------------------------------------------------------------------------------------


@njit("void(int32[:, ::1], float64[:, ::1], int64, int32[::1])", cache=True, nogil=True)
def select_one_by_one(order: Int32Array, distances: Float64Array, num_byzantine: int, selected: Int32Array) -> None:
    """Krum again and again on the rows that are left.

    Args:
        order: int32[n, n - 1], the other rows from the nearest to the farthest.
        distances: float64[n, n - 1], their squared distances.
        num_byzantine: f; a row among n' is scored by its n' - f - 2 nearest (at least one, if there is one).
        selected: Output; its length is the number of rows to select.
    """
    n = order.shape[0]
    left = np.ones(n, np.bool_)
    for s in range(selected.size):
        others = n - s - 1
        count = min(max(others - num_byzantine - 1, 1), others)
        best = -1
        least = np.inf
        for i in range(n):
            if not left[i]:
                continue
            total = 0.0
            seen = 0
            r = 0
            while seen < count:
                if left[order[i, r]]:
                    total += distances[i, r]
                    seen += 1
                r += 1
            if best < 0 or total < least:
                best = i
                least = total
        left[best] = False
        selected[s] = best
