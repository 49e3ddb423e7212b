"""One cell of a study: a fleet trained under an attack, by the very pipeline stages that the server runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from client_sdk.protocol.errors import ProtocolError, TooManyByzantine
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.updates import UpdateKind
from mobile_export.checks import parameter_table
from mobile_export.models import build_model
from server_ref.aggregation.batch import EncodedUpdate, Facts, Update
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.server_optim import Sgd
from simulator.adversaries import AttackPlan, Roster
from simulator.adversaries.base import seeded
from simulator.adversaries.examples import stamp
from simulator.adversaries.on_data import Backdoor
from simulator.adversaries.vectors import within
from simulator.cohort.attackers import CohortAttackers
from simulator.cohort.model import BatchedModel
from simulator.cohort.queue import Broadcast
from simulator.cohort.trainer import CohortTrainer, LocalWork
from simulator.datasets import Dataset, load_dataset
from simulator.partition import deal, parse_partition
from simulator.prepare import INITIAL_WEIGHTS_SEED
from simulator.robustness.config import MEAN, NONE, Cell, StudySettings

# The server's default bound on a value: crafted updates are scaled into it, honest ones never reach it.
MAX_ABS: Final = 1024.0


class CellResult(BaseModel):
    """What a cell came to.

    Attributes:
        rule: As ``RuleChoice`` prints it.
        attack: As it is written on the command line, or ``none``.
        fraction: Part of the fleet that attacks.
        seed: Of the cell.
        num_byzantine: Attackers, which is also what the rule reckons with.
        status: ``completed``; ``refused``, where the rule does not stand so many; ``collapsed``, where so many devices
            could not train on what the model had become that no further round was possible.
        rounds: Model updates made.
        accuracy: Of the last model on the test split; None where refused.
        trigger_success: Of the test images of other classes, the part that the trigger turns into its target: the
            backdoor's own where that is the attack, the default one where there is none; else None.
        detail: Why it was refused or collapsed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    attack: str
    fraction: float
    seed: int
    num_byzantine: int
    status: Literal["completed", "refused", "collapsed"]
    rounds: int
    accuracy: float | None = None
    trigger_success: float | None = None
    detail: str = ""

    @property
    def key(self) -> tuple[str, str, float, int]:
        """``Cell.key`` of its cell."""
        return (self.rule, self.attack, self.fraction, self.seed)


@dataclass(frozen=True)
class _Bench:
    """What cells of one model have in common."""

    dataset: Dataset
    model: BatchedModel
    initial: Float32Array

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, dataset_name: str, model_name: str) -> _Bench:
        dataset = load_dataset(dataset_name)
        module = build_model(model_name, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED)
        initial = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
        return cls(dataset, BatchedModel(module, parameter_table(module)), initial)


def run_cell(settings: StudySettings, cell: Cell) -> CellResult:
    """Train the cell's fleet and score its last model.

    Returns:
        A function of the arguments, to the bit, on one machine with one thread setting.

    Raises:
        DatasetUnavailable: The data set has to be fetched first.
        PartitionError: More devices than examples.
        AttackError: The attack cannot be carried out.
    """
    facts = {
        "rule": str(cell.rule),
        "attack": str(cell.attack or NONE),
        "fraction": cell.fraction,
        "seed": cell.seed,
        "num_byzantine": settings.attackers(cell.fraction),
    }
    bench = _Bench.of(settings.dataset, settings.model)
    try:
        pipeline = _pipeline(settings, cell, len(bench.initial))
    except TooManyByzantine as e:
        return CellResult(**facts, status="refused", rounds=0, detail=str(e))
    fleet = _Fleet(settings, cell, bench)
    state = pipeline.optimizer.initial(bench.initial)
    rounds, detail = 0, ""
    for round_id in range(settings.rounds):
        updates = _admitted(pipeline, fleet.updates(round_id, state.weights), round_id)
        try:
            if not updates:
                detail = "no device could train on the model any more"
                break
            fold = pipeline.start()
            fold.add(updates)
            state = pipeline.apply(state, pipeline.finish(fold), round_id=round_id)
        except TooManyByzantine as e:
            detail = f"only {len(updates)} devices could train on the model: {e}"
            break
        except ProtocolError as e:
            # The old model lives on, as it does on the server.
            detail = str(e)
        rounds += 1
    return CellResult(
        **facts,
        status="completed" if rounds == settings.rounds else "collapsed",
        rounds=rounds,
        accuracy=bench.model.evaluate(state.weights, bench.dataset.test.x, bench.dataset.test.y).accuracy,
        trigger_success=_trigger_success(cell, bench, state.weights),
        detail=detail,
    )


def _pipeline(settings: StudySettings, cell: Cell, size: int) -> Pipeline:
    reduce: ExactMean | RobustRule = ExactMean()
    if cell.rule.name != MEAN:
        reduce = RobustRule(
            cell.rule.name,
            num_byzantine=settings.attackers(cell.fraction),
            options=cell.rule.options,
            seed=cell.seed,
        )
    facts = Facts(size=size, kind=UpdateKind.DELTA, capacity=settings.devices, count=settings.devices, max_abs=MAX_ABS)
    return Pipeline.build(reduce, Sgd(), facts=facts)


def _admitted(pipeline: Pipeline, updates: list[EncodedUpdate], round_id: int) -> list[Update]:
    """Those that a server would take; what it refuses, it does without."""
    found = []
    for update in updates:
        try:
            found.append(pipeline.admit(update, round_id))
        except ProtocolError:
            continue
    return found


class _Fleet:
    """The devices of a cell: every one of them trains in every round."""

    def __init__(self, settings: StudySettings, cell: Cell, bench: _Bench) -> None:
        dataset, devices = bench.dataset, settings.devices
        self._cell = cell
        self._plan = settings.plan
        self._parts = deal(parse_partition(settings.partition), dataset.train.y, devices, cell.seed)
        self._attackers: CohortAttackers | None = None
        data = dataset.train
        if cell.attack is not None:
            plan = AttackPlan(
                attack=cell.attack,
                roster=Roster.of(cell.seed, devices, cell.fraction),
                fraction=cell.fraction,
                seed=cell.seed,
                reports=devices,
                num_classes=dataset.num_classes,
            )
            data = plan.poisoned(dataset.train, self._parts)
            rehearsal = CohortTrainer(bench.model, dataset.train)
            self._attackers = CohortAttackers(plan, rehearsal, self._parts, self._plan)
        self._trainer = CohortTrainer(bench.model, data)

    def updates(self, round_id: int, weights: Float32Array) -> list[EncodedUpdate]:
        """What arrives at the server; nothing from devices whose training diverged."""
        devices = range(len(self._parts))
        work = [LocalWork(self._parts[device], self._shuffle_seed(round_id, device)) for device in devices]
        trained = self._trainer.train(weights, work, self._plan)
        broadcast = Broadcast(round_id, weights)
        return [
            EncodedUpdate(device, self._sent(device, broadcast, trained.updates[device]))
            for device in devices
            if device not in trained.failures
        ]

    def _sent(self, device: int, broadcast: Broadcast, honest: Float32Array) -> Float32Array:
        if self._attackers is None or not self._attackers.attacks(device):
            return honest
        return within(self._attackers.craft(device, broadcast, honest), MAX_ABS)

    def _shuffle_seed(self, round_id: int, device: int) -> int:
        return int(seeded("study-shuffle", self._cell.seed, round_id, device).integers(2**53))


def _trigger_success(cell: Cell, bench: _Bench, weights: Float32Array) -> float | None:
    attack = Backdoor() if cell.attack is None else cell.attack
    if not isinstance(attack, Backdoor):
        return None
    test = bench.dataset.test
    others = test.y != attack.target
    wanted: npt.NDArray[np.int64] = np.full(int(others.sum()), attack.target, np.int64)
    return bench.model.evaluate(weights, stamp(test.x[others], attack.size), wanted).accuracy
