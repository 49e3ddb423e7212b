"""Buckets where this server sees single updates: the ``reduce`` and ``noise`` slots that go together.

The sums of all buckets, one behind the other, are one vector, of which a client moves one stretch only: it is noised
and paid for as one release. Then each bucket's stretch is divided by its public weight, and the rule sees the means.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency, Aggregate, Facts, IntegerSum, PrivateAggregate, Visibility
from server_ref.aggregation.buckets import BucketedRule, assign_buckets, bucket_seed
from server_ref.aggregation.errors import IndividualUpdatesNeeded, NoiseMissing, NoiseUnexpected, UnboundedRange
from server_ref.aggregation.reduce import ExactMean, HeldUpdates, measurements_of, sensitivity_of_mean
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Fold, Noise, Reduce

BUCKET_WEIGHTS: Final = "bucket_weights"
"""Measurement that goes from the reduce stage to the noise stage: what each bucket is divided by."""


@dataclass(frozen=True)
class BucketSums:
    """The sums of disjoint buckets, for ``BucketNoise`` to noise together. Sample weights count inside a bucket.

    Attributes:
        rule: What is to be done with them: it says how many there are.
        seed: What the draw comes from, mixed with who is in the buffer, so that nobody knows it before the buffer is
            full, as long as the seed is not public.
        noise_multiplier: Noise that the grid leaves room for, as in ``ExactMean``.
    """

    rule: BucketedRule
    seed: bytes
    noise_multiplier: float = 0.0

    @property
    def slot(self) -> Slot:
        """``reduce``."""
        return Slot.REDUCE

    @property
    def title(self) -> str:
        """How many sums."""
        return f"exact sums of {self.rule.num_buckets} buckets (int64 grid)"

    def derive(self, facts: Facts) -> Facts:
        """Needs to see updates whose norm is bounded, and enough of them.

        Raises:
            IndividualUpdatesNeeded: Only a sum is visible: then the aggregators make one sum a bucket.
            UnboundedRange: Nothing bounds an update's norm.
            ConfigurationError: A buffer does not fill the buckets.
        """
        if facts.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded(
                "buckets are summed here from single updates, but only sums are visible; let the aggregators open one "
                "sum a bucket, and combine them (BucketedRule)"
            )
        if facts.norm_bound is None:
            raise UnboundedRange("a bucket's sum is noised for the longest update; add a clip stage (clip_norm)")
        if (facts.count or facts.capacity) < self.rule.num_buckets:
            raise ConfigurationError(
                f"buffers of {facts.count or facts.capacity} updates do not fill {self.rule.num_buckets} buckets"
            )
        self._mean().derive(facts)
        # Of sums: what one client adds to the stretch of its bucket.
        return replace(facts, sensitivity=_of_sums(facts))

    def start(self, facts: Facts) -> Fold:
        """An empty collection; see ``stages.Reduce``."""
        return _BucketFold(self, facts)

    def _mean(self) -> ExactMean:
        return ExactMean("fixed", noise_multiplier=self.noise_multiplier)


def _of_sums(facts: Facts) -> MappingProxyType[Adjacency, float]:
    known = dict(sensitivity_of_mean(facts, 1))
    # Buckets are filled evenly, so that one client more would move others to other buckets.
    known.pop(Adjacency.ADD_REMOVE, None)
    return MappingProxyType(known)


class _BucketFold(HeldUpdates):
    def __init__(self, stage: BucketSums, facts: Facts) -> None:
        super().__init__()
        self._stage = stage
        self._facts = facts

    def finish(self) -> Aggregate:
        updates = {u.number: u for u in self.ordered()}
        who = hashlib.sha256(",".join(map(str, updates)).encode("ascii")).digest()
        seed = bucket_seed(0, [self._stage.seed, who])
        codes, weights = [], []
        integers: IntegerSum | None = None
        for members in assign_buckets(list(updates), self._stage.rule.num_buckets, seed):
            fold = self._stage._mean().start(self._facts)  # noqa: SLF001 - one module
            fold.add([updates[number] for number in members])
            integers = fold.finish().integers
            if integers is None:
                raise AssertionError
            codes.append(integers.codes)
            weights.append(sum(updates[number].weight for number in members) * self._facts.max_scale)
        if integers is None:
            raise AssertionError
        together = replace(integers, codes=np.concatenate(codes), denominator=1)
        members_of_all = list(updates.values())
        return Aggregate(
            values=together.decoded(),
            kind=self._facts.kind,
            count=len(updates),
            total_weight=sum(u.weight for u in members_of_all),
            sensitivity=_of_sums(self._facts),
            measurements=measurements_of(members_of_all) | {BUCKET_WEIGHTS: weights},
            integers=together,
        )


@dataclass(frozen=True)
class BucketNoise:
    """Another noise stage for all buckets' sums together, and then the rule: post-processing of what was released.

    Attributes:
        noise: What protects the sums.
        rule: As the ``reduce`` stage's.
    """

    noise: Noise
    rule: BucketedRule

    @property
    def slot(self) -> Slot:
        """``noise``."""
        return Slot.NOISE

    @property
    def title(self) -> str:
        """The noise, and the rule."""
        return f"{self.noise.title} on every bucket, then {self.rule.title}"

    def derive(self, facts: Facts) -> Facts:
        """As the noise stage's."""
        return self.noise.derive(facts)

    def release(self, aggregate: Aggregate) -> PrivateAggregate:
        """The rule's outcome on noised means; see ``stages.Noise``.

        Raises:
            NoiseUnexpected: The aggregate holds no buckets: ``reduce`` is another stage.
            NoiseMissing: The noise stage adds none.
        """
        weights = aggregate.measurements.get(BUCKET_WEIGHTS)
        if weights is None or len(weights) != self.rule.num_buckets:
            raise NoiseUnexpected("there are no buckets to noise; use BucketSums with the same rule in the reduce slot")
        released = self.noise.release(aggregate)
        if not isinstance(released, PrivateAggregate):
            raise NoiseMissing("the buckets' sums were released without noise, so the rule would look at bare updates")
        stretches = released.values.reshape(len(weights), -1)
        means = [
            replace(
                released,
                values=values / weight,
                noise_stddev=released.noise_stddev / weight,
                total_weight=weight,
                integers=None,
            )
            for values, weight in zip(stretches, weights, strict=True)
        ]
        found = self.rule.combine(means)
        price: dict[str, Any] = dict(released.measurements)
        return replace(
            found,
            count=released.count,
            total_weight=released.total_weight,
            measurements=price | dict(found.measurements) | {"buckets": list(weights)},
        )


if TYPE_CHECKING:
    _reduces: type[Reduce] = BucketSums
    _noises: type[Noise] = BucketNoise
