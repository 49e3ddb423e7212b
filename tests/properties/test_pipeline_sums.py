"""The specification's aggregators against exact arithmetic: order, grouping, refusals and kinds change no bit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.clipping import clip_global
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref import ByzantineRobustAggregator, GradientAggregator
from server_ref.aggregation import (
    ClipGlobal,
    EncodedUpdate,
    ExactMean,
    Facts,
    Pipeline,
    RobustRule,
    Sgd,
    intake,
)

relaxed = settings(deadline=None, max_examples=60)
# From the resolution to what the specification asks for; float32 exactly.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 2.0**-26, 1e8]),
    st.floats(2.0**-26, 1e8, width=32),
    st.integers(-26, 26).map(lambda e: 2.0**e),
).flatmap(lambda x: st.sampled_from([x, -x]))
SHAPES = {"w": (2, 3), "b": (3,), "scale": (), "empty": (0, 4)}
SIZE = 10


def tensors(vector, dtype=np.float32) -> dict[str, np.ndarray]:
    """The ten coordinates as named arrays, not all of them contiguous."""
    vector = np.asarray(vector, dtype)
    return {
        "w": np.asfortranarray(vector[:6].reshape(2, 3)),
        "b": np.repeat(vector[6:9], 2)[::2],
        "scale": vector[9],
        "empty": np.zeros((0, 4), dtype),
    }


MODEL = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def flat(found) -> np.ndarray:
    return np.concatenate([np.asarray(found[name]).reshape(-1) for name in SHAPES])


def worker(i: int, vector, weight: int = 1, **rest) -> WorkerGradient:
    return WorkerGradient(f"worker-{i}", tensors(vector), weight, timestamp=0.0, **rest)


def cohorts(most: int = 9) -> st.SearchStrategy[list[WorkerGradient]]:
    def of(n: int):
        return st.tuples(
            hnp.arrays(np.float32, (n, SIZE), elements=VALUES),
            st.lists(st.integers(1, 2**20), min_size=n, max_size=n),
        ).map(lambda t: [worker(i, row, w) for i, (row, w) in enumerate(zip(*t, strict=True))])

    return st.integers(1, most).flatmap(of)


def exact_mean(rows, weights) -> np.ndarray:
    """The sum in exact arithmetic, rounded once, over the total weight: float64."""
    products = np.asarray(rows, np.float64) * np.array(weights, np.float64)[:, None]
    sums = [math.fsum(column) for column in products.T.tolist()]
    assert sums == [float(sum(map(Fraction, column))) for column in products.T.tolist()]
    return np.array(sums) / sum(weights)


def rows_of(workers) -> np.ndarray:
    return np.array([flat(w.gradients) for w in workers])


@relaxed
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_mean_is_that_of_exact_arithmetic_in_any_order(workers, random):
    expected = exact_mean(rows_of(workers), [w.num_samples for w in workers])
    aggregator = GradientAggregator()
    for _ in range(3):
        found = aggregator.aggregate(iter(workers), MODEL)
        assert flat(found).tobytes() == expected.astype(np.float32).tobytes()
        assert {name: array.shape for name, array in found.items()} == SHAPES
        random.shuffle(workers)
    assert (found.count, found.total_weight) == (len(workers), sum(w.num_samples for w in workers))


@relaxed
@given(cohorts(), st.floats(1e-6, 1e6))
def test_the_clipped_mean_is_the_mean_of_clipped_updates(workers, clip_norm):
    clipped = [clip_global(row, clip_norm).vector for row in rows_of(workers)]
    expected = exact_mean(clipped, [w.num_samples for w in workers])
    # Half a step of the last grid for every worker: tiny products may lie below it.
    tolerance = len(workers) * 2.0**-55 * max(1.0, clip_norm)
    found = GradientAggregator(clip_norm=clip_norm).aggregate(
        workers, {k: v.astype(np.float64) for k, v in MODEL.items()}
    )
    np.testing.assert_allclose(flat(found), expected, rtol=1e-15, atol=tolerance)
    assert np.linalg.norm(flat(found)) <= clip_norm * (1 + 1e-12)


REFUSED = {
    "nan": lambda i: worker(i, np.full(SIZE, np.nan)),
    "infinite": lambda i: worker(i, [np.inf] + [0.0] * 9),
    "too large": lambda i: worker(i, [2e10] + [0.0] * 9),
    "no samples": lambda i: worker(i, np.zeros(SIZE), 0),
    "half a sample": lambda i: worker(i, np.ones(SIZE), 1.5),
    "the other kind": lambda i: worker(i, np.ones(SIZE), kind=UpdateKind.DELTA),
    "a name less": lambda i: WorkerGradient(f"worker-{i}", {"w": np.zeros((2, 3), np.float32)}, 1, 0.0),
    "a name more": lambda i: WorkerGradient(f"worker-{i}", tensors(np.ones(SIZE)) | {"x": np.zeros(1)}, 1, 0.0),
    "another shape": lambda i: WorkerGradient(f"worker-{i}", tensors(np.ones(SIZE)) | {"b": np.zeros((3, 1))}, 1, 0.0),
    "integers": lambda i: WorkerGradient(f"worker-{i}", tensors(np.ones(SIZE)) | {"b": np.zeros(3, int)}, 1, 0.0),
}


@relaxed
@given(cohorts(), st.lists(st.sampled_from(sorted(REFUSED)), max_size=5), st.randoms(use_true_random=False))
def test_refused_updates_change_no_bit_wherever_they_stand(workers, bad, random):
    aggregator = GradientAggregator(kind=UpdateKind.GRADIENT)
    before = flat(aggregator.aggregate(workers, MODEL)).tobytes()
    mixed = [*workers, *(REFUSED[name](100 + i) for i, name in enumerate(bad))]
    random.shuffle(mixed)
    assert flat(aggregator.aggregate(mixed, MODEL)).tobytes() == before
    assert {r.worker_id for r in aggregator.rejections} == {f"worker-{100 + i}" for i in range(len(bad))}
    assert [mixed[r.position].worker_id for r in aggregator.rejections] == [r.worker_id for r in aggregator.rejections]


@relaxed
@given(cohorts(most=20), st.integers(1, 60), st.sampled_from(["exact", "fixed"]))
def test_how_many_updates_are_folded_together_changes_no_bit(workers, elements, summation):
    options = {"max_abs": 1e8, "max_workers": 20, "max_weight": 2**8, "summation": summation}
    found = flat(GradientAggregator(**options).aggregate(workers, MODEL)).tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "_ELEMENTS_AT_ONCE", elements)
        assert flat(GradientAggregator(**options).aggregate(workers, MODEL)).tobytes() == found


@relaxed
@given(cohorts())
def test_torch_and_numpy_give_the_same_bits_each_in_its_own_kind(workers):
    as_torch = [
        WorkerGradient(
            w.worker_id, {k: torch.from_numpy(np.array(v)) for k, v in w.gradients.items()}, w.num_samples, 0.0
        )
        for w in workers
    ]
    model = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    arrays = GradientAggregator().aggregate(workers, MODEL)
    found = GradientAggregator().aggregate(as_torch, model)
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in found.values())
    assert flat(found).tobytes() == flat(arrays).tobytes()
    crossed = GradientAggregator().aggregate(as_torch, MODEL)
    assert all(isinstance(a, np.ndarray) for a in crossed.values())
    assert flat(crossed).tobytes() == flat(arrays).tobytes()


@relaxed
@given(hnp.arrays(np.float32, (7, SIZE), elements=st.floats(-100, 100, width=32)), st.permutations(range(7)))
@pytest.mark.parametrize("rule", ["krum", "multi-krum", "median", "trimmed-mean", "geometric-median"])
def test_a_robust_rule_gives_the_same_bits_in_any_order_unless_updates_tie(rule, rows, order):
    # Distances that no two updates share: a ramp of powers on top of whatever was drawn. (Bulyan ties by itself: among
    # its last candidates each has the other as its only neighbour.)
    rows = rows + np.float32(1000) * np.float32(1.7) ** np.arange(7, dtype=np.float32)[:, None]
    workers = [worker(i, row) for i, row in enumerate(rows)]
    aggregator = ByzantineRobustAggregator(rule, 1)
    found = flat(aggregator.aggregate_byzantine_robust(workers, MODEL))
    shuffled = aggregator.aggregate_byzantine_robust([workers[i] for i in order], MODEL)
    assert flat(shuffled).tobytes() == found.tobytes()


FACTS = Facts(size=3, kind=UpdateKind.DELTA, capacity=200, max_weight=100, max_abs=1e8)


@relaxed
@given(
    st.lists(
        st.tuples(st.lists(VALUES, min_size=3, max_size=3), st.integers(1, 100), st.booleans()), min_size=1, max_size=20
    ),
    st.sampled_from(
        [
            (ExactMean(),),
            (ExactMean(), ClipGlobal(10.0)),
            (ExactMean("fixed"), ClipGlobal(10.0)),
            (RobustRule("median", 0),),
        ]
    ),
    st.randoms(use_true_random=False),
)
def test_a_fold_depends_on_what_is_in_it_and_not_on_how_it_came_there(drawn, stages, random):
    """Batches of any size in any order, with updates that come and go in between."""
    pipeline = Pipeline.build(*stages, Sgd(), facts=FACTS)
    admitted = [
        (pipeline.admit(EncodedUpdate(i, np.array(row, np.float32), weight=weight)), stays)
        for i, (row, weight, stays) in enumerate(drawn)
    ]
    staying = [update for update, stays in admitted if stays] or [admitted[0][0]]
    plain = pipeline.start()
    plain.add(staying)
    fold, todo, inside = pipeline.start(), [update for update, _ in admitted], []
    random.shuffle(todo)
    while todo:
        batch = [todo.pop() for _ in range(random.randint(1, len(todo)))]
        fold.add(batch)
        inside += [update for update in batch if update not in staying]
        random.shuffle(inside)
        leaving = [inside.pop() for _ in range(random.randint(0, len(inside)))]
        fold.discard(leaving)
    fold.discard(inside)
    assert fold.count == len(staying)
    found, expected = fold.finish(), plain.finish()
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.measurements == expected.measurements
    assert dict(found.sensitivity) == dict(expected.sensitivity)
