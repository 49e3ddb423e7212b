"""Buckets: a partition that nobody chose, and a rule that sees nothing but noised sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch, TooManyByzantine
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Adjacency, Aggregate, PrivateAggregate
from server_ref.aggregation.buckets import BucketedRule, assign_buckets, bucket_seed
from server_ref.aggregation.errors import NoiseMissing, NoiseUnexpected
from server_ref.aggregation.robust import RuleOptions

SEED = bytes(range(16))
NUMBERS = st.lists(st.integers(0, 2**40), min_size=8, max_size=60, unique=True)


def noised(values: np.ndarray, **changes: object) -> PrivateAggregate:
    made = PrivateAggregate(np.asarray(values, np.float64), UpdateKind.DELTA, 10, 10, noise_stddev=0.5)
    return replace(made, **changes)


# --- who is in which bucket ------------------------------------------------------------------------------------------


@given(NUMBERS, st.integers(1, 8), st.binary(min_size=16, max_size=32), st.sampled_from(Adjacency))
@settings(max_examples=60)
def test_every_report_is_in_exactly_one_bucket(numbers: list[int], count: int, seed: bytes, adjacency: Adjacency):
    buckets = assign_buckets(numbers, count, seed, adjacency=adjacency)
    assert len(buckets) == count
    assert sorted(n for bucket in buckets for n in bucket) == sorted(numbers)
    assert buckets == assign_buckets(numbers[::-1], count, seed, adjacency=adjacency)
    if adjacency is not Adjacency.ADD_REMOVE:
        sizes = [len(b) for b in buckets]
        assert max(sizes) - min(sizes) <= 1


@given(NUMBERS, st.integers(1, 8), st.data())
@settings(max_examples=40)
def test_one_report_more_or_less_moves_no_other_where_that_is_the_adjacency(
    numbers: list[int], count: int, data: st.DataObject
):
    """Otherwise one client would change several sums, and the sensitivity of all of them would be wrong."""
    gone = data.draw(st.sampled_from(numbers))
    before = assign_buckets(numbers, count, SEED, adjacency=Adjacency.ADD_REMOVE)
    after = assign_buckets([n for n in numbers if n != gone], count, SEED, adjacency=Adjacency.ADD_REMOVE)
    assert [tuple(n for n in bucket if n != gone) for bucket in before] == list(after)


def test_the_draw_is_even_and_goes_with_the_seed():
    draws = [assign_buckets(range(13), 13, i.to_bytes(16, "big")) for i in range(800)]
    counts = np.zeros((13, 13))
    for buckets in draws:
        for place, (number,) in enumerate(buckets):
            counts[number, place] += 1
    # Rows and columns are fixed: 144 degrees of freedom.
    chi2 = float(((counts - 800 / 13) ** 2 / (800 / 13)).sum())
    assert stats.chi2.sf(chi2, 144) > 1e-4


@pytest.mark.parametrize(
    ("numbers", "count", "seed"),
    [([1, 1], 2, SEED), ([-1, 2], 2, SEED), ([1, 2], 0, SEED), ([1, 2], 3, SEED), ([1, 2, 3], 2, b"short")],
)
def test_nonsense_is_refused(numbers: list[int], count: int, seed: bytes):
    with pytest.raises(ConfigurationError):
        assign_buckets(numbers, count, seed)


def test_every_contribution_counts_in_the_seed():
    whole = bucket_seed(3, [b"ab", b"c"])
    assert len(whole) == 32
    assert (
        len({whole, bucket_seed(4, [b"ab", b"c"]), bucket_seed(3, [b"a", b"bc"]), bucket_seed(3, [b"ab", b"d"])}) == 4
    )


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
def test_too_few_buckets_for_krum_are_refused(rule: str):
    BucketedRule(9, 3, rule)
    with pytest.raises(TooManyByzantine):
        BucketedRule(8, 3, rule)
    with pytest.raises(ConfigurationError, match="degraded"):
        BucketedRule(8, 3, rule, RuleOptions(degraded=True))


def test_only_noised_sums_are_looked_at():
    """A bucket without noise would turn the rule into a release of bare updates."""
    rule = BucketedRule(5, 1)
    good = [noised(np.full(3, i)) for i in range(5)]
    assert rule.combine(good).noise_stddev == 0.5
    bare = Aggregate(np.zeros(3), UpdateKind.DELTA, 10, 10)
    for bad in (bare, noised(np.zeros(3), noise_stddev=0.0)):
        with pytest.raises(NoiseMissing):
            rule.combine([*good[:4], bad])
    with pytest.raises(NoiseUnexpected):
        rule.combine([*good[:4], noised(np.zeros(3), adjacency=Adjacency.REPLACE_ONE)])
    for bad_shape in (noised(np.zeros(4)), noised(np.zeros(3), kind=UpdateKind.GRADIENT)):
        with pytest.raises(ShapeMismatch):
            rule.combine([*good[:4], bad_shape])
    with pytest.raises(ShapeMismatch):
        rule.combine(good[:4])


def test_the_claim_is_the_buckets_claim():
    rule = BucketedRule(5, 1, "multi-krum")
    buckets = [noised(np.full(3, i), noise_stddev=0.1 * (i + 1), adjacency=Adjacency.REPLACE_ONE) for i in range(5)]
    found = rule.combine(buckets)
    assert isinstance(found, PrivateAggregate)
    assert (found.adjacency, found.noise_stddev) == (Adjacency.REPLACE_ONE, 0.5)
    assert (found.count, found.total_weight, found.measurements["buckets"]) == (50, 50, [10] * 5)
    assert len(found.measurements["excluded_buckets"]) == 3
    assert not found.sensitivity, "what came out of a rule has no sensitivity that noise could be calibrated to"


@given(st.integers(0, 2**32), st.sampled_from(["krum", "multi-krum", "median", "trimmed-mean"]))
@settings(max_examples=20)
def test_three_dishonest_clients_do_not_carry_the_outcome_away(seed: int, rule: str):
    """90 clients, nine buckets; three clients send a long vector. The noised mean goes with them, the rule does not."""
    random = np.random.default_rng(seed)
    updates = random.standard_normal((90, 50)) * 0.1 + 1.0
    updates[:3] = -200.0
    buckets = assign_buckets(range(90), 9, seed.to_bytes(16, "big"))
    aggregates = [
        noised(updates[list(members)].mean(axis=0) + 0.05 * random.standard_normal(50), noise_stddev=0.05)
        for members in buckets
    ]
    found = BucketedRule(9, 3, rule).combine(aggregates).values
    mean = np.mean([a.values for a in aggregates], axis=0)
    assert np.abs(found - 1.0).max() < 0.5
    assert np.abs(mean - 1.0).min() > 5


def test_a_client_moves_one_bucket_and_that_by_no_more_than_its_norm():
    """What the one charge for all buckets rests on: their sums together have the sensitivity of one sum."""
    random = np.random.default_rng(1)
    updates = random.standard_normal((40, 20))
    updates /= np.linalg.norm(updates, axis=1, keepdims=True)
    buckets = assign_buckets(range(40), 7, SEED)

    def sums(rows: np.ndarray) -> np.ndarray:
        return np.stack([rows[list(members)].sum(axis=0) for members in buckets])

    for client in range(40):
        without = updates.copy()
        without[client] = 0.0
        moved = np.linalg.norm(sums(updates) - sums(without), axis=1)
        assert np.count_nonzero(moved > 1e-12) == 1
        assert moved.max() == pytest.approx(1.0)
