"""Selection networks put the order statistics that are wanted in place, for every input."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server_ref.aggregation.robust.networks import network


def run(comparators: np.ndarray, values: list[int]) -> list[int]:
    values = list(values)
    for i, j in comparators.tolist():
        if values[i] > values[j]:
            values[i], values[j] = values[j], values[i]
    return values


def test_every_input_of_zeros_and_ones_is_selected_from_rightly():
    # The 0-1 principle: what a network does to all such inputs decides what it does to any values.
    for n in range(1, 11):
        for low in range(n):
            for high in range(low + 1, n + 1):
                comparators = network(n, low, high)
                for values in product((0, 1), repeat=n):
                    assert run(comparators, values)[low:high] == sorted(values)[low:high]


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=200), st.data())
def test_any_values_are_selected_from_rightly(values, data):
    low = data.draw(st.integers(0, len(values) - 1))
    high = data.draw(st.integers(low + 1, len(values)))
    assert run(network(len(values), low, high), values)[low:high] == sorted(values)[low:high]


def test_comparators_that_do_not_matter_are_left_out_and_run_from_low_to_high():
    whole = network(100, 0, 100)
    middle = network(100, 49, 51)
    assert len(middle) < 0.85 * len(whole)
    assert (whole[:, 0] < whole[:, 1]).all()
    assert len(network(1, 0, 1)) == 0
