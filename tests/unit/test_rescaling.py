"""Rescaling at the edges, and what it is for: sums of squares that a format cannot hold."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate
from server_ref.aggregation.rescaling import rescale

SECOND = {"second_moment": 2}


def test_squares_of_large_gradients_are_summed_without_overflow():
    gradient = np.array([1e18, 3e17], np.float32)
    plain, second, exponent = np.zeros(2, np.float32), np.zeros(2, np.float32), 0
    with np.errstate(over="ignore"):
        for step in range(1000):
            plain += gradient**2
            if step % 100 == 0:
                scaled, shift = rescale({"second_moment": second}, SECOND, incoming=float(np.ldexp(1e18, -exponent)))
                second, exponent = scaled["second_moment"], exponent + shift
            second += np.ldexp(gradient, -exponent) ** 2
    assert np.isinf(plain[0])
    assert np.sqrt(second).tolist() == pytest.approx((np.ldexp(gradient, -exponent) * 1000**0.5).tolist(), rel=1e-5)


def test_squares_of_small_gradients_are_summed_without_underflow():
    gradient = np.array([1e-23], np.float32)
    assert (gradient**2)[0] == 0
    _, exponent = rescale({"second_moment": np.zeros(1, np.float32)}, SECOND, incoming=1e-23)
    assert 0.25 < (np.ldexp(gradient, -exponent) ** 2)[0] <= 1


def test_exactness_goes_before_the_wished_scale():
    tensors = {"second_moment": np.array([2e38, np.finfo(np.float32).smallest_normal * 4], np.float32)}
    scaled, shift = rescale(tensors, SECOND)
    assert shift == 1
    assert (np.ldexp(scaled["second_moment"], 2) == tensors["second_moment"]).all()


def test_a_subnormal_beside_a_large_number_leaves_everything_as_it_is():
    tensors = {"second_moment": np.array([2e38, np.finfo(np.float32).smallest_subnormal], np.float32)}
    scaled, shift = rescale(tensors, SECOND)
    assert shift == 0
    assert scaled["second_moment"].tobytes() == tensors["second_moment"].tobytes()


@pytest.mark.parametrize("tensors", [{}, {"second_moment": np.zeros(3)}, {"second_moment": np.zeros(0)}], ids=str)
def test_nothing_accumulated_is_not_rescaled(tensors):
    assert rescale(tensors, SECOND)[1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_longer_finite_is_refused(bad):
    with pytest.raises(NonFiniteUpdate, match="second_moment"):
        rescale({"second_moment": np.array([1.0, bad])}, SECOND)


@pytest.mark.parametrize("powers", [{}, {"second_moment": 0}, {"other": 1}], ids=str)
def test_a_tensor_without_a_power_is_refused(powers):
    with pytest.raises(ConfigurationError, match="power"):
        rescale({"second_moment": np.ones(1)}, powers)
