"""A run's devices adapted and judged: all figures are what each device alone would find, judged as modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import ParameterSpec
from mobile_export.models import build_model
from simulator import PersonalizationEvaluator
from simulator.adversaries import AttackPlan
from simulator.cohort.adaptation import adapt_devices
from simulator.cohort.model import BatchedModel
from simulator.config import SimulationConfig
from simulator.errors import NothingToJudge
from simulator.personalization.held_out import check_tests, device_tests, judged_devices
from simulator.personalization.models import ModelKeeper, Models, rounds_to_keep, rounds_to_look_at
from simulator.personalization.settings import Adaptation
from simulator.personalization.study import PersonalizationStudy
from simulator.prepare import Fleet

CONFIG = SimulationConfig(devices=12, cohort=4, partition="shards:2", skew="rotation:45", seed=5)
ADAPTATION = Adaptation(steps=3, learning_rate=0.3, batch_size=8)


def module() -> nn.Module:
    return build_model("mlp", (1, 8, 8), 10, 0, hidden=(6,))


def table(model: nn.Module) -> tuple[ParameterSpec, ...]:
    found, offset = [], 0
    for name, p in model.named_parameters():
        found.append(ParameterSpec(name=name, shape=tuple(p.shape), offset=offset))
        offset += p.numel()
    return tuple(found)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet.of(CONFIG)


@pytest.fixture(scope="module")
def batched() -> BatchedModel:
    torch.set_num_threads(1)
    return BatchedModel(module(), table(module()))


@pytest.fixture(scope="module")
def models(fleet: Fleet, batched: BatchedModel) -> dict[int, np.ndarray]:
    """Each round's model is a device's of the one before: they get better, and all differ."""
    weights = np.concatenate([p.detach().numpy().ravel() for p in module().parameters()])
    found = {0: weights}
    everything = [np.arange(len(fleet.honest_data))]
    for _, step, adapted in adapt_devices(
        batched, fleet.honest_data, everything, weights, steps=40, learning_rate=0.3, batch_size=32, seed=1
    ):
        found[step] = adapted[0]
    return {number: found[10 * number] for number in range(5)}


def adapted(batched: BatchedModel, fleet: Fleet, device: int, start: np.ndarray, steps: int) -> np.ndarray:
    """What a device makes of a model, by itself."""
    stages = adapt_devices(
        batched, fleet.honest_data, [fleet.parts[device]], start, steps=steps, learning_rate=0.3, batch_size=8,
        seed=CONFIG.seed,
    )  # fmt: skip
    return [weights[0] for _, _, weights in stages][-1]


def judged(fleet: Fleet, split: str, of_all: np.ndarray, own: dict[int, np.ndarray]) -> dict:
    tests = device_tests(fleet, range(CONFIG.devices), split=split)
    examples = {
        str(d): (tests.data.x[rows], tests.data.y[rows]) for d, rows in zip(tests.devices, tests.rows, strict=True)
    }
    return PersonalizationEvaluator(module()).evaluate_personalization_gain(
        of_all, {str(d): weights for d, weights in own.items()}, examples
    )


def test_the_last_model_is_judged_on_the_test_split_and_the_way_there_on_the_validation_split(fleet, batched, models):
    result = PersonalizationStudy(batched, fleet, ADAPTATION).result(Models(models), of_rounds=4)
    own = {d: adapted(batched, fleet, d, models[4], 3) for d in range(CONFIG.devices)}
    expected = judged(fleet, "test", models[4], own)
    assert result.per_device_accuracies == expected["per_device_accuracies"]
    assert result.global_accuracy == pytest.approx(expected["global_accuracy"])
    assert result.personalization_gain == pytest.approx(expected["personalization_gain"])
    assert result.personalization_gain > 0.03
    assert (result.devices, result.examples, result.steps) == (12, 50, 3)
    assert [curve.round for curve in result.curves] == [0, 1, 2, 4]
    for curve in result.curves:
        for step, accuracy in enumerate(curve.accuracy):
            stages = {d: adapted(batched, fleet, d, models[curve.round], step) for d in range(CONFIG.devices)}
            at_step = judged(fleet, "validation", models[curve.round], stages)
            assert accuracy == pytest.approx(at_step["personalized_accuracy"])


def test_forgetting_lays_what_was_learned_from_the_last_model_but_one_over_the_last_one(fleet, batched, models):
    result = PersonalizationStudy(batched, fleet, ADAPTATION).result(Models(models), of_rounds=4)
    own = {d: adapted(batched, fleet, d, models[3], 3) for d in range(CONFIG.devices)}
    before = judged(fleet, "validation", models[3], own)["personalization_gain"]
    for row, share in zip(result.forgetting, (0.5, 1.0), strict=True):
        laid = {d: models[4] + np.float32(share) * (weights - models[3]) for d, weights in own.items()}
        after = judged(fleet, "validation", models[4], laid)["personalization_gain"]
        assert row.personal_share == share
        assert (row.gain_before, row.gain_after) == pytest.approx((before, after))
        assert row.kept == pytest.approx(after / before)
    # The first model that was trained takes the place of one that nobody had adapted.
    first = Models({number: models[number] for number in (0, 1)})
    assert PersonalizationStudy(batched, fleet, ADAPTATION).result(first, of_rounds=4).forgetting == ()


def test_devices_with_layers_of_their_own_start_from_these(fleet, batched, models):
    layers = SharedLayers.of(table(module()), ["output"])
    rng = np.random.default_rng(0)
    own = {d: rng.normal(0, 0.3, layers.num_parameters - layers.size).astype(np.float32) for d in (2, 7)}
    adaptation = Adaptation(steps=3, learning_rate=0.3, batch_size=8, personal_layers=("output",))
    result = PersonalizationStudy(batched, fleet, adaptation).result(Models(models, own), of_rounds=4)
    starts = {d: layers.with_personal(models[4], own[d]) if d in own else models[4] for d in range(CONFIG.devices)}
    theirs = {d: adapted(batched, fleet, d, start, 3) for d, start in starts.items()}
    assert result.per_device_accuracies == judged(fleet, "test", models[4], theirs)["per_device_accuracies"]
    assert result.personal_layers == ("output",)
    # What they had in these layers in earlier rounds is gone.
    assert [curve.round for curve in result.curves] == [4]
    before = judged(fleet, "validation", models[4], starts)["personalized_accuracy"]
    assert result.curves[0].accuracy[0] == pytest.approx(before)
    assert result.forgetting == ()


def test_the_number_of_threads_changes_no_figure(fleet, batched, models):
    one, three = (
        PersonalizationStudy(batched, fleet, ADAPTATION, threads=n).result(Models(models), of_rounds=4) for n in (1, 3)
    )
    assert one == three


def test_attackers_are_not_judged_and_of_a_large_fleet_some_are_evenly_picked():
    config = SimulationConfig(devices=450, cohort=10, attack="sign-flip", byzantine=0.2)
    fleet = Fleet.of(config)
    picked = judged_devices(fleet)
    assert len(picked) == 200
    assert sorted(set(picked)) == picked
    assert isinstance(fleet.attack, AttackPlan)
    assert not any(fleet.attack.attacks(d) for d in picked)
    assert picked[-1] > 440


def test_a_fleet_that_cannot_be_judged_is_told_before_it_trains():
    fleet = Fleet.of(CONFIG)
    check_tests(fleet)
    fleet.parts[3] = np.flatnonzero(fleet.dataset.train.y == 9)[:4]
    held_out = fleet.dataset.test
    keep = np.flatnonzero(held_out.y != 9)
    object.__setattr__(fleet.dataset, "test", type(held_out)(held_out.x[keep], held_out.y[keep]))
    with pytest.raises(NothingToJudge, match="device 3"):
        check_tests(fleet)


# --- which models are kept -----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_the_keeper_ends_with_the_models_that_will_be_looked_at_wherever_the_run_ends(of_rounds, data):
    last = data.draw(st.integers(0, of_rounds))
    keeper, buffer = ModelKeeper(of_rounds), np.zeros(1, np.float32)
    for number in range(last + 1):
        buffer[0] = number  # the caller's own, which it uses again
        keeper.keep(number, buffer)
    assert {*keeper.by_round} == rounds_to_keep(of_rounds, last) >= {*rounds_to_look_at(of_rounds, last)}
    assert {*rounds_to_look_at(of_rounds, last)} >= {0, last}
    assert len(rounds_to_look_at(of_rounds, last)) <= 6
    assert all(weights[0] == number for number, weights in keeper.by_round.items())
