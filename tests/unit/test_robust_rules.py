"""The edges of the robust rules: what is refused, the degraded mode, fast and slow paths, threads, light imports."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    ConfigurationError,
    EmptyAggregate,
    NonFiniteUpdate,
    ShapeMismatch,
    TooManyByzantine,
    UpdateOutOfRange,
)
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import blocks, robust
from server_ref.aggregation.batch import Facts
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.robust import RULES, RuleOptions, apply_rule, estimate_num_byzantine
from server_ref.aggregation.robust import coordinatewise as by_coordinate
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.server_optim import Sgd

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(RULES)
LEAST = {name: rule.slope + rule.offset for name, rule in RULES.items()}
"""Rows that each rule needs to stand one dishonest row."""


def normal(n: int, d: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_not_finite_are_refused_and_the_row_named(name, bad, dtype):
    rows = normal(9, 1000, dtype=dtype)
    rows[6, 999] = bad
    with pytest.raises(NonFiniteUpdate, match="row 6"):
        apply_rule(name, rows, 0)


def test_float64_values_whose_squares_leave_float64_are_refused():
    rows = normal(9, 3, dtype=np.float64)
    rows[4, 1] = 1e141
    with pytest.raises(UpdateOutOfRange, match="row 4"):
        robust.median(rows, 1)


@pytest.mark.parametrize("empty", [[], np.empty((0, 5), np.float32)])
def test_no_rows_have_no_outcome(empty):
    for name in NAMES:
        with pytest.raises(EmptyAggregate):
            apply_rule(name, empty, 0)
    for function in (estimate_num_byzantine, lambda rows: robust.bucketing(rows, 2, 0)):
        with pytest.raises(EmptyAggregate):
            function(empty)


@pytest.mark.parametrize(
    "rows",
    [
        [np.zeros(3, np.float32), np.zeros(4, np.float32), np.zeros(3, np.float32)],
        [np.zeros(3, np.float32), np.zeros(3, np.float64), np.zeros(3, np.float32)],
        np.zeros((5, 3), np.int32),
        np.zeros((5, 3), np.float16),
        np.zeros((5, 3, 2), np.float32),
        np.zeros(5, np.float32),
    ],
    ids=["lengths", "dtypes", "integers", "half", "three axes", "one vector"],
)
def test_other_shapes_and_dtypes_are_refused(rows):
    with pytest.raises(ShapeMismatch):
        robust.krum(rows, 0)


@pytest.mark.parametrize("name", NAMES)
def test_more_dishonest_rows_than_a_rule_stands_are_refused_and_the_way_out_named(name):
    rows = normal(LEAST[name], 4)
    apply_rule(name, rows, 1)
    with pytest.raises(TooManyByzantine, match="degraded") as refused:
        apply_rule(name, rows[1:], 1)
    error = refused.value
    assert (error.rule, error.num_rows, error.num_byzantine, error.limit) == (name, LEAST[name] - 1, 1, 0)
    assert f"gather {LEAST[name]}" in str(error)


def test_a_dishonest_row_counts_for_its_whole_bucket():
    rows = normal(14, 4)
    options = RuleOptions(mixing="bucketing", bucket_size=2, seed=1)
    assert robust.krum(rows, 2, options).num_byzantine == 2
    with pytest.raises(TooManyByzantine, match="in 7 buckets"):
        robust.krum(rows, 3, options)


@pytest.mark.parametrize(
    ("name", "num_byzantine", "options", "says"),
    [
        ("kurm", 1, {}, "no rule 'kurm'"),
        ("krum", -1, {}, "-1 dishonest"),
        ("krum", 1, {"m": 3}, "no use for m"),
        ("median", 1, {"radius": 1.0}, "no use for radius"),
        ("bulyan", 1, {"iterations": 3}, "no use for iterations"),
        ("centered-clipping", 1, {"tolerance": 0.1}, "no use for tolerance"),
        ("median", 1, {"mode": "sketch", "seed": 1}, "cannot use sketch"),
        ("bulyan", 1, {"mode": "sampled", "seed": 1}, "cannot use sampled"),
        ("krum", 1, {"mode": "sampled", "seed": 1, "mixing": "nnm"}, "cannot use sampled"),
        ("krum", 1, {"mode": "sketch"}, "seed"),
        ("krum", 1, {"mode": "sampled"}, "seed"),
        ("median", 1, {"mixing": "bucketing"}, "seed"),
        ("multi-krum", 1, {"m": 9}, "m <= 8"),
    ],
)
def test_options_that_do_not_fit_the_rule_are_refused_by_name(name, num_byzantine, options, says):
    with pytest.raises(ConfigurationError, match=says):
        apply_rule(name, normal(9, 4), num_byzantine, RuleOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"m": 0},
        {"mode": "fast"},
        {"mixing": "some"},
        {"radius": 0.0},
        {"radius": float("nan")},
        {"iterations": 0},
        {"tolerance": 0.0},
        {"peers": 1},
        {"sketch_size": 15},
        {"bucket_size": 0},
        {"seed": -1},
        {"k": 3},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        RuleOptions(**options)


@pytest.mark.parametrize("mixing", [{}, {"mixing": "bucketing", "bucket_size": 2}])
def test_more_rows_to_average_than_may_be_honest_are_refused_when_a_pipeline_is_built(mixing):
    facts = Facts(size=4, kind=UpdateKind.DELTA, capacity=20, count=10, max_weight=1, max_abs=1.0)
    most = 4 if mixing else 9
    build = partial(Pipeline.build, Sgd(), facts=facts)
    assert build(RobustRule("multi-krum", 1, options=RuleOptions(m=most, **mixing)))
    assert build(RobustRule("multi-krum", 1, options=RuleOptions(m=most + 1, degraded=True, **mixing)))
    with pytest.raises(ConfigurationError, match=f"choose m <= {most}"):
        build(RobustRule("multi-krum", 1, options=RuleOptions(m=most + 1, **mixing)))


def test_a_centre_is_for_centred_clipping_and_must_fit():
    rows = normal(5, 3)
    with pytest.raises(ConfigurationError, match="centre"):
        apply_rule("krum", rows, 1, centre=np.zeros(3))
    with pytest.raises(ShapeMismatch):
        robust.centered_clipping(rows, 1, centre=np.zeros(4))
    with pytest.raises(NonFiniteUpdate):
        robust.centered_clipping(rows, 1, centre=np.array([0.0, np.nan, 0.0]))


def test_mixing_refuses_what_makes_no_sense():
    with pytest.raises(ConfigurationError, match="buckets of 0"):
        robust.bucketing(normal(5, 3), 0, 1)
    for f in (-1, 5):
        with pytest.raises(ConfigurationError, match="neighbours"):
            robust.nearest_neighbor_mixing(normal(5, 3), f)


def test_sensitivity_refuses_what_the_rule_would():
    with pytest.raises(TooManyByzantine):
        robust.sensitivity_replace_one("krum", 6, 2, 1.0)
    for norm in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="clip norm"):
            robust.sensitivity_replace_one("krum", 7, 2, norm)


# --- degraded mode, small cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("mixing", ["none", "bucketing", "nnm"])
def test_the_degraded_mode_assumes_what_fits_and_says_so(name, n, mixing):
    rows = normal(n, 5)
    found = apply_rule(name, rows, 4, RuleOptions(degraded=True, mixing=mixing, seed=1))
    limit = max(0, RULES[name].limit(-(-n // 2) if mixing == "bucketing" else n))
    assert found.num_byzantine == min(4, limit)
    assert found.degraded == (limit < 4)
    assert np.isfinite(found.values).all()
    assert (found.values <= rows.max(axis=0) + 1e-6).all()
    assert (found.values >= rows.min(axis=0) - 1e-6).all()


def test_the_degraded_mode_averages_at_most_the_rows_that_may_be_honest():
    found = robust.multi_krum(normal(7, 3), 2, RuleOptions(m=7, degraded=True))
    assert len(found.selected) == 5


def test_rows_without_columns_have_an_outcome_without_columns():
    rows = np.empty((7, 0), np.float32)
    for name in NAMES:
        assert apply_rule(name, rows, 1).values.shape == (0,)
    assert estimate_num_byzantine(rows) == 0


def test_none_are_dishonest_is_an_assumption_of_its_own():
    rows = normal(9, 50)
    rows[3] = 1e6
    assert estimate_num_byzantine(rows) == 1
    assert 3 in robust.multi_krum(rows, 0, RuleOptions(m=9)).selected
    assert 3 not in robust.multi_krum(rows, 1, RuleOptions(m=8)).selected


def test_equal_scores_go_to_the_first_rows():
    rows = np.repeat(np.array([[5.0], [1.0], [1.0], [5.0], [1.0], [5.0]], np.float32), 2, axis=1)
    assert robust.krum(rows, 1).selected == (0,)
    assert robust.multi_krum(rows, 1, RuleOptions(m=2)).selected == (0, 1)
    assert robust.krum(rows[1:], 1).selected == (0,)


def test_a_common_offset_takes_no_digits_of_the_distances():
    # A Gram matrix of float32 weights near 100 would make noise of differences of 1e-3.
    rows = normal(20, 1000) * np.float32(2**-10)
    rows[:4] *= 8
    grid = np.round(rows * 2**15) / np.float32(2**15)
    near, far = (robust.multi_krum(x, 4).selected for x in (grid, grid + np.float32(100)))
    assert near == far
    assert not set(near) & {0, 1, 2, 3}


def test_one_huge_row_takes_no_digits_of_the_others_distances():
    rows = normal(12, 100)
    alone = robust.krum(rows[1:], 1)
    rows[0] = 1e38
    with_it = robust.krum(rows, 1)
    assert with_it.selected[0] == alone.selected[0] + 1
    assert np.isfinite(with_it.scores).all()


# --- paths and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_separate_vectors_and_strided_rows_are_the_same(dtype):
    rows = normal(11, 700, dtype=dtype)
    separate = [row.copy() for row in rows]
    for row in separate:
        row.flags.writeable = False
    strided = np.asfortranarray(rows)
    for name in NAMES:
        outcomes = {apply_rule(name, given, 1).values.tobytes() for given in (rows, separate, strided, rows[:, ::1])}
        assert len(outcomes) == 1


def test_the_rows_are_left_as_they_are():
    rows = normal(11, 700)
    before = rows.copy()
    for name in NAMES:
        apply_rule(name, rows, 1, RuleOptions(mixing="nnm"))
    estimate_num_byzantine(rows)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("n", [1, 2, 5, 33, 64])
def test_sorting_gives_the_bits_of_the_network(monkeypatch, n):
    rows = normal(n, 600, seed=n)
    f = (n - 1) // 4
    bulyan = RuleOptions(degraded=True)

    def outcomes() -> list[bytes]:
        found = [robust.median(rows, f), robust.trimmed_mean(rows, f), robust.bulyan(rows, f, bulyan)]
        return [r.values.tobytes() for r in found]

    by_network = outcomes()
    monkeypatch.setattr(by_coordinate, "MAX_ROWS", 0)
    assert outcomes() == by_network


def test_more_rows_than_a_network_is_made_for_are_sorted():
    rows = normal(by_coordinate.MAX_ROWS + 1, 3)
    assert np.array_equal(robust.median(rows, 5).values, np.median(rows.astype(np.float64), axis=0))


@pytest.mark.parametrize("n", [9, 150])
def test_the_number_of_threads_changes_no_bit(monkeypatch, n):
    rows = normal(n, 40_000 if n < 100 else 9000)
    assert rows.size > blocks._PARALLEL_FROM
    cases = [(name, RuleOptions(mixing=mixing)) for name in NAMES for mixing in ("none", "nnm")]
    cases += [
        ("krum", RuleOptions(mode="sketch", seed=1)),
        ("multi-krum", RuleOptions(mode="sampled", seed=1, peers=6)),
    ]
    cases += [("median", RuleOptions(mixing="bucketing", bucket_size=3, seed=4))]
    outcomes = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(blocks, "THREADS", threads)
        outcomes.append([apply_rule(name, rows, 1, options).values.tobytes() for name, options in cases])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_many_rows_are_compared_in_ranges_of_tiles():
    rows = normal(1500, 70)
    scores = robust.krum(rows, 300).scores
    wide = rows.astype(np.float64)
    for i in (0, 777, 1499):
        others = np.sort(((wide - wide[i]) ** 2).sum(axis=1))[1 : 1500 - 300 - 1]
        assert scores[i] == pytest.approx(others.sum(), rel=2.0**-18)


def test_an_iterative_rule_says_whether_it_arrived():
    rows = normal(9, 5)
    rows[0] = 50
    arrived = robust.geometric_median(rows, 1)
    assert arrived.converged
    assert 1 < arrived.iterations < 50
    stopped = robust.geometric_median(rows, 1, RuleOptions(iterations=1))
    assert (stopped.converged, stopped.iterations) == (False, 1)


def test_rows_of_which_most_are_equal_are_their_own_centre():
    rows = np.zeros((7, 4), np.float32)
    rows[:3] = [[9] * 4, [-1] * 4, [2] * 4]
    for name in ("geometric-median", "centered-clipping"):
        found = apply_rule(name, rows, 3)
        assert not found.values.any()
        assert not found.weights[:3].any()


# --- the estimate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [0, 1, 5, 12])
def test_rows_that_are_far_are_counted(f):
    rows = normal(40, 500, seed=f)
    rows[:f] *= -20
    assert estimate_num_byzantine(rows) == f


def test_the_estimate_is_capped_by_what_krum_stands_or_by_the_given_limit():
    rows = normal(9, 50)
    rows[:4] *= [[1e3], [1e4], [1e5], [1e6]]
    assert estimate_num_byzantine(rows) == 3
    assert estimate_num_byzantine(rows, limit=1) == 1
    assert estimate_num_byzantine(rows, limit=9) == 4
    assert estimate_num_byzantine(rows[:2]) == 0


def test_among_equal_rows_whatever_differs_is_counted():
    rows = np.ones((20, 30), np.float32)
    assert estimate_num_byzantine(rows) == 0
    rows[3:5] += 1e-3
    assert estimate_num_byzantine(rows) == 2


# --- imports --------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_configuration_and_bounds_load_no_compiler():
    assert (
        run("""
import sys
from server_ref.aggregation.robust import RULES, RuleOptions, apply_rule, check_options, estimate_num_byzantine, krum
from server_ref.aggregation.robust import sensitivity_replace_one
for name in RULES:
    check_options(name, RuleOptions(mixing="nnm"))
sensitivity_replace_one("multi-krum", 10, 2, 1.0)
print("numba" in sys.modules)
""")
        == "False"
    )


def test_warming_up_loads_every_kernel_and_every_public_name_exists():
    assert (
        run("""
import sys
from server_ref.aggregation import robust
robust.warm_robust()
assert "server_ref.aggregation.robust.kernels" in sys.modules
assert "server_ref.aggregation.robust.tiles" in sys.modules
for name in robust.__all__:
    assert getattr(robust, name).__class__.__name__ != "module", name
    assert name in dir(robust)
try:
    robust.nothing
except AttributeError as e:
    assert "nothing" in str(e)
else:
    raise AssertionError
print("done")
""")
        == "done"
    )


def test_the_modules_own_examples_hold():
    import doctest  # noqa: PLC0415 - used here only
    import importlib  # noqa: PLC0415 - as above

    for module in ("rules", "sensitivity", "estimate"):
        result = doctest.testmod(
            importlib.import_module(f"server_ref.aggregation.robust.{module}"),
            extraglobs={"np": np, "RuleOptions": RuleOptions},
        )
        assert result.attempted
        assert not result.failed
