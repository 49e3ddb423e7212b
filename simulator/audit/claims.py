"""The sensitivities that the product claims, each with the code that it is claimed for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    BufferedSchedule,
    ClipGlobal,
    DecodeCompressed,
    EncodedUpdate,
    ExactMean,
    Facts,
    NoNoise,
    Pipeline,
    RobustRule,
    RuleOptions,
    SensitivityCalibrator,
    Sgd,
    StalenessPolicy,
)
from server_ref.aggregation.bucketed import BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.centred import centred_stages
from server_ref.aggregation.stages import Stage
from server_ref.aggregation.support_voting import SupportVoting
from simulator.audit.neighbours import Claim

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

CLIP_NORM, CLIENTS, SIZE, RATIO = 1.5, 13, 100, 0.05
KEPT = max(1, int(SIZE * RATIO))


def all_claims() -> Iterator[Claim]:
    """Every part of the product that names a sensitivity, under every adjacency for which it names one."""
    clip = ClipGlobal(CLIP_NORM)
    yield from _of_pipeline("mean, float64 bins", ExactMean(), clip)
    yield from _of_pipeline("mean, int64 grid", ExactMean("fixed"), clip)
    yield from _of_pipeline("weighted mean", ExactMean("fixed"), clip, weights=(7, 1))
    yield from _of_pipeline("stale updates", ExactMean("fixed"), clip, _buffered(), ages=(0, 3))
    yield from _of_pipeline("centred clipping", ExactMean(), *centred_stages(NoNoise(), size=SIZE, radius=CLIP_NORM))
    for rule, options in (
        ("krum", RuleOptions()),
        ("multi-krum", RuleOptions()),
        ("multi-krum", RuleOptions(m=CLIENTS - 5)),
        ("trimmed-mean", RuleOptions()),
        ("median", RuleOptions()),
    ):
        words = f"{rule}, m = {options.m}" if options.m else rule
        yield from _of_pipeline(words, RobustRule(rule, num_byzantine=5, options=options), clip)
    for method in ("topk", "randomk"):
        spec = CompressionSpec.parse(f"{method}:{RATIO},feedback=off")
        yield from _of_pipeline(f"{method}, clipped after", ExactMean(), clip, DecodeCompressed(spec), codec=spec)
    yield from calibrated("SensitivityCalibrator", lambda c: c.compute_sensitivity(RATIO, CLIP_NORM))
    yield from _of_buckets()
    yield from _of_votes()


def calibrated(name: str, claimed: Callable[[SensitivityCalibrator], float]) -> Iterator[Claim]:
    """What a calibrator says of the sum of top-k updates."""
    spec = CompressionSpec.parse(f"topk:{RATIO}")
    for adjacency in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE):
        runner = _Runner.of(ExactMean(), ClipGlobal(CLIP_NORM), DecodeCompressed(spec), codec=spec)
        yield Claim(
            name=name,
            adjacency=adjacency,
            sensitivity=claimed(SensitivityCalibrator(adjacency)),
            outcome=lambda rows, runner=runner: runner(rows) * CLIENTS,  # type: ignore[misc]
            clip_norm=CLIP_NORM,
            kept=KEPT,
            clients=CLIENTS,
            size=SIZE,
        )


@dataclass(frozen=True)
class _Runner:
    """A cohort through a pipeline up to its noise."""

    pipeline: Pipeline
    weights: tuple[int, ...]
    ages: tuple[int, ...]
    codec: Codec | None

    @classmethod
    def of(
        cls,
        *stages: Stage,
        weights: tuple[int, ...] = (1,),
        ages: tuple[int, ...] = (0,),
        codec: CompressionSpec | None = None,
    ) -> _Runner:
        facts = Facts(SIZE, UpdateKind.DELTA, capacity=CLIENTS, count=CLIENTS, max_weight=max(weights))
        if max(weights) > 1:
            # The weights' sum is public here, and the nominal one of the facts assumes weights of 1.
            facts = replace(facts, constant_denominator=CLIENTS)
        pipeline = Pipeline.build(*stages, Sgd(), facts=facts)
        return cls(pipeline, weights, ages, None if codec is None else Codec(codec, SIZE))

    def __call__(self, rows: Float32Array) -> Float64Array:
        fold = self.pipeline.start()
        for i, row in enumerate(rows):
            update = EncodedUpdate(
                number=i,
                payload=row if self.codec is None else self.codec.encode(row, seed=1),
                weight=self.weights[i % len(self.weights)],
                staleness=self.ages[i % len(self.ages)],
                seed=1,
            )
            fold.add([self.pipeline.admit(update, round_id=10)])
        return fold.finish().values


def _of_pipeline(
    name: str,
    *stages: Stage,
    weights: tuple[int, ...] = (1,),
    ages: tuple[int, ...] = (0,),
    codec: CompressionSpec | None = None,
) -> Iterator[Claim]:
    runner = _Runner.of(*stages, weights=weights, ages=ages, codec=codec)
    for adjacency, sensitivity in runner.pipeline.released.sensitivity.items():
        yield Claim(
            name=name,
            adjacency=adjacency,
            sensitivity=sensitivity,
            outcome=runner,
            clip_norm=CLIP_NORM,
            kept=SIZE if codec is None else KEPT,
            clients=CLIENTS,
            size=SIZE,
        )


def _buffered() -> BufferedSchedule:
    return BufferedSchedule(StalenessPolicy(exponent=1.0, max_staleness=5), CLIENTS)


def _of_buckets() -> Iterator[Claim]:
    """All buckets' sums together have the sensitivity of one: what a single charge for the partition rests on."""
    yield from _of_pipeline("sums of all buckets", BucketSums(BucketedRule(7, 2), bytes(16)), ClipGlobal(CLIP_NORM))


def _of_votes() -> Iterator[Claim]:
    """The count of ballots. Whoever sends nothing casts none."""
    for adjacency in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE):
        vote = SupportVoting(SIZE, KEPT, KEPT, noise_multiplier=1.0, adjacency=adjacency)

        def count(rows: Float32Array, vote: SupportVoting = vote) -> Float64Array:
            return vote.count(vote.ballot(row) for row in rows if row.any()).astype(np.float64)

        sensitivity = math.sqrt(vote.squared_sensitivity)
        yield Claim("votes for a support", adjacency, sensitivity, count, CLIP_NORM, KEPT, CLIENTS, SIZE)


def sqrt_ratio(calibrator: SensitivityCalibrator) -> float:
    """The planted bug: the sensitivity of a typical random-k update, claimed for any top-k one."""
    return calibrator.compute_sensitivity(RATIO, CLIP_NORM) * math.sqrt(RATIO)
