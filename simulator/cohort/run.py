"""One run by the cohort engine: the task that an embedded server would have, played without the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from client_sdk.protocol.training import TrainingPlan
from mobile_export.models import build_model
from server_ref import status
from server_ref.task import Task
from simulator.cohort.attackers import CohortAttackers
from simulator.cohort.clients import Clients
from simulator.cohort.engine import CohortEngine
from simulator.cohort.model import BatchedModel
from simulator.cohort.server import CohortServer, Scoring
from simulator.cohort.trainer import CohortTrainer
from simulator.ending import Ending, played
from simulator.folder import RunFolder
from simulator.interrupt import stop_on_interrupt
from simulator.journal import Journal
from simulator.monitor import Display, RunMonitor
from simulator.personalization.models import ModelKeeper, Models
from simulator.prepare import INITIAL_WEIGHTS_SEED, Fleet, Prepared, Say, SessionCosts
from simulator.view import PrivacyClaim


@dataclass(frozen=True)
class CohortSetting:
    """A run that is ready to begin: the task, costs and seeds that it would have with an embedded server."""

    folder: RunFolder
    fleet: Fleet
    task: Task
    costs: SessionCosts
    plans: list[TrainingPlan]

    @classmethod
    def prepare(cls, folder: RunFolder, fleet: Fleet, say: Say) -> Self:
        """Export the model, whose size decides how long sessions last, and check the task's settings.

        Raises:
            PocketfedError: Set-up failed.
        """
        prepared = Prepared.of(folder, fleet, say)
        return cls(folder, fleet, prepared.task, prepared.costs, prepared.plans)

    def model(self) -> BatchedModel:
        """The model that was exported, for many weight vectors at once."""
        dataset = self.fleet.dataset
        module = build_model(self.folder.config.model, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED)
        return BatchedModel(module, self.task.manifest.parameters)

    def play(
        self, journal: Journal, display: Display, say: Say, *, threads: int | None = None, score_every: int = 1
    ) -> tuple[RunMonitor, Ending]:
        """Play it to its end, or until a signal stops it.

        Args:
            journal: Is told how long rounds took.
            display: Shows progress.
            say: Is told what deserves a line.
            threads: Batches that are trained at the same time; by default one a core. Changes no bit.
            score_every: Every how many rounds the model is scored on the validation split; the last one always is.
        """
        config, fleet, task, dataset = self.folder.config, self.fleet, self.task, self.fleet.dataset
        model = self.model()
        trainer = CohortTrainer(model, fleet.training_data, threads=threads)
        keeper = ModelKeeper(config.rounds)
        server = CohortServer(
            task,
            scoring=Scoring(lambda w: model.evaluate(w, dataset.validation.x, dataset.validation.y), score_every),
            device_id=self._device_ids(),
            tier=fleet.population.tier,
            on_model=keeper.keep if config.adaptation is not None else lambda _number, _weights: None,
        )
        monitor = RunMonitor(
            lambda since: server.rounds[since:],
            journal,
            display,
            of_rounds=config.rounds,
            cohort=config.cohort_size,
            dense_report_bytes=4 * task.pipeline.entry.size,
            scored=score_every == 1,
        )
        clients = Clients(task, fleet.parts, self._attackers(model, threads), self.plans)
        with stop_on_interrupt(say) as stop:
            engine = CohortEngine(
                server,
                clients,
                trainer,
                population=fleet.population,
                num_samples=fleet.num_samples,
                work=lambda device, session: self.costs.workload(self.plans[device], session),
                observer=monitor,
                stop=stop,
            )
            finished, stuck = played(engine.run)
        monitor.refresh()
        if engine.failures:
            last = engine.failures[-1].error
            say(f"{len(engine.failures)} sessions gave their assignments back, the last one because: {last}")
        sessions = {session.number: session for session in monitor.sessions}
        claimed = status.privacy_of(task)
        return monitor, Ending(
            finished=finished,
            model_sha256=server.model.sha256 if server.version > 0 else None,
            evaluation=model.evaluate(server.model.weights, dataset.test.x, dataset.test.y) if finished else None,
            counted=[[sessions[number] for number in numbers] for numbers in server.counted],
            parameters=task.manifest.num_parameters,
            server="none",
            runtime="torch",
            halted=server.halted or stuck,
            pipeline={slot.value: stage.title for slot, stage in task.pipeline.stages.items()},
            privacy=None if claimed is None else PrivacyClaim.model_validate(claimed),
            plans=self.plans,
            models=Models(keeper.by_round, clients.personal_layers())
            if finished and config.adaptation is not None
            else None,
        )

    def _device_ids(self) -> Callable[[int], str]:
        """Real ids, which follow from keys and are dear, where something is drawn by them."""
        if self.task.settings.selection.policy == "any":
            return str
        population = self.fleet.population
        return functools.cache(lambda device: population.identity(device).device_id)

    def _attackers(self, model: BatchedModel, threads: int | None) -> CohortAttackers | None:
        fleet = self.fleet
        if fleet.attack is None:
            return None
        rehearsal = CohortTrainer(model, fleet.honest_data, threads=threads)
        plan = self.task.settings.plan
        return CohortAttackers(fleet.attack, rehearsal, fleet.parts, plan, self.plans, layers=self.task.layers)
