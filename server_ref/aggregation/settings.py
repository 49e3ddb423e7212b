"""What is declared of the updates that the specification's classes take: keywords, their bounds, their refusals."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import UpdateKind

CONTROL_DELTA: Final = "control_delta"
"""Metadata key of a SCAFFOLD worker: name -> tensor, what its control variate changed by."""

DEFAULT_MAX_ABS: Final = 1e10
"""Largest magnitude of a value where nothing is clipped: a hundred times what the specification asks for. With the
default bounds on weights and workers, values from 1e-8 on are still added exactly."""

_PRIVACY_KEYWORDS: Final = frozenset({"epsilon", "delta", "max_grad_norm", "noise_multiplier", "adaptive_clipping"})


class AggregationMethod(StrEnum):
    """What the workers did, and so what their updates mean."""

    FEDAVG = "fedavg"
    """Plain local training [McMahan et al. 2017]."""

    FEDPROX = "fedprox"
    """With a proximal term, which lives on the worker: the server does what it does for FedAvg [Li et al. 2020]."""

    SCAFFOLD = "scaffold"
    """With control variates: workers send a delta of theirs too [Karimireddy et al. 2020]."""

    FEDNOVA = "fednova"
    """With unequal numbers of local steps, by which the server normalises [Wang et al. 2020]."""


class IntakeOptions(TypedDict, total=False):
    """Keywords that all presets take; ``IntakeSettings`` documents them."""

    clip_scope: Literal["global", "layer"]
    max_weight: int
    max_abs: float | None
    max_workers: int
    max_local_steps: float
    population: int | None
    kind: UpdateKind | None
    denominator: int | None
    arrival_public: bool


class MethodOptions(IntakeOptions, total=False):
    """Likewise, where they are not among the positional ones."""

    aggregation_method: str
    clip_norm: float | None


class IntakeSettings(BaseModel):
    """What is declared of the updates, by the caller and for everybody.

    Attributes:
        aggregation_method: What the workers did.
        clip_norm: Largest L2 norm of an update; None for no bound.
        clip_scope: ``global``: of the whole update. ``layer``: each parameter gets its share of the squared norm, in
            proportion to its size.
        max_weight: ``num_samples`` counts up to this, so that no worker can weigh as much as it likes.
        max_abs: Largest magnitude of a value. None: any finite one where ``clip_norm`` bounds the sum anyway, else
            ``DEFAULT_MAX_ABS``.
        max_workers: Largest number of updates in one aggregate.
        max_local_steps: Largest number of local steps that a FedNova worker may claim.
        population: SCAFFOLD's N, the workers there are in all; None if all of them take part in every round.
        kind: What the workers send. None: whatever the first one sends, and an error if another sends something else.
        denominator: What the weighted sum is divided by; None for the weights' sum.
        arrival_public: As in ``Facts``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    aggregation_method: AggregationMethod = AggregationMethod.FEDAVG
    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    clip_scope: Literal["global", "layer"] = "global"
    max_weight: int = Field(2**20, ge=1, le=2**29)
    max_abs: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_workers: int = Field(100_000, ge=1)
    max_local_steps: float = Field(10_000, ge=1, allow_inf_nan=False)
    population: int | None = Field(None, ge=1)
    kind: UpdateKind | None = None
    denominator: int | None = Field(None, ge=1)
    arrival_public: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """The settings that these keywords make.

        Raises:
            ConfigurationError: An unknown keyword or a bad value; the message says what to change.
        """
        private = sorted(_PRIVACY_KEYWORDS & options.keys())
        if private:
            raise ConfigurationError(
                f"{', '.join(private)}: this class adds no noise, and claims no privacy. Differential privacy is a "
                "noise stage of its own with a ledger, for aggregates whose sensitivity is proved; it does not come "
                "with a robust rule or a compressed update by a keyword"
            )
        try:
            settings = cls(**options)
        except ValidationError as e:
            causes = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
            raise ConfigurationError(causes) from e
        if settings.needs_deltas and settings.kind is UpdateKind.GRADIENT:
            raise ConfigurationError(f"{settings.aggregation_method} workers send deltas; leave kind out")
        return settings

    @property
    def needs_deltas(self) -> bool:
        """Whether the method is about the outcome of local training."""
        return self.aggregation_method in {AggregationMethod.SCAFFOLD, AggregationMethod.FEDNOVA}

    @property
    def range_bound(self) -> float | None:
        """Declared bound on the magnitude of a value."""
        return DEFAULT_MAX_ABS if self.max_abs is None and self.clip_norm is None else self.max_abs
