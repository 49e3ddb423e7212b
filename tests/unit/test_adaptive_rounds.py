"""Adaptive clipping at the server: the clip norm belongs to a model version, and follows releases and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Assignment
from server_ref.aggregation import EncodedUpdate, Pipeline
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm, fewest_updates, split_noise
from server_ref.aggregation.batch import PrivateAggregate
from server_ref.aggregation.calibration import composed_multiplier, gaussian_epsilon
from server_ref.assignments import AssignmentRecord
from server_ref.config import load_config
from server_ref.privacy_plan import PrivacyPlan
from server_ref.releases import decode_release
from server_ref.task import load_task
from simulator.cohort.server import CohortServer
from tests.served import Ports, Served, updates
from tests.servers import write_config

KINDS = pytest.mark.parametrize("kind", ["server", "aggregators"])
COHORT = 12
RATE = 1.0
NORMS = np.geomspace(0.1, 4.0, COHORT)
MEDIAN = float(np.median(NORMS))
FIRST = 30 * MEDIAN


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Ports:
    return Ports(monkeypatch)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is none, wherever it is drawn: what is left is exact."""

    def sample(count: int, variance: Fraction, _random: Callable[[int], bytes]) -> np.ndarray:
        assert variance > 0
        return np.zeros(count, np.int64)

    monkeypatch.setattr("server_ref.aggregation.noise.sample", sample)
    monkeypatch.setattr("server_ref.secure.noise_shares.discrete_gaussian.sample", sample)


def settings(kind: str, *, rounds: int = 8, first: float = FIRST, **privacy: Any) -> dict[str, Any]:
    """Of a task whose clip norm moves."""
    given = {"noise_multiplier": 1.0} if "epsilon" not in privacy else {}
    given |= {"noise": kind, "adaptive_clipping": True, "clip_learning_rate": RATE, **privacy}
    found = {
        "rounds": rounds,
        "buffer_size": COHORT,
        "aggregation": {"clip_norm": first},
        "privacy": given,
        "divergence": {"enabled": False},
    }
    return found | ({"secure": {}} if kind == "aggregators" else {})


def population(size: int) -> list[np.ndarray]:
    """Updates of known norms, the same in every round."""
    return [
        (norm * u / np.linalg.norm(u)).astype(np.float32)
        for norm, u in zip(NORMS, updates(1, COHORT, size), strict=True)
    ]


def within(clip_norm: float) -> int:
    """What nobody may learn: updates within a norm less those beyond it."""
    return int(np.where(clip_norm >= NORMS, 1, -1).sum())


def clip_norms(served: Served) -> list[float]:
    """Of the committed rounds."""
    return [m["clip_norm"] for m in served.measurements]


def state(clip_norm: float) -> AdaptiveClipNorm:
    return AdaptiveClipNorm(clip_norm=clip_norm, learning_rate=RATE, smallest=FIRST / 1024, largest=FIRST * 16)


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_without_noise_all_servers_follow_the_exact_quantile_and_make_the_same_models(
    tmp_path, softmax_bundle, ports, silent
):
    rounds, seen = 6, []
    for kind in ("server", "aggregators"):
        with Served(tmp_path / kind, softmax_bundle, **settings(kind, rounds=rounds)) as served:
            for _ in range(rounds):
                served.play(population(served.size))
            seen.append(([r["model_sha256"] for r in served.rounds], clip_norms(served)))
    # And the cohort engine of the simulator, from which nothing is read back.
    server = cohort_server(tmp_path, softmax_bundle, settings("server", rounds=rounds))
    play_cohort(server, rounds)
    seen.append(([r.model_sha256 for r in server.rounds], [r.measurements.clip_norm for r in server.rounds]))
    assert seen[0] == seen[1] == seen[2]
    expected = state(FIRST)
    for found in seen[0][1]:
        assert found == expected.clip_norm
        expected = expected.after(within(expected.clip_norm), COHORT)
    assert len(set(seen[0][1])) == rounds


def cohort_server(folder: Any, bundle: Any, given: dict[str, Any]) -> CohortServer:
    folder = folder / "cohort"
    return CohortServer(load_task(load_config(write_config(folder, bundle, **given)).task))


def play_cohort(server: CohortServer, rounds: int) -> None:
    sent = population(server.optimizer.size)
    for now in range(rounds):
        work = [server.check_in(i, 10, float(now), 0.5) for i in range(COHORT)]
        for record, update in zip(work, sent, strict=True):
            assert isinstance(record, AssignmentRecord)
            answer = EncodedUpdate(record.number, update, weight=record.weight)
            server.report(record, answer, math.nan, now + 0.5)


@KINDS
def test_it_follows_the_target_within_its_noise_and_never_the_plain_count(tmp_path, softmax_bundle, ports, kind):
    """By the tails of the Gaussian, a right implementation fails once in 10**9 runs."""
    rounds = 10
    with Served(tmp_path, softmax_bundle, **settings(kind, rounds=rounds)) as served:
        plan = served.coordinator.task.privacy
        assert plan is not None
        stddev = plan.indicator_noise
        assert stddev is not None
        for _ in range(rounds):
            served.play(population(served.size))
        found = clip_norms(served)
        assert all("unchanged" not in m for m in served.measurements)
    errors = []
    for before, after in pairwise(found):
        # A share of more than all or less than none counts as all or none.
        share = 0.5 - math.log(after / before) / RATE
        assert -1e-9 <= share <= 1 + 1e-9
        error = 2 * COHORT * (share - 0.5) - within(before)
        assert error == pytest.approx(round(error), abs=1e-6), "what moved it is an integer, in halves"
        # All five aggregators draw, and three draws are what is relied on.
        assert abs(error) < 7 * stddev * math.sqrt(5 / 3 if kind == "aggregators" else 1)
        errors.append(round(error))
    assert any(errors[3:]), "what was released is not the count itself"
    assert found[0] == FIRST
    assert MEDIAN / 8 < found[-1] < MEDIAN * 8


# --- what it costs ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
def test_bit_and_update_together_spend_what_one_release_with_all_the_noise_does(
    tmp_path, softmax_bundle, ports, kind, adjacency
):
    given = settings(kind, rounds=3, epsilon=6.0, adjacency=adjacency)
    with Served(tmp_path, softmax_bundle, **given) as served:
        plan, sharing = served.coordinator.task.privacy, served.coordinator.task.sharing
        assert plan is not None
        assert plan.split is not None
        for _ in range(3):
            served.play(population(served.size))
        z, moved = plan.noise_multiplier, plan.moved
        assert 1 / math.hypot(1 / plan.split.update_multiplier, 1 / plan.split.indicator_multiplier) >= z
        for releases, said in enumerate(served.measurements, 1):
            privacy = said["privacy"]
            assert privacy["noise_multiplier"] == z
            spent = gaussian_epsilon(1e-5, composed_multiplier([z] * releases))
            assert privacy["epsilon"] == pytest.approx(spent, rel=1e-6)
            noise = moved * plan.split.update_multiplier * said["clip_norm"] / COHORT
            assert privacy["noise_stddev"] == pytest.approx(noise, rel=1e-6)
        assert 5.9 < served.measurements[-1]["privacy"]["epsilon"] <= 6.0
        assert served.halted is None
        if kind == "aggregators":
            assert served.ledgers() == [3] * 5
            assert sharing is not None
            pinned = sharing.pinned.privacy
            assert pinned is not None
            assert pinned.noise_multiplier == moved * plan.split.update_multiplier
            assert pinned.indicator_noise_multiplier == moved * plan.split.indicator_multiplier


def test_nothing_in_the_record_tells_how_many_updates_were_within_it(tmp_path, softmax_bundle):
    with Served(tmp_path, softmax_bundle, **settings("server", rounds=1)) as served:
        served.play(population(served.size))
        [said] = served.measurements
        price = {"epsilon", "epsilon_rdp", "delta", "adjacency", "noise_multiplier"}
        assert said.keys() - price == {"staleness", "released_set", "clip_norm", "privacy", "aggregate_norm"}


# --- what devices are told -------------------------------------------------------------------------------------------


def test_devices_are_told_the_clip_norm_of_their_model_and_another_one_does_not_count(
    tmp_path, softmax_bundle, ports, monkeypatch
):
    with Served(tmp_path, softmax_bundle, **settings("aggregators", rounds=3)) as served:
        sent, released = population(served.size), []
        real = Pipeline.release

        def release(pipeline: Pipeline, aggregate: PrivateAggregate) -> PrivateAggregate:
            released.append(real(pipeline, aggregate))
            return released[-1]

        monkeypatch.setattr(Pipeline, "release", release)
        told: list[float] = []
        for round_id in range(2):
            work = [served.assigned(f"d{i}") for i in range(COHORT)]
            [norm] = {a.secure.clip_norm for a in work if a.secure is not None}
            assert {a.secure.indicator_norm for a in work if a.secure is not None} == {norm}
            told.append(norm)
            if round_id == 1:
                # This one would add to the sum what the first model's clip norm allowed.
                work[0] = clipped_to(work[0], told[0])
            for i, update in enumerate(sent):
                served.report(f"d{i}", work[i], update)
        assert told == clip_norms(served)
        assert told[0] != told[1]
        assert [m["shares_rejected"] for m in served.measurements] == [{}, {"unsealable": 1}]
        assert [r.count for r in released] == [COHORT, COHORT - 1]
        plan = served.assigned("d0").secure
        assert plan is not None
        assert plan.clip_norm == state(told[1]).after(released[1].indicator or 0, COHORT - 1).clip_norm


def clipped_to(assignment: Assignment, clip_norm: float) -> Assignment:
    plan = assignment.secure
    assert plan is not None
    changed = plan.model_copy(update={"clip_norm": clip_norm, "indicator_norm": clip_norm})
    return assignment.model_copy(update={"secure": changed})


# --- crashes ---------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """What a test makes of a server at a step."""


@KINDS
@pytest.mark.parametrize("restart", [True, False], ids=["another process", "the same process"])
def test_a_crash_between_release_and_commit_moves_it_as_the_release_says(
    tmp_path, softmax_bundle, ports, kind, restart
):
    with Served(tmp_path, softmax_bundle, **settings(kind, rounds=4)) as served:
        served.play(population(served.size))
        if restart:
            served.restart()
        before = served.coordinator.task.clip_norm
        assert before is not None
        assert before.clip_norm != FIRST, "a restart keeps it"

        def crash(name: str) -> None:
            if name == "buffer-summed":
                raise Crash

        served.on_event = crash
        served.play(population(served.size))
        assert len(served.rounds) == 1
        [file] = served.releases()
        release = decode_release(file.read_bytes())
        assert release.indicator is not None
        served.on_event = lambda _name: None
        if restart:
            served.restart()
        served.settle()
        assert clip_norms(served) == [FIRST, before.clip_norm]
        after = before.after(release.indicator, release.count)
        assert served.coordinator.task.clip_norm == after
        if restart:
            served.restart()
        served.play(population(served.size))
        assert clip_norms(served)[-1] == after.clip_norm
        assert len(served.rows("privacy_charges")) == 3


def test_a_commit_that_is_rolled_back_moves_nothing(tmp_path, softmax_bundle, monkeypatch):
    with Served(tmp_path, softmax_bundle, **settings("server", rounds=2)) as served:
        before = served.coordinator.task.clip_norm

        def fail(*_: object) -> None:
            raise Crash

        with monkeypatch.context() as patched:
            patched.setattr("server_ref.durable.database.save_round", fail)
            served.play(population(served.size))
            assert served.coordinator.task.clip_norm == before
            assert [note["name"] for note in served.rows("journal")] == ["selection-key"]
        served.settle()
        assert clip_norms(served) == [FIRST]
        assert served.coordinator.task.clip_norm != before


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"privacy": {"noise": "none", "noise_multiplier": None}}, "follows a noised count"),
        ({"privacy": {"buckets": 3}, "aggregation": {"rule": "median"}}, "no buckets"),
        ({"privacy": {"noise_multiplier": None, "epsilon": 9.0, "noise_schedule": "linear"}}, "no schedule"),
        ({"privacy": {"adaptive_clipping": False, "target_quantile": 0.9}}, "target_quantile"),
        ({"privacy": {"noise": "devices", "honest_devices": 3}, "secure": {}}, "follows a noised count"),
        ({"privacy": {"noise": "aggregators"}, "secure": {"checks": "projections"}}, "trust-devices"),
        ({"staleness": {"max_staleness": 2}}, "max_staleness = 0"),
        ({"aggregation": {"clip_scope": "layer"}}, "clip_scope"),
        ({"aggregation": {"rule": "median", "num_byzantine": 1}}, "choose that"),
        ({"buffer_size": 6}, r"buffer_size \(--cohort\) to 7 or more"),
        ({"buffer_size": 10, "privacy": {"noise": "aggregators"}, "secure": {}}, "to 11 or more"),
    ],
    ids=str,
)
def test_what_it_cannot_follow_is_refused_at_the_start(tmp_path, softmax_bundle, wrong, told):
    given = settings("server")
    for name, value in wrong.items():
        given[name] = given.get(name, {}) | value if isinstance(value, dict) else value
    given["privacy"] = {k: v for k, v in given["privacy"].items() if v is not None}
    if not given["privacy"].get("adaptive_clipping"):
        del given["privacy"]["clip_learning_rate"]
    with pytest.raises(ConfigurationError, match=told):
        load_task(load_config(write_config(tmp_path, softmax_bundle, **given)).task)


@pytest.mark.parametrize("least", [0.0, 2.6])
@pytest.mark.parametrize("z", [0.1, 1.0, 7.3])
def test_the_fewest_updates_are_just_enough(z, least):
    fewest = fewest_updates(z, least=least)
    split = split_noise(z, fewest, least=least)
    assert split is not None
    assert split.indicator_stddev >= least
    assert split_noise(z, fewest - 1, least=least) is None


def test_the_grid_has_room_for_the_largest_clip_norm_and_is_the_same_in_all_rounds(tmp_path, softmax_bundle):
    reports = 10**6
    given = settings("aggregators") | {"buffer_size": reports}
    config = load_config(write_config(tmp_path, softmax_bundle, **given)).task
    task = load_task(config)
    plan = PrivacyPlan.of(config)
    assert plan is not None
    assert plan.clip_norm is not None
    assert task.sharing is not None
    bits = task.sharing.pinned.fraction_bits
    for norm in (plan.clip_norm.largest, FIRST, plan.clip_norm.smallest):
        task.current.begin(plan.clip_norm.model_copy(update={"clip_norm": norm}))
        bounds = task.pipeline.reduce.bounds
        assert (bounds.clip_norm, bounds.fraction_bits) == (norm, bits)
        stated = task.sharing.pinned.round_parameters().model_copy(update={"bound": bounds.norm_bound})
        stated.require_range(reports, 3)
        # What the aggregators add for codes of that norm is what this server expects for the norm itself.
        stddev = plan.noise_per_clip_norm * bounds.norm_bound
        summed = task.pipeline.reduce.aggregate(
            np.zeros(task.pipeline.entry.size, np.int64),
            task.pipeline.admitted,
            count=reports,
            total_weight=reports,
            noise=(stddev, plan.budget.adjacency),
        )
        assert task.pipeline.release(summed) is summed
