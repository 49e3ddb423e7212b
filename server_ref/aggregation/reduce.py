"""The ``reduce`` slot for means: exact by default, order-dependent baselines on request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, EmptyAggregate
from client_sdk.protocol.fixed_point import FixedPointGrid
from client_sdk.protocol.privacy import EncodedBounds, choose_private_grid, encode_clipped
from server_ref.aggregation.batch import (
    Adjacency,
    Aggregate,
    Facts,
    Float64Array,
    IntegerSum,
    Update,
    Visibility,
)
from server_ref.aggregation.errors import (
    IndividualUpdatesNeeded,
    UnboundedRange,
    UnboundedWeight,
)
from server_ref.aggregation.exact import AccumulatorPlan, ExactAccumulator
from server_ref.aggregation.fixed import Int64Accumulator
from server_ref.aggregation.stages import Slot
from server_ref.aggregation.summation import Summation, weighted_sum

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Fold, Reduce


class HeldUpdates:
    """A fold that keeps its updates: for whatever has to see all of them at once. Memory O(updates x size)."""

    def __init__(self) -> None:
        self._held: dict[int, Update] = {}

    @property
    def count(self) -> int:
        """Updates held."""
        return len(self._held)

    def add(self, updates: Sequence[Update]) -> None:
        """Hold them; see ``stages.Fold``."""
        numbers = [u.number for u in updates]
        if len(set(numbers)) < len(numbers) or not self._held.keys().isdisjoint(numbers):
            raise ConfigurationError("an update is in the fold already: numbers must differ")
        self._held.update(zip(numbers, updates, strict=True))

    def discard(self, updates: Sequence[Update]) -> None:
        """Let go of them, of all or of none; see ``stages.Fold``."""
        numbers = [u.number for u in updates]
        strangers = sorted(set(numbers) - self._held.keys())
        if strangers or len(set(numbers)) < len(numbers):
            raise ConfigurationError(f"updates to discard must be in the fold, once each; not in it: {strangers}")
        for number in numbers:
            del self._held[number]

    def ordered(self) -> list[Update]:
        """In order of their numbers, so that the order of arrival changes no bit."""
        if not self._held:
            raise EmptyAggregate("an aggregate of no updates")
        return [self._held[n] for n in sorted(self._held)]


_NOTHING = np.empty(0, np.float32)
"""In place of a vector that was folded: the sum's memory does not grow with the number of updates."""


def measurements_of(members: Sequence[Update]) -> dict[str, Any]:
    """What a round's record says of its updates: ages, norms before clipping, how many were clipped."""
    ages: dict[str, int] = {}
    for age in sorted(u.staleness for u in members):
        ages[str(age)] = ages.get(str(age), 0) + 1
    found: dict[str, Any] = {"staleness": ages}
    norms = [u.norm for u in members if u.norm is not None]
    if norms:
        found["clipped"] = sum(u.clipped for u in members)
        found["norm_median"] = float(np.median(norms))
        found["norm_max"] = max(norms)
    return found


def indicator_of(members: Sequence[Update]) -> int | None:
    """Updates within the clip norm less those beyond it; None where nothing asked for norms."""
    if any(u.norm is None for u in members):
        return None
    return sum(-1 if u.clipped else 1 for u in members)


def effective_progress(members: Sequence[Update]) -> float:
    """FedNova's tau_eff: the weighted mean of the normalisers [Wang et al. 2020, eq. 7 with p_i as weights]."""
    total = sum(u.weight for u in members)
    return math.fsum(u.weight * u.normaliser for u in members) / total


def _denominator(members: Sequence[Update], facts: Facts) -> int:
    weights = facts.constant_denominator or sum(u.weight for u in members)
    return weights * facts.max_scale


def sensitivity_of_mean(facts: Facts, denominator: int) -> Mapping[Adjacency, float]:
    """Of the weighted mean over a denominator that is public (weights and the count of a buffer are).

    Add/remove adjacency is offered where nothing tells who takes part: not where a buffer closes by count, so that one
    client more or less changes who else counts, nor where the denominator follows the count.
    """
    if facts.norm_bound is None or facts.max_weight is None or facts.rescaled or facts.cohort_dependent:
        return MappingProxyType({})
    reach = facts.norm_bound * facts.max_weight * facts.max_scale / denominator
    known = {Adjacency.ZERO_OUT: reach, Adjacency.REPLACE_ONE: 2 * reach}
    if not facts.arrival_public and facts.constant_denominator is not None:
        known[Adjacency.ADD_REMOVE] = reach
    return MappingProxyType(known)


def derive_mean(facts: Facts, *, renormalised: bool) -> Facts:
    """The facts of the weighted mean of updates with these.

    Raises:
        UnboundedWeight: Nothing bounds the weights.
    """
    if facts.max_weight is None:
        raise UnboundedWeight("sample weights have no declared maximum; declare max_weight (weight_cap)")
    facts = replace(facts, rescaled=facts.rescaled or renormalised)
    nominal = facts.constant_denominator or facts.count or facts.capacity
    return replace(facts, sensitivity=sensitivity_of_mean(facts, nominal * facts.max_scale))


@dataclass(frozen=True)
class ExactMean:
    """The weighted mean, exact and independent of order; memory O(size), whatever the number of updates.

    Attributes:
        arithmetic: ``float``: float64 bins, every value from ``resolution`` on is added without rounding. ``fixed``:
            the int64 grid that fits the declared bounds, the same numbers as on the secret-shared path. Where a clip
            norm is in force, it is enforced on the codes too, as devices that share do.
        resolution: Smallest magnitude that ``float`` adds exactly.
        renormalise: FedNova: multiply the mean by the updates' effective local progress.
        bounds: The grid of clipped updates on ``fixed``, where a task has fixed it. None: the finest that fits.
        noise_multiplier: Noise that a chosen grid leaves room for, as a multiple of the sum's sensitivity.
    """

    arithmetic: Literal["float", "fixed"] = "float"
    resolution: float = 1e-8
    renormalise: bool = False
    bounds: EncodedBounds | None = None
    noise_multiplier: float = 0.0

    @property
    def slot(self) -> Slot:
        """``reduce``."""
        return Slot.REDUCE

    @property
    def title(self) -> str:
        """The mean."""
        grid = "float64 bins" if self.arithmetic == "float" else "int64 grid"
        return f"exact weighted mean ({grid}){', times effective local progress' if self.renormalise else ''}"

    def derive(self, facts: Facts) -> Facts:
        """Needs bounds for values and weights, within which the sum can be exact.

        Raises:
            UnboundedRange: Nothing bounds the values.
            UnboundedWeight: Nothing bounds the weights.
            BudgetExceeded: The bounds leave no exact sum.
            ConfigurationError: The task's grid is for another clip norm than the one in force.
        """
        derived = derive_mean(facts, renormalised=self.renormalise)
        self._plan(facts)
        return derived

    def start(self, facts: Facts) -> Fold:
        """An empty sum; see ``stages.Reduce``."""
        if facts.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded("the updates are summed elsewhere; there is nothing to add up here")
        return _ExactFold(self, facts, *self._plan(facts))

    def _plan(self, facts: Facts) -> tuple[AccumulatorPlan | FixedPointGrid, EncodedBounds | None]:
        """How the sum is held, and the norm that is enforced on codes."""
        max_abs = facts.norm_bound if facts.max_abs is None else facts.max_abs
        if max_abs is None:
            raise UnboundedRange("an exact sum needs a bound on the values; declare max_abs or clip")
        if facts.max_weight is None:
            raise UnboundedWeight("an exact sum needs a bound on the weights; declare max_weight (weight_cap)")
        max_weight = facts.max_weight * facts.max_scale
        if self.arithmetic == "float":
            plan = AccumulatorPlan.for_bounds(
                max_abs=max_abs, max_weight=max_weight, max_count=facts.capacity, resolution=self.resolution
            )
            return plan, None
        if facts.norm_bound is None:
            return FixedPointGrid.for_bounds(max_abs=max_abs, max_weight=max_weight, max_count=facts.capacity), None
        bounds = self.bounds or choose_private_grid(
            clip_norm=facts.norm_bound,
            max_count=facts.capacity,
            max_weight=max_weight,
            noise_multiplier=self.noise_multiplier,
        )
        if bounds.clip_norm != facts.norm_bound:
            raise ConfigurationError(
                f"the task's grid is for updates clipped to {bounds.clip_norm:g}, and they are clipped to "
                f"{facts.norm_bound:g}; declare one clip norm"
            )
        grid = FixedPointGrid(
            fraction_bits=bounds.fraction_bits,
            max_abs=bounds.clip_norm,
            max_weight=max_weight,
            max_count=facts.capacity,
        )
        return grid, bounds


class _ExactFold:
    def __init__(
        self, stage: ExactMean, facts: Facts, plan: AccumulatorPlan | FixedPointGrid, bounds: EncodedBounds | None
    ) -> None:
        self._stage = stage
        self._facts = facts
        self._plan = plan
        self._bounds = bounds
        self._members = HeldUpdates()
        self._sum = self._empty()

    def _empty(self) -> ExactAccumulator | Int64Accumulator:
        if isinstance(self._plan, AccumulatorPlan):
            return ExactAccumulator(self._facts.size, self._plan)
        return Int64Accumulator(self._facts.size, self._plan)

    @property
    def count(self) -> int:
        return self._members.count

    def add(self, updates: Sequence[Update]) -> None:
        facts_only = [replace(u, vector=_NOTHING) for u in updates]
        self._members.add(facts_only)
        try:
            self._add(self._sum, updates)
        except BaseException:
            self._members.discard(facts_only)
            raise

    def discard(self, updates: Sequence[Update]) -> None:
        taken_out = self._empty()
        self._add(taken_out, updates)
        self._members.discard(updates)
        # Both are of one kind: ``_empty`` made them.
        self._sum.subtract(taken_out)  # type: ignore[arg-type]

    def _add(self, total: ExactAccumulator | Int64Accumulator, updates: Sequence[Update]) -> None:
        weights = [u.weight * u.scale for u in updates]
        if isinstance(total, ExactAccumulator):
            total.add_many([u.vector for u in updates], weights)
        elif self._bounds is not None:
            total.add_many([encode_clipped(u.vector, self._bounds) for u in updates], weights)
        else:
            total.add_many([total.grid.encode(u.vector) for u in updates], weights)

    def finish(self) -> Aggregate:
        members = self._members.ordered()
        denominator = _denominator(members, self._facts)
        integers = None
        if isinstance(self._sum, Int64Accumulator):
            integers = IntegerSum(
                codes=self._sum.sums.copy(),
                fraction_bits=self._sum.grid.fraction_bits,
                denominator=denominator,
                reach=None if self._bounds is None else self._bounds.norm_bound * self._sum.grid.max_weight,
            )
        values = self._sum.result(denominator) if integers is None else integers.decoded()
        return _aggregate(
            values, members, self._facts, denominator, renormalise=self._stage.renormalise, integers=integers
        )


def _aggregate(
    values: Float64Array,
    members: Sequence[Update],
    facts: Facts,
    denominator: int,
    *,
    renormalise: bool = False,
    integers: IntegerSum | None = None,
) -> Aggregate:
    measurements = measurements_of(members)
    if renormalise:
        integers = None
        progress = effective_progress(members)
        values = values * progress
        measurements["effective_progress"] = progress
        facts = replace(facts, rescaled=True)
    return Aggregate(
        values=values,
        kind=facts.kind,
        count=len(members),
        total_weight=sum(u.weight for u in members),
        sensitivity=sensitivity_of_mean(facts, denominator),
        measurements=measurements,
        integers=integers,
        indicator=indicator_of(members),
    )


@dataclass(frozen=True)
class BaselineMean:
    """A weighted mean by an ordinary summation, for comparison: it rounds, and its bits depend on the order.

    Updates are held until the end and summed in order of their numbers, so that a run is repeatable all the same.
    """

    summation: Summation = Summation.KAHAN

    @property
    def slot(self) -> Slot:
        """``reduce``."""
        return Slot.REDUCE

    @property
    def title(self) -> str:
        """The summation."""
        return f"weighted mean by {self.summation} summation (rounds; a baseline)"

    def derive(self, facts: Facts) -> Facts:
        """Needs to see the updates; proves no sensitivity, because the rounding is not bounded by the exact one's."""
        if facts.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded(f"{self.summation} summation rounds after every update; use the exact mean")
        return replace(derive_mean(facts, renormalised=False), sensitivity=MappingProxyType({}))

    def start(self, facts: Facts) -> Fold:
        """An empty collection; see ``stages.Reduce``."""
        return _BaselineFold(self.summation, facts)


class _BaselineFold(HeldUpdates):
    def __init__(self, summation: Summation, facts: Facts) -> None:
        super().__init__()
        self._summation = summation
        self._facts = facts

    def finish(self) -> Aggregate:
        updates = self.ordered()
        denominator = _denominator(updates, self._facts)
        total = weighted_sum(self._summation, (u.vector for u in updates), (u.weight * u.scale for u in updates))
        found = _aggregate(total / denominator, updates, self._facts, denominator)
        return replace(found, sensitivity=MappingProxyType({}))


if TYPE_CHECKING:
    _reduces: tuple[type[Reduce], ...] = (ExactMean, BaselineMean)
