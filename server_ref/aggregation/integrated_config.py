"""What an integrated task is told: compression, privacy, security and asynchrony, each a section of its own.

What a section can say by itself is checked by its bounds. What two of them say together is checked here where it needs
no pipeline, and by the pipeline's own construction where it does (``integrated``): every refusal is a class of its own.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.compression import CompressionMethod, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.errors import CohortDependentAcceptance, DataDependentSupport, UnderstatedSensitivity
from server_ref.aggregation.sensitivity_calibrator import Compression, SensitivityCalibrator

MEAN = "mean"
CENTRED = "centered-clipping"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CompressionConfig(_Section):
    """What crosses the network of an update.

    Attributes:
        method: ``randomk``: coordinates drawn from a public seed, new with every model version. ``voted``: coordinates
            that the workers elect once, by a private vote. ``topk``: each worker's own largest; not with privacy.
        ratio: Share of the coordinates.
        value_bits: 32 (as they are), 8, 4 or 1 bits a value.
        error_feedback: Whether workers add what they did not send to their next update. They keep it, not the server.
        seed: Public; what ``randomk`` draws from, together with the model version.
    """

    method: Literal["none", "randomk", "topk", "voted"] = "randomk"
    ratio: float = Field(0.1, gt=0, le=1)
    value_bits: Literal[32, 8, 4, 1] = 32
    error_feedback: bool = False
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def spec(self) -> CompressionSpec:
        """The codec of a payload; of a voted support's values where there is one."""
        if self.method in {"none", "voted"}:
            return CompressionSpec(value_bits=self.value_bits, error_feedback=False)
        return CompressionSpec(
            method=CompressionMethod(self.method),
            ratio=self.ratio,
            value_bits=self.value_bits,
            error_feedback=self.error_feedback,
        )


class PrivacyConfig(_Section):
    """Differential privacy at client level, in the central mode: against whoever sees aggregates.

    Attributes:
        enabled: Without it no noise is added and nothing is claimed; the clip norm holds all the same.
        epsilon: Budget of all aggregates together, and of the vote.
        delta: Its other half.
        max_grad_norm: C: updates are clipped to it as they are aggregated, after decompression.
        rounds: Aggregates that the budget is calibrated for.
        participations: In how many of them one worker counts at most, which is enforced; None: in all.
        adjacency: ``zero-out`` or ``replace-one``. Buffers that close by count hide nobody's arrival.
        sensitivity: How far one worker moves the sum, where the caller thinks to know. It is checked, not used: noise
            is calibrated to what is proved.
    """

    enabled: bool = True
    epsilon: float = Field(1.0, gt=0, allow_inf_nan=False)
    delta: float = Field(1e-5, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    rounds: int = Field(100, ge=1)
    participations: int | None = Field(None, ge=1)
    adjacency: Literal["zero-out", "replace-one"] = "zero-out"
    sensitivity: float | None = Field(None, gt=0, allow_inf_nan=False)


class SecurityConfig(_Section):
    """What is done against dishonest workers.

    Attributes:
        rule: ``mean``, or a name of ``robust.RULES``. With privacy and without buckets ``centered-clipping`` clips to
            ``max_grad_norm`` around the previous private aggregate.
        num_byzantine: f, dishonest workers in a buffer that the rule has to stand.
        buckets: R: the rule looks at noised sums of R buckets (2f + 3 and more for Krum), instead of at updates. None:
            no buckets.
        inspect_updates: Whether the attack detector judges every compressed update before it counts. Not with privacy.
    """

    rule: str = "multi-krum"
    num_byzantine: int = Field(3, ge=0)
    buckets: int | None = Field(9, ge=1)
    inspect_updates: bool = False


class AsyncConfig(_Section):
    """When a buffer is full, and who is too old for it.

    Attributes:
        buffer_size: Accepted updates that make an aggregate.
        max_staleness: tau_max, oldest update accepted: aggregates made since its model.
        staleness_exponent: a: an update of age s weighs (1 + s) ** -a; 0 for no difference.
    """

    buffer_size: int = Field(100, ge=1)
    max_staleness: int = Field(5, ge=0)
    staleness_exponent: float = Field(0.5, ge=0, allow_inf_nan=False)


class FederatedConfig(_Section):
    """Everything that ``IntegratedFederatedAggregator`` is told. The defaults go together.

    Raises:
        DataDependentSupport: Privacy, and workers choose coordinates by their data.
        UnderstatedSensitivity: A declared sensitivity below the proved one, such as ``C sqrt(ratio)``.
        CohortDependentAcceptance: Privacy, and a detector that judges an update by the others.
        ConfigurationError: Sections that contradict one another; the message says what to change.
        pydantic.ValidationError: A field out of its bounds, or an unknown one.

    Example:
        >>> FederatedConfig(privacy=PrivacyConfig(sensitivity=0.1), compression=CompressionConfig(ratio=0.01))
        Traceback (most recent call last):
        ...
        server_ref.aggregation.errors.UnderstatedSensitivity: a sensitivity of 0.1 is declared, and one worker moves \
the sum by up to 1: compression does not shorten the longest update; leave privacy.sensitivity out
    """

    compression: CompressionConfig = CompressionConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    security: SecurityConfig = SecurityConfig()
    async_config: AsyncConfig = AsyncConfig()

    @model_validator(mode="after")
    def _sound(self) -> Self:
        privacy, security, compression = self.privacy, self.security, self.compression
        if security.rule == MEAN and (security.num_byzantine or security.buckets):
            raise ConfigurationError("the mean stands no dishonest worker; set num_byzantine=0 and buckets=None")
        if not privacy.enabled:
            if security.buckets:
                raise ConfigurationError("buckets are for noise; without privacy the rule may look at single updates")
            if compression.method == "voted":
                raise ConfigurationError("a vote without noise is top-k of everybody; use topk, or enable privacy")
            return self
        if compression.method == "topk":
            raise DataDependentSupport(
                "which coordinates of a worker's update are the largest says something of its data, and noise on the "
                "sum does not hide it; use randomk, or let the workers elect a support (voted)"
            )
        if security.inspect_updates:
            raise CohortDependentAcceptance(
                "the detector judges an update by others', so one worker can change whether another counts; use it on "
                "aggregates, or drop the noise"
            )
        self._check_sensitivity()
        return self

    def _check_sensitivity(self) -> None:
        method: Compression = "none" if self.compression.method in {"none", "voted"} else "randomk"
        calibrator = SensitivityCalibrator(Adjacency(self.privacy.adjacency))
        proved = calibrator.compute_sensitivity(
            self.compression.ratio,
            self.privacy.max_grad_norm,
            method=method,
            error_feedback=self.compression.error_feedback,
        )
        declared = self.privacy.sensitivity
        if declared is not None and declared < proved and not math.isclose(declared, proved):
            raise UnderstatedSensitivity(
                f"a sensitivity of {declared:g} is declared, and one worker moves the sum by up to {proved:g}: "
                "compression does not shorten the longest update; leave privacy.sensitivity out"
            )

    @property
    def most(self) -> int | None:
        """Aggregates in which one worker counts at most; None where it may be in all that are paid for."""
        most = self.privacy.participations
        return None if most is None else min(most, self.privacy.rounds)

    @property
    def releases(self) -> int:
        """Releases that one worker's data enters at most, the vote included: what the noise is calibrated for."""
        return (self.most or self.privacy.rounds) + (self.compression.method == "voted")
