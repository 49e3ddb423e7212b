"""A partition is an exact cover without empty devices, whatever the labels, the fleet and the seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simulator.errors import PartitionError
from simulator.partition import ByGroup, Dirichlet, Iid, Shards, deal, parse_partition

labels_and_devices = hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 9)).flatmap(
    lambda labels: st.tuples(st.just(labels), st.integers(1, len(labels)))
)
partitions = st.one_of(
    st.just(Iid()),
    st.floats(1e-6, 1e6).map(Dirichlet),
    st.integers(1, 4).map(Shards),
)
seeds = st.integers(0, 2**31 - 1)


def fits(partition, labels, devices):
    return not isinstance(partition, Shards) or devices * partition.per_device <= len(labels)


@given(partitions, labels_and_devices, seeds)
def test_every_example_goes_to_exactly_one_device_and_none_is_empty(partition, case, seed):
    labels, devices = case
    if not fits(partition, labels, devices):
        with pytest.raises(PartitionError, match="shards need"):
            deal(partition, labels, devices, seed)
        return
    parts = deal(partition, labels, devices, seed)
    assert len(parts) == devices
    assert min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@given(partitions, labels_and_devices, seeds)
def test_the_seed_fixes_it(partition, case, seed):
    labels, devices = case
    if fits(partition, labels, devices):
        first, second = (deal(partition, labels, devices, seed) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@given(labels_and_devices, seeds)
def test_iid_parts_differ_by_at_most_one(case, seed):
    labels, devices = case
    sizes = [len(p) for p in deal(Iid(), labels, devices, seed)]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 3), seeds)
def test_a_device_of_k_shards_sees_at_most_twice_k_classes(k, seed):
    labels = np.arange(600) % 10
    for part in deal(Shards(k), labels, 20, seed):
        assert len(set(labels[part])) <= 2 * k


def test_smaller_alpha_means_more_skew():
    labels = np.arange(5000) % 10

    def mean_largest_share(alpha):
        parts = deal(Dirichlet(alpha), labels, 50, 3)
        return np.mean([np.bincount(labels[p]).max() / len(p) for p in parts])

    assert mean_largest_share(0.05) > mean_largest_share(0.5) > mean_largest_share(50)


@given(
    st.one_of(st.just(Iid()), st.sampled_from([0.05, 0.5, 1.0, 100.0]).map(Dirichlet), st.integers(1, 99).map(Shards))
)
def test_the_written_form_is_parsed_back(partition):
    assert parse_partition(str(partition)) == partition


@pytest.mark.parametrize(
    "text", ["", "IID", "dirichlet", "dirichlet:", "dirichlet:-1", "dirichlet:nan", "shards:", "shards:1.5", "x:2"]
)
def test_another_form_is_refused_and_the_forms_are_named(text):
    with pytest.raises(PartitionError, match=r"iid, dirichlet:ALPHA .* shards:K"):
        parse_partition(text)


@pytest.mark.parametrize("text", ["dirichlet:0", "dirichlet:1e-9", "dirichlet:99999999", "shards:0"])
def test_a_parameter_out_of_range_is_refused(text):
    with pytest.raises(PartitionError, match="must"):
        parse_partition(text)


def test_more_devices_than_examples_are_refused():
    with pytest.raises(PartitionError, match="4 devices cannot each get one of 3"):
        deal(Iid(), np.zeros(3, np.int64), 4, 0)


def test_no_devices_are_refused():
    with pytest.raises(PartitionError, match="at least one"):
        deal(Iid(), np.zeros(3, np.int64), 0, 0)


@given(st.integers(1, 5), st.integers(0, 11), seeds)
def test_by_group_is_an_exact_cover_in_which_every_device_has_one_group(count, more, seed):
    groups = np.repeat(np.arange(count), 12)[np.random.default_rng(seed).permutation(12 * count)]
    devices = count + more
    parts = deal(ByGroup(), np.zeros_like(groups), devices, seed, groups)
    assert len(parts) == devices
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(groups)))
    assert [set(groups[part]) for part in parts] == [{device % count} for device in range(devices)]
    again = deal(ByGroup(), np.zeros_like(groups), devices, seed, groups)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    ("devices", "groups", "refusal"),
    [
        (2, [0, 1, 2, 2], "cannot have one each of 3 groups"),
        (4, [0, 0, 0, 1], "group 1 has 1 examples for 2 devices"),
        (2, None, "by-group is for data that comes in groups"),
    ],
)
def test_by_group_refuses_what_it_cannot_deal(devices, groups, refusal):
    with pytest.raises(PartitionError, match=refusal):
        deal(ByGroup(), np.zeros(4, np.int64), devices, 0, None if groups is None else np.array(groups))


def test_by_group_has_a_form():
    assert parse_partition("by-group") == ByGroup()
    assert str(ByGroup()) == "by-group"
