"""Squared distances between rows: all of them exactly, all of them from sketches, or to a sample of peers.

**CountSketch** (Charikar, Chen, Farach-Colton 2002). A row's k-sketch is linear, so the distance of two sketches
estimates the distance of the rows: without bias, with a relative variance of the squared distance of at most 2/k (2.2 %
standard deviation at k = 4096). Columns are taken k at a time; each stretch is turned by a random shift and added with
random signs. Two columns of one stretch never collide and two others do with probability 1/k, which is what the
variance needs; a stretch is added in one pass without an index for each column.

**Sampled peers.** The rows are put in a ring in random order; a row's r peers are its r/2 neighbours on either side,
which is a uniformly random r-subset of the others. Each distance serves both ends, so n r / 2 are computed.

Both are drawn from a seed. An attacker who knows it can hide a difference from the sketch, or choose whom to be near:
draw it after the updates were submitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from server_ref.aggregation.accumulator import addresses_of
from server_ref.aggregation.blocks import run_parts
from server_ref.aggregation.robust.kernels import write_sketches
from server_ref.aggregation.robust.options import DistanceMode, RuleOptions
from server_ref.aggregation.robust.rows import Rows
from server_ref.aggregation.robust.tiles import NARROW_LANES, TILE, add_narrow_tiles, add_wide_tiles

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]

_TASKS = 8
_PARTIAL_BYTES = 2**24
"""All partial sums together; a slice of columns that is summed on its own needs one set of them."""

_PACKED_BYTES = 2**20
"""Values that a thread holds interleaved: the second cache level."""

_MOST_COLUMNS = 256
"""Columns in a block: the longest sum in float32 has 32 addends."""

_LEAST_NARROW, _MOST_NARROW = 2.0**-100, 2.0**120
"""Between these float32 neither overflows nor loses a square that matters."""

_BAND = 16
"""Groups of rows that are kept in the cache while all others stream past them."""


def squared_distances(rows: Rows, options: RuleOptions) -> Float64Array:
    """All squared distances, in one of the modes that compute all of them.

    Args:
        rows: n rows.
        options: ``mode``, ``sketch_size`` and ``seed`` count here.

    Returns:
        float64[n, n], symmetric, 0 on the diagonal. Mode exact: each within ``2**-18`` of itself (in practice 1e-7) for
        float32 rows, within 1e-12 for float64 rows of up to 1e6 columns, and bits that do not depend on where in the
        matrix the pair is, nor on the other rows' values.
    """
    if options.mode is DistanceMode.SKETCH:
        sketches = _sketches(rows, options)
        vectors = list(sketches)
        return _all_pairs(addresses_of(vectors), wide=True, size=sketches.shape[1])
    return _all_pairs(rows.addresses, wide=rows.wide, size=rows.size)


def distances_to_peers(rows: Rows, options: RuleOptions) -> Float64Array:
    """Squared distances of each row to ``options.peers`` random others.

    Args:
        rows: n rows.
        options: ``peers`` (rounded up to even) and ``seed`` count here.

    Returns:
        float64[n, r]; r = n - 1 if there are no more others than peers.
    """
    n = len(rows)
    half = (options.peers + 1) // 2
    if 2 * half >= n - 1:
        everything = _all_pairs(rows.addresses, wide=rows.wide, size=rows.size)
        return everything[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    ring = np.random.default_rng(options.seed).permutation(n)
    here = np.arange(n)[:, None]
    there = (here + np.arange(1, half + 1)) % n
    lower, upper = np.minimum(here, there), np.maximum(here, there)
    groups = -(-n // TILE)
    keys, tile_of = np.unique(lower // TILE * groups + upper // TILE, return_inverse=True)
    tiles = np.stack(np.divmod(keys, groups), axis=1).astype(np.int32)
    sums = _sums_of_tiles(rows.addresses[ring], tiles, wide=rows.wide, size=rows.size)
    forward = sums[tile_of.reshape(n, half), lower % TILE * TILE + upper % TILE]
    backward = forward[(here - np.arange(1, half + 1)) % n, np.arange(half)]
    found = np.empty((n, 2 * half))
    found[ring, :half] = forward
    found[ring, half:] = backward
    return found


def _all_pairs(addresses: npt.NDArray[np.uint64], *, wide: bool, size: int) -> Float64Array:
    n = len(addresses)
    groups = -(-n // TILE)
    # A band of groups against every group from it on: the band stays in the cache.
    tiles = np.array(
        [
            (g, h)
            for band in range(0, groups, _BAND)
            for h in range(band, groups)
            for g in range(band, min(band + _BAND, h + 1))
        ],
        np.int32,
    )
    sums = _sums_of_tiles(addresses, tiles, wide=wide, size=size).reshape(-1, TILE, TILE)
    found = np.empty((groups, TILE, groups, TILE))
    found[tiles[:, 0], :, tiles[:, 1], :] = sums
    found[tiles[:, 1], :, tiles[:, 0], :] = sums.transpose(0, 2, 1)
    return np.ascontiguousarray(found.reshape(groups * TILE, groups * TILE)[:n, :n])


def _sums_of_tiles(addresses: npt.NDArray[np.uint64], tiles: Int32Array, *, wide: bool, size: int) -> Float64Array:
    """Squared distances of the pairs of rows in some tiles, float64[tiles, TILE * TILE]."""
    if wide:
        return _summed(addresses, tiles, wide=True, narrow=False, size=size)
    sums = _summed(addresses, tiles, wide=False, narrow=True, size=size)
    # Also where rows are equal: their 0 may be a sum of squares that were too small.
    doubtful = ~((sums >= _LEAST_NARROW) & (sums <= _MOST_NARROW)) & _of_two_rows(tiles, len(addresses))
    again = np.flatnonzero(doubtful.any(axis=1))
    if again.size:
        exact = _summed(addresses, tiles[again], wide=False, narrow=False, size=size)
        sums[again] = np.where(doubtful[again], exact, sums[again])
    return sums


def _of_two_rows(tiles: Int32Array, n: int) -> npt.NDArray[np.bool_]:
    """Which entries of the tiles stand for two different rows, bool[tiles, TILE * TILE]."""
    within = np.arange(TILE)
    i = (tiles[:, :1] * TILE + within)[:, :, None]
    j = (tiles[:, 1:] * TILE + within)[:, None, :]
    return np.asarray((i < n) & (j < n) & (i != j)).reshape(len(tiles), TILE * TILE)


def _summed(
    addresses: npt.NDArray[np.uint64], tiles: Int32Array, *, wide: bool, narrow: bool, size: int
) -> Float64Array:
    """``_sums_of_tiles`` in one precision: float32 within blocks of columns (narrow), or float64."""
    n = len(addresses)
    kernel, item = (add_narrow_tiles, 4) if narrow else (add_wide_tiles, 8)
    columns = min(max(_PACKED_BYTES // (n * item) // NARROW_LANES * NARROW_LANES, 64), _MOST_COLUMNS)
    # Few rows: threads take slices of columns, each with sums of its own. Many: they take ranges of tiles, because
    # partial sums would be large and widening a row is little beside comparing it with all others.
    slices = min(max(_PARTIAL_BYTES // (8 * TILE * TILE * len(tiles)), 1), _TASKS)
    ranges = -(-_TASKS // slices)
    cuts = _cuts(size, slices, multiple_of=columns)
    shares = _cuts(len(tiles), ranges)
    partial = np.zeros((slices, len(tiles), TILE * TILE))

    def work(task: int) -> None:
        s, t = divmod(task, ranges)
        begin, end = shares[t], shares[t + 1]
        kernel(addresses, wide, size, cuts[s], cuts[s + 1], columns, tiles[begin:end], partial[s, begin:end])

    run_parts(work, slices * ranges, elements=len(tiles) * TILE * size)
    total: Float64Array = partial[0]
    for more in partial[1:]:
        total += more
    return total


def _cuts(length: int, parts: int, *, multiple_of: int = 1) -> Sequence[int]:
    """``parts + 1`` ascending borders from 0 to ``length``, at multiples of a number."""
    units = -(-length // multiple_of)
    return [min(part * units // parts * multiple_of, length) for part in range(parts + 1)]


def _sketches(rows: Rows, options: RuleOptions) -> Float64Array:
    k = options.sketch_size
    rng = np.random.default_rng(options.seed)
    shifts: IntArray = rng.integers(0, k, -(-rows.size // k))
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-rows.size // 8)), np.uint8))[: rows.size]
    signs = bits.view(np.int8) * np.int8(2) - np.int8(1)
    sketches = np.empty((len(rows), k))
    parts = min(64, len(rows))

    def work(part: int) -> None:
        begin, end = part * len(rows) // parts, (part + 1) * len(rows) // parts
        write_sketches(rows.addresses, rows.wide, rows.size, begin, end, signs, shifts, sketches)

    run_parts(work, parts, elements=rows.elements)
    return sketches
