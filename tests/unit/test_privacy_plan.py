"""What a task's privacy settings come to: noise that spends the budget and no more, whoever adds it."""

import pytest

from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation.accounting import GaussianRelease, PrivacyLedger
from server_ref.aggregation.errors import PrivacyBudgetExhausted
from server_ref.config import TaskConfig
from server_ref.privacy_plan import PrivacyPlan
from server_ref.secure_plan import SharingPlan


def config(*, secure=None, rounds=10, buffer_size=10, **privacy):
    settings = {"noise": "server", "epsilon": 1.0, **privacy}
    return TaskConfig(
        bundle="b",
        rounds=rounds,
        buffer_size=buffer_size,
        aggregation={"clip_norm": 1.0},
        privacy=settings,
        secure=secure,
    )


def spend(plan, rounds):
    ledger = PrivacyLedger(budget=plan.budget)
    for round_id in range(rounds):
        event = GaussianRelease(
            round_id=round_id, noise_multiplier=plan.multiplier_at(round_id), adjacency=plan.budget.adjacency
        )
        ledger = ledger.charge(event)
    return ledger


@pytest.mark.parametrize("shape", ["constant", "linear", "exponential", "step"])
@pytest.mark.parametrize("limit", [None, 3])
def test_the_last_round_spends_the_budget_and_no_round_more_is_allowed(shape, limit):
    plan = PrivacyPlan.of(config(noise_schedule=shape, max_participations=limit))
    ledger = spend(plan, 10)
    assert ledger.spent().epsilon == pytest.approx(1.0, rel=1e-6)
    assert ledger.spent().epsilon <= 1.0


def test_a_task_that_was_given_more_rounds_than_its_noise_was_meant_for_ends_with_its_budget():
    short, longer = (PrivacyPlan.of(config(rounds=rounds)) for rounds in (10, 20))
    ledger = PrivacyLedger.replay(longer.budget, spend(short, 10).events)
    with pytest.raises(PrivacyBudgetExhausted):
        ledger.check(
            GaussianRelease(round_id=10, noise_multiplier=short.noise_multiplier, adjacency=longer.budget.adjacency)
        )


def test_a_device_that_counts_less_often_needs_less_noise():
    once, always = (PrivacyPlan.of(config(max_participations=k)).noise_multiplier for k in (1, None))
    assert once == pytest.approx(3.7306, abs=1e-3)
    assert always == pytest.approx(once * 10**0.5, rel=1e-6)


def test_replacing_a_device_takes_twice_the_noise():
    plans = [PrivacyPlan.of(config(adjacency=a)) for a in ("zero-out", "replace-one")]
    assert plans[0].noise_multiplier == plans[1].noise_multiplier
    assert plans[1].noise_per_clip_norm == 2 * plans[0].noise_per_clip_norm


def test_noise_that_is_given_says_what_it_costs():
    plan = PrivacyPlan.of(config(epsilon=None, noise_multiplier=3.7306 * 10**0.5))
    assert plan.budget.epsilon == pytest.approx(1.0, abs=1e-3)
    assert spend(plan, 10).spent().epsilon <= plan.budget.epsilon


@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
@pytest.mark.parametrize("noise", [{"noise": "aggregators"}, {"noise": "devices", "honest_devices": 4}])
def test_aggregators_pin_the_least_noise_that_the_plan_has(noise, adjacency):
    task = config(secure={}, adjacency=adjacency, **noise)
    plan = PrivacyPlan.of(task)
    pinned = SharingPlan.of(task, 100, 1, plan).pinned.privacy
    assert pinned.noise_multiplier == plan.noise_per_clip_norm
    assert (pinned.epsilon, pinned.max_participations) == (plan.budget.epsilon, 10)
    assert (pinned.honest_devices is not None) == (noise["noise"] == "devices")


def test_the_grid_leaves_room_for_the_loudest_round_of_a_schedule():
    task = config(secure={}, noise="aggregators", noise_schedule="linear", final_noise=1e-3, epsilon=0.01)
    plan = PrivacyPlan.of(task)
    sharing = SharingPlan.of(task, 100, 1, plan)
    loudest = plan.moved * max(plan.schedule.noise_multipliers)
    stated = sharing.pinned.round_parameters().model_copy(update={"noise_multiplier": loudest})
    stated.require_range(10, 3)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epsilon": None}, "either epsilon"),
        ({"noise_multiplier": 1.0}, "not both"),
        ({"noise": "none"}, "nobody adds noise"),
        ({"noise": "devices"}, "honest_devices"),
        ({"honest_devices": 3}, "honest_devices"),
        ({"noise_schedule": "linear", "epsilon": None, "noise_multiplier": 1.0}, "budget"),
        ({"noise": "aggregators"}, "task.secure"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        config(**wrong)


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ConfigurationError):
        PrivacyPlan.of(config(epsilon=1e-9, delta=1e-300, rounds=10**6))
