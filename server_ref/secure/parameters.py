"""The parameters that an aggregator pins in its own configuration, and those that a round states.

An aggregator takes none of these from the coordinator: whoever asks it to sign a statement with less noise, more
weight, fewer reports or more rounds than it is configured for is refused. So no one has to trust the coordinator for
the privacy of the sum.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from fractions import Fraction
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from client_sdk.protocol.field import Field as PrimeField
from client_sdk.protocol.messages import Message, Variance
from client_sdk.protocol.privacy import NOISE_TAIL, EncodedBounds
from server_ref.aggregation.batch import Adjacency
from server_ref.secure.canonical import digest
from server_ref.secure.errors import ParametersBelowPinned, SumOutOfRange
from server_ref.secure.projections import ProjectionSettings

SUM_LIMIT: Final = 2**60 - 1
"""Largest magnitude of a sum with its noise: half of the smallest field, less one bit."""


class CheckingMode(StrEnum):
    """How far aggregators check what a device sent. ``PRICES`` says what each mode costs."""

    TRUST_DEVICES = "trust-devices"
    PROJECTIONS = "projections"
    BUCKETS = "buckets"


PRICES: Final[dict[CheckingMode, str]] = {
    CheckingMode.TRUST_DEVICES: (
        "Nothing but the sum is opened. A device that does not clip can shift the sum by any amount."
    ),
    CheckingMode.PROJECTIONS: (
        "128 random projections and the squared norm of each update are opened to the coordinator. "
        "No differential privacy is claimed against whoever sees them."
    ),
    CheckingMode.BUCKETS: (
        "One noised sum per bucket is opened, each with the full noise: the noise of their total grows with the square "
        "root of the number of buckets."
    ),
}


class PinnedPrivacy(Message):
    """Differential privacy as an aggregator insists on it.

    Rounds, participations and budget are counted by each aggregator over what it has signed itself, and a sum opens
    with a quorum: see ``PinnedParameters.overrun`` for what that leaves to a dishonest coordinator.

    Attributes:
        noise_multiplier: Noise standard deviation of the sum over its sensitivity ``W B``: at least this.
        max_rounds: T: releases in the whole run.
        max_participations: k: rounds in which one device may be counted; None for no limit beyond T.
        epsilon, delta: The budget; a release that would exceed it is refused.
        adjacency: What the budget is stated for.
        indicator_noise_multiplier: The same ratio for the adaptive-clipping indicator, where it is shared.
        noise: Who adds it.
        device_noise_variance: With noise by devices: the variance of each device's, in squared steps of the grid.
        honest_devices: With noise by devices: of the devices in any sum, how many are relied on to have added it.
    """

    noise_multiplier: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    max_rounds: int = Field(ge=1, lt=2**31)
    max_participations: int | None = Field(None, ge=1, lt=2**31)
    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    adjacency: Adjacency = Adjacency.ZERO_OUT
    indicator_noise_multiplier: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)
    noise: Literal["aggregators", "devices"] = "aggregators"
    device_noise_variance: Variance | None = None
    honest_devices: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _noise_is_described(self) -> Self:
        by_devices = self.noise == "devices"
        if by_devices != (self.device_noise_variance is not None) or by_devices != (self.honest_devices is not None):
            raise ValueError("device_noise_variance and honest_devices go with noise by devices, and that with them")
        if by_devices and self.indicator_noise_multiplier is not None:
            raise ValueError("the noise of devices has one variance for the whole task, so the clip norm is fixed too")
        return self


class RoundParameters(Message):
    """The parameters of one round's noise and weights, as a statement repeats them.

    Attributes:
        noise_multiplier: sigma; 0 in a task without noise.
        bound: B: largest integer norm of an update on the grid.
        max_weight: W: largest weight of a report.
        fraction_bits: f: the grid's step is ``2**-f``.
        indicator_noise_multiplier: sigma of the adaptive-clipping indicator, where it is shared.
    """

    noise_multiplier: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    bound: int = Field(ge=1, le=SUM_LIMIT)
    max_weight: int = Field(ge=1, lt=2**40)
    fraction_bits: int = Field(ge=0, le=40)
    indicator_noise_multiplier: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)

    def noise_variance(self, shares: int) -> Fraction:
        """Exact variance of one contributor's noise on an update coordinate, where ``shares`` of them suffice."""
        return (Fraction(self.noise_multiplier) * self.max_weight * self.bound) ** 2 / shares

    def indicator_variance(self, shares: int) -> Fraction:
        """The same for the indicator, whose codes are 1 and -1 (halves)."""
        return (Fraction(self.indicator_noise_multiplier or 0) * self.max_weight) ** 2 / shares

    def require_range(self, total_weight: int, threshold: int) -> None:
        """Refuse a sum that could wrap around.

        Raises:
            SumOutOfRange: ``total_weight B + 12 sqrt(t) sigma W B`` exceeds ``2**60 - 1``.
        """
        tail = NOISE_TAIL**2 * threshold * (Fraction(self.noise_multiplier) * self.max_weight * self.bound) ** 2
        left = SUM_LIMIT - total_weight * self.bound
        if left < 0 or tail > left * left:
            raise SumOutOfRange(
                f"a total weight of {total_weight} with bound {self.bound} and its noise exceed 2**60 - 1: "
                "lower fraction_bits or the cohort"
            )


class PinnedParameters(Message):
    """What an aggregator insists on, whoever asks.

    Attributes:
        num_aggregators, threshold: n and t: t - 1 aggregators learn nothing.
        field, packing: The sharing scheme.
        quorum: Commit signatures that an answer needs. Anything below ``safe_quorum`` assumes that the coordinator
            shows all aggregators the same sets, so it is accepted only with ``assume_consistent_coordinator``.
        min_cohort: Reports that a sum has at least.
        max_parts: Sums that are opened in a round at most: more than one in the mode ``buckets`` only.
        min_bucket: Reports that each part has at least, in the mode ``buckets``; None for ``min_cohort``.
        clip_norm, fraction_bits: C and f, to which devices clip and encode. With an indicator, C follows the releases,
            and is taken from each report, where the device vouches for it.
        max_weight: W, the least that a statement says.
        indicator: Whether devices share an adaptive-clipping indicator.
        checking: How far shares are checked.
        distances: Whether distances between updates are opened, for Krum; ``DISTANCE_LEAKAGE`` says what that gives
            away.
        privacy: None for a task without noise.
    """

    num_aggregators: int = Field(5, ge=2, le=64)
    threshold: int = Field(3, ge=2, le=64)
    field: Literal["m61", "m127"] = "m61"
    packing: Literal[1, 2] = 1
    quorum: int | None = Field(None, ge=1, le=64)
    assume_consistent_coordinator: bool = False
    min_cohort: int = Field(ge=2)
    max_parts: int = Field(1, ge=1, le=1024)
    min_bucket: int | None = Field(None, ge=2)
    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    fraction_bits: int = Field(ge=0, le=40)
    max_weight: int = Field(1, ge=1, lt=2**40)
    indicator: bool = False
    checking: CheckingMode = CheckingMode.TRUST_DEVICES
    distances: bool = False
    privacy: PinnedPrivacy | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.threshold > self.num_aggregators:
            raise ValueError(f"{self.num_aggregators} aggregators cannot reach a threshold of {self.threshold}")
        if self.needed > self.num_aggregators:
            raise ValueError(f"packing {self.packing} needs {self.needed} of {self.num_aggregators} aggregators")
        if self.effective_quorum > self.num_aggregators:
            raise ValueError(f"a quorum of {self.effective_quorum} exceeds {self.num_aggregators} aggregators")
        if self.effective_quorum < self.safe_quorum and not self.assume_consistent_coordinator:
            raise ValueError(
                f"with a quorum below {self.safe_quorum}, a coordinator that shows aggregators different sets opens "
                "both: raise quorum, or set assume_consistent_coordinator"
            )
        if (self.min_bucket is not None or self.max_parts > 1) and self.checking is not CheckingMode.BUCKETS:
            raise ValueError("min_bucket and max_parts belong to the checking mode buckets")
        if self.privacy is not None and self.indicator != (self.privacy.indicator_noise_multiplier is not None):
            raise ValueError("an indicator is shared exactly where it has a noise multiplier of its own")
        self._check_device_noise()
        if self.checking is CheckingMode.PROJECTIONS:
            if self.indicator:
                raise ValueError("the checking mode projections needs a fixed clip norm, and an indicator moves it")
            try:
                # The bit budget depends on the task's size: it is checked when one is bound.
                with suppress(BudgetExceeded):
                    self.projection_settings(1)
            except ConfigurationError as e:
                raise ValueError(str(e)) from e
        return self

    def _check_device_noise(self) -> None:
        privacy = self.privacy
        if privacy is None or privacy.device_noise_variance is None or privacy.honest_devices is None:
            return
        if self.max_weight > 1:
            raise ValueError("the noise of devices is weighted with their updates, so max_weight must be 1")
        if privacy.honest_devices > self.smallest_part:
            raise ValueError(
                f"sums of {self.smallest_part} reports cannot rely on {privacy.honest_devices} honest devices"
            )
        wanted = (Fraction(privacy.noise_multiplier) * self.bounds.norm_bound) ** 2
        if privacy.honest_devices * Fraction(privacy.device_noise_variance) < wanted:
            raise ValueError("the noise of honest_devices together is below noise_multiplier")

    @property
    def needed(self) -> int:
        """Answers that open a sum."""
        return self.threshold + self.packing - 1

    @property
    def safe_quorum(self) -> int:
        """Two quorums of this size have an honest aggregator in common, if at most t - 1 are not."""
        return (self.num_aggregators + self.threshold - 1) // 2 + 1

    @property
    def effective_quorum(self) -> int:
        """Commit signatures that an answer needs."""
        return self.safe_quorum if self.quorum is None else self.quorum

    @property
    def overrun(self) -> Fraction:
        """How many times the pinned number of sums a dishonest coordinator can have, with t - 1 dishonest aggregators.

        Each of the n - t + 1 honest ones signs as many as it pins, and each sum needs quorum - t + 1 of them. 3/2 for 3
        of 5 with the default quorum, 1 where the quorum is n. With an honest coordinator, who asks everybody, it is 1.
        A device's own count of its participations holds in any case.
        """
        spare = self.threshold - 1
        return Fraction(self.num_aggregators - spare, max(1, self.effective_quorum - spare))

    @property
    def smallest_part(self) -> int:
        """Reports that each part of a set has at least."""
        return self.min_bucket or self.min_cohort

    @property
    def bounds(self) -> EncodedBounds:
        """The grid and the norm that updates are clipped to where no indicator moves it."""
        return EncodedBounds(clip_norm=self.clip_norm, fraction_bits=self.fraction_bits)

    @property
    def aggregators_add_noise(self) -> bool:
        """Whether a sum holds noise that the aggregators drew."""
        return self.privacy is not None and self.privacy.noise == "aggregators"

    def projection_settings(self, size: int) -> ProjectionSettings:
        """What the checking mode ``projections`` depends on, for updates of so many coordinates.

        Raises:
            ConfigurationError: The mode does not go together with the sharing scheme.
            BudgetExceeded: An update could wrap around the field and pass.
        """
        return ProjectionSettings(
            num_aggregators=self.num_aggregators,
            threshold=self.threshold,
            field=PrimeField.by_name(self.field),
            bounds=self.bounds,
            size=size,
            packing=self.packing,
        )

    def round_parameters(self) -> RoundParameters:
        """What a statement says at least, and what a coordinator normally states."""
        privacy = self.privacy if self.aggregators_add_noise else None
        return RoundParameters(
            noise_multiplier=0.0 if privacy is None else privacy.noise_multiplier,
            bound=self.bounds.norm_bound,
            max_weight=self.max_weight,
            fraction_bits=self.fraction_bits,
            indicator_noise_multiplier=None if privacy is None else privacy.indicator_noise_multiplier,
        )

    def require(self, stated: RoundParameters) -> None:
        """Refuse parameters that are weaker than these.

        Raises:
            ParametersBelowPinned: The message names the parameter.
        """
        own = self.round_parameters()
        if stated.fraction_bits != own.fraction_bits:
            raise ParametersBelowPinned(f"fraction_bits {stated.fraction_bits} is not the pinned {own.fraction_bits}")
        if self.aggregators_add_noise:
            if (stated.indicator_noise_multiplier is None) != (own.indicator_noise_multiplier is None):
                raise ParametersBelowPinned("the indicator's noise multiplier is stated exactly where it is pinned")
        elif stated.noise_multiplier or stated.indicator_noise_multiplier is not None:
            raise ParametersBelowPinned("this aggregator is configured for a task whose noise is not the aggregators'")
        floors = {
            "max_weight": (stated.max_weight, own.max_weight),
            "noise_multiplier": (stated.noise_multiplier, own.noise_multiplier),
            "indicator_noise_multiplier": (
                stated.indicator_noise_multiplier or 0.0,
                own.indicator_noise_multiplier or 0.0,
            ),
            # With an indicator, the bound is compared with the reports' own.
            "bound": (stated.bound, 1 if self.indicator else own.bound),
        }
        for name, (value, floor) in floors.items():
            if value < floor:
                raise ParametersBelowPinned(f"{name} {value:g} is below the pinned {floor:g}")

    def sha256(self) -> str:
        """Hash (hex) of these parameters."""
        return digest("parameters", [self.model_dump_json()])
