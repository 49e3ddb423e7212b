"""Attacks through the whole stack: real devices, real server; repeatable, and felt."""

from dataclasses import replace

from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.prepare import Fleet
from simulator.run import RunOptions, run_simulation


def attacked(attack):
    return SimulationConfig.parse(
        {"devices": 10, "rounds": 3, "model": "softmax", "cohort": 5, "seed": 3, "attack": attack, "byzantine": 0.4}
    )


def simulate(config, out, fleet=None, **options):
    with RunFolder.begin(out, config) as folder:
        return run_simulation(folder, RunOptions(**options), fleet)


def test_the_same_seed_gives_the_same_poisoned_model_whatever_the_workers(tmp_path):
    one, three = (simulate(attacked("min-max"), tmp_path / str(n), workers=n) for n in (1, 3))
    assert one.model_sha256 == three.model_sha256
    assert all(r.reports == 5 for r in one.rounds), "poisoned reports are accepted like any others"


def test_a_fleet_that_the_caller_brings_is_attacked_too(tmp_path):
    config = attacked("backdoor:target=7,scale=100")
    ours = simulate(config, tmp_path / "ours", workers=2)
    theirs = simulate(config, tmp_path / "theirs", replace(Fleet.of(config), attack=None), workers=1)
    assert theirs.model_sha256 == ours.model_sha256
    assert ours.final_accuracy < 0.5, "100 times the update of two devices in five leaves little of a mean"
