"""What SCAFFOLD and FedNova are for: fleets whose devices differ, where plain averaging settles in the wrong place.

Least squares, because its optimum is known from the normal equations: loss = 1/2 (a . w - t)^2 per example, the target
``t`` carried as the last feature.
"""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, TrainingDiverged
from client_sdk.protocol.program import MethodSpec, ParameterSpec, Role, TensorSpec, parameter_table_hash
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.training import Controls, LocalTrainer
from tests.devices import make_manifest

D, BATCH = 3, 4


def _f32(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


class LeastSquares:
    """Linear regression behind the ``Program`` protocol."""

    def __init__(self) -> None:
        parameters = (ParameterSpec(name="w", shape=(D,), offset=0),)
        batch = (_f32("x", BATCH, D + 1), TensorSpec(name="y", dtype="int64", shape=(BATCH,)), _f32("mask", BATCH))
        train = MethodSpec(
            name="train",
            role=Role.TRAIN,
            batch_size=BATCH,
            inputs=(_f32("w", D), _f32("lr", 1), *batch),
            outputs=(_f32("w", D), _f32("loss_sum", 1)),
            planned_memory_bytes=0,
        )
        self.manifest = make_manifest(
            parameters=parameters,
            parameter_table_sha256=parameter_table_hash(parameters),
            feature_shape=(D + 1,),
            num_classes=1,
            methods=(train,),
        )

    def run(self, _method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        w, rate, x, _y, mask = inputs
        a, t = x[:, :D].astype(np.float64), x[:, D].astype(np.float64)
        error = (a @ w - t) * mask
        gradient = error @ a / mask.sum()
        return (w - rate[0] * gradient).astype(np.float32), np.array([0.5 * (error**2).sum()], np.float32)

    def close(self) -> None:
        """Nothing to close."""


Shard = tuple[np.ndarray, np.ndarray]


def make_fleet(copies: list[int]) -> list[Shard]:
    """One device each, which holds its own batch of examples so many times: so many equal steps an epoch."""
    rng = np.random.default_rng(3)
    fleet = []
    for count in copies:
        x = np.concatenate([rng.normal(size=(BATCH, D)), rng.normal(0, 3, (BATCH, 1))], axis=1).astype(np.float32)
        fleet.append((np.tile(x, (count, 1)), np.zeros(BATCH * count, np.int64)))
    return fleet


def optimum(fleet: list[Shard]) -> np.ndarray:
    """Minimum of the mean of the devices' mean losses, by the normal equations."""
    first = np.concatenate([x[:BATCH].astype(np.float64) for x, _ in fleet])
    return np.linalg.lstsq(first[:, :D], first[:, D], rcond=None)[0]


def rounds(fleet: list[Shard], plan: TrainingPlan, count: int) -> np.ndarray:
    """The model after so many rounds of full participation, each device weighing alike."""
    trainer = LocalTrainer(LeastSquares())
    w, c = np.zeros(D, np.float32), np.zeros(D, np.float32)
    own = [np.zeros(D, np.float32) for _ in fleet]
    for _ in range(count):
        updates, scales = [], []
        for i, (x, y) in enumerate(fleet):
            controls = Controls(c, own[i]) if plan.algorithm == "scaffold" else None
            result = trainer.train(w, x, y, plan, 0, controls=controls)
            updates.append(result.update(plan).astype(np.float64))
            scales.append(normaliser(plan, result.steps))
            if result.control_delta is not None:
                own[i] = own[i] + result.control_delta
        mean = np.mean(updates, axis=0) * np.mean(scales)
        w = (w + mean[:D]).astype(np.float32)
        if plan.algorithm == "scaffold":
            c = (c + mean[D:]).astype(np.float32)
    return w


def miss(w: np.ndarray, best: np.ndarray) -> float:
    """Distance from the optimum, relative to its size."""
    return float(np.linalg.norm(w - best) / np.linalg.norm(best))


def test_scaffold_reaches_the_optimum_where_averaging_settles_beside_it():
    fleet = make_fleet([1, 1, 1])
    best = optimum(fleet)
    plan = TrainingPlan(local_epochs=20, batch_size=BATCH, learning_rate=0.1)
    averaged = [miss(rounds(fleet, plan, count), best) for count in (300, 400)]
    corrected = miss(rounds(fleet, plan.model_copy(update={"algorithm": "scaffold"}), 300), best)
    assert averaged[0] > 0.05
    assert averaged[1] == pytest.approx(averaged[0], rel=1e-3), "it has settled"
    assert corrected < 1e-5


def test_fednova_forgets_how_many_steps_each_device_took():
    """Devices with 1, 4 and 16 steps an epoch: averaging favours those that step often."""
    fleet = make_fleet([1, 4, 16])
    best = optimum(fleet)
    plan = TrainingPlan(local_epochs=1, batch_size=BATCH, learning_rate=0.002)
    averaged = miss(rounds(fleet, plan, 3000), best)
    normalised = miss(rounds(fleet, plan.model_copy(update={"algorithm": "fednova"}), 3000), best)
    assert averaged > 0.3
    assert normalised < averaged / 10


SCAFFOLD = TrainingPlan(batch_size=BATCH, algorithm="scaffold")
ZERO = np.zeros(D, np.float32)


@pytest.mark.parametrize(
    ("plan", "controls", "error", "message"),
    [
        (SCAFFOLD, None, ConfigurationError, "scaffold needs control variates"),
        (TrainingPlan(batch_size=BATCH), Controls(ZERO, ZERO), ConfigurationError, "fedavg takes no control"),
        (SCAFFOLD, Controls(ZERO[:2], ZERO), ProgramInputError, r"the server's control must be float32\[3\], got"),
        (SCAFFOLD, Controls(ZERO, ZERO.astype(np.float64)), ProgramInputError, "the device's control must be"),
        (SCAFFOLD, Controls(ZERO + np.inf, ZERO), ProgramInputError, "the server's control holds NaN or infinite"),
        (SCAFFOLD, Controls(ZERO, ZERO * np.nan), ProgramInputError, "the device's control holds NaN"),
        (SCAFFOLD, Controls(ZERO + 3e38, ZERO - 3e38), TrainingDiverged, "diverged"),
    ],
)
def test_controls_that_cannot_be_trained_with_are_refused(
    plan: TrainingPlan, controls: Controls | None, error: type[Exception], message: str
):
    (x, y), *_ = make_fleet([1])
    with pytest.raises(error, match=message):
        LocalTrainer(LeastSquares()).train(ZERO, x, y, plan, 0, controls=controls)


def test_training_with_controls_changes_no_input():
    (x, y), *_ = make_fleet([1])
    controls = Controls(ZERO + 1, ZERO + 2)
    for array in (controls.server, controls.device):
        array.flags.writeable = False
    LocalTrainer(LeastSquares()).train(ZERO, x, y, SCAFFOLD, 0, controls=controls)
    assert controls.server.tolist() == [1, 1, 1]
    assert controls.device.tolist() == [2, 2, 2]
