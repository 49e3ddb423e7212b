"""Splits and batches of meta-learning: nothing leaks, nothing depends on what it should not, everybody draws alike."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import NotEnoughExamples
from client_sdk.protocol.meta_learning import ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import epoch_order


@st.composite
def device_examples(draw, *, distinct=False):
    """A device's examples, some of them equal: x float32[n, 3], y int64[n]."""
    n = draw(st.integers(1, 40))
    classes = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.normal(size=(n, 3)).astype(np.float32)
    y = rng.integers(0, classes, n)
    if not distinct and n > 1 and draw(st.booleans()):
        copies = rng.integers(0, n, n // 2)
        x[: n // 2], y[: n // 2] = x[copies], y[copies]
    return x, y


def contents(x, y, rows):
    return {(x[i].tobytes(), int(y[i])) for i in rows}


fractions = st.floats(0.01, 0.99)


@given(device_examples(), fractions)
def test_a_split_takes_every_example_once_and_equal_ones_to_one_side(examples, fraction):
    x, y = examples
    split = ExampleSplit.of(x, y, fraction, require_query=False)
    assert sorted([*split.support, *split.query]) == list(range(len(x)))
    assert not contents(x, y, split.support) & contents(x, y, split.query)
    assert len(split.support) >= 1


@given(device_examples(), fractions, st.randoms(use_true_random=False))
def test_a_split_is_the_same_in_any_order_of_the_examples(examples, fraction, random):
    x, y = examples
    order = list(range(len(x)))
    random.shuffle(order)
    here = ExampleSplit.of(x, y, fraction, require_query=False)
    there = ExampleSplit.of(x[order], y[order], fraction, require_query=False)
    assert contents(x, y, here.query) == contents(x[order], y[order], there.query)


@given(device_examples(distinct=True), fractions)
def test_the_fraction_judges_and_each_class_keeps_an_example_to_adapt_with(examples, fraction):
    x, y = examples
    split = ExampleSplit.of(x, y, fraction, require_query=False)
    sizes = {int(c): int((y == c).sum()) for c in np.unique(y)}
    found = {c: int((y[split.query] == c).sum()) for c in sizes}
    spare = sum(sizes.values()) - len(sizes)
    if spare == 0:
        assert sum(found.values()) == (1 if len(sizes) > 1 else 0)
        return
    assert sum(found.values()) == min(max(1, round(fraction * len(x))), spare)
    assert all(found[c] < sizes[c] for c in sizes)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.floats(0.1, 0.5))
def test_each_class_gives_about_as_large_a_part(sizes, fraction):
    y = np.repeat(np.arange(len(sizes)), sizes)
    x = np.arange(len(y), dtype=np.float32)[:, None]
    found = np.bincount(y[ExampleSplit.of(x, y, fraction).query], minlength=len(sizes))
    if round(fraction * len(y)) >= 1:
        assert (np.abs(found - fraction * np.array(sizes)) <= 1).all()


@given(device_examples(), fractions)
def test_two_different_examples_are_enough_and_one_is_not(examples, fraction):
    x, y = examples
    if len(contents(x, y, range(len(x)))) > 1:
        assert len(ExampleSplit.of(x, y, fraction).query) >= 1
    else:
        with pytest.raises(NotEnoughExamples):
            ExampleSplit.of(x, y, fraction)


def test_no_examples_are_refused_with_and_without_a_query():
    x, y = np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
    for require_query in (True, False):
        with pytest.raises(NotEnoughExamples):
            ExampleSplit.of(x, y, 0.2, require_query=require_query)


@st.composite
def sessions(draw):
    x, y = draw(device_examples(distinct=True))
    split = ExampleSplit.of(x, y, 0.3, require_query=False)
    plan = MetaPlan(inner_steps=draw(st.integers(1, 7)), query_batches=draw(st.integers(1, 4)))
    return split, plan, draw(st.integers(1, 9)), draw(st.integers(0, 2**64 - 1)), draw(st.booleans())


@given(sessions(), st.sampled_from(["maml", "fomaml", "per-fedavg"]))
def test_adaptation_never_sees_a_query_example(session, algorithm):
    split, plan, size, seed, shuffle = session
    if not len(split.query):
        return
    batches = MetaBatches.of(algorithm, plan, split, batch_size=size, seed=seed, shuffle=shuffle)
    adapting = {int(i) for batch in (*batches.support, *batches.hessian) for i in batch}
    judging = {int(i) for batch in batches.query for i in batch}
    assert adapting <= set(split.support.tolist())
    assert judging <= set(split.query.tolist())
    assert len(batches.support) == plan.inner_steps
    assert all(1 <= len(batch) <= size for batch in (*batches.support, *batches.query, *batches.hessian))


@given(sessions())
def test_the_query_batches_of_one_meta_gradient_share_no_example(session):
    split, plan, size, seed, shuffle = session
    if not len(split.query):
        return
    batches = MetaBatches.of("maml", plan, split, batch_size=size, seed=seed, shuffle=shuffle).query
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == len(rows) == min(plan.query_batches * size, len(split.query))
    assert len(batches) == min(plan.query_batches, math.ceil(len(split.query) / size))


@given(sessions())
def test_each_epoch_of_a_stream_sees_every_example_once(session):
    split, plan, size, seed, shuffle = session
    batches = MetaBatches.of("reptile", plan, split, batch_size=size, seed=seed, shuffle=shuffle)
    everything = sorted([*split.support, *split.query])
    seen = np.concatenate(batches.support).tolist()
    for at in range(0, len(seen), len(everything)):
        epoch = seen[at : at + len(everything)]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < len(everything) or sorted(epoch) == everything
    assert batches.query == batches.hessian == ()


@given(sessions(), st.integers(1, 100))
def test_reptile_sees_what_as_many_steps_of_ordinary_training_see(session, epochs):
    split, plan, size, seed, shuffle = session
    n = len(split.support) + len(split.query)
    batches = MetaBatches.of("reptile", plan, split, batch_size=size, seed=seed, shuffle=shuffle).support
    ordinary = TrainingPlan(batch_size=size, shuffle=shuffle, local_epochs=epochs)
    expected = []
    for epoch in range(plan.inner_steps):
        order = epoch_order(n, ordinary, seed, epoch)
        expected += [order[at : at + size] for at in range(0, n, size)]
    for mine, theirs in zip(batches, expected, strict=False):
        np.testing.assert_array_equal(mine, theirs)


def test_the_streams_of_one_session_are_shuffled_apart():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 2)).astype(np.float32), np.zeros(400, np.int64)
    split = ExampleSplit.of(x, y, 0.5)
    plan = MetaPlan(inner_steps=3)
    batches = MetaBatches.of("per-fedavg", plan, split, batch_size=100, seed=7, shuffle=True)
    assert not np.array_equal(batches.support[0], batches.hessian[0])
    again = MetaBatches.of("per-fedavg", plan, split, batch_size=100, seed=7, shuffle=True)
    other = MetaBatches.of("per-fedavg", plan, split, batch_size=100, seed=8, shuffle=True)
    np.testing.assert_array_equal(batches.support[0], again.support[0])
    assert not np.array_equal(batches.support[0], other.support[0])
