"""No two neighbouring cohorts are farther apart than the proved sensitivity; some are as far."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ref.aggregation.robust import RuleOptions, apply_rule, sensitivity_replace_one

CLIP_NORM = 2.0


@st.composite
def neighbours(draw):
    """Two cohorts that differ in one row, all rows of norm <= C; clusters and corners, where rules jump."""
    n, d = draw(st.integers(3, 16)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centres = rng.standard_normal((draw(st.integers(1, 3)), d))
    rows = centres[rng.integers(0, len(centres), n + 1)] + draw(
        st.sampled_from([0.0, 1e-3, 1.0])
    ) * rng.standard_normal((n + 1, d))
    rows *= CLIP_NORM / np.maximum(np.linalg.norm(rows, axis=1), draw(st.sampled_from([1e-9, 1.0])))[:, None]
    rows *= np.minimum(1, CLIP_NORM / np.maximum(np.linalg.norm(rows, axis=1), 1e-9))[:, None]
    other = rows[:n].copy()
    other[draw(st.integers(0, n - 1))] = rows[n]
    return rows[:n], other


@given(neighbours(), st.data())
def test_replacing_one_row_moves_the_outcome_by_no_more_than_is_proved(pair, data):
    rows, other = pair
    n = len(rows)
    name = data.draw(st.sampled_from(["krum", "multi-krum", "trimmed-mean", "median", "centered-clipping"]))
    f = data.draw(st.integers(0, (n - 3) // 2))
    options, centre = RuleOptions(), None
    if name == "multi-krum":
        options = RuleOptions(m=data.draw(st.none() | st.integers(1, n - f)))
    if name == "centered-clipping":
        options = RuleOptions(iterations=1, radius=data.draw(st.floats(0.01, 5)))
        centre = np.full(rows.shape[1], 0.3)
    bound = sensitivity_replace_one(name, n, f, CLIP_NORM, options, public_centre=True)
    here, there = (apply_rule(name, x, f, options, centre=centre).values for x in (rows, other))
    assert np.linalg.norm(here - there) <= bound * (1 + 1e-9)


def test_krum_jumps_by_twice_the_norm():
    rows = np.array([[1.0]] * 3 + [[-1.0]] * 3) * CLIP_NORM
    other = rows.copy()
    other[2] = -CLIP_NORM
    moved = np.linalg.norm(apply_rule("krum", rows, 1).values - apply_rule("krum", other, 1).values)
    assert moved == pytest.approx(sensitivity_replace_one("krum", 6, 1, CLIP_NORM))


def test_the_formulas_are_those_of_the_table():
    c = 1.5
    assert sensitivity_replace_one("krum", 20, 4, c) == 2 * c
    assert sensitivity_replace_one("multi-krum", 100, 10, c) == pytest.approx(2 * c * 13 / 88)
    assert sensitivity_replace_one("multi-krum", 100, 10, c, RuleOptions(m=90)) == pytest.approx(2 * c * 11 / 90)
    assert sensitivity_replace_one("multi-krum", 9, 3, c) == 2 * c
    assert sensitivity_replace_one("trimmed-mean", 50, 5, c) == pytest.approx(c * np.sqrt(2 * 49 / 5) / 40)
    assert sensitivity_replace_one("trimmed-mean", 50, 0, c) == 2 * c / 50
    assert sensitivity_replace_one("median", 51, 5, c) == pytest.approx(2 * c)
    one_pass = RuleOptions(radius=0.5, iterations=1)
    assert sensitivity_replace_one("centered-clipping", 10, 2, c, one_pass, public_centre=True) == 2 * 0.5 / 10


@pytest.mark.parametrize(
    ("rule", "options", "public_centre"),
    [
        ("bulyan", RuleOptions(), True),
        ("geometric-median", RuleOptions(), True),
        ("centered-clipping", RuleOptions(radius=1.0, iterations=1), False),
        ("centered-clipping", RuleOptions(radius=1.0), True),
        ("centered-clipping", RuleOptions(iterations=1), True),
        ("median", RuleOptions(mixing="nnm"), True),
        ("krum", RuleOptions(mixing="bucketing", seed=1), True),
    ],
)
def test_what_is_not_proved_has_no_figure(rule, options, public_centre):
    assert sensitivity_replace_one(rule, 40, 2, 1.0, options, public_centre=public_centre) is None
