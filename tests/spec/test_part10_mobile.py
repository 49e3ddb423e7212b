"""The specification's part 10, cross-device learning on phones: its listed tests under their names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from client_sdk import events
from client_sdk.checkpoint import CheckpointManager
from client_sdk.conditions import Conditions, Network
from client_sdk.errors import TrainingPaused
from client_sdk.planner import MEMORY_FRACTION, optimal_batch_size, plan_work
from client_sdk.power import PauseReason, PowerMonitor, PowerPolicy
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Manifest, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program
from client_sdk.throttle import Governor
from client_sdk.training import TrainingRun, TrainingState
from client_sdk.training_loop import TrainingLoop
from mobile_export import build_model, export_program
from server_ref import ServerDeviceSelector
from server_ref.selection import spread
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.prepare import Fleet, Prepared
from simulator.profiles import read_profiles
from simulator.run import RunOptions, run_simulation
from tests.bundles import tiny_bundle
from tests.checkpoints import Training, bits

# The reference CNN for 148x148 images and ten classes, as exported.
LARGE_CNN = Path(__file__).parent / "manifests" / "cnn-148x148.json"
LARGE_CNN_BATCHES = {Role.TRAIN: (8, 32, 64), Role.GRAD: (8,)}


def test_adaptive_batch_size():
    """Test: Simulate devices with 512MB, 2GB, 8GB RAM.

    Expected: Batch sizes scale appropriately (8, 32, 64). From the exported memory plan: training may add an eighth of
    a phone's memory to its process, and a batch of the reference model for 148x148 images plans 33, 126 or 248 MiB.
    """
    manifest = Manifest.from_json(LARGE_CNN.read_text())

    def batches(fraction: float, num_samples: int) -> list[int]:
        return [
            optimal_batch_size(
                manifest,
                DeviceProfile("phone", available_memory_mb=ram),
                num_samples=num_samples,
                memory_fraction=fraction,
            )
            for ram in (512, 2048, 8192)
        ]

    assert batches(MEMORY_FRACTION, num_samples=100) == [8, 32, 64]
    # Not on a knife's edge: the same with 3 % more memory or less, and with hardly any data or a lot.
    assert batches(MEMORY_FRACTION * 1.03, num_samples=100) == [8, 32, 64]
    assert batches(MEMORY_FRACTION * 0.97, num_samples=100) == [8, 32, 64]
    assert batches(MEMORY_FRACTION, num_samples=10) == batches(MEMORY_FRACTION, num_samples=50_000) == [8, 32, 64]


def test_training_needs_less_than_500_mb_on_every_tier():
    """The specification's requirement, for the largest batch that the 8 GB phone of the test above trains in."""
    manifest = Manifest.from_json(LARGE_CNN.read_text())
    plan = TrainingPlan(local_epochs=5, batch_size=64, adaptive=True)
    phone = DeviceProfile("phone", "high_end", available_memory_mb=8192)
    work = plan_work(manifest, phone, plan, num_samples=100)
    assert work.plan.batch_size == 64
    assert work.estimate.total_bytes < 500e6


@pytest.mark.slow
def test_the_large_cnn_is_still_exported_with_the_memory_that_the_manifest_says(tmp_path: Path):
    """Where the exporter plans less, commit the new manifest, and look at the arithmetic of the test above."""
    committed = Manifest.from_json(LARGE_CNN.read_text())
    model = build_model("cnn", (148, 148), 10, 0)
    found = export_program(
        model, out_dir=tmp_path / "bundle", batch_sizes=LARGE_CNN_BATCHES, model_name=committed.model_name
    ).manifest
    assert {m.name: m.planned_memory_bytes for m in found.methods} == {
        m.name: m.planned_memory_bytes for m in committed.methods
    }
    assert found.num_parameters == committed.num_parameters


class Battery:
    """A phone whose battery has what a test says."""

    def __init__(self, percent: int) -> None:
        self.percent = percent

    def read(self) -> Conditions:
        return Conditions(self.percent / 100, charging=False, user_active=False, network=Network.UNMETERED)

    def drain(self, event: events.Event) -> None:
        """A percent for each program call."""
        self.percent -= isinstance(event, events.TrainingProgress)


def test_power_aware_training(softmax_bundle: Path, tmp_path: Path):
    """Test: Battery drops from 50% to 15% during training.

    Expected: Training pauses at 15%, checkpoint saved. It starts again at 20 %, from the checkpoint, with the result
    of an undisturbed training to the bit.
    """
    program = load_program(softmax_bundle)
    training = Training(program, TrainingPlan(local_epochs=5, batch_size=8, learning_rate=0.1), num_samples=80)
    undisturbed = training.begin()
    while not undisturbed.finished:
        undisturbed.advance()

    battery, rests = Battery(50), []
    monitor = PowerMonitor(battery, PowerPolicy(check_every_calls=1), clock=lambda: 0.0)
    seconds = iter(range(10**6))

    def loop() -> TrainingLoop:
        return TrainingLoop(
            checkpoints=CheckpointManager(tmp_path / "checkpoints"),
            governor=Governor(monitor, monotonic=lambda: 0.0, sleep=rests.append),
            on_event=battery.drain,
            monotonic=lambda: float(next(seconds)),
        )

    assert monitor.can_start_training()
    run = training.begin()
    with pytest.raises(TrainingPaused, match="the battery is at 15%") as paused:
        loop().drive(run, lambda _: training.checkpoint(run))
    assert (paused.value.reason, battery.percent) == (PauseReason.BATTERY_LOW, 15)
    assert (run.steps, run.finished) == (35, False)
    assert rests == sorted(rests), "the emptier the battery, the longer it rests after a call"

    starts = {}
    for battery.percent in (15, 16, 19, 20):
        starts[battery.percent] = monitor.can_start_training()
    assert starts == {15: False, 16: False, 19: False, 20: True}
    battery.percent = 50
    checkpoint = loop().former(training.binding)
    assert checkpoint is not None
    assert checkpoint.state.steps == 35
    resumed = training.begin(checkpoint.state)
    assert bits(loop().drive(resumed, lambda _: None)) == bits(undisturbed.result())


@pytest.mark.parametrize("batch_size", [4, 8], ids=["fused", "accumulated"])
def test_training_interruption_resume(tmp_path: Path, batch_size: int):
    """Test: Interrupt training at 50%, resume from checkpoint.

    Expected: Final model identical to uninterrupted training. To the bit, with the exported program, also where the
    interruption comes in the middle of an accumulated step; all that connects the two halves is a file.
    """
    tiny_bundle("mlp", tmp_path / "bundle")
    plan = TrainingPlan(local_epochs=3, batch_size=batch_size, learning_rate=0.2)

    def begin(state: TrainingState | None) -> TrainingRun:
        """As a new process does it."""
        return Training(load_program(tmp_path / "bundle", "native"), plan, num_samples=22).begin(state)

    uninterrupted = begin(None)
    calls = 0
    while not uninterrupted.finished:
        uninterrupted.advance()
        calls += 1

    training = Training(load_program(tmp_path / "bundle", "native"), plan, num_samples=22)
    first_half = training.begin()
    for _ in range(calls // 2):
        first_half.advance()
    assert first_half.at_step_boundary is (batch_size == 4)
    assert 0.4 < first_half.examples_done / first_half.total_examples < 0.6
    CheckpointManager(tmp_path / "checkpoints").save(training.checkpoint(first_half))
    del first_half

    manager = CheckpointManager(tmp_path / "checkpoints")
    assert manager.has_checkpoint()
    checkpoint = manager.load(training.binding)
    assert checkpoint is not None
    resumed = begin(checkpoint.state)
    while not resumed.finished:
        resumed.advance()
    assert bits(resumed.result()) == bits(uninterrupted.result())


def test_fair_device_selection():
    """Test: 1000 devices, 100 selected a round, 20 rounds.

    Expected: every device at least once, spread of the counts below 10 %. Here it is 0: everybody exactly twice.
    """
    selector = ServerDeviceSelector(selection_strategy="fair")
    devices = [f"device-{i}" for i in range(1000)]
    profiles = {device: DeviceProfile(device) for device in devices}
    for _ in range(20):
        selected = selector.select_devices(devices, 100, profiles)
        assert len(set(selected)) == len(selected) == 100
    counts = selector.participation_counts
    assert set(counts) == set(devices)
    assert min(counts.values()) >= 1
    assert spread(counts.values()) < 0.1
    assert set(counts.values()) == {2}


TIER = """
[[profile]]
name = "{tier}"
tier = "{tier}"
share = {share}
memory_mb = {memory_mb}
cpu_cores = 4
mflops = {mflops}
download_mbit = 20
upload_mbit = 20
latency_s = 0.05
startup_s = 1
"""
HIGH = {"tier": "high_end", "memory_mb": 8192, "mflops": 2000}
MID = {"tier": "mid_range", "memory_mb": 2048, "mflops": 600}
LOW = {"tier": "low_end", "memory_mb": 3, "mflops": 150}
MIXED = [{**HIGH, "share": 0.3}, {**MID, "share": 0.5}, {**LOW, "share": 0.2}]


def test_heterogeneous_convergence(tmp_path: Path):
    """Test: Mix of high-end (30%), mid-range (50%), low-end (20%) devices.

    Expected: Model converges despite heterogeneity, <10% accuracy loss vs. homogeneous. On the digits, with classes
    dealt out unevenly: the tiers train 5, 3 and 1 epochs, and the smallest phones in batches of a quarter, for what
    training adds must fit into an eighth of their 3 MiB. The homogeneous fleet has the same data, and trains all of it.
    The five seeds below 400 that draw exactly these shares lost 0 to 3 %; this is the one that lost most.
    """
    accuracies = []
    for name, tiers in (("mixed", MIXED), ("homogeneous", [{**HIGH, "share": 1.0}])):
        file = tmp_path / f"{name}.toml"
        file.write_text("format = 1\n" + "".join(TIER.format(**tier) for tier in tiers))
        config = SimulationConfig.parse({
            "profiles": read_profiles(file), "local_work": "adaptive", "epochs": 5, "batch_size": 128, "model": "mlp",
            "partition": "dirichlet:0.5", "devices": 40, "rounds": 25, "seed": 312, "engine": "cohort",
        })  # fmt: skip
        with RunFolder.begin(tmp_path / name, config) as folder:
            fleet = Fleet.of(config)
            plans = Prepared.of(folder, fleet, lambda _: None).plans
            results = run_simulation(folder, RunOptions(workers=1), fleet)
        work = Counter((plan.local_epochs, plan.batch_size) for plan in plans)
        assert work == ({(5, 128): 12, (3, 128): 20, (1, 32): 8} if name == "mixed" else {(5, 128): 40})
        assert results.final_accuracy is not None
        accuracies.append(results.final_accuracy)
    mixed, homogeneous = accuracies
    assert homogeneous > 0.9
    assert mixed > 0.9 * homogeneous
