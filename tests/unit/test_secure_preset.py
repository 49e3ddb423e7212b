"""``SecureAggregator`` beyond what the specification lists: refusals, tampering, kinds, clipping, odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client_sdk.protocol.clipping import integer_norm_squared
from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    MalformedShare,
    NonFiniteUpdate,
    NotEnoughShares,
    ShapeMismatch,
    UpdateOutOfRange,
)
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref import GradientAggregator, SecureAggregator
from server_ref.aggregation.errors import MixedKinds

MODEL = {"w": np.zeros((3, 2), np.float32), "none": np.zeros(0, np.float32), "one": np.zeros((), np.float32)}


def worker(i: int, scale: float = 1.0, samples: int = 1, kind: UpdateKind = UpdateKind.GRADIENT) -> WorkerGradient:
    random = np.random.default_rng(i)
    tensors = {name: (scale * random.standard_normal(t.shape)).astype(np.float32) for name, t in MODEL.items()}
    return WorkerGradient(f"worker-{i}", tensors, samples, timestamp=0.0, kind=kind)


def sums_of(aggregator: SecureAggregator, workers: list[WorkerGradient]) -> list[dict]:
    split = [aggregator.worker_split_gradient(each) for each in workers]
    return [aggregator.aggregator_sum_shares(received) for received in zip(*split, strict=True)]


@pytest.mark.parametrize("field_size", [2**61 - 1, 2**127 - 1], ids=["m61", "m127"])
@pytest.mark.parametrize(("threshold", "num_aggregators"), [(2, 2), (2, 4), (4, 9)])
def test_any_threshold_works_in_any_kind_of_tensor(field_size: int, threshold: int, num_aggregators: int):
    aggregator = SecureAggregator(num_aggregators, threshold, field_size)
    workers = [worker(i) for i in range(3)]
    last = list(range(num_aggregators - threshold + 1, num_aggregators + 1))
    sums = sums_of(aggregator, workers)
    of_numpy = aggregator.combine_codes([sums[i - 1] for i in last], last)
    in_torch = [
        WorkerGradient(w.worker_id, {n: torch.from_numpy(np.array(t)) for n, t in w.gradients.items()}, 1, 0.0)
        for w in workers
    ]
    sums = sums_of(aggregator, in_torch)
    limbs = () if field_size == 2**61 - 1 else (2,)
    assert sums[0]["w"].dtype is torch.int64
    assert sums[0]["w"].shape == (3, 2, *limbs)
    of_torch = aggregator.aggregator_combine_shares([sums[i - 1] for i in last], last)
    for name, codes in of_numpy.items():
        assert codes.dtype == np.int64
        assert codes.shape == MODEL[name].shape
        assert np.array_equal(of_torch[name].numpy(), codes * 2.0**-aggregator.grid.fraction_bits)
        assert np.array_equal(codes, sum(aggregator.encode(each)[name] for each in workers))


def test_fewer_than_the_threshold_open_nothing():
    aggregator = SecureAggregator()
    sums = sums_of(aggregator, [worker(0)])
    for ids in ([], [2], [2, 5]):
        with pytest.raises(NotEnoughShares):
            aggregator.aggregator_combine_shares([sums[i - 1] for i in ids], ids)
    for ids in ([0, 1, 2], [1, 2, 6], [-1, 2, 3]):
        with pytest.raises(MalformedShare):
            aggregator.aggregator_combine_shares(sums[:3], ids)
    with pytest.raises(MalformedShare, match="3 shares with 2"):
        aggregator.aggregator_combine_shares(sums[:3], [1, 2])


def test_a_wrong_share_is_found_with_two_to_spare_and_noticed_with_one():
    aggregator = SecureAggregator()
    sums = sums_of(aggregator, [worker(0), worker(1)])
    right = aggregator.combine_codes(sums[:3], [1, 2, 3])
    assert aggregator.tampered == ()
    sums[3]["one"] = np.array((int(sums[3]["one"]) + 1) % (2**61 - 1), np.uint64)
    found = aggregator.combine_codes(sums, range(1, 6))
    assert aggregator.tampered == (4,)
    assert all(np.array_equal(found[name], right[name]) for name in right)
    with pytest.raises(MalformedShare, match="contradict"):
        aggregator.combine_codes(sums[:4], [1, 2, 3, 4])
    assert aggregator.tampered == ()


def test_what_is_no_share_is_refused():
    aggregator = SecureAggregator()
    sums = sums_of(aggregator, [worker(0)])
    beyond = dict(sums[0], w=np.full((3, 2), 2**61 - 1, np.uint64))
    with pytest.raises(MalformedShare):
        aggregator.aggregator_combine_shares([beyond, *sums[1:3]], [1, 2, 3])
    with pytest.raises(MalformedShare):
        aggregator.aggregator_sum_shares([sums[0], beyond])
    with pytest.raises(ShapeMismatch):
        aggregator.aggregator_sum_shares([sums[0], dict(sums[0], w=sums[0]["w"][:2])])
    with pytest.raises(ShapeMismatch):
        aggregator.aggregator_sum_shares([sums[0], {"w": sums[0]["w"]}])
    with pytest.raises(ShapeMismatch, match="is no share"):
        aggregator.aggregator_sum_shares([dict(sums[0], w=np.zeros((3, 2)))])
    with pytest.raises(ShapeMismatch, match="limbs"):
        SecureAggregator(field_size=2**127 - 1).aggregator_sum_shares([sums[0]])
    with pytest.raises(EmptyAggregate):
        aggregator.aggregator_sum_shares([])
    for weights in ([2], [0], [], [1, 1]):
        with pytest.raises(ConfigurationError):
            aggregator.aggregator_sum_shares([sums[0]], weights)


def test_what_cannot_be_shared_is_refused():
    aggregator = SecureAggregator()
    assert aggregator.validate_gradient(worker(0))
    for scale, error in ((np.nan, NonFiniteUpdate), (1e30, UpdateOutOfRange)):
        assert not aggregator.validate_gradient(worker(0, scale))
        with pytest.raises(error):
            aggregator.worker_split_gradient(worker(0, scale))
    with pytest.raises(ShapeMismatch):
        aggregator.worker_split_gradient(WorkerGradient("worker", {"w": "text"}, 1, timestamp=0.0))


def test_the_mean_leaves_out_who_is_refused():
    told = []
    aggregator = SecureAggregator(max_weight=9, on_rejected=told.append)
    workers = [worker(0, samples=4), worker(1, np.inf), worker(2, samples=100), worker(0), worker(3, samples=0)]
    mean = aggregator.aggregate(workers, MODEL)
    assert [(r.position, r.error) for r in aggregator.rejections[:2]] == [(1, NonFiniteUpdate), (3, DuplicateReport)]
    assert [r.position for r in aggregator.rejections] == [1, 3, 4]
    assert told == list(aggregator.rejections)
    plain = GradientAggregator(summation="fixed", max_abs=1024.0, max_weight=9, max_workers=1000)
    expected = plain.aggregate(workers, MODEL)
    assert (mean.count, mean.total_weight) == (expected.count, expected.total_weight) == (2, 13)
    assert all(np.array_equal(mean[name], expected[name]) for name in MODEL)


def test_a_clip_norm_is_enforced_on_codes_and_gives_the_plain_bits():
    aggregator = SecureAggregator(clip_norm=0.5)
    workers = [worker(i, 10.0) for i in range(4)]
    for each in workers:
        codes = np.concatenate([codes.reshape(-1) for codes in aggregator.encode(each).values()])
        assert integer_norm_squared(codes) <= int(0.5 * 2**aggregator.grid.fraction_bits) ** 2
    plain = GradientAggregator(summation="fixed", clip_norm=0.5, max_weight=1, max_workers=1000)
    ours, theirs = aggregator.aggregate(workers, MODEL), plain.aggregate(workers, MODEL)
    assert all(np.array_equal(ours[name], theirs[name]) for name in MODEL)


def test_nothing_and_mixtures_have_no_mean():
    aggregator = SecureAggregator(max_workers=2)
    with pytest.raises(EmptyAggregate):
        aggregator.aggregate([worker(0, np.nan)], MODEL)
    with pytest.raises(MixedKinds):
        aggregator.aggregate([worker(0), worker(1, kind=UpdateKind.DELTA)], MODEL)
    with pytest.raises(BudgetExceeded):
        aggregator.aggregate([worker(i) for i in range(3)], MODEL)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 1},
        {"threshold": 6},
        {"field_size": 2**31 - 1},
        {"max_abs": -1.0},
        {"max_weight": 0},
        {"aggregation_method": "scaffold"},
        {"aggregation_method": "fednova"},
        {"aggregation_method": "sum"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises((ConfigurationError, BudgetExceeded)):
        SecureAggregator(**options)


def test_it_says_that_one_process_keeps_no_secrets():
    text = SecureAggregator(7, 4).describe()
    assert "4 of 7 aggregators" in text
    assert "all of them run in this process" in text
