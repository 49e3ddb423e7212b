"""Centred clipping as two stages of a private pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    Aggregate,
    EncodedUpdate,
    ExactMean,
    Facts,
    NoNoise,
    Pipeline,
    PrivateAggregate,
    Sgd,
    Visibility,
)
from server_ref.aggregation.centred import centred_stages
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.aggregation.robust import RuleOptions, centered_clipping
from tests.noise import CalibratedNoise

SIZE, COUNT, RADIUS = 30, 20, 0.5
FACTS = Facts(SIZE, UpdateKind.DELTA, capacity=COUNT, count=COUNT)


def released(values: np.ndarray) -> PrivateAggregate:
    return PrivateAggregate(values, UpdateKind.DELTA, COUNT, COUNT, noise_stddev=0.1)


def outcome(rows: np.ndarray, previous: PrivateAggregate | None, noise: object = None) -> Aggregate:
    stages = centred_stages(noise or NoNoise(), size=SIZE, radius=RADIUS, previous=previous)
    pipeline = Pipeline.build(*stages, ExactMean(), Sgd(), facts=FACTS)
    fold = pipeline.start()
    fold.add([pipeline.admit(EncodedUpdate(i, row)) for i, row in enumerate(rows)])
    return pipeline.finish(fold)


def rows_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((COUNT, SIZE)).astype(np.float32)


@pytest.mark.parametrize("centred", [False, True])
def test_without_noise_it_is_one_pass_of_the_rule(centred: bool):
    rows = rows_of(1)
    centre = np.random.default_rng(2).standard_normal(SIZE).astype(np.float32).astype(np.float64)
    previous = released(centre) if centred else None
    expected = centered_clipping(
        rows, 1, RuleOptions(radius=RADIUS, iterations=1), centre=centre if centred else np.zeros(SIZE)
    )
    np.testing.assert_allclose(outcome(rows, previous).values, expected.values, rtol=1e-5, atol=1e-6)


def test_noise_is_calibrated_to_the_radius_and_no_client_moves_the_outcome_further():
    rows, previous = rows_of(3), released(np.full(SIZE, 0.3))
    found = outcome(rows, previous, CalibratedNoise(2.0))
    assert isinstance(found, PrivateAggregate)
    assert found.noise_stddev == pytest.approx(2.0 * RADIUS / COUNT)
    plain = outcome(rows, previous)
    for attack in (1e6, -1e6, 1e-3):
        changed = rows.copy()
        changed[4] = attack * np.ones(SIZE)
        moved = np.linalg.norm(outcome(changed, previous).values - plain.values)
        assert moved <= plain.sensitivity[Adjacency.REPLACE_ONE] * (1 + 1e-6)
    assert plain.sensitivity[Adjacency.REPLACE_ONE] == pytest.approx(2 * RADIUS / COUNT)
    # Attained, by opposite updates.
    ends = [rows.copy(), rows.copy()]
    ends[0][4], ends[1][4] = 1e6, -1e6
    apart = np.linalg.norm(outcome(ends[0], previous).values - outcome(ends[1], previous).values)
    assert apart == pytest.approx(2 * RADIUS / COUNT, rel=1e-4)


def test_a_centre_that_was_released_without_noise_is_refused():
    bare = Aggregate(np.zeros(SIZE), UpdateKind.DELTA, COUNT, COUNT)
    with pytest.raises(ConfigurationError, match="without noise"):
        centred_stages(NoNoise(), size=SIZE, radius=1.0, previous=bare)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_is_positive_and_finite(radius: float):
    with pytest.raises(ConfigurationError):
        centred_stages(NoNoise(), size=SIZE, radius=radius)


def test_centres_of_another_size_and_sums_are_refused():
    with pytest.raises(ShapeMismatch):
        centred_stages(NoNoise(), size=SIZE + 1, radius=1.0, previous=released(np.zeros(SIZE)))
    clip, _ = centred_stages(NoNoise(), size=SIZE, radius=1.0)
    with pytest.raises(IndividualUpdatesNeeded):
        clip.derive(Facts(SIZE, UpdateKind.DELTA, visibility=Visibility.SUM, norm_bound=1.0))
    with pytest.raises(ShapeMismatch):
        clip.derive(Facts(SIZE + 1, UpdateKind.DELTA))


def test_the_table_says_what_is_done():
    stages = centred_stages(CalibratedNoise(1.0), size=SIZE, radius=RADIUS)
    table = Pipeline.build(*stages, ExactMean(), Sgd(), facts=FACTS, private=True).describe()
    assert "difference from a public centre <= 0.5" in table
    assert "the public centre is added back" in table
