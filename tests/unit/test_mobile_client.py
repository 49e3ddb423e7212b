"""The facade: local training, a device's life against an in-memory server, and servers that attack it."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk import MobileClient, events
from client_sdk.checkpoint import CheckpointManager
from client_sdk.conditions import Conditions, Network
from client_sdk.errors import (
    BundleMismatch,
    IllegalTransition,
    Interrupted,
    StateDirUnusable,
    TrainingPaused,
    TransportUnavailable,
)
from client_sdk.executor import MAX_MANIFEST_BYTES
from client_sdk.files import OS_FILES
from client_sdk.identity import DeviceIdentity
from client_sdk.power import PowerMonitor, PowerPolicy
from client_sdk.programs import DownloadedPrograms
from client_sdk.protocol.errors import (
    ConfigurationError,
    LeaseExpired,
    ManifestError,
    MemoryBudgetExceeded,
    PocketfedError,
    ProgramError,
    ProgramExecutionError,
    ProgramHashMismatch,
    ProgramInputError,
    ProtocolError,
    StaleReport,
    TrainingDiverged,
    UnknownMethod,
    UpdateOutOfRange,
)
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import Assigned, F32Encoding, Finished, ReportFacts, VirtualTiming, Wait
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan, normaliser
from client_sdk.protocol.updates import UpdateKind
from client_sdk.session_state import Phase, RetryPolicy
from client_sdk.store import DeviceStore, FileDeviceStore, MemoryDeviceStore
from client_sdk.training import LocalTrainer
from tests.devices import (
    BATCH,
    NUM_PARAMETERS,
    PARAMETERS,
    WAIT,
    ToyProgram,
    ToyServer,
    make_data,
    make_manifest,
    make_model,
    sha,
)
from tests.faults import FaultyFiles, disk_full

PROFILE = DeviceProfile("phone", DeviceTier.LOW_END)


class World:
    """One device and its server; a new ``client`` on the same store is a new process."""

    def __init__(self, work: int = 1) -> None:
        self.server = ToyServer(work=work)
        self.identity = DeviceIdentity.generate()
        self.store: DeviceStore = MemoryDeviceStore(self.identity)
        self.transport = self.server.device(self.identity.device_id)
        self.events: list[events.Event] = []
        self.waits: list[float] = []
        self.now = 1000.0
        self.program = ToyProgram(self.server.manifest)

    def client(self, **changes: Any) -> MobileClient:
        def wait(delay_s: float, _stop: threading.Event) -> None:
            self.waits.append(delay_s)
            self.now += delay_s

        settings: dict[str, Any] = {
            "data": make_data(),
            "transport": self.transport,
            "store": self.store,
            "rng": random.Random(0),
            "clock": lambda: self.now,
            "wait": wait,
            "on_event": self.events.append,
            "policy": RetryPolicy(max_attempts=4),
        }
        return MobileClient(changes.pop("program", self.program), PROFILE, **(settings | changes))

    def seen(self) -> list[str]:
        return [type(e).__name__ for e in self.events if not isinstance(e, events.TrainingProgress)]


def sent(world: World) -> dict[str, bytes]:
    """Assignment id -> bytes of the update that the server holds."""
    return {assignment: update.tobytes() for assignment, update in world.server.updates().items()}


@pytest.fixture
def world() -> World:
    return World()


def expected_delta(world: World, assignment_number: int = 1) -> np.ndarray:
    """What an honest device must send, computed without the client."""
    assignment = world.server.next_assignment()
    weights = np.frombuffer(decode_frame(world.server.model).payload, np.float32)
    return LocalTrainer(ToyProgram()).train(weights, *make_data(), assignment.plan, assignment.shuffle_seed).delta


# --- local training ---


def test_local_training_returns_the_model_delta_of_each_parameter():
    weights = np.frombuffer(decode_frame(make_model()).payload, np.float32)
    client = MobileClient(ToyProgram(), PROFILE, weights=weights, clock=lambda: 123.0)
    plan = TrainingPlan(local_epochs=3, batch_size=BATCH, learning_rate=0.2)
    gradient = client.train_local_model(make_data(), 7, plan=plan, shuffle_seed=5)
    assert gradient is not None
    expected = LocalTrainer(ToyProgram()).train(weights, *make_data(), plan, 5)
    assert list(gradient.gradients) == [p.name for p in PARAMETERS]
    flat = np.concatenate([np.ravel(gradient.gradients[p.name]) for p in PARAMETERS])
    assert [gradient.gradients[p.name].shape for p in PARAMETERS] == [p.shape for p in PARAMETERS]
    assert np.array_equal(flat, expected.delta)
    assert gradient.kind is UpdateKind.DELTA
    assert (gradient.worker_id, gradient.num_samples, gradient.timestamp) == ("phone", 10, 123.0)
    assert gradient.metadata is not None
    assert gradient.metadata["model_version"] == 7
    assert gradient.metadata["device_type"] == "low_end"


def test_local_training_by_fednova_returns_the_plain_delta_and_what_divides_it_and_scaffold_needs_a_server():
    weights = np.frombuffer(decode_frame(make_model()).payload, np.float32)
    client = MobileClient(ToyProgram(), PROFILE, weights=weights)
    plan = TrainingPlan(local_epochs=3, batch_size=BATCH, learning_rate=0.2, algorithm="fednova")
    gradient = client.train_local_model(make_data(), plan=plan)
    assert gradient is not None
    expected = LocalTrainer(ToyProgram()).train(weights, *make_data(), plan, 0)
    assert np.array_equal(np.concatenate([np.ravel(gradient.gradients[p.name]) for p in PARAMETERS]), expected.delta)
    assert gradient.metadata is not None
    assert gradient.metadata["local_steps"] == normaliser(plan, expected.steps)
    with pytest.raises(ConfigurationError, match="scaffold needs control variates"):
        client.train_local_model(make_data(), plan=plan.model_copy(update={"algorithm": "scaffold"}))


def test_local_training_takes_batches_and_named_weights():
    frame = decode_frame(make_model())
    flat = np.frombuffer(frame.payload, np.float32)
    x, y = make_data()
    whole = MobileClient(ToyProgram(), PROFILE).train_local_model((x, y), weights=flat)
    batches = [(x[:3], y[:3]), (x[3:], y[3:].astype(np.int32))]
    pieces = MobileClient(ToyProgram(), PROFILE).train_local_model(iter(batches), weights=frame.tensors)
    assert whole is not None
    assert pieces is not None
    assert all(np.array_equal(whole.gradients[name], pieces.gradients[name]) for name in whole.gradients)


def test_interrupted_local_training_returns_none_and_stops_between_two_steps():
    program = ToyProgram()
    client = MobileClient(program, PROFILE, weights=np.zeros(NUM_PARAMETERS, np.float32))
    assert client.train_local_model(make_data(100), should_stop=lambda: program.runs == 2) is None
    assert program.runs == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no training data"),
        ((np.zeros((0, 2), np.float32), np.zeros(0, np.int64)), "no training data"),
        ((np.zeros((3, 2), np.float32), np.zeros(3)), "integer labels"),
        ([(np.zeros((3, 2)), np.zeros(3, np.int64)), (np.zeros((3, 4)), np.zeros(3, np.int64))], "integer labels"),
        ((np.zeros((3, 2), np.float32), np.full(3, 9)), "labels must lie"),
        ((np.full((3, 2), np.nan, np.float32), np.zeros(3, np.int64)), "NaN"),
        (7, "pairs"),
        ([("a", "b")], "pairs"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(data: Any, message: str):
    client = MobileClient(ToyProgram(), PROFILE, weights=np.zeros(NUM_PARAMETERS, np.float32))
    with pytest.raises(ProgramInputError, match=message):
        client.train_local_model(data)


def test_weights_that_do_not_fit_are_refused():
    client = MobileClient(ToyProgram(), PROFILE)
    with pytest.raises(ConfigurationError, match="needs a program and weights"):
        client.train_local_model(make_data())
    with pytest.raises(ProgramInputError, match="bias"):
        client.train_local_model(make_data(), weights={"weight": np.zeros((3, 2), np.float32)})
    with pytest.raises(ProgramInputError, match=r"float32\[9\]"):
        client.train_local_model(make_data(), weights=np.zeros(3, np.float32))


def test_a_client_without_a_transport_says_so():
    client = MobileClient(ToyProgram(), PROFILE)
    for call in (client.check_in, client.run, lambda: client.state):
        with pytest.raises(ConfigurationError, match="no transport"):
            call()
    with pytest.raises(ConfigurationError, match="needs data"):
        MobileClient(ToyProgram(), PROFILE, transport=World().transport)


# --- the networked life ---


def test_a_device_takes_part_until_the_task_is_finished():
    world = World(work=2)
    summary = world.client().run()
    assert (summary.cause, summary.reports) == ("finished", 2)
    assert world.seen() == [
        "Enrolled",
        *["CheckedIn", "Downloaded", "Downloaded", "Downloaded", "Uploaded"] * 2,
        "Finished",
    ]
    sizes = [e.num_bytes for e in world.events if isinstance(e, events.Downloaded)]
    assert all(sizes[:3])
    assert sizes[3:] == [0, 0, 0], "the second assignment's blobs are cached"
    assert world.waits == []


def test_what_is_sent_is_the_delta_of_honest_training_and_repeats_the_assignment(world: World):
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    accepted = client.perform(reply.assignment)
    assert accepted.assignment_id == reply.assignment.assignment_id
    device, frame = world.server.reports[accepted.report_id]
    assert device == world.identity.device_id
    facts = ReportFacts.model_validate(decode_frame(frame).metadata)
    assert facts.model_version == str(reply.assignment.model_version)
    assert (facts.steps, facts.kind) == ("6", UpdateKind.DELTA)
    update = world.server.updates()[reply.assignment.assignment_id]
    assert np.array_equal(update, expected_delta(world))
    assert np.any(update)


def test_progress_counts_examples_up_to_the_plans_total(world: World):
    world.client().run()
    progress = [e for e in world.events if isinstance(e, events.TrainingProgress)]
    assert [e.examples for e in progress] == [4, 8, 10, 14, 18, 20]
    assert {e.total_examples for e in progress} == {20}
    assert all(np.isfinite(e.loss) and e.loss > 0 for e in progress)


def test_the_number_of_reports_can_be_bounded():
    world = World(work=5)
    summary = world.client().run(max_reports=2)
    assert (summary.cause, summary.reports) == ("enough-reports", 2)
    assert world.client().run(max_reports=1).reports == 1
    assert len(world.server.reports) == 3


def test_check_in_and_perform_may_be_called_from_different_threads(world: World):
    client = world.client()
    reply = client.check_in(VirtualTiming(now_s=0, duration_s=5))
    assert isinstance(reply, Assigned)
    thread = threading.Thread(target=client.perform, args=(reply.assignment,))
    thread.start()
    thread.join()
    assert len(world.server.reports) == 1
    assert isinstance(client.check_in(), Finished)
    assert isinstance(client.check_in(), Finished)


def test_a_wait_is_answered_by_waiting_in_run_and_left_to_the_caller_in_check_in(world: World, monkeypatch):
    answers = [WAIT, WAIT]
    real = world.transport.check_in
    monkeypatch.setattr(world.transport, "check_in", lambda request: answers.pop() if answers else real(request))
    client = world.client()
    assert client.check_in() == WAIT
    assert world.waits == []
    world.client().run()
    assert len(world.waits) == 2, "the pause that was still on, then that of the second answer"
    assert all(5 <= wait <= 10 for wait in world.waits)
    assert world.server.reports


def test_an_interrupted_device_keeps_its_assignment_and_goes_on_later(world: World):
    stop = threading.Event()
    world.program.before_run = lambda: stop.set() if world.program.runs == 2 else None
    summary = world.client().run(stop=stop)
    assert (summary.cause, summary.reports) == ("stopped", 0)
    assert world.program.runs == 3, "the step in hand was finished, no other was begun"
    assert world.client().state.phase is Phase.TRAINING
    world.program.before_run = lambda: None
    assert world.client().run().cause == "finished"
    assert np.array_equal(next(iter(world.server.updates().values())), expected_delta(world))
    assert world.server.requests.count("check-in") == 2


def test_an_interrupted_perform_can_be_performed_again(world: World):
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        client.perform(reply.assignment, stop)
    client.perform(reply.assignment)
    assert len(world.server.reports) == 1


def test_a_stop_during_a_wait_ends_the_run(world: World, monkeypatch):
    monkeypatch.setattr(world.transport, "check_in", lambda _: WAIT)
    stop = threading.Event()
    summary = world.client(wait=lambda *_: stop.set()).run(stop=stop)
    assert summary.cause == "stopped"
    assert world.client().state.phase is Phase.CHECKED_IN


def test_conditions_hold_a_device_back(world: World):
    reasons = itertools.chain(["battery is low", "no wifi"], itertools.repeat(None))
    world.client(conditions=lambda: next(reasons)).run()
    waiting = [e.reason for e in world.events if isinstance(e, events.Waiting)]
    assert waiting == ["battery is low", "no wifi"]
    assert world.seen().index("Waiting") < world.seen().index("Enrolled")


class Weather:
    """A source of conditions that a test sets; ``after`` says what holds once so many program calls were made."""

    def __init__(self, program: ToyProgram, **now: Any) -> None:
        self.program = program
        self.now = Conditions(**now)
        self.after: dict[int, Conditions] = {}

    def read(self) -> Conditions:
        due = [runs for runs in self.after if runs <= self.program.runs]
        return self.after[max(due)] if due else self.now


def watched(world: World, weather: Weather, **policy: Any) -> PowerMonitor:
    return PowerMonitor(
        weather,
        PowerPolicy(**({"check_every_calls": 1, "require_unmetered": False, "duty_by_battery": ()} | policy)),
        clock=lambda: world.now,
    )


def test_a_low_battery_keeps_a_device_from_asking_for_work(world: World):
    weather = Weather(world.program, battery_level=0.19)
    client = world.client(power_monitor=watched(world, weather), wait=lambda *_: mend(weather, battery_level=0.2))
    assert client.run().cause == "finished"
    assert world.seen()[:2] == ["Waiting", "Enrolled"]


def mend(weather: Weather, **conditions: Any) -> None:
    weather.now = Conditions(**conditions)
    weather.after = {}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[World]:
    """A world whose device keeps its state on the disk."""
    world = World()
    with closing(FileDeviceStore(tmp_path / "state")) as store:
        world.store = store
        world.transport = world.server.device(store.identity.device_id)
        yield world


def test_training_pauses_when_the_battery_falls_and_goes_on_from_its_checkpoint(kept: World):
    world = kept
    plain = World()
    plain.client().run()
    calls = plain.program.runs
    weather = Weather(world.program, battery_level=0.5)
    weather.after[calls // 2] = Conditions(battery_level=0.15)
    client = world.client(
        power_monitor=watched(world, weather), wait=lambda *_: mend(weather, battery_level=0.9, charging=True)
    )
    assert client.run().cause == "finished"
    paused = [e for e in world.events if isinstance(e, events.Paused)]
    assert [(e.step, e.reason) for e in paused] == [("training", "battery-low")]
    assert "TrainingResumed" in world.seen()
    assert world.program.runs == calls, "nothing was trained twice"
    assert sent(world) == sent(plain)
    assert not client.training_paused
    assert client.checkpoint_manager is not None
    assert not client.checkpoint_manager.has_checkpoint(), "a report that is delivered leaves none"


def test_a_metered_network_holds_back_downloads_and_uploads_but_a_low_battery_no_upload(world: World):
    weather = Weather(world.program, battery_level=0.5, network=Network.UNMETERED)
    client = world.client(
        power_monitor=watched(world, weather, require_unmetered=True),
        wait=lambda *_: mend(weather, battery_level=0.5, network=Network.UNMETERED),
    )
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    weather.now = Conditions(battery_level=0.5, network=Network.METERED)
    with pytest.raises(TrainingPaused, match="metered"):
        client.perform(reply.assignment)
    assert [(e.step, e.reason) for e in world.events if isinstance(e, events.Paused)] == [("download", "network")]
    weather.now = Conditions(battery_level=0.5, network=Network.UNMETERED)
    client.perform(reply.assignment)
    world.events.clear()
    world.server.work = 2
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    runs = world.program.runs
    training = World()
    training.client().run()
    # Once it is trained, the battery is low: that alone holds no report back.
    weather.after = {runs + training.program.runs: Conditions(battery_level=0.15, network=Network.UNMETERED)}
    client.perform(reply.assignment)
    assert [(e.step, e.reason) for e in world.events if isinstance(e, events.Paused)] == []


def test_a_slice_of_time_ends_at_its_budget_and_the_next_one_goes_on(kept: World):
    world = kept
    plain = World()
    plain.client().run()
    elapsed = itertools.count()  # a second passes whenever the clock is looked at
    summaries = []
    for _ in range(100):
        summaries.append(world.client(monotonic=lambda: float(next(elapsed))).run_for(6))
        if summaries[-1].cause != "out-of-time":
            break
    assert [s.cause for s in summaries[:-1]] == ["out-of-time"] * (len(summaries) - 1)
    assert len(summaries) > 3
    assert summaries[-1].cause == "finished"
    assert all(s.again_after_s == 0 for s in summaries[:-1])
    assert summaries[-1].again_after_s is None
    assert sent(world) == sent(plain)
    assert world.program.runs == plain.program.runs, "slices repeat nothing"


def test_a_wait_longer_than_the_slice_ends_it_at_once_and_is_not_waited_for_twice(world: World, monkeypatch):
    monkeypatch.setattr(world.transport, "check_in", lambda _: WAIT)
    first = world.client(monotonic=lambda: 0.0).run_for(2)
    assert (first.cause, world.waits) == ("out-of-time", [])
    assert first.again_after_s is not None
    assert 5 <= first.again_after_s <= 10
    world.now += first.again_after_s - 1
    monkeypatch.undo()
    second = world.client(monotonic=lambda: 0.0).run_for(2)
    assert second.cause == "finished"
    assert world.waits == [pytest.approx(1)], "what had passed already counts"


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_slice_without_time_is_refused(world: World, budget: float):
    with pytest.raises(ConfigurationError, match="leaves no time"):
        world.client().run_for(budget)


def test_a_checkpoint_that_cannot_be_kept_costs_nothing_but_a_notice(kept: World, tmp_path: Path):
    world = kept
    full = CheckpointManager(tmp_path / "full", files=FaultyFiles(OS_FILES, 0, fault=disk_full))
    stop = threading.Event()
    world.program.before_run = lambda: stop.set() if world.program.runs == 2 else None
    assert world.client(checkpoint_manager=full).run(stop=stop).cause == "stopped"
    assert "CheckpointFailed" in world.seen()
    world.program.before_run = lambda: None
    assert world.client(checkpoint_manager=full).run().cause == "finished"


def test_local_training_is_planned_by_tier_and_memory():
    weights = np.zeros(NUM_PARAMETERS, np.float32)
    epochs = {}
    for tier in DeviceTier:
        client = MobileClient(ToyProgram(), DeviceProfile("phone", tier), weights=weights)
        epochs[tier] = client.num_local_epochs
        assert client.batch_size == BATCH
        assert client.gradient_accumulation_steps == 1
    assert epochs == {DeviceTier.HIGH_END: 5, DeviceTier.MID_RANGE: 3, DeviceTier.LOW_END: 1}


def test_local_training_does_not_start_on_a_low_battery_and_resumes_where_it_paused(tmp_path: Path):
    program = ToyProgram()
    weights = np.frombuffer(decode_frame(make_model()).payload, np.float32)
    plan = TrainingPlan(local_epochs=4, batch_size=BATCH)
    undisturbed = MobileClient(ToyProgram(), PROFILE, weights=weights).train_local_model(make_data(), plan=plan)
    weather = Weather(program, battery_level=0.1)
    monitor = PowerMonitor(weather, PowerPolicy(check_every_calls=1, require_unmetered=False, duty_by_battery=()))
    client = MobileClient(
        program, PROFILE, weights=weights, power_monitor=monitor, checkpoint_manager=CheckpointManager(tmp_path)
    )
    assert client.train_local_model(make_data(), plan=plan) is None
    assert (program.runs, client.training_paused) == (0, True)
    mend(weather, battery_level=0.5)
    weather.after = {5: Conditions(battery_level=0.15)}
    assert client.train_local_model(make_data(), plan=plan) is None
    assert (program.runs, client.training_paused) == (5, True)
    mend(weather, battery_level=0.5)
    resumed = client.train_local_model(make_data(), plan=plan)
    assert resumed is not None
    assert undisturbed is not None
    assert not client.training_paused
    assert program.runs == 12, "nothing was trained twice"
    assert all(np.array_equal(resumed.gradients[n], undisturbed.gradients[n]) for n in undisturbed.gradients)


def test_an_unfulfilled_assignment_is_handed_out_again_at_the_next_check_in(world: World):
    client = world.client()
    first, second = client.check_in(), client.check_in()
    assert first == second
    assert world.server.requests.count("check-in") == 2
    assert isinstance(first, Assigned)
    client.perform(first.assignment)


def test_an_assignment_that_an_earlier_process_took_can_be_performed(world: World):
    reply = world.client().check_in()
    assert isinstance(reply, Assigned)
    fresh = world.client(store=MemoryDeviceStore(world.identity))
    fresh.perform(reply.assignment)
    assert set(world.server.reports) == {world.identity.report_id(reply.assignment.assignment_id)}


def test_performing_another_assignment_than_the_one_held_is_refused():
    world = World(work=2)
    client = world.client()
    client.check_in()
    with pytest.raises(IllegalTransition, match="check in before"):
        client.perform(world.server.next_assignment())


def test_a_sealed_report_is_delivered_before_anything_else_is_asked_for(world: World):
    def offline(name: str) -> None:
        if name == "upload":
            raise TransportUnavailable("offline")

    world.server.before = offline
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    with pytest.raises(TransportUnavailable):
        client.perform(reply.assignment)
    assert len(world.waits) == 3
    world.server.before = lambda _: None
    again = world.client()
    assert again.check_in() == reply
    assert world.server.requests.count("check-in") == 1
    runs = world.program.runs
    again.perform(reply.assignment)
    assert world.program.runs == runs, "trained once"


def test_a_lost_acknowledgement_repeats_the_same_bytes(world: World):
    lost = iter([True, True])

    def lose(name: str) -> None:
        if name == "upload" and next(lost, False):
            raise TransportUnavailable("the reply is lost")

    world.server.after = lose
    assert world.client().run().reports == 1
    assert world.server.requests.count("upload") == 3
    assert len(world.server.reports) == 1


def test_a_report_that_comes_too_late_is_dropped_and_perform_says_why(world: World):
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)

    def late(name: str) -> None:
        if name == "upload":
            raise LeaseExpired("too late")

    world.server.before = late
    with pytest.raises(LeaseExpired, match="too late"):
        client.perform(reply.assignment)
    assert client.state.phase is Phase.IDLE
    assert world.store.sealed(world.identity.report_id(reply.assignment.assignment_id)) is None
    assert world.seen()[-1] == "Dropped"


def test_no_training_is_wasted_on_a_lease_that_ended_while_the_device_was_off(world: World):
    stop = threading.Event()
    world.program.before_run = stop.set
    world.client().run(stop=stop)
    world.now += 601
    world.server.before = lambda name: stop.set() if name == "check-in" else None
    stop.clear()
    runs = world.program.runs
    world.client().run(stop=stop)
    assert world.program.runs == runs
    assert [e.reason for e in world.events if isinstance(e, events.Dropped)] == [
        "the lease ended before the report was ready"
    ]


def test_a_virtual_lease_has_nothing_to_do_with_the_devices_clock(world: World):
    client = world.client()
    reply = client.check_in(VirtualTiming(now_s=0, duration_s=1))
    world.now += 10**6
    assert isinstance(reply, Assigned)
    client.perform(reply.assignment)


def test_a_server_that_lost_its_devices_gets_this_one_back(world: World):
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    world.server.enrolled.clear()
    client.perform(reply.assignment)
    assert world.server.requests.count("enrol") == 2


def test_a_device_that_cannot_write_its_state_stops_at_once(world: World, monkeypatch):
    def full(*_: object) -> None:
        raise StateDirUnusable("disk full")

    monkeypatch.setattr(world.store, "seal", full)
    with pytest.raises(StateDirUnusable):
        world.client().run()
    assert world.server.reports == {}
    assert "abandon" not in world.server.requests, "the assignment is still ours once there is space"


# --- training that fails ---


def failing(world: World, error: BaseException) -> None:
    def fail() -> None:
        raise error

    world.program.before_run = fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "no-memory"),
        (MemoryBudgetExceeded("needs 900 MiB"), "no-memory"),
        (ProgramExecutionError("kernel failed"), "training-failed"),
        (TrainingDiverged("loss is NaN"), "training-failed"),
    ],
)
def test_a_failed_training_gives_the_assignment_back_with_its_reason(world: World, error: Exception, reason: str):
    failing(world, error)
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    with pytest.raises(StaleReport if isinstance(error, MemoryError) else type(error)):
        client.perform(reply.assignment)
    assert world.server.abandoned == [(reply.assignment.assignment_id, reason)]
    assert client.state.phase is Phase.IDLE


def test_a_training_that_always_fails_ends_the_run(world: World):
    world.server.work = 100
    failing(world, ProgramExecutionError("kernel failed"))
    summary = world.client().run()
    assert summary.cause == "gave-up"
    assert len(world.server.abandoned) == 3


def test_a_program_error_that_no_other_assignment_can_cure_stops_the_device(world: World):
    world.server.amend = {"plan": TrainingPlan(batch_size=7)}
    summary = world.client().run()
    assert summary.cause == "refused"
    assert isinstance(summary.error, UnknownMethod)
    assert len(world.server.abandoned) == 1


def test_the_reason_survives_an_abandonment_that_fails(world: World):
    failing(world, TrainingDiverged("loss is NaN"))

    def offline(name: str) -> None:
        if name == "abandon":
            raise TransportUnavailable("offline")

    world.server.before = offline
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    with pytest.raises(TrainingDiverged):
        client.perform(reply.assignment)


def test_an_update_beyond_the_declared_bound_is_not_sent(world: World):
    world.server.amend = {"encoding": F32Encoding(max_abs=1e-6)}
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    with pytest.raises(UpdateOutOfRange, match="allows 1e-06"):
        client.perform(reply.assignment)
    assert "upload" not in world.server.requests


# --- attacks ---


def renamed(frame: bytes, changes: dict[str, np.ndarray]) -> bytes:
    tensors = dict(decode_frame(frame).tensors)
    return encode_frame({k: v for k, v in (tensors | changes).items() if v is not None})


def serve(world: World, role: str, blob: bytes) -> None:
    """The assignment names this blob truthfully by its hash; what is in it is the attack."""
    world.server.blobs[sha(blob)] = blob
    world.server.amend[role] = sha(blob)


ATTACKS: dict[str, tuple[str, bytes, type[PocketfedError]]] = {
    "model: garbage": ("model_sha256", b"\x00" * 100, PocketfedError),
    "model: truncated": ("model_sha256", make_model()[:-4], ProtocolError),
    "model: nothing": ("model_sha256", b"", ProtocolError),
    "model: trailing byte": ("model_sha256", make_model() + b"x", ProtocolError),
    "model: declares 10 GB": (
        "model_sha256",
        make_model().replace(b"[3,2]", b"[50000,50000]"),
        ProtocolError,
    ),
    "model: a parameter less": ("model_sha256", renamed(make_model(), {"bias": None}), BundleMismatch),
    "model: a parameter more": ("model_sha256", renamed(make_model(), {"c": np.zeros(1, "<f4")}), BundleMismatch),
    "model: wrong shape": (
        "model_sha256",
        renamed(make_model(), {"weight": np.zeros((2, 3), np.float32)}),
        BundleMismatch,
    ),
    "model: float64": ("model_sha256", renamed(make_model(), {"bias": np.zeros(3)}), BundleMismatch),
    "model: other order": (
        "model_sha256",
        encode_frame({"bias": np.zeros(3, np.float32), "weight": np.zeros((3, 2), np.float32)}),
        BundleMismatch,
    ),
    "model: NaN": (
        "model_sha256",
        renamed(make_model(), {"bias": np.full(3, np.nan, np.float32)}),
        ProgramInputError,
    ),
    "program: another one": ("program_sha256", b"another program", BundleMismatch),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_a_bundle_that_does_not_belong_together_is_given_back_and_the_device_stops(world: World, attack: str):
    role, blob, error = ATTACKS[attack]
    serve(world, role, blob)
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    with pytest.raises(error):
        client.perform(reply.assignment)
    assert world.server.abandoned == [(reply.assignment.assignment_id, "training-failed")]
    assert world.server.reports == {}
    assert world.program.runs == 0
    world.server.work = 100
    assert world.client().run().cause == "refused"
    assert len(world.server.abandoned) == 2, "no endless repetition of the attack"


@pytest.mark.parametrize("role", ["model_sha256", "program_sha256", "manifest_sha256"])
def test_a_blob_with_another_content_than_its_hash_is_never_used(world: World, role: str):
    world.server.blobs[world.server.hashes[role]] += b"x"
    summary = world.client().run()
    assert (summary.cause, summary.reports) == ("gave-up", 0)
    assert world.program.runs == 0
    assert world.store.blob(world.server.hashes[role]) is None


@pytest.mark.parametrize("role", ["model_sha256", "program_sha256", "manifest_sha256"])
def test_a_blob_that_does_not_exist_ends_in_a_bounded_number_of_attempts(world: World, role: str):
    del world.server.blobs[world.server.hashes[role]]
    world.server.work = 100
    summary = world.client().run()
    assert summary.cause == "gave-up"
    assert len(world.server.abandoned) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter_table_sha256": "0" * 64}, "parameter table"),
        ({"kind": UpdateKind.GRADIENT}, "sends deltas"),
        ({"max_report_bytes": 8}, "does not fit"),
    ],
)
def test_an_assignment_that_the_device_cannot_fulfil_is_given_back(world: World, changes: dict, message: str):
    world.server.amend = changes
    summary = world.client().run()
    assert summary.cause == "refused"
    assert isinstance(summary.error, BundleMismatch)
    assert message in str(summary.error)
    assert world.program.runs == 0
    assert len(world.server.abandoned) == 1


def test_the_report_claims_the_version_of_the_assignment_and_nothing_else(world: World):
    world.server.amend = {"model_version": 41}
    world.client().run()
    _, frame = next(iter(world.server.reports.values()))
    assert decode_frame(frame).metadata["model_version"] == "41"


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (b"not json", ManifestError),
        (b"{}", ManifestError),
        (b"[" * 100_000, ManifestError),
        (make_manifest(b"another program").to_json().encode(), ProgramHashMismatch),
        (make_manifest(executorch_version="0.3.0").to_json().encode(), ProgramError),
    ],
)
def test_a_manifest_that_does_not_describe_the_program_is_refused_by_the_loader(
    world: World, manifest: bytes, error: type[ProgramError], tmp_path: Path
):
    serve(world, "manifest_sha256", manifest)
    programs = DownloadedPrograms(tmp_path / "programs")
    summary = world.client(program=None, programs=programs).run()
    assert summary.cause == "refused"
    assert isinstance(summary.error, error)
    assert world.server.abandoned
    programs.close()


def test_sizes_are_bounded_by_what_the_blob_is_for(world: World, monkeypatch):
    limits: dict[str, int] = {}
    real = world.transport.fetch

    def fetch(sha256: str, into: bytearray, *, max_bytes: int) -> None:
        limits[sha256] = max_bytes
        real(sha256, into, max_bytes=max_bytes)

    monkeypatch.setattr(world.transport, "fetch", fetch)
    world.client(max_blob_bytes=12345).run()
    assert limits == {
        world.server.hashes["manifest_sha256"]: MAX_MANIFEST_BYTES,
        world.server.hashes["program_sha256"]: 12345,
        world.server.hashes["model_sha256"]: 12345,
    }


def test_a_cut_download_keeps_what_came(world: World, monkeypatch):
    real = world.transport.fetch
    held: list[int] = []

    def fetch(sha256: str, into: bytearray, *, max_bytes: int) -> None:
        held.append(len(into))
        if held == [0]:
            into += b"half"
            raise TransportUnavailable("cut")
        real(sha256, into, max_bytes=max_bytes)

    monkeypatch.setattr(world.transport, "fetch", fetch)
    assert world.client().run().reports == 1
    assert held[:2] == [0, 4]


def test_a_wait_of_the_wrong_kind_is_not_an_assignment(world: World, monkeypatch):
    monkeypatch.setattr(world.transport, "check_in", lambda _: WAIT)
    assert isinstance(world.client().check_in(), Wait)
