"""Robust rules against their definitions in exact arithmetic, and what holds of them for all rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server_ref.aggregation import robust
from server_ref.aggregation.robust import RULES, RuleOptions, apply_rule
from server_ref.aggregation.robust.coordinatewise import mean_around_median
from server_ref.aggregation.robust.distances import distances_to_peers, squared_distances
from server_ref.aggregation.robust.rows import Rows
from tests import robust_oracles as oracle

EXACT = RuleOptions()
NAMES = sorted(RULES)


def matrices(
    elements: st.SearchStrategy, *, rows: tuple[int, int] = (3, 14), dtype: type = np.float32
) -> st.SearchStrategy[np.ndarray]:
    return st.tuples(st.integers(*rows), st.integers(0, 9)).flatmap(
        lambda shape: hnp.arrays(dtype, shape, elements=elements)
    )


small_integers = st.integers(-6, 6).map(float)
"""Distances and sums of them are exact in float64, and ties are frequent."""

all_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
all_float64 = st.floats(-1e140, 1e140)
tame = st.floats(-100, 100, width=32)


def seeded(n: int, d: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


@st.composite
def cohorts(draw, *, least: int = 3, name: str | None = None):
    """A rule, rows without structure (so that nothing ties) and a number of dishonest ones that it stands."""
    name = draw(st.sampled_from(NAMES)) if name is None else name
    n = draw(st.integers(least, 40))
    d = draw(st.sampled_from([1, 2, 3, 17, 300]))
    f = draw(st.integers(0, max(0, RULES[name].limit(n))))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return name, seeded(n, d, draw(st.integers(0, 2**32)), dtype), f


# --- against the definitions --------------------------------------------------------------------------------------


@given(matrices(all_float32, rows=(1, 9)) | matrices(all_float64, rows=(1, 9), dtype=np.float64))
def test_each_distance_is_right_to_its_own_digits_whatever_the_other_rows_are(rows):
    found = squared_distances(Rows.of(rows), EXACT)
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()
    expected = oracle.squared_distances(rows)
    digits = 2.0**-18 if rows.dtype == np.float32 else 1e-14
    for i in range(len(rows)):
        for j in range(len(rows)):
            # Below 1e-290 the squares of float64 differences lose digits, or all of them.
            assert found[i, j] == pytest.approx(float(expected[i][j]), rel=digits, abs=1e-290)


@given(st.integers(-140, 120), st.integers(0, 2**32))
def test_distances_that_float32_cannot_square_are_right_too(exponent, seed):
    rows = np.ldexp(seeded(6, 300, seed), np.array([exponent] * 3 + [0] * 3)[:, None]).astype(np.float32)
    rows[5] = rows[0]
    wide = rows.astype(np.float64)
    expected = np.array([((wide - row) ** 2).sum(axis=1) for row in wide])
    assert squared_distances(Rows.of(rows), EXACT) == pytest.approx(expected, rel=2.0**-18, abs=0)


@given(matrices(small_integers), st.data())
def test_krum_and_multi_krum_are_those_of_the_paper_and_ties_go_to_the_first(rows, data):
    n = len(rows)
    f = data.draw(st.integers(0, (n - 3) // 2))
    m = data.draw(st.integers(1, n - f))
    one = robust.krum(rows, f)
    assert one.selected == (oracle.krum(rows, f),)
    assert np.array_equal(one.values, rows[one.selected[0]])
    several = robust.multi_krum(rows, f, RuleOptions(m=m))
    assert list(several.selected) == oracle.multi_krum(rows, f, m)
    assert several.values.tolist() == oracle.mean(rows[list(several.selected)])
    scores = oracle.krum_scores(oracle.squared_distances(rows), f)
    assert one.scores.tolist() == several.scores.tolist() == [float(scores[i]) for i in range(n)]
    assert robust.multi_krum(rows, f).selected == robust.multi_krum(rows, f, RuleOptions(m=max(1, n - f - 2))).selected


@given(matrices(all_float32, rows=(3, 30)))
def test_the_mean_of_selected_rows_is_the_rounded_sum_divided(rows):
    found = robust.multi_krum(rows, 0, RuleOptions(m=len(rows)))
    # What lies 27 decimal places below the largest value is dropped, the same in every order.
    least = 1e-27 * float(np.abs(rows).max(initial=0))
    assert found.values == pytest.approx(oracle.mean(rows), rel=1e-15, abs=least)


@given(matrices(all_float32, rows=(1, 70)) | matrices(all_float64, rows=(1, 70), dtype=np.float64), st.data())
def test_median_and_trimmed_mean_are_those_of_numpy(rows, data):
    f = data.draw(st.integers(0, (len(rows) - 1) // 2))
    assert np.array_equal(robust.median(rows, f).values, oracle.median(rows))
    assert np.array_equal(robust.trimmed_mean(rows, f).values, oracle.trimmed_mean(rows, f))


@given(st.integers(1, 300), st.integers(0, 2**32))
def test_median_of_float32_rows_is_that_of_numpy_in_float32_too(n, seed):
    rows = seeded(n, 40, seed)
    assert np.array_equal(robust.median(rows, 0).values.astype(np.float32), np.median(rows, axis=0))


@given(matrices(small_integers, rows=(3, 12)), st.data())
def test_bulyan_is_that_of_the_paper(rows, data):
    f = data.draw(st.integers(0, (len(rows) - 3) // 4))
    found = robust.bulyan(rows, f)
    selected, values = oracle.bulyan(rows, f)
    assert list(found.selected) == selected
    assert found.values == pytest.approx(values, rel=1e-15)


@given(matrices(all_float32, rows=(1, 20)), st.data())
def test_the_values_nearest_to_the_median_are_taken_the_smaller_first(rows, data):
    nearest = data.draw(st.integers(1, len(rows)))
    found = mean_around_median(Rows.of(rows), nearest)
    for value, column in zip(found, rows.astype(np.float64).T, strict=True):
        middle = np.median(column)
        kept = sorted(column, key=lambda x: (abs(x - middle), x))[:nearest]
        assert value == pytest.approx(math.fsum(kept) / nearest, rel=1e-9, abs=1e-12 * max(map(abs, kept)))


@given(matrices(tame, rows=(1, 12)))
def test_no_point_has_a_smaller_sum_of_distances_than_the_geometric_median(rows):
    found = robust.geometric_median(rows, 0, RuleOptions(iterations=1000, tolerance=1e-9))
    best = oracle.sum_of_distances(rows, oracle.geometric_median(rows))
    assert oracle.sum_of_distances(rows, found.values) <= best * (1 + 1e-5) + 1e-30
    if found.weights is not None and rows.shape[1]:
        assert found.weights.sum() == pytest.approx(1)
        assert found.weights @ rows.astype(np.float64) == pytest.approx(found.values, abs=1e-9)


@given(matrices(tame, rows=(1, 12)), st.floats(0.01, 1000), st.integers(1, 5))
def test_centred_clipping_is_that_of_the_paper(rows, radius, iterations):
    centre = np.linspace(-3, 5, rows.shape[1])
    options = RuleOptions(radius=radius, iterations=iterations)
    found = robust.centered_clipping(rows, 0, options, centre=centre)
    assert found.values == pytest.approx(oracle.centered_clipping(rows, radius, iterations, centre), abs=1e-10)
    started = robust.centered_clipping(rows, 0, options)
    expected = oracle.centered_clipping(rows, radius, iterations, np.median(rows.astype(np.float64), axis=0))
    assert started.values == pytest.approx(expected, abs=1e-10)


@given(matrices(small_integers, rows=(1, 12)), st.data())
def test_neighbours_are_mixed_as_the_paper_has_it(rows, data):
    f = data.draw(st.integers(0, len(rows) - 1))
    mixed = robust.nearest_neighbor_mixing(rows, f)
    assert list(map(list, mixed.members)) == oracle.nearest_neighbor_mixing(rows, f)
    expected = np.array([oracle.mean(rows[list(members)]) for members in mixed.members])
    assert np.array_equal(mixed.rows, expected.reshape(rows.shape).astype(np.float32))


@given(matrices(tame, rows=(1, 20)), st.integers(1, 7), st.integers(0, 9))
def test_buckets_part_the_rows_and_are_averaged(rows, size, seed):
    mixed = robust.bucketing(rows, size, seed)
    assert sorted(i for members in mixed.members for i in members) == list(range(len(rows)))
    assert [len(m) for m in mixed.members[:-1]] == [size] * (len(mixed.members) - 1)
    for k, members in enumerate(mixed.members):
        assert all(mixed.own[i] == k for i in members)
        assert mixed.rows[k] == pytest.approx(rows[list(members)].mean(axis=0, dtype=np.float64), rel=1e-6, abs=1e-6)
    assert mixed.members == robust.bucketing(rows, size, seed).members


# --- what holds for all rows ----------------------------------------------------------------------------------------


@given(cohorts(), st.data())
@example(("krum", seeded(12, 3, 0), 2), None)
def test_the_order_of_the_rows_changes_no_bit(case, data):
    name, rows, f = case
    n = len(rows)
    # With one nearest neighbour, two rows that are each other's always tie, and the first of them is taken.
    assume(name not in {"krum", "multi-krum"} or n - f - 2 >= 2)
    assume(name != "bulyan" or f == 0 or f >= 3)
    order = np.arange(n)[::-1] if data is None else np.array(data.draw(st.permutations(range(n))))
    here, there = apply_rule(name, rows, f), apply_rule(name, rows[order], f)
    assert here.values.tobytes() == there.values.tobytes()
    if here.selected is not None:
        assert set(here.selected) == {int(order[i]) for i in there.selected}
    for mine, other in ((here.scores, there.scores), (here.weights, there.weights)):
        if mine is not None and name != "bulyan":
            assert mine[order].tobytes() == other.tobytes()


@given(cohorts(), st.integers(0, 2**32))
def test_the_outcome_moves_with_the_rows(case, seed):
    name, rows, f = case
    # Values on a coarse grid, so that adding the vector is exact.
    rows = np.round(rows * 64) / 64
    shift = np.random.default_rng(seed).integers(-1000, 1000, rows.shape[1]).astype(rows.dtype)
    here, there = apply_rule(name, rows, f), apply_rule(name, rows + shift, f)
    assert here.selected == there.selected
    assert there.values == pytest.approx(here.values + shift, rel=1e-12, abs=1e-9)
    if name in {"krum", "multi-krum"}:
        assert here.scores.tobytes() == there.scores.tobytes()


@given(cohorts(), st.integers(-60, 60))
def test_the_outcome_scales_with_the_rows(case, exponent):
    name, rows, f = case
    factor = 2.0**exponent
    here, there = apply_rule(name, rows, f), apply_rule(name, (rows * factor).astype(rows.dtype), f)
    assert here.selected == there.selected
    assert np.array_equal(here.values * factor, there.values)


@given(cohorts(least=7), st.sampled_from([1e3, 1e12, 1e37]), st.integers(0, 2**32))
def test_dishonest_rows_however_large_move_the_outcome_little(case, size, seed):
    name, rows, f = case
    n, d = rows.shape
    rng = np.random.default_rng(seed)
    bad = rng.choice(n, f, replace=False)
    honest = np.delete(rows, bad, axis=0).astype(np.float64)
    attacked = rows.copy()
    attacked[bad] = size * rng.standard_normal((f, d))
    found = apply_rule(name, attacked, f)
    if name in {"krum", "multi-krum", "bulyan"} and d >= 17:
        # In many dimensions honest rows are nearer to each other than anything of that size.
        assert not set(found.selected) & set(bad.tolist())
    # Twice the radius of the honest rows: generous for every rule, and out of the question for the mean.
    centre = honest.mean(axis=0)
    radius = np.linalg.norm(honest - centre, axis=1).max()
    factor = {"geometric-median": 2 * (n - f) / max(n - 2 * f, 1), "centered-clipping": 4}.get(name, 1)
    assert np.linalg.norm(found.values - centre) <= factor * radius * math.sqrt(d if "m" in name else 1) + 1e-9


@given(cohorts(least=3))
def test_one_vector_in_all_rows_is_the_outcome(case):
    name, rows, f = case
    rows[:] = rows[0]
    for mixing in ("none", "nnm"):
        assert apply_rule(name, rows, f, RuleOptions(mixing=mixing)).values == pytest.approx(rows[0], rel=1e-14)


@given(cohorts(least=7, name="multi-krum"), st.sampled_from(["bucketing", "nnm"]), st.integers(0, 99))
def test_after_mixing_the_weights_are_those_of_the_rows(case, mixing, seed):
    _, rows, f = case
    options = RuleOptions(mixing=mixing, bucket_size=2, seed=seed, degraded=True)
    found = apply_rule("multi-krum", rows, f, options)
    assert found.weights.sum() == pytest.approx(1)
    assert tuple(np.flatnonzero(found.weights)) == found.selected
    assert found.weights @ rows.astype(np.float64) == pytest.approx(found.values, abs=1e-5)
    assert found.scores.shape == (len(rows),)


# --- fast modes -----------------------------------------------------------------------------------------------------


@given(matrices(all_float32, rows=(1, 12)), st.integers(0, 99))
def test_a_sketch_that_is_longer_than_the_rows_changes_no_distance(rows, seed):
    found = squared_distances(Rows.of(rows), RuleOptions(mode="sketch", seed=seed, sketch_size=16))
    assert found == pytest.approx(squared_distances(Rows.of(rows), EXACT), rel=2.0**-18, abs=1e-290)


def test_sketched_distances_are_right_on_average_and_vary_as_promised():
    rows = Rows.of(seeded(2, 3000, 5))
    exact = squared_distances(rows, EXACT)[0, 1]
    k = 64
    found = np.array(
        [squared_distances(rows, RuleOptions(mode="sketch", seed=s, sketch_size=k))[0, 1] for s in range(400)]
    )
    deviation = math.sqrt(2 / k)
    assert abs(found.mean() / exact - 1) < 4 * deviation / math.sqrt(len(found))
    assert found.std() / exact < 1.15 * deviation


@given(st.integers(2, 60), st.integers(2, 12), st.integers(0, 2**32))
def test_each_row_is_compared_with_that_many_different_others(n, peers, seed):
    values = np.random.default_rng(seed).permutation(4 * n)[:n].astype(np.float32)
    found = distances_to_peers(Rows.of(values[:, None]), RuleOptions(mode="sampled", peers=peers, seed=seed))
    count = min(peers + peers % 2, n - 1)
    assert found.shape == (n, count)
    for i in range(n):
        others = sorted((values.astype(np.float64) - float(values[i])) ** 2)
        others.remove(0.0)
        for distance in found[i]:
            others.remove(distance)


def test_every_other_row_is_as_likely_a_peer():
    n, draws = 11, 600
    rows = Rows.of((2.0 ** np.arange(n))[:, None].astype(np.float32))
    exact = squared_distances(rows, EXACT)
    hits = np.zeros((n, n))
    for seed in range(draws):
        found = distances_to_peers(rows, RuleOptions(mode="sampled", peers=4, seed=seed))
        for i in range(n):
            hits[i] += np.isin(exact[i], found[i])
    np.fill_diagonal(hits, draws * 4 / (n - 1))
    expected, spread = draws * 4 / (n - 1), math.sqrt(draws * 0.4 * 0.6)
    assert np.abs(hits - expected).max() < 4.5 * spread


@given(st.integers(0, 2**32), st.sampled_from(["sketch", "sampled"]))
def test_fast_modes_leave_out_rows_that_are_far(seed, mode):
    rows = seeded(60, 500, seed)
    rows[7:19] *= 3
    options = RuleOptions(mode=mode, seed=seed, sketch_size=256, peers=24)
    assert not set(robust.multi_krum(rows, 12, options).selected) & set(range(7, 19))
