"""Named tensors to a flat vector and back: kinds, dtypes, shapes, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch, UpdateOutOfRange
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import AggregatedUpdate, TensorLayout, apply_update

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
STATES = st.dictionaries(st.text(max_size=4), SHAPES.flatmap(lambda s: hnp.arrays(np.float32, s, elements=FLOATS)))


def flattened(layout: TensorLayout, tensors) -> np.ndarray:
    out = np.full(layout.size, np.nan, np.float32)
    layout.flatten(tensors, out)
    return out


@given(STATES)
def test_what_goes_in_comes_back(state):
    layout = TensorLayout.of(state)
    flat = flattened(layout, state)
    assert flat.tobytes() == b"".join(array.tobytes() for array in state.values())
    back = layout.unflatten(flat.astype(np.float64))
    assert list(back) == list(state)
    for name, array in state.items():
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    assert sum(stop - start for start, stop in layout.layers) == layout.size


@given(STATES)
def test_torch_tensors_come_back_as_torch_tensors_with_the_same_bits(state):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    layout = TensorLayout.of(tensors)
    assert flattened(layout, tensors).tobytes() == flattened(TensorLayout.of(state), state).tobytes()
    back = layout.unflatten(flattened(layout, tensors).astype(np.float64))
    assert all(isinstance(back[name], torch.Tensor) and torch.equal(back[name], t) for name, t in tensors.items())


@given(STATES, st.randoms(use_true_random=False))
def test_the_order_of_an_update_s_names_and_the_strides_of_its_arrays_do_not_matter(state, random):
    names = list(state)
    random.shuffle(names)
    strided = {name: np.array(state[name], order="F") for name in names}
    reversed_twice = {name: state[name][..., ::-1][..., ::-1] if state[name].ndim else state[name] for name in names}
    layout = TensorLayout.of(state)
    for tensors in (strided, reversed_twice):
        assert flattened(layout, tensors).tobytes() == flattened(layout, state).tobytes()
    transposed = {
        name: torch.from_numpy(np.ascontiguousarray(a.T)).mT if a.ndim == 2 else a for name, a in state.items()
    }
    assert flattened(layout, transposed).tobytes() == flattened(layout, state).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_of_torch_is_read_and_the_model_s_is_written(dtype: torch.dtype):
    values = [1.0, -0.15625, 3.0e-3, 65504.0 if dtype is torch.float16 else 1e10]
    tensor = torch.tensor(values, dtype=dtype, requires_grad=True)
    layout = TensorLayout.of({"w": tensor})
    flat = flattened(layout, {"w": tensor})
    assert flat.tolist() == tensor.detach().float().tolist()
    back = layout.unflatten(np.array(values))["w"]
    assert back.dtype is dtype
    assert torch.equal(back, torch.tensor(values, dtype=torch.float64).to(dtype))
    assert not back.requires_grad


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_every_floating_dtype_of_numpy_is_read_and_the_model_s_is_written(dtype):
    array = np.array([1.0, -0.15625, 3.0e-3], dtype)
    layout = TensorLayout.of({"w": array})
    assert flattened(layout, {"w": array}).tolist() == array.astype(np.float32).tolist()
    back = layout.unflatten(np.array([1.0, -0.15625, 3.0e-3]))["w"]
    assert back.dtype == np.dtype(dtype)
    assert back.tolist() == array.tolist()


def test_float64_is_rounded_once_to_the_nearest_float32():
    value = 1 + 2.0**-24 + 2.0**-40
    layout = TensorLayout.of({"w": np.zeros(1, np.float32)})
    assert flattened(layout, {"w": np.array([value])}).tolist() == [1 + 2.0**-23]
    assert flattened(layout, {"w": torch.tensor([value], dtype=torch.float64)}).tolist() == [1 + 2.0**-23]


@pytest.mark.parametrize("huge", [np.array([1e100]), torch.tensor([-1e100], dtype=torch.float64), np.array([3.5e38])])
def test_what_float32_cannot_hold_is_out_of_range_rather_than_infinite(huge):
    with pytest.raises(UpdateOutOfRange, match="'w'"):
        flattened(TensorLayout.of({"w": np.zeros(1)}), {"w": huge})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_nan_and_infinities_are_handed_on_for_the_pipeline_to_refuse(make, bad: float):
    flat = flattened(TensorLayout.of({"w": np.zeros(2)}), {"w": make([bad, 1.0])})
    assert not np.isfinite(flat[0])
    assert flat[1] == 1


def test_scalars_that_numpy_makes_of_arrays_without_dimensions_count_as_such():
    layout = TensorLayout.of({"b": np.float32(2) - np.float32(1)})
    assert flattened(layout, {"b": np.array(3.0) - np.array(1.0)}).tolist() == [2]
    assert layout.unflatten(np.array([2.0]))["b"].shape == ()


def test_integer_buffers_are_no_part_of_an_update():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    layout = TensorLayout.of(model)
    assert "1.num_batches_tracked" not in layout.entries
    assert flattened(layout, model).size == 6 + 2 + 4 * 2
    without = {name: t for name, t in model.items() if name != "1.num_batches_tracked"}
    assert flattened(layout, without).tobytes() == flattened(layout, model).tobytes()
    assert "1.num_batches_tracked" not in layout.unflatten(np.zeros(layout.size))


GOOD = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
BAD = {
    "nothing": {},
    "a list of tensors": [GOOD["w"]],
    "a name less": {"w": GOOD["w"]},
    "a name more": GOOD | {"c": np.zeros(1)},
    "another name": {"w": GOOD["w"], "B": GOOD["b"]},
    "another shape": GOOD | {"w": np.zeros((3, 2))},
    "a dimension more": GOOD | {"b": np.zeros((3, 1))},
    "a scalar": GOOD | {"b": np.zeros(())},
    "integers": GOOD | {"b": np.zeros(3, np.int64)},
    "truth values": GOOD | {"b": np.zeros(3, bool)},
    "complex numbers": GOOD | {"b": np.zeros(3, complex)},
    "objects": GOOD | {"b": np.array([1.0, None, 2.0])},
    "text": GOOD | {"b": np.array(["1", "2", "3"])},
    "long doubles": GOOD | {"b": np.zeros(3, np.longdouble)},
    "a list": GOOD | {"b": [0.0, 0.0, 0.0]},
    "a number": GOOD | {"b": 0.0},
    "none": GOOD | {"b": None},
    "torch integers": GOOD | {"b": torch.zeros(3, dtype=torch.int32)},
    "torch complex": GOOD | {"b": torch.zeros(3, dtype=torch.complex64)},
    "a sparse tensor": GOOD | {"b": torch.zeros(3).to_sparse()},
    "a tensor without data": GOOD | {"b": torch.zeros(3, device="meta")},
}


@pytest.mark.parametrize("tensors", BAD.values(), ids=BAD)
def test_an_update_of_another_make_is_refused(tensors):
    with pytest.raises(ShapeMismatch):
        flattened(TensorLayout.of(GOOD), tensors)


@pytest.mark.parametrize("value", [[0.0], None, "w", 1.0, np.zeros(2, complex), torch.zeros(2, dtype=torch.complex64)])
def test_a_model_of_something_else_is_refused(value):
    with pytest.raises(ConfigurationError, match="'w'"):
        TensorLayout.of({"w": value})


@pytest.mark.parametrize(
    ("like", "value"),
    [
        (np.zeros(1, np.float16), 1e5),
        (np.zeros(1, np.float32), 1e39),
        (torch.zeros(1, dtype=torch.float16), -1e5),
        (torch.zeros(1, dtype=torch.bfloat16), 1e39),
    ],
)
def test_an_aggregate_beyond_the_model_s_dtype_is_refused_and_not_made_infinite(like, value: float):
    with pytest.raises(UpdateOutOfRange, match=r"float16|float32"):
        TensorLayout.of({"w": like}).unflatten(np.array([value]))


# --- applying it -------------------------------------------------------------------------------------------


def aggregated(kind: UpdateKind, **tensors) -> AggregatedUpdate:
    return AggregatedUpdate(tensors, kind=kind, count=1, total_weight=1, measurements={})


@pytest.mark.parametrize(("kind", "expected"), [(UpdateKind.DELTA, 2.0), (UpdateKind.GRADIENT, 0.0)])
@pytest.mark.parametrize("like", [np.ones((2, 2), np.float32), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)])
def test_deltas_are_added_and_gradients_subtracted(kind: UpdateKind, expected: float, like):
    state = {"w": like, "steps": np.array(7)}
    after = apply_update(state, aggregated(kind, w=like * 2), learning_rate=0.5)
    assert type(after["w"]) is type(like)
    assert after["w"].dtype == like.dtype
    assert after["w"].tolist() == [[expected] * 2] * 2
    assert after["steps"] is state["steps"]
    assert like.tolist() == [[1.0] * 2] * 2


def test_a_step_is_computed_in_float64_and_rounded_once():
    step = 2.0**-24 + 2.0**-30
    after = apply_update(
        {"w": np.ones(1, np.float32)}, aggregated(UpdateKind.DELTA, w=np.full(1, 2 * step)), learning_rate=0.5
    )
    assert after["w"].tolist() == [1 + 2.0**-23]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_that_is_none_is_refused(rate: float):
    with pytest.raises(ConfigurationError, match="learning_rate"):
        apply_update({"w": np.ones(1)}, aggregated(UpdateKind.DELTA, w=np.ones(1)), learning_rate=rate)


@pytest.mark.parametrize("tensors", [{}, {"x": np.ones(1)}, {"w": np.ones(1), "x": np.ones(1)}, {"w": np.ones(2)}])
def test_an_update_of_another_model_is_not_applied(tensors):
    with pytest.raises(ShapeMismatch):
        apply_update({"w": np.ones(1)}, aggregated(UpdateKind.DELTA, **tensors))


def test_a_model_that_would_leave_its_range_is_refused():
    with pytest.raises(UpdateOutOfRange):
        apply_update({"w": np.full(1, 6e4, np.float16)}, aggregated(UpdateKind.DELTA, w=np.full(1, 6e4)))


def test_numpy_alone_never_loads_torch():
    code = (
        "import sys, numpy as np\n"
        "from server_ref import GradientAggregator, WorkerGradient, apply_update\n"
        "model = {'w': np.zeros(3, np.float32)}\n"
        "update = GradientAggregator().aggregate([WorkerGradient('a', {'w': np.ones(3)}, 1, 0.0)], model)\n"
        "print(apply_update(model, update)['w'].tolist(), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[-1.0, -1.0, -1.0] False"
