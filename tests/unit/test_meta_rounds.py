"""Rounds of meta-learning at the server: what is sent is subtracted or added, and nothing else about it is special."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, ReportMismatch
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.program import MANIFEST_FILE, Manifest, MethodSpec, Role
from client_sdk.protocol.updates import UpdateKind
from server_ref.config import load_config
from server_ref.task import Task, load_task
from tests.served import Ports, Served, updates
from tests.servers import write_config

K, B = 2, 4
GRADIENTS = ("maml", "fomaml", "per-fedavg")


def plan_of(algorithm: str, **changes: Any) -> dict[str, Any]:
    return {"algorithm": algorithm, "batch_size": B, "learning_rate": 0.5, "meta": {"inner_steps": K}} | changes


def add_methods(bundle: Path, folder: Path, *methods: MethodSpec) -> Path:
    """A copy of a bundle whose manifest has these methods too: as much as a server looks at, which runs none."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.from_json((bundle / MANIFEST_FILE).read_bytes())
    more = manifest.model_copy(update={"methods": (*manifest.methods, *methods)})
    (folder / MANIFEST_FILE).write_text(more.to_json())
    return folder


def method(role: Role, batch_size: int = B, inner_steps: int | None = K) -> MethodSpec:
    return MethodSpec(
        name=f"{role.value}_k{inner_steps}_b{batch_size}",
        role=role,
        batch_size=batch_size,
        inner_steps=inner_steps,
        inputs=(),
        outputs=(),
        planned_memory_bytes=0,
    )


@pytest.fixture(scope="module")
def bundle(softmax_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of softmax regression, with what maml and per-fedavg need."""
    folder = tmp_path_factory.mktemp("meta") / "bundle"
    return add_methods(softmax_bundle, folder, method(Role.MAML), method(Role.PER_FEDAVG, inner_steps=None))


def served(folder: Path, bundle: Path, algorithm: str, **settings: Any) -> Served:
    return Served(folder, bundle, **{"plan": plan_of(algorithm), "rounds": 3} | settings)


def play(server: Served, sent: list[np.ndarray], **facts: Any) -> None:
    """A round in which all devices weigh alike."""
    work = [server.assigned(f"d{i}") for i in range(len(sent))]
    for i, (assignment, update) in enumerate(zip(work, sent, strict=True)):
        server.report(f"d{i}", assignment, update, **{"steps": K} | facts)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [*GRADIENTS, "reptile"])
def test_a_round_moves_the_model_by_the_mean_against_gradients_and_along_deltas(
    tmp_path: Path, bundle: Path, algorithm: str
):
    with served(tmp_path, bundle, algorithm, buffer_size=3) as server:
        before, sent = server.weights.astype(np.float64), updates(1, 3, server.size)
        assert server.assigned("d0").kind == ("delta" if algorithm == "reptile" else "gradient")
        play(server, sent)
        mean = np.mean(np.array(sent, np.float64), axis=0)
        # The meta rate of a plan that names none is 0.05.
        moved = mean if algorithm == "reptile" else -0.05 * mean
        np.testing.assert_array_equal(server.weights, (before + moved).astype(np.float32))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        {"name": "adagrad"},
        {"name": "adam"},
        {"name": "adam", "bias_correction": True},
        {"name": "yogi"},
    ],
    ids=str,
)
def test_every_optimizer_descends_along_gradients_as_it_moves_along_their_opposites(
    tmp_path: Path, bundle: Path, optimizer: dict[str, Any]
):
    models = []
    for algorithm, sign in (("maml", 1), ("reptile", -1)):
        with served(tmp_path / algorithm, bundle, algorithm, optimizer=optimizer | {"learning_rate": 0.3}) as server:
            for round_id in range(3):
                play(server, [sign * u for u in updates(round_id, 2, server.size)])
            models.append([r["model_sha256"] for r in server.rounds])
    assert models[0] == models[1]
    assert len(set(models[0])) == 3


def task(folder: Path, bundle: Path, plan: dict[str, Any], **settings: Any) -> Task:
    return load_task(load_config(write_config(folder, bundle, plan=plan, **settings)).task)


@pytest.mark.parametrize(
    ("plan", "optimizer", "rate"),
    [
        ({"batch_size": B}, {}, 1.0),
        (plan_of("reptile"), {}, 1.0),
        (plan_of("reptile", meta={"inner_steps": K, "meta_learning_rate": 0.25}), {}, 1.0),
        (plan_of("maml"), {}, 0.05),
        (plan_of("per-fedavg", meta={"inner_steps": K, "meta_learning_rate": 0.25}), {}, 0.25),
        (plan_of("per-fedavg", meta={"inner_steps": K, "meta_learning_rate": 0.25}), {"learning_rate": 1.0}, 1.0),
        (plan_of("fomaml"), {"name": "adam"}, 0.05),
    ],
    ids=lambda v: v.get("algorithm", "fedavg") if isinstance(v, dict) and v else str(v),
)
def test_without_one_of_its_own_the_servers_rate_is_that_of_the_algorithm(
    tmp_path: Path, bundle: Path, plan: dict[str, Any], optimizer: dict[str, Any], rate: float
):
    found = task(tmp_path, bundle, plan, optimizer=optimizer)
    assert f"learning rate {rate:g}" in found.pipeline.optimizer.title
    assert json.loads(found.identity_json)["optimizer"]["learning_rate"] == rate


# --- which programs can -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "flags"),
    [
        (plan_of("maml"), "--batch-sizes maml=4 --inner-steps 2"),
        (plan_of("per-fedavg"), "--batch-sizes per_fedavg=4"),
        (plan_of("reptile", batch_size=3), "export the bundle with that size"),
        (plan_of("fomaml", batch_size=3), "export the bundle with that size"),
    ],
    ids=lambda v: v["algorithm"] if isinstance(v, dict) else "",
)
def test_a_program_that_cannot_is_refused_with_how_to_export_it(
    tmp_path: Path, softmax_bundle: Path, plan: dict[str, Any], flags: str
):
    with pytest.raises(ConfigurationError, match=flags):
        task(tmp_path, softmax_bundle, plan)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_ordinary_methods_are_enough_where_steps_can_be_taken_one_by_one(
    tmp_path: Path, softmax_bundle: Path, algorithm: str
):
    assert task(tmp_path, softmax_bundle, plan_of(algorithm)).settings.plan.algorithm == algorithm


def test_the_method_has_the_plans_batch_size_and_as_many_steps(tmp_path: Path, bundle: Path):
    for plan in (plan_of("maml", batch_size=8), plan_of("maml", meta={"inner_steps": K + 1})):
        with pytest.raises(ConfigurationError, match=r"maml_k2_b4 \(2 steps\)"):
            task(tmp_path, bundle, plan)
    assert task(tmp_path, bundle, plan_of("maml", meta={"inner_steps": 1}))
    only = add_methods(bundle, tmp_path / "reptile", method(Role.REPTILE, 5), method(Role.FOMAML, 5))
    for algorithm in ("reptile", "fomaml"):
        assert task(tmp_path, only, plan_of(algorithm, batch_size=5)), "a method of its own is enough too"


# --- who is refused ---------------------------------------------------------------------------------------------------


def saying(**changes: str) -> Callable[[bytes], bytes]:
    """The same report with other facts."""

    def amend(frame: bytes) -> bytes:
        decoded = decode_frame(frame)
        return bytes(encode_frame(decoded.tensors, decoded.metadata | changes))

    return amend


@pytest.mark.parametrize(
    "changes",
    [{"kind": "delta"}, {"algorithm": "fomaml"}, {"algorithm": "fedavg"}, {"steps": str(K + 1)}, {"steps": "1"}],
    ids=str,
)
def test_a_report_that_is_of_something_else_is_refused_and_the_round_goes_on(
    tmp_path: Path, bundle: Path, changes: dict[str, str]
):
    with served(tmp_path, bundle, "maml", rounds=1) as server:
        work, (sent, *_) = server.assigned("d0"), updates(0, 1, server.size)
        with pytest.raises(ReportMismatch):
            server.report("d0", work, sent, amend=saying(**changes), steps=K)
        server.report("d0", work, sent, steps=K)
        server.report("d1", server.assigned("d1"), sent, steps=K)
        assert [r["reports"] for r in server.rounds] == [2]


@pytest.mark.parametrize("rule", ["multi-krum", "trimmed-mean"])
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_rule_stands_dishonest_devices(tmp_path: Path, bundle: Path, algorithm: str, rule: str):
    found = {}
    for name in (rule, "mean"):
        aggregation = {"rule": name} | ({"num_byzantine": 2} if name == rule else {})
        server = served(
            tmp_path / name,
            bundle,
            algorithm,
            buffer_size=7,
            aggregation=aggregation,
            optimizer={"learning_rate": 1.0},
        )
        with server:
            before = server.weights
            honest = [1.0 + 0.1 * u for u in updates(3, 5, server.size)]
            play(server, [*honest, *[np.full(server.size, -100.0)] * 2])
            aim = np.mean(honest, axis=0) * (1 if algorithm == "reptile" else -1)
            found[name] = float(np.abs(server.weights - before - aim).max())
    assert found[rule] < 0.3
    assert found["mean"] > 10


def test_topk_of_meta_gradients_is_what_is_averaged(tmp_path: Path, bundle: Path):
    with served(tmp_path, bundle, "maml", compression="topk:0.2", optimizer={"learning_rate": 1.0}) as server:
        before, sent = server.weights.astype(np.float64), updates(5, 2, server.size)
        play(server, sent, residual=np.zeros(server.size, np.float32))
        kept = np.zeros((2, server.size))
        for row, update in zip(kept, sent, strict=True):
            largest = np.argsort(-np.abs(update))[: int(0.2 * server.size)]
            row[largest] = update[largest]
        moved = before - server.weights
        np.testing.assert_allclose(moved, kept.mean(axis=0), atol=1e-6)


def test_a_restart_amid_a_round_changes_no_bit(tmp_path: Path, bundle: Path):
    models = []
    for restarts in (False, True):
        with served(
            tmp_path / str(restarts), bundle, "per-fedavg", optimizer={"name": "adam"}, buffer_size=3
        ) as server:
            for round_id in range(2):
                work = [server.assigned(f"d{i}") for i in range(3)]
                for i, update in enumerate(updates(round_id, 3, server.size)):
                    server.report(f"d{i}", work[i], update, steps=K)
                    if restarts:
                        server.restart()
            models.append([r["model_sha256"] for r in server.rounds])
    assert models[0] == models[1]


# --- shares and noise -------------------------------------------------------------------------------------------------


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Ports:
    return Ports(monkeypatch)


@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_shared_meta_updates_make_the_same_models_as_those_in_the_clear(
    tmp_path: Path, bundle: Path, ports: Ports, algorithm: str
):
    models = []
    for secure in ({}, {"secure": {"threshold": 3, "num_aggregators": 5}}):
        with served(
            tmp_path / str(len(secure)),
            bundle,
            algorithm,
            rounds=2,
            aggregation={"clip_norm": 1.0, "arithmetic": "fixed"},
            **secure,
        ) as server:
            for round_id in range(2):
                short, long = updates(round_id, 2, server.size)
                play(server, [0.01 * short, 30 * long])
            assert all("unchanged" not in m for m in server.measurements)
            models.append([r["model_sha256"] for r in server.rounds])
    assert models[0] == models[1]
    assert len(set(models[0])) == 2


def test_private_shared_meta_gradients_are_clipped_noised_and_subtracted(tmp_path: Path, bundle: Path, ports: Ports):
    count, clip = 3, 0.5
    with served(
        tmp_path,
        bundle,
        "maml",
        rounds=1,
        buffer_size=count,
        optimizer={"learning_rate": 1.0},
        aggregation={"clip_norm": clip},
        secure={"threshold": 3, "num_aggregators": 5},
        privacy={"noise": "aggregators", "noise_multiplier": 0.05},
    ) as server:
        before = server.weights.astype(np.float64)
        sent = [100 * u for u in updates(9, count, server.size)]
        play(server, sent)
        clipped = [clip * u / np.linalg.norm(u.astype(np.float64)) for u in sent]
        noise = before - server.weights - np.mean(clipped, axis=0)
        assert all(charges == 1 for charges in server.ledgers())
        stddev = 0.05 * clip / count
        assert 0 < np.abs(noise).max() < 7 * stddev


# --- personal layers --------------------------------------------------------------------------------------------------


def layers(bundle: Path, *personal: str) -> np.ndarray:
    """Which coordinates are shared, from the parameter table alone."""
    manifest = Manifest.from_json((bundle / MANIFEST_FILE).read_bytes())
    return np.concatenate([np.full(p.num_elements, p.name not in personal) for p in manifest.parameters])


@pytest.mark.parametrize("algorithm", ["fedavg", "reptile"])
@pytest.mark.parametrize("optimizer", [{}, {"name": "adam", "learning_rate": 0.1}], ids=["sgd", "adam"])
def test_personal_layers_stay_as_they_began_and_are_no_part_of_a_report(
    tmp_path: Path, softmax_bundle: Path, algorithm: str, optimizer: dict[str, Any]
):
    names = [p.name for p in Manifest.from_json((softmax_bundle / MANIFEST_FILE).read_bytes()).parameters]
    shared = layers(softmax_bundle, names[-1])
    base = plan_of(algorithm) if algorithm == "reptile" else {"batch_size": B}
    plan = base | {"personal": [names[-1]]}
    with Served(tmp_path, softmax_bundle, plan=plan, optimizer=optimizer, buffer_size=2) as server:
        assert server.coordinator.describe()["dense_report_bytes"] == 4 * shared.sum() < 4 * server.size
        begun = server.weights
        master = begun.astype(np.float64)
        for round_id in range(3):
            before = server.weights
            sent = updates(round_id, 2, int(shared.sum()))
            play(server, sent)
            if not optimizer:
                master[shared] += np.mean(np.array(sent, np.float64), axis=0)
                np.testing.assert_array_equal(server.weights, master.astype(np.float32))
            assert (server.weights[shared] != before[shared]).all()
            assert server.weights[~shared].tobytes() == begun[~shared].tobytes()
            server.restart()
        states = (tmp_path / "state" / "blobs" / "states").glob("**/*")
        kept = [decode_frame(path.read_bytes()) for path in states if path.is_file()]
        assert kept
        assert {t.shape for frame in kept for t in frame.tensors.values()} == {(int(shared.sum()),)}


def test_who_sends_personal_layers_all_the_same_is_refused(tmp_path: Path, softmax_bundle: Path):
    with Served(tmp_path, softmax_bundle, plan={"batch_size": B, "personal": ["output.bias"]}, rounds=1) as server:
        work = server.assigned("d0")
        whole = encode_frame({"update": updates(0, 1, server.size)[0]})

        def whole_model(frame: bytes) -> bytes:
            return bytes(encode_frame(decode_frame(whole).tensors, decode_frame(frame).metadata))

        shared = int(layers(softmax_bundle, "output.bias").sum())
        sent = updates(0, 2, shared)
        with pytest.raises(Exception, match=f"{shared}") as refusal:
            server.report("d0", work, sent[0], amend=whole_model)
        assert type(refusal.value).__name__ in {"ShapeMismatch", "OversizedBody"}
        server.report("d0", work, sent[0])
        server.report("d1", server.assigned("d1"), sent[1])
        assert [r["reports"] for r in server.rounds] == [2]


def test_each_shared_layer_is_clipped_by_itself(tmp_path: Path, softmax_bundle: Path):
    shared = layers(softmax_bundle, "output.bias")
    with Served(
        tmp_path,
        softmax_bundle,
        plan={"batch_size": B, "personal": ["output.bias"]},
        aggregation={"clip_norm": 1.0, "clip_scope": "layer"},
        buffer_size=1,
        concurrency=1,
    ) as server:
        before = server.weights.astype(np.float64)
        play(server, [np.full(int(shared.sum()), 100.0)])
        assert np.linalg.norm(server.weights - before) == pytest.approx(1.0, rel=1e-5)


def test_shared_coordinates_are_compressed_and_split_by_their_own_number(
    tmp_path: Path, softmax_bundle: Path, ports: Ports
):
    size = int(layers(softmax_bundle, "output.bias").sum())
    settings: dict[str, Any] = {"plan": {"batch_size": B, "personal": ["output.bias"]}, "rounds": 1}
    settings["aggregation"] = {"clip_norm": 1.0, "arithmetic": "fixed"}
    models = []
    for more in ({}, {"secure": {}}):
        with Served(tmp_path / str(len(more)), softmax_bundle, **settings, **more) as server:
            play(server, updates(4, 2, size))
            models.append(server.model_sha256)
            if more:
                assert server.coordinator.task.sharing is not None
                assert server.coordinator.task.sharing.size == size
    assert models[0] == models[1]
    with Served(tmp_path / "topk", softmax_bundle, **settings, compression="topk:0.5") as server:
        play(server, updates(4, 2, size), residual=np.zeros(size, np.float32))
        assert len(server.rounds) == 1


# --- what a task is known by ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "c3276e22ace1297587b5881ef4251b53"),
        (
            {"optimizer": {"name": "adam", "learning_rate": 0.1}, "compression": "topk:0.1"},
            "5c16653b77e8ad5448382e92f5cb12e4",
        ),
        (
            {
                "optimizer": {"momentum": 0.5},
                "aggregation": {"clip_norm": 1.0, "arithmetic": "fixed"},
                "secure": {},
            },
            "facc7271e68adb3da83f6a9153dca86b",
        ),
        (
            {"plan": {"algorithm": "scaffold", "batch_size": 4}, "population": 10},
            "894183de9e42a8e49dd2e2cdf3e9b6eb",
        ),
    ],
    ids=["plain", "adam", "shared", "scaffold"],
)
def test_a_task_without_any_of_this_is_the_one_that_it_was(
    tmp_path: Path, softmax_bundle: Path, settings: dict[str, Any], expected: str
):
    defaults = {"plan": {"batch_size": 4}, "rounds": 10, "buffer_size": 10}
    config = load_config(write_config(tmp_path, softmax_bundle, **defaults | settings))
    facts = json.loads(load_task(config.task).identity_json)
    del facts["manifest"]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == expected


def test_tasks_that_adapt_otherwise_are_other_tasks(tmp_path: Path, bundle: Path):
    plans = [
        *(plan_of(algorithm) for algorithm in (*GRADIENTS, "reptile")),
        plan_of("maml", meta={"inner_steps": 1}),
        plan_of("maml", meta={"inner_steps": K, "query_fraction": 0.5}),
        plan_of("maml", meta={"inner_steps": K, "query_batches": 2}),
        plan_of("maml", meta={"inner_steps": K, "meta_learning_rate": 0.25}),
        plan_of("reptile", personal=["output.bias"]),
        {"batch_size": B, "personal": ["output.bias"]},
    ]
    found = [task(tmp_path, bundle, plan) for plan in plans]
    for one, other in itertools.combinations(found, 2):
        assert one.task_id != other.task_id
    assert [t.kind for t in found[:4]] == [UpdateKind.GRADIENT] * 3 + [UpdateKind.DELTA]
