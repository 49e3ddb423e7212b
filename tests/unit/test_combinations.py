"""Settings that do not go together: what is refused, that the advice given builds, and that the line is well drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, TooManyByzantine
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Aggregate
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.robust import RuleOptions, apply_rule
from server_ref.aggregation.server_state import ServerState
from server_ref.assignments import AssignmentRecord, Closing
from server_ref.closing import close_buffer
from server_ref.combinations import BY_COORDINATE, check_combinations, expected_density
from server_ref.config import TaskConfig
from server_ref.task import Task, load_task
from tests.bundles import tiny_bundle

SIZE, ROWS = 4096, 20
ASYNC = {"max_staleness": 3}


def check(size: int = SIZE, **settings: Any) -> None:
    line = settings.get("compression")
    spec = None if line is None else CompressionSpec.parse(line)
    check_combinations(TaskConfig(bundle="bundle", **settings), spec, size)


# --- sparse updates under rules by coordinate ----------------------------------------------------------------

SPARSE = ["topk:0.01", "topk:0.5", "randomk:0.1", "threshold:0.001", "sketch:0.2,recover=0.1"]
DENSE = ["topk:0.51", "randomk:0.6", "randomk:0.1,rotate", "sketch:0.2", "quantize:8", "none"]


def decoded(line: str) -> np.ndarray:
    """float32[ROWS, SIZE]: updates of devices that have little in common, as the server sees them."""
    rng = np.random.default_rng(7)
    common = rng.standard_normal(SIZE)
    codec = Codec(CompressionSpec.parse(line), SIZE)
    rows = (common + 2 * rng.standard_normal((ROWS, SIZE))).astype(np.float32)
    return np.stack([codec.decode(codec.encode(row, seed), seed) for seed, row in enumerate(rows)])


@pytest.mark.parametrize("line", SPARSE)
@pytest.mark.parametrize("rule", sorted(BY_COORDINATE))
def test_a_rule_by_coordinate_is_refused_sparse_updates(rule, line):
    with pytest.raises(ConfigurationError, match=f"^{rule}.*{re.escape(str(CompressionSpec.parse(line)))}.*quantize:8"):
        check(aggregation={"rule": rule}, compression=line)


@pytest.mark.parametrize("rule", sorted(BY_COORDINATE))
def test_a_rule_on_sums_of_buckets_sees_what_any_update_of_a_bucket_holds(rule):
    noised = {"noise": "server", "epsilon": 1.0}
    settings = {"aggregation": {"rule": rule, "clip_norm": 1.0}, "compression": "randomk:0.1", "buffer_size": 100}
    check(**settings, privacy={**noised, "buckets": 10})
    with pytest.raises(ConfigurationError, match="one coordinate at a time"):
        check(**settings, privacy={**noised, "buckets": 20})


@pytest.mark.parametrize("line", DENSE)
@pytest.mark.parametrize("rule", sorted(BY_COORDINATE))
def test_it_takes_updates_of_which_most_hold_a_coordinate(rule, line):
    check(aggregation={"rule": rule}, compression=line)


def test_what_the_refusal_advises_is_not_refused():
    with pytest.raises(ConfigurationError) as caught:
        check(aggregation={"rule": "median"}, compression="topk:0.01")
    advised = re.findall(r"krum, multi-krum, geometric-median or centered-clipping|nnm|quantize:8", str(caught.value))
    assert len(advised) == 3
    for rule in ("krum", "multi-krum", "geometric-median", "centered-clipping"):
        check(aggregation={"rule": rule}, compression="topk:0.01")
    check(aggregation={"rule": "median", "mixing": "nnm"}, compression="topk:0.01")
    check(aggregation={"rule": "median"}, compression="quantize:8")


@pytest.mark.parametrize(("line", "bucket_size", "refused"), [
    ("randomk:0.3", 1, True), ("randomk:0.29", 2, True), ("randomk:0.3", 2, False), ("topk:0.01", 8, True),
])  # fmt: skip
def test_a_bucket_s_mean_holds_what_any_of_its_updates_holds(line, bucket_size, refused):
    aggregation = {"rule": "median", "mixing": "bucketing", "bucket_size": bucket_size}
    if refused:
        with pytest.raises(ConfigurationError, match="0 or hardly more"):
            check(aggregation=aggregation, compression=line)
    else:
        check(aggregation=aggregation, compression=line)


@pytest.mark.parametrize("line", ["topk:0.01", "topk:0.1", "randomk:0.1", "randomk:0.3"])
def test_what_is_refused_has_a_median_of_next_to_nothing(line):
    rows = decoded(line)
    found, mean = apply_rule("median", rows, 4).values, rows.mean(axis=0)
    assert np.linalg.norm(found) < 0.35 * np.linalg.norm(mean)


@pytest.mark.parametrize(
    ("line", "mixing"), [(line, "none") for line in DENSE] + [("topk:0.01", "nnm"), ("randomk:0.1", "nnm")]
)
def test_what_is_taken_has_a_median_that_points_where_the_mean_does(line, mixing):
    rows = decoded(line)
    found, mean = apply_rule("median", rows, 4, RuleOptions(mixing=mixing)).values, rows.mean(axis=0)
    cosine = found @ mean / (np.linalg.norm(found) * np.linalg.norm(mean))
    assert cosine > 0.65
    assert np.linalg.norm(found) > 0.5 * np.linalg.norm(mean)


@pytest.mark.parametrize(
    "line", ["none", "topk:0.01", "randomk:0.3", "randomk:0.01,rotate", "sketch:0.2", "sketch:0.2,recover=0.1"]
)
def test_the_density_is_that_of_decoded_updates(line):
    measured = np.count_nonzero(decoded(line)) / (ROWS * SIZE)
    assert expected_density(CompressionSpec.parse(line), SIZE) == pytest.approx(measured, rel=0.02)


# --- options that the mean has no use for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mixing", "nnm", "--mixing"),
        ("bucket_size", 3, "bucket_size"),
        ("distances", "sketch", "--distances"),
        ("degraded", True, "--degraded"),
        ("selected", 4, "task.aggregation.selected"),
    ],
)
def test_what_the_mean_would_ignore_is_named(name, value, says):
    with pytest.raises(ConfigurationError, match=f"{says}.*--rule"):
        check(aggregation={name: value})
    check(aggregation={"rule": "multi-krum", name: value})


# --- the correction for delay -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"staleness": {"max_staleness": 0}}, "--async"),
        # Declared so steep that no age is tolerated: as good as synchronous.
        ({"staleness": {"max_staleness": 3, "step_times_curvature": 1.5}}, "none are accepted"),
        ({"aggregation": {"rule": "median"}}, "choose the mean"),
        ({"optimizer": {"name": "adam"}}, "adam moves it otherwise: choose sgd"),
        ({"optimizer": {"name": "yogi"}}, "choose sgd"),
        ({"optimizer": {"name": "adagrad"}}, "choose sgd"),
        ({"optimizer": {"momentum": 0.9}}, "without momentum"),
        ({"plan": {"algorithm": "fednova", "max_steps": 9}}, "choose fedavg"),
        ({"plan": {"algorithm": "scaffold"}, "population": 9}, "choose fedavg"),
    ],
)
def test_a_correction_that_would_be_wrong_or_ignored_is_refused(changes, says):
    settings = {"staleness": ASYNC, "delay_damping": 0.3} | changes
    with pytest.raises(ConfigurationError, match=f"--delay-damping.*{says}"):
        check(**settings)
    check(**settings | {"delay_damping": None})


def test_a_correction_of_plain_steps_is_taken():
    check(staleness=ASYNC, delay_damping=0.3)
    check(staleness=ASYNC, delay_damping=0.3, optimizer={"learning_rate": 0.5, "momentum": 0.0})


# --- through the task ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combinations") / "softmax"
    tiny_bundle("softmax", folder)
    return folder


def task_of(bundle, **settings: Any) -> Task:
    return load_task(TaskConfig(bundle=bundle, plan={"batch_size": 4}, **settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aggregation": {"rule": "bulyan"}, "compression": "topk:0.01", "buffer_size": 20}, "quantize:8"),
        ({"aggregation": {"degraded": True}}, "--degraded"),
        ({"delay_damping": 0.3}, "--async"),
        ({"aggregation": {"rule": "krum"}, "buffer_size": 2}, "choose another rule"),
        ({"aggregation": {"clip_norm": 1e200}}, "clip_norm"),
        ({"aggregation": {"clip_norm": 1e-200, "clip_scope": "layer"}}, "clip_norm"),
    ],
)
def test_no_task_begins_with_them(bundle, settings, says):
    with pytest.raises((ConfigurationError, TooManyByzantine), match=says):
        task_of(bundle, **settings)


@dataclass
class Standing:
    """What a round starts from."""

    optimizer: ServerState
    correction: DelayCorrection
    divergence_json: str | None = None


@dataclass
class Buffer:
    """Reports that came to this."""

    values: np.ndarray

    def reduce(self, counted, _version):
        return Aggregate(self.values, UpdateKind.DELTA, len(counted), len(counted), measurements=MappingProxyType({}))


def closing_of(round_id: int, ages: list[int]) -> Closing:
    counted = [
        AssignmentRecord(i, f"{i:032x}", f"device-{i}", round_id - age, round_id - age, 1, 0.0, 1.0)
        for i, age in enumerate(ages)
    ]
    return Closing(round_id, tuple(counted), 1.0)


def test_the_step_that_is_remembered_is_the_one_that_the_model_took(bundle):
    """Also where the learning rate falls with the buffer's ages: the next correction is by what was really missed."""
    task = task_of(
        bundle,
        buffer_size=2,
        staleness={"max_staleness": 3, "weighting": "constant", "scale_learning_rate": True},
        delay_damping=0.25,
        aggregation={"weighting": "uniform"},
        divergence={"enabled": False},
    )
    rng = np.random.default_rng(0)
    size = task.manifest.num_parameters
    state = Standing(
        task.pipeline.optimizer.initial(np.zeros(size, np.float32)), DelayCorrection(damping=0.25, max_staleness=3)
    )
    taken: list[np.ndarray] = []
    for round_id, ages in enumerate([[0, 0], [0, 1], [2, 1], [3, 3]]):
        mean = rng.standard_normal(size)
        before = state.optimizer.weights.astype(np.float64)
        outcome = close_buffer(task, state, Buffer(mean), closing_of(round_id, ages))
        missed = sum((sum(taken[len(taken) - age :], np.zeros(size)) for age in ages), np.zeros(size)) / 2
        expected = (mean - 0.25 * missed) * 2 / (2 + sum(ages))
        np.testing.assert_allclose(outcome.step, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(outcome.optimizer.weights - before, outcome.step, rtol=0, atol=1e-6)
        state.correction.record(outcome.step)
        state.optimizer = outcome.optimizer
        taken.append(outcome.step)
