"""An adaptive plan: what of it a device really trains, and what it can claim about that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.training import TrainingPlan, adapted, normaliser, tier_epochs

PLAN = TrainingPlan(local_epochs=5, batch_size=64, learning_rate=0.05, adaptive=True)


def test_five_epochs_are_five_three_or_one():
    epochs = {tier: tier_epochs(PLAN, tier) for tier in DeviceTier}
    assert epochs == {DeviceTier.HIGH_END: 5, DeviceTier.MID_RANGE: 3, DeviceTier.LOW_END: 1}


@given(st.integers(1, 1000))
def test_a_weaker_device_never_trains_longer_and_always_trains(epochs: int):
    plan = PLAN.model_copy(update={"local_epochs": epochs})
    high, mid, low = (tier_epochs(plan, DeviceTier(t)) for t in ("high_end", "mid_range", "low_end"))
    assert 1 <= low <= mid <= high == epochs


def test_only_batch_and_epochs_are_adapted():
    plan = PLAN.model_copy(update={"prox_mu": 0.25, "max_steps": 9, "shuffle": False})
    assert adapted(plan, DeviceTier.LOW_END, 8) == plan.model_copy(
        update={"batch_size": 8, "local_epochs": 1, "adaptive": False}
    )


def test_a_plan_that_is_not_adaptive_is_trained_as_it_stands():
    with pytest.raises(ConfigurationError, match="exactly what it says"):
        adapted(PLAN.model_copy(update={"adaptive": False}), DeviceTier.HIGH_END, 64)


@pytest.mark.parametrize("batch_size", [0, 65])
def test_an_adapted_batch_is_at_most_the_planned_one(batch_size: int):
    with pytest.raises(ConfigurationError, match="1 to 64"):
        adapted(PLAN, DeviceTier.HIGH_END, batch_size)


@given(
    tier=st.sampled_from(DeviceTier),
    batch_size=st.integers(1, 64),
    samples=st.integers(1, 10_000),
    pull=st.sampled_from([0.0, 0.5]),
)
def test_however_a_device_adapts_its_normaliser_stays_within_the_bound_that_the_server_holds(
    tier: DeviceTier, batch_size: int, samples: int, pull: float
):
    """Smaller batches are more steps; ``max_steps`` bounds them, and with them what FedNova multiplies by."""
    plan = PLAN.model_copy(update={"algorithm": "fednova", "max_steps": 50, "prox_mu": pull})
    mine = adapted(plan, tier, batch_size)
    assert mine.max_steps is not None
    steps = min(mine.local_epochs * math.ceil(samples / batch_size), mine.max_steps)
    # The server computes the normaliser from its own plan, the device from the adapted one: they must be the same.
    assert normaliser(mine, steps) == normaliser(plan, steps) <= normaliser(plan, 50)
