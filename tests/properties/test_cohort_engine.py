"""The cohort engine plays the fleet that the device engine plays: same sessions, same accepted sets, same sums."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import NotEnoughExamples, TrainingDiverged
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.training import TrainingPlan
from server_ref.aggregation.server_optim import OptimizerConfig
from server_ref.aggregation.staleness import StalenessPolicy, StalenessWeighting
from server_ref.assignments import RoundPolicy
from server_ref.config import DivergenceConfig, SelectionConfig, TaskConfig
from server_ref.current_pipeline import CurrentPipeline
from server_ref.evaluation import Evaluation
from server_ref.recipe import build_pipeline
from server_ref.task import Task
from simulator.cohort.clients import Clients
from simulator.cohort.engine import CohortEngine
from simulator.cohort.server import CohortServer, Scoring
from simulator.cohort.trainer import CohortResult
from simulator.errors import FleetCannotTrain
from simulator.population import Population
from simulator.sessions import Outcome
from tests.devices import NUM_PARAMETERS, PARAMETERS, make_manifest
from tests.properties.test_fleet import WORK, EngineLink, Watcher, policies, populations
from tests.properties.test_fleet import run as run_devices

START = np.arange(NUM_PARAMETERS, dtype=np.float32)


class Arithmetic:
    """In place of training: an update that tells device, seed and model apart. Remembers what it was asked for."""

    def __init__(self, at_once=3, hopeless=lambda _device, _seed: False):
        self.at_once = at_once
        self.hopeless = hopeless
        self.windows = []

    def clients_at_once(self, _plan):
        return self.at_once

    def update(self, weights, device, seed):
        return np.sin(np.float32(device + 1) * weights + np.float32(seed)).astype(np.float32)

    def train(self, weights, clients, _plan):
        self.windows.append([client.shuffle_seed for client in clients])
        failures = {
            i: TrainingDiverged("training diverged")
            for i, client in enumerate(clients)
            if self.hopeless(int(client.rows[0]), client.shuffle_seed)
        }
        updates = np.stack([self.update(weights, int(c.rows[0]), c.shuffle_seed) for c in clients])
        losses = np.array([float(c.shuffle_seed) for c in clients])
        return CohortResult(updates, np.full(len(clients), 2), losses, losses, failures)


class NumberedTask(Task):
    """Seeds are assignment numbers, so that a stub's updates can be traced."""

    def shuffle_seed(self, assignment_number):
        return assignment_number


def task_of(policy, **changes):
    """A task of these rounds, without a bundle."""
    settings = TaskConfig(
        bundle=Path("nowhere"),
        rounds=policy.rounds,
        buffer_size=policy.buffer_size,
        concurrency=policy.concurrency,
        refill_at=policy.refill_at,
        lease_s=policy.lease_s,
        weight_cap=policy.weight_cap,
        **{
            "plan": WORK.plan,
            "staleness": StalenessPolicy(max_staleness=policy.max_staleness),
            "divergence": DivergenceConfig(enabled=False),
            **changes,
        },
    )
    assert settings.policy() == policy
    manifest = make_manifest()
    return NumberedTask(
        task_id="0" * 32,
        identity_json="{}",
        manifest=manifest,
        manifest_json=b"",
        manifest_sha256="0" * 64,
        program=b"",
        initial_weights=START,
        layers=SharedLayers.of(manifest.parameters, settings.plan.personal),
        kind=settings.plan.update_kind,
        current=CurrentPipeline(lambda _clip_norm: build_pipeline(settings, manifest)),
        compression=settings.compression,
        settings=settings,
    )


class CohortRun:
    """A run of the cohort engine over stubbed training."""

    def __init__(self, policy, population, trainer=None, *, stop=None, watcher=None, scoring=None, **settings):
        self.trainer = trainer or Arithmetic()
        task = task_of(policy, **settings)
        self.server = CohortServer(task, scoring=scoring)
        self.watcher = watcher or Watcher()
        # What a stub trains on is its own number.
        self.clients = Clients(task, [np.array([d]) for d in range(population.devices)])
        self.engine = CohortEngine(
            self.server,
            self.clients,
            self.trainer,
            population=population,
            # As ``run`` of the device engine's tests reckons durations.
            num_samples=[d % 7 + 1 for d in range(population.devices)],
            work=lambda _device, _session: WORK,
            observer=self.watcher,
            stop=stop or threading.Event(),
        )
        self.finished = self.engine.run()

    @property
    def accepted(self):
        return [(r.closed_at_s, numbers) for r, numbers in zip(self.server.rounds, self.server.counted, strict=True)]


def sessions_of(watcher, fails):
    """Of one that fails: not whether it was too late besides, for then nobody trains it."""
    return [
        (s.device, s.number, s.round_id, s.model_version, s.started_s, None if fails(s.number) else s.arrives_s)
        for s in watcher.sessions
    ]


@settings(max_examples=150)
@given(policies(), populations, st.integers(1, 7), st.none() | st.integers(0, 3))
# Somebody gives an assignment back after a buffer closed and before anybody asks the server, who commits it then.
@example(RoundPolicy(1, 3, 3, 1, 120.0, 100, 3), Population(310, 12), 1, 1)
@example(RoundPolicy(4, 4, 4, 0, 120.0, 100, 2), Population(2, 14), 1, 0)
def test_both_engines_play_the_same_sessions(policy, population, at_once, failing):
    """Also where every fourth assignment comes to nothing, which only training tells."""

    def fails(number):
        return number % 4 == failing

    link = EngineLink(policy)
    link.fails = fails
    with tempfile.TemporaryDirectory() as folder:
        _, devices = run_devices(link, Path(folder) / "j", population)
    cohort = CohortRun(policy, population, Arithmetic(at_once, lambda _device, number: fails(number)))
    assert cohort.finished
    assert cohort.accepted == [(at, [number for number, _ in counted]) for at, counted in link.accepted]
    assert sessions_of(cohort.watcher, fails) == sessions_of(devices, fails)
    assert [r.model_version for r in cohort.server.rounds] == list(range(1, policy.rounds + 1))


@settings(max_examples=40)
@given(policies(), populations, st.sampled_from(StalenessWeighting))
def test_models_are_the_exact_means_of_what_was_counted(policy, population, weighting):
    """By rational arithmetic, from the sessions and the counted numbers alone."""
    if weighting is StalenessWeighting.ADAPTIVE:
        weighting = StalenessWeighting.POLYNOMIAL  # the third needs a declared number of rounds
    staleness_policy = StalenessPolicy(max_staleness=policy.max_staleness, weighting=weighting)
    cohort = CohortRun(policy, population, staleness=staleness_policy)
    by_number = {s.number: s for s in cohort.watcher.sessions}
    full = 1 if weighting is StalenessWeighting.CONSTANT else staleness_policy.scale(0, 0)
    weights, master = [START], START.astype(np.float64)
    for version, counted in enumerate(cohort.server.counted):
        total, denominator = [Fraction(0)] * NUM_PARAMETERS, 0
        for number in counted:
            session = by_number[number]
            update = cohort.trainer.update(weights[session.model_version], session.device, number)
            samples = session.device % 7 + 1
            age = version - session.model_version
            factor = samples * (1 if full == 1 else staleness_policy.scale(age, version))
            total = [t + factor * Fraction(float(u)) for t, u in zip(total, update, strict=True)]
            denominator += samples * full
        master = master + np.array([float(t) for t in total]) / denominator
        weights.append(master.astype(np.float32))
    assert cohort.server.model.weights.tobytes() == weights[-1].tobytes()


@settings(max_examples=40)
@given(policies(), populations, st.integers(1, 7))
def test_training_waits_until_it_is_needed(policy, population, at_once):
    """No more at once than asked for; and in a synchronous round nothing is trained that a full buffer cannot use."""
    cohort = CohortRun(policy, population, Arithmetic(at_once))
    windows = cohort.trainer.windows
    assert max(map(len, windows)) <= at_once
    trained = [number for window in windows for number in window]
    assert len(set(trained)) == len(trained), "nobody is trained twice"
    counted = {number for numbers in cohort.server.counted for number in numbers}
    assert counted <= set(trained)
    if policy.max_staleness == 0:
        assert counted == set(trained)
    arrivals = {s.number: (s.arrives_s, s.number) for s in cohort.watcher.sessions}
    for window in windows:
        assert window == sorted(window, key=arrivals.__getitem__)


def test_the_window_does_not_change_the_model():
    policy = RoundPolicy(4, 9, 2, 3, 120.0, 100, 5)
    models = {CohortRun(policy, Population(3, 20), Arithmetic(n)).server.model.sha256 for n in (1, 2, 5, 100)}
    assert len(models) == 1


def test_another_seed_is_another_run():
    policy = RoundPolicy(4, 4, 4, 0, 120.0, 100, 2)
    assert len({CohortRun(policy, Population(seed, 20)).server.model.sha256 for seed in range(3)}) == 3


# --- what goes wrong --------------------------------------------------------------------------------------------

SYNCHRONOUS = RoundPolicy(4, 4, 4, 0, 120.0, 100, 3)


def test_a_client_that_diverges_gives_its_assignment_back():
    cohort = CohortRun(SYNCHRONOUS, Population(5, 20), Arithmetic(hopeless=lambda device, _: device % 4 == 0))
    assert cohort.finished
    assert [r.reports for r in cohort.server.rounds] == [4, 4, 4]
    assert cohort.engine.failures
    for failure in cohort.engine.failures:
        assert failure.session.device % 4 == 0
        assert isinstance(failure.error, TrainingDiverged)
        assert failure.session.end.outcome is Outcome.FAILED
        assert failure.session.end.reason == "training-diverged"
        assert failure.session.arrives_s is None
        assert failure.session.number not in {n for counted in cohort.server.counted for n in counted}


def test_a_client_with_too_few_examples_gives_its_assignment_back():
    class Judging(Arithmetic):
        def train(self, weights, clients, plan):
            result = super().train(weights, clients, plan)
            lonely = {i: NotEnoughExamples("one example") for i, c in enumerate(clients) if c.rows[0] % 4 == 0}
            return replace(result, failures=lonely)

    cohort = CohortRun(SYNCHRONOUS, Population(5, 20), Judging())
    assert cohort.finished
    assert cohort.engine.failures
    for failure in cohort.engine.failures:
        assert failure.session.device % 4 == 0
        assert failure.session.end.reason == "too-few-examples"


def test_a_fleet_that_cannot_train_at_all_ends_the_run():
    with pytest.raises(FleetCannotTrain, match=r"21 sessions in a row .* by training-diverged"):
        CohortRun(SYNCHRONOUS, Population(5, 20), Arithmetic(hopeless=lambda _device, _seed: True))


def test_an_update_beyond_the_declared_range_is_given_back_too():
    class TooLarge(Arithmetic):
        def update(self, weights, device, seed):
            return np.float32(1e6 if device % 2 else 1) * super().update(weights, device, seed)

    cohort = CohortRun(SYNCHRONOUS, Population(5, 20), TooLarge())
    assert {failure.session.device % 2 for failure in cohort.engine.failures} == {1}
    assert cohort.finished


def test_a_model_that_would_overflow_lives_on():
    cohort = CohortRun(SYNCHRONOUS, Population(5, 20), optimizer=OptimizerConfig(learning_rate=1e39))
    assert cohort.finished
    assert cohort.server.model.weights.tobytes() == START.tobytes()
    assert [(r.reports, r.measurements.unchanged) for r in cohort.server.rounds] == [(4, "InvalidUpdate")] * 3


def test_a_run_that_diverges_is_halted():
    class Growing(Arithmetic):
        def update(self, weights, _device, _seed):
            return (weights * np.float32(3)).astype(np.float32)

    policy = RoundPolicy(4, 4, 4, 0, 120.0, 100, 100)
    cohort = CohortRun(policy, Population(5, 20), Growing(), divergence=DivergenceConfig(), max_abs=1e8)
    assert cohort.finished
    assert cohort.server.halted
    assert len(cohort.server.rounds) < 20


@pytest.mark.parametrize("selection", ["fair", "fast"])
def test_selection_turns_devices_away(selection):
    policy = RoundPolicy(4, 4, 4, 0, 120.0, 100, 12)
    chosen = CohortRun(policy, Population(5, 12), selection=SelectionConfig(policy=selection))
    anybody = CohortRun(policy, Population(5, 12))
    assert chosen.finished
    assert chosen.accepted != anybody.accepted


def test_stop_ends_the_run_where_it_is():
    stop = threading.Event()

    class StopAfterFirstRound(Watcher):
        def advanced(self, rounds_committed):
            super().advanced(rounds_committed)
            stop.set()

    cohort = CohortRun(SYNCHRONOUS, Population(5, 20), stop=stop, watcher=StopAfterFirstRound())
    assert not cohort.finished
    assert cohort.watcher.versions == [1]
    assert len(cohort.server.rounds) == 1


# --- meta-learning and personal layers --------------------------------------------------------------------------


def test_gradients_are_subtracted_where_deltas_are_added():
    by_algorithm = {
        algorithm: CohortRun(
            RoundPolicy(4, 4, 4, 0, 120.0, 100, 1),
            Population(5, 20),
            plan=TrainingPlan(algorithm=algorithm, meta=MetaPlan()),
            optimizer=OptimizerConfig(learning_rate=0.5),
        ).server.model.weights
        - START
        for algorithm in ("reptile", "maml", "fomaml", "per-fedavg")
    }
    moved = by_algorithm.pop("reptile")
    assert moved.any()
    for other in by_algorithm.values():
        assert np.allclose(other, -moved, rtol=0, atol=1e-6)


class Counting(Arithmetic):
    """Its clients' personal layers say how often they were trained."""

    def train(self, weights, clients, plan):
        layers = SharedLayers.of(PARAMETERS, plan.personal)
        result = super().train(weights, clients, plan)
        before = [layers.personal_of(weights) if c.own is None else c.own for c in clients]
        return replace(result, updates=layers.gather(result.updates.T).T, personal=np.stack(before) + np.float32(1))


@settings(max_examples=30)
@given(policies(), populations, st.none() | st.integers(0, 3))
# Somebody is still at work when the last round is committed.
@example(RoundPolicy(2, 8, 7, 2, 120.0, 100, 3), Population(399, 18, dropout=0.4), 1)
def test_personal_layers_are_kept_where_the_report_was_accepted_and_never_reach_the_server(policy, population, failing):
    plan = TrainingPlan(personal=("bias",))
    layers = SharedLayers.of(PARAMETERS, plan.personal)
    trainer = Counting(3, lambda _device, number: number % 4 == failing)
    cohort = CohortRun(policy, population, trainer, plan=plan)
    ends = [(s.device, s.end) for s in cohort.watcher.sessions if s.end is not None and s.end.outcome == "accepted"]
    accepted = Counter(device for device, _ in ends)
    kept = cohort.clients.personal_layers()
    assert kept.keys() == accepted.keys()
    for device, own in kept.items():
        assert (own == layers.personal_of(START) + accepted[device]).all()
    model = cohort.server.model.weights
    assert layers.personal_of(model).tobytes() == layers.personal_of(START).tobytes()
    assert (layers.gather(model) != layers.gather(START)).any()
    assert {end.bytes_up for _, end in ends} == {4 * layers.size}


# --- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "scored"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_every_nth_model_and_the_last_one_are_scored(every, scored):
    asked = []

    def evaluate(weights):
        asked.append(weights.tobytes())
        return Evaluation(0.5, 1.0, 10)

    policy = RoundPolicy(4, 4, 4, 0, 120.0, 100, 5)
    cohort = CohortRun(policy, Population(5, 20), scoring=Scoring(evaluate, every))
    rounds = cohort.server.rounds
    assert [r.model_version for r in rounds if r.validation_accuracy is not None] == scored
    assert len(set(asked)) == len(scored)
    assert asked[-1] == cohort.server.model.weights.tobytes()


def test_a_rounds_record_says_what_its_devices_reported():
    cohort = CohortRun(SYNCHRONOUS, Population(5, 20))
    by_number = {s.number: s for s in cohort.watcher.sessions}
    for committed, counted in zip(cohort.server.rounds, cohort.server.counted, strict=True):
        weights = [by_number[n].device % 7 + 1 for n in counted]
        # The stub's losses are the seeds, which here are the assignment numbers.
        mean = sum(w * n for w, n in zip(weights, counted, strict=True)) / sum(weights)
        assert committed.train_loss == pytest.approx(mean)
        assert committed.closed_at_s == max(by_number[n].arrives_s for n in counted)
    assert all(s.end.bytes_up == 4 * NUM_PARAMETERS for s in cohort.watcher.sessions if s.end.outcome == "accepted")
