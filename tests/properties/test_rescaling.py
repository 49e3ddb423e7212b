"""Rescaling by powers of two: every element stands for the same number as before, exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server_ref.aggregation.rescaling import rescale
from server_ref.aggregation.server_state import MAX_EXPONENT, ServerState

relaxed = settings(deadline=None, max_examples=200)
POWERS = {"momentum": 1, "second_moment": 2, "third": 3}


def elements(dtype: type[np.floating]) -> st.SearchStrategy[float]:
    info = np.finfo(dtype)
    lowest, highest = int(math.log2(float(info.smallest_subnormal))), info.maxexp - 1
    spread = st.builds(math.ldexp, st.floats(1, 1.9375, width=16), st.integers(lowest, highest))
    signed = st.tuples(st.one_of(spread, spread.map(lambda x: x * 2.0**-30)), st.sampled_from([1, -1, 0]))
    return signed.map(lambda t: float(dtype(t[0] * t[1])))


TENSORS = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: st.dictionaries(
        st.sampled_from(sorted(POWERS)), hnp.arrays(dtype, st.integers(0, 5), elements=elements(dtype)), min_size=1
    )
)
# What accumulates in practice: elements within 2**40 of each other, anywhere in the format.
NARROW = st.tuples(st.integers(-900, 900), hnp.arrays(np.float64, 4, elements=st.floats(1e-12, 1.0))).map(
    lambda t: np.ldexp(t[1], t[0])
)


@relaxed
@given(TENSORS)
def test_the_rescaled_tensors_stand_for_exactly_the_same_numbers(tensors):
    scaled, shift = rescale(tensors, POWERS)
    assert scaled.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert scaled[name].dtype == tensor.dtype
        factor = Fraction(2) ** (POWERS[name] * shift)
        assert [Fraction(x) * factor for x in scaled[name].tolist()] == [Fraction(x) for x in tensor.tolist()]


@relaxed
@given(TENSORS)
def test_a_second_rescaling_in_a_row_finds_nothing_to_do(tensors):
    scaled, _ = rescale(tensors, POWERS)
    again, shift = rescale(scaled, POWERS)
    assert shift == 0
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in scaled.items())


@relaxed
@given(NARROW, NARROW)
def test_the_largest_gradient_is_brought_to_1_where_the_format_has_room(momentum, second):
    tensors = {"momentum": momentum, "second_moment": second}
    scaled, _ = rescale(tensors, POWERS)
    # A common scale can leave the smaller of two tensors below the range; then exactness wins.
    if all(np.abs(t).min() > 2.0**-1000 for t in scaled.values()):
        peak = max(scaled["momentum"].max(), math.sqrt(scaled["second_moment"].max()))
        assert 0.5 < peak <= 1 or peak == 1


@relaxed
@given(st.floats(2.0**-200, 2.0**200), st.integers(-400, 400))
def test_the_gradient_that_comes_next_has_room_too(second, exponent):
    incoming = math.ldexp(1.0, exponent)
    scaled, shift = rescale({"second_moment": np.array([second])}, POWERS, incoming=incoming)
    folded = scaled["second_moment"] + np.ldexp(incoming, -shift) ** 2
    assert 0.25 < folded[0] <= 2


@relaxed
@given(NARROW, NARROW, st.integers(-300, 300))
def test_a_rescaled_state_stands_for_the_same_numbers(momentum, second, exponent):
    state = ServerState(3, {"master": momentum, "momentum": momentum, "second_moment": second}, exponent)
    scaled, shift = state.rescaled()
    assert scaled.exponent == exponent + shift
    assert abs(scaled.exponent) <= MAX_EXPONENT
    assert (scaled.step, scaled.master.tobytes()) == (3, state.master.tobytes())
    for name, power in {"momentum": 1, "second_moment": 2}.items():
        for before, after in zip(state.tensors[name].tolist(), scaled.tensors[name].tolist(), strict=True):
            assert Fraction(before) == Fraction(after) * Fraction(2) ** (power * shift)
