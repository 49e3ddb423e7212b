"""What is drawn from public seeds: uniform, independent, unbiased, and the same in the plain implementation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.compression.rotation import LARGEST_BLOCK, block_size, rotate, rotate_back
from client_sdk.protocol.compression.sketch import CountSketch
from client_sdk.protocol.compression.streams import WordStream, support
from tests import compression_oracle as oracle

relaxed = settings(deadline=None)
seeds = st.integers(0, 2**64 - 1)

# Draws below are from fixed seeds: a test either always passes or never. Bounds are 5 standard deviations or more.


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


# --- streams -------------------------------------------------------------------------------------------------------


@relaxed
@given(st.sampled_from(["support", "rotation", "sketch", "rounding"]), seeds, st.binary(max_size=40), st.data())
def test_words_are_philox_in_order_however_they_are_taken(purpose, seed, context, data):
    stream = WordStream(purpose, seed, context)
    taken = [stream.words(n) for n in data.draw(st.lists(st.integers(0, 9), max_size=5))]
    flat = [int(word) for words in taken for word in words]
    assert flat == list(itertools.islice(oracle.words(purpose, seed, context), len(flat)))


@relaxed
@given(seeds, st.integers(1, 2**31 - 1), st.integers(0, 20))
def test_bounded_numbers_are_the_words_scaled_down_exactly(seed, bound, count):
    expected = [word * bound >> 64 for word in itertools.islice(oracle.words("x", seed), count)]
    assert WordStream("x", seed).below(bound, count).tolist() == expected


@relaxed
@given(seeds, st.integers(0, 200))
def test_halves_and_bits_are_the_words_cut_up(seed, count):
    words = list(itertools.islice(oracle.words("x", seed), count))
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    assert WordStream("x", seed).halves(count).tolist() == halves[:count]
    bits = [word >> i & 1 for word in words for i in range(64)]
    assert WordStream("x", seed).bits(count).tolist() == bits[:count]


@relaxed
@given(seeds, st.integers(0, 120).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_supports_are_those_of_the_plain_rule(seed, shape):
    size, count = shape
    found = support(seed, size, count)
    assert found.tolist() == oracle.support(seed, size, count)
    assert len(found) == count


@pytest.mark.parametrize(("size", "count"), [(20, 3), (20, 10), (20, 17)])
def test_every_coordinate_and_every_pair_is_equally_often_chosen(size: int, count: int):
    runs = 2000
    chosen = np.zeros((runs, size))
    for seed in range(runs):
        chosen[seed, support(seed, size, count)] = 1
    p = count / size
    assert np.abs(chosen.mean(0) - p).max() < 5 * math.sqrt(p * (1 - p) / runs)
    pairs = chosen.T @ chosen / runs
    q = p * (count - 1) / (size - 1)
    off = ~np.eye(size, dtype=bool)
    assert np.abs(pairs[off] - q).max() < 5 * math.sqrt(q * (1 - q) / runs)


def test_a_support_is_kept_and_cannot_be_changed():
    found = support(11, 50, 5)
    assert support(11, 50, 5) is found
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


# --- expectations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "randomk:0.1",
        "randomk:0.7",
        "randomk:0.25,rotate",
        "randomk:0.25,bits=4,rotate",
        "quantize:8",
        "quantize:4",
        "quantize:1",
        "quantize:1,rotate",
        "quantize:4,block=8",
    ],
)
def test_the_mean_over_seeds_is_the_update(line: str):
    x, runs = normal(50), 1000
    codec = Codec(CompressionSpec.parse(line), len(x))
    decoded = np.array([codec.decode(codec.encode(x, seed), seed) for seed in range(runs)], np.float64)
    decoded *= codec.unbias_factor
    deviation = decoded.std(0) / math.sqrt(runs)
    # A value next to a step of its scale leaves it a few times only, too few for a measured deviation.
    step = float(np.abs(x).max()) / 7 if codec.spec.value_bits == 4 else 0.0
    assert (np.abs(decoded.mean(0) - x) <= 5 * deviation + 5 * step / runs + 1e-6).all()
    assert deviation.max() > 0


@pytest.mark.parametrize("line", ["quantize:4", "quantize:1"])
def test_senders_of_one_update_round_independently_when_they_differ_in_their_rounding_seed(line: str):
    x = normal(50)
    codec = Codec(CompressionSpec.parse(line), len(x))
    decoded = np.array([codec.decode(codec.encode(x, 5, rounding_seed=i), 5) for i in range(1000)], np.float64)
    errors = decoded - x
    assert (np.abs(errors.mean(0)) <= 5 * errors.std(0) / math.sqrt(1000) + 1e-6).all()
    # Without one they agree to the byte, and so do their errors.
    assert codec.encode(x, 5) == codec.encode(x.copy(), 5)


def test_senders_of_different_updates_round_independently_by_themselves():
    codec = Codec(CompressionSpec.parse("quantize:4"), 4000)
    x = normal(4000)
    y = x.copy()
    y[0] += np.float32(0.001)  # one coordinate is enough
    x_errors = codec.decode(codec.encode(x, 5), 5) - x
    y_errors = codec.decode(codec.encode(y, 5), 5) - y
    assert abs(np.corrcoef(x_errors, y_errors)[0, 1]) < 5 / math.sqrt(4000)


# --- rotation ------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 100, 1023, 4095, 4096, 4097, 10_000]


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_the_plain_one_keeps_the_norm_and_has_an_inverse(size: int):
    x = normal(size)
    rotated = rotate(x, 7)
    assert rotated.tolist() == oracle.rotate(x.tolist(), 7)
    assert math.isclose(np.linalg.norm(rotated.astype(float)), np.linalg.norm(x.astype(float)), rel_tol=1e-6)
    assert np.allclose(rotate_back(rotated, 7), x, rtol=0, atol=2e-6)
    assert np.allclose(rotate(rotate_back(x, 7), 7), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [5, 16, 100, 5000])
def test_rotations_are_orthogonal(size: int):
    """Inner products stay: the matrix times its transpose is 1."""
    x, y = normal(size, 1), normal(size, 2)
    before = float(x.astype(float) @ y)
    after = float(rotate(x, 3).astype(float) @ rotate(y, 3))
    assert math.isclose(before, after, abs_tol=1e-5 * size)
    assert math.isclose(float(rotate(x, 3).astype(float) @ y), float(x.astype(float) @ rotate_back(y, 3)), abs_tol=1e-2)


@pytest.mark.parametrize("size", [16, 100, 4096, 5000, 9000])
@pytest.mark.parametrize("at", [0, -1])
def test_a_single_value_is_spread_over_a_block(size: int, at: int):
    x = np.zeros(size, np.float32)
    x[at] = 1
    # Once where the blocks fill the update; at its end two transforms meet, whose sums are as large as random ones.
    block = block_size(size)
    assert np.abs(rotate(x, 1)).max() <= (1 if size % block == 0 else 4.5) / math.sqrt(block)


def test_blocks_are_powers_of_four_that_fit():
    for size in range(1, 20_000, 7):
        block = block_size(size)
        assert math.isqrt(block) ** 2 == block
        assert block & (block - 1) == 0
        assert block <= size < 4 * block or block == LARGEST_BLOCK


def test_a_rotation_makes_few_bits_enough_for_an_uneven_update():
    """The reason for it: one value in a hundred is a hundred times larger, and 4 bits see nothing else."""
    x = normal(8192)
    x[::100] *= 100

    def error(line: str) -> float:
        codec = Codec(CompressionSpec.parse(line), 8192)
        decoded = codec.decode(codec.encode(x, 1), 1)
        return float(np.linalg.norm(decoded - x))

    assert error("quantize:4,rotate") < error("quantize:4") / 2


# --- sketches ------------------------------------------------------------------------------------------------------


@relaxed
@given(seeds, st.integers(0, 50), st.integers(1, 3), st.integers(1, 40))
def test_an_estimate_is_the_median_of_the_rows(seed, size, half_rows, columns):
    rows = 2 * half_rows - 1
    x = normal(size)
    sketch = CountSketch(size, rows, columns, seed)
    table = sketch.project(x)
    assert table.tolist() == oracle.sketch(x.tolist(), seed, rows, columns)
    unit = np.eye(size, dtype=np.float32)
    expected = []
    for i in range(size):
        signs = np.array(oracle.sketch(unit[i].tolist(), seed, rows, columns), np.float32)
        expected.append(float(np.median(signs[signs != 0] * table[signs != 0])))
    assert sketch.estimate(table).tolist() == expected


def test_heavy_coordinates_come_out_within_the_bound():
    size, columns = 20_000, 500
    x = normal(size) * np.float32(0.01)
    heavy = np.arange(0, size, 2000)
    x[heavy] = np.float32(10) * (1 + np.arange(len(heavy)))
    sketch = CountSketch(size, 5, columns, seed=3)
    error = np.abs(sketch.estimate(sketch.project(x)) - x)
    bound = 3 * float(np.linalg.norm(x)) / math.sqrt(columns)
    assert (error > bound).mean() < 0.01
    kept = sketch.estimate(sketch.project(x), keep=len(heavy))
    assert np.count_nonzero(kept) == len(heavy)
    assert set(np.flatnonzero(kept)) >= set(heavy[3:])


def test_the_sum_of_sketches_decodes_to_the_sum():
    """Where single updates are too noisy: a coordinate that all share stands out of the sum."""
    codec = Codec(CompressionSpec.parse("sketch:0.1,rows=5,recover=0.0005"), 10_000)
    updates = [normal(10_000, seed) for seed in range(100)]
    for update in updates:
        update[1234] += 3
    total = np.zeros(codec.num_values)
    for update in updates:
        total += codec.decode_projection(codec.encode(update, 9))
    found = codec.expand(total.astype(np.float32), 9)
    assert np.argmax(found) == 1234
    assert np.count_nonzero(found) == 5
    assert abs(found[1234] - 300) < 150


def test_signs_and_columns_of_pairs_are_independent():
    size, columns, runs = 6, 4, 2000
    agree, collide = np.zeros((size, size)), np.zeros((size, size))
    unit = np.eye(size, dtype=np.float32)
    for seed in range(runs):
        sketch = CountSketch(size, 1, columns, seed)
        placed = np.array([sketch.project(row) for row in unit])
        collide += (np.abs(placed) @ np.abs(placed).T) != 0
        agree += np.equal.outer(placed.sum(1), placed.sum(1))
    off = ~np.eye(size, dtype=bool)
    assert np.abs(agree[off] / runs - 1 / 2).max() < 5 * math.sqrt(1 / 4 / runs)
    assert np.abs(collide[off] / runs - 1 / columns).max() < 5 * math.sqrt(3 / 16 / runs)
