"""Part 2 of the specification: sums of updates that are opened from Shamir shares, and nothing else that is.

The specification's field has 2^127 - 1 elements, in tensors; both are kept where the caller asks for them, as two limbs
of 64 bits. The default is 2^61 - 1: sums of 60 bits fit, at half the bytes. "Constant time" is not claimed: kernels
whose instructions and addresses do not depend on the data are, see ``client_sdk.protocol.sharing_kernels``.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats

from client_sdk.protocol.errors import ConfigurationError, MalformedShare, NotEnoughShares
from client_sdk.protocol.field import MERSENNE_61, Field
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, lagrange_weights, share, share_seeded
from client_sdk.protocol.updates import WorkerGradient
from server_ref import GradientAggregator, SecureAggregator
from tests import sharing_oracle as oracle

FIELD_SIZES = [2**61 - 1, 2**127 - 1]
MODEL = {"conv": torch.zeros(4, 3, 2), "bias": torch.zeros(5), "scale": torch.zeros(())}

both_fields = pytest.mark.parametrize("field_size", FIELD_SIZES, ids=["m61", "m127"])


def worker(i: int, samples: int = 1) -> WorkerGradient:
    """A gradient as PyTorch makes one: values over five decades, and a history."""
    generator = torch.Generator().manual_seed(i)
    gradients = {}
    for name, parameter in MODEL.items():
        drawn = torch.randn(parameter.shape, generator=generator) * 10 ** (
            4 * torch.rand(parameter.shape, generator=generator) - 3
        )
        gradients[name] = drawn.requires_grad_() * 1.0
    return WorkerGradient(f"worker-{i}", gradients, samples, timestamp=0.0)


def summed(aggregator: SecureAggregator, workers: list[WorkerGradient], weights: list[int] | None = None) -> list:
    """What each aggregator holds in the end."""
    split = [aggregator.worker_split_gradient(each) for each in workers]
    return [aggregator.aggregator_sum_shares(received, weights) for received in zip(*split, strict=True)]


@both_fields
def test_secure_aggregation_correctness(field_size: int):
    """Test: Secure aggregation result matches plaintext aggregation.

    Expected: Bit-exact match (no information loss from secret sharing). Holds: whichever aggregators open the sum, in
    whatever order the workers came, it is the sum of the plain codes; and the mean has the bits of the plain one on the
    same grid.
    """
    aggregator = SecureAggregator(field_size=field_size, max_weight=100)
    workers, weights = [worker(i, samples=1 + 13 * i) for i in range(7)], [1 + 13 * i for i in range(7)]
    plain = [aggregator.encode(each) for each in workers]
    expected = {name: sum(w * codes[name] for w, codes in zip(weights, plain, strict=True)) for name in MODEL}
    sums = summed(aggregator, workers, weights)
    backwards = summed(aggregator, workers[::-1], weights[::-1])
    for ids in itertools.combinations(range(1, 6), 3):
        for held in (sums, backwards):
            codes = aggregator.combine_codes([held[i - 1] for i in ids], ids)
            assert all(torch.equal(codes[name], expected[name]) for name in MODEL)
    opened = aggregator.aggregator_combine_shares(sums, range(1, 6))
    assert all(torch.equal(opened[n], expected[n].double() / 2**aggregator.grid.fraction_bits) for n in MODEL)

    mean = aggregator.aggregate(workers, MODEL)
    bounds = {"max_abs": 1024.0, "max_weight": 100, "max_workers": 1000}
    of_plain = GradientAggregator(summation="fixed", **bounds).aggregate(workers, MODEL)
    assert all(torch.equal(mean[name], of_plain[name]) for name in MODEL)
    assert (mean.count, mean.total_weight, mean.kind) == (of_plain.count, of_plain.total_weight, of_plain.kind)


@both_fields
def test_single_shares_of_all_workers_open_the_same_sum(field_size: int):
    """``aggregator_combine_shares`` takes what all workers sent, too: shares of one aggregator are added up first."""
    aggregator, workers = SecureAggregator(field_size=field_size), [worker(i) for i in range(3)]
    split = [aggregator.worker_split_gradient(each) for each in workers]
    ids = [5, 2, 4]
    all_shares = [share[i - 1] for share in split for i in ids]
    opened = aggregator.combine_codes(all_shares, ids * 3)
    plain = [aggregator.encode(each) for each in workers]
    assert all(torch.equal(opened[name], sum(codes[name] for codes in plain)) for name in MODEL)
    with pytest.raises(MalformedShare, match="lacks a worker's share"):
        aggregator.combine_codes(all_shares[:-1], (ids * 3)[:-1])


def flat(tensors: dict[str, torch.Tensor]) -> list[int]:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).tolist()


def uniform_p_value(values: list[int], field: Field, bins: int = 64) -> float:
    """Of a chi-square test that elements are uniform over the field.

    Power: with N elements and frequencies that are off by 5 % in either direction, its statistic has a noncentrality of
    0.0025 N: at N = 100,000 that is 250, with 63 degrees of freedom, and at the level 1e-9 (statistic above 155) it
    misses with probability 1e-8.
    """
    counts = np.bincount([value * bins // field.modulus for value in values], minlength=bins)
    return float(stats.chisquare(counts).pvalue)


LEVEL, ELEMENTS = 1e-9, 100_000


def test_privacy_guarantee():
    """Test: Given t-1 shares, cannot reconstruct original gradient.

    Expected: Reconstructed value is uniformly random in field. Holds, for any two of five aggregators and whatever they
    guess of a third share; tested with a stated power (``uniform_p_value``), which a coefficient that lacks one bit
    does not survive.
    """
    aggregator, scheme, field = SecureAggregator(), Scheme(), MERSENNE_61
    zeros = WorkerGradient("worker", {"w": np.zeros(ELEMENTS, np.float32)}, 1, timestamp=0.0)
    shares = [each["w"] for each in aggregator.worker_split_gradient(zeros)]
    for ids in ([1], [4, 5], [1, 2]):
        with pytest.raises(NotEnoughShares):
            aggregator.aggregator_combine_shares([{"w": shares[i - 1]} for i in ids], ids)
    guess = field.zeros(ELEMENTS)

    def reconstructed(held: list[np.ndarray], ids: tuple[int, int, int]) -> list[int]:
        return NUMPY_KERNELS.interpolate([*held, guess], lagrange_weights(ids, 0), field).tolist()

    for i, j, guessed in ((1, 2, 3), (1, 5, 2), (4, 5, 1)):
        assert uniform_p_value(reconstructed([shares[i - 1], shares[j - 1]], (i, j, guessed)), field) > LEVEL

    def without_the_top_bit(count: int) -> bytes:
        words = np.frombuffer(random.Random(1).randbytes(count), np.uint64) & np.uint64(2**60 - 1)
        return words.tobytes()

    weak = share(field.zeros(ELEMENTS), scheme, without_the_top_bit)
    assert uniform_p_value(reconstructed(weak[:2], (1, 2, 3)), field) < LEVEL


@pytest.mark.parametrize("colluding", list(itertools.combinations(range(1, 6), 2)), ids=str)
def test_aggregator_collusion(colluding: tuple[int, int]):
    """Test: Simulate t-1 malicious aggregators colluding.

    Expected: Cannot learn individual worker gradient, only sum. Holds, exactly: for what two aggregators saw of all
    workers, and for all shares of the sum, there is another set of gradients with the same sum, and randomness that
    makes the very same view of them. It is constructed here: one worker's polynomials move by a multiple of what
    vanishes at the colluders' points, another's move back.
    """
    field, p = MERSENNE_61, MERSENNE_61.modulus
    aggregator, workers = SecureAggregator(), [worker(i) for i in range(3)]
    split = [list(map(flat, aggregator.worker_split_gradient(each))) for each in workers]
    true = [flat(aggregator.encode(each)) for each in workers]
    # Workers 0 and 1 had each other's gradients; so they would have in another world.
    other = [true[1], true[0], true[2]]
    a, b = colluding

    def moved(share: list[int], x: int, by: list[int]) -> list[int]:
        factor = (x - a) * (x - b) * pow(a * b, -1, p)
        return [(value + delta * factor) % p for value, delta in zip(share, by, strict=True)]

    deltas = [[o - t for o, t in zip(other[w], true[w], strict=True)] for w in range(3)]
    there = [[moved(share, x, deltas[w]) for x, share in enumerate(split[w], 1)] for w in range(3)]
    for w in range(3):
        assert [there[w][i - 1] for i in colluding] == [split[w][i - 1] for i in colluding]
        for ids in ((1, 2, 3), (1, 3, 5), (2, 4, 5)):
            columns = zip(*(there[w][i - 1] for i in ids), strict=True)
            opened = [oracle.interpolate(dict(zip(ids, column, strict=True)), 0, p) for column in columns]
            assert [field.centred(value) for value in opened] == other[w]
    assert true[0] != other[0]
    for i in range(5):
        sums = [[sum(world[w][i][j] for w in range(3)) % p for j in range(len(true[0]))] for world in (split, there)]
        assert sums[0] == sums[1]


@both_fields
def test_performance_overhead(field_size: int, monkeypatch: pytest.MonkeyPatch):
    """Test: Benchmark secure vs. plaintext aggregation.

    Expected: <10x slowdown (vectorized secret sharing is fast). Measured by ``tests/benchmarks/bench_sharing.py``, as
    ratios within one run to a plain pipeline that clips, encodes, checks and adds (at most 8 for 2^61 - 1 and 16 for
    2^127 - 1, all parties together). Here, what it rests on is counted: per worker one vectorised split and one
    accumulation for each aggregator, one interpolation in all, however many workers; and 3 elements of upload for each
    value.
    """
    calls: dict[str, int] = {"split_seeded": 0, "weighted_accumulate": 0, "interpolate": 0}

    def counted(name: str):
        original = getattr(type(NUMPY_KERNELS), name)

        def call(self, *arguments):
            calls[name] += 1
            return original(self, *arguments)

        return call

    for name in calls:
        monkeypatch.setattr(type(NUMPY_KERNELS), name, counted(name))
    aggregator = SecureAggregator(field_size=field_size)
    size = 20_000
    for num_workers in (2, 6):
        calls.update(dict.fromkeys(calls, 0))
        rows = np.random.default_rng(0).standard_normal((num_workers, size)).astype(np.float32)
        workers = [WorkerGradient(str(i), {"w": row}, 1, timestamp=0.0) for i, row in enumerate(rows)]
        aggregator.aggregate(workers, {"w": np.zeros(size, np.float32)})
        # Two more interpolations compare the two answers that were not needed with the three that were.
        assert calls == {"split_seeded": num_workers, "weighted_accumulate": 5 * num_workers, "interpolate": 3}
    field = aggregator.scheme.field
    shares = share_seeded(field.from_signed(np.zeros(size, np.int64)), aggregator.scheme)
    sent = sum(len(seed) for seed in shares.seeds) + sum(len(field.to_bytes(vector)) for vector in shares.vectors)
    assert sent == 2 * 32 + 3 * field.element_bytes * size


# --- the challenge ------------------------------------------------------------------------------------------------


def test_fixed_point_error_is_below_a_millionth():
    """Challenge: quantisation error. It is the rounding of each value to the grid, half a step, and is promised."""
    aggregator = SecureAggregator()
    assert aggregator.grid.max_error < 1e-12
    values = np.random.default_rng(0).uniform(-1000, 1000, 10_000).astype(np.float32)
    gradient = WorkerGradient("worker", {"w": values}, 1, timestamp=0.0)
    sums = summed(aggregator, [gradient])
    opened = aggregator.aggregator_combine_shares(sums[:3], [1, 2, 3])["w"]
    assert np.abs(opened - values.astype(np.float64)).max() < 1e-6
    with pytest.raises(ConfigurationError, match="less than 1e-06 is promised"):
        SecureAggregator(max_abs=1e8, max_workers=100_000, max_weight=1000)
