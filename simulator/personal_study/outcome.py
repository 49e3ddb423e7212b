"""What one cell of the study came to: training, adaptation of devices that took part and of new ones, judged."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from client_sdk.personal_merge import interpolated
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Float32Array
from simulator.cohort.adaptation import AdaptationCurves, adapt_devices, adaptation_curves, evaluate_devices
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.personal_study.settings import PROTECTED, PROTECTIONS, Cell, StudySettings
from simulator.personal_study.training import Method, Trained, World
from simulator.personalization.distribution import lowest_tenth
from simulator.personalization.held_out import DeviceTests, device_tests
from simulator.run import RunOptions, run_simulation

Float64Array = npt.NDArray[np.float64]

LATER = 20
"""Rounds after which a new global model comes to a device with a personal one."""


class Outcome(BaseModel):
    """Accuracies on the test split, from 0 to 1: means over devices unless said otherwise.

    Attributes:
        curve: After 0 .. steps of adaptation, of devices that took part; with personal layers they start from those.
        of_all: Of the global model.
        worst_of_all: Of the tenth of the devices that the global model serves worst.
        worst: Likewise, of the personal models, after the world's ``adaptation_steps``.
        losing: Share of the devices that the personal model serves worse than the global one.
        newcomers: As ``curve``, of devices that never took part and have few examples.
        kept: Merge policy -> share of the gain that is left when a new global model has come; None where there was no
            gain.
        groups: Name of a group -> (global, personal), accuracies of its devices.
        bits: Name of a group -> (global, personal), mean loss of its devices in bits an example; of languages bits per
            byte.
        elsewhere: Loss in bits on the examples of a device of another group: (global, personal); None without groups.
        by_round: Round -> curve of newcomers with all of their examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    curve: tuple[float, ...] = ()
    of_all: float = 0.0
    worst_of_all: float = 0.0
    worst: float = 0.0
    losing: float = 0.0
    newcomers: tuple[float, ...] = ()
    kept: dict[str, float | None] = {}
    groups: dict[str, tuple[float, float]] = {}
    bits: dict[str, tuple[float, float]] = {}
    elsewhere: tuple[float, float] | None = None
    by_round: dict[int, tuple[float, ...]] = {}


def outcome_of(cell: Cell, settings: StudySettings) -> Outcome:
    """Play a cell.

    Raises:
        DatasetUnavailable: The data has to be fetched first.
    """
    if cell.part == "protection":
        return _protected(cell, settings)
    if cell.world is None or cell.method is None:
        raise ConfigurationError(f"{cell.key} names no fleet to train")
    if cell.part == "steps":
        return _by_round(cell.world, cell.method, cell.seed, settings)
    rounds = settings.language_rounds if cell.part == "languages" else settings.rounds
    before = max(1, rounds - LATER)
    trained = Trained.of(cell.world, cell.method, rounds=rounds, seed=cell.seed, keep=(before,))
    return _judged(cell.world, cell.method, trained, before, settings)


def _judged(world: World, method: Method, trained: Trained, before: int, settings: StudySettings) -> Outcome:
    devices = range(world.devices)
    crowd = _Crowd(trained, method, world, devices, seed=trained.fleet.population.seed)
    found = crowd.curves(trained.starts(devices), max(settings.adaptation, world.adaptation_steps))
    curves = found.accuracy
    of_all, own = crowd.accuracy(trained.weights), curves[:, world.adaptation_steps]
    newcomers = range(world.devices, world.devices + world.newcomers)
    few = _Crowd(trained, method, world, newcomers, seed=crowd.seed, examples=settings.few)
    outcome = Outcome(
        curve=_means(curves),
        of_all=float(of_all.mean()),
        worst_of_all=lowest_tenth(of_all),
        worst=lowest_tenth(own),
        losing=float((own < of_all).mean()),
        newcomers=_means(few.curves(trained.weights, settings.adaptation).accuracy),
        kept={} if method.personal else _kept(crowd, trained.by_round[before], trained.weights),
    )
    names = trained.fleet.dataset.group_names
    if not names:
        return outcome
    group = np.arange(world.devices) % len(names)
    by_name = {name: (float(of_all[group == i].mean()), float(own[group == i].mean())) for i, name in enumerate(names)}
    own_bits = found.loss_sum[:, world.adaptation_steps] / found.count / math.log(2)
    bits_of_all = crowd.bits(trained.weights)
    bits = {
        name: (float(bits_of_all[group == i].mean()), float(own_bits[group == i].mean()))
        for i, name in enumerate(names)
    }
    personal = crowd.adapted(trained.starts(devices))
    elsewhere = float(bits_of_all.mean()), float(crowd.bits(personal, elsewhere=True).mean())
    return outcome.model_copy(update={"groups": by_name, "bits": bits, "elsewhere": elsewhere})


def _kept(crowd: _Crowd, old: Float32Array, new: Float32Array) -> dict[str, float | None]:
    """What each merge policy leaves of the gain that devices had over the old model, when the new one has come."""
    before, renewed = crowd.accuracy(old), crowd.accuracy(new)
    personal = crowd.adapted(old)
    gain = float((crowd.accuracy(personal) - before).mean())

    def left(weights: Float32Array) -> float | None:
        return float((crowd.accuracy(weights) - renewed).mean()) / gain if gain > 0 else None

    shares = {
        f"interpolate, share {share:g}": np.stack([interpolated(new, own, old, share) for own in personal])
        for share in (0.5, 1.0)
    }
    return {"readapt": left(crowd.adapted(new)), **{name: left(weights) for name, weights in shares.items()}}


def _by_round(world: World, method: Method, seed: int, settings: StudySettings) -> Outcome:
    looked_at = settings.looked_at()
    trained = Trained.of(world, method, rounds=settings.long_rounds, seed=seed, keep=looked_at)
    newcomers = range(world.devices, world.devices + world.newcomers)
    crowd = _Crowd(trained, method, world, newcomers, seed=seed)
    return Outcome(
        by_round={
            number: _means(crowd.curves(weights, settings.adaptation).accuracy)
            for number, weights in sorted(trained.by_round.items())
        }
    )


def _protected(cell: Cell, settings: StudySettings) -> Outcome:
    """A whole run of the cohort engine, through the reference server's pipeline."""
    config = SimulationConfig.parse(
        {**PROTECTED, **PROTECTIONS[cell.protection], "rounds": settings.protected_rounds, "seed": cell.seed}
    )
    with tempfile.TemporaryDirectory() as scratch, RunFolder.begin(Path(scratch) / "run", config) as folder:
        found = run_simulation(folder, RunOptions()).personalization
    if found is None:
        raise ConfigurationError(f"{cell.key} adapted no device")
    return Outcome(
        curve=found.curves[-1].accuracy,
        of_all=found.global_accuracy,
        worst_of_all=found.worst_decile.global_accuracy,
        worst=found.worst_decile.personalized_accuracy,
        losing=found.fairness.losing,
        groups={"": (found.global_accuracy, found.personalized_accuracy)},
    )


class _Crowd:
    """Some devices that adapt, and what judges them: the test split, once, at the end of training."""

    def __init__(
        self,
        trained: Trained,
        method: Method,
        world: World,
        devices: Sequence[int],
        *,
        seed: int,
        examples: int | None = None,
    ) -> None:
        fleet = trained.fleet
        self.seed = seed
        self._model = trained.model
        self._data = fleet.honest_data
        self._rows = [fleet.parts[d][:examples] for d in devices]
        self._tests: DeviceTests = device_tests(fleet, devices, split="test", per_device=world.tests)
        self._rate = method.learning_rate if world.adaptation_rate is None else world.adaptation_rate
        self._steps = world.adaptation_steps
        self._batch_size = world.adaptation_batch or world.batch_size

    def curves(self, starts: Float32Array, steps: int) -> AdaptationCurves:
        return adaptation_curves(
            self._model,
            self._data,
            self._rows,
            starts,
            self._tests.rows,
            steps=steps,
            learning_rate=self._rate,
            batch_size=self._batch_size,
            seed=self.seed,
            test_data=self._tests.data,
        )

    def adapted(self, starts: Float32Array) -> Float32Array:
        """Every device's personal model, float32[n, d]."""
        found = np.empty((len(self._rows), self._model.num_parameters), np.float32)
        for devices, step, weights in adapt_devices(
            self._model,
            self._data,
            self._rows,
            starts,
            steps=self._steps,
            learning_rate=self._rate,
            batch_size=self._batch_size,
            seed=self.seed,
        ):
            if step == self._steps:
                found[devices] = weights
        return found

    def accuracy(self, weights: Float32Array) -> Float64Array:
        """On every device, of one model float32[d] or of each device's own, float32[n, d]."""
        found = evaluate_devices(self._model, weights, self._tests.data, self._tests.rows)
        shares: Float64Array = found.correct / found.count
        return shares

    def bits(self, weights: Float32Array, *, elsewhere: bool = False) -> Float64Array:
        """Mean loss on every device, or on the next one's examples, which is of the next group."""
        first, *others = self._tests.rows
        tests = [*others, first] if elsewhere else self._tests.rows
        found = evaluate_devices(self._model, weights, self._tests.data, tests)
        means: Float64Array = found.loss_sum / found.count / math.log(2)
        return means


def _means(curves: Float64Array) -> tuple[float, ...]:
    return tuple(curves.mean(axis=0).tolist())
