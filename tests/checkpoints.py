"""Small trainings of a program in numpy, their checkpoints, and bits to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from client_sdk.checkpoint import Checkpoint, CheckpointBinding, CheckpointManager, data_fingerprint
from client_sdk.memory import CONTROL, RESIDUAL, DeviceMemory
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import Controls, TrainingResult, TrainingState
from client_sdk.trainings import Training as Run
from client_sdk.trainings import begin_training

ASSIGNMENT, TASK, REPORT = "a" * 32, "b" * 32, "c" * 32


@dataclass
class Training:
    """A device's training and what it is bound to."""

    program: Program
    plan: TrainingPlan
    num_samples: int = 11
    seed: int = 5
    slice_size: int | None = None
    with_memory: bool = True

    def __post_init__(self) -> None:
        manifest = self.program.manifest
        rng = np.random.default_rng(self.seed % 2**32)
        d = manifest.num_parameters
        self.weights = rng.normal(0, 0.3, d).astype(np.float32)
        self.x = rng.normal(size=(self.num_samples, *manifest.feature_shape)).astype(np.float32)
        self.y = rng.integers(0, manifest.num_classes, self.num_samples)
        self.controls = None
        vectors = {RESIDUAL: rng.normal(size=d).astype(np.float32)}
        if self.plan.algorithm == "scaffold":
            self.controls = Controls(*rng.normal(0, 0.3, (2, d)).astype(np.float32))
            vectors[CONTROL] = self.controls.device
        self.memory = DeviceMemory(TASK, REPORT, vectors) if self.with_memory else None

    @property
    def binding(self) -> CheckpointBinding:
        manifest = self.program.manifest
        return CheckpointBinding(
            assignment_id=ASSIGNMENT,
            task_id=TASK,
            model_version=3,
            model_sha256="1" * 64,
            program_sha256=manifest.program_sha256,
            parameter_table_sha256=manifest.parameter_table_sha256,
            plan=self.plan,
            shuffle_seed=self.seed,
            slice_size=self.slice_size,
            data_sha256=data_fingerprint(self.x, self.y),
            control_sha256="2" * 64 if self.controls is not None else None,
        )

    def begin(self, state: TrainingState | None = None, controls: Controls | None = None) -> Run:
        return begin_training(
            self.program,
            self.weights,
            (self.x, self.y),
            self.plan,
            self.seed,
            controls=controls or self.controls,
            slice_size=self.slice_size,
            state=state,
        )

    def checkpoint(self, run: Run) -> Checkpoint:
        return Checkpoint(self.binding, run.snapshot(), self.memory)

    def resumed(self, manager: CheckpointManager) -> Run:
        """What a process does that starts: go on with what there is, else begin."""
        found = manager.load(self.binding)
        if found is None:
            return self.begin()
        controls = None
        if self.controls is not None:
            assert found.memory is not None
            controls = Controls(self.controls.server, found.memory.vectors[CONTROL])
        return self.begin(found.state, controls)

    def life(self, manager: CheckpointManager, after: Callable[[Run], object] = lambda _run: None) -> bytes:
        """A process that saves after every call, to its end or its death; the result's bits."""
        run = self.resumed(manager)
        while not run.finished:
            run.advance()
            manager.save(self.checkpoint(run))
            after(run)
        return bits(run.result())

    def undisturbed(self) -> bytes:
        run = self.begin()
        while not run.finished:
            run.advance()
        return bits(run.result())


def bits(result: TrainingResult) -> bytes:
    """All of a result, to the bit."""
    control = b"" if result.control_delta is None else result.control_delta.tobytes()
    gradient = b"" if result.gradient is None else result.gradient.tobytes()
    numbers = (result.num_samples, result.steps, result.first_epoch_loss.hex(), result.last_epoch_loss.hex())
    return result.weights.tobytes() + result.delta.tobytes() + control + gradient + repr(numbers).encode()


def state_bits(state: TrainingState) -> str:
    """All of a state, to the bit."""
    values = vars(state) | {"weights": state.weights.tobytes()}
    if state.accumulator is not None:
        values["accumulator"] = state.accumulator.tobytes()
    return repr(values)
