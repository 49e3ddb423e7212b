"""A device that is given meta-learning to do, or layers to keep: what it sends, remembers, and never sends."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk import MobileClient, events
from client_sdk.client import RunSummary
from client_sdk.errors import BundleMismatch
from client_sdk.identity import DeviceIdentity
from client_sdk.memory import PERSONAL, RESIDUAL, DeviceMemory
from client_sdk.meta_training import MetaTrainer
from client_sdk.privacy import LocalPrivacy, noised
from client_sdk.privacy_ledger import LEDGER_FILE, LocalPrivacyLedger
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError, LeaseExpired, NotEnoughExamples, UnknownMethod
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment, I64SharesEncoding, ReportFacts
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.privacy import encode_clipped
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind
from client_sdk.session_state import RetryPolicy
from client_sdk.store import DeviceStore, FileDeviceStore, MemoryDeviceStore
from client_sdk.training import LocalTrainer
from client_sdk.trainings import begin_training
from tests.aggregators import opened_codes
from tests.devices import ToyServer
from tests.meta import (
    BODY,
    PARAMETERS,
    PROGRAM_BYTES,
    D,
    Examples,
    MetaProgram,
    make_examples,
    make_manifest,
    make_model,
    make_weights,
    with_roles,
)
from tests.unit.test_local_privacy import policy
from tests.unit.test_secure_reports import CURVE, make_plan

IDENTITY = DeviceIdentity.from_private_bytes(bytes(range(32)))
WEIGHTS = make_weights()
FEDPER = TrainingPlan(local_epochs=2, batch_size=4, learning_rate=0.5, personal=("output",))
LAYERS = SharedLayers.of(PARAMETERS, FEDPER.personal)


def meta_plan(algorithm: str, **changes: Any) -> TrainingPlan:
    meta = MetaPlan(inner_steps=2, query_fraction=0.3, query_batches=2)
    return TrainingPlan(algorithm=algorithm, batch_size=4, learning_rate=0.3, meta=meta, **changes)


def serve(plan: TrainingPlan, work: int = 1, **amend: Any) -> ToyServer:
    server = ToyServer(work=work)
    server.hand_out(make_manifest().to_json().encode(), PROGRAM_BYTES, make_model(WEIGHTS))
    server.amend |= {"plan": plan, "kind": plan.update_kind} | amend
    return server


def live(
    server: ToyServer,
    store: DeviceStore | None = None,
    data: Examples | None = None,
    told: list[events.Event] | None = None,
    **changes: Any,
) -> RunSummary:
    """One process of the device, from its saved state to its end."""
    store = store or MemoryDeviceStore(IDENTITY)
    settings_: dict[str, Any] = {"policy": RetryPolicy(max_attempts=3), "wait": lambda *_: None} | changes
    client = MobileClient(
        settings_.pop("program", MetaProgram()),
        DeviceProfile("toy"),
        data=data or make_examples(),
        transport=server.device(store.identity.device_id),
        store=store,
        rng=random.Random(0),
        on_event=(told if told is not None else []).append,
        **settings_,
    )
    return client.run()


def assignment_of(server: ToyServer, number: int = 1) -> Assignment:
    """The server's assignment of this number, without giving it out."""
    twin = copy.copy(server)
    twin.given = number - 1
    return twin.next_assignment()


def honest(server: ToyServer, start: np.ndarray = WEIGHTS, data: Examples | None = None) -> Any:
    """What training by the assignment comes to."""
    assignment = assignment_of(server)
    run = begin_training(MetaProgram(), start, data or make_examples(), assignment.plan, assignment.shuffle_seed)
    while not run.finished:
        run.advance()
    return run.result()


def only(server: ToyServer) -> np.ndarray:
    (update,) = server.updates().values()
    return update


# --- meta-learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_a_device_sends_what_the_plan_asks_for_and_says_what_it_is(algorithm: str):
    server = serve(meta_plan(algorithm))
    told: list[events.Event] = []
    assert live(server, told=told).reports == 1
    result = honest(server)
    assert only(server).tobytes() == result.update(server.amend["plan"]).tobytes()
    ((_, frame),) = server.reports.values()
    facts = ReportFacts.model_validate(decode_frame(frame).metadata)
    expected_kind = UpdateKind.DELTA if algorithm == "reptile" else UpdateKind.GRADIENT
    assert (facts.kind, facts.algorithm, facts.steps) == (expected_kind, algorithm, "2")
    assert float(facts.train_loss) == result.last_epoch_loss
    progress = [e for e in told if isinstance(e, events.TrainingProgress)]
    assert progress[-1].examples == progress[-1].total_examples


@pytest.mark.parametrize("algorithm", [*META_ALGORITHMS, "fedavg"])
def test_an_assignment_of_another_kind_than_its_algorithm_sends_is_given_back(algorithm: str):
    plan = FEDPER if algorithm == "fedavg" else meta_plan(algorithm)
    wrong = UpdateKind.DELTA if plan.update_kind is UpdateKind.GRADIENT else UpdateKind.GRADIENT
    server = serve(plan, kind=wrong)
    program = MetaProgram()
    error = live(server, program=program).error
    assert isinstance(error, BundleMismatch)
    assert f"kind {wrong}; with {algorithm} this device sends {plan.update_kind}s" in str(error)
    assert server.abandoned[0][1] == "training-failed"
    assert program.calls == []


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "per-fedavg"])
def test_too_few_examples_cost_the_assignment_not_the_device(algorithm: str):
    x, y = make_examples(1)
    alike = np.repeat(x, 5, axis=0), np.repeat(y, 5)
    server, store = serve(meta_plan(algorithm), work=2), MemoryDeviceStore(IDENTITY)
    given_back: list[tuple[str, str]] = []

    def other_task_next(request: str) -> None:
        if request == "abandon":
            given_back[:] = server.abandoned
            server.amend |= {"plan": meta_plan("reptile"), "kind": UpdateKind.DELTA}

    server.after = other_task_next
    assert live(server, store, alike).reports == 1
    assert [reason for _, reason in given_back] == ["training-failed"]
    server.amend |= {"plan": meta_plan(algorithm), "kind": UpdateKind.GRADIENT}
    with pytest.raises(NotEnoughExamples):
        MetaTrainer(MetaProgram()).begin(WEIGHTS, *alike, server.amend["plan"], 1)


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (7, 1)])
def test_one_example_or_one_class_is_enough_for_reptile(n: int, classes: int):
    server = serve(meta_plan("reptile"))
    x, y = make_examples(n)
    assert live(server, data=(x, y % classes)).reports == 1


def test_a_program_that_cannot_do_it_is_named_with_the_way_out():
    server = serve(meta_plan("maml"))
    manifest = with_roles(Role.TRAIN, Role.GRAD)
    server.hand_out(manifest.to_json().encode(), PROGRAM_BYTES, make_model(WEIGHTS))
    error = live(server, program=MetaProgram(manifest)).error
    assert isinstance(error, UnknownMethod)
    assert "--batch-sizes maml=4 --inner-steps 2" in str(error)
    assert server.abandoned


@pytest.mark.parametrize("algorithm", META_ALGORITHMS)
def test_a_device_killed_in_any_call_resumes_to_the_same_report(algorithm: str, tmp_path: Path):
    class Dead(BaseException):
        pass

    undisturbed = serve(meta_plan(algorithm))
    live(undisturbed)
    server, kills = serve(meta_plan(algorithm)), 0
    while not server.reports:
        lives = iter([None, Dead])  # each process makes one call, and dies in its second

        def before_run(lives=lives) -> None:
            how = next(lives, Dead)
            if how is not None:
                raise how

        store = FileDeviceStore(tmp_path / "state")
        try:
            live(server, store, program=MetaProgram(before_run=before_run), monotonic=ticking())
        except Dead:
            kills += 1
        finally:
            store.close()
        assert kills < 20
    assert only(server).tobytes() == only(undisturbed).tobytes()
    assert kills >= 1 or algorithm == "reptile"


def ticking() -> Callable[[], float]:
    """A clock on which every call is late enough for a checkpoint."""
    now = iter(range(0, 10**9, 10**4))
    return lambda: float(next(now))


# --- personal layers ------------------------------------------------------------------------------------------


def traces(frame: bytes, *vectors: np.ndarray) -> int:
    """How many values of these vectors are somewhere in the bytes, zeros aside."""
    return sum(frame.count(value.tobytes()) > 0 for vector in vectors for value in vector if value)


def personal_plan(algorithm: str) -> TrainingPlan:
    return FEDPER if algorithm == "fedavg" else meta_plan("reptile", personal=("output",))


@pytest.mark.parametrize("algorithm", ["fedavg", "reptile"])
def test_personal_layers_are_trained_and_kept_and_the_shared_ones_are_sent(algorithm: str):
    server, store = serve(personal_plan(algorithm), work=2), MemoryDeviceStore(IDENTITY)
    start = WEIGHTS
    for number in (1, 2):
        server.work = number
        live(server, store)
        result = honest(server, start)
        sent = [tensor for _, tensor in sorted(server.updates().items())][-1]
        assert sent.tobytes() == result.delta[:BODY].tobytes()
        memory = store.memory(assignment_of(server).task_id)
        assert memory is not None
        own = memory.vectors[PERSONAL]
        assert own.tobytes() == result.weights[BODY:].tobytes()
        assert not np.array_equal(own, start[BODY:])
        start = LAYERS.with_personal(WEIGHTS, own)


@settings(max_examples=15)
@given(algorithm=st.sampled_from(["fedavg", "reptile"]), seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 1e3))
def test_nothing_of_the_personal_layers_is_on_the_wire(algorithm: str, seed: int, scale: float):
    server, store = serve(personal_plan(algorithm), work=2), MemoryDeviceStore(IDENTITY)
    own = np.random.default_rng(seed).normal(0, scale, D - BODY).astype(np.float32)
    data = make_examples(11, seed)
    start = LAYERS.with_personal(WEIGHTS, own)
    store.stage_memory(remembered(own))
    store.settle_memory("e" * 32, accepted=True)
    server.work = 1
    live(server, store, data)
    ((_, frame),) = server.reports.values()
    result = honest(server, start, data)
    assert decode_frame(frame).payload.nbytes == 4 * BODY
    assert traces(frame, own, result.weights[BODY:], result.delta[BODY:]) == 0
    assert traces(frame, result.delta[:BODY]) == np.count_nonzero(result.delta[:BODY])


def remembered(own: np.ndarray) -> DeviceMemory:
    return DeviceMemory(assignment_of(serve(FEDPER)).task_id, "e" * 32, {PERSONAL: own})


@pytest.mark.parametrize("weakened", ["all", "zeros"])
def test_a_device_that_sent_more_than_the_shared_layers_would_be_found(weakened: str, monkeypatch: Any):
    """What the test above looks for is there as soon as gathering is weakened."""

    def gather(layers: SharedLayers, vector: np.ndarray) -> np.ndarray:
        return vector if weakened == "all" else vector * layers.mask

    monkeypatch.setattr(SharedLayers, "gather", gather)
    server = serve(FEDPER)
    live(server)
    ((_, frame),) = server.reports.values()
    assert decode_frame(frame).payload.nbytes == 4 * D
    assert (traces(frame, honest(server).delta[BODY:]) > 0) is (weakened == "all")


def test_personal_layers_count_once_the_report_is_accepted():
    server, store = serve(FEDPER, work=2), MemoryDeviceStore(IDENTITY)
    refuse = iter([True])

    def lose(request: str) -> None:
        if request == "upload" and next(refuse, False):
            server.outstanding.clear()
            raise LeaseExpired("too late")

    server.before = lose
    live(server, store)
    accepted = honest(server)
    memory = store.memory(assignment_of(server).task_id)
    assert memory is not None
    # The refused report's layers never were a start: the accepted one began at the server's.
    assert memory.vectors[PERSONAL].tobytes() == accepted.weights[BODY:].tobytes()


def test_personal_layers_of_another_size_are_no_start():
    server, store = serve(FEDPER), MemoryDeviceStore(IDENTITY)
    store.stage_memory(remembered(np.ones(3, np.float32)))
    store.settle_memory("e" * 32, accepted=True)
    live(server, store)
    assert only(server).tobytes() == honest(server).delta[:BODY].tobytes()


def test_layers_that_the_model_does_not_have_are_refused_before_training():
    server, program = serve(FEDPER.model_copy(update={"personal": ("head",)})), MetaProgram()
    error = live(server, program=program).error
    assert isinstance(error, ConfigurationError)
    assert "no layer 'head'" in str(error)
    assert program.calls == []


@pytest.mark.parametrize("algorithm", ["fedavg", "reptile"])
def test_a_killed_device_resumes_with_the_personal_layers_that_training_began_with(algorithm: str, tmp_path: Path):
    class Dead(BaseException):
        pass

    def lives(deaths: bool) -> tuple[bytes, bytes]:
        server, folder = serve(personal_plan(algorithm)), tmp_path / f"{deaths}"
        while len(server.reports) < 2:
            server.work = 1 + len(server.reports)
            calls = iter([None, Dead])

            def before_run(calls=calls) -> None:
                if deaths and (how := next(calls, Dead)) is not None:
                    raise how

            store = FileDeviceStore(folder)
            try:
                live(server, store, program=MetaProgram(before_run=before_run), monotonic=ticking())
                memory = store.memory(assignment_of(server).task_id)
            except Dead:
                memory = None
            finally:
                store.close()
        assert memory is not None
        updates = [tensor for _, tensor in sorted(server.updates().items())]
        return b"".join(update.tobytes() for update in updates), memory.vectors[PERSONAL].tobytes()

    assert lives(deaths=True) == lives(deaths=False)


# --- composed -------------------------------------------------------------------------------------------------


def updates_of(plan: TrainingPlan) -> np.ndarray:
    """What a device sends in the clear."""
    server = serve(plan)
    live(server)
    return only(server)


PLANS = {
    **{algorithm: meta_plan(algorithm) for algorithm in META_ALGORITHMS},
    "fedavg, personal": FEDPER,
    "reptile, personal": personal_plan("reptile"),
}


@pytest.mark.parametrize("name", PLANS)
def test_updates_are_compressed_with_error_feedback_of_the_shared_size(name: str):
    plan, store, line = PLANS[name], MemoryDeviceStore(IDENTITY), "topk:0.3"
    server = serve(plan, compression=line, compression_seed=7)
    live(server, store)
    update = updates_of(plan)
    codec = Codec(CompressionSpec.parse(line), len(update))
    decoded = codec.decode(only(server).tobytes(), 7)
    memory = store.memory(assignment_of(server).task_id)
    assert memory is not None
    assert np.array_equal(decoded + memory.vectors[RESIDUAL], update)
    assert len(memory.vectors[RESIDUAL]) == (BODY if plan.personal else D)
    assert (PERSONAL in memory.vectors) is bool(plan.personal)


@pytest.mark.parametrize("compression", [None, "randomk:0.5"])
@pytest.mark.parametrize("name", PLANS)
def test_updates_are_shared_with_aggregators_who_open_the_clipped_one(name: str, compression: str | None):
    plan, secure = PLANS[name], make_plan()
    more = {} if compression is None else {"compression": compression, "compression_seed": 11}
    server = serve(plan, encoding=I64SharesEncoding(), secure=secure, **more)
    store = MemoryDeviceStore(IDENTITY)
    live(server, store)
    ((_, frame),) = server.reports.values()
    update = updates_of(plan)
    shared = update
    if compression is not None:
        shared = Codec(CompressionSpec.parse(compression), len(update)).project(update, 11)
    device_id = store.identity.device_id
    opened = opened_codes(frame, assignment_of(server), len(update), CURVE, device_id=device_id)
    assert opened.tolist() == encode_clipped(shared, secure.bounds).tolist()


@pytest.mark.parametrize("name", PLANS)
def test_local_privacy_noises_the_update_and_withholds_the_loss(name: str, tmp_path: Path, monkeypatch: Any):
    plan, exact = PLANS[name], policy(fraction_bits=8)
    released: list[np.ndarray] = []

    def watched(update: np.ndarray, *arguments: Any, **more: Any) -> np.ndarray:
        released.append(update.copy())
        return noised(update, *arguments, **more)

    monkeypatch.setattr("client_sdk.privacy.noised", watched)
    server, store = serve(plan), FileDeviceStore(tmp_path)
    private = LocalPrivacy(exact, LocalPrivacyLedger(tmp_path / LEDGER_FILE))
    live(server, store, local_privacy=private)
    store.close()
    ((_, frame),) = server.reports.values()
    assert decode_frame(frame).metadata["train_loss"] == "withheld"
    assert released[0].tobytes() == updates_of(plan).tobytes()
    assert only(server).shape == released[0].shape
    assert not np.array_equal(only(server), released[0])


# --- without a server -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_local_training_returns_an_update_of_the_plans_kind(name: str):
    plan = PLANS[name]
    client = MobileClient(MetaProgram(), DeviceProfile("toy"))
    found = client.train_local_model(make_examples(), 7, weights=WEIGHTS, plan=plan, shuffle_seed=1)
    assert found is not None
    assert found.kind is plan.update_kind
    assert list(found.gradients) == [p.name for p in LAYERS.shared] if plan.personal else [p.name for p in PARAMETERS]
    flat = np.concatenate([np.ravel(array) for array in found.gradients.values()])
    assert flat.tobytes() == updates_of(plan).tobytes()
    assert found.metadata["local_steps"] == (2 if plan.meta is not None else 10)


def test_ordinary_training_is_begun_as_before():
    x, y = make_examples()
    plan = TrainingPlan(batch_size=4)
    run = begin_training(MetaProgram(), WEIGHTS, (x, y), plan, 3)
    while not run.finished:
        run.advance()
    assert run.result().delta.tobytes() == LocalTrainer(MetaProgram()).train(WEIGHTS, x, y, plan, 3).delta.tobytes()
