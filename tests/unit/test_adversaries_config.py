"""Attacks in a simulation's configuration: what is refused before anything runs."""

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError
from simulator.config import SimulationConfig
from simulator.errors import AttackError
from simulator.prepare import Fleet
from simulator.report import command_of


def test_an_attack_is_kept_in_its_canonical_form():
    config = SimulationConfig.parse({"attack": "foe:10", "byzantine": 0.2})
    assert config.attack == "ipm:10"
    assert "--attack ipm:10 --byzantine 0.2" in command_of(config)


def test_nobody_attacks_unless_told():
    config = SimulationConfig.parse({})
    assert (config.attack, config.byzantine) == (None, 0)
    # What a robust rule reckons with, without anybody who attacks.
    assert SimulationConfig.parse({"byzantine": 0.2}).attack is None


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"attack": "alie"}, ConfigurationError, "needs attackers.*--byzantine"),
        ({"attack": "alei", "byzantine": 0.2}, AttackError, "choose one of"),
        ({"attack": "alie", "byzantine": 1.0}, ConfigurationError, "--byzantine"),
        ({"attack": "alie", "byzantine": -0.1}, ConfigurationError, "--byzantine"),
        ({"attack": "alie", "byzantine": 0.2, "server": "http://127.0.0.1:1"}, ConfigurationError, "own server"),
    ],
)
def test_what_cannot_work_is_refused(values, error, says):
    with pytest.raises(error, match=says):
        SimulationConfig.parse(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"attack": "alie", "byzantine": 0.01, "devices": 20}, "no attacker; take 0.05 or more"),
        ({"attack": "backdoor:target=10", "byzantine": 0.2}, "no class 10"),
    ],
)
def test_an_attack_that_does_not_fit_the_fleet_is_refused(values, says):
    with pytest.raises(AttackError, match=says):
        Fleet.of(SimulationConfig.parse(values))


def test_a_fleet_learns_from_what_its_attackers_made_of_the_data():
    fleet = Fleet.of(SimulationConfig.parse({"attack": "label-flip", "byzantine": 0.2, "devices": 20}))
    learnt, honest = fleet.training_data, fleet.dataset.train
    for device, rows in enumerate(fleet.parts):
        assert np.array_equal(learnt.y[rows], 9 - honest.y[rows] if fleet.attack.attacks(device) else honest.y[rows])
    assert sum(fleet.attack.attacks(d) for d in range(20)) == 4
