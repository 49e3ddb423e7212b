"""AsyncGradientAggregator: what is refused and why, what an aggregate is made of, what halts it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from client_sdk.protocol.errors import (
    ConfigurationError,
    DivergenceDetected,
    DuplicateReport,
    NonFiniteUpdate,
    ReportMismatch,
    ShapeMismatch,
    TooManyByzantine,
    UpdateOutOfRange,
)
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref.aggregation.asynchronous import AsyncGradientAggregator
from server_ref.aggregation.monitoring import DivergenceDetector
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.tensors import apply_update


def update(worker: str, *values: float, samples: int = 1, **more: object) -> WorkerGradient:
    fields = {"timestamp": 0.0, **more}
    return WorkerGradient(worker, {"w": np.array(values, np.float32)}, samples, **fields)


def advance(aggregator: AsyncGradientAggregator, rounds: int, *, width: int = 1) -> None:
    """Complete so many rounds of fresh zeros."""
    for _ in range(rounds):
        for i in range(aggregator._buffer.size):
            aggregator.submit_gradient_async(update(f"filler{i}", *[0.0] * width), aggregator.current_round)


def test_an_aggregate_comes_with_the_update_that_fills_the_buffer():
    aggregator = AsyncGradientAggregator(min_workers_per_round=3)
    assert aggregator.submit_gradient_async(update("a", 1.0), 0) is None
    assert aggregator.submit_gradient_async(update("b", 2.0), 0) is None
    assert (aggregator.pending, aggregator.current_round) == (2, 0)
    result = aggregator.submit_gradient_async(update("c", 6.0), 0)
    assert result["w"].tolist() == [3.0]
    assert (result.kind, result.count) == (UpdateKind.GRADIENT, 3)
    assert result.measurements["staleness"] == {"0": 3}
    assert result.measurements["round_id"] == 0
    assert (aggregator.pending, aggregator.current_round) == (0, 1)
    model = apply_update({"w": np.array([10.0], np.float32)}, result, learning_rate=0.5)
    assert model["w"].tolist() == [8.5]


def test_the_aggregate_has_the_kind_of_the_first_update_or_of_the_model():
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(2.0, dtype=torch.float64)}
    result = AsyncGradientAggregator(1).submit_gradient_async(WorkerGradient("a", tensors, 1, 0.0), 0)
    assert isinstance(result["a"], torch.Tensor)
    assert result["a"].shape == (2, 3)
    assert result["b"].dtype == torch.float64
    numpy_model = AsyncGradientAggregator(1, model_state={"w": np.zeros(1, np.float64)})
    result = numpy_model.submit_gradient_async(WorkerGradient("a", {"w": torch.ones(1)}, 1, 0.0), 0)
    assert isinstance(result["w"], np.ndarray)
    assert result["w"].dtype == np.float64


def test_staleness_weights_are_divided_by_a_constant():
    aggregator = AsyncGradientAggregator(2, staleness_exponent=1.0)
    advance(aggregator, 3)
    # Equally stale: weights that were normalised by their own sum would cancel. 1 / (1 + 3) is 64 / 256.
    aggregator.submit_gradient_async(update("a", 8.0), 0)
    result = aggregator.submit_gradient_async(update("b", 16.0), 0)
    assert result["w"].tolist() == [0.25 * 12]
    # Sample weights are normalised by their sum, staleness is not: (3 * 64 * 8 + 1 * 256 * 16) / (256 * 4).
    aggregator.submit_gradient_async(update("a", 8.0, samples=3), 1)
    result = aggregator.submit_gradient_async(update("b", 16.0), 4)
    assert result["w"].tolist() == [5.5]
    assert result.total_weight == 4
    assert result.measurements["staleness"] == {"0": 1, "3": 1}


def test_sample_counts_are_capped():
    aggregator = AsyncGradientAggregator(2, max_weight=3)
    aggregator.submit_gradient_async(update("honest", 0.0, samples=1), 0)
    result = aggregator.submit_gradient_async(update("boaster", 1.0, samples=10**9), 0)
    assert result["w"].tolist() == [0.75]


def test_an_update_that_is_too_old_is_counted_and_nothing_else():
    seen = []
    aggregator = AsyncGradientAggregator(1, max_staleness=2, on_rejected=seen.append)
    advance(aggregator, 3)
    assert aggregator.submit_gradient_async(update("late", math.nan), 0) is None
    assert aggregator.pending == 0
    assert aggregator.rejection_counts == {"stale-report": 1}
    assert [(r.worker_id, r.error.slug) for r in aggregator.rejections] == [("late", "stale-report")]
    assert seen == list(aggregator.rejections)
    assert aggregator.submit_gradient_async(update("just", 1.0), 1) is not None


def test_age_is_looked_at_before_anything_else():
    class Untouchable(dict):
        def __getitem__(self, name):
            raise AssertionError("the values were looked at")

        items = keys = values = __iter__ = __contains__ = __getitem__

    aggregator = AsyncGradientAggregator(1, max_staleness=0)
    advance(aggregator, 1)
    assert aggregator.submit_gradient_async(WorkerGradient("a", Untouchable(), 0, math.nan), 0) is None


def test_the_tolerance_tightens_and_follows_the_stability_bound():
    tightening = AsyncGradientAggregator(1, max_staleness=4, min_staleness=1, tighten_rounds=10)
    advance(tightening, 10)
    assert tightening.submit_gradient_async(update("a", 1.0), 8) is None
    assert tightening.submit_gradient_async(update("a", 1.0), 9) is not None
    stable = AsyncGradientAggregator(1, max_staleness=10, step_times_curvature=0.305)
    advance(stable, 6)
    assert stable.submit_gradient_async(update("a", 1.0), 1) is None, "0.305 is stable up to an age of 4"
    assert stable.submit_gradient_async(update("a", 1.0), 2) is not None


def test_a_model_from_the_future_is_refused():
    aggregator = AsyncGradientAggregator(2)
    with pytest.raises(ReportMismatch, match="newest is 0"):
        aggregator.submit_gradient_async(update("a", 1.0), 1)
    assert aggregator.rejection_counts == {"report-mismatch": 1}


def test_a_worker_counts_once_in_a_buffer():
    aggregator = AsyncGradientAggregator(2)
    aggregator.submit_gradient_async(update("a", 1.0), 0)
    with pytest.raises(DuplicateReport):
        aggregator.submit_gradient_async(update("a", 5.0), 0)
    assert aggregator.submit_gradient_async(update("b", 3.0), 0)["w"].tolist() == [2.0]
    assert aggregator.submit_gradient_async(update("a", 5.0), 1) is None, "it may be in the next buffer"
    assert aggregator.pending == 1


def test_a_report_that_is_sent_again_counts_once_also_across_buffers():
    aggregator = AsyncGradientAggregator(1, max_staleness=2)
    first = update("a", 1.0, metadata={"report_id": "r1"})
    assert aggregator.submit_gradient_async(first, 0) is not None
    with pytest.raises(DuplicateReport, match="before"):
        aggregator.submit_gradient_async(first, 0)
    assert aggregator.submit_gradient_async(update("b", 1.0, metadata={"report_id": "r1"}), 0) is not None
    advance(aggregator, 1)
    assert aggregator.submit_gradient_async(first, 0) is None, "by now it is too old"
    assert aggregator.rejection_counts == {"duplicate-report": 1, "stale-report": 1}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (update("b", math.nan, 0.0), NonFiniteUpdate),
        (update("b", 0.0, math.inf), NonFiniteUpdate),
        (update("b", 1e11, 0.0), UpdateOutOfRange),
        (update("b", 1.0), ShapeMismatch),
        (WorkerGradient("b", {"v": np.zeros(2, np.float32)}, 1, 0.0), ShapeMismatch),
        (WorkerGradient("b", {"w": [1.0, 2.0]}, 1, 0.0), ShapeMismatch),
        (update("b", 1.0, 2.0, kind=UpdateKind.DELTA), ReportMismatch),
        (update("b", 1.0, 2.0, samples=0), ReportMismatch),
        (update("b", 1.0, 2.0, samples=-5), ReportMismatch),
        (update("b", 1.0, 2.0, samples=1.5), ReportMismatch),
    ],
)
def test_a_bad_update_is_refused_and_the_others_count(bad, error):
    aggregator = AsyncGradientAggregator(2)
    aggregator.submit_gradient_async(update("a", 1.0, 2.0), 0)
    with pytest.raises(error):
        aggregator.submit_gradient_async(bad, 0)
    assert aggregator.rejections[-1].error is error
    assert aggregator.pending == 1
    assert aggregator.submit_gradient_async(update("b", 3.0, 4.0), 0)["w"].tolist() == [2.0, 3.0]


def test_a_refused_first_update_decides_nothing():
    aggregator = AsyncGradientAggregator(1)
    with pytest.raises(NonFiniteUpdate):
        aggregator.submit_gradient_async(update("a", math.nan, 0.0, 0.0, kind=UpdateKind.DELTA), 0)
    with pytest.raises(ShapeMismatch):
        aggregator.submit_gradient_async(WorkerGradient("a", {"w": "nonsense"}, 1, 0.0), 0)
    result = aggregator.submit_gradient_async(update("a", 1.0), 0)
    assert result["w"].tolist() == [1.0]
    assert result.kind is UpdateKind.GRADIENT


def test_an_aggregate_that_does_not_fit_its_type_undoes_the_update_that_caused_it():
    aggregator = AsyncGradientAggregator(2, model_state={"w": np.zeros(1, np.float16)})
    aggregator.submit_gradient_async(update("a", 6e4), 0)
    with pytest.raises(UpdateOutOfRange):
        aggregator.submit_gradient_async(update("b", 1e6), 0)
    assert (aggregator.pending, aggregator.current_round) == (1, 0)
    assert aggregator.submit_gradient_async(update("b", 2e4), 0)["w"].tolist() == [4e4]


def test_the_learning_rate_falls_with_the_mean_staleness():
    aggregator = AsyncGradientAggregator(2, staleness_weighting="constant", scale_learning_rate=True)
    advance(aggregator, 4)
    aggregator.submit_gradient_async(update("a", 10.0), 0)
    result = aggregator.submit_gradient_async(update("b", 10.0), 2)
    assert result["w"].tolist() == [2.5]  # (4 + 2) / 2 = 3
    assert result.measurements["learning_rate_scale"] == 0.25


def test_a_delayed_mean_is_corrected_by_the_steps_it_missed():
    aggregator = AsyncGradientAggregator(1, staleness_weighting="constant", delay_damping=0.5)
    assert aggregator.submit_gradient_async(update("a", 8.0), 0)["w"].tolist() == [8.0]
    assert aggregator.submit_gradient_async(update("a", 8.0), 0)["w"].tolist() == [8.0 - 0.5 * 8]
    assert aggregator.submit_gradient_async(update("a", 8.0), 0)["w"].tolist() == [8.0 - 0.5 * 12]
    assert aggregator.submit_gradient_async(update("a", 8.0), 3)["w"].tolist() == [8.0]


def test_another_rule_than_the_mean():
    aggregator = AsyncGradientAggregator(3, reduce=RobustRule("median"))
    for worker, value in (("a", 1.0), ("b", 1e9)):
        aggregator.submit_gradient_async(update(worker, value), 0)
    assert aggregator.submit_gradient_async(update("c", 2.0), 0)["w"].tolist() == [2.0]
    assert "median" in aggregator.describe()


def test_losses_that_rise_halt_everything_until_it_is_resumed():
    aggregator = AsyncGradientAggregator(2, detector=DivergenceDetector(patience=2, warm_up=1, smoothing=1.0))
    aggregator.submit_gradient_async(update("a", 1.0), 0)
    for loss in (1.0, 0.5, 1.2):
        aggregator.observe_loss(loss)
    with pytest.raises(DivergenceDetected):
        aggregator.observe_loss(3.0)
    with pytest.raises(DivergenceDetected):
        aggregator.submit_gradient_async(update("b", 1.0), 0)
    assert aggregator.pending == 1
    aggregator.resume()
    assert aggregator.submit_gradient_async(update("b", 1.0), 0) is not None


def test_norms_that_explode_halt_it_if_they_are_watched():
    for watched in (False, True):
        aggregator = AsyncGradientAggregator(1, watch_norms=watched)
        outcomes = []
        for i in range(30):
            try:
                outcomes.append(aggregator.submit_gradient_async(update("a", 2.0**i), i) is not None)
            except DivergenceDetected:
                outcomes.append(False)
        assert outcomes[:5] == [True] * 5
        assert all(outcomes) is not watched
        assert aggregator.current_round == sum(outcomes)


def test_selection_prefers_the_fast_above_the_floor_and_counts_the_late():
    now = [100.0]
    aggregator = AsyncGradientAggregator(1, max_staleness=0, selection_floor=0.3, clock=lambda: now[0])
    assert aggregator.get_worker_selection_probabilities() == {}
    advance(aggregator, 1)  # filler0 took 100 seconds
    aggregator.submit_gradient_async(update("fast", 1.0, timestamp=99.0), 1)
    aggregator.submit_gradient_async(update("late", 1.0, timestamp=0.0), 0)
    aggregator.submit_gradient_async(update("from the future", 1.0, timestamp=1e9), 2)
    aggregator.submit_gradient_async(update("without a clock", 1.0, timestamp=math.nan), 3)
    found = aggregator.get_worker_selection_probabilities()
    assert found.keys() == {"filler0", "fast", "late", "from the future"}
    assert found["from the future"] > found["fast"] > found["filler0"] == found["late"] >= 0.3 / 4
    indifferent = AsyncGradientAggregator(1, enable_stragglers_mitigation=False)
    advance(indifferent, 1)
    assert indifferent.get_worker_selection_probabilities() == {}


def test_the_caller_s_update_is_not_touched():
    gradient = update("a", 1.0, 2.0)
    before = (gradient.gradients["w"].copy(), gradient.metadata)
    AsyncGradientAggregator(1, clip_norm=0.1).submit_gradient_async(gradient, 0)
    np.testing.assert_array_equal(gradient.gradients["w"], before[0])
    assert gradient.metadata is before[1] is None


def test_a_rule_that_the_buffer_is_too_small_for_is_refused_at_once():
    with pytest.raises(TooManyByzantine):
        AsyncGradientAggregator(5, reduce=RobustRule("krum", num_byzantine=4))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_workers_per_round": 0},
        {"max_staleness": -1},
        {"staleness_weighting": "quadratic"},
        {"staleness_weighting": "adaptive"},
        {"staleness_exponent": -1.0},
        {"min_staleness": 11},
        {"step_times_curvature": 2.5},
        {"delay_damping": 0.0},
        {"delay_damping": 0.5, "reduce": RobustRule("median")},
        {"delay_damping": 0.5, "aggregation_method": "fednova"},
        {"aggregation_method": "scaffold"},
        {"max_workers": 7},
        {"selection_floor": 1.5},
        {"max_weight": 0},
        {"model_state": {"w": [1.0]}},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings):
    with pytest.raises(ConfigurationError):
        AsyncGradientAggregator(**settings)
