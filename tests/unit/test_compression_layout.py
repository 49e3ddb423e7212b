"""Named arrays as one vector: any strides, shapes and floating-point dtypes, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.compression import Codec, CompressionSpec, Layout
from client_sdk.protocol.errors import NonFiniteUpdate, ShapeMismatch

arrays = st.dictionaries(
    st.text(max_size=5),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.floats(width=32, allow_nan=False),
    ),
    max_size=5,
)


@settings(deadline=None)
@given(arrays, st.randoms())
def test_arrays_come_back_in_name_shape_and_bits(named, rng):
    layout = Layout.of(named)
    shuffled = dict(rng.sample(list(named.items()), len(named)))
    vector = layout.flatten(shuffled)
    assert vector.tobytes() == b"".join(array.tobytes() for array in named.values())
    back = layout.unflatten(vector)
    assert list(back) == list(named)
    assert all(back[name].shape == a.shape and back[name].tobytes() == a.tobytes() for name, a in named.items())


def test_strides_and_dtypes_do_not_matter():
    base = np.arange(24, dtype=np.float64).reshape(4, 6)
    named = {"t": base.T, "s": base[::2, ::-3], "h": base.astype(np.float16), "o": np.float32(7) * np.ones(())}
    expected = np.concatenate([a.astype(np.float32).ravel() for a in named.values()])
    assert np.array_equal(Layout.of(named).flatten(named), expected)


def test_a_whole_update_with_every_awkward_array_goes_through_a_codec():
    named = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(-4.0, np.float32),
        "zeros": np.zeros((2, 2), np.float32),
        "strided": np.arange(12, dtype=np.float32)[::-2],
    }
    layout = Layout.of(named)
    codec = Codec(CompressionSpec.parse("topk:0.2"), layout.size)
    decoded = layout.unflatten(codec.decode(codec.encode(layout.flatten(named), 1), 1))
    assert {name: array.tolist() for name, array in decoded.items()} == {
        "empty": [],
        "scalar": 0.0,
        "zeros": [[0, 0], [0, 0]],
        "strided": [11, 9, 0, 0, 0, 0],
    }


@pytest.mark.parametrize(
    "named",
    [
        {"a": np.zeros(2, np.float32)},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32), "c": np.zeros(1, np.float32)},
        {"a": np.zeros(2, np.float32), "b": np.zeros((1, 1), np.float32)},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.int64)},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.complex64)},
    ],
    ids=["missing", "unknown", "shape", "whole numbers", "complex"],
)
def test_other_arrays_are_refused(named: dict[str, np.ndarray]):
    layout = Layout((("a", (2,)), ("b", (1,))))
    with pytest.raises(ShapeMismatch):
        layout.flatten(named)


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ShapeMismatch):
        Layout((("a", (2,)),)).unflatten(np.zeros(3, np.float32))


def test_values_beyond_float32_are_refused_by_the_codec():
    named = {"a": np.array([1e300, 0.0])}
    layout = Layout.of(named)
    with pytest.raises(NonFiniteUpdate):
        Codec(CompressionSpec.parse("topk:0.5"), 2).encode(layout.flatten(named), 1)
