"""What can stand in front of any rule: means of random buckets, and means of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.accumulator import addresses_of
from server_ref.aggregation.blocks import run_parts
from server_ref.aggregation.robust.distances import squared_distances
from server_ref.aggregation.robust.kernels import write_means
from server_ref.aggregation.robust.options import RuleOptions
from server_ref.aggregation.robust.rows import AnyRows, Rows

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Mixed:
    """Means of rows.

    Attributes:
        rows: [means, d], of the dtype of the rows they are made of.
        members: The rows of each mean.
        own: int64[n], the mean that stands for each row.
    """

    rows: npt.NDArray[np.float32] | Float64Array
    members: tuple[tuple[int, ...], ...]
    own: npt.NDArray[np.int64]

    def spread(self, weights: Float64Array) -> Float64Array:
        """What weights of the means are as weights of the rows, float64[n]."""
        found = np.zeros(len(self.own))
        for weight, members in zip(weights.tolist(), self.members, strict=True):
            found[list(members)] += weight / len(members)
        return found


def bucketing(rows: AnyRows, size: int, seed: int) -> Mixed:
    """Put the rows into random buckets and average each: what is left varies less, by the square root of the size.

    A dishonest row spoils its whole bucket: f of n become f of ``ceil(n / size)``, and the rule must stand that.

    Shapes and dtypes: (n, d) or n vectors; float32 gives float32, added in float64 and rounded once.
    Guarantees: each row is in one bucket; all have ``size`` rows but for the last. The same seed puts the same
    positions together.

    Args:
        rows: n rows.
        size: Rows in a bucket.
        seed: Of the permutation; drawn after the rows were submitted.

    Returns:
        ``ceil(n / size)`` means.

    Raises:
        ConfigurationError: A size below 1.
        EmptyAggregate, ShapeMismatch, NonFiniteUpdate, UpdateOutOfRange: As for the rules.

    Source: S. P. Karimireddy, L. He, M. Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    ICLR 2022.
    """
    if size < 1:
        raise ConfigurationError(f"buckets of {size} rows")
    return mix_into_buckets(Rows.of(rows), size, seed)


def mix_into_buckets(rows: Rows, size: int, seed: int | None) -> Mixed:
    """``bucketing`` of rows that are checked already."""
    order = np.random.default_rng(seed).permutation(len(rows))
    own = np.empty(len(rows), np.int64)
    own[order] = np.arange(len(rows)) // size
    members = [order[start : start + size].tolist() for start in range(0, len(rows), size)]
    return _means(rows, members, own)


def nearest_neighbor_mixing(rows: AnyRows, num_byzantine: int) -> Mixed:
    """Replace each row by the mean of the n - f rows that are nearest to it, itself included; ties to the first.

    Shapes and dtypes: as ``bucketing``; n means, so this is the one rule that writes a second matrix.
    Guarantees: with fewer than half of the rows dishonest, any rule after it loses no more than a constant factor
    against the best possible one under heterogeneous honest rows.

    Args:
        rows: n rows.
        num_byzantine: f, below n.

    Returns:
        n means, in the order of the rows.

    Raises:
        ConfigurationError: f out of range.
        EmptyAggregate, ShapeMismatch, NonFiniteUpdate, UpdateOutOfRange: As for the rules.

    Source: Y. Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.
    """
    return mix_with_nearest(Rows.of(rows), num_byzantine, RuleOptions())


def mix_with_nearest(rows: Rows, num_byzantine: int, options: RuleOptions) -> Mixed:
    """``nearest_neighbor_mixing`` of rows that are checked already, with distances in a mode of the options."""
    n = len(rows)
    if not 0 <= num_byzantine < n:
        raise ConfigurationError(f"nearest neighbours among {n} rows, {num_byzantine} of them dishonest")
    distances = squared_distances(rows, options)
    # A row is its own nearest neighbour, also where others equal it.
    np.fill_diagonal(distances, -1.0)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : n - num_byzantine]
    return _means(rows, nearest.tolist(), np.arange(n))


def _means(rows: Rows, members: Sequence[Sequence[int]], own: npt.NDArray[np.int64]) -> Mixed:
    out = np.empty((len(members), rows.size), np.float64 if rows.wide else np.float32)
    targets = addresses_of(list(out))
    flat = np.array([i for group in members for i in group], np.int32)
    starts = np.cumsum([0, *map(len, members)])
    parts = rows.column_parts

    def work(part: int) -> None:
        begin, end = parts[part]
        write_means(rows.addresses, rows.wide, rows.size, begin, end, flat, starts, targets)

    run_parts(work, len(parts), elements=rows.elements)
    return Mixed(out, tuple(map(tuple, members)), own)
