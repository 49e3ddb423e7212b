"""Buckets in a private pipeline: one release, one charge, and a rule that stands dishonest clients."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    Aggregate,
    ClipGlobal,
    EncodedUpdate,
    ExactMean,
    Facts,
    NoNoise,
    Pipeline,
    PrivateAggregate,
    Sgd,
    Visibility,
)
from server_ref.aggregation.accounting import LedgerKeeper, PrivacyBudget, PrivacyLedger
from server_ref.aggregation.bucketed import BucketNoise, BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.errors import (
    IndividualUpdatesNeeded,
    NoiseMissing,
    NoiseUnexpected,
    PrivacyBudgetExhausted,
    UnboundedRange,
    UnknownSensitivity,
)
from server_ref.aggregation.noise import CentralNoise
from server_ref.aggregation.stages import Noise

SIZE, CLIENTS = 12, 63
SEED = bytes(16)
FACTS = Facts(SIZE, UpdateKind.DELTA, capacity=CLIENTS, count=CLIENTS)


def keeper(epsilon: float = 1e6, adjacency: Adjacency = Adjacency.ZERO_OUT) -> LedgerKeeper:
    return LedgerKeeper(PrivacyLedger(budget=PrivacyBudget(epsilon=epsilon, delta=1e-5, adjacency=adjacency)))


def pipeline(rule: BucketedRule, noise: Noise, facts: Facts = FACTS, *, private: bool = True) -> Pipeline:
    stages = (ClipGlobal(1.0), BucketSums(rule, SEED), BucketNoise(noise, rule), Sgd())
    return Pipeline.build(*stages, facts=facts, private=private)


def outcome(built: Pipeline, rows: np.ndarray, weights: list[int] | None = None) -> Aggregate:
    fold = built.start()
    weights = weights or [1] * len(rows)
    # Arrival in another order than the numbers.
    for i in reversed(range(len(rows))):
        fold.add([built.admit(EncodedUpdate(i, rows[i], weight=weights[i]))])
    return built.finish(fold)


def rows_of(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.25 + 0.02 * random.standard_normal((CLIENTS, SIZE))).astype(np.float32)


def test_a_partition_is_one_release():
    book = keeper()
    rule = BucketedRule(9, 3)
    book.open_round(0)
    found = outcome(pipeline(rule, CentralNoise(1e-3, book)), rows_of(0))
    assert isinstance(found, PrivateAggregate)
    assert len(book.ledger.events) == 1
    assert book.ledger.events[0].noise_multiplier == 1e-3
    assert found.values.shape == (SIZE,)
    assert found.noise_stddev == pytest.approx(1e-3 / 7, rel=1e-6)
    assert found.measurements["buckets"] == [7] * 9
    assert found.measurements["adjacency"] == "zero-out"
    assert (found.count, found.total_weight) == (CLIENTS, CLIENTS)
    # The rule chose one bucket's mean, and the noise is small.
    np.testing.assert_allclose(found.values, 0.25, atol=0.05)


def test_noise_of_the_full_scale_is_on_every_bucket():
    """The median of nine means, 400 coordinates: its spread is that of an order statistic of the declared noise."""
    size = 400
    facts = Facts(size, UpdateKind.DELTA, capacity=CLIENTS, count=CLIENTS)
    rule = BucketedRule(9, 0, "median")
    book = keeper()
    book.open_round(0)
    found = outcome(pipeline(rule, CentralNoise(7.0, book), facts), np.zeros((CLIENTS, size), np.float32))
    draws = np.random.default_rng(0).standard_normal((20_000, 9))
    expected = float(np.median(draws, axis=1).std())  # of means with a deviation of 7 / 7
    assert float(found.values.std()) == pytest.approx(expected, rel=5 / np.sqrt(2 * size))


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "median", "trimmed-mean"])
def test_dishonest_clients_do_not_carry_the_outcome_away(rule: str):
    rows = rows_of(1)
    rows[[3, 20, 41]] = -50.0
    book = keeper()
    book.open_round(0)
    found = outcome(pipeline(BucketedRule(9, 3, rule), CentralNoise(0.05, book)), rows)
    assert np.abs(found.values - 0.25).max() < 0.12


def test_weights_count_inside_a_bucket():
    """Public integer weights up to 5: one client moves its bucket's sum by 5 C, and the noise covers that."""
    rows, weights = rows_of(2), [1 + i % 5 for i in range(CLIENTS)]
    facts = Facts(SIZE, UpdateKind.DELTA, capacity=CLIENTS, count=CLIENTS, max_weight=5)
    rule = BucketedRule(9, 1, "median")
    book = keeper()
    book.open_round(0)
    found = outcome(pipeline(rule, CentralNoise(1e-3, book), facts), rows, weights)
    assert sum(found.measurements["buckets"]) == sum(weights)
    np.testing.assert_allclose(found.values, 0.25, atol=0.03)
    built = pipeline(rule, CentralNoise(1.0, keeper()), facts)
    assert built.released.sensitivity[Adjacency.ZERO_OUT] == 5.0


def test_a_spent_budget_releases_nothing():
    book = keeper(epsilon=1.0)
    built = pipeline(BucketedRule(9, 3), CentralNoise(5.0, book))
    book.open_round(0)
    outcome(built, rows_of(3))
    book.open_round(1)
    with pytest.raises(PrivacyBudgetExhausted):
        outcome(built, rows_of(3))


def test_without_noise_the_rule_sees_nothing():
    rule = BucketedRule(9, 3)
    with pytest.raises(NoiseMissing):
        pipeline(rule, NoNoise())
    with pytest.raises(NoiseMissing):
        outcome(pipeline(rule, NoNoise(), private=False), rows_of(4))


def test_what_does_not_fit_is_refused():
    rule = BucketedRule(9, 3)
    noise = CentralNoise(1.0, keeper())
    with pytest.raises(ConfigurationError, match="do not fill"):
        pipeline(rule, noise, Facts(SIZE, UpdateKind.DELTA, capacity=8))
    with pytest.raises(UnboundedRange):
        Pipeline.build(BucketSums(rule, SEED), BucketNoise(noise, rule), Sgd(), facts=FACTS)
    sums = Facts(SIZE, UpdateKind.DELTA, visibility=Visibility.SUM, norm_bound=1.0, capacity=CLIENTS)
    with pytest.raises(IndividualUpdatesNeeded, match="BucketedRule"):
        Pipeline.build(BucketSums(rule, SEED), BucketNoise(noise, rule), Sgd(), facts=sums)
    # One client more or less would move others to other buckets.
    hidden = Facts(SIZE, UpdateKind.DELTA, capacity=CLIENTS, constant_denominator=CLIENTS, arrival_public=False)
    adding = CentralNoise(1.0, keeper(adjacency=Adjacency.ADD_REMOVE), Adjacency.ADD_REMOVE)
    with pytest.raises(UnknownSensitivity):
        pipeline(rule, adding, hidden)
    book = keeper()
    book.open_round(0)
    alone = Pipeline.build(ClipGlobal(1.0), ExactMean(), BucketNoise(CentralNoise(1.0, book), rule), Sgd(), facts=FACTS)
    with pytest.raises(NoiseUnexpected, match="BucketSums"):
        outcome(alone, rows_of(5))


def test_the_order_of_arrival_changes_no_sum():
    rows = rows_of(6)
    rule = BucketedRule(9, 3)
    built = pipeline(rule, CentralNoise(1.0, keeper()))
    folds = [built.start(), built.start()]
    admitted = [built.admit(EncodedUpdate(i, row)) for i, row in enumerate(rows)]
    folds[0].add(admitted)
    folds[1].add(admitted[::-1])
    one, other = (fold.finish() for fold in folds)
    assert np.array_equal(one.values, other.values)
    assert one.measurements == other.measurements
