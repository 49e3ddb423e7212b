"""The ``reduce`` slot where the sum is made elsewhere: from shares that no single server can open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, EmptyAggregate, ShapeMismatch
from client_sdk.protocol.privacy import EncodedBounds
from server_ref.aggregation.batch import (
    Adjacency,
    Aggregate,
    Facts,
    Int64Array,
    IntegerSum,
    PrivateAggregate,
    Visibility,
)
from server_ref.aggregation.errors import IndividualUpdatesNeeded, NoiseUnexpected, UnboundedRange
from server_ref.aggregation.reduce import derive_mean, sensitivity_of_mean
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Fold, Reduce


@dataclass(frozen=True)
class SharedSum:
    """The weighted mean of updates that were summed elsewhere, from shares: this server sees their sum only.

    Attributes:
        bounds: Grid and clip norm of the updates, which the devices enforce.
    """

    bounds: EncodedBounds

    @property
    def slot(self) -> Slot:
        """``reduce``."""
        return Slot.REDUCE

    @property
    def title(self) -> str:
        """Where the sum comes from."""
        return f"weighted mean of a sum from shares (int64 grid, {self.bounds.fraction_bits} fraction bits)"

    def derive(self, facts: Facts) -> Facts:
        """Needs bounds for what it cannot see: the norm and the weight of an update.

        Raises:
            NoiseUnexpected: Single updates are visible, and so need no sum from elsewhere.
            UnboundedRange: No ``norm_bound`` is declared.
            UnboundedWeight: No ``max_weight`` is declared.
            ConfigurationError: The grid is for another clip norm than the declared one.
        """
        if facts.visibility is not Visibility.SUM:
            raise NoiseUnexpected("single updates are visible here; fold them (the exact mean) instead of a sum")
        if facts.norm_bound is None:
            raise UnboundedRange("a sum from shares needs the norm that the devices enforce; declare norm_bound")
        if self.bounds.clip_norm != facts.norm_bound:
            raise ConfigurationError(
                f"the task's grid is for updates clipped to {self.bounds.clip_norm:g}, and norm_bound is "
                f"{facts.norm_bound:g}; declare one clip norm"
            )
        return derive_mean(facts, renormalised=False)

    def start(self, facts: Facts) -> Fold:  # noqa: ARG002 - the slot's signature
        """There is nothing to fold.

        Raises:
            IndividualUpdatesNeeded: Always.
        """
        raise IndividualUpdatesNeeded("the updates are summed elsewhere; there is nothing to add up here")

    def aggregate(
        self,
        codes: Int64Array,
        facts: Facts,
        *,
        count: int,
        total_weight: int,
        noise: tuple[float, Adjacency] | None = None,
        indicator: int | None = None,
        measurements: Mapping[str, Any] | None = None,
    ) -> Aggregate:
        """The aggregate that an opened sum makes; it goes into ``Pipeline.release``.

        Args:
            codes: int64[size], the opened sum, extra coordinates cut off.
            facts: Those of admitted updates (``Pipeline.admitted``).
            count: Updates in the sum.
            total_weight: Their public weights' sum, staleness scales not included.
            noise: Standard deviation of the noise on every code, in steps of the grid, and what it was calibrated for;
                None if the sum carries none.
            indicator: The opened indicator coordinate, noised as the sum is.
            measurements: What the aggregators and the coordinator saw.

        Raises:
            EmptyAggregate: No updates, and no constant denominator.
            ShapeMismatch: Codes of another size or dtype.
        """
        if codes.dtype != np.int64 or codes.shape != (facts.size,):
            raise ShapeMismatch(f"the sum is int64[{facts.size}], not {codes.dtype}{list(codes.shape)}")
        denominator = (facts.constant_denominator or total_weight) * facts.max_scale
        if not denominator:
            raise EmptyAggregate("an aggregate of no updates")
        integers = IntegerSum(
            codes=codes,
            fraction_bits=self.bounds.fraction_bits,
            denominator=denominator,
            reach=self.bounds.norm_bound * (facts.max_weight or 1) * facts.max_scale,
        )
        found = Aggregate(
            values=integers.decoded(),
            kind=facts.kind,
            count=count,
            total_weight=total_weight,
            sensitivity=sensitivity_of_mean(facts, denominator),
            measurements=measurements or MappingProxyType({}),
            integers=integers,
            indicator=indicator,
        )
        if noise is None:
            return found
        stddev, adjacency = noise
        return PrivateAggregate(
            **{f.name: getattr(found, f.name) for f in fields(Aggregate)},
            noise_stddev=stddev / math.ldexp(denominator, self.bounds.fraction_bits),
            adjacency=adjacency,
        )


if TYPE_CHECKING:
    _reduces: type[Reduce] = SharedSum
