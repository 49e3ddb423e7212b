"""What happens to updates in a pipeline: admission, folds, release, the step of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmptyAggregate,
    InvalidUpdate,
    NonFiniteUpdate,
    ReportMismatch,
    ShapeMismatch,
    StaleReport,
    TooManyByzantine,
    TruncatedEncoding,
    UpdateOutOfRange,
)
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    Aggregate,
    BaselineMean,
    BufferedSchedule,
    ClipGlobal,
    ClipLayers,
    DecodeCompressed,
    EncodedUpdate,
    ExactMean,
    ExternalNoise,
    Facts,
    NoNoise,
    Pipeline,
    PrivateAggregate,
    RobustRule,
    RuleOptions,
    Sgd,
    StalenessPolicy,
    Summation,
    SynchronousSchedule,
    ValidateFacts,
    Visibility,
)
from server_ref.aggregation.errors import IndividualUpdatesNeeded, NoiseMissing, NoiseUnexpected, UnboundedWeight
from tests.noise import CalibratedNoise

FACTS = Facts(size=3, kind=UpdateKind.DELTA, capacity=50, max_weight=10, max_abs=100.0)
ASYNC = BufferedSchedule(StalenessPolicy(max_staleness=3, exponent=1.0), 4)
REDUCES = [
    ExactMean(),
    ExactMean("fixed"),
    *(BaselineMean(summation) for summation in Summation),
    RobustRule("median", 1),
    RobustRule("multi-krum", 1, options=RuleOptions(m=3)),
]
reduces = pytest.mark.parametrize("reduce", REDUCES, ids=lambda stage: stage.title)


def pipeline(*stages, facts: Facts = FACTS, private: bool = False) -> Pipeline:
    filled = {stage.slot for stage in stages}
    missing = [stage for stage in (ExactMean(), Sgd()) if stage.slot not in filled]
    return Pipeline.build(*stages, *missing, facts=facts, private=private)


def update(number: int, *values: float, **rest) -> EncodedUpdate:
    return EncodedUpdate(number, np.array(values, np.float32), **rest)


FIVE = [
    update(i, *values) for i, values in enumerate([(1, 2, 3), (1.5, 2, 3), (1, 2.5, 3), (1, 2, 3.5), (-90, -90, -90)])
]


def folded(built: Pipeline, updates):
    fold = built.start()
    fold.add([built.admit(u) for u in updates])
    return fold


# --- admission ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NotToBeRead:
    """A payload that tells whether anybody looked."""

    def __getattr__(self, name: str):
        raise AssertionError(f"somebody asked the payload for {name}")


@pytest.mark.parametrize(("schedule", "staleness"), [(SynchronousSchedule(), 1), (ASYNC, 4), (ASYNC, -1)])
def test_an_update_that_is_too_old_is_refused_before_anything_looks_at_it(schedule, staleness: int):
    with pytest.raises(StaleReport, match="update 7"):
        pipeline(schedule).admit(EncodedUpdate(7, NotToBeRead(), weight=10**9, staleness=staleness))


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_out_of_its_bounds_is_refused_before_the_payload_is_read(weight: int):
    with pytest.raises(ReportMismatch, match="weights from 1 to 10"):
        pipeline().admit(EncodedUpdate(7, NotToBeRead(), weight=weight))


@pytest.mark.parametrize("normaliser", [0.0, -1.0, 5.1, float("nan"), float("inf")])
def test_local_progress_beyond_the_plan_is_refused_before_the_payload_is_read(normaliser: float):
    built = pipeline(ValidateFacts(max_normaliser=5.0), ExactMean(renormalise=True))
    with pytest.raises(ReportMismatch, match="the plan allows up to 5"):
        built.admit(EncodedUpdate(7, NotToBeRead(), normaliser=normaliser))


BAD = {
    "another length": (np.zeros(4, np.float32), ShapeMismatch),
    "another shape": (np.zeros((3, 1), np.float32), ShapeMismatch),
    "another dtype": (np.zeros(3), ShapeMismatch),
    "bytes": (b"\0" * 12, ShapeMismatch),
    "nan": (np.array([1, np.nan, 2], np.float32), NonFiniteUpdate),
    "infinite": (np.array([1, -np.inf, 2], np.float32), NonFiniteUpdate),
    "nan beside infinite": (np.array([np.inf, np.nan, -np.inf], np.float32), NonFiniteUpdate),
    "too large": (np.array([1, 2, 123.456], np.float32), UpdateOutOfRange),
    "too small": (np.array([1, 2, -123.456], np.float32), UpdateOutOfRange),
    "the next float32": (np.nextafter(np.full(3, 100, np.float32), np.float32(200)), UpdateOutOfRange),
}


@pytest.mark.parametrize(("payload", "error"), BAD.values(), ids=BAD)
def test_a_payload_that_is_none_is_refused_by_name_and_without_its_values(payload, error: type[Exception]):
    with pytest.raises(error) as caught:
        pipeline().admit(EncodedUpdate(7, payload))
    assert type(caught.value) is error
    assert "123" not in str(caught.value)


def test_the_bounds_themselves_pass():
    built = pipeline(ValidateFacts(max_normaliser=5.0))
    admitted = built.admit(update(3, 100, -100, 0, weight=10, normaliser=5.0))
    assert (admitted.number, admitted.weight, admitted.normaliser, admitted.scale) == (3, 10, 5.0, 1)
    assert (admitted.norm, admitted.clipped) == (None, False)


def test_clipping_comes_after_the_range_check_and_says_what_it_did():
    built = pipeline(ClipGlobal(5.0))
    small, large = built.admit(update(0, 0, 3, 4)), built.admit(update(1, 0, 30, 40))
    assert (small.clipped, small.norm) == (False, pytest.approx(5))
    assert (large.clipped, large.norm) == (True, pytest.approx(50))
    assert np.linalg.norm(large.vector.astype(np.float64)) <= 5
    np.testing.assert_allclose(large.vector, [0, 3, 4], rtol=1e-6)
    with pytest.raises(UpdateOutOfRange):
        built.admit(update(2, 0, 0, 101))


def test_layers_are_clipped_to_their_share_of_the_norm():
    built = pipeline(ClipLayers(3.0, ((0, 1), (1, 3))))
    admitted = built.admit(update(0, 50, 0, 1))
    np.testing.assert_allclose(admitted.vector, [np.sqrt(3.0), 0, 1], rtol=1e-6)
    assert admitted.clipped
    assert admitted.norm == pytest.approx(np.sqrt(2501))


def test_compressed_payloads_are_decoded_with_the_assignment_s_seed_and_checked_like_dense_ones():
    spec = CompressionSpec.parse("randomk:0.5")
    facts = replace(FACTS, size=40)
    built = pipeline(DecodeCompressed(spec), facts=facts)
    vector = np.arange(40, dtype=np.float32)
    payload = Codec(spec, 40).encode(vector, 9)
    found = built.admit(EncodedUpdate(0, payload, seed=9)).vector
    np.testing.assert_array_equal(found[found != 0], vector[found != 0])
    assert np.count_nonzero(found) in {19, 20}
    with pytest.raises(TruncatedEncoding):
        built.admit(EncodedUpdate(1, payload[:-1], seed=9))
    with pytest.raises(ShapeMismatch):
        built.admit(EncodedUpdate(1, vector))
    with pytest.raises(UpdateOutOfRange):
        built.admit(EncodedUpdate(1, Codec(spec, 40).encode(vector * 10, 9), seed=9))


def test_age_is_added_apart_so_that_an_opened_update_can_be_counted_in_a_later_round():
    built = pipeline(ASYNC)
    opened = built.open(update(0, 1, 2, 3))
    for staleness, scale in ((0, 256), (1, 128), (3, 64)):
        aged = built.age(opened, staleness, round_id=5)
        assert (aged.staleness, aged.scale) == (staleness, scale)
        assert built.admit(replace(update(0, 1, 2, 3), staleness=staleness), 5).scale == scale


@dataclass(frozen=True)
class SaysOneThingDoesAnother(SynchronousSchedule):
    """Declares that it does not scale, and scales."""

    factor: int = 2

    def scale(self, staleness: int, round_id: int) -> int:  # noqa: ARG002 - the slot's signature
        return self.factor


@pytest.mark.parametrize("factor", [2, 0, -1])
def test_a_schedule_that_scales_beyond_what_it_declared_is_refused(factor: int):
    with pytest.raises(UnboundedWeight, match="declared 1 to 1"):
        pipeline(SaysOneThingDoesAnother(factor)).admit(update(0, 1, 2, 3))


def test_a_pipeline_of_sums_admits_and_folds_nothing():
    facts = replace(FACTS, visibility=Visibility.SUM, norm_bound=1.0)
    built = pipeline(ExternalNoise(), facts=facts, private=True)
    with pytest.raises(IndividualUpdatesNeeded):
        built.admit(update(0, 1, 2, 3))
    with pytest.raises(IndividualUpdatesNeeded):
        built.start()


# --- folds -------------------------------------------------------------------------------------------------


@reduces
def test_an_empty_fold_has_no_aggregate(reduce):
    fold = pipeline(reduce).start()
    assert fold.count == 0
    with pytest.raises(EmptyAggregate):
        fold.finish()


@reduces
def test_what_is_discarded_leaves_no_trace(reduce):
    built = pipeline(reduce)
    fold = folded(built, FIVE)
    without = fold.finish()
    more = [built.admit(update(10 + i, 7.7, -1e-3 * i, 99.0, weight=1 + i)) for i in range(3)]
    fold.add(more)
    assert fold.count == 8
    fold.discard(more[::-1])
    assert fold.count == 5
    again = fold.finish()
    assert again.values.tobytes() == without.values.tobytes()
    assert (again.count, again.total_weight, again.measurements) == (5, without.total_weight, without.measurements)
    fold.discard([built.admit(u) for u in FIVE])
    with pytest.raises(EmptyAggregate):
        fold.finish()


@reduces
def test_a_number_counts_once_and_a_refused_batch_changes_nothing(reduce):
    built = pipeline(reduce)
    fold = folded(built, FIVE)
    before = fold.finish().values.tobytes()
    new, old = built.admit(update(10, 50, 50, 50)), built.admit(FIVE[0])
    for batch in ([new, old], [new, new]):
        with pytest.raises(ConfigurationError):
            fold.add(batch)
        with pytest.raises(ConfigurationError):
            fold.discard(batch)
    with pytest.raises(ConfigurationError):
        fold.discard([old, old])
    assert fold.count == 5
    assert fold.finish().values.tobytes() == before


@pytest.mark.parametrize("arithmetic", ["float", "fixed"])
def test_a_fold_beyond_its_capacity_is_refused_and_stays_as_it_was(arithmetic):
    built = pipeline(ExactMean(arithmetic), facts=replace(FACTS, capacity=5))
    fold = folded(built, FIVE)
    before = fold.finish().values.tobytes()
    with pytest.raises(BudgetExceeded):
        fold.add([built.admit(update(10, 1, 1, 1))])
    assert fold.count == 5
    assert fold.finish().values.tobytes() == before


@pytest.mark.parametrize("arithmetic", ["float", "fixed"])
def test_a_batch_with_one_bad_update_is_refused_whole(arithmetic):
    """``admit`` lets no such update through; a fold that somebody feeds otherwise must hold all the same."""
    built = pipeline(ExactMean(arithmetic))
    fold = folded(built, FIVE)
    before = fold.finish().values.tobytes()
    good = built.admit(update(10, 1, 1, 1))
    bad = replace(good, number=11, vector=np.array([1, np.nan, 1], np.float32))
    with pytest.raises(NonFiniteUpdate):
        fold.add([good, bad])
    with pytest.raises(NonFiniteUpdate):
        fold.discard([built.admit(FIVE[0]), bad])
    assert fold.count == 5
    assert fold.finish().values.tobytes() == before


def test_a_sum_does_not_hold_on_to_its_updates():
    built = pipeline()
    fold = folded(built, FIVE)
    assert all(member.vector.size == 0 for member in fold._members.ordered())


@reduces
def test_the_record_of_a_buffer_holds_ages_and_norms(reduce):
    built = pipeline(ClipGlobal(4.0), reduce, ASYNC)
    fold = built.start()
    fold.add([built.age(built.open(u), age, 0) for u, age in zip(FIVE, (0, 2, 0, 1, 0), strict=True)])
    found = fold.finish().measurements
    assert found["staleness"] == {"0": 3, "1": 1, "2": 1}
    assert found["clipped"] == 3
    assert found["norm_max"] == pytest.approx(90 * np.sqrt(3))
    assert 3.5 < found["norm_median"] < 4.2


def test_weights_and_staleness_scale_the_sum_over_a_constant_denominator():
    built = pipeline(ASYNC, facts=replace(FACTS, max_weight=1))
    fold = built.start()
    fold.add([built.age(built.open(u), age, 0) for u, age in zip(FIVE[:4], (0, 1, 1, 3), strict=True)])
    found = fold.finish()
    expected = sum(u.payload.astype(np.float64) * s for u, s in zip(FIVE, (256, 128, 128, 64), strict=False))
    np.testing.assert_array_equal(found.values, expected / (256 * 4))
    assert (found.count, found.total_weight) == (4, 4)


def test_updates_that_are_all_equally_stale_still_lose_influence():
    built = pipeline(ASYNC, facts=replace(FACTS, max_weight=1))
    fold = built.start()
    fold.add([built.age(built.open(u), 1, 0) for u in FIVE[:4]])
    fresh = folded(built, FIVE[:4])
    np.testing.assert_array_equal(fold.finish().values, fresh.finish().values / 2)


def test_fednova_multiplies_the_mean_by_the_weighted_local_progress():
    built = pipeline(ExactMean(renormalise=True), ValidateFacts(max_normaliser=100.0))
    updates = [update(0, 1, 2, 3, weight=3, normaliser=2.0), update(1, 5, 6, 7, weight=1, normaliser=10.0)]
    found = built.finish(folded(built, updates))
    np.testing.assert_array_equal(found.values, np.array([2, 3, 4.0]) * 4.0)
    assert found.measurements["effective_progress"] == 4.0
    assert not found.sensitivity


def test_an_exact_mean_equals_the_fixed_point_one_where_the_grid_holds_the_values():
    exact, fixed = (folded(pipeline(ExactMean(kind)), FIVE).finish().values for kind in ("float", "fixed"))
    assert exact.tobytes() == fixed.tobytes()


# --- robust rules ------------------------------------------------------------------------------------------


def test_a_rule_s_outcome_names_who_was_left_out_by_number():
    built = pipeline(RobustRule("multi-krum", 1, options=RuleOptions(m=4)))
    found = built.finish(folded(built, [replace(u, number=10 + u.number, weight=1 + u.number) for u in FIVE]))
    np.testing.assert_allclose(found.values, [1.125, 2.125, 3.125])
    assert found.measurements["excluded"] == [14]
    assert (found.measurements["rule"], found.measurements["num_byzantine"]) == ("multi-krum", 1)
    assert (found.count, found.total_weight) == (5, 5)


def test_a_fraction_counts_from_the_updates_that_are_there():
    rule = RobustRule("median", byzantine_fraction=0.3)
    assert [rule.assumed(n) for n in (1, 3, 4, 9, 10, 100)] == [0, 0, 1, 2, 3, 30]


def test_none_estimates_and_zero_assumes_nobody():
    many = [update(i, 1 + i / 100, 2, 3 - i / 50) for i in range(9)] + [update(9, 90, -90, 90)]
    estimated = pipeline(RobustRule("multi-krum"))
    nobody = pipeline(RobustRule("multi-krum", 0))
    found, naive = (built.finish(folded(built, many)) for built in (estimated, nobody))
    assert found.measurements["estimated_byzantine"] == found.measurements["num_byzantine"] == 1
    assert 9 in found.measurements["excluded"]
    assert naive.measurements["num_byzantine"] == 0
    assert "estimated_byzantine" not in naive.measurements


def test_an_estimate_never_exceeds_what_the_rule_stands():
    """Bulyan needs n >= 4f + 3: of 9 it stands one, and a second outlier must not make it refuse the buffer."""
    many = [update(i, 1 + i / 100, 2, 3 - i / 50) for i in range(7)] + [update(7, 90, 0, 0), update(8, 0, 90, 0)]
    found = pipeline(RobustRule("bulyan")).finish(folded(pipeline(RobustRule("bulyan")), many))
    assert found.measurements["estimated_byzantine"] == 1


def test_an_estimated_number_proves_no_sensitivity_for_the_aggregate_either():
    """The noise stage reads it off the aggregate, so leaving it out at construction would not be enough."""
    clip = ClipGlobal(1.0)
    known, estimated = (pipeline(RobustRule("median", f), clip) for f in (1, None))
    assert known.finish(folded(known, FIVE)).sensitivity
    assert not estimated.finish(folded(estimated, FIVE)).sensitivity


def test_too_few_updates_are_an_error_by_name_and_degraded_mode_says_what_it_assumed():
    strict = pipeline(RobustRule("krum", 2))
    with pytest.raises(TooManyByzantine) as caught:
        strict.finish(folded(strict, FIVE))
    assert (caught.value.num_rows, caught.value.num_byzantine, caught.value.limit) == (5, 2, 1)
    degraded = pipeline(RobustRule("krum", 2, options=RuleOptions(degraded=True)))
    found = degraded.finish(folded(degraded, FIVE))
    assert (found.measurements["degraded"], found.measurements["num_byzantine"]) == (True, 1)
    assert found.values.tolist() != [-90, -90, -90]


def test_staleness_shrinks_an_update_before_a_rule_sees_it():
    built = pipeline(RobustRule("median", 1), ASYNC)
    fold = built.start()
    fold.add([built.age(built.open(update(i, 8, 8, 8)), 1, 0) for i in range(3)])
    assert fold.finish().values.tolist() == [4, 4, 4]


# --- release and application -------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", [Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE])
@pytest.mark.parametrize("num_updates", [2, 5])
def test_noise_is_calibrated_to_the_sensitivity_that_the_aggregate_carries(adjacency, num_updates: int):
    """Fewer updates than the capacity have a larger one: a configured count would under-protect them."""
    clip, noise = ClipGlobal(1.5), CalibratedNoise(2.0, adjacency)
    built = pipeline(clip, noise, private=True)
    chosen = [replace(u, weight=3) for u in FIVE[:num_updates]]
    found = built.finish(folded(built, chosen))
    assert isinstance(found, PrivateAggregate)
    reach = 1.5 * 10 / (3 * num_updates)
    expected = reach if adjacency is Adjacency.ZERO_OUT else 2 * reach
    assert found.noise_stddev == pytest.approx(2.0 * expected)
    assert found.noise_stddev > 2.0 * built.released.sensitivity[adjacency]
    clean = pipeline(clip).finish(folded(pipeline(clip), chosen))
    assert not np.array_equal(found.values, clean.values)


@dataclass(frozen=True)
class Forgets(CalibratedNoise):
    """Says that it adds noise, and does not."""

    def release(self, aggregate: Aggregate) -> Aggregate:
        return aggregate


def test_a_private_pipeline_releases_nothing_that_carries_no_noise():
    built = pipeline(ClipGlobal(1.0), Forgets(1.0), private=True)
    with pytest.raises(NoiseMissing, match="nothing is released"):
        built.finish(folded(built, FIVE))


def aggregate(**changed) -> Aggregate:
    return Aggregate(values=np.zeros(3), kind=UpdateKind.DELTA, count=4, total_weight=4, **changed)


def test_external_noise_lets_only_the_aggregators_noise_of_the_declared_kind_through():
    facts = replace(FACTS, visibility=Visibility.SUM, norm_bound=1.0)
    built = pipeline(ExternalNoise(Adjacency.ZERO_OUT), facts=facts, private=True)
    private = PrivateAggregate(np.zeros(3), UpdateKind.DELTA, 4, 4, noise_stddev=1.0, adjacency=Adjacency.ZERO_OUT)
    assert built.release(private) is private
    for other in (aggregate(), replace(private, adjacency=Adjacency.REPLACE_ONE)):
        with pytest.raises(NoiseUnexpected, match="nothing is released"):
            built.release(other)


def test_no_noise_hands_the_aggregate_on():
    found = aggregate()
    assert NoNoise().release(found) is found


@pytest.mark.parametrize(("kind", "expected"), [(UpdateKind.DELTA, 3.0), (UpdateKind.GRADIENT, -1.0)])
def test_deltas_are_added_and_gradients_subtracted(kind: UpdateKind, expected: float):
    built = pipeline(Sgd(learning_rate=0.5), facts=replace(FACTS, kind=kind))
    state = built.optimizer.initial(np.ones(3, np.float32))
    after, found = built.run(state, [update(0, 4, 4, 4), update(1, 4, 4, 4)])
    assert found.kind is kind
    assert after.weights.tolist() == [expected] * 3
    assert state.weights.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("line", "factor"), [("randomk:0.25", 4.0), ("randomk:0.25,feedback=on", 1.0), ("topk:0.25", 1.0)]
)
def test_what_random_sparsification_left_out_is_made_up_for_after_release(line: str, factor: float):
    """On the aggregate, and not on single updates: their clipped norms are what noise was calibrated to."""
    spec = CompressionSpec.parse(line)
    built = pipeline(DecodeCompressed(spec), ClipGlobal(1.0), facts=replace(FACTS, size=40))
    payload = Codec(spec, 40).encode(np.linspace(1, 2, 40, dtype=np.float32), 3)
    state = built.optimizer.initial(np.zeros(40, np.float32))
    after, found = built.run(state, [EncodedUpdate(0, payload, seed=3)])
    assert np.linalg.norm(found.values) <= 1.0
    np.testing.assert_array_equal(after.master, factor * found.values)


def test_run_is_its_steps_and_reads_its_updates_once():
    built = pipeline(ASYNC, facts=replace(FACTS, max_weight=1))
    state = built.optimizer.initial(np.ones(3, np.float32))
    ages = (0, 1, 1, 3)
    aged = [replace(u, staleness=age) for u, age in zip(FIVE, ages, strict=False)]
    after, found = built.run(state, iter(aged), round_id=7)
    fold = built.start()
    for one in aged:
        fold.add([built.admit(one, 7)])
    by_hand = built.finish(fold)
    assert found.values.tobytes() == by_hand.values.tobytes()
    assert after.to_bytes() == built.apply(state, by_hand, staleness=ages, round_id=7).to_bytes()


def test_a_learning_rate_that_falls_with_staleness_is_the_schedule_s_business():
    policy = StalenessPolicy(max_staleness=3, weighting="constant", scale_learning_rate=True)
    built = pipeline(BufferedSchedule(policy, 2), Sgd(), facts=replace(FACTS, max_weight=1))
    state = built.optimizer.initial(np.zeros(3, np.float32))
    after, _ = built.run(state, [replace(update(i, 8, 8, 8), staleness=3) for i in range(2)])
    assert after.weights.tolist() == [2.0] * 3


def test_a_refused_update_stops_a_run_and_the_state_is_as_it_was():
    built = pipeline()
    state = built.optimizer.initial(np.ones(3, np.float32))
    before = state.to_bytes()
    with pytest.raises(NonFiniteUpdate):
        built.run(state, [FIVE[0], update(9, 1, np.nan, 1)])
    with pytest.raises(EmptyAggregate):
        built.run(state, [])
    assert state.to_bytes() == before


def test_a_model_that_would_leave_the_finite_numbers_stays_as_it_was():
    built = pipeline(Sgd(learning_rate=1e38))
    state = built.optimizer.initial(np.ones(3, np.float32))
    with pytest.raises(InvalidUpdate):
        built.run(state, [update(0, 100, 0, 0)])
    assert state.weights.tolist() == [1.0] * 3
