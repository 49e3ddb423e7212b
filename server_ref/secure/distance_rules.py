"""When secret updates may be compared at all, and what that gives away. Loads no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from client_sdk.protocol.field import Field
from client_sdk.protocol.privacy import EncodedBounds

DISTANCE_LEAKAGE: Final = (
    "Distances between secret updates are opened to the coordinator: the squared L2 distance of every pair of updates "
    "of a round, hence the geometry of the cohort up to rotation and shift, and which updates were selected. Whoever "
    "knows some of the updates (its own devices') learns one inner product with every other update from each. Each "
    "update is compared within one cohort, once. Nothing else is opened, and t - 1 aggregators learn nothing beyond "
    "it. No differential privacy is claimed against whoever sees the distances."
)
"""What a configuration that chooses distances accepts, and what the audit log repeats."""


@dataclass(frozen=True)
class DistanceSettings:
    """What comparing secret updates depends on.

    Attributes:
        num_aggregators: n.
        threshold: t.
        field: Of the shares.
        bounds: The grid, and the norm that updates are clipped to.
        packing: Coordinates in an element of a share.
        range_checked: Whether every compared update was shown not to wrap around the field (the mode ``projections``).
        private: Whether the task claims differential privacy.

    Raises:
        ConfigurationError: One of the conditions fails; the message says which, and what to change.
        BudgetExceeded: A distance could wrap around the field.
    """

    num_aggregators: int
    threshold: int
    field: Field
    bounds: EncodedBounds
    packing: int = 1
    range_checked: bool = False
    private: bool = False

    def __post_init__(self) -> None:
        if self.private:
            raise ConfigurationError(
                "opened distances depend on single updates and carry no noise, so they void the privacy claim; use the "
                "mode buckets (a robust rule on noised sums), or drop the claim"
            )
        if self.packing != 1:
            raise ConfigurationError(
                f"on packed shares a distance has degree {self.degree}, and {self.needed} aggregators would have to "
                "answer; set packing to 1"
            )
        if self.num_aggregators < self.needed:
            raise ConfigurationError(
                f"distances of shares with a threshold of {self.threshold} need {self.needed} aggregators, all of them "
                f"answering, and there are {self.num_aggregators}; add some or lower the threshold"
            )
        if not self.range_checked:
            raise ConfigurationError(
                "nothing shows that an update is as short as it claims: one that wraps around the field can be near to "
                "all others in distance and anywhere in the sum; choose the checking mode projections"
            )
        if self.largest >= self.field.modulus:
            raise BudgetExceeded(
                f"squared distances up to {self.largest} do not fit {self.field.name}: 2(f + log2 C + 1) must stay "
                f"below {self.field.bits}, and f = {self.bounds.fraction_bits}, C = {self.bounds.clip_norm:g}; use "
                f"fraction_bits <= {self.most_fraction_bits}, or the field m127"
            )

    @property
    def degree(self) -> int:
        """Of the polynomial whose constant is a distance."""
        return 2 * (self.threshold + self.packing - 2)

    @property
    def needed(self) -> int:
        """Aggregators that must answer: 2t - 1."""
        return self.degree + 1

    @property
    def largest(self) -> int:
        """Largest squared distance of two updates: ``(2B)^2``."""
        return 4 * self.bounds.norm_bound**2

    @property
    def most_fraction_bits(self) -> int:
        """The finest grid on which distances fit; -1 if none does."""
        room = math.isqrt((self.field.modulus - 1) // 4)
        return max((f for f in range(41) if math.floor(self.bounds.clip_norm * 2.0**f) <= room), default=-1)
