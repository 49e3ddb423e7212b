"""Private updates: the norm of the codes never exceeds B, in exact arithmetic, and sums with their noise fit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from client_sdk.protocol.clipping import clip_global, integer_norm_squared
from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.privacy import EncodedBounds, choose_private_grid, encode_clipped, noise_variance

# The machine may be busy; no test here is about time.
relaxed = settings(deadline=None, max_examples=60)

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bounds_that_hold(clip_norm: float, fraction_bits: int) -> EncodedBounds | None:
    try:
        return EncodedBounds(clip_norm=clip_norm, fraction_bits=fraction_bits)
    except ConfigurationError:
        return None


all_bounds = st.builds(bounds_that_hold, st.floats(1e-9, 1e9), st.integers(0, 40)).filter(lambda b: b is not None)


def python_norm_squared(codes: np.ndarray) -> int:
    return sum(code * code for code in codes.reshape(-1).tolist())


@relaxed
@given(hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(-(2**62) + 1, 2**62 - 1)))
@example(np.full(20_000, 2**62 - 1))
@example(np.full(20_000, -(2**18)))
@example(np.array([-(2**18), 2**18 - 1, 2**18, -(2**36), 2**54]))
def test_the_integer_norm_is_that_of_python_s_integers(codes):
    assert integer_norm_squared(codes) == python_norm_squared(codes)


@relaxed
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=finite32), all_bounds)
def test_the_norm_of_the_codes_never_exceeds_b(vector, bounds):
    codes = encode_clipped(vector, bounds)
    assert codes.dtype == np.int64
    assert codes.shape == vector.shape
    assert python_norm_squared(codes) <= math.floor(Fraction(bounds.clip_norm) * 2**bounds.fraction_bits) ** 2


@relaxed
@given(
    st.integers(1, 3000),
    st.floats(1.0, 60.0),
    st.sampled_from([0.4999, 0.5, 0.51, 0.75, 1.0, 1.49]),
    st.integers(0, 2**32 - 1),
)
def test_grids_as_coarse_as_the_bound_itself_are_enforced_too(size, clip_norm, per_coordinate, seed):
    # Every coordinate lies about where rounding decides between 0 and 1, so that nearest codes exceed B by far.
    rng = np.random.default_rng(seed)
    vector = (per_coordinate * rng.choice([-1.0, 1.0], size) * (1 + 1e-3 * rng.standard_normal(size))).astype(
        np.float32
    )
    bounds = EncodedBounds(clip_norm=clip_norm, fraction_bits=0)
    codes = encode_clipped(vector, bounds)
    assert python_norm_squared(codes) <= bounds.norm_bound**2


def test_rounding_to_nearest_alone_would_exceed_the_bound():
    """The reason for all of it: a clipped vector whose nearest codes are more than twice as long as B."""
    bounds = EncodedBounds(clip_norm=100.0, fraction_bits=0)
    vector = clip_global(np.full(39_000, 1.0, np.float32), 100.0).vector
    nearest = np.rint(vector).astype(np.int64)
    assert integer_norm_squared(nearest) > 3 * bounds.norm_bound**2
    assert integer_norm_squared(encode_clipped(vector, bounds)) <= bounds.norm_bound**2


@relaxed
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=finite32), all_bounds)
def test_clipping_before_changes_no_code(vector, bounds):
    clipped = clip_global(vector, bounds.clip_norm).vector
    assert np.array_equal(encode_clipped(vector, bounds), encode_clipped(clipped, bounds))


@relaxed
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100.0, 100.0, width=32)),
    st.integers(0, 24),
)
def test_what_lies_well_inside_the_bound_is_only_rounded(vector, fraction_bits):
    bounds = EncodedBounds(clip_norm=1000.0, fraction_bits=fraction_bits)
    expected = [round(Fraction(x) * 2**fraction_bits) for x in vector.tolist()]
    assert encode_clipped(vector, bounds).tolist() == expected


@relaxed
@given(st.integers(1, 2000), st.integers(0, 2**32 - 1))
def test_a_clipped_update_keeps_its_length_and_direction_on_a_fine_grid(size, seed):
    vector = (np.random.default_rng(seed).standard_normal(size) * 50 + 1).astype(np.float32)
    bounds = EncodedBounds(clip_norm=1.0, fraction_bits=30)
    codes = encode_clipped(vector, bounds)
    expected = vector.astype(np.float64) * min(1.0, 1.0 / float(np.linalg.norm(vector.astype(np.float64))))
    assert np.abs(codes * bounds.step - expected).max() < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(NonFiniteUpdate):
        encode_clipped(np.array([0.0, bad], np.float32), EncodedBounds(clip_norm=1.0, fraction_bits=24))


def test_other_dtypes_are_refused():
    bounds = EncodedBounds(clip_norm=1.0, fraction_bits=24)
    with pytest.raises(ShapeMismatch):
        encode_clipped(np.zeros(3), bounds)
    with pytest.raises(ShapeMismatch):
        integer_norm_squared(np.zeros(3))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_is_positive_and_finite(clip_norm):
    with pytest.raises(ValidationError):
        EncodedBounds(clip_norm=clip_norm, fraction_bits=24)


@pytest.mark.parametrize(("clip_norm", "fraction_bits"), [(0.4, 1), (2.0**-30, 29), (2.0**30, 30)])
def test_bounds_without_codes_are_refused(clip_norm, fraction_bits):
    with pytest.raises(ConfigurationError, match="fraction bits"):
        EncodedBounds(clip_norm=clip_norm, fraction_bits=fraction_bits)


sums = st.fixed_dictionaries(
    {
        "clip_norm": st.floats(1e-3, 1e6),
        "max_count": st.integers(1, 10**6),
        "max_weight": st.integers(1, 10**4),
        "noise_multiplier": st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
        "threshold": st.integers(1, 7),
    }
)


@relaxed
@given(sums)
def test_the_chosen_grid_is_the_finest_on_which_a_sum_and_its_noise_fit(case):
    def needed(fraction_bits: int) -> float:
        largest = case["clip_norm"] * 2.0**fraction_bits
        tail = 12 * math.sqrt(case["threshold"]) * case["noise_multiplier"]
        return (case["max_count"] + tail) * case["max_weight"] * largest

    try:
        bounds = choose_private_grid(**case)
    except BudgetExceeded:
        assert needed(0) > 2.0**60 * (1 - 1e-9) or case["clip_norm"] < 1
        return
    assert bounds.clip_norm == case["clip_norm"]
    assert needed(bounds.fraction_bits) <= 2.0**60 * (1 + 1e-9)
    if bounds.fraction_bits < 40:
        assert needed(bounds.fraction_bits + 1) >= 2.0**60 * (1 - 1e-6)


def test_noise_takes_fraction_bits_from_a_sum():
    plain = choose_private_grid(clip_norm=16.0, max_count=1000, max_weight=1000)
    noised = choose_private_grid(clip_norm=16.0, max_count=1000, max_weight=1000, noise_multiplier=1e6)
    assert noised.fraction_bits < plain.fraction_bits


@pytest.mark.parametrize(
    "change",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"max_count": 0},
        {"max_weight": 0},
        {"threshold": 0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"clip_norm": 1e15, "max_count": 10_000},
        {"clip_norm": 1e-13},
    ],
)
def test_bounds_without_a_grid_are_refused(change):
    with pytest.raises(BudgetExceeded):
        choose_private_grid(**{"clip_norm": 1.0, "max_count": 10, **change})


def test_a_contributor_s_variance_is_the_sum_s_over_the_honest_ones():
    bounds = EncodedBounds(clip_norm=1.0, fraction_bits=24)
    alone = noise_variance(bounds, noise_multiplier=1.5, max_weight=2)
    assert alone == Fraction(3 * 2**24) ** 2
    assert noise_variance(bounds, noise_multiplier=1.5, max_weight=2, contributors=5, threshold=3) == alone / 3
    with pytest.raises(ConfigurationError, match="none is left"):
        noise_variance(bounds, noise_multiplier=1.5, contributors=2, threshold=3)
    for bad in ({"noise_multiplier": 0.0}, {"noise_multiplier": math.nan}, {"noise_multiplier": 1.0, "max_weight": 0}):
        with pytest.raises(ConfigurationError):
            noise_variance(bounds, **bad)
