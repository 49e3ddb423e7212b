"""Top-k and thresholds: exact for any data, ties to the lowest index, whatever shortcut was taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.compression import selection
from client_sdk.protocol.compression.selection import at_least, top_k
from client_sdk.protocol.errors import NonFiniteUpdate

relaxed = settings(deadline=None)

LARGE = 300_000


def sorted_top_k(x: np.ndarray, count: int) -> np.ndarray:
    """By a stable sort of the whole."""
    return np.sort(np.argsort(-np.abs(x.astype(np.float64)), kind="stable")[:count])


elements = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@relaxed
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=elements), st.data())
def test_small_updates(x, data):
    count = data.draw(st.integers(0, len(x)))
    assert np.array_equal(top_k(x, count), sorted_top_k(x, count))


def shapes_of_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    normal = rng.standard_normal(LARGE).astype(np.float32)
    spikes = np.zeros(LARGE, np.float32)
    spikes[rng.choice(LARGE, 900, replace=False)] = rng.standard_normal(900)
    unseen = normal * np.float32(1e-3)
    unseen[1 :: LARGE // 2**16 | 1] *= np.float32(1e6)
    return {
        "normal": normal,
        "ascending": np.sort(normal),
        "descending": np.sort(normal)[::-1].copy(),
        "equal": np.full(LARGE, -2.5, np.float32),
        "zeros": np.zeros(LARGE, np.float32),
        "spikes among zeros": spikes,
        "few different values": rng.integers(-3, 4, LARGE).astype(np.float32),
        "heavy tails": (rng.standard_cauchy(LARGE) ** 3).astype(np.float32),
        "layers of different scales": normal * np.repeat(np.float32([1e-4, 10, 1e-2, 1]), LARGE // 4),
        "periodic": np.tile(normal[:512], LARGE // 512 + 1)[:LARGE],
        "large where the sample does not look": unseen,
        "subnormal": (normal * np.float32(1e-44)),
        "one value more than the others": np.where(np.arange(LARGE) == 777, 2, 1).astype(np.float32),
    }


DATA = shapes_of_data()


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("count", [1, 2, 50, 3000, 75_000, 75_001, 200_000, LARGE - 1, LARGE])
def test_large_updates_of_every_shape(name: str, count: int):
    x = DATA[name]
    assert np.array_equal(top_k(x, count), sorted_top_k(x, count))


def test_both_the_guess_and_its_failure_are_exercised():
    """Or else the test above would compare one path only."""
    guesses = {name: selection._survivors_of_a_guess(x.view(np.uint32), 3000) for name, x in DATA.items()}
    assert {name for name, found in guesses.items() if found is None} >= {"equal", "zeros", "few different values"}
    for name in ("normal", "ascending", "heavy tails"):
        assert guesses[name] is not None
        assert 3000 <= len(guesses[name]) < 6000


@given(st.lists(st.sampled_from([1.0, -1.0, 2.0, 0.0, -0.0]), min_size=1, max_size=40), st.data())
def test_ties_go_to_the_lowest_index(values, data):
    x = np.array(values, np.float32)
    count = data.draw(st.integers(1, len(x)))
    chosen = set(top_k(x, count).tolist())
    for i in chosen:
        for j in range(i):
            assert j in chosen or abs(x[j]) < abs(x[i])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 3000, LARGE])
@pytest.mark.parametrize("at", [0, 123_457, LARGE - 1])
def test_nan_and_infinities_are_never_missed(value: float, count: int, at: int):
    x = DATA["normal"].copy()
    x[at] = value
    with pytest.raises(NonFiniteUpdate, match="1 values"):
        top_k(x, count)


@relaxed
@given(
    hnp.arrays(np.float32, st.integers(0, 60), elements=elements),
    st.floats(0, 3.4028234663852886e38, exclude_min=True) | st.sampled_from([1.0, 0.1, 5e-324, 1e-45]),
)
def test_thresholds_are_compared_without_rounding(x, threshold):
    expected = [i for i, v in enumerate(x.tolist()) if abs(v) >= threshold]
    assert at_least(x, threshold).tolist() == expected


def test_a_threshold_over_several_pieces():
    x = DATA["normal"]
    assert np.array_equal(at_least(x, 1.5), np.flatnonzero(np.abs(x) >= 1.5))
