"""Clipping against exact arithmetic: for every dtype and scale, what comes back lies inside its bound."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.clipping import (
    LARGEST_CLIP_NORM,
    SMALLEST_CLIP_NORM,
    clip_global,
    clip_layers,
    joint_clip_norm,
    l2_norm,
)

relaxed = settings(deadline=None, max_examples=300)
WIDTHS = {np.float16: 16, np.float32: 32, np.float64: 64}


def elements(width: int) -> st.SearchStrategy[float]:
    """All finite numbers, and numbers spread evenly over the exponents (subnormals included)."""
    info = np.finfo(f"float{width}")
    lowest, highest = int(math.log2(info.smallest_subnormal)), info.maxexp - 1
    spread = st.builds(math.ldexp, st.floats(1, 1.9375, width=16), st.integers(lowest, highest))
    return st.one_of(
        st.floats(allow_nan=False, allow_infinity=False, width=width),
        st.tuples(spread, st.sampled_from([1, -1])).map(lambda t: float(info.dtype.type(t[0] * t[1]))),
    )


VECTORS = st.sampled_from(list(WIDTHS)).flatmap(
    lambda dtype: hnp.arrays(dtype, st.integers(0, 12), elements=elements(WIDTHS[dtype]))
)
BOUNDS = st.one_of(
    st.floats(SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM),
    st.builds(math.ldexp, st.floats(1, 1.99), st.integers(-499, 498)),
    st.builds(math.ldexp, st.floats(1, 1.99), st.integers(-160, 140)),
)


def square(vector: np.ndarray) -> Fraction:
    return sum((Fraction(x) ** 2 for x in vector.reshape(-1).tolist()), Fraction(0))


def near_its_norm(vector: np.ndarray) -> st.SearchStrategy[float]:
    """Bounds a few places around the vector's norm, where rounding decides."""
    norm = l2_norm(vector)
    assume(SMALLEST_CLIP_NORM * 2 < norm < LARGEST_CLIP_NORM / 2)
    return st.integers(-3, 3).map(lambda places: float(norm + places * np.spacing(norm)))


@relaxed
@given(VECTORS, BOUNDS)
def test_the_exact_norm_of_what_is_returned_is_at_most_the_bound(vector, bound):
    result = clip_global(vector, bound)
    assert square(result.vector) <= Fraction(bound) ** 2
    assert (result.vector.dtype, result.vector.shape) == (vector.dtype, vector.shape)


@relaxed
@given(VECTORS.flatmap(lambda v: st.tuples(st.just(v), near_its_norm(v))))
def test_at_the_bound_itself_exact_arithmetic_decides(case):
    vector, bound = case
    result = clip_global(vector, bound)
    inside = square(vector) <= Fraction(bound) ** 2
    assert result.clipped is not inside
    assert (result.vector is vector) is inside
    assert square(result.vector) <= Fraction(bound) ** 2


@relaxed
@given(VECTORS, BOUNDS)
def test_a_vector_inside_the_bound_comes_back_untouched_and_no_other(vector, bound):
    result = clip_global(vector, bound)
    inside = square(vector) <= Fraction(bound) ** 2
    assert result.clipped is not inside
    assert (result.vector is vector) is inside
    assert (result.factor == 1.0) is inside or result.factor < 1


@relaxed
@given(VECTORS, BOUNDS)
def test_clipping_scales_every_element_by_one_factor_up_to_two_places_towards_zero(vector, bound):
    result = clip_global(vector, bound)
    assume(result.clipped)
    # Not from result.factor, which underflows where the ratio is beyond float64.
    ratio_squared = Fraction(bound) ** 2 / square(vector)
    slack = (1 - Fraction(1, 2**36)) ** 2
    # Subnormal products are rounded to nearest where they do not matter beside the bound.
    smallest = np.finfo(vector.dtype).smallest_subnormal
    negligible = Fraction(bound) / 2**1000 + Fraction(float(smallest))
    places = np.spacing(np.abs(result.vector)).tolist()
    for x, y, place in zip(vector.tolist(), result.vector.tolist(), places, strict=True):
        assert max(abs(Fraction(y)) - negligible, 0) ** 2 <= Fraction(x) ** 2 * ratio_squared
        assert Fraction(x) ** 2 * ratio_squared * slack <= (abs(Fraction(y)) + 2 * Fraction(place) + negligible) ** 2
        assert y == 0 or (y > 0) is (x > 0)


@relaxed
@given(VECTORS)
def test_the_norm_is_that_of_exact_arithmetic(vector):
    norm = l2_norm(vector)
    exact = square(vector)
    if math.isinf(norm):
        assert exact > Fraction(np.finfo(np.float64).max) ** 2 * (1 - Fraction(1, 2**50))
    else:
        error = Fraction(1, 2**38)
        # A norm that is itself subnormal has one place to be off by.
        place = Fraction(np.spacing(norm)) if 0 < norm < 1e-300 else 0
        assert (Fraction(norm) - place) ** 2 * (1 - error) <= exact <= (Fraction(norm) + place) ** 2 * (1 + error)


@relaxed
@given(VECTORS, BOUNDS)
def test_clipping_twice_changes_nothing_more(vector, bound):
    once = clip_global(vector, bound).vector
    assert clip_global(once, bound).vector is once


@relaxed
@given(
    st.lists(
        st.tuples(hnp.arrays(np.float32, st.integers(0, 5), elements=elements(32)), BOUNDS), min_size=1, max_size=5
    )
)
def test_each_layer_stays_in_its_own_bound_and_the_whole_in_the_joint_one(layers):
    vector = np.concatenate([part for part, _ in layers])
    ends = np.cumsum([part.size for part, _ in layers]).tolist()
    slices = [slice(end - part.size, end) for end, (part, _) in zip(ends, layers, strict=True)]
    bounds = [bound for _, bound in layers]
    result = clip_layers(vector, slices, bounds)
    for part, bound, (original, _) in zip(slices, bounds, layers, strict=True):
        assert result.vector[part].tobytes() == clip_global(original, bound).vector.tobytes()
    joint = joint_clip_norm(bounds)
    assert square(result.vector) <= sum(Fraction(b) ** 2 for b in bounds) <= Fraction(joint) ** 2
    assert result.clipped is any(layer.clipped for layer in result.layers)
    assert (result.vector is vector) is not result.clipped


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2**14, 2**14 + 1, 100_003])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_long_vectors_stay_inside_for_bounds_from_far_below_their_norm_to_just_above_it(dtype, size, scale):
    vector = (np.random.default_rng(size).standard_normal(size) * scale).astype(dtype)
    norm = l2_norm(vector)
    for share in (1e-12, 1e-3, 0.5, 1 - 1e-15, 1.0, 1 + 1e-15):
        result = clip_global(vector, norm * share)
        wide = result.vector.astype(np.float64)
        # Squares of float64 in two parts, by Veltkamp and Dekker, so that fsum sees the exact sum.
        high = (wide * 134217729.0) - ((wide * 134217729.0) - wide)
        low = wide - high
        squared = wide * wide
        rest = ((high * high - squared) + 2 * high * low) + low * low
        bound = Fraction(norm * share) ** 2
        total = Fraction(math.fsum(squared.tolist())) + Fraction(math.fsum(rest.tolist()))
        assert total <= bound * (1 + Fraction(1, 2**52))
        assert result.clipped or result.vector is vector
