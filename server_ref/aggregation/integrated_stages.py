"""The stages that a ``FederatedConfig`` comes to."""

from __future__ import annotations

from collections.abc import Callable

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.accounting import LedgerKeeper
from server_ref.aggregation.admission import ClipGlobal, DecodeCompressed
from server_ref.aggregation.batch import Adjacency, Aggregate, Facts
from server_ref.aggregation.bucketed import BucketNoise, BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.centred import centred_stages
from server_ref.aggregation.integrated_config import CENTRED, MEAN, FederatedConfig
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.server_optim import Sgd
from server_ref.aggregation.stages import Reduce, Stage
from server_ref.aggregation.staleness import BufferedSchedule, StalenessPolicy, StalenessWeighting
from server_ref.aggregation.support_voting import SupportVoting


def schedule_of(config: FederatedConfig) -> BufferedSchedule:
    """Who is too old, and what age costs."""
    timing = config.async_config
    weighting = StalenessWeighting.POLYNOMIAL if timing.staleness_exponent else StalenessWeighting.CONSTANT
    policy = StalenessPolicy(
        weighting=weighting, exponent=timing.staleness_exponent, max_staleness=timing.max_staleness
    )
    return BufferedSchedule(policy, timing.buffer_size)


def stages_of(
    config: FederatedConfig,
    facts: Facts,
    *,
    keeper: LedgerKeeper | None,
    noise_multiplier: float,
    previous: Aggregate | None,
    random: Callable[[int], bytes],
) -> list[Stage]:
    """One stage for each slot, for ``Pipeline.build``, which refuses what is not sound.

    Args:
        config: What is enabled.
        facts: Of the updates.
        keeper: Who pays; None without privacy.
        noise_multiplier: Of each release.
        previous: The last aggregate, for centred clipping.
        random: Source of noise and of the buckets' draw.
    """
    security, clip_norm = config.security, config.privacy.max_grad_norm
    start: list[Stage] = [schedule_of(config), DecodeCompressed(config.compression.spec), Sgd()]
    clip = ClipGlobal(clip_norm)
    if keeper is None:
        return [*start, clip, ExactMean() if security.rule == MEAN else _on_updates(config, random)]
    noise = CentralNoise(noise_multiplier, keeper, Adjacency(config.privacy.adjacency), random=random)
    mean = ExactMean("fixed", noise_multiplier=noise_multiplier)
    if security.buckets is not None:
        rule = BucketedRule(security.buckets, security.num_byzantine, security.rule)
        return [*start, clip, BucketSums(rule, random(16), noise_multiplier), BucketNoise(noise, rule)]
    if security.rule == CENTRED:
        return [*start, mean, *centred_stages(noise, size=facts.size, radius=clip_norm, previous=previous)]
    return [*start, clip, mean if security.rule == MEAN else _on_updates(config, random), noise]


def voting_of(config: FederatedConfig, size: int, noise_multiplier: float) -> SupportVoting:
    """The vote about a common support for a model of ``size`` coordinates.

    Raises:
        ConfigurationError: The configuration has none.
    """
    if config.compression.method != "voted":
        raise ConfigurationError("there is no vote; set compression.method='voted'")
    kept = max(1, int(size * config.compression.ratio))
    return SupportVoting(size, kept, kept, noise_multiplier, Adjacency(config.privacy.adjacency))


def _on_updates(config: FederatedConfig, random: Callable[[int], bytes]) -> Reduce:
    security = config.security
    return RobustRule(security.rule, security.num_byzantine, seed=int.from_bytes(random(6), "big"))
