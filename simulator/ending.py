"""What is known when the last event of a run is over, and the results that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client_sdk.protocol.training import TrainingPlan
from server_ref.evaluation import Evaluation
from server_ref.selection import jain_index
from simulator.config import SimulationConfig
from simulator.days import days_of
from simulator.errors import FleetCannotTrain
from simulator.monitor import RunMonitor, participation, slow_share
from simulator.personalization.models import Models
from simulator.population import examples_trained
from simulator.prepare import Fleet
from simulator.results import (
    DatasetFacts,
    PersonalizationResult,
    PrivacyResult,
    SecrecyResult,
    SimulationResults,
    versions,
)
from simulator.sessions import Session
from simulator.view import PrivacyClaim, Secrecy


@dataclass(frozen=True)
class Ending:
    """How a run ended, whoever played it.

    Attributes:
        finished: Whether the last round is committed, or the server halted training before it.
        model_sha256: Content hash of the newest model; None before the first round.
        evaluation: Of the last model on the test split; None where the run is not finished.
        counted: The sessions that each round counted.
        parameters: Length of the model's weight vector.
        server: ``embedded``, ``none``, or the address of a foreign one.
        runtime: What ran the model.
        halted: Why training was halted; None if it was not.
        pipeline: Slot -> what happens to updates there.
        privacy: What is claimed, and spent; None for nothing.
        secrecy: How updates were shared; None if they were not.
        plans: What each device trained; None where a foreign server decided.
        models: That devices adapt, to see what it gives; None where nobody asked for that, or the run is not finished.
    """

    finished: bool
    model_sha256: str | None
    evaluation: Evaluation | None
    counted: list[list[Session]]
    parameters: int
    server: str
    runtime: str
    halted: str | None
    pipeline: dict[str, str]
    privacy: PrivacyClaim | None = None
    secrecy: Secrecy | None = None
    plans: Sequence[TrainingPlan] | None = None
    models: Models | None = None


def played(run: Callable[[], bool]) -> tuple[bool, str | None]:
    """Play a fleet to its end: whether it was reached, and why early if no device delivers anything any more."""
    try:
        return run(), None
    except FleetCannotTrain as e:
        return True, str(e)


def _secrecy(config: SimulationConfig, told: Secrecy | None) -> SecrecyResult | None:
    """What the server says, with what is known here: where the aggregators of a server of our own are."""
    if told is None:
        return None
    embedded = told.embedded if config.server is not None else config.aggregators == "embedded"
    return SecrecyResult(**{**told.model_dump(), "embedded": embedded})


def results_of(
    config: SimulationConfig,
    fleet: Fleet,
    monitor: RunMonitor,
    ending: Ending,
    *,
    workers: int,
    personalization: PersonalizationResult | None = None,
) -> SimulationResults:
    """What ``results.json`` says of a run.

    Args:
        config: The run.
        fleet: Who took part.
        monitor: What it saw.
        ending: How it ended.
        workers: Training threads.
        personalization: What adaptation gave, where that was asked for.
    """
    attack = fleet.attack
    rounds = monitor.round_results() if attack is None else monitor.round_results(ending.counted, attack.attacks)
    times = participation(fleet.population, ending.counted)
    standing = monitor.standing()
    seconds = sum(r.seconds for r in rounds) + (0.0 if ending.finished else monitor.open_round_s)
    evaluation, dataset = ending.evaluation, fleet.dataset
    examples = None
    if ending.plans is not None:
        examples = [examples_trained(plan, n) for plan, n in zip(ending.plans, fleet.num_samples, strict=True)]
    return SimulationResults(
        status="completed" if ending.finished else "interrupted",
        final_accuracy=None if evaluation is None else evaluation.accuracy,
        final_loss=None if evaluation is None or not math.isfinite(evaluation.loss) else evaluation.loss,
        model_sha256=ending.model_sha256,
        halted=ending.halted,
        pipeline=ending.pipeline,
        repeatable=config.repeatable,
        privacy=None if ending.privacy is None else PrivacyResult(**ending.privacy.model_dump()),
        secrecy=_secrecy(config, ending.secrecy),
        rounds=rounds,
        tiers=monitor.tier_results(fleet.population, ending.counted, examples),
        days=days_of(fleet.population, monitor.sessions),
        personalization=personalization,
        refusals=monitor.refusals(ending.counted),
        jain_index=jain_index(times),
        slow_share=slow_share(fleet.population, times),
        sessions=standing.sessions,
        seconds=seconds,
        clients_per_second=standing.sessions / max(seconds, 1e-9),
        bytes_up=standing.bytes_up,
        bytes_down=standing.bytes_down,
        virtual_seconds=None if config.server else (rounds[-1].closed_at_s if rounds else 0.0),
        config=config,
        server=ending.server,
        runtime=ending.runtime,
        workers=workers,
        dataset=DatasetFacts(
            name=dataset.name,
            sha256=dataset.sha256,
            train=len(dataset.train),
            validation=len(dataset.validation),
            test=len(dataset.test),
        ),
        parameters=ending.parameters,
        versions=versions(),
    )
