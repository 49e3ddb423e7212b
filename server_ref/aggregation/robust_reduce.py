"""The ``reduce`` slot for Byzantine-robust rules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency, Aggregate, Facts, Float32Array, Update, Visibility
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.aggregation.reduce import HeldUpdates, effective_progress, measurements_of
from server_ref.aggregation.robust import (
    RULES,
    DistanceMode,
    Mixing,
    RuleOptions,
    apply_rule,
    check_options,
    estimate_num_byzantine,
    sensitivity_replace_one,
    warm_robust,
)
from server_ref.aggregation.robust.limits import rows_after_mixing, tolerated
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Fold, Reduce


@dataclass(frozen=True)
class RobustRule:
    """A rule that holds against updates that are not honest. Sample weights do not count: a client chooses its own.

    Attributes:
        rule: Name of a rule of ``robust.RULES``.
        num_byzantine: Updates of a buffer that may be dishonest; 0 means none. None: see ``byzantine_fraction``.
        byzantine_fraction: The same as a fraction of the buffer, rounded down. If this is None too, the number is
            estimated from each buffer (``robust.estimate_num_byzantine``).
        options: What the rule can be told besides.
        seed: What random distances and buckets are drawn from, mixed with who is in the buffer: nobody can know the
            draw before the buffer is full, as long as the seed is not public.
        renormalise: FedNova: multiply the outcome by the updates' effective local progress.
    """

    rule: str
    num_byzantine: int | None = None
    byzantine_fraction: float | None = None
    options: RuleOptions = field(default_factory=RuleOptions)
    seed: int = 0
    renormalise: bool = False

    def __post_init__(self) -> None:
        check_options(self.rule, self.drawn([]))
        if self.num_byzantine is not None and self.byzantine_fraction is not None:
            raise ConfigurationError("give num_byzantine (a number) or byzantine_fraction (a fraction), not both")
        if self.num_byzantine is not None and self.num_byzantine < 0:
            raise ConfigurationError(f"num_byzantine must not be negative, got {self.num_byzantine}")
        if self.byzantine_fraction is not None and not 0 <= self.byzantine_fraction < 0.5:
            raise ConfigurationError(
                f"no rule stands a fraction of {self.byzantine_fraction:g} dishonest updates; it must lie in [0, 0.5)"
            )

    @property
    def slot(self) -> Slot:
        """``reduce``."""
        return Slot.REDUCE

    @property
    def title(self) -> str:
        """The rule and what it assumes."""
        if self.num_byzantine is not None:
            assumed = f"{self.num_byzantine} dishonest updates"
        elif self.byzantine_fraction is not None:
            assumed = f"{self.byzantine_fraction:.0%} dishonest updates"
        else:
            assumed = "an estimated number of dishonest updates"
        before = "" if self.options.mixing is Mixing.NONE else f"{self.options.mixing}, then "
        return f"{before}{self.rule} against {assumed}"

    def assumed(self, count: int) -> int | None:
        """Dishonest updates among ``count``; None if they are to be estimated."""
        if self.num_byzantine is not None or self.byzantine_fraction is None:
            return self.num_byzantine
        # A fraction like 0.3 of 10 is 3, whatever the last bit of the product says.
        return math.floor(round(self.byzantine_fraction * count, 9))

    def drawn(self, updates: Sequence[Update]) -> RuleOptions:
        """The options with a seed of this buffer, where they draw at all."""
        if self.options.mode is DistanceMode.EXACT and self.options.mixing is not Mixing.BUCKETING:
            return self.options
        text = f"{self.seed}:{','.join(str(u.number) for u in updates)}"
        seed = int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:6], "big")
        return self.options.model_copy(update={"seed": seed})

    def derive(self, facts: Facts) -> Facts:
        """Needs to see the updates, and enough of them; proves a sensitivity only where the literature has one.

        Raises:
            IndividualUpdatesNeeded: Only a sum is visible.
            TooManyByzantine: A buffer never holds enough updates to stand the dishonest ones that are assumed, or for
                the rule at all where their number is estimated.
        """
        if facts.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded(
                f"{self.rule} compares single updates, but only their sum is visible here; use the mean, or a mode in "
                "which updates can be seen"
            )
        count = facts.count or facts.capacity
        # An estimate may be 0 and never exceeds what the rule stands: there have to be enough updates for none.
        tolerated(RULES[self.rule], count, self.assumed(count) or 0, self.options)
        sensitivity = self.sensitivity(facts, count)
        refusal = None
        if facts.norm_bound is not None and sensitivity.get(Adjacency.REPLACE_ONE, 0.0) >= 2 * facts.norm_bound:
            refusal = (
                f"one client can turn the outcome of {self.rule} into any other, whatever the number of clients: noise "
                f"on it would have to hide twice the clip norm. Use one of the three sound modes: multi-krum or the "
                "trimmed mean, with noise for their proved replace-one sensitivity; centred clipping around a public "
                "centre; or the full noise on sums of buckets, and the rule on those (post-processing)"
            )
        return replace(
            facts, rescaled=facts.rescaled or self.renormalise, sensitivity=sensitivity, noise_refusal=refusal
        )

    def sensitivity(self, facts: Facts, count: int) -> MappingProxyType[Adjacency, float]:
        """Of the outcome for ``count`` updates; none where their number of dishonest ones is estimated from them."""
        num_byzantine = self.assumed(count)
        if facts.norm_bound is None or num_byzantine is None or self.renormalise:
            return MappingProxyType({})
        value = sensitivity_replace_one(self.rule, count, num_byzantine, facts.norm_bound, self.drawn([]))
        return MappingProxyType({} if value is None else {Adjacency.REPLACE_ONE: value})

    def start(self, facts: Facts) -> Fold:
        """An empty collection; see ``stages.Reduce``. The first one pays for compiling the kernels."""
        warm_robust()
        return _RobustFold(self, facts)


class _RobustFold(HeldUpdates):
    def __init__(self, stage: RobustRule, facts: Facts) -> None:
        super().__init__()
        self._stage = stage
        self._facts = facts

    def finish(self) -> Aggregate:
        updates = self.ordered()
        rows = [_scaled(u, self._facts.max_scale) for u in updates]
        num_byzantine = self._stage.assumed(len(rows))
        measurements = measurements_of(updates)
        if num_byzantine is None:
            seen = rows_after_mixing(len(rows), self._stage.options)
            limit = RULES[self._stage.rule].limit(seen)
            num_byzantine = estimate_num_byzantine(rows, limit=max(0, limit))
            measurements["estimated_byzantine"] = num_byzantine
        found = apply_rule(self._stage.rule, rows, num_byzantine, self._stage.drawn(updates))
        values = found.values
        measurements["rule"] = self._stage.rule
        measurements["num_byzantine"] = found.num_byzantine
        if found.degraded:
            measurements["degraded"] = True
        if found.selected is not None:
            chosen = set(found.selected)
            measurements["excluded"] = [u.number for i, u in enumerate(updates) if i not in chosen]
        if self._stage.renormalise:
            progress = effective_progress([replace(u, weight=1) for u in updates])
            values = values * progress
            measurements["effective_progress"] = progress
        return Aggregate(
            values=values,
            kind=self._facts.kind,
            count=len(updates),
            total_weight=len(updates),
            sensitivity=self._stage.sensitivity(self._facts, len(updates)),
            measurements=measurements,
        )


def _scaled(update: Update, max_scale: int) -> Float32Array:
    """The vector times its staleness factor of at most 1: a public weight, which no rule can take as a count."""
    if update.scale == max_scale:
        return update.vector
    return np.multiply(update.vector, np.float32(update.scale / max_scale), dtype=np.float32)


if TYPE_CHECKING:
    _reduces: type[Reduce] = RobustRule
