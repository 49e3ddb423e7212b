"""Settings that are each sound and do not go together: refused before a pipeline is built, with what to change.

What mathematics rules out among stages is the pipeline's to refuse. This is about settings that would be ignored, or
that would train a model on nothing.
"""

from __future__ import annotations

from typing import Final

from client_sdk.protocol.compression import Codec, CompressionMethod, CompressionSpec
from client_sdk.protocol.compression.rotation import block_size
from client_sdk.protocol.errors import ConfigurationError
from server_ref.config import AggregationConfig, TaskConfig

BY_COORDINATE: Final = frozenset({"median", "trimmed-mean", "bulyan"})
"""Rules that end with order statistics of each coordinate by itself."""

_OF_RULES: Final = {
    "mixing": "task.aggregation.mixing (--mixing)",
    "bucket_size": "task.aggregation.bucket_size",
    "distances": "task.aggregation.distances (--distances)",
    "degraded": "task.aggregation.degraded (--degraded)",
    "selected": "task.aggregation.selected",
}
_DAMPING: Final = "task.delay_damping (--delay-damping)"


def check_combinations(config: TaskConfig, spec: CompressionSpec | None, size: int) -> None:
    """Refuse what does not go together.

    Args:
        config: A task's settings.
        spec: Its compression; None for none.
        size: Coordinates of an update.

    Raises:
        ConfigurationError: The first combination found; the message says what to change.
    """
    _check_mean(config.aggregation)
    _check_delay(config)
    _check_adaptive_clipping(config)
    if spec is not None:
        _check_sparse(config, spec, size)


def expected_density(spec: CompressionSpec, size: int) -> float:
    """The share of updates that say something at a coordinate, in expectation, if each has a seed of its own.

    With a rotation each value that is sent speaks of its whole block, and a sketch's estimates are of every coordinate.
    Of a threshold nothing is known before there are updates: 0.

    Args:
        spec: What updates are compressed by.
        size: Coordinates of an update, from 1.

    Returns:
        From 0 to 1. For ``topk`` it is the mean over coordinates: devices may agree on theirs more than that, but
        nothing makes them, and error feedback drives them apart.
    """
    match spec.method:
        case CompressionMethod.NONE:
            return 1.0
        case CompressionMethod.COUNT_SKETCH:
            return 1.0 if spec.recover is None else spec.recover
        case CompressionMethod.TOPK | CompressionMethod.RANDOMK:
            sent = (Codec(spec, size).num_values or 0) / size
            return 1 - (1 - sent) ** block_size(size) if spec.rotation else sent
        case CompressionMethod.THRESHOLD:
            return 0.0


def _check_sparse(config: TaskConfig, spec: CompressionSpec, size: int) -> None:
    """A coordinate that at most half of the rows hold has a median of 0, whatever the others say.

    More than half is also where trimming stops taking more from a coordinate than the mean of all rows gives it: of
    equal values v in a share p of n rows, trimming f at each end leaves (p n - f) / (n - 2 f) v, which is p v at
    p = 1/2, and less below. Means of buckets hold what any of their updates holds. After mixing with n - f nearest
    neighbours every update is in more than half of the rows, so that there nothing is lost.
    """
    settings = config.aggregation
    if settings.rule not in BY_COORDINATE or settings.mixing == "nnm":
        return
    density = expected_density(spec, size)
    if settings.mixing == "bucketing":
        density = 1 - (1 - density) ** settings.bucket_size
    if config.privacy.buckets is not None:
        # The rule sees the buckets' sums.
        density = 1 - (1 - density) ** (config.buffer_size // config.privacy.buckets)
    if density > 0.5:
        return
    held = (
        "may hold hardly any coordinate" if spec.method is CompressionMethod.THRESHOLD else f"hold {density:.2g} of all"
    )
    raise ConfigurationError(
        f"{settings.rule} looks at one coordinate at a time, and updates sent as {spec} {held}: half or "
        "more of what it sees is 0, and its outcome 0 or hardly more. Choose a rule that compares whole updates "
        "(task.aggregation.rule, --rule: krum, multi-krum, geometric-median or centered-clipping), or mix with nearest "
        "neighbours first (task.aggregation.mixing, --mixing: nnm), or send every coordinate (task.compression, "
        "--compression: quantize:8)"
    )


def _check_mean(settings: AggregationConfig) -> None:
    if settings.rule != "mean":
        return
    fields = AggregationConfig.model_fields
    ignored = [words for name, words in _OF_RULES.items() if getattr(settings, name) != fields[name].default]
    if ignored:
        raise ConfigurationError(
            f"{' and '.join(ignored)}: the mean has no use for that; leave it out, or choose a robust rule "
            "(task.aggregation.rule, --rule)"
        )


def _check_adaptive_clipping(config: TaskConfig) -> None:
    """The clip norm belongs to a model version, and its bit to a sum of whole updates that nobody looks into."""
    if not config.privacy.adaptive_clipping:
        return
    wrong = None
    if config.staleness.tolerance(0) > 0:
        wrong = "all updates of a sum need one clip norm: set task.staleness.max_staleness = 0 (leave --async out)"
    elif config.aggregation.rule != "mean":
        wrong = "the noise is on a mean: choose that (task.aggregation.rule, --rule)"
    elif config.secure is not None and config.secure.checks != "trust-devices":
        wrong = "projections are checked against a fixed norm: set task.secure.checks (--checks) = trust-devices"
    if wrong is not None:
        raise ConfigurationError(f"task.privacy.adaptive_clipping (--adaptive-clipping): {wrong}, or leave it out")


def _check_delay(config: TaskConfig) -> None:
    """The correction presumes that the model moves by a constant times the aggregate, and the aggregate is a mean."""
    if config.delay_damping is None:
        return
    optimizer, instead = config.optimizer, "leave it out, or slow stale updates down by task.staleness (--stale-lr)"
    if config.staleness.tolerance(0) == 0:
        raise ConfigurationError(
            f"{_DAMPING} corrects stale updates, and none are accepted: set task.staleness.max_staleness (--async), or "
            "leave it out"
        )
    if config.aggregation.rule != "mean":
        raise ConfigurationError(
            f"{_DAMPING} corrects a mean by the steps that its updates missed, and {config.aggregation.rule} returns "
            f"no mean: choose the mean (task.aggregation.rule, --rule), or {instead}"
        )
    if config.plan.algorithm in {"fednova", "scaffold"}:
        raise ConfigurationError(
            f"{_DAMPING} corrects plain updates, and {config.plan.algorithm}'s are not: choose fedavg "
            f"(task.plan.algorithm, --algorithm), or {instead}"
        )
    if optimizer.name != "sgd" or optimizer.momentum:
        moves = f"{optimizer.name} with momentum" if optimizer.momentum else f"{optimizer.name}"
        raise ConfigurationError(
            f"{_DAMPING} presumes that the model moves by a constant times the aggregate, and {moves} moves it "
            f"otherwise: choose sgd without momentum (task.optimizer, --optimizer), or {instead}"
        )
