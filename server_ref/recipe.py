"""From a task's settings to its pipeline: the one place where names become stages.

The server and the simulator's cohort engine build the same objects here, so that they cannot differ.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Manifest
from client_sdk.protocol.training import TrainingPlan, normaliser, update_size
from server_ref.aggregation.accounting import LedgerKeeper
from server_ref.aggregation.admission import (
    ClipGlobal,
    ClipLayers,
    DecodeCompressed,
    DecodeDense,
    NoClip,
    ValidateFacts,
)
from server_ref.aggregation.batch import Facts, Visibility
from server_ref.aggregation.bucketed import BucketNoise, BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.errors import IndividualUpdatesNeeded, UnknownSensitivity
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.release import ExternalNoise, NoNoise
from server_ref.aggregation.robust import DistanceMode, Mixing, RuleOptions
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.scaffold import Scaffold
from server_ref.aggregation.server_optim import server_optimizer
from server_ref.aggregation.shared_sum import SharedSum
from server_ref.aggregation.stages import Apply, Clip, Decode, Noise, Reduce, Schedule
from server_ref.aggregation.staleness import BufferedSchedule, SynchronousSchedule
from server_ref.combinations import check_combinations
from server_ref.config import TaskConfig
from server_ref.privacy_plan import PrivacyPlan
from server_ref.secure.integer_krum import integer_krum
from server_ref.secure.round_selection import Select
from server_ref.secure_plan import SharingPlan, grid_of, selects_by_distance


def build_pipeline(
    config: TaskConfig,
    manifest: Manifest,
    *,
    privacy: PrivacyPlan | None = None,
    keeper: LedgerKeeper | None = None,
) -> Pipeline:
    """The pipeline of a task.

    Args:
        config: Its settings.
        manifest: Of its program: sizes, layers. Those that are personal are no part of any update.
        privacy: The noise that they come to; None for none.
        keeper: The ledger that is asked before noise is drawn here.

    Raises:
        PipelineError: Settings that do not go together; the message says what to change.
        ConfigurationError: A setting that cannot be.
    """
    shared = SharedLayers.of(manifest.parameters, config.plan.personal)
    size = update_size(config.plan, shared.size)
    if (privacy is not None or config.secure is not None) and config.aggregation.clip_scope != "global":
        raise ConfigurationError("private and shared updates have one bound, on the whole: set clip_scope = global")
    spec = compression_of(config)
    check_combinations(config, spec, size)
    if config.secure is not None:
        return _of_shares(config, size, privacy)
    facts = Facts(
        size=size,
        kind=config.plan.update_kind,
        capacity=config.capacity,
        count=config.buffer_size,
        max_weight=config.max_weight,
        max_abs=config.max_abs,
    )
    schedule = _schedule(config)
    reduce, noise = _reduce_and_noise(config, size, schedule.derive(facts).max_scale, privacy, keeper)
    return Pipeline.build(
        schedule,
        ValidateFacts(max_normaliser=_max_normaliser(config.plan)),
        _decode(spec),
        _clip(config, shared),
        reduce,
        noise,
        _apply(config),
        facts=facts,
        private=privacy is not None,
    )


def _of_shares(config: TaskConfig, size: int, privacy: PrivacyPlan | None) -> Pipeline:
    """The pipeline of a task whose updates are summed by aggregators: this server sees sums only."""
    settings = config.aggregation
    if selects_by_distance(config):
        _check_distances(config)
    if config.plan.algorithm in {"scaffold", "fednova"}:
        raise ConfigurationError(
            f"{config.plan.algorithm}'s updates are not clipped as one vector of public scale, and cannot be shared: "
            "choose fedavg, or leave task.secure out"
        )
    schedule = _schedule(config)
    facts = Facts(
        size=size,
        kind=config.plan.update_kind,
        visibility=Visibility.SUM,
        capacity=config.capacity,
        count=config.buffer_size,
        max_weight=config.max_weight,
        norm_bound=settings.clip_norm,
    )
    bounds = grid_of(config, size, schedule.derive(facts).max_scale, privacy)
    noise = NoNoise() if privacy is None else ExternalNoise(privacy.budget.adjacency, privacy.least_multiplier)
    return Pipeline.build(schedule, SharedSum(bounds), noise, _apply(config), facts=facts, private=privacy is not None)


def _check_distances(config: TaskConfig) -> None:
    """Whether a rule can choose among updates that nobody sees."""
    rule, secure = config.aggregation.rule, config.secure
    if rule != "multi-krum":
        raise IndividualUpdatesNeeded(
            f"{rule} looks at single updates, and with task.secure this server sees their sum only: choose the mean, "
            "multi-krum (which needs the distances between them only), let the rule choose among noised sums "
            "(task.privacy.buckets), or leave task.secure out"
        )
    if config.privacy.enabled:
        raise UnknownSensitivity(
            "the distances between updates carry no noise, so that opening them voids the privacy claim: let the rule "
            "choose among noised sums (task.privacy.buckets), choose the mean, or drop the claim"
        )
    if secure is not None and secure.checks != "projections":
        raise ConfigurationError(
            "an update that wraps around the field can be near to all others and anywhere in the sum: multi-krum on "
            "shares needs task.secure.checks = projections"
        )


def select_by_distance(config: TaskConfig) -> Select | None:
    """Multi-Krum on the distances between shared updates; None where no rule chooses.

    Raises:
        ConfigurationError: Nothing says how many dishonest updates it stands.
        TooManyByzantine: It does not stand so many of a buffer.
    """
    if not selects_by_distance(config):
        return None
    dishonest, chosen = _declared_dishonest(config), config.aggregation.selected

    def select(distances: Sequence[int], count: int) -> Sequence[int]:
        return integer_krum(distances, count, dishonest, m=chosen).selected

    # What no buffer could be chosen from is an error of the settings.
    select([0] * (config.buffer_size * (config.buffer_size - 1) // 2), config.buffer_size)
    return select


def _declared_dishonest(config: TaskConfig) -> int:
    settings = config.aggregation
    if settings.num_byzantine is not None:
        return settings.num_byzantine
    if settings.byzantine_fraction is None:
        raise ConfigurationError(
            "nobody can be counted where no update is seen: say how many dishonest devices the rule stands "
            "(task.aggregation.num_byzantine)"
        )
    return math.floor(settings.byzantine_fraction * config.buffer_size)


def bucketed_rule(config: TaskConfig) -> BucketedRule | None:
    """The rule that looks at noised sums; None where none does.

    Raises:
        ConfigurationError: Buckets for the mean, which needs none, or a rule that does not stand so many of them.
    """
    settings, buckets = config.aggregation, config.privacy.buckets
    if buckets is None:
        return None
    if settings.rule == "mean":
        raise ConfigurationError(
            "buckets are for a robust rule to choose from: set task.aggregation.rule, or leave task.privacy.buckets out"
        )
    dishonest = _declared_dishonest(config)
    return BucketedRule(buckets, dishonest, settings.rule, RuleOptions(m=settings.selected))


def _reduce_and_noise(
    config: TaskConfig, size: int, max_scale: int, privacy: PrivacyPlan | None, keeper: LedgerKeeper | None
) -> tuple[Reduce, Noise]:
    if privacy is None or keeper is None:
        return _reduce(config, size, max_scale, privacy), NoNoise()
    noise = CentralNoise(
        privacy.schedule or privacy.noise_multiplier,
        keeper,
        privacy.budget.adjacency,
        indicators=privacy.clip_norm is not None,
    )
    rule = bucketed_rule(config)
    if rule is None:
        return _reduce(config, size, max_scale, privacy), noise
    # Who meets whom in a bucket is drawn anew in each process, and known to nobody before the buffer is full.
    return BucketSums(rule, os.urandom(32), privacy.most_noise_per_clip_norm), BucketNoise(noise, rule)


def compression_of(config: TaskConfig) -> CompressionSpec | None:
    """The parsed ``compression`` setting; None for updates that travel as they are, however that is said."""
    spec = CompressionSpec.parse(config.compression or "none")
    return None if spec.is_none else spec


def max_payload_bytes(config: TaskConfig, manifest: Manifest, sharing: SharingPlan | None = None) -> int:
    """Largest number of bytes of an update on the wire, without its frame."""
    if sharing is not None:
        return sharing.layout.payload_bytes
    size = update_size(config.plan, SharedLayers.of(manifest.parameters, config.plan.personal).size)
    spec = compression_of(config)
    return 4 * size if spec is None else Codec(spec, size).max_bytes


def _max_normaliser(plan: TrainingPlan) -> float:
    if plan.algorithm != "fednova":
        return 1.0
    if plan.max_steps is None:
        raise ConfigurationError(
            "fednova multiplies the mean by the devices' own claims of local steps, which needs a bound: set "
            "task.plan.max_steps"
        )
    return normaliser(plan, plan.max_steps)


def _schedule(config: TaskConfig) -> Schedule:
    if config.staleness.max_staleness == 0:
        return SynchronousSchedule()
    return BufferedSchedule(config.staleness, config.buffer_size)


def _decode(spec: CompressionSpec | None) -> Decode:
    return DecodeDense() if spec is None else DecodeCompressed(spec)


def _clip(config: TaskConfig, shared: SharedLayers) -> Clip:
    settings = config.aggregation
    if settings.clip_norm is None:
        return NoClip()
    if settings.clip_scope == "global":
        return ClipGlobal(settings.clip_norm)
    d = shared.size
    # SCAFFOLD's second half has the same layers.
    starts = range(0, update_size(config.plan, d), d)
    layers = tuple((at + p.offset, at + p.offset + p.num_elements) for at in starts for p in shared.shared)
    return ClipLayers(settings.clip_norm, tuple(layer for layer in layers if layer[0] < layer[1]))


def _reduce(config: TaskConfig, size: int, max_scale: int, privacy: PrivacyPlan | None) -> Reduce:
    settings, renormalise = config.aggregation, config.plan.algorithm == "fednova"
    if settings.rule == "mean":
        if settings.num_byzantine or settings.byzantine_fraction:
            raise ConfigurationError(
                "the mean stands no dishonest update; choose a robust rule (task.aggregation.rule), or do not name a "
                "number of dishonest updates"
            )
        if privacy is None:
            return ExactMean(settings.arithmetic, resolution=config.resolution, renormalise=renormalise)
        # Noise is as exact as the sum that it is added to: both are integers.
        return ExactMean("fixed", renormalise=renormalise, bounds=grid_of(config, size, max_scale, privacy))
    return RobustRule(
        settings.rule,
        num_byzantine=settings.num_byzantine,
        byzantine_fraction=settings.byzantine_fraction,
        options=RuleOptions(
            m=settings.selected,
            mode=DistanceMode(settings.distances),
            mixing=Mixing(settings.mixing),
            bucket_size=settings.bucket_size,
            degraded=settings.degraded,
        ),
        seed=config.seed,
        renormalise=renormalise,
    )


def _apply(config: TaskConfig) -> Apply:
    optimizer = server_optimizer(config.optimizer, learning_rate=config.server_learning_rate)
    if config.plan.algorithm != "scaffold":
        return optimizer
    if config.population is None:
        raise ConfigurationError("scaffold needs the number of devices in all: set task.population")
    return Scaffold(optimizer, config.buffer_size / config.population)
