"""``ServerDeviceSelector``: fair, fast and diverse; keyed, replica-independent, with floors."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from server_ref.selection import DeviceFacts, ServerDeviceSelector, UnknownStrategy, jain_index, spread
from server_ref.selection.ties import KeyedTies

KEY = bytes(range(32))
STRATEGIES = ("fair", "fast", "diverse")
IDS = st.lists(st.text(max_size=6), unique=True, max_size=40)


@given(IDS, st.integers(0, 50), st.sampled_from(STRATEGIES), st.randoms(use_true_random=False))
def test_replicas_choose_the_same_devices_whatever_the_order_and_after_a_restart(ids, target, strategy, rng):
    one, other = (ServerDeviceSelector(strategy, key=KEY) for _ in range(2))
    for _ in range(3):
        shuffled = ids * 2
        rng.shuffle(shuffled)
        chosen = one.select_devices(ids, target, {})
        assert other.select_devices(shuffled, target, {}) == chosen
        assert len(set(chosen)) == len(chosen) == min(target, len(ids))
        assert set(chosen) <= set(ids)
        restarted = ServerDeviceSelector(strategy, key=KEY)
        restarted.restore(one.records, one.round_id)
        other = restarted


def test_no_id_can_be_ground_to_stand_first():
    """Who knew the key, or if there were none, could draw keys until an id is first; under another key it is not."""
    honest = [f"honest-{i}" for i in range(200)]
    guessed = KeyedTies(bytes(32))
    ground = sorted((f"attacker-{i}" for i in range(20_000)), key=lambda d: guessed.place(0, d))[:20]
    fooled = ServerDeviceSelector("fair", key=bytes(32)).select_devices(honest + ground, 20, {})
    assert sum(d in ground for d in fooled) >= 18, "with the key, grinding works"
    taken = 0
    for number in range(50):
        selector = ServerDeviceSelector("fair", key=bytes([number + 1]) * 32)
        taken += sum(d in ground for d in selector.select_devices(honest + ground, 20, {}))
    assert taken / 50 == pytest.approx(20 * 20 / 220, abs=0.6), "without it the share is that of anybody"


def test_two_selectors_without_a_key_do_not_agree():
    ids = [str(i) for i in range(500)]
    assert ServerDeviceSelector().select_devices(ids, 20, {}) != ServerDeviceSelector().select_devices(ids, 20, {})


@given(st.sampled_from(["fair", "fast"]), st.integers(1, 8), st.integers(0, 99))
def test_nobody_is_starved(strategy, target, seed):
    """Fast: with a floor of a half, a device waits no longer than the turns of all take."""
    selector = ServerDeviceSelector(strategy, key=KEY, floor=0.5)
    rng = random.Random(seed)
    ids = [f"d{i}" for i in range(20)]
    latency = {d: 10 ** rng.uniform(-1, 3) for d in ids}
    for _ in range(2 * 20 // target + 4):
        for device in selector.select_devices(ids, target, {}):
            selector.record_latency(device, latency[device])
    assert set(selector.participation_counts) == set(ids)


def test_fair_differs_by_one_at_most_and_prefers_who_waited_longest():
    selector = ServerDeviceSelector(key=KEY)
    ids = [f"d{i}" for i in range(7)]
    waiting = []
    for _ in range(30):
        waiting.append(selector.select_devices(ids, 3, {}))
        counts = [selector.participation_counts.get(d, 0) for d in ids]
        assert max(counts) - min(counts) <= 1


def test_fair_among_devices_that_come_at_their_own_hours_and_vanish():
    """Availability by hour and 20 % drop-outs: who comes for 6 hours of 24 has its share all the same."""
    rng = random.Random(3)
    selector = ServerDeviceSelector(key=KEY)
    ids = [f"d{i}" for i in range(400)]
    first = {d: rng.randrange(24) for d in ids}
    length = {d: rng.choice([6, 12, 24]) for d in ids}
    for hour in range(24 * 10):
        there = [d for d in ids if (hour - first[d]) % 24 < length[d]]
        for device in selector.select_devices(there, 20, {}):
            if rng.random() < 0.2:
                selector.record_lost(device)
            else:
                selector.record_latency(device, 1.0)
    counts = [selector.participation_counts[d] for d in ids]
    assert min(counts) >= 1
    assert spread(counts) < 0.1
    assert jain_index(counts) > 0.99


def test_who_always_loses_is_asked_no_more_often_than_others():
    selector = ServerDeviceSelector(key=KEY)
    ids = [f"d{i}" for i in range(10)]
    asked: Counter[str] = Counter()
    for _ in range(50):
        for device in selector.select_devices(ids, 2, {}):
            asked[device] += 1
            selector.record_lost(device) if device == "d0" else selector.record_latency(device, 1.0)
    assert max(asked.values()) - min(asked.values()) <= 1
    assert selector.participation_counts["d0"] == 0


def play_fast(floor: float) -> Counter[str]:
    selector = ServerDeviceSelector("fast", key=KEY, floor=floor)
    ids = [f"d{i}" for i in range(100)]
    asked: Counter[str] = Counter()
    for _ in range(100):
        for device in selector.select_devices(ids, 10, {}):
            asked[device] += 1
            selector.record_latency(device, 1.0 if int(device[1:]) < 50 else 10.0)
    return asked


def test_fast_prefers_the_fast_and_the_floor_is_kept():
    asked = play_fast(0.2)
    slow = sum(n for d, n in asked.items() if int(d[1:]) >= 50)
    assert 0.1 * 1000 * 0.8 <= slow <= 0.3 * 1000
    assert len(asked) == 100
    assert sum(n for d, n in play_fast(1.0).items() if int(d[1:]) >= 50) == 500, "all by turns"


def test_a_lie_about_the_tier_earns_a_device_one_assignment():
    selector = ServerDeviceSelector("fast", key=KEY, floor=0.01)
    ids = [f"d{i}" for i in range(40)]
    profiles = {d: DeviceProfile(d, DeviceTier.MID_RANGE) for d in ids}
    profiles["d0"] = DeviceProfile("d0", DeviceTier.HIGH_END)
    for number in range(40):
        chosen = selector.select_devices(ids, 4, profiles)
        assert number or "d0" in chosen, "a claim is believed"
        for device in chosen:
            selector.record_latency(device, 100.0 if device == "d0" else 1.0)
    assert selector.participation_counts["d0"] <= 1 + 40 * 4 * 0.01


def test_answering_at_once_earns_no_more_than_a_place_among_the_fastest_quarter():
    selector = ServerDeviceSelector("fast", key=KEY, floor=0.2)
    ids = [f"d{i}" for i in range(40)]
    for _ in range(100):
        for device in selector.select_devices(ids, 8, {}):
            selector.record_latency(device, 0.0 if device == "d0" else 1.0)
    counts = selector.participation_counts
    assert counts["d0"] <= max(n for d, n in counts.items() if d != "d0") + 1


def test_diverse_gives_each_kind_its_share_and_small_ones_the_floor():
    selector = ServerDeviceSelector("diverse", key=KEY, floor=0.4, strata=["de", "en", "fi"])
    kinds = {f"d{i}": "en" if i < 80 else "de" if i < 95 else "fi" for i in range(100)}
    facts = {d: DeviceFacts(stratum=kind) for d, kind in kinds.items()}
    chosen: Counter[str] = Counter()
    for _ in range(200):
        chosen.update(kinds[d] for d in selector.select_devices(kinds, 10, facts))
    for kind, size in (("en", 80), ("de", 15), ("fi", 5)):
        wanted = 200 * 10 * (0.6 * size / 100 + 0.4 / 3)
        assert chosen[kind] == pytest.approx(wanted, abs=30)
    counts = selector.participation_counts
    for kind in ("en", "de", "fi"):
        own = [counts[d] for d in kinds if kinds[d] == kind]
        assert max(own) - min(own) <= 1, "within a kind by turns"


def test_labels_that_nobody_listed_are_one_kind():
    selector = ServerDeviceSelector("diverse", key=KEY, floor=1.0, strata=["en"])
    facts = {f"d{i}": DeviceFacts(stratum="en" if i < 50 else f"made-up-{i}") for i in range(100)}
    chosen = selector.select_devices(facts, 10, facts)
    assert sum(facts[d].stratum == "en" for d in chosen) == 5


def test_what_cannot_be_is_refused():
    with pytest.raises(UnknownStrategy, match=r"'random'; there are fair, fast, diverse") as raised:
        ServerDeviceSelector("random")
    assert isinstance(raised.value, ValueError)
    for floor in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ConfigurationError, match="floor"):
            ServerDeviceSelector(floor=floor)
    with pytest.raises(ConfigurationError, match="16 to 64 bytes"):
        ServerDeviceSelector(key=b"short")
    selector = ServerDeviceSelector(key=KEY)
    with pytest.raises(ConfigurationError):
        selector.select_devices(["a"], -1, {})
    with pytest.raises(ConfigurationError):
        selector.select_devices([b"a"], 1, {})
    with pytest.raises(ConfigurationError):
        selector.record_lost("a")
    assert selector.select_devices([], 3, {}) == []
    assert selector.select_devices(["a"], 0, {}) == []
    assert selector.participation_counts == {}
    assert KEY.hex() not in repr(selector) + repr(KeyedTies(KEY))


def test_hostile_ids_are_names_like_others():
    ids = ["", "\ud800", "a\0b", "é" * 10_000, "'; DROP TABLE devices; --"]
    assert set(ServerDeviceSelector(key=KEY).select_devices(ids, 3, {})) < set(ids)
