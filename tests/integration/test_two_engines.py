"""One simulation by both engines: the same sessions and rounds; and the same bits, where devices' updates are the same.

The devices' local training is a function of its arguments, to the bit (``LocalTrainer`` over the exported program). So
the cohort engine can be fed with the very updates that the device engine's server received, by giving it that trainer:
what is left of it, selection, memories, compression, attacks, rounds, rules and optimizers, must then make the same
models.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from client_sdk.cli import main
from client_sdk.protocol.errors import TrainingDiverged
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.profile import DeviceTier
from client_sdk.runtime import load_program
from client_sdk.training_loop import TrainingLoop
from client_sdk.trainings import begin_training
from simulator.cohort import run as cohort_run
from simulator.cohort.trainer import CohortResult, CohortTrainer
from simulator.config import SimulationConfig
from simulator.folder import BUNDLE_FOLDER, RunFolder
from simulator.profiles import FleetProfiles, read_profiles
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation

SMALL = {"devices": 12, "rounds": 4, "model": "softmax", "cohort": 5, "seed": 3, "epochs": 2}
SYNCHRONOUS = {"overselect": 1.5, "dropout": 0.15}
ASYNCHRONOUS = {
    "cohort": 3, "overselect": 3.0, "refill_at": 1, "dropout": 0.1, "rounds": 6,
    "staleness": {"max_staleness": 4, "weighting": "polynomial"},
}  # fmt: skip
# The smallest phones train a quarter of the planned batch, for that is what fits into an eighth of their memory.
SMALL_PHONES = FleetProfiles(
    profile=tuple(
        p.model_copy(update={"memory_mb": 3} if p.tier is DeviceTier.LOW_END else {})
        for p in read_profiles("steady").profile
    )
)
ADAPTIVE = {"profiles": SMALL_PHONES, "local_work": "adaptive", "model": "mlp", "batch_size": 128, "epochs": 5}
META = {"meta": {"inner_steps": 3}, "batch_size": 8, "learning_rate": 0.1, "adapt_steps": 0}
# Every kind of state that one round leaves to the next, on either side.
RUNS = {
    "over-selection": SYNCHRONOUS,
    "asynchronous, Adam": {**ASYNCHRONOUS, "optimizer": {"name": "adam", "learning_rate": 0.05}},
    "top-k with error feedback": {"compression": "topk:0.1", "optimizer": {"momentum": 0.5}},
    "phones with a day": {
        "profiles": read_profiles("phones"), "work_scale": 3000.0, "overselect": 1.5, "skew": "rotation:20",
    },
    "adaptive work": {**ADAPTIVE, "overselect": 1.5},
    "adaptive work, fednova": {**ADAPTIVE, "algorithm": "fednova"},
    "scaffold": {"algorithm": "scaffold", "epochs": 1},
    "fednova, fast devices": {"algorithm": "fednova", "prox_mu": 0.1, "selection": {"policy": "fast"}},
    "maml": {**META, "algorithm": "maml", "overselect": 1.5},
    "reptile, compressed and attacked, personal layers": {
        **META, "algorithm": "reptile", "personal": ("output.bias",), "compression": "topk:0.5",
        "attack": "alie", "byzantine": 0.25, "overselect": 1.5,
    },
    "personal layers, asynchronous": {**ASYNCHRONOUS, "personal": ("output.bias",), "epochs": 1, "adapt_steps": 0},
    "alie against multi-krum": {"attack": "alie", "byzantine": 0.25, "aggregation": {"rule": "multi-krum"}},
    "compressed label flips, clipped": {
        "attack": "label-flip", "byzantine": 0.25, "compression": "randomk:0.5", "aggregation": {"clip_norm": 0.5},
    },
}  # fmt: skip


def simulate(config: SimulationConfig, out) -> SimulationResults:
    with RunFolder.begin(out, config) as folder:
        return run_simulation(folder, RunOptions(workers=2))


@pytest.fixture(scope="module", params=list(RUNS))
def by_devices(request, tmp_path_factory):
    """A run of the device engine, and its folder."""
    out = tmp_path_factory.mktemp("devices") / "run"
    return simulate(SimulationConfig.parse({**SMALL, **RUNS[request.param]}), out), out


def as_cohort(results: SimulationResults) -> SimulationConfig:
    return results.config.model_copy(update={"engine": "cohort"})


class DeviceTrainer:
    """Trains one client after the other, as each device does. Takes ``CohortTrainer``'s place."""

    def __init__(self, program, data):
        self._program = program
        self._data = data

    def clients_at_once(self, _plan):
        return 4

    def train(self, weights, clients, plan):
        layers = SharedLayers.of(self._program.manifest.parameters, plan.personal)
        updates, steps, losses, kept, failures = [], [], [], [], {}
        for i, client in enumerate(clients):
            x, y = self._data.x[client.rows], self._data.y[client.rows]
            mine = client.plan or plan
            start = weights if client.own is None else layers.with_personal(weights, client.own)
            try:
                run = begin_training(self._program, start, (x, y), mine, client.shuffle_seed, controls=client.controls)
                while not run.finished:
                    run.advance()
                result = run.result()
            except TrainingDiverged as e:
                failures[i] = e
                continue
            updates.append(layers.gather(result.update(mine)))
            kept.append(layers.personal_of(result.weights))
            steps.append(result.steps)
            losses.append(result.last_epoch_loss)
        assert not failures
        personal = np.stack(kept) if plan.personal else None
        return CohortResult(np.stack(updates), np.array(steps), np.array(losses), np.array(losses), failures, personal)


def facts_of(results: SimulationResults) -> list[tuple]:
    """What of the rounds does not depend on the values of updates, up to rounding."""
    return [
        (r.round, r.reports, r.discarded, r.opened_at_s, r.closed_at_s, r.staleness, r.excluded, r.unchanged)
        for r in results.rounds
    ]


def test_fed_the_same_updates_both_engines_make_the_same_models(by_devices, tmp_path, monkeypatch):
    results, out = by_devices
    program = load_program(out / BUNDLE_FOLDER, results.runtime)
    monkeypatch.setattr(cohort_run, "CohortTrainer", lambda _model, data, **_: DeviceTrainer(program, data))
    cohort = simulate(as_cohort(results), tmp_path / "run")
    program.close()
    assert [r.model_sha256 for r in cohort.rounds] == [r.model_sha256 for r in results.rounds]
    assert facts_of(cohort) == facts_of(results)
    assert [r.train_loss for r in cohort.rounds] == pytest.approx([r.train_loss for r in results.rounds], rel=1e-9)


def test_trained_in_batches_it_is_the_same_run_up_to_rounding(by_devices, tmp_path):
    results, _ = by_devices
    cohort = simulate(as_cohort(results), tmp_path / "run")
    assert facts_of(cohort) == facts_of(results)
    assert [t.model_dump() for t in cohort.tiers] == [t.model_dump() for t in results.tiers]
    assert cohort.sessions == results.sessions
    assert cohort.virtual_seconds == results.virtual_seconds
    assert [r.train_loss for r in cohort.rounds] == pytest.approx([r.train_loss for r in results.rounds], rel=1e-3)
    assert [r.loss for r in cohort.rounds] == pytest.approx([r.loss for r in results.rounds], rel=1e-3)
    assert (cohort.server, cohort.runtime, cohort.parameters) == ("none", "torch", results.parameters)
    assert cohort.pipeline == results.pipeline


def test_devices_that_pause_at_their_training_go_on_from_a_checkpoint_to_the_model_of_those_that_do_not(
    tmp_path, monkeypatch
):
    """Pauses cost virtual time, and no bit: the cohort engine knows of them by their time alone."""
    resumed = []
    former = TrainingLoop.former

    def watched(loop, binding):
        checkpoint = former(loop, binding)
        if checkpoint is not None:
            resumed.append(checkpoint.binding.assignment_id)
        return checkpoint

    monkeypatch.setattr(TrainingLoop, "former", watched)
    # So much work that it lasts for hours, in which users take their phones up.
    config = SimulationConfig.parse({
        **SMALL, "profiles": read_profiles("phones"), "work_scale": 3e6, "overselect": 2.0, "lease": 86_400.0,
    })  # fmt: skip
    devices = simulate(config, tmp_path / "devices")
    cohort = simulate(as_cohort(devices), tmp_path / "cohort")
    assert len(resumed) > len(set(resumed)) > 0, "some more than once"
    assert facts_of(cohort) == facts_of(devices)
    assert cohort.days == devices.days
    assert devices.days.resumed > 0
    assert [row.examples for row in cohort.tiers] == [row.examples for row in devices.tiers]
    assert [r.loss for r in cohort.rounds] == pytest.approx([r.loss for r in devices.rounds], rel=1e-3)


@pytest.mark.parametrize("more", [SYNCHRONOUS, ASYNCHRONOUS])
def test_a_cohort_run_repeats_whatever_the_number_of_threads(tmp_path, more, monkeypatch):
    # Batches so small that there are several.
    monkeypatch.setattr(CohortTrainer, "_clients_in_a_batch", lambda _self, _plan: 2)
    config = SimulationConfig.parse({**SMALL, **more, "engine": "cohort"})
    hashes = []
    for workers in (1, 3):
        with RunFolder.begin(tmp_path / str(workers), config) as folder:
            hashes.append([r.model_sha256 for r in run_simulation(folder, RunOptions(workers=workers)).rounds])
    assert hashes[0] == hashes[1]


def test_the_command_plays_a_cohort(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [f"--{name}={SMALL[name]}" for name in ("devices", "rounds", "model", "cohort", "seed", "epochs")]
    assert main(["simulate", "--engine", "cohort", *flags, "--no-progress", "--out", str(out)]) == 0
    results = SimulationResults.read(out / "results.json")
    assert results.model_sha256 in capsys.readouterr().out
    assert results.config.engine == "cohort"
    assert results.repeatable
    assert results.final_accuracy > 0.6
    assert (out / "report.html").stat().st_size > 100_000
    # What counted went up whole; what a device downloads it downloads first.
    assert all(r.bytes_up >= r.reports * 4 * results.parameters for r in results.rounds)
    assert results.bytes_down > results.bytes_up
    assert json.loads((out / "config.json").read_text())["engine"] == "cohort"


def test_a_resumed_cohort_run_is_played_anew(tmp_path):
    config = SimulationConfig.parse({**SMALL, "engine": "cohort"})
    undisturbed = simulate(config, tmp_path / "undisturbed")
    with RunFolder.begin(tmp_path / "run", config) as folder:
        (folder.path / "journal.jsonl").write_bytes(b'{"pocketfed-journal":1}\n{"round":0,"seconds":5.0}\n{"rou')
    with RunFolder.resume(tmp_path / "run", {}) as folder:
        resumed = run_simulation(folder, RunOptions())
    assert resumed.model_sha256 == undisturbed.model_sha256
    assert len(resumed.rounds) == len(undisturbed.rounds)
