"""Selection by speed with a floor, and by participation."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from server_ref.selection import (
    LATENCIES_KEPT,
    LatencyTracker,
    SelectionPolicy,
    Selector,
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
    selector = Selector()
    with pytest.raises(ConfigurationError):
        selector.record("a", latency)
    assert selector.counts == {}
    assert selector.probabilities() == {}


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_a_floor_that_is_no_share_is_refused(floor):
    with pytest.raises(ConfigurationError):
        selection_probabilities({"a": 1.0}, floor=floor)
    with pytest.raises(ConfigurationError):
        Selector(floor=floor)


def test_a_selector_without_a_floor_is_refused():
    with pytest.raises(ConfigurationError, match="positive floor"):
        Selector(floor=0.0)


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


@given(ROWS, st.sampled_from(SelectionPolicy), st.floats(0.01, 1))
def test_acceptance_lies_between_the_floor_and_one_and_follows_from_the_history(rows, policy, floor):
    selector = Selector(policy, floor=floor)
    for row in rows:
        selector.record(*row)
    rebuilt = Selector.from_history(iter(rows), policy, floor=floor)
    for device in "abcdefghi":
        chance = selector.acceptance(device)
        assert floor <= chance <= 1
        assert rebuilt.acceptance(device) == chance
        assert selector.accept(device, 0.0)
        assert selector.accept(device, math.nextafter(chance, 0))
        assert not selector.accept(device, chance)
    assert selector.counts == Counter(device for device, _ in rows)
    always = sum(chance == 1 for chance in map(selector.acceptance, selector.counts))
    assert always >= len(selector.counts) / (2 if policy is SelectionPolicy.FAST else 10)
    if rows:
        assert abs(math.fsum(selector.probabilities().values()) - 1) < 1e-12


def test_a_slow_device_is_accepted_in_proportion_to_its_speed_beside_the_median():
    selector = Selector(floor=0.2)
    for device, latency in (("a", 1.0), ("b", 2.0), ("c", 8.0)):
        selector.record(device, latency)
    assert [selector.acceptance(d) for d in "abc"] == [1.0, 1.0, pytest.approx(0.2 + 0.8 * 2 / 8)]


def test_one_device_that_claims_to_be_fast_turns_nobody_away():
    selector = Selector(floor=0.1)
    for i in range(9):
        selector.record(f"honest{i}", 10.0)
    selector.record("boaster", 0.0)
    assert all(selector.acceptance(f"honest{i}") == 1.0 for i in range(9))


def play(policy: SelectionPolicy, check_ins: int, *, floor: float = 0.2) -> tuple[Counter[str], Selector]:
    """Ten devices, two of them ten times slower: each checks in again as soon as it has reported."""
    rng = random.Random(5)
    selector = Selector(policy, floor=floor)
    latency = {f"d{i}": 10.0 if i < 2 else 1.0 for i in range(10)}
    ready = dict.fromkeys(latency, 0.0)
    selected: Counter[str] = Counter(dict.fromkeys(latency, 0))
    for _ in range(check_ins):
        device = min(ready, key=lambda d: (ready[d], d))
        if selector.accept(device, rng.random()):
            selected[device] += 1
            selector.record(device, latency[device])
            ready[device] += latency[device]
        else:
            ready[device] += 1.0  # asks again
    return selected, selector


def test_fast_selection_turns_slow_devices_away_but_never_below_the_floor():
    selected, selector = play(SelectionPolicy.FAST, 4000)
    assert selector.acceptance("d0") == pytest.approx(0.2 + 0.8 / 10)
    assert 0 < selection_ratio(selected, {"d0", "d1"}) < 0.1  # slower by 10, and accepted less often on top


def test_fair_selection_lets_slow_devices_catch_up():
    fair, _ = play(SelectionPolicy.FAIR, 8000)
    fast, _ = play(SelectionPolicy.FAST, 8000)
    everybody, _ = play(SelectionPolicy.FAST, 8000, floor=1.0)
    assert selection_ratio(everybody, {"d0", "d1"}) == pytest.approx(0.1, abs=0.01)
    assert selection_ratio(fair, {"d0", "d1"}) > 3 * selection_ratio(everybody, {"d0", "d1"})
    assert jain_index(fair.values()) > jain_index(everybody.values()) > jain_index(fast.values())


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
