"""Training of one cell: a server that takes plain means, and a fleet of which some devices never take part.

The devices' work is that of the cohort engine, which computes what the SDK computes. There is neither time, loss nor
noise here: what those do is another part of the study, which plays whole runs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, ParameterSpec
from client_sdk.protocol.training import Algorithm, TrainingPlan
from mobile_export.models import build_model
from server_ref.aggregation.server_optim import ServerOptimizer
from simulator.cohort.model import BatchedModel
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.config import SimulationConfig
from simulator.prepare import INITIAL_WEIGHTS_SEED, Fleet

Int64Array = npt.NDArray[np.int64]

INNER_STEPS: Final = 5
"""Steps of every device in every round, and of adaptation unless a world says otherwise: all methods do as many."""


@dataclass(frozen=True)
class World:
    """A fleet and its data.

    Attributes:
        name: In tables.
        dataset: Name of the data set.
        model: Name of the model.
        partition: How labels, or groups, are dealt out.
        devices: That train.
        newcomers: Devices of the same kind that never do.
        cohort: That train in a round.
        batch_size: Of every step of training.
        adaptation_batch: Of every step of adaptation; None: the same.
        adaptation_rate: Likewise; None: that of the method.
        adaptation_steps: That make a personal model.
        tests: Examples that judge each device.
        skew: How pictures differ; None: they do not.
    """

    name: str
    dataset: str
    model: Literal["mlp", "byte-mlp"]
    partition: str
    devices: int
    newcomers: int
    cohort: int
    batch_size: int
    adaptation_batch: int | None = None
    adaptation_rate: float | None = None
    adaptation_steps: int = INNER_STEPS
    tests: int = 50
    skew: str | None = None

    def fleet(self, seed: int) -> Fleet:
        """All devices, newcomers last.

        Raises:
            DatasetUnavailable: The data has to be fetched first.
        """
        settings = {
            "dataset": self.dataset,
            "model": self.model,
            "partition": self.partition,
            "devices": self.devices + self.newcomers,
            "skew": self.skew,
            "seed": seed,
        }
        return Fleet.of(SimulationConfig.parse(settings))


@dataclass(frozen=True)
class Method:
    """How a fleet is trained.

    Attributes:
        name: In tables.
        algorithm: What devices send.
        learning_rate: Alpha, of local training and of adaptation.
        server: How the mean of what they send is applied.
        personal: Layers that each device keeps for itself.
    """

    name: str
    algorithm: Algorithm
    learning_rate: float
    server: ServerOptimizer
    personal: tuple[str, ...] = ()

    def plan(self, world: World, inner_steps: int = INNER_STEPS) -> TrainingPlan:
        """What devices do in a round: as many steps whatever the algorithm."""
        meta = self.algorithm in META_ALGORITHMS
        return TrainingPlan(
            algorithm=self.algorithm,
            batch_size=world.batch_size,
            learning_rate=self.learning_rate,
            # Per-FedAvg's server rate is its local meta rate: then the mean of what is sent is the mean of the weights.
            meta=MetaPlan(inner_steps=inner_steps, meta_learning_rate=self.server.learning_rate) if meta else None,
            local_epochs=1 if meta else 1000,
            max_steps=None if meta else inner_steps,
            personal=self.personal,
        )


@dataclass(frozen=True)
class Trained:
    """What training led to.

    Attributes:
        model: What weights are weights of.
        fleet: All devices.
        layers: Which of the weights are shared.
        by_round: Round -> global weights, float32[d]: those that were asked for, and the last ones.
        own: Device -> its personal layers after its last session; nobody's where there are none.
    """

    model: BatchedModel
    fleet: Fleet
    layers: SharedLayers
    by_round: Mapping[int, Float32Array]
    own: Mapping[int, Float32Array] = field(default_factory=dict)

    @property
    def weights(self) -> Float32Array:
        """The last global weights."""
        return self.by_round[max(self.by_round)]

    def starts(self, devices: Collection[int]) -> Float32Array:
        """Where devices adapt from, float32[n, d]: the global weights with their own layers, if they have some."""
        weights = self.weights
        return np.stack(
            [self.layers.with_personal(weights, self.own[d]) if d in self.own else weights for d in devices]
        )

    @classmethod
    def of(
        cls,
        world: World,
        method: Method,
        *,
        rounds: int,
        seed: int,
        keep: Collection[int] = (),
        threads: int | None = None,
    ) -> Self:
        """Train.

        Args:
            world: Who and with what.
            method: How.
            rounds: Model updates.
            seed: Fixes everything.
            keep: Rounds whose models are kept beside the last one; 0 is the initial model.
            threads: As for ``CohortTrainer``; changes no bit.

        Raises:
            DatasetUnavailable: The data has to be fetched first.
        """
        fleet = _fleet(world, seed)
        module, weights = _initial(world.model, fleet.dataset.feature_shape, fleet.dataset.num_classes)
        layers = SharedLayers.of(module.parameters, method.personal)
        trainer = CohortTrainer(module, fleet.honest_data, threads=threads)
        plan = method.plan(world)
        rng = np.random.default_rng([seed, 0x7374_7564])
        state = method.server.initial(layers.gather(weights))
        kept = {0: weights}
        own: dict[int, Float32Array] = {}
        for number in range(1, rounds + 1):
            invited = np.sort(rng.choice(world.devices, world.cohort, replace=False)).tolist()
            shuffles = rng.integers(0, 2**63, world.cohort).tolist()
            work = [
                LocalWork(fleet.parts[d], shuffle, own=own.get(d)) for d, shuffle in zip(invited, shuffles, strict=True)
            ]
            result = trainer.train(weights, work, plan)
            fit = [i for i in range(len(work)) if i not in result.failures]
            if fit:
                mean = result.updates[fit].mean(axis=0, dtype=np.float64)
                state = method.server.step(state, mean, plan.update_kind)
                weights = layers.with_shared(weights, state.weights)
            if result.personal is not None:
                own |= {invited[i]: result.personal[i] for i in fit}
            if number in keep or number == rounds:
                kept[number] = weights
        return cls(module, fleet, layers, {r: w for r, w in kept.items() if r in keep or r == rounds}, own)


@functools.lru_cache(maxsize=2)
def _fleet(world: World, seed: int) -> Fleet:
    return world.fleet(seed)


def _initial(name: str, feature_shape: tuple[int, ...], num_classes: int) -> tuple[BatchedModel, Float32Array]:
    """The model that a run would export, and its weights."""
    module = build_model(name, feature_shape, num_classes, INITIAL_WEIGHTS_SEED)
    table, offset = [], 0
    for parameter_name, parameter in module.named_parameters():
        table.append(ParameterSpec(name=parameter_name, shape=tuple(parameter.shape), offset=offset))
        offset += parameter.numel()
    flat = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()]).astype(np.float32)
    return BatchedModel(module, tuple(table)), flat
