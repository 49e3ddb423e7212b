"""``CompressedGradientAggregator``: what is sent, what is kept, what is refused."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import (
    ConfigurationError,
    MalformedEncoding,
    NonFiniteUpdate,
    ProtocolError,
    ShapeMismatch,
)
from client_sdk.protocol.updates import WorkerGradient
from server_ref import CompressedGradientAggregator, GradientAggregator

SHAPES = {"w": (4, 5), "b": (5,), "scale": (), "empty": (0, 3)}
SIZE = 26
MODEL = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
VALUES = st.floats(-100, 100, width=32)


def tensors(flat) -> dict[str, np.ndarray]:
    flat = np.asarray(flat, np.float32)
    return {"w": flat[:20].reshape(4, 5), "b": flat[20:25], "scale": flat[25], "empty": np.zeros((0, 3), np.float32)}


def flatten(named) -> np.ndarray:
    return np.concatenate([np.asarray(named[name]).reshape(-1) for name in SHAPES])


def drawn(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def test_the_largest_values_of_the_whole_update_are_sent_with_their_places():
    flat = drawn()
    compressed, metadata = CompressedGradientAggregator(0.2).compress_gradient(tensors(flat), "a")
    chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:5])
    assert metadata["num_values"] == 5
    assert sum(values.size for values in compressed.values()) == 5
    assert metadata["shapes"] == SHAPES
    dense = np.zeros(SIZE, np.float32)
    dense[chosen] = flat[chosen]
    found = CompressedGradientAggregator().decompress_gradient(compressed, metadata)
    assert {name: array.shape for name, array in found.items()} == SHAPES
    assert flatten(found).tobytes() == dense.tobytes()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"compression_method": "topk"}, "topk:0.2"),
        ({"compression_method": "topk", "value_bits": 8}, "topk:0.2,bits=8"),
        ({"compression_method": "randomk"}, "randomk:0.2,feedback=on"),
        ({"compression_method": "randomk", "error_feedback": False, "value_bits": 4}, "randomk:0.2,bits=4"),
        ({"compression_method": "threshold", "threshold": 0.7}, "threshold:0.7"),
    ],
)
def test_the_payload_is_what_a_device_would_upload_and_says_the_same_as_values_and_indices(options: dict, line: str):
    aggregator = CompressedGradientAggregator(0.2, **options)
    for number in range(3):
        compressed, metadata = aggregator.compress_gradient(tensors(drawn(number)), "a")
        received = Codec(CompressionSpec.parse(line), SIZE).decode(metadata["payload"], metadata["seed"])
        assert flatten(aggregator.decompress_gradient(compressed, metadata)).tobytes() == received.tobytes()
        assert metadata["num_bytes"] == len(metadata["payload"])
    assert aggregator.stats.dense_bytes == 3 * 4 * SIZE


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (6, SIZE), elements=VALUES),
    st.sampled_from([("topk", {}), ("randomk", {}), ("threshold", {"threshold": 3.0})]),
)
def test_what_was_sent_and_what_is_kept_add_up_to_what_there_was(updates, choice):
    """Bit for bit: a coordinate is sent as it is or kept as it is, whatever the rounds before."""
    method, options = choice
    aggregator = CompressedGradientAggregator(0.2, method, **options)
    residual = np.zeros(SIZE, np.float32)
    for update in updates:
        sent = flatten(aggregator.decompress_gradient(*aggregator.compress_gradient(tensors(update), "a")))
        there_was = update + residual + np.float32(0)
        residual = there_was - sent + np.float32(0)
        assert (sent + residual + np.float32(0)).tobytes() == there_was.tobytes()
        assert not np.any((sent != 0) & (residual != 0))
        assert aggregator.residual_norm("a") == pytest.approx(float(np.linalg.norm(residual.astype(float))))


def test_every_worker_has_a_residual_of_its_own_and_can_be_forgotten():
    aggregator = CompressedGradientAggregator(0.2)
    first = flatten(aggregator.decompress_gradient(*aggregator.compress_gradient(tensors(drawn()), "a")))
    assert aggregator.residual_norm("a") > 0
    assert aggregator.residual_norm("b") == 0
    other = flatten(aggregator.decompress_gradient(*aggregator.compress_gradient(tensors(drawn()), "b")))
    assert other.tobytes() == first.tobytes()
    second = flatten(aggregator.decompress_gradient(*aggregator.compress_gradient(tensors(drawn()), "a")))
    assert second.tobytes() != first.tobytes()
    aggregator.forget("a")
    assert aggregator.residual_norm("a") == 0
    again = flatten(aggregator.decompress_gradient(*aggregator.compress_gradient(tensors(drawn()), "a")))
    assert again.tobytes() == first.tobytes()


def test_without_error_feedback_nothing_is_kept():
    aggregator = CompressedGradientAggregator(0.2, error_feedback=False)
    rounds = [aggregator.compress_gradient(tensors(drawn()), "a")[1]["payload"] for _ in range(3)]
    assert len(set(rounds)) == 1
    assert aggregator.residual_norm("a") == 0


def test_random_coordinates_are_the_same_for_all_workers_of_a_round_and_others_in_the_next():
    aggregator = CompressedGradientAggregator(0.2, "randomk", error_feedback=False)

    def places(worker: str, **seed) -> list[int]:
        _, metadata = aggregator.compress_gradient(tensors(np.ones(SIZE)), worker, **seed)
        return flatten(
            {n: np.isin(np.arange(np.prod(s, dtype=int)), metadata["indices"][n]) for n, s in SHAPES.items()}
        ).tolist()

    rounds = [[places(worker) for worker in "abc"] for _ in range(3)]
    assert all(a == b == c for a, b, c in rounds)
    assert rounds[0][0] != rounds[1][0] != rounds[2][0]
    assert places("a", seed=0) == rounds[0][0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_and_the_residual_stays(bad: float):
    aggregator = CompressedGradientAggregator(0.2)
    aggregator.compress_gradient(tensors(drawn()), "a")
    before = aggregator.residual_norm("a")
    flat = drawn(1)
    flat[3] = bad
    with pytest.raises(NonFiniteUpdate):
        aggregator.compress_gradient(tensors(flat), "a")
    assert aggregator.residual_norm("a") == before


def test_a_residual_of_another_model_is_not_added():
    aggregator = CompressedGradientAggregator(0.2)
    aggregator.compress_gradient({"w": np.ones((2, 3), np.float32)}, "a")
    with pytest.raises(ShapeMismatch, match="forget"):
        aggregator.compress_gradient({"w": np.ones((3, 2), np.float32)}, "a")
    with pytest.raises(ConfigurationError):
        aggregator.compress_gradient({"w": [1.0]}, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_goes_in_and_comes_out_whatever_its_dtype_and_strides(dtype: torch.dtype):
    gradient = {"w": torch.arange(12, dtype=dtype).reshape(3, 4).T, "b": torch.tensor(-100.0, dtype=dtype)}
    aggregator = CompressedGradientAggregator(0.4)
    compressed, metadata = aggregator.compress_gradient(gradient, "a")
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in compressed.values())
    found = aggregator.decompress_gradient(compressed, metadata)
    assert found["b"].shape == ()
    assert found["b"].item() == -100.0
    expected = torch.where(gradient["w"].float() >= 8, gradient["w"].float(), 0.0)
    assert torch.equal(found["w"], expected)


@pytest.mark.parametrize(
    "gradient",
    [{}, {"w": np.zeros((0, 3), np.float32)}, {"w": np.zeros((3, 4), np.float32)}, {"b": np.array(2.5)}],
    ids=["nothing", "an empty tensor", "zeros", "a scalar"],
)
def test_the_smallest_updates_make_the_round_trip(gradient):
    aggregator = CompressedGradientAggregator(0.01)
    found = aggregator.decompress_gradient(*aggregator.compress_gradient(gradient, "a"))
    assert {name: a.tolist() for name, a in found.items()} == {name: a.tolist() for name, a in gradient.items()}


# --- the server's part -------------------------------------------------------------------------------------


def compressed_worker(aggregator, name: str, flat, weight: int = 1) -> WorkerGradient:
    compressed, metadata = aggregator.compress_gradient(tensors(flat), name)
    return WorkerGradient(name, compressed, weight, timestamp=0.0, metadata=metadata)


@pytest.mark.parametrize("method", ["topk", "randomk"])
def test_the_aggregate_is_the_exact_mean_of_what_was_sent(method: str):
    aggregator = CompressedGradientAggregator(0.3, method)
    workers = [compressed_worker(aggregator, f"w{i}", drawn(i), 1 + i) for i in range(5)]
    opened = [
        WorkerGradient(w.worker_id, aggregator.decompress_gradient(w.gradients, w.metadata), w.num_samples, 0.0)
        for w in workers
    ]
    expected = GradientAggregator().aggregate(opened, MODEL)
    for given_workers in (workers, opened, workers[:2] + opened[2:]):
        assert flatten(aggregator.aggregate(given_workers, MODEL)).tobytes() == flatten(expected).tobytes()


def test_random_coordinates_without_feedback_are_right_in_expectation():
    aggregator = CompressedGradientAggregator(0.25, "randomk", error_feedback=False)
    flat, rounds = drawn(), 500
    total = np.zeros(SIZE)
    for _ in range(rounds):
        total += flatten(aggregator.aggregate([compressed_worker(aggregator, "a", flat)], MODEL))
    # A coordinate is d/k times too large in k/d of the rounds: five standard deviations of that mean.
    share = int(0.25 * SIZE) / SIZE
    tolerance = 5 * np.abs(flat) * np.sqrt((1 - share) / share / rounds)
    assert (np.abs(total / rounds - flat) <= tolerance).all()


def test_a_robust_rule_can_take_the_place_of_the_mean():
    aggregator = CompressedGradientAggregator(0.5, aggregation_rule="krum", num_byzantine=1)
    honest = drawn()
    workers = [compressed_worker(aggregator, f"w{i}", honest + 0.001 * drawn(10 + i)) for i in range(5)]
    liar = compressed_worker(aggregator, "liar", -100 * honest)
    found = aggregator.aggregate([liar, *workers], MODEL)
    assert found.measurements["excluded"] != []
    sent = flatten(aggregator.decompress_gradient(workers[0].gradients, workers[0].metadata))
    assert np.linalg.norm(flatten(found) - sent) < 0.1 * np.linalg.norm(sent)


def hostile():
    good, metadata = CompressedGradientAggregator(0.2).compress_gradient({"w": np.arange(20, dtype=np.float32)}, "a")
    values, indices = good["w"], metadata["indices"]["w"]

    def case(values=values, indices=indices, shape=(20,), names=("w", "w", "w")):
        return {names[0]: values}, {"indices": {names[1]: indices}, "shapes": {names[2]: shape}}

    return {
        "no indices": (good, {"shapes": metadata["shapes"]}),
        "no shapes": (good, {"indices": metadata["indices"]}),
        "other names": case(names=("w", "v", "w")),
        "shapes of others": case(names=("w", "w", "v")),
        "an index too large": case(indices=indices + 17),
        "a negative index": case(indices=indices - 17),
        "indices out of order": case(indices=indices[::-1].copy()),
        "a repeated index": case(indices=indices // 2),
        "indices that are no integers": case(indices=indices.astype(np.float32)),
        "indices in two dimensions": case(values=values[:, None], indices=indices[:, None]),
        "a value less": case(values=values[:-1]),
        "values in float64": case(values=values.astype(np.float64)),
        "nan": case(values=values * np.float32(np.nan)),
        "infinite": case(values=values + np.float32(np.inf)),
        "a negative shape": case(shape=(-20,)),
        "a shape of text": case(shape=("20",)),
        "a shape that is a number": case(shape=20),
        "more than any update has": case(shape=(2**40,)),
        "a bomb in many dimensions": case(shape=(2**20, 2**20, 2**20)),
        "values that are a list": case(values=values.tolist()),
        "indices that are none": case(indices=None),
    }


@pytest.mark.parametrize(("compressed", "metadata"), hostile().values(), ids=hostile())
def test_hostile_input_is_refused_by_a_typed_error_and_recorded(compressed, metadata):
    aggregator = CompressedGradientAggregator(0.2)
    with pytest.raises((MalformedEncoding, NonFiniteUpdate, ShapeMismatch)):
        aggregator.decompress_gradient(compressed, metadata)
    if "indices" not in metadata:
        return  # then it claims to be dense already, and is refused as such
    model = {"w": np.zeros(20, np.float32)}
    good = WorkerGradient("good", {"w": np.ones(20, np.float32)}, 1, 0.0)
    found = aggregator.aggregate([WorkerGradient("bad", compressed, 1, 0.0, metadata), good], model)
    assert found["w"].tolist() == [1.0] * 20
    assert [r.worker_id for r in aggregator.rejections] == ["bad"]
    assert issubclass(aggregator.rejections[0].error, ProtocolError)


def test_an_update_of_another_model_is_refused_before_it_is_opened():
    aggregator = CompressedGradientAggregator(0.5)
    compressed, metadata = aggregator.compress_gradient({"w": np.ones(4, np.float32)}, "a")
    worker = WorkerGradient("a", compressed, 1, 0.0, metadata)
    assert aggregator.validate_gradient(worker, {"w": np.zeros(4)})
    # Two values that claim to belong to a hundred million: nothing of that size is allocated for them.
    inflated = replace(worker, metadata={**metadata, "shapes": {"w": (100_000_000,)}})
    tracemalloc.start()
    try:
        assert not aggregator.validate_gradient(inflated, {"w": np.zeros(4)})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
