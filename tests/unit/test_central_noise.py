"""Noise on the aggregate: of the right size, on integers, paid for first, and nothing of single updates beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client_sdk.protocol.clipping import integer_norm_squared
from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, EmptyAggregate, ShapeMismatch
from client_sdk.protocol.privacy import EncodedBounds, choose_private_grid, encode_clipped
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    Aggregate,
    BufferedSchedule,
    CentralNoise,
    ClipGlobal,
    EncodedUpdate,
    ExactMean,
    ExternalNoise,
    Facts,
    IntegerSum,
    LedgerKeeper,
    NoiseSchedule,
    Pipeline,
    PrivacyBudget,
    PrivacyBudgetExhausted,
    PrivacyLedger,
    PrivateAggregate,
    RobustRule,
    Sgd,
    SharedSum,
    StalenessPolicy,
    Visibility,
)
from server_ref.aggregation.errors import (
    IndividualUpdatesNeeded,
    NoiseUnexpected,
    PipelineError,
    RoundAlreadyCharged,
    UnboundedRange,
    UnboundedWeight,
    UnknownSensitivity,
    UnsupportedPrivacyEvent,
)

SIZE = 400
FACTS = Facts(size=SIZE, kind=UpdateKind.DELTA, capacity=50)
HIDDEN = replace(FACTS, arrival_public=False, constant_denominator=20)
FIXED = ExactMean("fixed")
ADJACENCIES = [Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE]
# The machine may be busy; no test here is about time.
relaxed = settings(deadline=None, max_examples=40)


def keeper(adjacency: Adjacency = Adjacency.ZERO_OUT, epsilon: float = 1e6) -> LedgerKeeper:
    return LedgerKeeper(PrivacyLedger(budget=PrivacyBudget(epsilon=epsilon, delta=1e-5, adjacency=adjacency)))


def noise(z: float = 2.0, adjacency: Adjacency = Adjacency.ZERO_OUT, **changed: object) -> CentralNoise:
    stage = CentralNoise(z, keeper(adjacency), adjacency, **changed)
    stage.keeper.open_round(0)
    return stage


def updates(n: int = 20, size: int = SIZE, seed: int = 0, scale: float = 1.0) -> list[EncodedUpdate]:
    rng = np.random.default_rng(seed)
    return [EncodedUpdate(i, (scale * rng.standard_normal(size)).astype(np.float32)) for i in range(n)]


def finish(stages: list, chosen: list[EncodedUpdate], facts: Facts = FACTS) -> Aggregate:
    pipeline = Pipeline.build(*stages, Sgd(), facts=facts, private=any(isinstance(s, CentralNoise) for s in stages))
    fold = pipeline.start()
    fold.add([pipeline.age(pipeline.open(u), u.staleness, 0) for u in chosen])
    return pipeline.finish(fold)


def as_normal(samples: np.ndarray, stddev: float) -> bool:
    """Whether the samples are those of a normal distribution with this standard deviation (at level 1e-6)."""
    return bool(stats.kstest(samples / stddev, "norm", method="asymp").pvalue > 1e-6)


# --- how much noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("mean", [FIXED, ExactMean()])
@pytest.mark.parametrize("n", [3, 20])
def test_noise_is_the_multiplier_times_the_sensitivity_of_this_buffer(adjacency, mean, n):
    """Not of the configured capacity: a smaller buffer has a larger sensitivity."""
    facts, clip = replace(FACTS, size=20_000), ClipGlobal(1.5)
    chosen = updates(n, 20_000)
    found = finish([mean, clip, noise(2.0, adjacency)], chosen, facts)
    clean = finish([mean, clip], chosen, facts)
    assert isinstance(found, PrivateAggregate)
    expected = 2.0 * (2 if adjacency is Adjacency.REPLACE_ONE else 1) * 1.5 / n
    assert found.noise_stddev == pytest.approx(expected, rel=1e-4)
    assert as_normal(found.values - clean.values, expected)
    assert not as_normal(found.values - clean.values, expected / 1.1)


def test_noise_on_the_mean_instead_of_the_sum_would_be_noticed():
    facts, clip, chosen = replace(FACTS, size=20_000), ClipGlobal(1.0), updates(10, 20_000)
    clean = finish([FIXED, clip], chosen, facts)
    right = finish([FIXED, clip, noise(2.0)], chosen, facts).values - clean.values
    assert as_normal(right, 2.0 / 10)
    assert not as_normal(right, 2.0)


def test_the_variance_on_the_integers_is_exact():
    stage = noise(1.25)
    found = finish([FIXED, ClipGlobal(1.0), stage], updates(), FACTS)
    reach = math.floor(2**found.integers.fraction_bits)
    assert found.noise_stddev == 1.25 * reach / 2**found.integers.fraction_bits / 20


def test_declared_weights_and_staleness_scales_are_part_of_the_sensitivity():
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=3), 10)
    facts = replace(FACTS, max_weight=7)
    chosen = [replace(u, weight=1 + i % 7, staleness=i % 3) for i, u in enumerate(updates())]
    found = finish([FIXED, ClipGlobal(1.0), schedule, noise(3.0)], chosen, facts)
    denominator = 256 * sum(u.weight for u in chosen)
    assert found.noise_stddev == pytest.approx(3.0 * 7 * 256 / denominator, rel=1e-6)


def test_noise_is_another_every_time():
    chosen = updates()
    first, second = (finish([FIXED, ClipGlobal(1.0), noise()], chosen).values for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_schedule_gives_each_round_its_own_multiplier():
    plan = NoiseSchedule(noise_multipliers=(8.0, 2.0))
    stage = CentralNoise(plan, keeper())
    for round_id, z in enumerate((8.0, 2.0)):
        stage.keeper.open_round(round_id)
        found = finish([FIXED, ClipGlobal(1.0), stage], updates())
        assert found.noise_stddev == pytest.approx(z / 20, rel=1e-9)
        assert found.measurements["noise_multiplier"] == z
    assert [e.noise_multiplier for e in stage.keeper.ledger.events] == [8.0, 2.0]
    assert stage.title == "discrete Gaussian, noise multipliers from 8 to 2 (zero-out adjacency)"


# --- what the sensitivity claims ----------------------------------------------------------------------------


@relaxed
@given(
    st.integers(1, 12),
    st.integers(1, 200),
    st.sampled_from([1e-3, 1.0, 1e6]),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
)
def test_one_client_moves_the_integer_sum_by_no_more_than_is_claimed(n, size, scale, clip_norm, seed):
    facts = replace(FACTS, size=size, constant_denominator=n)
    chosen = updates(n + 1, size, seed, scale)
    stages = [FIXED, ClipGlobal(clip_norm)]
    zero = replace(chosen[0], payload=np.zeros(size, np.float32))
    sums = [finish(stages, [first, *chosen[2:]], facts).integers for first in (chosen[0], zero, chosen[1])]
    reach = sums[0].reach
    assert integer_norm_squared(sums[0].codes - sums[1].codes) <= reach**2
    assert integer_norm_squared(sums[0].codes - sums[2].codes) <= (2 * reach) ** 2


@pytest.mark.parametrize("rule", ["mean", "trimmed-mean", "multi-krum"])
def test_rounding_to_a_grid_is_part_of_what_is_claimed(rule):
    stage = noise(1.0, Adjacency.REPLACE_ONE)
    reduce = ExactMean() if rule == "mean" else RobustRule(rule, 2)
    found = finish([reduce, ClipGlobal(1.0), stage], updates())
    clean = finish([reduce, ClipGlobal(1.0)], updates())
    step = math.ldexp(1.0, -found.integers.fraction_bits)
    claimed = clean.sensitivity[Adjacency.REPLACE_ONE]
    assert claimed + 2 * math.sqrt(SIZE) * step <= found.noise_stddev <= claimed * (1 + 1e-5)


@relaxed
@given(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_devices_that_share_and_a_server_that_sees_make_the_same_integers(size, weights, seed):
    facts = replace(FACTS, size=size, max_weight=9)
    chosen = [replace(u, weight=w) for u, w in zip(updates(len(weights), size, seed), weights, strict=True)]
    bounds = choose_private_grid(clip_norm=0.7, max_count=50, max_weight=9, noise_multiplier=5.0, threshold=3)
    clear = finish([ExactMean("fixed", bounds=bounds), ClipGlobal(0.7)], chosen, facts)
    shared = sum(u.weight * encode_clipped(u.payload, bounds) for u in chosen)
    assert np.array_equal(clear.integers.codes, shared)
    stage = SharedSum(bounds)
    of_sums = replace(facts, visibility=Visibility.SUM, norm_bound=0.7)
    opened = stage.aggregate(shared, of_sums, count=len(chosen), total_weight=sum(weights))
    assert np.array_equal(opened.values, clear.values)
    assert opened.sensitivity == clear.sensitivity


# --- the ledger comes first ---------------------------------------------------------------------------------


def test_nothing_is_released_beyond_the_budget_and_no_noise_is_drawn_for_it():
    drawn = []

    def random(n: int) -> bytes:
        drawn.append(n)
        return bytes(n)

    stage = CentralNoise(4.0, keeper(epsilon=1.0), random=random)
    stage.keeper.open_round(0)
    finish([FIXED, ClipGlobal(1.0), stage], updates())
    before, spent = len(drawn), stage.keeper.ledger
    stage.keeper.open_round(1)
    with pytest.raises(PrivacyBudgetExhausted):
        finish([FIXED, ClipGlobal(1.0), stage], updates())
    assert (len(drawn), stage.keeper.ledger) == (before, spent)


def test_the_payment_is_made_before_the_noise_is_drawn():
    order = []
    ledger = PrivacyLedger(budget=PrivacyBudget(epsilon=9, delta=1e-5))
    paying = LedgerKeeper(ledger, persist=lambda _: order.append("paid"))
    stage = CentralNoise(4.0, paying, random=lambda n: order.append("drawn") or bytes(n))
    paying.open_round(0)
    finish([FIXED, ClipGlobal(1.0), stage], updates())
    assert order == ["paid", "drawn"]


def test_one_round_is_released_once_whatever_happens_to_its_release():
    """A sum that was noised twice gives the average of two noises away."""
    stage = noise()
    finish([FIXED, ClipGlobal(1.0), stage], updates())
    with pytest.raises(UnsupportedPrivacyEvent, match="open_round"):
        finish([FIXED, ClipGlobal(1.0), stage], updates())
    with pytest.raises(RoundAlreadyCharged):
        stage.keeper.open_round(0)


def test_what_was_paid_for_and_then_failed_is_not_paid_back():
    def broken(_: int) -> bytes:
        raise OSError("no entropy")

    stage = CentralNoise(4.0, keeper(), random=broken)
    stage.keeper.open_round(0)
    with pytest.raises(OSError, match="entropy"):
        finish([FIXED, ClipGlobal(1.0), stage], updates())
    assert len(stage.keeper.ledger.events) == 1


# --- what is not said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [FIXED, ExactMean(), RobustRule("multi-krum", 3)])
def test_measurements_of_single_updates_do_not_survive(reduce):
    clear = finish([reduce, ClipGlobal(1.0)], updates()).measurements
    assert clear.keys() >= {"norm_max", "norm_median", "clipped"}
    found = finish([reduce, ClipGlobal(1.0), noise(2.0, Adjacency.REPLACE_ONE)], updates())
    price = {"epsilon", "epsilon_rdp", "delta", "adjacency", "noise_multiplier"}
    assert set(found.measurements) - price <= {"staleness", "rule", "num_byzantine"}
    assert found.measurements["adjacency"] == "replace-one"
    assert found.indicator is None


def test_an_unknown_measurement_is_not_let_through():
    bare = finish([FIXED, ClipGlobal(1.0)], updates())
    found = noise().release(replace(bare, measurements={"largest_layer": 3, "staleness": {"0": 20}}))
    assert "largest_layer" not in found.measurements
    assert found.measurements["staleness"] == {"0": 20}


def test_under_add_remove_nothing_says_how_many_took_part():
    stage = noise(2.0, Adjacency.ADD_REMOVE, nominal_count=20)
    found = [finish([FIXED, ClipGlobal(1.0), stage], updates(17), HIDDEN)]
    stage.keeper.open_round(1)
    found.append(finish([FIXED, ClipGlobal(1.0), stage], updates(18), HIDDEN))
    assert [(a.count, a.total_weight, a.noise_stddev) for a in found] == [(20, 20, pytest.approx(2.0 / 20))] * 2
    assert all("staleness" not in a.measurements for a in found)


# --- indicators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_the_indicators_are_noised_out_of_the_same_multiplier(adjacency):
    facts = replace(FACTS, size=20, capacity=400)
    chosen = updates(400, 20, scale=0.2)
    clip = ClipGlobal(0.9)
    clear = finish([FIXED, clip], chosen, facts)
    assert clear.indicator == 400 - 2 * clear.measurements["clipped"]
    stage = noise(4.0, adjacency, indicators=True)
    errors = []
    for round_id in range(300):
        stage.keeper.open_round(round_id)
        found = stage.release(clear)
        errors.append(found.indicator - clear.indicator)
    twice = 2 if adjacency is Adjacency.REPLACE_ONE else 1
    # sigma_b = 400 / 20 on bits of +-1/2, so twice that on halves; eight standard errors around it.
    assert np.std(errors) == pytest.approx(2 * 20 * twice, rel=0.33)
    z_update = (4.0**-2 - 40.0**-2) ** -0.5
    assert found.noise_stddev == pytest.approx(z_update * 0.9 * twice / 400, rel=1e-6)
    assert {e.noise_multiplier for e in stage.keeper.ledger.events} == {4.0}


def test_with_too_few_updates_for_an_indicator_the_update_gets_all_of_the_noise():
    found = finish([FIXED, ClipGlobal(1.0), noise(50.0, indicators=True)], updates())
    assert found.indicator is None
    assert found.noise_stddev == pytest.approx(50.0 / 20)


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "facts", "error", "advice"),
    [
        ([FIXED, ClipGlobal(1.0), CentralNoise(1.0, keeper(Adjacency.REPLACE_ONE))], FACTS, NoiseUnexpected, "agree"),
        ([FIXED, CentralNoise(1.0, keeper())], replace(FACTS, max_abs=1.0), UnknownSensitivity, "clip"),
        ([FIXED, ClipGlobal(1.0), noise(1.0, Adjacency.ADD_REMOVE)], HIDDEN, NoiseUnexpected, "nominal_count"),
        (
            [FIXED, ClipGlobal(1.0), noise(1.0, Adjacency.ADD_REMOVE, nominal_count=20)],
            replace(FACTS, constant_denominator=20),
            UnknownSensitivity,
            "another adjacency",
        ),
        (
            [FIXED, ClipGlobal(1.0), noise(1.0, Adjacency.ADD_REMOVE, nominal_count=20)],
            replace(FACTS, arrival_public=False),
            UnknownSensitivity,
            "another adjacency",
        ),
        ([RobustRule("multi-krum", 3), ClipGlobal(1.0), noise()], FACTS, UnknownSensitivity, "another adjacency"),
    ],
)
def test_noise_that_would_prove_nothing_is_refused_when_the_pipeline_is_built(stages, facts, error, advice):
    with pytest.raises(error, match=advice):
        Pipeline.build(*stages, Sgd(), facts=facts, private=True)


@pytest.mark.parametrize("z", [0.0, -1.0, math.nan, math.inf])
def test_a_multiplier_is_positive(z):
    with pytest.raises(NoiseUnexpected, match="positive"):
        CentralNoise(z, keeper())


def test_an_aggregate_without_a_sensitivity_is_not_released():
    stage = noise()
    bare = replace(finish([FIXED, ClipGlobal(1.0)], updates()), sensitivity={})
    with pytest.raises(UnknownSensitivity):
        stage.release(bare)
    assert stage.keeper.ledger.events == ()


def test_a_task_s_grid_belongs_to_its_clip_norm():
    bounds = EncodedBounds(clip_norm=2.0, fraction_bits=20)
    with pytest.raises(ConfigurationError, match="one clip norm"):
        Pipeline.build(ExactMean("fixed", bounds=bounds), ClipGlobal(1.0), Sgd(), facts=FACTS)


def test_a_grid_leaves_room_for_the_noise_that_it_is_told_of():
    facts = replace(FACTS, capacity=2**20, max_weight=2**10)
    tight = finish([FIXED, ClipGlobal(1.0)], updates(), facts).integers.fraction_bits
    roomy = finish([ExactMean("fixed", noise_multiplier=1e7), ClipGlobal(1.0)], updates(), facts).integers.fraction_bits
    assert roomy < tight


def test_noise_beyond_the_integers_is_refused_before_it_is_paid_for():
    facts = replace(FACTS, capacity=2**10, max_weight=2**10)
    stage = CentralNoise(1e7, keeper())
    stage.keeper.open_round(0)
    with pytest.raises(BudgetExceeded, match="fewer fraction bits"):
        finish([FIXED, ClipGlobal(1.0), stage], updates(), facts)
    assert stage.keeper.ledger.events == ()


def test_an_aggregate_far_larger_than_its_sensitivity_needs_the_integer_grid():
    bare = Aggregate(np.full(3, 1e9), UpdateKind.DELTA, 3, 3, sensitivity={Adjacency.ZERO_OUT: 1e-3})
    stage = noise()
    with pytest.raises(BudgetExceeded, match="int64 grid"):
        stage.release(bare)
    assert stage.keeper.ledger.events == ()


# --- sums from elsewhere ------------------------------------------------------------------------------------

BOUNDS = EncodedBounds(clip_norm=1.0, fraction_bits=24)
OF_SUMS = replace(FACTS, visibility=Visibility.SUM, norm_bound=1.0, max_weight=3, size=5)


def of_sums(noise_multiplier: float | None = 4.0, **changed: object) -> Pipeline:
    stages = SharedSum(BOUNDS), ExternalNoise(noise_multiplier=noise_multiplier), Sgd()
    return Pipeline.build(*stages, facts=replace(OF_SUMS, **changed), private=True)


def opened(pipeline: Pipeline, stddev: float, **changed: object) -> Aggregate:
    given = {"count": 10, "total_weight": 25, "noise": (stddev, Adjacency.ZERO_OUT), **changed}
    return pipeline.reduce.aggregate(np.arange(5) << 24, pipeline.admitted, **given)


def test_a_shared_sum_is_decoded_and_divided_once():
    pipeline = of_sums()
    found = pipeline.release(opened(pipeline, 4.0 * 3 * 2**24))
    assert isinstance(found, PrivateAggregate)
    assert found.values.tolist() == (np.arange(5) / 25).tolist()
    assert found.noise_stddev == pytest.approx(4.0 * 3 / 25)
    assert found.sensitivity[Adjacency.ZERO_OUT] == pytest.approx(3 / 25)
    constant = of_sums(constant_denominator=50)
    assert constant.release(opened(constant, 1e12)).values.tolist() == (np.arange(5) / 50).tolist()
    state = pipeline.apply(pipeline.optimizer.initial(np.zeros(5, np.float32)), found)
    assert state.weights.tolist() == found.values.astype(np.float32).tolist()


def test_a_sum_with_less_noise_than_declared_is_not_released():
    pipeline = of_sums()
    for wrong in (
        opened(pipeline, 3.9 * 3 * 2**24),
        opened(pipeline, math.nan),
        opened(pipeline, 1e12, noise=None),
        opened(pipeline, 1e12, noise=(1e12, Adjacency.REPLACE_ONE)),
    ):
        with pytest.raises(NoiseUnexpected, match="nothing is released"):
            pipeline.release(wrong)
    undeclared = of_sums(None)
    assert undeclared.release(opened(undeclared, 1.0)).noise_stddev > 0


def test_a_shared_sum_has_nothing_to_fold_and_takes_no_other_shape():
    pipeline = of_sums()
    with pytest.raises(IndividualUpdatesNeeded):
        pipeline.start()
    for bad in (np.zeros(4, np.int64), np.zeros(5)):
        with pytest.raises(ShapeMismatch):
            pipeline.reduce.aggregate(bad, pipeline.admitted, count=1, total_weight=1)
    with pytest.raises(EmptyAggregate):
        opened(pipeline, 1.0, count=0, total_weight=0)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"visibility": Visibility.INDIVIDUAL, "norm_bound": None}, NoiseUnexpected),
        ({"norm_bound": None}, UnboundedRange),
        ({"norm_bound": 2.0}, ConfigurationError),
        ({"max_weight": None}, UnboundedWeight),
    ],
)
def test_a_shared_sum_needs_what_it_cannot_see_to_be_declared(changed, error):
    with pytest.raises(error):
        Pipeline.build(SharedSum(BOUNDS), Sgd(), facts=replace(OF_SUMS, **changed))


def test_refusals_of_pipelines_are_pipeline_errors():
    assert issubclass(NoiseUnexpected, PipelineError)
    assert IntegerSum(np.array([3]), 1, 2).decoded().tolist() == [0.75]
