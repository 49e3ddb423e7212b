"""Training on a device's own account, without a server: what ``MobileClient.train_local_model`` does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk import events
from client_sdk.checkpoint import Checkpoint, CheckpointBinding, CheckpointManager, data_fingerprint
from client_sdk.data import Examples
from client_sdk.errors import Interrupted, TrainingPaused
from client_sdk.footprint import BASELINE_BYTES
from client_sdk.memory_budget import MemoryBudget
from client_sdk.planner import MEMORY_FRACTION, LocalWork, plan_work
from client_sdk.power import PowerMonitor
from client_sdk.protocol.errors import ProgramInputError
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Float32Array, Manifest, Program, Role
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.protocol.updates import LOCAL_STEPS, WorkerGradient
from client_sdk.throttle import Governor
from client_sdk.training_loop import OnEvent, TrainingLoop
from client_sdk.trainings import begin_training

Weights = Float32Array | Mapping[str, npt.NDArray[np.float32]]

_REST_PIECE_S = 1.0
MOST_EPOCHS = 5
"""Epochs that a high-end device trains where the caller names no plan; the other tiers train fewer."""


@dataclass(frozen=True)
class LocalTraining:
    """A device that trains for itself.

    Attributes:
        program: What trains.
        profile: What the device can spend.
        power: Whether its conditions allow it; None for always.
        checkpoints: Where training under way is kept; None keeps nothing.
        memory_fraction: Part of the profile's memory that training is planned for.
        baseline_bytes: What the process takes without the program and the examples.
        memory_limit_bytes: What the process may use at most; None for no limit.
        on_event: Told about progress, pauses and checkpoints.
        clock: Seconds since the epoch, for the result's time.
        monotonic: Seconds of a clock that nobody sets back.
        sleep: Rests so many seconds.
    """

    program: Program
    profile: DeviceProfile
    power: PowerMonitor | None = None
    checkpoints: CheckpointManager | None = None
    memory_fraction: float = MEMORY_FRACTION
    baseline_bytes: int = BASELINE_BYTES["native"]
    memory_limit_bytes: int | None = None
    on_event: OnEvent = lambda _: None
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep

    def work(self, plan: TrainingPlan | None = None, examples: Examples | None = None) -> LocalWork:
        """How this device does a plan with these examples; without a plan what its tier and memory allow.

        Raises:
            MemoryBudgetExceeded: No batch size of the program fits.
        """
        manifest = self.program.manifest
        if plan is None:
            sizes = {*manifest.batch_sizes(Role.TRAIN), *manifest.batch_sizes(Role.GRAD)}
            plan = TrainingPlan(batch_size=max(sizes, default=1), local_epochs=MOST_EPOCHS, adaptive=True)
        return plan_work(
            manifest,
            self.profile,
            plan,
            # No examples are refused where they are trained on, by name.
            num_samples=1 if examples is None else max(1, len(examples[0])),
            memory_fraction=self.memory_fraction,
            baseline_bytes=self.baseline_bytes + (0 if examples is None else sum(a.nbytes for a in examples)),
            budget_bytes=self.memory_limit_bytes,
        )

    def train(
        self,
        weights: Weights,
        examples: Examples,
        *,
        model_version: int,
        plan: TrainingPlan | None,
        shuffle_seed: int,
        should_stop: Callable[[], bool],
    ) -> WorkerGradient | None:
        """Train, or go on with what was begun; None where it had to stop before the end.

        The result is of the plan's kind: a delta, or a gradient. Of personal layers there is nothing in it.

        Raises:
            ProgramError, ConfigurationError: See ``begin_training``.
        """
        manifest = self.program.manifest
        start = flat(weights, manifest)
        work = self.work(plan, examples)
        layers = SharedLayers.of(manifest.parameters, work.plan.personal)
        if self.power is not None:
            verdict = self.power.start_verdict()
            if not verdict.allowed:
                self.on_event(events.Paused("training", str(verdict.reason), verdict.detail))
                return None

        def rest(seconds: float) -> None:
            """In pieces, so that the caller can end it."""
            while seconds > 0 and not should_stop():
                self.sleep(min(seconds, _REST_PIECE_S))
                seconds -= _REST_PIECE_S

        loop = TrainingLoop(
            checkpoints=self.checkpoints,
            governor=None if self.power is None else Governor(self.power, monotonic=self.monotonic, sleep=self.sleep),
            budget=None if self.memory_limit_bytes is None else MemoryBudget(self.memory_limit_bytes),
            should_stop=lambda _: should_stop(),
            on_event=self.on_event,
            monotonic=self.monotonic,
        )
        binding = self._binding(start, examples, model_version, work, shuffle_seed)
        former = None if binding is None else loop.former(binding)
        run = begin_training(
            self.program,
            start,
            examples,
            work.plan,
            shuffle_seed,
            slice_size=work.slice_size,
            state=None if former is None else former.state,
        )
        former = None  # its bytes need not stay for as long as training does
        try:
            result = loop.drive(run, lambda state: None if binding is None else Checkpoint(binding, state, None))
        except Interrupted:
            return None
        except TrainingPaused as e:
            self.on_event(events.Paused("training", e.reason, str(e)))
            return None
        if self.checkpoints is not None:
            self.checkpoints.clear()
        fednova = work.plan.algorithm == "fednova"
        update = named(result.delta if result.gradient is None else result.gradient, manifest)
        return WorkerGradient(
            worker_id=self.profile.device_id,
            gradients={p.name: update[p.name] for p in layers.shared},
            num_samples=result.num_samples,
            timestamp=self.clock(),
            metadata={
                "model_version": model_version,
                "device_type": self.profile.device_type.value,
                LOCAL_STEPS: normaliser(work.plan, result.steps) if fednova else result.steps,
                "train_loss": result.last_epoch_loss,
                **_meta_facts(work.plan),
            },
            kind=work.plan.update_kind,
        )

    def _binding(
        self, start: Float32Array, examples: Examples, model_version: int, work: LocalWork, shuffle_seed: int
    ) -> CheckpointBinding | None:
        """What a checkpoint of this training belongs to. No server named it, so its ids follow from what it is."""
        if self.checkpoints is None:
            return None
        manifest = self.program.manifest
        data_sha256 = data_fingerprint(*examples)
        name = hashlib.sha256(f"local:{self.profile.device_id}:{data_sha256}".encode()).hexdigest()[:32]
        return CheckpointBinding(
            assignment_id=name,
            task_id=name,
            model_version=model_version,
            model_sha256=hashlib.sha256(start.data).hexdigest(),
            program_sha256=manifest.program_sha256,
            parameter_table_sha256=manifest.parameter_table_sha256,
            plan=work.plan,
            shuffle_seed=shuffle_seed,
            slice_size=work.slice_size,
            data_sha256=data_sha256,
        )


def _meta_facts(plan: TrainingPlan) -> dict[str, str | int | float]:
    """What a server of meta-learning compares with its own plan (``PersonalizedFederatedAggregator``)."""
    if plan.meta is None:
        return {}
    facts: dict[str, str | int | float] = {
        "algorithm": plan.algorithm,
        "inner_steps": plan.meta.inner_steps,
        "inner_lr": plan.learning_rate,
    }
    return facts | ({"meta_lr": plan.meta.meta_learning_rate} if plan.algorithm == "per-fedavg" else {})


def flat(weights: Weights, manifest: Manifest) -> Float32Array:
    """Flat weights in parameter-table order.

    Raises:
        ProgramInputError: Named weights that are not the manifest's.
    """
    if not isinstance(weights, Mapping):
        return np.ascontiguousarray(weights, np.float32)
    expected = {p.name: p.shape for p in manifest.parameters}
    found = {name: np.shape(array) for name, array in weights.items()}
    if found != expected:
        raise ProgramInputError(f"weights must be {expected}, got {found}")
    return np.concatenate([np.ravel(np.asarray(weights[p.name], np.float32)) for p in manifest.parameters])


def named(vector: Float32Array, manifest: Manifest) -> dict[str, Float32Array]:
    """Parameter name -> view into a flat vector."""
    return {p.name: vector[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in manifest.parameters}
