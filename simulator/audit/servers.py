"""The servers that are audited: the product's private pipeline, and the same with one bug planted in each.

A planted bug is one that was found in the field (or in the specification's sketches), put into otherwise correct code.
If the audit did not refute it, passing the audit would mean nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.clipping import clip_global, l2_norm
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Aggregate,
    ClipGlobal,
    EncodedUpdate,
    ExactMean,
    Facts,
    Pipeline,
    PrivateAggregate,
    Sgd,
    Slot,
)
from server_ref.aggregation.accounting import LedgerKeeper, PrivacyBudget, PrivacyLedger
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.aggregation.bucketed import BucketNoise, BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.calibration import calibrate
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.stages import Clip, Noise, Reduce
from simulator.audit.canaries import LENGTH
from simulator.audit.one_run import QUANTILE, Claimed, Published, Server

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

CLIP_NORM: Final = 1.0
"""Of all audited servers, in the first round."""

EPSILON: Final = 1.0
DELTA: Final = 1e-5

_UNCHECKED: Final = 1e9
"""Budget of a server whose bug is that nobody asks the ledger."""

_AT_ONCE: Final = 16


@dataclass(frozen=True)
class Recipe:
    """A private server as the product builds it; what differs from the defaults is a planted bug.

    Attributes:
        adaptive: Whether the clip norm follows the updates' norms.
        rounds_paid: For how many of T rounds the noise is calibrated.
        clip: The clip stage for a clip norm.
        rule: A robust rule on noised buckets, instead of the mean.
        noise: From the product's noise stage to the one that is used.
        raw_quantile: Whether the next clip norm is a quantile of the updates' norms as they are.
    """

    adaptive: bool = False
    rounds_paid: Callable[[int], int] = lambda rounds: rounds
    clip: Callable[[float], Clip] = ClipGlobal
    rule: BucketedRule | None = None
    noise: Callable[[Noise], Noise] = lambda noise: noise
    raw_quantile: bool = False

    def start(self, clients: int, size: int, rounds: int) -> Server:
        """A new server."""
        return _PipelineServer(self, clients, size, rounds)


class _PipelineServer:
    def __init__(self, recipe: Recipe, clients: int, size: int, rounds: int) -> None:
        paid = recipe.rounds_paid(rounds)
        budget = PrivacyBudget(epsilon=EPSILON if paid == rounds else _UNCHECKED, delta=DELTA, participations=rounds)
        self._recipe = recipe
        self._keeper = LedgerKeeper(PrivacyLedger(budget=budget))
        self._z = calibrate(EPSILON, DELTA, participations=paid)
        self._noise = recipe.noise(CentralNoise(self._z, self._keeper, indicators=recipe.adaptive))
        self._facts = Facts(size, UpdateKind.DELTA, capacity=clients, count=clients)
        self._norm = AdaptiveClipNorm(clip_norm=CLIP_NORM)
        self._round = 0

    @property
    def clip_norm(self) -> float:
        return self._norm.clip_norm

    def round(self, updates: Iterator[Float32Array]) -> Published:
        clip = self._recipe.clip(self.clip_norm)
        reduce: Reduce = ExactMean("fixed" if isinstance(clip, ClipGlobal) else "float", noise_multiplier=self._z)
        noise = self._noise
        if self._recipe.rule is not None:
            reduce = BucketSums(self._recipe.rule, os.urandom(16), self._z)
            noise = BucketNoise(noise, self._recipe.rule)
        pipeline = Pipeline.build(clip, reduce, noise, Sgd(), facts=self._facts, private=True)
        fold = pipeline.start()
        norms = []
        batch = []
        for number, update in enumerate(updates):
            norms.append(l2_norm(update) if self._recipe.raw_quantile else 0.0)
            batch.append(pipeline.admit(EncodedUpdate(number, update)))
            if len(batch) == _AT_ONCE:
                fold.add(batch)
                batch = []
        fold.add(batch)
        self._keeper.open_round(self._round)
        self._round += 1
        released = pipeline.finish(fold)
        if self._recipe.raw_quantile:
            raw = max(1e-6, float(np.quantile(norms, QUANTILE)))
            self._norm = self._norm.model_copy(update={"clip_norm": raw})
        elif released.indicator is not None:
            self._norm = self._norm.after(released.indicator, released.count)
        return Published(released.values, self.clip_norm)


# --- what is wrong with the others -----------------------------------------------------------------------------------


class _Wrapped:
    """A noise stage around the product's."""

    def __init__(self, inner: Noise) -> None:
        self._inner = inner

    @property
    def slot(self) -> Slot:
        return self._inner.slot

    @property
    def title(self) -> str:
        return f"{self._inner.title}, wrongly"

    def derive(self, facts: Facts) -> Facts:
        return self._inner.derive(facts)

    def release(self, aggregate: Aggregate) -> Aggregate:
        return self._inner.release(aggregate)


class _Understated(_Wrapped):
    """Noise for a part of the sensitivity only."""

    def __init__(self, inner: Noise, part: Callable[[Aggregate], float]) -> None:
        super().__init__(inner)
        self._part = part

    def release(self, aggregate: Aggregate) -> Aggregate:
        part = self._part(aggregate)
        integers = aggregate.integers
        if integers is not None and integers.reach is not None:
            integers = replace(integers, reach=max(1, math.floor(integers.reach * part)))
        smaller = {adjacency: value * part for adjacency, value in aggregate.sensitivity.items()}
        return self._inner.release(replace(aggregate, integers=integers, sensitivity=smaller))


class _Reused(_Wrapped):
    """One round's noise, kept for all others."""

    _drawn: Float64Array | None = None

    def release(self, aggregate: Aggregate) -> Aggregate:
        released = aggregate
        if self._drawn is None:
            released = self._inner.release(aggregate)
            self._drawn = released.values - aggregate.values
        return PrivateAggregate(
            values=aggregate.values + self._drawn,
            kind=aggregate.kind,
            count=aggregate.count,
            total_weight=aggregate.total_weight,
            noise_stddev=1.0,
        )


class _ClippedAfter(_Wrapped):
    """The noised outcome is clipped instead of the updates."""

    def release(self, aggregate: Aggregate) -> Aggregate:
        released = self._inner.release(aggregate)
        clipped = clip_global(released.values, CLIP_NORM)
        return replace(released, values=clipped.vector, integers=None)


@dataclass(frozen=True)
class _ClipsNothing:
    """Says that it clips."""

    clip_norm: float

    @property
    def slot(self) -> Slot:
        return Slot.CLIP

    @property
    def title(self) -> str:
        return "none, but says otherwise"

    def derive(self, facts: Facts) -> Facts:
        return replace(ClipGlobal(self.clip_norm).derive(facts), max_abs=LENGTH * self.clip_norm)

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        return vector, None, False


def _claimed(name: str, recipe: Recipe) -> Claimed:
    return Claimed(name, recipe.start, EPSILON, DELTA)


REAL: Final = (
    _claimed("private pipeline", Recipe()),
    _claimed("private pipeline, adaptive clipping", Recipe(adaptive=True)),
    _claimed("private pipeline, median of 9 noised buckets", Recipe(rule=BucketedRule(9, 3, "median"))),
)
"""What has to stand the audit."""

PLANTED: Final = (
    _claimed("sensitivity C sqrt(1 %) for sparse updates", Recipe(noise=lambda n: _Understated(n, lambda _: 0.1))),
    _claimed("noise of one round's budget in every round", Recipe(rounds_paid=lambda _: 1)),
    _claimed("one round's noise reused in every round", Recipe(noise=_Reused)),
    _claimed("noise of the mean's scale on the sum", Recipe(noise=lambda n: _Understated(n, lambda a: 1 / a.count))),
    _claimed("clipping after the noise", Recipe(clip=_ClipsNothing, noise=_ClippedAfter)),
    _claimed("a raw quantile of the norms as clip norm", Recipe(raw_quantile=True)),
)
"""What must not."""
