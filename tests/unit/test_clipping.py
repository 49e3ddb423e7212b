"""Norms and clipping at the edges: zero, tiny, huge, NaN, other dtypes, impossible bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client_sdk.protocol.clipping import (
    LARGEST_CLIP_NORM,
    SMALLEST_CLIP_NORM,
    clip_global,
    clip_layers,
    joint_clip_norm,
    l2_norm,
)
from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate, ShapeMismatch

F32_MAX = float(np.finfo(np.float32).max)
F64_MAX = float(np.finfo(np.float64).max)


@pytest.mark.parametrize(
    ("values", "dtype", "norm"),
    [
        ([], np.float32, 0.0),
        ([0.0, -0.0], np.float32, 0.0),
        ([3e-30, 4e-30], np.float32, 5e-30),
        ([3e30, -4e30], np.float32, 5e30),
        ([F32_MAX] * 4, np.float32, 2 * F32_MAX),
        ([2.0**-149] * 4, np.float32, 2.0**-148),
        ([65504.0] * 4, np.float16, 131008.0),
        ([2.0**-24] * 4, np.float16, 2.0**-23),
        ([3e-310, 4e-310], np.float64, 5e-310),
        ([5e-324] * 4, np.float64, 1e-323),
        ([3e300, 4e300], np.float64, 5e300),
        ([F64_MAX / 2, 0.0], np.float64, F64_MAX / 2),
        ([F64_MAX, F64_MAX], np.float64, math.inf),
    ],
)
def test_a_norm_survives_every_scale(values, dtype, norm):
    assert l2_norm(np.array(values, dtype)) == pytest.approx(norm, rel=3e-7)


def test_the_norm_of_many_equal_values_is_right_to_float64_s_last_places():
    vector = np.full(3_000_000, 0.1, np.float32)
    assert l2_norm(vector) == pytest.approx(math.sqrt(3_000_000) * float(np.float32(0.1)), rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 20_000, -1])
def test_what_is_not_finite_is_refused_wherever_it_stands(bad, dtype, place):
    vector = np.zeros(40_000, dtype)
    vector[place] = bad
    with pytest.raises(NonFiniteUpdate, match="1 values are"):
        l2_norm(vector)
    with pytest.raises(NonFiniteUpdate):
        clip_global(vector, 1.0)
    with pytest.raises(NonFiniteUpdate):
        clip_layers(vector, [slice(0, 40_000)], [1.0])


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.dtype(">f4"), np.bool_])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ShapeMismatch):
        l2_norm(np.ones(3, dtype))
    with pytest.raises(ShapeMismatch):
        clip_global(np.ones(3, dtype), 1.0)


@pytest.mark.parametrize(
    "bound", [0.0, -1.0, math.nan, math.inf, SMALLEST_CLIP_NORM / 2, LARGEST_CLIP_NORM * 2], ids=str
)
def test_a_bound_that_is_not_positive_and_finite_is_refused(bound):
    vector = np.ones(3, np.float32)
    with pytest.raises(ConfigurationError, match="positive and finite"):
        clip_global(vector, bound)
    with pytest.raises(ConfigurationError, match="positive and finite"):
        clip_layers(vector, [slice(0, 3)], [bound])
    with pytest.raises(ConfigurationError, match="positive and finite"):
        joint_clip_norm([1.0, bound])


def test_a_vector_of_exactly_the_bound_s_norm_is_not_touched():
    vector = np.array([3.0, 4.0], np.float32)
    result = clip_global(vector, 5.0)
    assert result.vector is vector
    assert (result.norm, result.factor, result.clipped) == (5.0, 1.0, False)
    assert clip_global(vector, math.nextafter(5.0, 0.0)).clipped


def test_rounding_to_nearest_would_leave_the_bound():
    """The reason for rounding towards zero: the smallest subnormal doubles when 0.6 of it is rounded up."""
    vector = np.full(4, 2.0**-149, np.float32)
    bound = 0.6 * 2.0**-148
    nearest = (vector * (bound / l2_norm(vector))).astype(np.float32)
    assert l2_norm(nearest) > bound
    assert not clip_global(vector, bound).vector.any()


def test_one_exploding_update_keeps_its_direction():
    vector = np.full(10_000, 1e8, np.float32)
    result = clip_global(vector, 1.0)
    assert result.norm == pytest.approx(1e10)
    assert np.unique(result.vector).size == 1
    assert l2_norm(result.vector) == pytest.approx(1.0, rel=2e-7)
    assert l2_norm(result.vector) <= 1.0


@pytest.mark.parametrize("vector", [np.float32(5).reshape(()), np.full((3, 4), 2.0, np.float32), np.zeros((0, 3))])
def test_any_shape_is_kept(vector):
    vector = np.asarray(vector)
    result = clip_global(vector, 1.0).vector
    assert (result.shape, result.dtype) == (vector.shape, vector.dtype)
    assert l2_norm(result) <= 1.0


def test_strided_and_read_only_vectors_clip_like_their_copies():
    base = np.arange(60_000, dtype=np.float32)
    base.setflags(write=False)
    strided = base[::2]
    result = clip_global(strided, 1.0).vector
    assert result.tobytes() == clip_global(strided.copy(), 1.0).vector.tobytes()
    assert result.flags.writeable


def test_a_layer_s_explosion_leaves_the_other_layers_as_they_were():
    vector = np.concatenate([np.full(5, 1e10, np.float32), np.full(3, 0.1, np.float32)])
    result = clip_layers(vector, [slice(0, 5), slice(5, 8)], [1.0, 1.0])
    assert result.clipped
    assert [layer.clipped for layer in result.layers] == [True, False]
    assert result.vector[5:].tobytes() == vector[5:].tobytes()
    assert l2_norm(result.vector[:5]) <= 1.0


@pytest.mark.parametrize(
    "slices",
    [
        [slice(0, 3), slice(4, 8)],
        [slice(0, 5), slice(4, 8)],
        [slice(0, 4), slice(4, 7)],
        [slice(0, 4), slice(4, 9)],
        [slice(4, 8), slice(0, 4)],
        [slice(0, 4), slice(4, 8, 2)],
        [slice(0, 10), slice(10, 8)],
    ],
    ids=str,
)
def test_layers_that_do_not_cover_the_vector_once_in_order_are_refused(slices):
    with pytest.raises(ConfigurationError, match="cover"):
        clip_layers(np.ones(8, np.float32), slices, [1.0, 1.0])


def test_layers_need_one_bound_each_and_a_flat_vector():
    with pytest.raises(ConfigurationError, match="1 layers with 2"):
        clip_layers(np.ones(8, np.float32), [slice(0, 8)], [1.0, 1.0])
    with pytest.raises(ShapeMismatch, match="flat"):
        clip_layers(np.ones((2, 4), np.float32), [slice(0, 8)], [1.0])
    with pytest.raises(ConfigurationError, match="without layers"):
        joint_clip_norm([])
    with pytest.raises(ConfigurationError, match="cover"):
        clip_layers(np.ones(8, np.float32), [], [])
    assert clip_layers(np.ones(0, np.float32), [], []).layers == ()


def test_the_bits_do_not_depend_on_threads_of_the_linear_algebra():
    """Each product is short enough for one thread: the norm is a sum over blocks in their order."""
    vector = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    parts = [vector[i : i + 2**14].astype(np.float64) for i in range(0, vector.size, 2**14)]
    assert l2_norm(vector) == math.sqrt(math.fsum(float(p @ p) for p in parts))
