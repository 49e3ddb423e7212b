"""What a robust rule can be told. Loads no compiler, so that configuration can use it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_SKETCH_SIZE = 4096
DEFAULT_PEERS = 64


class DistanceMode(StrEnum):
    """How the squared distances between updates are computed."""

    EXACT = "exact"
    """Every pair, every coordinate: O(n^2 d)."""
    SKETCH = "sketch"
    """Every pair, from one CountSketch an update: O(n d + n^2 k)."""
    SAMPLED = "sampled"
    """Each update against r random others, every coordinate: O(n r d)."""


class Mixing(StrEnum):
    """What replaces the updates before the rule sees them."""

    NONE = "none"
    BUCKETING = "bucketing"
    """Means of random buckets: fewer, more alike rows."""
    NNM = "nnm"
    """Each update becomes the mean of its n - f nearest neighbours, itself included."""


class RuleOptions(BaseModel):
    """Options of ``apply_rule``. What a rule has no use for must stay None, or it is refused by name.

    Raises:
        pydantic.ValidationError: A value out of its range, or an unknown field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    m: int | None = Field(None, ge=1, description="multi-krum: rows to average; default n - f - 2, at most n - f")
    mode: DistanceMode = Field(DistanceMode.EXACT, description="how distances between updates are computed")
    sketch_size: int = Field(DEFAULT_SKETCH_SIZE, ge=16, le=2**20, description="mode sketch: numbers in a sketch")
    peers: int = Field(DEFAULT_PEERS, ge=2, description="mode sampled: others that each update is compared with")
    seed: int | None = Field(
        None,
        ge=0,
        description="of sketches, peers and buckets; drawn after the updates were submitted, new in every round",
    )
    mixing: Mixing = Field(Mixing.NONE, description="what replaces the updates before the rule sees them")
    bucket_size: int = Field(2, ge=1, description="mixing bucketing: updates in a bucket")
    radius: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="centered-clipping: longest step towards one update; default: the median distance to the start",
    )
    iterations: int | None = Field(
        None, ge=1, le=1000, description="geometric-median (default: at most 50) and centered-clipping (default: 3)"
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="geometric-median: stop at a step shorter than this part of the median distance to the start; "
        "default 1e-6",
    )
    degraded: bool = Field(
        default=False, description="assume fewer dishonest updates where the rule does not stand so many, and say so"
    )
