"""The specification's classes: what they are told, whom they refuse, what they keep."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    NonFiniteUpdate,
    ReportMismatch,
    ShapeMismatch,
    TooManyByzantine,
    UpdateOutOfRange,
)
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref import ByzantineRobustAggregator, CompressedGradientAggregator, GradientAggregator
from server_ref.aggregation import RuleOptions
from server_ref.aggregation.errors import MixedKinds

MODEL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros((), np.float32)}
PRESETS = [GradientAggregator, ByzantineRobustAggregator, CompressedGradientAggregator]
presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)


def worker(name: str, value: float, weight: int = 1, **rest) -> WorkerGradient:
    tensors = {"w": np.full((2, 2), value, np.float32), "b": np.float32(value)}
    return WorkerGradient(name, tensors, weight, timestamp=0.0, **rest)


def crowd(n: int = 5) -> list[WorkerGradient]:
    return [worker(f"w{i}", float(i)) for i in range(n)]


def aggregate(aggregator, workers, model=MODEL):
    method = getattr(aggregator, "aggregate", None) or aggregator.aggregate_byzantine_robust
    return method(workers, model)


# --- keywords ----------------------------------------------------------------------------------------------


@presets
@pytest.mark.parametrize(
    "keywords",
    [{"epsilon": 1.0}, {"delta": 1e-5}, {"max_grad_norm": 1.0}, {"noise_multiplier": 1.1}, {"adaptive_clipping": True}],
    ids=lambda keywords: next(iter(keywords)),
)
def test_keywords_of_differential_privacy_are_refused_and_not_swallowed(preset, keywords: dict):
    with pytest.raises(ConfigurationError, match=rf"{next(iter(keywords))}.*adds no noise.*noise stage"):
        preset(**keywords)


@presets
@pytest.mark.parametrize(
    ("keywords", "names"),
    [
        ({"clip_nrom": 1.0}, "clip_nrom"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"clip_norm": float("inf")}, "clip_norm"),
        ({"clip_norm": 1.0, "clip_scope": "tensor"}, "clip_scope"),
        ({"max_weight": 0}, "max_weight"),
        ({"max_abs": -1.0}, "max_abs"),
        ({"max_workers": 0}, "max_workers"),
        ({"population": 0}, "population"),
        ({"kind": "both"}, "kind"),
        ({"aggregation_method": "fedsgd"}, "aggregation_method"),
        ({"aggregation_method": "fednova", "kind": UpdateKind.GRADIENT}, "deltas"),
    ],
)
def test_bad_keywords_are_refused_by_name(preset, keywords: dict, names: str):
    with pytest.raises(ConfigurationError, match=names):
        preset(**keywords)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: GradientAggregator(summation="sum"), "exact, fixed, naive-float32"),
        (lambda: GradientAggregator(compensation_enabled=False, summation="kahan"), "drop one"),
        (lambda: GradientAggregator(compensation_enabled=False, summation="exact"), "drop one"),
        (lambda: GradientAggregator("fednova", summation="kahan"), "exact mean"),
        (lambda: ByzantineRobustAggregator("average"), "choose one of krum"),
        (lambda: ByzantineRobustAggregator("krum", -1), "not be negative"),
        (lambda: ByzantineRobustAggregator("krum", 1, byzantine_fraction=0.1), "not both"),
        (lambda: ByzantineRobustAggregator(aggregation_method="scaffold"), "GradientAggregator only"),
        (lambda: ByzantineRobustAggregator("median", rule_options=RuleOptions(m=3)), "no use for m"),
        (lambda: CompressedGradientAggregator(aggregation_method="scaffold"), "GradientAggregator only"),
        (lambda: CompressedGradientAggregator(num_byzantine=1), "aggregation_rule"),
        (lambda: CompressedGradientAggregator(compression_method="sketch"), "choose one of topk, randomk, threshold"),
        (lambda: CompressedGradientAggregator(compression_method="threshold"), "threshold"),
        (lambda: CompressedGradientAggregator(0.0), "greater than 0"),
        (lambda: CompressedGradientAggregator(1.5), "less than or equal to 1"),
        (lambda: CompressedGradientAggregator(value_bits=3), "32, 8, 4 or 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_construction(make: Callable[[], object], advice: str):
    with pytest.raises(ConfigurationError, match=advice):
        make()


def test_bounds_that_leave_no_exact_sum_are_refused_at_construction():
    with pytest.raises(BudgetExceeded, match="lower"):
        GradientAggregator(summation="fixed")
    with pytest.raises(BudgetExceeded, match="resolution"):
        GradientAggregator(max_abs=1e30)
    GradientAggregator(summation="fixed", max_abs=1e3, max_workers=1000)
    GradientAggregator(max_abs=1e30, resolution=1e10)


@presets
def test_describe_names_the_stages(preset):
    text = preset(clip_norm=2.5).describe()
    assert "L2 norm of the whole update <= 2.5" in text
    assert [line.split()[0] for line in text.splitlines()[2:]][-4:] == ["clip", "reduce", "noise", "apply"]


# --- refusals ----------------------------------------------------------------------------------------------


def test_a_refusal_says_who_and_why_and_nothing_of_the_values():
    heard = []
    aggregator = GradientAggregator(on_rejected=heard.append)
    workers = [worker("good", 1.0), worker("bad", 123456e6), worker("worse", float("nan")), worker("none", 1.0, 0)]
    assert aggregate(aggregator, workers)["b"] == 1.0
    assert [(r.position, r.worker_id, r.error) for r in aggregator.rejections] == [
        (1, "bad", UpdateOutOfRange),
        (2, "worse", NonFiniteUpdate),
        (3, "none", ReportMismatch),
    ]
    assert tuple(heard) == aggregator.rejections
    assert "123456" not in repr(heard)
    assert "1.23" not in repr(heard)
    aggregate(aggregator, workers[:1])
    assert aggregator.rejections == ()


@presets
def test_a_round_of_refused_updates_has_no_aggregate_and_the_next_one_does(preset):
    aggregator = preset()
    with pytest.raises(EmptyAggregate, match="rejections"):
        aggregate(aggregator, [worker("a", float("nan"))])
    assert [r.error for r in aggregator.rejections] == [NonFiniteUpdate]
    with pytest.raises(EmptyAggregate):
        aggregate(aggregator, [])
    assert aggregate(aggregator, [worker(f"w{i}", 2.0) for i in range(3)])["b"] == 2.0


@presets
def test_of_two_updates_of_a_worker_the_first_accepted_counts(preset):
    aggregator = preset()
    workers = [worker("a", float("inf")), worker("a", 1.0), worker("a", 50.0), worker("b", 1.0), worker("c", 1.0)]
    found = aggregate(aggregator, workers)
    assert found["b"] == 1.0
    assert found.count == 3
    assert [(r.position, r.error) for r in aggregator.rejections] == [(0, NonFiniteUpdate), (2, DuplicateReport)]


@presets
def test_deltas_and_gradients_never_mix(preset):
    mixed = [*crowd(3), worker("d", 9.0, kind=UpdateKind.DELTA)]
    with pytest.raises(MixedKinds, match="declare"):
        aggregate(preset(), mixed)
    for kind, left in ((UpdateKind.GRADIENT, 3), (UpdateKind.DELTA, 1)):
        aggregator = preset(kind=kind)
        if preset is ByzantineRobustAggregator and left == 1:
            continue
        found = aggregate(aggregator, mixed)
        assert (found.kind, found.count) == (kind, left)
        assert {r.error for r in aggregator.rejections} == {ReportMismatch}


def test_a_refused_update_does_not_decide_which_kind_the_round_takes():
    first = worker("a", float("nan"), kind=UpdateKind.DELTA)
    found = GradientAggregator().aggregate([first, *crowd(2)], MODEL)
    assert (found.kind, found.count) == (UpdateKind.GRADIENT, 2)


def test_a_kind_that_is_none_is_refused():
    aggregator = GradientAggregator()
    found = aggregate(aggregator, [worker("a", 1.0, kind="delta"), worker("b", 9.0, kind="average")])
    assert (found.kind, found["b"]) == (UpdateKind.DELTA, 1.0)
    assert [r.error for r in aggregator.rejections] == [ReportMismatch]


@pytest.mark.parametrize("weight", [0, -5, 2.0, "3", None])
def test_a_number_of_samples_that_is_none_is_refused(weight):
    assert not GradientAggregator().validate_gradient(worker("a", 1.0, weight))


def test_no_worker_weighs_more_than_the_public_maximum():
    workers = [worker("greedy", 100.0, 10**15), *(worker(f"w{i}", 0.0, 10) for i in range(9))]
    assert aggregate(GradientAggregator(max_weight=10), workers)["b"] == 10.0
    assert aggregate(GradientAggregator(max_weight=1), [worker("a", 1.0, 1000), worker("b", 3.0, 1)])["b"] == 2.0


def test_more_workers_than_declared_are_an_error_and_not_a_rounding():
    with pytest.raises(BudgetExceeded, match="max_count"):
        aggregate(GradientAggregator(max_workers=4), crowd(5))


@pytest.mark.parametrize(
    ("options", "largest", "beyond"),
    [
        ({}, 1e10, 1.0000001e10),
        ({"max_abs": 5.0}, 5.0, 5.000001),
        ({"clip_norm": 1.0}, 3e38, float("inf")),
        ({"clip_norm": 1.0, "max_abs": 7.0}, 7.0, 7.000001),
    ],
)
def test_how_large_a_value_may_be(options: dict, largest: float, beyond: float):
    aggregator = GradientAggregator(**options)
    assert aggregator.validate_gradient(worker("a", -largest))
    assert not aggregator.validate_gradient(worker("a", -beyond))


# --- validation --------------------------------------------------------------------------------------------


@presets
def test_an_update_is_validated_against_the_model_that_was_aggregated_for_last(preset):
    aggregator = preset()
    small = WorkerGradient("a", {"w": np.zeros(1, np.float32)}, 1, 0.0)
    assert aggregator.validate_gradient(small)
    assert not aggregator.validate_gradient(small, MODEL)
    aggregate(aggregator, crowd())
    assert not aggregator.validate_gradient(small)
    assert aggregator.validate_gradient(worker("a", 1.0))
    assert aggregator.validate_gradient(small, {"w": np.zeros(1)})


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (worker("a", float("nan")), NonFiniteUpdate),
        (worker("a", -1e11), UpdateOutOfRange),
        (WorkerGradient("a", {"w": np.array([1e100])}, 1, 0.0), UpdateOutOfRange),
        (WorkerGradient("a", {"w": [1.0]}, 1, 0.0), ShapeMismatch),
        (worker("a", 1.0, 0), ReportMismatch),
        (worker("a", 1.0, kind="other"), ReportMismatch),
    ],
)
def test_the_typed_variant_says_why(update: WorkerGradient, error: type[Exception]):
    with pytest.raises(error) as caught:
        GradientAggregator().check_gradient(update)
    assert type(caught.value) is error
    assert not GradientAggregator().validate_gradient(update)


# --- summations --------------------------------------------------------------------------------------------


def lopsided() -> list[WorkerGradient]:
    """Sums to 2 exactly; large values come between the small ones and cancel."""
    return [worker(f"w{i}", value) for i, value in enumerate([1.0, 1e8, 1.0, -1e8])]


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({}, 0.5),
        ({"summation": "exact"}, 0.5),
        ({"summation": "fixed", "max_abs": 1e8, "max_workers": 4, "max_weight": 1}, 0.5),
        ({"summation": "neumaier"}, 0.5),
        ({"summation": "naive-float64"}, 0.5),
        ({"summation": "kahan"}, 0.0),
        ({"summation": "pairwise"}, 0.0),
        ({"summation": "naive-float32"}, 0.0),
        ({"compensation_enabled": False}, 0.0),
        ({"compensation_enabled": False, "summation": "naive-float32"}, 0.0),
    ],
)
def test_what_each_summation_makes_of_small_values_between_large_ones(options: dict, mean: float):
    assert aggregate(GradientAggregator(**options), lopsided())["b"] == mean


# --- memory ------------------------------------------------------------------------------------------------


def stream(n: int, size: int) -> Iterator[WorkerGradient]:
    """Workers that all write into one array, as a reader of a file might."""
    array = np.empty(size, np.float32)
    for i in range(n):
        array[:] = i
        yield WorkerGradient(f"w{i}", {"w": array}, 1, timestamp=0.0)


def test_a_stream_that_reuses_its_array_is_aggregated_all_the_same():
    for aggregator in (GradientAggregator(), ByzantineRobustAggregator("median", 1)):
        assert aggregate(aggregator, stream(101, 7), {"w": np.zeros(7, np.float32)})["w"].tolist() == [50.0] * 7


def peak_bytes(n: int, size: int) -> int:
    aggregator, model = GradientAggregator(), {"w": np.zeros(size, np.float32)}
    aggregator.aggregate(stream(2, size), model)
    tracemalloc.start()
    try:
        aggregator.aggregate(stream(n, size), model)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_workers():
    size = 4_300_000  # more than are read before they are folded together
    few, many = peak_bytes(2, size), peak_bytes(20, size)
    assert many < few + size
    # 24 bytes of bins, 4 of the update that is read, 8 of the mean, 4 of the result, and what the source holds.
    assert many < 50 * size


# --- scaffold and fednova ----------------------------------------------------------------------------------


def scaffold_worker(name: str, delta: float, control: float, weight: int = 1) -> WorkerGradient:
    return worker(name, delta, weight, kind=UpdateKind.DELTA, metadata={"control_delta": worker("", control).gradients})


def test_scaffold_returns_the_mean_delta_and_moves_the_server_s_control():
    aggregator = GradientAggregator("scaffold", population=10)
    assert aggregator.server_control is None
    first = aggregate(aggregator, [scaffold_worker("a", 1.0, 4.0), scaffold_worker("b", 3.0, 8.0)])
    assert (first["b"], first.kind, first["w"].shape) == (2.0, UpdateKind.DELTA, (2, 2))
    np.testing.assert_allclose(aggregator.server_control, 5 * [2 / 10 * 6.0])
    aggregate(aggregator, [scaffold_worker("c", 1.0, -4.0)])
    np.testing.assert_allclose(aggregator.server_control, 5 * [2 / 10 * 6.0 - 1 / 10 * 4.0])


def test_scaffold_without_a_population_takes_all_workers_to_be_there():
    aggregator = GradientAggregator("scaffold")
    aggregate(aggregator, [scaffold_worker("a", 1.0, 4.0, 3), scaffold_worker("b", 3.0, 8.0, 1)])
    np.testing.assert_allclose(aggregator.server_control, 5 * [5.0])


def test_scaffold_s_clip_bounds_both_vectors_together():
    aggregator = GradientAggregator("scaffold", clip_norm=1.0)
    delta = aggregate(aggregator, [scaffold_worker("a", 3.0, -4.0)])
    total = 5 * float(delta["b"]) ** 2 + float(np.sum(aggregator.server_control**2))
    assert total == pytest.approx(1.0)
    assert delta["b"] / aggregator.server_control[0] == pytest.approx(-3 / 4)


def test_the_control_that_is_handed_out_is_a_copy():
    aggregator = GradientAggregator("scaffold")
    aggregate(aggregator, [scaffold_worker("a", 1.0, 4.0)])
    aggregator.server_control[:] = 9
    assert aggregator.server_control.tolist() == [4.0] * 5


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (worker("bad", 1.0, kind=UpdateKind.DELTA), ReportMismatch),
        (worker("bad", 1.0, kind=UpdateKind.DELTA, metadata={"control_delta": None}), ReportMismatch),
        (
            worker("bad", 1.0, kind=UpdateKind.DELTA, metadata={"control_delta": {"w": np.zeros((2, 2))}}),
            ShapeMismatch,
        ),
        (scaffold_worker("bad", 1.0, float("nan")), NonFiniteUpdate),
        (worker("bad", 1.0, metadata={"control_delta": worker("", 1.0).gradients}), ReportMismatch),
    ],
)
def test_a_scaffold_worker_without_a_sound_control_is_refused(bad: WorkerGradient, error: type[Exception]):
    aggregator = GradientAggregator("scaffold")
    assert aggregate(aggregator, [bad, scaffold_worker("a", 2.0, 4.0)])["b"] == 2.0
    assert [(r.worker_id, r.error) for r in aggregator.rejections] == [("bad", error)]
    assert aggregator.server_control.tolist() == [4.0] * 5


def nova_worker(name: str, delta: float, steps: float, weight: int = 1) -> WorkerGradient:
    return worker(name, delta, weight, kind=UpdateKind.DELTA, metadata={"local_steps": steps})


def test_fednova_averages_steps_and_gives_back_their_mean_number():
    workers = [nova_worker("a", 8.0, 2, 3), nova_worker("b", 5.0, 10, 1)]
    found = aggregate(GradientAggregator("fednova"), workers)
    assert found["b"] == pytest.approx((3 * 8 / 2 + 5 / 10) / 4 * (3 * 2 + 10) / 4)
    assert found.measurements["effective_progress"] == 4.0
    same = [nova_worker("a", 8.0, 5), nova_worker("b", 5.0, 5)]
    assert aggregate(GradientAggregator("fednova"), same)["b"] == aggregate(GradientAggregator(), same)["b"]


@pytest.mark.parametrize("steps", [None, 0, -1, float("nan"), float("inf"), "many", [3], 10_001])
def test_a_fednova_worker_with_an_impossible_number_of_steps_is_refused(steps):
    aggregator = GradientAggregator("fednova")
    aggregate(aggregator, [nova_worker("bad", 1.0, steps), nova_worker("a", 8.0, 2)])
    assert [(r.worker_id, r.error) for r in aggregator.rejections] == [("bad", ReportMismatch)]


def test_a_robust_fednova_counts_every_worker_alike():
    workers = [nova_worker(f"w{i}", 8.0, 2, 100 + i) for i in range(4)] + [nova_worker("x", 1000.0, 10, 10**6)]
    found = aggregate(ByzantineRobustAggregator("median", 1, aggregation_method="fednova"), workers)
    assert found["b"] == pytest.approx(4.0 * (4 * 2 + 10) / 5)


# --- robust rules ------------------------------------------------------------------------------------------


def test_who_was_left_out_is_named_by_position_also_after_refusals():
    bad = [worker("nan", float("nan")), worker("liar", 1e6)]
    aggregator = ByzantineRobustAggregator("multi-krum", 1)
    found = aggregate(aggregator, [*bad, *(worker(f"w{i}", 1 + i / 100) for i in range(6))])
    assert 1 in found.measurements["excluded"]
    assert 0 not in found.measurements["excluded"]
    assert 1.0 <= found["b"] <= 1.05
    assert [r.worker_id for r in aggregator.rejections] == ["nan"]


def test_sample_counts_buy_no_influence_with_a_rule():
    workers = [*(worker(f"w{i}", 1.0, 1) for i in range(4)), worker("liar", 1e6, 10**9)]
    assert aggregate(ByzantineRobustAggregator("trimmed-mean", 1), workers)["b"] == 1.0


def test_a_share_of_dishonest_workers_follows_the_size_of_the_round():
    aggregator = ByzantineRobustAggregator("median", byzantine_fraction=0.25)
    assert [aggregate(aggregator, crowd(n)).measurements["num_byzantine"] for n in (3, 4, 8, 11)] == [0, 1, 2, 2]


def test_too_few_workers_for_the_rule_are_an_error_by_name():
    with pytest.raises(TooManyByzantine, match=r"n >= 2f \+ 3"):
        aggregate(ByzantineRobustAggregator("krum", 2), crowd(6))


@pytest.mark.parametrize("options", [{"mixing": "bucketing"}, {"mode": "sampled", "peers": 4}])
def test_what_a_rule_draws_is_new_in_every_round_and_repeats_with_a_seed(options: dict):
    rows = np.random.default_rng(0).standard_normal((12, 30))
    workers = [WorkerGradient(f"w{i}", {"w": row}, 1, 0.0) for i, row in enumerate(rows)]

    def rounds(**seed) -> list[bytes]:
        aggregator = ByzantineRobustAggregator("krum", 1, rule_options=RuleOptions(**options, **seed))
        return [aggregate(aggregator, workers, {"w": rows[0]})["w"].tobytes() for _ in range(50)]

    assert rounds(seed=7) == rounds(seed=7)
    assert len(set(rounds(seed=7))) > 1
    assert rounds() != rounds()
