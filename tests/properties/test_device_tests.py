"""What judges a device: its own classes in its own style, of a split that nobody trains on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.config import SimulationConfig
from simulator.datasets import Dataset, Split
from simulator.errors import NothingToJudge
from simulator.personalization.held_out import apportioned, device_tests
from simulator.population import Population
from simulator.prepare import Fleet
from simulator.skew import Skew, Style, parse_skew

DEVICES = 20
partitions = st.sampled_from(["iid", "dirichlet:0.1", "dirichlet:0.5", "shards:2"])


def fleet_of(partition: str = "dirichlet:0.3", seed: int = 1, **settings_) -> Fleet:
    return Fleet.of(SimulationConfig(devices=DEVICES, partition=partition, seed=seed, cohort=10, **settings_))


def own_fleet(train, validation, test, parts) -> Fleet:
    """Each split is given by its labels, and by its groups where there are any; no two examples are alike."""
    splits, first = [], 0
    for labels, groups in (train, validation, test):
        x = np.arange(first, first + len(labels), dtype=np.float32)[:, None]
        splits.append(Split(x, np.array(labels), None if groups is None else np.array(groups)))
        first += len(labels)
    data = Dataset("own", *splits, (1,), 5, "0" * 64)
    return Fleet(Population(1, len(parts)), data, [np.array(part) for part in parts])


@settings(max_examples=15)
@given(partitions, st.integers(0, 2**31 - 1), st.sampled_from(["validation", "test"]), st.integers(1, 80))
def test_no_training_example_judges_and_the_classes_are_those_of_the_device(partition, seed, split, per_device):
    fleet = fleet_of(partition, seed)
    devices = range(0, DEVICES, 3)
    found = device_tests(fleet, devices, split=split, per_device=per_device)
    held_out = getattr(fleet.dataset, split)
    assert found.devices == tuple(devices)
    assert found.data is held_out
    for device, rows in zip(devices, found.rows, strict=True):
        assert len(rows) == per_device
        learned = np.bincount(fleet.dataset.train.y[fleet.parts[device]], minlength=10)
        judged = np.bincount(held_out.y[rows], minlength=10)
        assert (np.abs(judged - learned * per_device / learned.sum()) < 1).all()
        for label in np.flatnonzero(judged):
            times = np.bincount(rows[held_out.y[rows] == label], minlength=len(held_out))[held_out.y == label]
            assert times.max() - times.min() <= 1, "gone through once more only when it runs short"


def test_training_rows_and_rows_that_judge_share_no_picture():
    fleet = fleet_of()
    trained = {picture.tobytes() for picture in fleet.dataset.train.x}
    for split in ("validation", "test"):
        found = device_tests(fleet, range(DEVICES), split=split)
        assert not any(found.data.x[row].tobytes() in trained for rows in found.rows for row in rows)


def test_the_draw_follows_from_seed_split_and_device_alone():
    fleet = fleet_of()
    everyone = device_tests(fleet, range(DEVICES), split="test")
    alone = device_tests(fleet, [7], split="test")
    assert (alone.rows[0] == everyone.rows[7]).all()
    other = fleet_of(seed=2)
    other = replace(other, parts=fleet.parts)
    assert not np.array_equal(device_tests(other, [7], split="test").rows[0], alone.rows[0])


def test_a_device_is_judged_in_its_own_style_with_noise_of_its_own():
    fleet = fleet_of(skew="rotation:30,brightness:0.2,noise:0.1")
    plain = device_tests(replace(fleet, skew=Skew()), [3, 4], split="test")
    found = device_tests(fleet, [3, 4], split="test")
    quiet = device_tests(replace(fleet, skew=parse_skew("rotation:30,brightness:0.2")), [3, 4], split="test")
    for i, device in enumerate((3, 4)):
        rows, before = found.rows[i], plain.data.x[plain.rows[i]]
        style = Style.of(parse_skew("rotation:30,brightness:0.2"), fleet.population.seed, device)
        assert (quiet.data.x[quiet.rows[i]] == style.apply(before)).all()
        noise = found.data.x[rows] - quiet.data.x[rows]
        of_training = fleet.style(device).apply(before) - quiet.data.x[rows]
        assert noise.std() == pytest.approx(of_training.std(), rel=0.1)
        assert abs(np.corrcoef(noise.ravel(), of_training.ravel())[0, 1]) < 0.1
        assert (found.data.y[rows] == plain.data.y[plain.rows[i]]).all()


def test_groups_where_there_are_any_say_what_a_device_sees():
    train = ([0, 1, 0, 1], [0, 0, 1, 1])
    held_out = ([0, 1, 2, 2], [0, 0, 1, 1])
    fleet = own_fleet(train, held_out, held_out, [[0, 1], [2, 3]])
    found = device_tests(fleet, [0, 1], split="test", per_device=4)
    assert [sorted(found.data.y[rows]) for rows in found.rows] == [[0, 0, 1, 1], [2, 2, 2, 2]]


def test_a_class_that_the_split_lacks_is_left_to_the_others_and_a_device_without_any_is_named():
    fleet = own_fleet(([0, 1, 4, 4], None), ([0, 1], None), ([0], None), [[0, 1, 2], [3]])
    found = device_tests(fleet, [0], split="validation", per_device=6)
    assert sorted(found.data.y[found.rows[0]]) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(NothingToJudge, match=r"device 1 .*test split"):
        device_tests(fleet, [1], split="test")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 500))
def test_shares_add_up_and_are_within_one_of_what_they_should_be(counts, total):
    found = apportioned(np.array(counts), total)
    assert found.sum() == total
    assert (np.abs(found - np.array(counts) * total / sum(counts)) < 1).all()
