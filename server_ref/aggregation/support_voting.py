"""Private top-k: clients vote for coordinates, and a noised count decides which ones the next rounds share.

Which coordinates of an update are the largest says something of the data, so per-client top-k has no place under
differential privacy: neither the indices nor a sum over different supports may be shown. Instead the clients agree on
*one* support first. Each votes for its k largest coordinates; a ballot is a vector of k ones, so one client moves the
count by at most ``sqrt(k)`` in L2 norm (``sqrt(2 k)`` if neighbours replace one: 2k entries change by one). The count
gets discrete Gaussian noise of that scale, is charged to the ledger like any release, and its largest coordinates are
the support: public, so that the rounds that use it send k' values without indices, clip *after* projecting, and sum.

Over secret shares the ballots are ordinary updates on a grid of whole numbers, with a clip norm of ``sqrt(k)`` (choose
k a square, so that it is an integer); ``leading`` then takes the noised sum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression.selection import top_k
from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.errors import ConfigurationError, EmptyAggregate, ShapeMismatch, UpdateOutOfRange
from server_ref.aggregation.accounting import GaussianRelease
from server_ref.aggregation.batch import Adjacency, Float32Array

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Support:
    """Coordinates that are shared for a while; public.

    Attributes:
        indices: int64, ascending, different.
        size: Coordinates of an update.

    Raises:
        ShapeMismatch: Indices that are out of range, repeated or out of order.
    """

    indices: Int64Array
    size: int

    def __post_init__(self) -> None:
        at = self.indices
        if at.dtype != np.int64 or at.ndim != 1 or (at.size and (at[0] < 0 or at[-1] >= self.size)):
            raise ShapeMismatch(f"a support is int64 indices below {self.size}")
        if (np.diff(at) <= 0).any():
            raise ShapeMismatch("the indices of a support rise")

    @cached_property
    def sha256(self) -> str:
        """Hash (hex) that both ends compare."""
        return hashlib.sha256(self.size.to_bytes(8, "little") + self.indices.astype("<i8").tobytes()).hexdigest()

    def project(self, vector: Float32Array) -> Float32Array:
        """The values at the support, float32[kept]: what a device clips and sends.

        Raises:
            ShapeMismatch: A vector of another size.
        """
        if vector.shape != (self.size,):
            raise ShapeMismatch(f"an update has {self.size} coordinates, not {list(vector.shape)}")
        return vector[self.indices]

    def scatter(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A dense vector of the same dtype: the values at the support, 0 elsewhere.

        Raises:
            ShapeMismatch: Another number of values.
        """
        if values.shape != self.indices.shape:
            raise ShapeMismatch(f"a support of {self.indices.size} coordinates takes no {list(values.shape)} values")
        dense = np.zeros(self.size, values.dtype)
        dense[self.indices] = values
        return dense


@dataclass(frozen=True)
class SupportVoting:
    """One vote about the support of the rounds to come.

    Attributes:
        size: d, coordinates of an update.
        votes: k, coordinates for which one client may vote.
        kept: k', coordinates of the support.
        noise_multiplier: z, noise standard deviation over the count's sensitivity.
        adjacency: What neighbours are.

    Raises:
        ConfigurationError: Numbers that do not fit each other.
    """

    size: int
    votes: int
    kept: int
    noise_multiplier: float
    adjacency: Adjacency = Adjacency.ZERO_OUT

    def __post_init__(self) -> None:
        if not 1 <= self.votes <= self.size or not 1 <= self.kept <= self.size:
            raise ConfigurationError(f"{self.votes} votes a client for {self.kept} of {self.size} coordinates")
        if not 0 < self.noise_multiplier < float("inf"):
            raise ConfigurationError(f"a noise multiplier is positive and finite, got {self.noise_multiplier}")

    @property
    def squared_sensitivity(self) -> int:
        """Of the count, exactly: k, or 2k where one ballot is replaced by another."""
        return 2 * self.votes if self.adjacency is Adjacency.REPLACE_ONE else self.votes

    @property
    def variance(self) -> Fraction:
        """Of the noise on each count."""
        return Fraction(self.noise_multiplier) ** 2 * self.squared_sensitivity

    def ballot(self, update: Float32Array) -> Int64Array:
        """A client's vote: its k largest coordinates, of equal ones the lowest; int64[k], ascending.

        Raises:
            ShapeMismatch: An update of another size or dtype.
            NonFiniteUpdate: NaN or infinities.
        """
        if update.dtype != np.float32 or update.shape != (self.size,):
            raise ShapeMismatch(f"a client votes by float32[{self.size}], not by {update.dtype}{list(update.shape)}")
        return top_k(np.ascontiguousarray(update), self.votes)

    def count(self, ballots: Iterable[Int64Array]) -> Int64Array:
        """Add ballots up, int64[size]. The result is as secret as the ballots; ``elect`` noises it.

        Raises:
            UpdateOutOfRange: A ballot for more coordinates than allowed, for one twice, or for one that does not exist.
                A client with more votes would not be covered by the noise.
        """
        counts = np.zeros(self.size, np.int64)
        for ballot in ballots:
            if ballot.dtype != np.int64 or ballot.ndim != 1 or ballot.size > self.votes:
                raise UpdateOutOfRange(f"a ballot has at most {self.votes} int64 coordinates")
            if ballot.size and (ballot.min() < 0 or ballot.max() >= self.size):
                raise UpdateOutOfRange(f"a ballot names a coordinate that is not among {self.size}")
            chosen = np.unique(ballot)
            if chosen.size < ballot.size:
                raise UpdateOutOfRange("a ballot names a coordinate twice")
            counts[chosen] += 1
        return counts

    def elect(
        self,
        counts: Int64Array,
        *,
        round_id: int,
        charge: Callable[[GaussianRelease], object],
        random: Callable[[int], bytes] = os.urandom,
    ) -> Support:
        """Noise the count and take its largest coordinates.

        Args:
            counts: From ``count``.
            round_id: A round of its own in the ledger.
            charge: Pays before anything is drawn: ``LedgerKeeper.charge``.
            random: The operating system's randomness, or as good.

        Raises:
            PrivacyBudgetExhausted: Nothing is drawn then, and nothing was learned.
            ShapeMismatch: Not a count of this vote.
        """
        if counts.dtype != np.int64 or counts.shape != (self.size,):
            raise ShapeMismatch(f"a count is int64[{self.size}]")
        charge(GaussianRelease(round_id=round_id, noise_multiplier=self.noise_multiplier, adjacency=self.adjacency))
        return self.leading(counts + sample(self.size, self.variance, random))

    def leading(self, noised: npt.NDArray[Any]) -> Support:
        """The support of a count that carries noise already; of equal counts the lowest coordinates.

        Raises:
            ShapeMismatch: Not a count of this vote.
        """
        if noised.shape != (self.size,):
            raise ShapeMismatch(f"a count has {self.size} coordinates, not {list(noised.shape)}")
        order = np.argsort(-noised, kind="stable")[: self.kept]
        return Support(np.sort(order).astype(np.int64), self.size)

    @classmethod
    def square(cls, size: int, *, share: float, noise_multiplier: float, adjacency: Adjacency) -> Self:
        """A vote about a share of the coordinates, with k and k' the nearest square number: fit for secret ballots.

        Raises:
            ConfigurationError: A share that leaves nothing, or more than there is.
            EmptyAggregate: No coordinates.
        """
        if not size:
            raise EmptyAggregate("there is nothing to vote about")
        root = max(1, round((share * size) ** 0.5)) if 0 < share <= 1 else 0
        votes = min(root, int(size**0.5)) ** 2
        return cls(size, votes, votes, noise_multiplier, adjacency)
