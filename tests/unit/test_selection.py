"""Selection by speed with a floor, and by participation."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from server_ref.selection import (
    LATENCIES_KEPT,
    LatencyTracker,
    jain_index,
    selection_probabilities,
    selection_ratio,
)

LATENCY = st.floats(0, 1e6)
ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), LATENCY), max_size=80)


@given(st.dictionaries(st.text(max_size=4), st.none() | LATENCY, min_size=1, max_size=40), st.floats(0, 1))
def test_probabilities_sum_to_one_respect_the_floor_and_prefer_the_fast(latencies, floor):
    found = selection_probabilities(latencies, floor=floor)
    assert found.keys() == latencies.keys()
    assert abs(math.fsum(found.values()) - 1) < 1e-12
    assert min(found.values()) >= floor / len(found)
    known = sorted((s, found[d]) for d, s in latencies.items() if s is not None)
    assert all(a >= b for (_, a), (_, b) in itertools.pairwise(known))


def test_probabilities_by_hand():
    found = selection_probabilities({"fast": 1.0, "slow": 4.0, "new": None}, floor=0.3)
    speeds = {"fast": Fraction(1), "slow": Fraction(1, 4), "new": Fraction(2, 5)}  # the newcomer: the mean, 2.5 s
    for device, speed in speeds.items():
        assert found[device] == pytest.approx(0.1 + 0.7 * float(speed / sum(speeds.values())), rel=1e-14)


def test_where_nothing_is_known_all_are_alike():
    assert selection_probabilities({}) == {}
    assert selection_probabilities({"a": None, "b": None}, floor=0.0) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("latency", [-1.0, math.inf, math.nan])
def test_a_latency_that_cannot_be_is_refused_and_changes_nothing(latency):
    with pytest.raises(ConfigurationError):
        selection_probabilities({"a": latency})
    tracker = LatencyTracker()
    with pytest.raises(ConfigurationError):
        tracker.record("a", latency)
    assert tracker.means() == {}


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_a_floor_that_is_no_share_is_refused(floor):
    with pytest.raises(ConfigurationError):
        selection_probabilities({"a": 1.0}, floor=floor)


@given(ROWS)
def test_a_device_is_judged_by_its_latest_latencies(rows):
    tracker = LatencyTracker()
    for device, latency in rows:
        tracker.record(device, latency)
    for device in "abcdefgh":
        latest = [max(s, 1e-6) for d, s in rows if d == device][-LATENCIES_KEPT:]
        expected = statistics.fmean(latest) if latest else None
        assert tracker.mean(device) == (expected and pytest.approx(expected, rel=1e-12))
    again = LatencyTracker()
    for device, latency in tracker.rows():
        again.record(device, latency)
    assert again.means() == tracker.means()


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_jain_s_index_is_what_its_definition_says(counts):
    squares = sum(c * c for c in counts)
    expected = Fraction(sum(counts) ** 2, len(counts) * squares) if squares else 1
    assert jain_index(counts) == pytest.approx(float(expected), rel=1e-12)


def test_fairness_figures_at_their_ends():
    assert jain_index([]) == jain_index([0, 0]) == jain_index([7, 7, 7]) == 1.0
    assert jain_index([5, 0, 0, 0]) == 0.25
    assert selection_ratio({"a": 1, "b": 4, "c": 6}, ["a"]) == 0.2
    for counts, slow in (({"a": 1}, ["b"]), ({"a": 1}, ["a"]), ({"a": 1, "b": 0}, ["a"])):
        with pytest.raises(ConfigurationError):
            selection_ratio(counts, slow)
