"""The example of a long run shows what it says, and the committed picture is the one it draws."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
RUNS = dict[str, list[float]]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_run_stagnation", DOCS / "examples/long_run_stagnation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the annotations' names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def moved(example) -> RUNS:
    return example.one_weight()


@pytest.fixture(scope="module")
def tuned(example) -> RUNS:
    return example.fine_tuning(example.Task.digits())


@pytest.fixture(scope="module")
def large(example) -> RUNS:
    return example.large_gradients(example.Task.digits())


def test_a_float32_weight_does_not_move_by_3e_8_and_a_float64_one_does(moved):
    assert set(moved["float32 weights"]) == {0.0}
    assert moved["float64 master weights"][-1] == float(np.float32(1 + 1000 * 3e-8)) - 1


def test_float32_weights_reach_a_plateau_after_500_rounds_and_float64_ones_go_on_falling(tuned):
    stuck, going = tuned["float32 weights"], tuned["float64 master weights"]
    assert stuck[399] == pytest.approx(going[399], rel=0.05)
    assert stuck[-1] == stuck[-200]
    assert stuck[-1] > 100 * going[-1]
    assert going[-1] < going[-200] / 10 < going[-400] / 100


def test_float32_weights_stagnate_and_do_not_diverge(tuned):
    losses = tuned["float32 weights"]
    assert max(losses[500:]) <= losses[499]


def test_sums_of_large_squares_overflow_silently_and_training_stands_still(large):
    losses = large["float32 sums of squares"]
    assert all(map(math.isfinite, losses))
    assert losses[-1] > 0.99 * losses[299]
    assert losses[-1] > 10 * large["the server's Adagrad"][-1]


def test_a_power_of_two_mends_it_even_in_float32(large):
    np.testing.assert_allclose(large["float32, rescaled"], large["the server's Adagrad"], rtol=1e-3)
    assert large["float32, rescaled"][-1] < large["float32, rescaled"][0] / 100


def test_the_committed_picture_is_the_one_that_is_drawn(example, moved, tuned, large):
    drawn, committed = (
        [points(found) for found in re.findall(r'points="([^"]*)"', text)]
        for text in (example.picture(moved, tuned, large), (DOCS / "img/long_run.svg").read_text())
    )
    assert len(drawn) == len(committed) == 7
    for new, old in zip(drawn, committed, strict=True):
        # Another machine's linear algebra rounds differently, which shows where losses are all rounding.
        np.testing.assert_allclose(new, old, atol=6.0)


def points(text: str) -> list[list[float]]:
    return [[float(number) for number in pair.split(",")] for pair in text.split()]
