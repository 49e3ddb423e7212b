"""Accounts of privacy agree with independent ones, calibrated noise spends a budget, and no ledger overdraws."""

from __future__ import annotations

import math
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import integrate, stats

from client_sdk.protocol.accountant import (
    ORDERS,
    RdpAccount,
    distributed_rdp,
    excess_of_sum,
    gaussian_rdp,
    rdp_to_epsilon,
)
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation import (
    Adjacency,
    DistributedRelease,
    GaussianRelease,
    LedgerKeeper,
    NoiseSchedule,
    PrivacyBudget,
    PrivacyBudgetExhausted,
    PrivacyLedger,
    RenyiPrivacyAccountant,
    ScheduleShape,
    calibrate,
)
from server_ref.aggregation.calibration import (
    composed_multiplier,
    composed_rdp_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise_multiplier,
    sampled_epsilon,
)
from server_ref.aggregation.errors import AdjacencyMismatch, RoundAlreadyCharged, UnsupportedPrivacyEvent
from server_ref.aggregation.renyi import LARGEST_SAMPLED_ORDER, sampled_gaussian_rdp

DELTA = 1e-5
INTEGERS = [2, 3, 4, 8, 16, 31, 32, 63, 64, 128]
# The machine may be busy; no test here is about time.
relaxed = settings(deadline=None, max_examples=40)


# --- Renyi divergences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.001, 0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("z", [0.5, 1.0, 4.0, 50.0])
def test_at_integer_orders_the_accountant_is_dp_accounting_s(z, q):
    theirs = RdpAccountant(INTEGERS)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), 100)
    ours = RenyiPrivacyAccountant(INTEGERS)
    ours.accumulate(z, q, steps=100)
    assert ours.rdp == pytest.approx(theirs.rdp, rel=1e-6)
    assert ours.get_epsilon(DELTA) == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize(("z", "q"), [(0.7, 0.05), (1.0, 0.01), (4.0, 0.2), (30.0, 0.5)])
@pytest.mark.parametrize("order", [1.1, 1.7, 2.5, 6.3, 10.9])
def test_between_integers_it_is_the_integral(z, q, order):
    def integrand(x: float) -> float:
        return stats.norm.pdf(x, scale=z) * (1 - q + q * math.exp((2 * x - 1) / (2 * z * z))) ** order

    exact = integrate.quad(integrand, -12 * z, order + 12 * z, epsabs=0, epsrel=1e-12, limit=500)[0]
    found = float(sampled_gaussian_rdp(z, q, [order])[0]) * (order - 1)
    assert math.exp(found) - 1 == pytest.approx(exact - 1, rel=1e-5, abs=1e-9)


def test_the_benchmark_s_figure_is_the_peer_s():
    accountant = RenyiPrivacyAccountant()
    accountant.accumulate(noise_multiplier=1.0, sampling_rate=0.01, steps=1000)
    theirs = RdpAccountant()
    theirs.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0)), 1000)
    # At fractional orders theirs is a series that stops a little too high; the best order here is 7.8.
    assert 0 <= theirs.get_epsilon(DELTA) - accountant.get_epsilon(DELTA) < 5e-6


def test_the_specification_s_grid_and_conversion_would_ask_for_more():
    """Orders up to 10.9 and the old conversion: 2.10 is stated as 2.54, and small budgets are not found at all."""
    accountant = RenyiPrivacyAccountant([1 + x / 10 for x in range(10, 100)])
    accountant.accumulate(1.0, 0.01, 1000)
    old = min(r + math.log(1 / DELTA) / (a - 1) for a, r in zip(accountant.orders, accountant.rdp, strict=True))
    wide = RenyiPrivacyAccountant()
    wide.accumulate(1.0, 0.01, 1000)
    assert old > 1.15 * wide.get_epsilon(DELTA)
    accountant = RenyiPrivacyAccountant([1 + x / 10 for x in range(10, 100)])
    wide = RenyiPrivacyAccountant()
    for account in (accountant, wide):
        account.accumulate(calibrate(0.1, DELTA, participations=1), 1.0)
    assert accountant.get_epsilon(DELTA) > 5 * wide.get_epsilon(DELTA)


def test_no_sampling_is_the_client_s_account():
    assert sampled_gaussian_rdp(2.0, 1.0).tolist() == pytest.approx(gaussian_rdp(2.0))
    assert sampled_gaussian_rdp(2.0, 0.0).tolist() == [0.0] * len(ORDERS)
    server = RenyiPrivacyAccountant()
    server.accumulate(2.0, 1.0, steps=3)
    device = RdpAccount()
    for _ in range(3):
        device = device.plus(gaussian_rdp(2.0))
    assert device.epsilon(DELTA) == pytest.approx(server.get_epsilon(DELTA), rel=1e-12)


def test_large_orders_of_sampled_releases_are_left_out_not_guessed():
    found = sampled_gaussian_rdp(1.0, 0.5)
    assert all(math.isinf(r) == (order > LARGEST_SAMPLED_ORDER) for order, r in zip(ORDERS, found, strict=True))


@pytest.mark.parametrize(("z", "q", "orders"), [(0.0, 0.5, [2.0]), (math.nan, 0.5, [2.0]), (1, -0.1, [2]), (1, 1, [1])])
def test_divergences_of_nothing_sensible_are_refused(z, q, orders):
    with pytest.raises(ConfigurationError):
        sampled_gaussian_rdp(z, q, orders)


def test_the_accountant_takes_nothing_back_and_changes_nothing_when_it_refuses():
    accountant = RenyiPrivacyAccountant()
    accountant.accumulate(1.0, 0.1)
    before = accountant.rdp
    for bad in ((1.0, 0.1, -1), (0.0, 0.1, 1), (1.0, 1.5, 1)):
        with pytest.raises(ConfigurationError):
            accountant.accumulate(*bad)
    assert accountant.rdp == before
    with pytest.raises(ConfigurationError):
        RenyiPrivacyAccountant([1.0])
    with pytest.raises(ConfigurationError):
        RenyiPrivacyAccountant([])
    with pytest.raises(ConfigurationError):
        accountant.get_epsilon(0.0)


@relaxed
@given(st.floats(0.3, 100), st.floats(1e-9, 0.1))
def test_the_conversion_is_dp_accounting_s(z, delta):
    theirs = RdpAccountant(list(ORDERS))
    theirs.compose(dp_accounting.GaussianDpEvent(z))
    assert rdp_to_epsilon(gaussian_rdp(z), delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-9, abs=1e-12)


def test_an_account_of_nothing_costs_nothing_and_bad_entries_are_refused():
    assert RdpAccount().epsilon(DELTA) == 0
    for bad in ([0.0], [-1.0] * len(ORDERS), [math.nan] * len(ORDERS)):
        with pytest.raises(ConfigurationError):
            RdpAccount().plus(bad)
    with pytest.raises(ConfigurationError):
        rdp_to_epsilon([1.0], 0.5)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigurationError):
            RdpAccount().epsilon(delta)
    with pytest.raises(ConfigurationError):
        gaussian_rdp(0.0)


# --- sums of discrete Gaussians -----------------------------------------------------------------------------


def discrete(stddev: float, reach: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * stddev**2))
    return weights / weights.sum()


@pytest.mark.parametrize("contributors", [1, 2, 3, 5])
@pytest.mark.parametrize("shift", [1, 5])
def test_a_sum_of_discrete_gaussians_diverges_no_more_than_is_accounted(contributors, shift):
    stddev = 3.0
    one = discrete(stddev, 100)
    total = one
    for _ in range(contributors - 1):
        total = np.convolve(total, one)
    p, q = total[shift:], total[:-shift]
    likely = (p > 1e-250) & (q > 1e-250)
    orders = [1.5, 2.0, 4.0]
    bound = distributed_rdp(sensitivity=shift, stddev=stddev, contributors=contributors, size=1, orders=orders)
    for order, most in zip(orders, bound, strict=True):
        logs = order * np.log(p[likely]) + (1 - order) * np.log(q[likely])
        exact = math.log(float(np.exp(logs).sum())) / (order - 1)
        assert exact <= most * (1 + 1e-9)
        assert exact > 0.999 * most


def test_the_excess_is_the_source_s_sum_and_vanishes():
    assert excess_of_sum(5.0, 1) == 0
    expected = 10 * sum(math.exp(-2 * math.pi**2 * 9 * k / (k + 1)) for k in (1, 2, 3, 4))
    assert excess_of_sum(3.0, 5) == pytest.approx(expected)
    assert expected < 1e-36


def test_noise_too_small_for_integers_is_refused_and_says_what_to_change():
    with pytest.raises(ConfigurationError, match="fraction bits"):
        excess_of_sum(2.9, 3)
    with pytest.raises(ConfigurationError, match="fraction bits"):
        distributed_rdp(sensitivity=1, stddev=1.0, contributors=3, size=10)
    with pytest.raises(ConfigurationError):
        distributed_rdp(sensitivity=0, stddev=5.0, contributors=3, size=10)
    with pytest.raises(ConfigurationError):
        excess_of_sum(5.0, 0)
    with pytest.raises(ConfigurationError, match="fraction bits"):
        DistributedRelease(round_id=0, stddev=2.0, contributors=3, sensitivity=4, size=10, adjacency=Adjacency.ZERO_OUT)


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_a_discrete_gaussian_s_delta_is_the_continuous_one_s_but_for_the_stated_difference(shift, epsilon):
    for stddev in (4.0 * shift, 11.5 * shift):
        law = discrete(stddev, int(14 * stddev))
        exact = float(np.maximum(0, law[:-shift] - math.exp(epsilon) * law[shift:]).sum())
        z = stddev / shift
        density = stats.norm.pdf(epsilon * z + 1 / (2 * z))
        assert abs(exact - gaussian_delta(epsilon, z)) <= density / (8 * z * stddev**2)


# --- calibration --------------------------------------------------------------------------------------------


def test_one_participation_needs_the_known_multiplier():
    assert gaussian_noise_multiplier(1.0, DELTA) == pytest.approx(3.7306, abs=5e-5)
    assert calibrate(1.0, DELTA, participations=100) == pytest.approx(37.306, abs=5e-4)
    # What sqrt(2 ln(1.25 / delta)) / epsilon says is more than needed.
    assert math.sqrt(2 * math.log(1.25 / DELTA)) > 4.8


@relaxed
@given(st.floats(0.05, 20), st.floats(1e-10, 0.1))
def test_a_calibrated_multiplier_spends_its_budget_and_no_more(epsilon, delta):
    z = gaussian_noise_multiplier(epsilon, delta)
    assert gaussian_delta(epsilon, z) <= delta
    assert gaussian_delta(epsilon, z * 0.999) > delta
    assert gaussian_epsilon(delta, z) <= epsilon * (1 + 1e-12)
    mu = 1 / z
    oracle = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert gaussian_delta(epsilon, z) == pytest.approx(oracle, rel=1e-5, abs=1e-13)


def test_replacing_a_client_doubles_the_sensitivity():
    assert gaussian_epsilon(DELTA, 3.7306 / 2) == pytest.approx(2.15, abs=0.01)


def test_the_closed_form_is_dp_accounting_s_numeric_one():
    multipliers = [20.0, 30.0, 30.0, 45.0]
    theirs = PLDAccountant()
    for z in multipliers:
        theirs.compose(dp_accounting.GaussianDpEvent(z))
    ours = gaussian_epsilon(DELTA, composed_multiplier(multipliers))
    assert ours == pytest.approx(theirs.get_epsilon(DELTA), abs=2e-4)


def test_sampled_noise_is_calibrated_by_the_privacy_loss_distribution():
    z = calibrate(1.0, DELTA, rounds=60, sampling_probability=0.05)
    assert sampled_epsilon(((z, 60),), 0.05, DELTA) <= 1.0
    assert sampled_epsilon(((z * 0.99, 60),), 0.05, DELTA) > 1.0
    # Renyi divergences alone would ask for more noise; sampling at all saves most of it.
    assert composed_rdp_epsilon(((z, 60),), 0.05, DELTA) > 1.0
    assert z < 0.2 * calibrate(1.0, DELTA, participations=60)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"participations": 0},
        {"participations": 3, "rounds": 3},
        {"rounds": 3},
        {"rounds": 3, "sampling_probability": 0.0},
        {"rounds": 0, "sampling_probability": 0.5},
        {"participations": 3, "rounds": 3, "sampling_probability": 0.5},
        {"participations": 1, "epsilon": 0.0},
        {"participations": 1, "epsilon": math.inf},
        {"participations": 1, "delta": 0.0},
        {"participations": 1, "delta": 1.0},
        {"participations": 1, "epsilon": 1e-9, "delta": 1e-12},
    ],
)
def test_a_run_that_is_not_described_is_not_calibrated(wrong):
    with pytest.raises(ConfigurationError):
        calibrate(**{"epsilon": 1.0, "delta": DELTA, **wrong})


# --- schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", list(ScheduleShape))
@pytest.mark.parametrize("participations", [None, 7])
def test_a_schedule_spends_the_budget_in_the_worst_case(shape, participations):
    plan = NoiseSchedule.plan(1.0, DELTA, rounds=40, shape=shape, participations=participations)
    z = np.array(plan.noise_multipliers)
    worst = np.sort(z)[: participations or 40]
    assert gaussian_epsilon(DELTA, composed_multiplier(worst.tolist())) == pytest.approx(1.0, abs=1e-9)
    assert z[-1] / z[0] == pytest.approx(1.0 if shape is ScheduleShape.CONSTANT else 0.5)
    assert (np.diff(z) <= 1e-12).all()


def test_the_shapes_are_what_they_are_called():
    def relative(**options: object) -> np.ndarray:
        z = np.array(NoiseSchedule.plan(1.0, DELTA, rounds=12, final_ratio=0.25, **options).noise_multipliers)
        return z / z[0]

    linear, exponential, step = (relative(shape=shape) for shape in ("linear", "exponential", "step"))
    assert np.diff(linear) == pytest.approx(np.full(11, -0.75 / 11))
    assert exponential[1:] / exponential[:-1] == pytest.approx(np.full(11, 0.25 ** (1 / 11)))
    assert step == pytest.approx(np.repeat([1, 0.75, 0.5, 0.25], 3))
    assert relative(shape="step", steps=1) == pytest.approx(np.ones(12))
    # Noise may also grow.
    assert NoiseSchedule.plan(1.0, DELTA, rounds=3, shape="linear", final_ratio=2.0).at(2) > 4


def test_a_sampled_schedule_is_within_the_budget():
    plan = NoiseSchedule.plan(1.0, DELTA, rounds=40, shape="step", steps=2, sampling_probability=0.2)
    steps = tuple(sorted({z: plan.noise_multipliers.count(z) for z in plan.noise_multipliers}.items()))
    assert len(steps) == 2
    assert 0.99 < sampled_epsilon(steps, 0.2, DELTA) <= 1.0


def test_a_schedule_has_no_rounds_beyond_its_end():
    plan = NoiseSchedule.plan(1.0, DELTA, rounds=3)
    assert plan.at(2) == plan.at(0)
    for outside in (-1, 3):
        with pytest.raises(ConfigurationError, match="3 rounds"):
            plan.at(outside)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"shape": "loss-driven"},
        {"final_ratio": 0.0},
        {"steps": 0},
        {"participations": 0},
        {"participations": 2, "sampling_probability": 0.1},
    ],
)
def test_a_schedule_that_is_no_plan_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        NoiseSchedule.plan(1.0, DELTA, **{"rounds": 4, **wrong})
    with pytest.raises((ConfigurationError, ValidationError)):
        NoiseSchedule(noise_multipliers=(1.0, 0.0))


# --- the ledger ---------------------------------------------------------------------------------------------


def budget(**changed: object) -> PrivacyBudget:
    return PrivacyBudget(**{"epsilon": 1.0, "delta": DELTA, **changed})


def release(round_id: int, z: float = 4.0, **changed: object) -> GaussianRelease:
    return GaussianRelease(**{"adjacency": Adjacency.ZERO_OUT, "round_id": round_id, "noise_multiplier": z, **changed})


def test_a_ledger_stops_where_the_budget_ends_and_stays_as_it_was():
    ledger = PrivacyLedger(budget=budget())
    z = calibrate(1.0, DELTA, participations=20)
    for round_id in range(20):
        assert ledger.check(release(round_id, z)).releases == round_id + 1
        ledger = ledger.charge(release(round_id, z))
    assert 1 - 1e-9 < ledger.spent().epsilon <= 1
    before = ledger.to_json()
    with pytest.raises(PrivacyBudgetExhausted, match="after round 20"):
        ledger.charge(release(20, z))
    assert ledger.to_json() == before


@relaxed
@given(st.lists(st.floats(2, 200), min_size=1, max_size=12), st.integers(1, 12))
def test_a_client_is_accounted_for_in_the_rounds_with_the_least_noise(multipliers, most):
    events = [release(i, z) for i, z in enumerate(multipliers)]
    spent = PrivacyLedger.replay(budget(epsilon=100, participations=most), events).spent()
    worst = composed_multiplier(sorted(multipliers)[:most])
    assert spent.epsilon == pytest.approx(gaussian_epsilon(DELTA, worst), rel=1e-9)
    assert spent.epsilon_rdp >= spent.epsilon_pld == spent.epsilon
    theirs = RdpAccountant(list(ORDERS))
    for z in sorted(multipliers)[:most]:
        theirs.compose(dp_accounting.GaussianDpEvent(z))
    assert spent.epsilon_rdp == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-9, abs=1e-12)


def test_sampled_rounds_are_accounted_for_by_both_bounds():
    sampled = {"adjacency": Adjacency.ADD_REMOVE, "sampling_probability": 0.1}
    ledger = PrivacyLedger(budget=budget(epsilon=1.0, **sampled))
    for round_id in range(10):
        ledger = ledger.charge(release(round_id, 3.0, **sampled))
    spent = ledger.spent()
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(3.0))
    pld, rdp = PLDAccountant(), RdpAccountant()
    for theirs in (pld, rdp):
        theirs.compose(event, 10)
    assert spent.epsilon == spent.epsilon_pld == pytest.approx(pld.get_epsilon(DELTA), rel=1e-4)
    assert spent.epsilon_rdp == pytest.approx(rdp.get_epsilon(DELTA), rel=1e-2)
    with pytest.raises(PrivacyBudgetExhausted):
        ledger.check(release(10, 0.4, **sampled))


def test_the_quick_bound_never_lets_through_what_the_exact_one_refuses():
    sampled = {"adjacency": Adjacency.ADD_REMOVE, "sampling_probability": 0.05}
    ledger = PrivacyLedger(budget=budget(**sampled))
    z = calibrate(1.0, DELTA, rounds=30, sampling_probability=0.05)
    ledger = PrivacyLedger.replay(ledger.budget, [release(i, z, **sampled) for i in range(29)])
    ledger = ledger.charge(release(29, z, **sampled))
    with pytest.raises(PrivacyBudgetExhausted):
        ledger.charge(release(30, z, **sampled))
    assert ledger.spent().epsilon == pytest.approx(1.0, abs=2e-3)
    assert ledger.spent().epsilon_rdp > 1.0


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (release(1, adjacency=Adjacency.REPLACE_ONE), AdjacencyMismatch),
        (release(1, adjacency=Adjacency.ADD_REMOVE), AdjacencyMismatch),
        (release(1, sampling_probability=0.1), UnsupportedPrivacyEvent),
        (release(0), RoundAlreadyCharged),
    ],
)
def test_an_event_that_does_not_fit_is_refused_before_anything_changes(event, error):
    ledger = PrivacyLedger(budget=budget(epsilon=50)).charge(release(0))
    keeper = LedgerKeeper(ledger, persist=lambda _: pytest.fail("made durable"))
    with pytest.raises(error):
        keeper.charge(event)
    assert keeper.ledger == ledger
    with pytest.raises(error):
        PrivacyLedger.replay(ledger.budget, [*ledger.events, event])


def test_sampling_where_arrival_is_public_amplifies_nothing_and_is_refused():
    for adjacency in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE):
        with pytest.raises(ConfigurationError, match="who took part"):
            budget(adjacency=adjacency, sampling_probability=0.1)
    with pytest.raises(ConfigurationError, match="not both"):
        budget(adjacency=Adjacency.ADD_REMOVE, sampling_probability=0.1, participations=3)


def test_noise_of_several_contributors_is_accounted_for_as_the_sum_of_the_honest_ones():
    event = DistributedRelease(
        round_id=0, stddev=1000.0, contributors=4, sensitivity=500.0, size=10**6, adjacency=Adjacency.ZERO_OUT
    )
    assert event.effective_multiplier == pytest.approx(math.sqrt(4) * 1000 / 500)
    alone = PrivacyLedger(budget=budget(epsilon=9)).charge(release(0, event.effective_multiplier)).spent()
    assert PrivacyLedger(budget=budget(epsilon=9)).charge(event).spent() == alone
    by_protocol = rdp_to_epsilon(distributed_rdp(sensitivity=500.0, stddev=1000.0, contributors=4, size=10**6), DELTA)
    assert alone.epsilon_rdp == pytest.approx(by_protocol, rel=1e-12)


def test_a_ledger_survives_as_json():
    ledger = PrivacyLedger(budget=budget(epsilon=20, participations=5))
    ledger = ledger.charge(release(3, 7.5)).charge(
        DistributedRelease(
            round_id=4, stddev=10.5, contributors=3, sensitivity=4.25, size=9, adjacency=Adjacency.ZERO_OUT
        )
    )
    again = PrivacyLedger.from_json(ledger.to_json())
    assert again == ledger
    assert again.spent() == ledger.spent()
    assert PrivacyLedger.replay(ledger.budget, ledger.events) == ledger


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"budget": {"epsilon": -1, "delta": 1e-5}}',
        '{"budget": {"epsilon": 1, "delta": 1e-5}, "refund": 1}',
        '{"budget": {"epsilon": 1, "delta": 1e-5}, "events": [{"kind": "laplace", "round_id": 0}]}',
        '{"budget": {"epsilon": 1, "delta": 1e-5}, "events": [{"kind": "gaussian", "round_id": 0}]}',
    ],
)
def test_json_that_is_no_ledger_is_refused(text):
    with pytest.raises(ConfigurationError, match="not readable"):
        PrivacyLedger.from_json(text)


def test_a_ledger_that_was_overdrawn_elsewhere_says_so_and_releases_nothing_more():
    events = [release(i, 0.5) for i in range(3)]
    ledger = PrivacyLedger.replay(budget(), events)
    assert ledger.spent().epsilon > 10
    with pytest.raises(PrivacyBudgetExhausted):
        ledger.check(release(3, 1000.0))


def test_an_epsilon_is_printed_with_what_it_means():
    spent = PrivacyLedger(budget=budget(epsilon=2)).charge(release(0, 4.0)).spent()
    assert str(spent) == "epsilon 0.9263 at delta 1e-05 (zero-out adjacency, client level, 1 releases)"
    assert PrivacyLedger(budget=budget()).spent().epsilon == 0


# --- the keeper ---------------------------------------------------------------------------------------------


def test_an_event_is_durable_before_the_ledger_counts_it():
    seen: list[tuple[GaussianRelease | DistributedRelease, int]] = []
    keeper = LedgerKeeper(
        PrivacyLedger(budget=budget(epsilon=9)), persist=lambda e: seen.append((e, len(keeper.ledger.events)))
    )
    keeper.open_round(0)
    assert keeper.charge(release(0)).releases == 1
    assert seen == [(release(0), 0)]


def test_what_cannot_be_made_durable_is_not_released():
    def full_disk(_: object) -> None:
        raise OSError(28, "no space left")

    keeper = LedgerKeeper(PrivacyLedger(budget=budget(epsilon=9)), persist=full_disk)
    with pytest.raises(OSError, match="no space"):
        keeper.charge(release(0))
    assert keeper.ledger.events == ()


def test_a_round_is_opened_for_each_release_and_never_twice():
    keeper = LedgerKeeper(PrivacyLedger(budget=budget(epsilon=9)))
    with pytest.raises(UnsupportedPrivacyEvent, match="open_round"):
        _ = keeper.round_id
    keeper.open_round(5)
    assert keeper.round_id == 5
    keeper.charge(release(5))
    with pytest.raises(UnsupportedPrivacyEvent):
        _ = keeper.round_id
    with pytest.raises(RoundAlreadyCharged):
        keeper.open_round(5)


def test_a_fraction_of_the_noise_is_a_fraction_of_the_multiplier():
    """Variances are exact where multipliers become noise; here only ratios count."""
    assert float(Fraction(3, 4) ** 2) == (3 / 4) ** 2
    assert composed_multiplier([2.0] * 4) == pytest.approx(1.0)
    assert composed_multiplier([]) == math.inf
