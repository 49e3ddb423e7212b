"""Private rounds at the server: the noise is there, is paid for once, and keeps the budget, whatever crashes."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from client_sdk.protocol.errors import ConfigurationError, ReportMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import Wait
from server_ref.aggregation.errors import PipelineError, UndeclaredRescaling
from server_ref.closing import _stated
from server_ref.config import load_config
from server_ref.releases import decode_release
from server_ref.task import load_task
from tests.served import Ports, Served, updates
from tests.servers import write_config

CLIPPED = {"clip_norm": 0.5}
KINDS = pytest.mark.parametrize("kind", ["server", "aggregators"])


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Ports:
    return Ports(monkeypatch)


def private(kind: str, **privacy: Any) -> dict[str, Any]:
    """Settings of a private task."""
    settings: dict[str, Any] = {"aggregation": CLIPPED, "privacy": {"noise": kind, **privacy}}
    return settings | ({"secure": {}} if kind == "aggregators" else {})


def epsilon_of(noise_multiplier: float, releases: int, delta: float) -> float:
    """Of so many Gaussian releases together, by the trade-off of one Gaussian [Balle and Wang 2018, theorem 5]."""
    mu = math.sqrt(releases) / noise_multiplier

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(optimize.brentq(excess, 0.0, 50.0, xtol=1e-12))


# --- the account -----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
def test_epsilon_grows_with_every_release_and_ends_within_the_budget(tmp_path, softmax_bundle, ports, kind, adjacency):
    settings = private(kind, epsilon=2.0, delta=1e-5, adjacency=adjacency)
    with Served(tmp_path, softmax_bundle, rounds=4, buffer_size=2, **settings) as served:
        for round_id in range(4):
            served.play(updates(round_id, 2, served.size))
        said = [m["privacy"] for m in served.measurements]
        assert [s["adjacency"] for s in said] == [adjacency] * 4
        z = said[0]["noise_multiplier"]
        for releases, each in enumerate(said, 1):
            assert each["epsilon"] == pytest.approx(epsilon_of(z, releases, 1e-5), rel=1e-6)
            assert each["delta"] == 1e-5
            moved = 2 if adjacency == "replace-one" else 1
            assert each["noise_stddev"] == pytest.approx(moved * z * 0.5 / 2, rel=1e-6)
        assert 1.99 < said[-1]["epsilon"] <= 2.0, "the budget is used, and kept"
        assert len(served.rows("privacy_charges")) == 4
        assert served.ledgers() == ([4] * 5 if kind == "aggregators" else [])
        assert served.halted is None
        assert served.coordinator.describe()["finished"]


@pytest.mark.parametrize(
    ("kind", "epsilon", "delta", "k"),
    [("server", 0.3, 1e-6, 3), ("aggregators", 0.3, 1e-6, 3), ("aggregators", 8.0, 1e-4, 2)],
)
def test_a_budget_for_k_participations_lasts_for_all_rounds(tmp_path, softmax_bundle, ports, kind, epsilon, delta, k):
    settings = private(kind, epsilon=epsilon, delta=delta, max_participations=k)
    with Served(tmp_path, softmax_bundle, rounds=5, buffer_size=2, **settings) as served:
        for round_id in range(5):
            served.play({f"{round_id}-{i}": u for i, u in enumerate(updates(round_id, 2, served.size))})
        said = [m["privacy"]["epsilon"] for m in served.measurements]
        assert len(said) == 5
        assert said[k - 1 :] == [said[-1]] * (6 - k), "no device is in more rounds than that"
        assert 0.99 * epsilon < said[-1] <= epsilon
        assert served.halted is None


def test_a_spent_budget_halts_the_task_and_nothing_more_is_released(tmp_path, softmax_bundle):
    settings = private("server", epsilon=1.0)
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **settings) as served:
        for round_id in range(2):
            served.play(updates(round_id, 2, served.size))
        last = served.model_sha256
        # The noise was made for two rounds; more of them would not be within the budget.
        served.restart(rounds=6)
        served.play(updates(3, 2, served.size))
        assert "beyond the budget of 1 " in (served.halted or "")
        assert served.model_sha256 == last
        assert served.measurements[-1] == {"staleness": {}, "unchanged": "PrivacyBudgetExhausted"}
        assert len(served.rows("privacy_charges")) == 2
        assert served.releases() == []
        for _ in range(2):
            assert served.check_in("d0").model_dump()["halted"]
            served.restart()
        assert served.model_sha256 == last


def spend(file: Path, round_id: int) -> None:
    """Another charge in an aggregator's ledger, like its first one."""
    connection = sqlite3.connect(file)
    with connection:
        [(event,)] = connection.execute("SELECT event_json FROM ledger").fetchall()
        event = json.dumps(json.loads(event) | {"round_id": round_id})
        connection.execute("INSERT INTO ledger (round_id, event_json) VALUES (?, ?)", (round_id, event))
    connection.close()


def test_aggregators_that_say_their_budget_is_spent_halt_the_task(tmp_path, softmax_bundle, ports):
    settings = private("aggregators", epsilon=1.0)
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **settings) as served:
        served.play(updates(0, 2, served.size))
        last = served.model_sha256
        served.coordinator.stop()
        # Somebody else had sums opened by them meanwhile.
        for file in served.folder.glob("state/aggregators/*/aggregator.db"):
            spend(file, round_id=77)
        served.restart()
        served.play(updates(1, 2, served.size))
        assert served.measurements[-1]["unchanged"] == "BudgetSpent"
        assert served.halted is not None
        assert served.model_sha256 == last
        assert len(served.rows("privacy_charges")) == 1, "nothing was released, and nothing charged here"


def test_other_noise_than_the_aggregators_were_set_up_for_is_refused_at_the_start(tmp_path, softmax_bundle, ports):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **private("aggregators", epsilon=1.0)) as served:
        served.play(updates(0, 2, served.size))
        with pytest.raises(ConfigurationError):
            served.restart(rounds=6)
        served.restart(rounds=2)
        served.play(updates(1, 2, served.size))
        assert served.ledgers() == [2] * 5


# --- the noise -------------------------------------------------------------------------------------------------------


@KINDS
def test_the_noise_has_the_stated_variance(tmp_path, softmax_bundle, ports, kind):
    """Two runs on the same updates differ by their noise alone: 252 differences of variance 2.

    By the chi-square distribution a right implementation fails once in 10**6 runs; one with half of the variance passes
    in 2 of 1000, one with a quarter never.
    """
    models, stddevs = [], []
    rounds = 12
    for name in "ab":
        settings = private(kind, noise_multiplier=3.0) | {"divergence": {"enabled": False}}
        with Served(tmp_path / name, softmax_bundle, rounds=rounds, buffer_size=2, **settings) as served:
            steps = [served.weights.astype(np.float64)]
            for round_id in range(rounds):
                served.play(updates(round_id, 2, served.size))
                steps.append(served.weights.astype(np.float64))
            models.append(np.diff(steps, axis=0))
            stddevs += [m["privacy"]["noise_stddev"] for m in served.measurements]
    assert stddevs == [pytest.approx(3.0 * 0.5 / 2, rel=1e-6)] * 2 * rounds
    # Five aggregators add noise of which three shares are enough, whoever the other two are.
    variance = 2 * stddevs[0] ** 2 * (5 / 3 if kind == "aggregators" else 1)
    difference = (models[0] - models[1]).ravel()
    found = float(np.sum(difference**2)) / variance
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], difference.size)
    assert low < found < high
    # Neither is one draw like another.
    assert len(np.unique(np.abs(difference))) == difference.size


@KINDS
def test_nothing_is_said_of_single_updates(tmp_path, softmax_bundle, ports, kind):
    with Served(tmp_path, softmax_bundle, rounds=1, buffer_size=3, **private(kind, noise_multiplier=1.0)) as served:
        work = {name: served.assigned(name, 10 + i) for i, name in enumerate("abc")}
        assert all(each.withholds_loss and each.weight == 1 for each in work.values())
        [telling, *_] = updates(0, 1, served.size)

        def tell(frame: bytes) -> bytes:
            decoded = decode_frame(frame)
            assert decoded.metadata["train_loss"] == "withheld"
            return bytes(encode_frame(decoded.tensors, decoded.metadata | {"train_loss": "0.25"}))

        with pytest.raises(ReportMismatch, match="must not say what the device's loss is"):
            served.report("a", work["a"], telling, amend=tell)
        for name, assignment in work.items():
            served.report(name, assignment, telling)
        [committed] = served.rounds
        assert committed["train_loss"] is None
        measured = committed["measurements"]
        assert not measured.keys() & {"clipped", "norm_median", "norm_max", "excluded"}, measured
        assert all(row["train_loss"] is None for row in served.rows("assignments"))


def test_where_a_task_asks_for_losses_a_device_may_withhold_its_own(tmp_path, softmax_bundle):
    def withhold(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        return bytes(encode_frame(decoded.tensors, decoded.metadata | {"train_loss": "withheld"}))

    settings = {"divergence": {"enabled": True, "patience": 1}, "aggregation": CLIPPED}
    with Served(tmp_path, softmax_bundle, rounds=3, buffer_size=3, **settings) as served:
        for withholding in (2, 3, 0):
            work = {name: served.assigned(name) for name in "abc"}
            for index, (name, update) in enumerate(zip("abc", updates(0, 3, served.size), strict=True)):
                amend = withhold if index < withholding else None
                served.report(name, work[name], update, train_loss=0.5, **({"amend": amend} if amend else {}))
        assert served.halted is None
        assert [r["train_loss"] for r in served.rows("rounds")] == [0.5, None, 0.5]


@pytest.mark.parametrize("stale", [False, True], ids=["synchronous", "asynchronous"])
def test_a_private_round_in_the_clear_takes_compressed_and_stale_updates(tmp_path, softmax_bundle, stale):
    settings = private("server", noise_multiplier=1.0) | {"compression": "topk:0.5"}
    if stale:
        settings |= {"staleness": {"max_staleness": 1}, "concurrency": 4, "refill_at": 1}
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **settings) as served:
        work = {name: served.assigned(name) for name in ("abcd" if stale else "ab")}
        for name, update in zip(work, updates(0, 4, served.size), strict=False):
            served.report(name, work[name], update)
        assert [m["staleness"] for m in served.measurements] == ([{"0": 2}, {"1": 2}] if stale else [{"0": 2}])
        assert all("privacy" in m for m in served.measurements)


# --- crashes ---------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """What a test makes of a server at a step."""


def crashing_at(step: str):
    def on_event(name: str) -> None:
        if name == step:
            raise Crash(step)

    return on_event


@KINDS
def test_a_release_that_was_not_committed_is_used_and_not_drawn_again(tmp_path, softmax_bundle, ports, kind):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **private(kind, noise_multiplier=1.0)) as served:
        before = served.weights.astype(np.float64)
        served.on_event = crashing_at("buffer-summed")
        served.play(updates(0, 2, served.size))
        assert served.rounds == []
        [charge] = served.rows("privacy_charges")
        [file] = served.releases()
        release = decode_release(file.read_bytes())
        served.coordinator.stop()
        served.on_event = lambda _name: None
        served.restart()
        served.settle()
        assert served.rows("privacy_charges") == [charge], "one charge"
        assert served.weights.tobytes() == (before + release.values).astype(np.float32).tobytes(), "one noise"
        assert served.ledgers() == ([1] * 5 if kind == "aggregators" else [])
        served.coordinator.stop()
        assert served.releases() == [], "what is committed needs no release"
        served.restart()
        served.play(updates(1, 2, served.size))
        one, two = (m["privacy"]["epsilon"] for m in served.measurements)
        assert one < two, "the ledger goes on after a restart"


@pytest.mark.parametrize(
    ("kind", "damage"), [("server", "deleted"), ("server", "altered"), ("server", "cut"), ("aggregators", "deleted")]
)
def test_without_the_release_that_was_drawn_nothing_is_released(tmp_path, softmax_bundle, ports, kind, damage):
    with Served(tmp_path, softmax_bundle, rounds=2, buffer_size=2, **private(kind, noise_multiplier=1.0)) as served:
        first = served.model_sha256
        served.on_event = crashing_at("buffer-summed")
        served.play(updates(0, 2, served.size))
        served.coordinator.stop()
        served.on_event = lambda _name: None
        [file] = served.releases()
        good = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        else:
            file.write_bytes(good[:-8] + bytes(8) if damage == "altered" else good[:-8])
        served.restart()
        served.settle()
        assert served.rounds == []
        assert served.model_sha256 == first
        assert len(served.rows("privacy_charges")) == 1
        served.coordinator.stop()
        # An operator finds a copy: the round ends as it would have.
        file.write_bytes(good)
        served.restart()
        served.settle()
        assert len(served.rounds) == 1
        assert "unchanged" not in served.measurements[0]


@pytest.mark.parametrize("step", ["save_charge", "put"])
def test_what_could_not_be_made_durable_was_not_charged_and_is_drawn_again(tmp_path, softmax_bundle, monkeypatch, step):
    with Served(tmp_path, softmax_bundle, rounds=1, buffer_size=2, **private("server", noise_multiplier=1.0)) as served:
        target = "server_ref.release_store.database.save_charge"
        if step == "put":
            target = "server_ref.store.blobs.BlobStore.sync"
        work = {name: served.assigned(name) for name in "ab"}
        sent = updates(0, 2, served.size)
        served.report("a", work["a"], sent[0])
        failures = []

        def fail(*_: object) -> None:
            failures.append(step)
            raise Crash(step)

        with monkeypatch.context() as patched:
            if step == "put":
                save = served.coordinator._state.releases.save_release

                def save_release(*args: Any) -> None:
                    with monkeypatch.context() as inner:
                        inner.setattr(target, fail)
                        save(*args)

                patched.setattr(served.coordinator._state.releases, "save_release", save_release)
            else:
                patched.setattr(target, fail)
            served.report("b", work["b"], sent[1])
            assert failures
            assert served.rounds == []
            assert served.rows("privacy_charges") == []
            assert served.coordinator.task.keeper is not None
        served.settle()
        assert len(served.rounds) == 1
        assert "unchanged" not in served.measurements[0]
        assert len(served.rows("privacy_charges")) == 1
        served.restart()
        assert served.releases() == [], "what was drawn and never paid for is deleted"


def test_a_data_directory_that_was_set_back_gets_no_second_sum_out_of_the_aggregators(tmp_path, softmax_bundle, ports):
    settings = private("aggregators", noise_multiplier=2.0)
    with Served(tmp_path, softmax_bundle, rounds=3, buffer_size=2, **settings) as served:
        served.play(updates(0, 2, served.size))
        served.coordinator.stop()
        state, kept = served.folder / "state", tmp_path / "kept"
        shutil.copytree(state, kept)
        served.restart()
        served.play(updates(1, 2, served.size))
        assert served.ledgers() == [2] * 5
        served.coordinator.stop()
        shutil.rmtree(state / "blobs")
        shutil.copytree(kept / "blobs", state / "blobs")
        for file in state.glob("pocketfed.db*"):
            file.unlink()
        shutil.copy(kept / "pocketfed.db", state / "pocketfed.db")
        served.restart()
        assert len(served.rounds) == 1
        model = served.model_sha256
        served.play(updates(2, 2, served.size))
        assert served.ledgers() == [2] * 5, "nothing is paid back, and round 1 not opened twice"
        assert served.model_sha256 == model
        assert served.measurements[-1]["unchanged"] == "RoundCommitted"


# --- who may take part -----------------------------------------------------------------------------------------------


@KINDS
def test_a_device_is_refused_beyond_its_participations_across_restarts(tmp_path, softmax_bundle, ports, kind):
    settings = private(kind, epsilon=3.0, max_participations=2)
    with Served(tmp_path, softmax_bundle, rounds=9, buffer_size=2, concurrency=3, refill_at=1, **settings) as served:
        for round_id in range(2):
            served.play({"a": updates(0, 1, served.size)[0], f"b{round_id}": updates(1, 1, served.size)[0]})
            assert len(served.rounds) == round_id + 1
            served.restart()
        for _ in range(2):
            reply = served.check_in("a")
            assert isinstance(reply, Wait)
            assert reply.reason == "not-selected"
            assert served.assigned("b0"), "others have taken part less"
            served.restart()
        # A device that was invited and did not report has not taken part.
        served.play({name: updates(2, 1, served.size)[0] for name in ("b0", "b1")})
        assert len(served.rounds) == 3
        assert isinstance(served.check_in("b0"), Wait)
        if kind == "aggregators":
            plan = served.assigned("c").secure
            assert plan is not None
            assert plan.max_participations == 2, "the device counts too"


# --- what means nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"aggregation": {}}, ConfigurationError, r"set aggregation\.clip_norm"),
        ({"privacy": {"noise": "server"}}, ConfigurationError, "either epsilon .* or noise_multiplier"),
        (
            {"privacy": {"noise": "server", "epsilon": 1.0, "noise_multiplier": 1.0}},
            ConfigurationError,
            "either epsilon .* or noise_multiplier",
        ),
        ({"privacy": {"epsilon": 1.0}}, ConfigurationError, "nobody adds noise"),
        ({"privacy": {"noise": "aggregators", "epsilon": 1.0}}, ConfigurationError, "set task.secure"),
        ({"aggregation": CLIPPED | {"rule": "krum"}}, PipelineError, "no sensitivity of the aggregate is proved"),
        ({"plan": {"algorithm": "fednova", "max_steps": 3}}, UndeclaredRescaling, "FedNova"),
    ],
    ids=lambda value: None if isinstance(value, str | type) else "-".join(value),
)
def test_what_would_protect_nobody_is_refused_at_the_start(tmp_path, softmax_bundle, settings, error, words):
    given = {"rounds": 2, "buffer_size": 3} | private("server", epsilon=1.0) | settings
    with pytest.raises(error, match=words):
        load_task(load_config(write_config(tmp_path, softmax_bundle, **given)).task)


# --- what devices say of their loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [-1e30, -0.5, -0.0])
def test_a_loss_below_zero_stops_no_task(tmp_path, softmax_bundle, stated):
    rounds = 8
    with Served(tmp_path, softmax_bundle, rounds=rounds, buffer_size=3, divergence={"patience": 1}) as served:
        for round_id in range(rounds):
            work = {name: served.assigned(name) for name in "abc"}
            for name, update in zip("abc", updates(round_id, 3, served.size, 0.1), strict=True):
                served.report(name, work[name], update, train_loss=stated if name == "b" else 1.0 / (1 + round_id))
        assert served.halted is None
        assert len(served.rounds) == rounds


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        (-1e30, 0.0),
        (-0.0, 0.0),
        (0.25, 0.25),
        (1e300, 1e300),
        (math.nan, math.inf),
        (math.inf, math.inf),
        (-math.inf, math.inf),
    ],
)
def test_whatever_is_said_can_be_put_in_order(said, taken):
    assert _stated(said) == taken
