"""What flows through the pipeline: updates, the aggregate, and the facts that each carries about itself.

Facts are what later stages may rely on. A stage that cannot prove a fact leaves it out, and whoever needs it refuses
to be built (``pipeline``): noise without a known sensitivity, a rule that needs to see single updates in a sum, ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.updates import UpdateKind

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class Visibility(StrEnum):
    """How much of the updates this server can see."""

    INDIVIDUAL = "individual"
    """Every update by itself."""

    SUM = "sum"
    """Their sum only: they were shared or masked on the device."""


class Adjacency(StrEnum):
    """Which two data sets count as neighbours. A sensitivity (and an epsilon) means nothing without it.

    The level is always the *client*: neighbours differ in all that one device holds.
    """

    ADD_REMOVE = "add-remove"
    """One client more or less; only where the denominator does not depend on how many reported."""

    ZERO_OUT = "zero-out"
    """One client's contribution replaced by zero: arrival is public, content is protected."""

    REPLACE_ONE = "replace-one"
    """One client's contribution replaced by any other."""


@dataclass(frozen=True)
class EncodedUpdate:
    """One update as it arrived, with the public facts the server's own record has of it.

    Attributes:
        number: Assignment number: the order of updates, and what breaks ties. Never a client's own choice.
        payload: float32[size], or the bytes of a codec.
        weight: Public integer weight, from 1.
        staleness: Model versions since its assignment.
        seed: Seed of the codec, from the assignment.
        normaliser: FedNova's a_i, by which the device divided its delta; 1 elsewhere.
    """

    number: int
    payload: Float32Array | bytes | memoryview
    weight: int = 1
    staleness: int = 0
    seed: int = 0
    normaliser: float = 1.0


@dataclass(frozen=True)
class Update:
    """One admitted update: decoded, finite, within its bounds, clipped.

    Attributes:
        number: As in ``EncodedUpdate``.
        vector: float32[size], not to be changed.
        weight: Public integer weight.
        scale: What the schedule leaves of it for its staleness, out of ``Facts.max_scale``.
        staleness: Model versions since its assignment.
        normaliser: As in ``EncodedUpdate``.
        norm: Its L2 norm before clipping; None where nothing asked for it.
        clipped: Whether clipping changed it.
    """

    number: int
    vector: Float32Array
    weight: int = 1
    scale: int = 1
    staleness: int = 0
    normaliser: float = 1.0
    norm: float | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of the updates at one point of the pipeline, when it is built.

    Attributes:
        size: Coordinates of an update.
        kind: Whether the aggregate is added or subtracted.
        visibility: Whether this server sees single updates, or receives their sum.
        capacity: Largest number of updates in a fold at any time.
        count: Number of updates in every aggregate, where it is fixed; None if it varies.
        max_weight: Declared largest weight of an update; None if there is no bound.
        max_scale: Scale of an update that is not stale; the sum is divided by it, so that it is a factor of at most 1.
        max_abs: Declared largest magnitude of a value; None if there is no bound.
        norm_bound: Largest L2 norm of an update; None if nothing enforces one.
        constant_denominator: What the weighted sum is divided by instead of the weights' sum, if a public constant.
        rescaled: Whether single updates are rescaled by something that is not a public weight.
        cohort_dependent: Whether acceptance of an update depends on the others.
        arrival_public: Whether it is known who takes part, or how many do. False only where a buffer closes by public
            time, whoever has reported, and is never refilled, capped or given up for what came.
        sensitivity: L2 sensitivity of the aggregate for each adjacency for which one is proved.
        noise_refusal: Why noise on the aggregate would protect at a price that makes it useless, and what to use
            instead; None where it does not.
        noised: Whether noise has been added to the aggregate.
    """

    size: int
    kind: UpdateKind
    visibility: Visibility = Visibility.INDIVIDUAL
    capacity: int = 1
    count: int | None = None
    max_weight: int | None = 1
    max_scale: int = 1
    max_abs: float | None = None
    norm_bound: float | None = None
    constant_denominator: int | None = None
    rescaled: bool = False
    cohort_dependent: bool = False
    arrival_public: bool = True
    sensitivity: Mapping[Adjacency, float] = field(default_factory=lambda: MappingProxyType({}))
    noise_refusal: str | None = None
    noised: bool = False


@dataclass(frozen=True)
class IntegerSum:
    """A weighted sum of updates on the fixed-point grid, as integers: what noise is added to, exactly.

    Attributes:
        codes: int64[size], ``sum(weight_i * code_i)``, with noise or without.
        fraction_bits: f; a code stands for ``code * 2**-f``.
        denominator: What the sum is divided by, once, after decoding.
        reach: Largest L2 norm of one update's part in it, weight included; None if no norm is enforced on codes.
    """

    codes: Int64Array
    fraction_bits: int
    denominator: int
    reach: int | None = None

    def decoded(self) -> Float64Array:
        """float64[size]: every sum correctly rounded, then divided by the denominator. The one decoding of a round."""
        return self.codes.astype(np.float64) / math.ldexp(self.denominator, self.fraction_bits)


@dataclass(frozen=True)
class Aggregate:
    """The outcome of one buffer.

    Attributes:
        values: float64[size].
        kind: Whether it is added or subtracted.
        count: Updates that went in.
        total_weight: Their weights' sum.
        sensitivity: L2 sensitivity for each adjacency for which one is proved; noise reads it here.
        measurements: What the stages saw, for the round's record and the report: plain JSON values, no update values.
        integers: The sum that ``values`` decodes, where the fold is on the fixed-point grid.
        indicator: Updates that were within the clip norm less those that were not, for adaptive clipping; None where
            nothing was clipped. Equals twice the sum of indicators of +-1/2.
    """

    values: Float64Array
    kind: UpdateKind
    count: int
    total_weight: int
    sensitivity: Mapping[Adjacency, float] = field(default_factory=lambda: MappingProxyType({}))
    measurements: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    integers: IntegerSum | None = None
    indicator: int | None = None


@dataclass(frozen=True)
class PrivateAggregate(Aggregate):
    """An aggregate to which noise was added, by this server or by the aggregators. Only this may be released under DP.

    Its values, integers and indicator are noised, and its measurements say nothing of single updates.

    Attributes:
        noise_stddev: Standard deviation of the noise on each coordinate.
        adjacency: What the noise was calibrated for.
    """

    noise_stddev: float = 0.0
    adjacency: Adjacency = Adjacency.ZERO_OUT
