"""Handwritten digits, two classes a device: a global model by Reptile over SDK clients, and newcomers to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from client_sdk import DeviceProfile, MobileClient, PersonalizationConfig, PersonalizedMobileClient
from client_sdk.local_training import flat
from client_sdk.personalizer import judge
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.program import WEIGHTS_FILE, Float32Array, Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import load_program

RATE, STEPS = 0.2, 5
PLAN = TrainingPlan(algorithm="reptile", batch_size=8, learning_rate=RATE, meta=MetaPlan(inner_steps=STEPS))
_DEVICES_A_ROUND, _CLASSES, _EXAMPLES = 8, 2, 24
_TRAINING = 1200  # of 1797 examples; newcomers have the others


@dataclass(frozen=True)
class Newcomer:
    """A device that has not trained the global model: ten examples of its own, and others like them that judge."""

    own: tuple[Float32Array, np.ndarray]
    later: tuple[Float32Array, np.ndarray]


class DigitsWorld:
    """All digits, and the global model after each round."""

    def __init__(self, bundle: Path, rounds: int) -> None:
        self.program: Program = load_program(bundle, "native")
        manifest = self.program.manifest
        x, y = load_digits(return_X_y=True)
        self._x = (x / 16).astype(np.float32).reshape(-1, *manifest.feature_shape)
        self._y = y.astype(np.int64)
        order = np.random.default_rng(0).permutation(len(y))
        self._train, self._test = order[:_TRAINING], order[_TRAINING:]
        start = decode_frame((bundle / WEIGHTS_FILE).read_bytes()).tensors
        self.models = [flat(start, manifest)]
        rng = np.random.default_rng(1)
        client = MobileClient(self.program, DeviceProfile("device"))
        for _ in range(rounds):
            self.models.append(self._round(client, rng))

    def _round(self, client: MobileClient, rng: np.random.Generator) -> Float32Array:
        weights, deltas = self.models[-1], []
        for _ in range(_DEVICES_A_ROUND):
            rows = self._draw(self._train, _EXAMPLES, rng)[0]
            seed = int(rng.integers(2**32))
            update = client.train_local_model(
                (self._x[rows], self._y[rows]), weights=weights, plan=PLAN, shuffle_seed=seed
            )
            assert update is not None
            deltas.append(flat(update.gradients, self.program.manifest))
        return (weights + np.mean(deltas, axis=0)).astype(np.float32)

    def newcomer(self, seed: int) -> Newcomer:
        rows, classes = self._draw(self._test, 10, np.random.default_rng(1000 + seed))
        later = [row for row in self._test if self._y[row] in classes and row not in set(rows.tolist())][:80]
        return Newcomer((self._x[rows], self._y[rows]), (self._x[later], self._y[later]))

    def client(self, newcomer: Newcomer, **choices: object) -> PersonalizedMobileClient:
        config = PersonalizationConfig.model_validate({"inner_steps": STEPS, "inner_lr": RATE} | choices)
        return PersonalizedMobileClient(
            self.program, DeviceProfile("newcomer"), personalization_config=config, data=newcomer.own
        )

    def accuracy(self, weights: Float32Array, newcomer: Newcomer) -> float:
        return judge(self.program, weights, *newcomer.later).accuracy

    def _draw(self, rows: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Some rows of two classes, about as many of each, and the classes."""
        classes = rng.choice(10, _CLASSES, replace=False)
        each = [rng.permutation(rows[self._y[rows] == label])[: count // _CLASSES + 1] for label in classes]
        return rng.permutation(np.concatenate(each))[:count], classes
