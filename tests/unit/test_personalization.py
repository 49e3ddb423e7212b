"""Adapting, judging, merging and serving a model of one's own, and everything that can prevent it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk import PersonalizedMobileClient, events
from client_sdk.conditions import Conditions
from client_sdk.descent import Descent
from client_sdk.errors import CheckpointKeyError, NoPersonalModel, StateDirUnusable, TrainingPaused
from client_sdk.identity import DeviceIdentity
from client_sdk.inference import PersonalInference
from client_sdk.memory import DeviceMemory
from client_sdk.personal_merge import interpolated
from client_sdk.personal_store import PersonalModelStore
from client_sdk.personalization import Gain, MergePolicy, PersonalizationConfig, Retention
from client_sdk.personalizer import judge
from client_sdk.power import PowerMonitor, PowerPolicy
from client_sdk.protocol.errors import (
    ConfigurationError,
    MemoryBudgetExceeded,
    NotEnoughExamples,
    ProgramInputError,
    TrainingDiverged,
    UnknownMethod,
)
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.meta_learning import ExampleSplit, MetaAlgorithm, MetaBatches, MetaPlan
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan
from client_sdk.store import MemoryDeviceStore
from tests.devices import BATCH, NUM_PARAMETERS, PARAMETERS, ToyServer, make_manifest, make_model
from tests.faults import DiskModel, FaultyFiles, disk_full
from tests.personal import ServingProgram, bits, labelled, serving_manifest, toy_logits

PROFILE = DeviceProfile("phone", DeviceTier.LOW_END)
WEIGHTS = np.random.default_rng(3).normal(0, 0.3, NUM_PARAMETERS).astype(np.float32)
NEWER = np.random.default_rng(4).normal(0, 0.3, NUM_PARAMETERS).astype(np.float32)
DATA = labelled(20)
CHOICES = PersonalizationConfig(inner_steps=5, inner_lr=0.5)


def client(program: ServingProgram | None = None, **settings: Any) -> PersonalizedMobileClient:
    config = settings.pop("config", CHOICES)
    return PersonalizedMobileClient(
        program or ServingProgram(), PROFILE, personalization_config=config, **({"data": DATA} | settings)
    )


# --- adapting ------------------------------------------------------------------------------------------------


def test_a_personal_model_is_k_steps_on_the_support_examples_and_nothing_else():
    model = client().personalize(global_weights=WEIGHTS, model_version=7)
    x, y = DATA
    split = ExampleSplit.of(x, y, 0.2)
    batches = MetaBatches.of("maml", MetaPlan(inner_steps=5), split, batch_size=BATCH, seed=0, shuffle=True)
    expected, _ = Descent(ServingProgram(), BATCH).run(WEIGHTS, x, y, batches.support, 0.5)
    assert model.weights.tobytes() == expected.tobytes()
    record = model.record
    assert (record.adapted, record.validated, record.steps, record.model_version) == (True, True, 5, 7)
    assert (record.support_examples, record.query_examples) == (len(split.support), len(split.query)) == (16, 4)
    assert record.of_global is not None
    assert record.of_personal is not None
    assert record.of_personal.loss < record.of_global.loss


def test_the_examples_that_judge_change_nothing_of_the_model():
    x, y = DATA
    query = ExampleSplit.of(x, y, 0.2).query
    program, seen = ServingProgram(), []
    run = program.run

    def spy(method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if method.startswith(("train", "grad")):
            *_, batch, _labels, mask = inputs
            seen.extend(row.tobytes() for row, there in zip(batch, mask, strict=True) if there)
        return run(method, *inputs)

    program.run = spy  # type: ignore[method-assign]
    client(program).personalize(global_weights=WEIGHTS, model_version=0)
    assert seen
    assert not {x[row].tobytes() for row in query} & set(seen)
    seen.clear()
    refit = client(program, config=PersonalizationConfig(inner_steps=20, inner_lr=0.1, refit=True))
    model = refit.personalize(global_weights=WEIGHTS, model_version=0)
    assert {x[row].tobytes() for row in query} <= set(seen), "only where the app asks for it"
    assert model.record.of_personal != judge(ServingProgram(), model.weights, x[query], y[query])


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9))
def test_adapting_by_no_steps_is_the_global_model_to_the_bit(seed: int, n: int):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=NUM_PARAMETERS).astype(np.float32)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    device = client(config=PersonalizationConfig(inner_steps=0))
    model = device.personalize(global_weights=weights, model_version=0)
    assert not model.record.adapted
    expected = PersonalInference(ServingProgram(), weights).logits(x)
    assert device.infer_with_personalized_model(x).tobytes() == expected.tobytes()


def test_only_the_named_layers_adapt():
    device = client(config=PersonalizationConfig(inner_lr=0.5, personal_layers=("bias",)))
    model = device.personalize(global_weights=WEIGHTS, model_version=0)
    bias = slice(PARAMETERS[1].offset, None)
    assert model.weights[: PARAMETERS[1].offset].tobytes() == WEIGHTS[: PARAMETERS[1].offset].tobytes()
    assert not np.any(model.weights[bias] == WEIGHTS[bias])
    wrong = client(config=PersonalizationConfig(personal_layers=("head",)))
    with pytest.raises(ConfigurationError, match="no layer 'head'"):
        wrong.personalize(global_weights=WEIGHTS, model_version=0)


def test_a_model_that_its_own_examples_judge_worse_does_not_serve():
    weights, seen, rng = np.zeros(NUM_PARAMETERS, np.float32), [], np.random.default_rng(0)
    noise = rng.normal(size=(20, 2)).astype(np.float32), rng.integers(0, 3, 20)
    device = client(config=PersonalizationConfig(inner_lr=30.0), on_event=seen.append, data=noise)
    model = device.personalize(global_weights=weights, model_version=0)
    record = model.record
    assert record.of_global is not None
    assert record.of_personal is not None
    assert record.of_personal.loss > record.of_global.loss, "the figures are those of the model that was refused"
    assert not record.adapted
    assert model.weights.tobytes() == weights.tobytes()
    assert seen == [events.Personalized(record)]


def test_one_example_adapts_unjudged_and_none_is_an_error_that_leaves_the_old_model():
    device = client()
    x, y = DATA
    before = device.personalize(global_weights=WEIGHTS, model_version=0)
    for empty in ((x[:0], y[:0]), []):
        with pytest.raises((NotEnoughExamples, ProgramInputError)):
            device.personalize(empty, global_weights=WEIGHTS, model_version=1)
    with pytest.raises(NotEnoughExamples, match="no examples"):
        client(data=None).personalize(global_weights=WEIGHTS, model_version=1)
    assert device.personal_model is before
    for few in ((x[:1], y[:1]), (x[[0, 0, 0]], y[[0, 0, 0]])):
        model = device.personalize(few, global_weights=WEIGHTS, model_version=1)
        assert (model.record.adapted, model.record.validated) == (True, False)
        assert (model.record.query_examples, model.record.of_personal) == (0, None)
        assert not np.array_equal(model.weights, WEIGHTS)


def test_one_class_is_learned_as_any_other():
    data = labelled(10, classes=1)
    model = client().personalize(data, global_weights=WEIGHTS, model_version=0)
    assert model.record.of_personal is not None
    assert model.record.adapted
    assert model.record.of_personal.accuracy == 1.0


def test_what_cannot_be_adapted_to_is_a_typed_error_and_the_old_model_stays():
    device, (x, y) = client(), DATA
    before = device.personalize(global_weights=WEIGHTS, model_version=0)
    for data, weights, error in [
        ((x * np.float32(np.nan), y), WEIGHTS, ProgramInputError),
        ((x, y + 3), WEIGHTS, ProgramInputError),
        ((x[:, :1], y), WEIGHTS, ProgramInputError),
        ((x, y[:3]), WEIGHTS, ProgramInputError),
        (DATA, WEIGHTS[:-1], ProgramInputError),
        (DATA, WEIGHTS * np.float32(np.inf), ProgramInputError),
        ((x * np.float32(1e30), y), WEIGHTS, TrainingDiverged),
    ]:
        with pytest.raises(error):
            device.personalize(data, global_weights=weights, model_version=1)
        assert device.personal_model is before
    for config in (PersonalizationConfig(batch_size=3), PersonalizationConfig(batch_size=64)):
        if config.batch_size == 64:
            client(config=config).personalize(global_weights=WEIGHTS, model_version=0)  # of slices
            continue
        with pytest.raises(UnknownMethod, match="batch size 3"):
            client(config=config).personalize(global_weights=WEIGHTS, model_version=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_steps": -1},
        {"inner_lr": 0},
        {"inner_lr": float("inf")},
        {"meta_lr": float("nan")},
        {"val_split": 1.0},
        {"val_split": 0},
        {"batch_size": 0},
        {"personal_layers": ()},
        {"merge": "forget"},
        {"personal_share": 1.5},
        {"seed": -1},
        {"outer_steps": 3},
    ],
)
def test_choices_that_mean_nothing_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValidationError):
        PersonalizationConfig.model_validate(settings)


def test_choices_have_the_specifications_names_and_defaults_and_each_is_explained():
    config = PersonalizationConfig()
    assert (config.inner_steps, config.inner_lr, config.meta_lr, config.val_split) == (5, 0.01, 0.001, 0.2)
    assert all(field.description for field in PersonalizationConfig.model_fields.values())
    with pytest.raises(ValidationError):
        config.inner_steps = 3  # type: ignore[misc]


def test_what_the_app_has_not_chosen_follows_the_task():
    plan = TrainingPlan(algorithm="maml", learning_rate=0.4, meta=MetaPlan(inner_steps=3, query_fraction=0.5))
    assert PersonalizationConfig().for_task(plan).model_dump(include={"inner_steps", "inner_lr", "val_split"}) == {
        "inner_steps": 3,
        "inner_lr": 0.4,
        "val_split": 0.5,
    }
    chosen = PersonalizationConfig(inner_steps=5, inner_lr=0.01)
    assert (chosen.for_task(plan).inner_steps, chosen.for_task(plan).inner_lr) == (5, 0.01)
    assert chosen.for_task(TrainingPlan()) == chosen
    of_averaging = PersonalizationConfig().for_task(TrainingPlan(learning_rate=0.1))
    assert (of_averaging.inner_steps, of_averaging.inner_lr) == (5, 0.1)


# --- merging -------------------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=20), st.floats(0, 1))
def test_interpolation_ends_in_the_global_and_in_the_personal_model(rows: list[tuple], share: float):
    new_global, personal, old_global = np.array(rows, np.float32).T
    assert np.array_equal(interpolated(new_global, personal, old_global, 0.0), new_global)
    assert np.array_equal(interpolated(old_global, personal, old_global, 1.0), personal)
    between = interpolated(new_global, personal, old_global, share)
    exact = new_global + share * (personal.astype(np.float64) - old_global)
    np.testing.assert_allclose(between, exact, rtol=1e-6, atol=1e-9)


def renewed(**choices: Any) -> tuple[PersonalizedMobileClient, Any, Any]:
    """A device that has adapted the first model and met the second one."""
    device = client(config=PersonalizationConfig(inner_steps=5, inner_lr=0.5, **choices))
    old = device.personalize(global_weights=WEIGHTS, model_version=1)
    return device, old, device.on_global_model(NEWER, 2)


def test_replacing_leaves_nothing_of_the_old_model():
    device, old, new = renewed(merge="replace")
    assert new.weights.tobytes() == NEWER.tobytes()
    assert not new.record.adapted
    assert new.record.model_version == 2
    assert new.record.retention.accuracy_own in {0.0, None}
    assert new.record.retention.loss_own == 0.0
    assert old.record.retention is None
    x = DATA[0]
    assert device.infer_with_personalized_model(x).tobytes() == toy_logits(NEWER, x).tobytes()


def test_readapting_is_adapting_the_new_model_with_what_is_kept_on_record():
    _, old, new = renewed()
    fresh = client().personalize(global_weights=NEWER, model_version=2)
    assert new.weights.tobytes() == fresh.weights.tobytes()
    assert new.global_weights.tobytes() == NEWER.tobytes()
    retention = new.record.retention
    assert retention.merged == Gain(accuracy=0, loss=0), "before it adapts the new model is the global one"
    x, y = (part[ExampleSplit.of(*DATA, 0.2).query] for part in DATA)
    losses = [judge(ServingProgram(), w, x, y).loss for w in (WEIGHTS, old.weights, NEWER, new.weights)]
    assert retention.loss_own == pytest.approx((losses[2] - losses[3]) / (losses[0] - losses[1]))
    assert retention.loss_kept == pytest.approx((losses[0] - losses[3]) / (losses[0] - losses[1]))
    assert retention.loss_kept > 0.8


@pytest.mark.parametrize("merge", ["readapt", "interpolate", "replace"])
def test_a_global_model_gone_bad_does_not_take_the_place_of_a_good_personal_one(merge: str):
    seen: list[events.Event] = []
    device = client(config=CHOICES.model_copy(update={"merge": MergePolicy(merge)}), on_event=seen.append)
    good = device.personalize(global_weights=WEIGHTS, model_version=1)
    bad = (-100 * good.weights).astype(np.float32)
    found = device.on_global_model(bad, 2)
    if merge == "replace":
        assert found.weights.tobytes() == bad.tobytes(), "that is what the app has asked for"
        return
    assert found is good
    assert device.personal_model is good
    assert isinstance(seen[-1], events.NotPersonalized)
    assert "model 2" in seen[-1].detail
    if merge == "readapt":
        assert device.on_global_model(NEWER, 3).record.model_version == 3, "the next good one is welcome"


def test_what_a_refitted_model_keeps_is_not_measured_on_what_it_was_fitted_to():
    _, _, new = renewed(refit=True)
    assert new.record.retention is None


def test_an_update_that_is_done_is_not_lost_with_the_adaptation_after_it():
    seen: list[events.Event] = []
    device = client(conditions=lambda: "somebody is on the phone", on_event=seen.append)
    update = device.train_with_personalization(DATA, WEIGHTS, "fomaml")
    assert update is not None
    assert any(isinstance(event, events.Paused) for event in seen)
    assert device.personal_model is None


@pytest.mark.parametrize("steps", [0, 3])
def test_interpolating_keeps_what_was_learned_and_may_adapt_after_it(steps: int):
    _, old, new = renewed(merge="interpolate", personal_share=1.0, merge_steps=steps)
    kept = interpolated(NEWER, old.weights, WEIGHTS, 1.0)
    assert (new.weights.tobytes() == kept.tobytes()) is (steps == 0)
    assert new.record.steps == steps
    retention = new.record.retention
    assert retention.loss_merged > 0.5, "the merge alone keeps most of it"
    assert (retention.merged == retention.after) is (steps == 0)


def test_the_same_global_model_with_other_examples_is_adapted_anew_whatever_the_policy():
    device = client(config=PersonalizationConfig(inner_steps=5, inner_lr=0.5, merge="interpolate"))
    device.personalize(global_weights=WEIGHTS, model_version=1)
    other = labelled(20, seed=5)
    again = device.on_global_model(WEIGHTS, 1, other)
    assert (
        again.weights.tobytes()
        == client().personalize(other, global_weights=WEIGHTS, model_version=1).weights.tobytes()
    )


def test_shares_of_a_gain():
    def shares(before: float, renewed: float, after: float) -> tuple[float | None, float | None]:
        gains = [Gain(accuracy=gain, loss=gain) for gain in (before, renewed, after, after)]
        found = Retention(**dict(zip(("before", "renewed", "merged", "after"), gains, strict=True)))
        assert (found.loss_kept, found.loss_own) == (found.accuracy_kept, found.accuracy_own)
        assert (found.accuracy_merged, found.loss_merged) == (found.accuracy_kept, found.loss_kept)
        return found.accuracy_kept, found.accuracy_own

    assert shares(0.5, 0.0, 0.25) == (0.5, 0.5)
    assert shares(0.5, 0.25, 0.25) == (1.0, 0.5), "what the global model does by itself is not forgotten"
    assert shares(0.5, -0.25, 0.25) == (0.0, 0.5)
    assert shares(0.0, 0.1, 0.1) == (None, None)
    assert shares(-0.1, 0.1, 0.1) == (None, None)


# --- keeping and serving -------------------------------------------------------------------------------------


def test_a_later_process_serves_what_was_kept(tmp_path: Path):
    store = PersonalModelStore(tmp_path, key=bytes(range(32)))
    model = client(personal_models=store).personalize(global_weights=WEIGHTS, model_version=3)
    later = client(personal_models=PersonalModelStore(tmp_path, key=bytes(range(32))))
    assert bits(later.personal_model) == bits(model)
    x = DATA[0]
    assert later.infer_with_personalized_model(x).tobytes() == toy_logits(model.weights, x).tobytes()
    assert later.evaluate(*DATA) == judge(ServingProgram(), model.weights, *DATA)


@pytest.mark.parametrize("key", [None, bytes(32)])
def test_a_wrong_key_is_an_error_and_costs_the_owner_nothing(tmp_path: Path, key: bytes | None):
    right = bytes(range(32))
    model = client(personal_models=PersonalModelStore(tmp_path, key=right)).personalize(
        global_weights=WEIGHTS, model_version=3
    )
    store = PersonalModelStore(tmp_path, key=key)
    device = client(personal_models=store)
    with pytest.raises(CheckpointKeyError):
        _ = device.personal_model
    for version in range(3):
        with pytest.raises(CheckpointKeyError, match="give that key, or clear"):
            device.personalize(global_weights=NEWER, model_version=version)
    assert bits(client(personal_models=PersonalModelStore(tmp_path, key=right)).personal_model) == bits(model)
    store.clear()
    assert device.personalize(global_weights=NEWER, model_version=4).record.model_version == 4


def test_without_a_personal_model_the_global_one_serves_and_without_that_there_is_an_error():
    x = DATA[0]
    given = client(weights={p.name: WEIGHTS[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in PARAMETERS})
    assert given.infer_with_personalized_model(x).tobytes() == toy_logits(WEIGHTS, x).tobytes()
    assert given.inference() is given.inference(), "prepared once"
    with pytest.raises(NoPersonalModel):
        client().infer_with_personalized_model(x)
    with pytest.raises(ConfigurationError, match="no program yet"):
        PersonalizedMobileClient(None, PROFILE).infer_with_personalized_model(x)


def test_a_model_of_another_program_is_set_aside_with_an_event_and_never_mixed(tmp_path: Path):
    store, seen = PersonalModelStore(tmp_path), []
    old = client(personal_models=store).personalize(global_weights=WEIGHTS, model_version=3)
    manifest = serving_manifest(b"another program")
    device = client(ServingProgram(manifest), personal_models=store, on_event=seen.append)
    assert device.personal_model is None
    assert seen == [events.PersonalModelSetAside(3, old.record.program_sha256)]
    new = device.on_global_model(NEWER, 4)
    assert new.record.retention is None
    assert new.weights.tobytes() == client().personalize(global_weights=NEWER, model_version=4).weights.tobytes()
    assert bits(store.load(serving_manifest())) == bits(old), "it is there should its program come back"


def test_a_process_that_dies_while_it_adapts_leaves_the_old_model():
    for call in range(5):
        disk = DiskModel()
        before = client(personal_models=PersonalModelStore("/state/personal", files=disk))
        old = before.personalize(global_weights=WEIGHTS, model_version=0)
        program = ServingProgram()

        def die(program: ServingProgram = program, call: int = call) -> None:
            if program.runs == call:
                raise KeyboardInterrupt

        program.before_run = die
        dying = client(program, personal_models=PersonalModelStore("/state/personal", files=disk))
        with pytest.raises(KeyboardInterrupt):
            dying.on_global_model(NEWER, 1)
        for device in (dying, client(personal_models=PersonalModelStore("/state/personal", files=disk))):
            assert bits(device.personal_model) == bits(old)


def test_a_full_disk_leaves_the_old_model_serving():
    disk = DiskModel()
    old = client(personal_models=PersonalModelStore("/state/personal", files=disk)).personalize(
        global_weights=WEIGHTS, model_version=0
    )
    full = FaultyFiles(disk, 5, fault=disk_full)
    device = client(personal_models=PersonalModelStore("/state/personal", files=full))
    with pytest.raises(StateDirUnusable):
        device.on_global_model(NEWER, 1)
    assert bits(device.personal_model) == bits(old)


# --- under the device's conditions ---------------------------------------------------------------------------


class Sensors:
    """Conditions that change with the program's calls."""

    def __init__(self, program: ServingProgram, levels: Callable[[int], float]) -> None:
        self.program, self.levels = program, levels

    def read(self) -> Conditions:
        return Conditions(battery_level=self.levels(self.program.runs))


@pytest.mark.parametrize(("calls", "allowed"), [(0, 0), (2, 2)])
def test_a_phone_that_is_paused_does_not_adapt(calls: int, allowed: int):
    program = ServingProgram()
    sensors = Sensors(program, lambda runs: 0.9 if runs < calls else 0.1)
    policy = PowerPolicy(check_every_calls=1, require_unmetered=False, require_idle=False, duty_by_battery=())
    device = client(program, power_monitor=PowerMonitor(sensors, policy), weights=WEIGHTS)
    with pytest.raises(TrainingPaused, match="battery"):
        device.personalize(global_weights=WEIGHTS, model_version=0)
    assert program.runs == allowed
    assert device.personal_model is None


def test_the_apps_own_reason_holds_it_back_between_two_steps():
    program = ServingProgram()
    device = client(program, conditions=lambda: "the user opted out" if program.runs == 3 else None)
    with pytest.raises(TrainingPaused, match="opted out"):
        device.personalize(global_weights=WEIGHTS, model_version=0)
    assert program.runs == 3


def test_what_does_not_fit_into_memory_is_refused_before_anything_runs():
    program = ServingProgram()
    with pytest.raises(MemoryBudgetExceeded, match="does not fit into"):
        client(program, memory_limit_bytes=2**20).personalize(global_weights=WEIGHTS, model_version=0)
    assert program.runs == 0


# --- with a server -------------------------------------------------------------------------------------------


class World:
    """A device of a toy server whose program serves."""

    def __init__(self, work: int = 1) -> None:
        self.server = ToyServer(work=work)
        self.server.hand_out(serving_manifest().to_json().encode(), b"stands for program.pte", make_model())
        self.identity = DeviceIdentity.generate()
        self.store = MemoryDeviceStore(self.identity)
        self.events: list[events.Event] = []
        self.program = ServingProgram()

    def client(self, **settings: Any) -> PersonalizedMobileClient:
        return client(
            self.program,
            transport=self.server.device(self.identity.device_id),
            store=self.store,
            on_event=self.events.append,
            rng=random.Random(0),
            wait=lambda *_: None,
            **settings,
        )

    def seen(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def world() -> Iterator[World]:
    return World()


def test_after_its_rounds_a_device_adapts_the_newest_model(world: World):
    device = world.client()
    assert device.run().cause == "finished"
    newest = np.frombuffer(decode_frame(world.server.model).payload, np.float32)
    expected = client().personalize(global_weights=newest, model_version=0)
    assert device.personal_model is not None
    assert device.personal_model.weights.tobytes() == expected.weights.tobytes()
    assert [event.record for event in world.seen(events.Personalized)] == [device.personal_model.record]
    assert device.personal_model.record.manifest_sha256 == world.server.hashes["manifest_sha256"]
    program_calls = world.program.runs
    device.run()
    assert world.program.runs == program_calls, "nothing is new: nothing is adapted again"
    world.server.hand_out(serving_manifest().to_json().encode(), b"stands for program.pte", make_model(1))
    device.run()
    assert device.personal_model.record.retention is not None


def test_a_device_that_is_not_selected_gets_the_newest_model_all_the_same(world: World):
    world.server.work = 0
    device = world.client()
    with pytest.raises(NoPersonalModel):
        device.infer_with_personalized_model(DATA[0])
    newest = device.fetch_global_model()
    assert world.server.requests[:3] == ["latest-model", "enrol", "latest-model"]
    assert newest.version == 0
    x = DATA[0]
    assert device.infer_with_personalized_model(x).tobytes() == toy_logits(newest.weights, x).tobytes()
    assert device.state.phase.value == "idle", "the session knows nothing of it"


def test_what_prevents_a_personal_model_is_an_event_and_the_run_counts(world: World):
    world.server.before = lambda name: (_ for _ in ()).throw(StateDirUnusable("no")) if name == "latest-model" else None
    assert world.client().run().reports == 1
    assert world.seen(events.NotPersonalized) == [events.NotPersonalized("no")]
    world.server.before = lambda _: None
    world.server.blobs[world.server.hashes["model_sha256"]] = b"something else"
    world.store = MemoryDeviceStore(world.identity)
    world.client().run()
    assert len(world.seen(events.NotPersonalized)) == 2


def test_a_stopped_run_and_a_paused_phone_do_not_adapt(world: World):
    stop = threading.Event()
    stop.set()
    world.client().run(stop=stop)
    assert "latest-model" not in world.server.requests
    world.events.clear()
    world.client(conditions=lambda: "the user opted out" if world.seen(events.Finished) else None).run()
    paused = world.seen(events.Paused)[-1]
    assert (paused.step, paused.detail) == ("adaptation", "the user opted out")
    assert not world.seen(events.Personalized)


def test_a_tasks_personal_layers_are_the_devices_own_in_what_it_begins_with(world: World):
    world.server.amend = {"plan": TrainingPlan(batch_size=BATCH, personal=("bias",))}
    own = np.array([7.0, 8.0, 9.0], np.float32)
    task = world.server.next_assignment().task_id
    world.store.stage_memory(DeviceMemory(task, "1" * 32, {"personal": own}))
    world.store.settle_memory("1" * 32, accepted=True)
    newest = world.client().fetch_global_model()
    shared = np.frombuffer(decode_frame(world.server.model).payload, np.float32)
    assert newest.weights.tolist() == [*shared[:6], *own]


# --- what a server learns to adapt from ----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_what_is_sent_is_an_ordinary_update_and_the_model_of_ones_own_follows_it(algorithm: MetaAlgorithm):
    device = client(weights=WEIGHTS)
    sent = device.train_with_personalization(DATA, WEIGHTS, algorithm, model_version=4)
    assert sent is not None
    plan = TrainingPlan(
        algorithm=algorithm,
        batch_size=BATCH,
        learning_rate=0.5,
        meta=MetaPlan(inner_steps=5, query_fraction=0.2, meta_learning_rate=0.001),
    )
    expected = client().train_local_model(DATA, 4, weights=WEIGHTS, plan=plan)
    assert expected is not None
    assert sent.kind is plan.update_kind
    assert {name: part.tobytes() for name, part in sent.gradients.items()} == {
        name: part.tobytes() for name, part in expected.gradients.items()
    }
    assert sent.metadata is not None
    assert sent.metadata["model_version"] == 4
    assert all(isinstance(fact, str | int | float) for fact in sent.metadata.values()), "no model, no gradient"
    assert bits(device.personal_model) == bits(client().personalize(global_weights=WEIGHTS, model_version=4))


@pytest.mark.parametrize("algorithm", ["maml", "per-fedavg"])
def test_an_algorithm_that_the_program_was_not_exported_for_is_named(algorithm: MetaAlgorithm):
    device = client()
    with pytest.raises(UnknownMethod, match=algorithm.replace("-", "_")):
        device.train_with_personalization(DATA, WEIGHTS, algorithm)
    assert device.personal_model is None


def test_an_unknown_algorithm_or_precision_and_a_missing_method_are_named():
    device = client()
    with pytest.raises(ConfigurationError, match=r"maml.*fomaml.*reptile.*per-fedavg"):
        device.train_with_personalization(DATA, WEIGHTS, "mamml")  # type: ignore[arg-type]
    with pytest.raises(UnknownMethod, match=f"maml={BATCH} "):
        device.train_with_personalization(DATA, WEIGHTS, "maml")
    with pytest.raises(ConfigurationError, match="int9"):
        client(precision="int9")
    with pytest.raises(UnknownMethod, match="no infer method: export it with --batch-sizes infer=1,32"):
        PersonalInference(ServingProgram(make_manifest()), WEIGHTS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_answered(value: float):
    device = client()
    device.personalize(global_weights=WEIGHTS, model_version=0)
    with pytest.raises(ProgramInputError, match="NaN or infinite"):
        device.infer_with_personalized_model(DATA[0] * np.float32(value))
