"""What every accumulator promises, held against each of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmptyAggregate,
    InvalidUpdate,
    MalformedFrame,
    NonFiniteUpdate,
    ShapeMismatch,
    TruncatedFrame,
    UpdateOutOfRange,
)
from client_sdk.protocol.fixed_point import FixedPointGrid
from server_ref import AccumulatorPlan, ExactAccumulator, Int64Accumulator
from server_ref.aggregation import blocks

MAX_WEIGHT, MAX_COUNT = 50, 64
LARGE = 150_001
"""More than one block a thread, and no multiple of a block."""


@dataclass(frozen=True)
class Kind:
    """One accumulator under test: how to make it, an update for it, and values that it must refuse."""

    name: str
    make: Callable[..., Any]
    update: Callable[[np.random.Generator, int], np.ndarray]
    bad: dict[str, tuple[Any, type[InvalidUpdate]]]
    other: Callable[[int], Any]


def exact(name: str, max_abs: float) -> Kind:
    def plan(top: float = max_abs) -> AccumulatorPlan:
        return AccumulatorPlan.for_bounds(max_abs=top, max_weight=MAX_WEIGHT, max_count=MAX_COUNT, resolution=1e-8)

    return Kind(
        name,
        lambda size: ExactAccumulator(size, plan()),
        lambda rng, size: (rng.uniform(-1, 1, size) * 10.0 ** rng.integers(-9, 2, size)).astype(np.float32),
        {
            "nan": (math.nan, NonFiniteUpdate),
            "infinity": (math.inf, NonFiniteUpdate),
            "-infinity": (-math.inf, NonFiniteUpdate),
            "beyond": (np.nextafter(np.float32(max_abs), np.float32(np.inf)), UpdateOutOfRange),
            "-beyond": (-np.nextafter(np.float32(max_abs), np.float32(np.inf)), UpdateOutOfRange),
        },
        lambda size: ExactAccumulator(size, plan(2 * max_abs)),
    )


GRID = FixedPointGrid.for_bounds(max_abs=128.0, max_count=MAX_COUNT, max_weight=MAX_WEIGHT)
KINDS = [
    exact("two bins", 128.0),
    exact("three bins", 1e15),
    Kind(
        "int64",
        lambda size: Int64Accumulator(size, GRID),
        lambda rng, size: GRID.encode((rng.uniform(-1, 1, size) * 100).astype(np.float32)),
        {
            "beyond": (GRID.largest_code + 1, UpdateOutOfRange),
            "-beyond": (-GRID.largest_code - 1, UpdateOutOfRange),
            "largest": (2**63 - 1, UpdateOutOfRange),
            "smallest": (-(2**63), UpdateOutOfRange),
        },
        lambda size: Int64Accumulator(size, GRID.model_copy(update={"fraction_bits": GRID.fraction_bits - 1})),
    ),
]
BAD = [(kind, name) for kind in KINDS for name in kind.bad]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def updates_of(kind: Kind, n: int, size: int, seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(seed)
    return [kind.update(rng, size) for _ in range(n)], rng.integers(1, MAX_WEIGHT + 1, n).tolist()


def filled(kind: Kind, n: int, size: int, seed: int = 0) -> Any:
    accumulator = kind.make(size)
    accumulator.add_many(*updates_of(kind, n, size, seed))
    return accumulator


def test_the_three_kinds_are_what_they_say():
    assert [kind.make(1).plan.num_bins for kind in KINDS[:2]] == [2, 3]


@every_kind
@pytest.mark.parametrize("size", [1, 3, 2048, 2049, LARGE])
def test_one_by_one_in_groups_and_as_a_matrix_give_the_same_bytes(kind: Kind, size: int):
    updates, weights = updates_of(kind, 11, size)
    one_by_one, grouped, matrix = kind.make(size), kind.make(size), kind.make(size)
    for update, weight in zip(updates, weights, strict=True):
        one_by_one.add(update, weight)
    grouped.add_many(updates[:3], weights[:3])
    grouped.add_many(updates[3:], weights[3:])
    matrix.add_many(np.array(updates), weights)
    assert one_by_one.to_bytes() == grouped.to_bytes() == matrix.to_bytes()
    assert one_by_one.count == 11
    assert one_by_one.total_weight == sum(weights)


@every_kind
def test_permutations_shards_and_merge_orders_give_the_same_bytes(kind: Kind):
    updates, weights = updates_of(kind, 30, 777)
    expected = filled(kind, 30, 777).to_bytes()
    shuffled = random.Random(5)
    for _ in range(10):
        order = list(range(30))
        shuffled.shuffle(order)
        shards = [kind.make(777) for _ in range(4)]
        for i in order:
            shuffled.choice(shards).add(updates[i], weights[i])
        first, *rest = shuffled.sample(shards, 4)
        for shard in rest:
            before = shard.to_bytes()
            first.merge(shard)
            assert shard.to_bytes() == before
        assert first.to_bytes() == expected


@every_kind
def test_the_mean_of_equal_updates_is_that_update(kind: Kind):
    update = updates_of(kind, 1, 500)[0][0]
    once, often = kind.make(500), kind.make(500)
    once.add(update, 1)
    often.add_many([update] * 8, [4] * 8)
    assert np.array_equal(once.result(), often.result())
    assert once.result().dtype == np.float64


@every_kind
@pytest.mark.parametrize("size", [0, 1, 2048, 40_000])
def test_the_float32_result_is_the_result_rounded(kind: Kind, size: int):
    accumulator = filled(kind, 5, size)
    out = np.full(size, np.nan, np.float32)
    accumulator.result_into(out)
    assert np.array_equal(out, accumulator.result().astype(np.float32))


@every_kind
def test_reading_the_result_changes_nothing(kind: Kind):
    accumulator = filled(kind, 5, 100)
    before = accumulator.to_bytes()
    accumulator.result()[:] = 7
    assert accumulator.to_bytes() == before


@every_kind
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(kind: Kind, threads: int, monkeypatch: pytest.MonkeyPatch):
    expected = filled(kind, 6, LARGE).to_bytes()
    monkeypatch.setattr(blocks, "THREADS", threads)
    assert filled(kind, 6, LARGE).to_bytes() == expected


@every_kind
def test_reports_may_be_read_only_unaligned_or_strided(kind: Kind):
    (update,), _ = updates_of(kind, 1, 300)
    plain = kind.make(300)
    plain.add(update, 3)
    read_only = np.frombuffer(update.tobytes(), update.dtype)
    unaligned = np.frombuffer(b"x" + update.tobytes(), update.dtype, offset=1)
    strided = np.repeat(update, 2)[::2]
    assert not unaligned.flags.aligned
    assert not strided.flags.c_contiguous
    for form in (read_only, unaligned, strided):
        accumulator = kind.make(300)
        accumulator.add(form, 3)
        assert accumulator.to_bytes() == plain.to_bytes()


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), BAD, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("coordinate", [0, 2048, 149_000, LARGE - 1])
@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_bad_value_is_refused_wherever_it_is_and_changes_nothing(
    kind: Kind, name: str, coordinate: int, position: int
):
    value, error = kind.bad[name]
    accumulator = filled(kind, 3, LARGE)
    before = accumulator.to_bytes()
    updates, weights = updates_of(kind, 7, LARGE, seed=1)
    updates[position][coordinate] = value
    with pytest.raises(error, match=f"update {position} "):
        accumulator.add_many(updates, weights)
    assert accumulator.to_bytes() == before
    with pytest.raises(error, match="update 0 "):
        accumulator.add(updates[position], 1)
    assert accumulator.to_bytes() == before
    updates[position][coordinate] = 0
    accumulator.add_many(updates, weights)
    reference = filled(kind, 3, LARGE)
    reference.add_many(updates, weights)
    assert accumulator.to_bytes() == reference.to_bytes()


@every_kind
def test_the_declared_bound_itself_is_admitted(kind: Kind):
    accumulator = kind.make(4)
    top = GRID.largest_code if kind.name == "int64" else accumulator.plan.limit_bits.view(np.float32)
    dtype = np.int64 if kind.name == "int64" else np.float32
    accumulator.add(np.array([top, -top, 0, top], dtype), MAX_WEIGHT)
    assert accumulator.count == 1


@every_kind
@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1, 2**70])
def test_a_weight_out_of_bounds_is_refused_and_changes_nothing(kind: Kind, weight: int):
    accumulator = filled(kind, 3, 10)
    before = accumulator.to_bytes()
    updates, weights = updates_of(kind, 3, 10)
    with pytest.raises(BudgetExceeded, match="weight"):
        accumulator.add_many(updates, [*weights[:2], weight])
    assert accumulator.to_bytes() == before


@every_kind
def test_one_addend_too_many_is_refused_and_changes_nothing(kind: Kind):
    accumulator = filled(kind, MAX_COUNT, 10)
    before = accumulator.to_bytes()
    with pytest.raises(BudgetExceeded, match="max_count"):
        accumulator.add(updates_of(kind, 1, 10)[0][0], 1)
    with pytest.raises(BudgetExceeded, match="max_count"):
        accumulator.merge(filled(kind, 1, 10))
    assert accumulator.to_bytes() == before
    accumulator.merge(kind.make(10))
    assert accumulator.to_bytes() == before


@every_kind
def test_the_budget_counts_over_merges(kind: Kind):
    accumulator = filled(kind, MAX_COUNT // 2, 10)
    accumulator.merge(filled(kind, MAX_COUNT // 2, 10))
    assert accumulator.count == MAX_COUNT
    with pytest.raises(BudgetExceeded):
        accumulator.merge(filled(kind, 1, 10))


@every_kind
def test_other_shapes_and_dtypes_are_refused(kind: Kind):
    accumulator = kind.make(10)
    before = accumulator.to_bytes()
    (update,), _ = updates_of(kind, 1, 10)
    forms = [update[:9], np.append(update, update), update.reshape(2, 5), update.astype(np.float64)]
    forms += [update.astype(update.dtype.newbyteorder(">")), update.astype(np.int32)]
    for form in forms:
        with pytest.raises(ShapeMismatch, match="update 1 "):
            accumulator.add_many([update, form], [1, 1])
    with pytest.raises(ShapeMismatch, match="weights"):
        accumulator.add_many([update, update], [1])
    assert accumulator.to_bytes() == before


@every_kind
def test_an_accumulator_without_updates_has_no_mean(kind: Kind):
    accumulator = kind.make(10)
    accumulator.add_many([], [])
    assert (accumulator.count, accumulator.total_weight) == (0, 0)
    with pytest.raises(EmptyAggregate):
        accumulator.result()
    with pytest.raises(EmptyAggregate):
        accumulator.result_into(np.empty(10, np.float32))


@every_kind
@pytest.mark.parametrize("out", [np.empty(9, np.float32), np.empty(10), np.empty((2, 5), np.float32)])
def test_an_output_of_another_form_is_refused(kind: Kind, out: np.ndarray):
    with pytest.raises(ShapeMismatch):
        filled(kind, 1, 10).result_into(out)


@every_kind
@pytest.mark.parametrize("taken", [0, 1, 3, 8])
def test_taking_out_what_was_folded_leaves_the_bytes_of_the_rest(kind: Kind, taken: int):
    rng = np.random.default_rng(taken)
    updates = [kind.update(rng, 5000) for _ in range(8)]
    weights = [int(w) for w in rng.integers(1, MAX_WEIGHT + 1, 8)]
    whole, out, rest = (kind.make(5000) for _ in range(3))
    whole.add_many(updates, weights)
    out.add_many(updates[:taken], weights[:taken])
    rest.add_many(updates[taken:], weights[taken:])
    whole.subtract(out)
    assert whole.to_bytes() == rest.to_bytes()


@every_kind
def test_what_is_not_in_it_cannot_be_taken_out(kind: Kind):
    accumulator = filled(kind, 3, 10)
    before = accumulator.to_bytes()
    with pytest.raises(BudgetExceeded):
        accumulator.subtract(filled(kind, 4, 10))
    with pytest.raises(ConfigurationError):
        accumulator.subtract(kind.other(10))
    with pytest.raises(ShapeMismatch):
        accumulator.subtract(kind.make(11))
    assert accumulator.to_bytes() == before


@every_kind
def test_only_like_merges_with_like(kind: Kind):
    accumulator = filled(kind, 3, 10)
    before = accumulator.to_bytes()
    with pytest.raises(ConfigurationError):
        accumulator.merge(kind.other(10))
    with pytest.raises(ShapeMismatch):
        accumulator.merge(kind.make(11))
    assert accumulator.to_bytes() == before


@every_kind
def test_a_negative_size_is_refused(kind: Kind):
    with pytest.raises(ConfigurationError):
        kind.make(-1)


# --- bytes ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("size", [0, 1, 7, 2048, 5000])
def test_bytes_round_trip_and_the_copy_goes_on_like_the_original(kind: Kind, size: int):
    original = filled(kind, 9, size)
    copy = type(original).from_bytes(original.to_bytes())
    assert copy.to_bytes() == original.to_bytes()
    assert (copy.size, copy.count, copy.total_weight) == (size, 9, original.total_weight)
    more = updates_of(kind, 5, size, seed=2)
    original.add_many(*more)
    copy.add_many(*more)
    assert np.array_equal(copy.result(), original.result())
    assert copy.to_bytes() == original.to_bytes()


@every_kind
def test_every_truncation_is_refused(kind: Kind):
    accumulator = filled(kind, 3, 4)
    data = accumulator.to_bytes()
    for length in range(len(data)):
        with pytest.raises(TruncatedFrame):
            type(accumulator).from_bytes(data[:length])
    with pytest.raises(MalformedFrame):
        type(accumulator).from_bytes(data + b"\0")


@every_kind
def test_every_flipped_bit_is_refused_or_gives_another_accumulator(kind: Kind):
    """No two byte strings mean the same accumulator, and none crashes."""
    accumulator = filled(kind, 3, 3)
    data = accumulator.to_bytes()
    refused = 0
    for i in range(8 * len(data)):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        try:
            other = type(accumulator).from_bytes(changed)
        except MalformedFrame:
            refused += 1
        else:
            assert other.to_bytes() == changed
    assert refused > 0


@every_kind
def test_a_header_that_declares_terabytes_allocates_nothing(kind: Kind):
    accumulator = filled(kind, 3, 3)
    data = bytearray(accumulator.to_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")
    with pytest.raises(TruncatedFrame):
        type(accumulator).from_bytes(data)


@every_kind
def test_the_bytes_of_another_kind_are_refused(kind: Kind):
    for other in KINDS:
        data = filled(other, 3, 3).to_bytes()
        if type(other.make(3)) is not type(kind.make(3)):
            with pytest.raises(MalformedFrame):
                type(kind.make(3)).from_bytes(data)


@pytest.mark.parametrize("value", [-0.0, math.nan, math.inf, 1e300, 5e-324, 0.3])
def test_bins_that_no_addition_leaves_are_refused(value: float):
    data = bytearray(filled(KINDS[0], 3, 3).to_bytes())
    data[-8:] = np.array(value, "<f8").tobytes()
    with pytest.raises(MalformedFrame):
        ExactAccumulator.from_bytes(data)


def test_sums_beyond_the_total_weight_are_refused():
    accumulator = filled(KINDS[2], 3, 3)
    data = bytearray(accumulator.to_bytes())
    data[-8:] = (GRID.largest_code * accumulator.total_weight + 1).to_bytes(8, "little")
    with pytest.raises(MalformedFrame):
        Int64Accumulator.from_bytes(data)


def test_an_empty_accumulator_s_bytes_hold_zeros_only():
    data = bytearray(KINDS[0].make(3).to_bytes())
    assert ExactAccumulator.from_bytes(data).count == 0
    data[-8:] = np.array(2.0**-60, "<f8").tobytes()
    with pytest.raises(MalformedFrame):
        ExactAccumulator.from_bytes(data)


def test_plain_and_merged_integer_sums_are_those_of_python():
    updates, weights = updates_of(KINDS[2], 20, 50)
    accumulator = filled(KINDS[2], 20, 50)
    expected = [sum(w * int(q) for w, q in zip(weights, c, strict=True)) for c in np.array(updates).T]
    assert accumulator.sums.tolist() == expected
    assert not accumulator.sums.flags.writeable
