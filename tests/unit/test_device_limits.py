"""What a device does not do, whatever the server, the disk or the host want.

It does not work for a dead lease, spend twice, rest past its slice, or go on against its user's will.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from client_sdk import events
from client_sdk.conditions import Conditions, Network
from client_sdk.errors import StateDirUnusable, TrainingPaused
from client_sdk.files import FileLayer, OsFiles
from client_sdk.power import PowerMonitor, PowerPolicy
from client_sdk.privacy import LocalPrivacy, LocalPrivacyPolicy
from client_sdk.privacy_ledger import LEDGER_FILE, LocalPrivacyLedger
from client_sdk.programs import EmbeddedProgram, ReadBlob
from client_sdk.protocol.messages import Assigned, Assignment
from client_sdk.protocol.program import Program
from client_sdk.protocol.training import TrainingPlan
from client_sdk.session_state import Phase
from client_sdk.store import FileDeviceStore
from tests.devices import BATCH, NUM_PARAMETERS, ToyProgram, make_data
from tests.faults import disk_full, input_output_error
from tests.unit.test_mobile_client import World

POLICY = LocalPrivacyPolicy(clip_norm=1.0, epsilon=8.0, max_reports=10, fraction_bits=8)


class Disk(OsFiles):
    """Full for reports, or unreadable where checkpoints lie."""

    def __init__(self) -> None:
        self.full_for_reports = False
        self.bad_checkpoints = False

    def write(self, handle: int, data: memoryview) -> int:
        if self.full_for_reports and "/reports/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise disk_full()
        return super().write(handle, data)

    def read(self, path: Path) -> bytes:
        if self.bad_checkpoints and path.suffix == ".ckpt":
            raise input_output_error()
        return super().read(path)


class Weather:
    """A source of conditions that a test sets."""

    def __init__(self, now: Conditions) -> None:
        self.now = now

    def read(self) -> Conditions:
        return self.now


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def world(tmp_path: Path, disk: FileLayer) -> Iterator[World]:
    world = World()
    with closing(FileDeviceStore(tmp_path / "state", files=disk)) as store:
        world.store = store
        world.transport = world.server.device(store.identity.device_id)
        yield world


def private(tmp_path: Path) -> LocalPrivacy:
    return LocalPrivacy(POLICY, LocalPrivacyLedger(tmp_path / "state" / LEDGER_FILE))


def interrupted(world: World) -> None:
    """A training that was left after its first call, with a checkpoint."""
    stop = threading.Event()
    world.client(program=ToyProgram(world.server.manifest, stop.set)).run(stop=stop)
    assert world.store.checkpoints is not None
    assert world.store.checkpoints.has_checkpoint()


def test_nothing_is_trained_or_charged_once_the_lease_is_over(world: World, tmp_path: Path):
    world.server.amend |= {"plan": TrainingPlan(local_epochs=100, batch_size=BATCH), "lease_s": 600.0}

    def a_long_call() -> None:
        world.now += 100.0

    budget, stop = private(tmp_path), threading.Event()
    program = ToyProgram(world.server.manifest, a_long_call)
    client = world.client(
        program=program,
        local_privacy=budget,
        on_event=lambda event: stop.set() if isinstance(event, events.Dropped) else None,
    )
    client.run(stop=stop)
    assert program.runs == 7, "the call during which the lease ended is the last one"
    assert budget.ledger.charges().reports == 0
    assert world.server.reports == {}


def test_no_server_makes_a_device_work_for_longer_than_its_own_longest_lease(world: World):
    world.server.amend |= {"plan": TrainingPlan(local_epochs=1000, batch_size=BATCH), "lease_s": 1e9}

    def a_day() -> None:
        world.now += 86_400.0

    program = ToyProgram(world.server.manifest, a_day)
    stop = threading.Event()
    client = world.client(
        program=program, on_event=lambda event: stop.set() if isinstance(event, events.Dropped) else None
    )
    client.run(stop=stop)
    assert program.runs == 8


def test_a_clock_set_back_before_the_lease_began_ends_it_and_a_correction_does_not(world: World):
    client = world.client()
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    for seconds, over in ((-30.0, False), (0.0, False), (599.0, False), (601.0, True), (-86_400.0, True)):
        assert client.state.is_lease_over(world.now + seconds) is over


def test_a_full_disk_costs_one_charge_and_its_report_is_sent_when_there_is_room(
    world: World, tmp_path: Path, disk: Disk
):
    budget, client = private(tmp_path), None
    disk.full_for_reports = True
    client = world.client(local_privacy=budget)
    for _ in range(3):
        with suppress(StateDirUnusable):
            client.run_for(1e9, max_reports=1)
    assert budget.ledger.charges().reports == 1
    disk.full_for_reports = False
    client.run_for(1e9, max_reports=1)
    assert budget.ledger.charges().reports == 1
    assert len(world.server.reports) == 1


def test_a_checkpoint_that_cannot_be_read_costs_time_and_not_the_device(world: World, disk: Disk):
    interrupted(world)
    disk.bad_checkpoints = True
    assert world.client().run().cause == "finished"
    assert len(world.server.reports) == 1


def test_local_training_leaves_the_checkpoint_of_an_assignment_alone(world: World):
    interrupted(world)
    world.client(weights=np.zeros(NUM_PARAMETERS, np.float32)).train_local_model(make_data(5, seed=3))
    assert world.store.checkpoints is not None
    assert world.store.checkpoints.has_checkpoint()


def test_a_user_who_opts_out_while_it_trains_sends_nothing(world: World):
    opted: list[str] = []
    program = ToyProgram(world.server.manifest, lambda: opted.append("the user opted out"))
    world.client(program=program, conditions=lambda: next(iter(opted), None)).run_for(100.0)
    assert program.runs == 1, "training ends at the next step boundary"
    assert world.server.reports == {}
    assert world.seen()[-3:-1] == ["Paused", "Waiting"]


def test_a_user_who_opts_out_after_training_sends_nothing(world: World):
    opted: list[str] = []
    client = world.client(conditions=lambda: next(iter(opted), None))
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    world.server.before = lambda request: opted.append("the user opted out") if request == "upload" else None
    world.server.work = 2
    client.perform(reply.assignment)  # the first upload is under way when the user decides
    assert len(world.server.reports) == 1
    with pytest.raises(TrainingPaused, match="opted out"):
        client.check_in()


class SlowToOpen(EmbeddedProgram):
    """Opening the program takes longer than a slice."""

    def __init__(self, program: Program, clock: list[float]) -> None:
        super().__init__(program)
        self.clock = clock

    def open(self, assignment: Assignment, read: ReadBlob) -> Program:
        self.clock[0] += 2.0
        return super().open(assignment, read)


def test_slices_shorter_than_opening_the_program_still_get_somewhere(world: World):
    clock = [0.0]
    client = world.client(programs=SlowToOpen(world.program, clock), monotonic=lambda: clock[0])
    causes = [client.run_for(1.5).cause for _ in range(50)]
    assert "finished" in causes
    assert len(world.server.reports) == 1


def test_a_rest_ends_with_its_slice(world: World):
    clock, rests = [0.0], list[float]()

    def call() -> None:
        clock[0] += 100.0

    def wait(seconds: float, _: threading.Event) -> None:
        rests.append(seconds)
        clock[0] += seconds

    warm = Conditions(battery_level=0.9, charging=True, network=Network.UNMETERED, temperature_c=37.9)
    monitor = PowerMonitor(Weather(warm), PowerPolicy(duty_by_temperature=((36.0, 0.1),)))
    program = ToyProgram(world.server.manifest, call)
    world.client(program=program, monotonic=lambda: clock[0], wait=wait, power_monitor=monitor).run_for(120.0)
    assert rests == [pytest.approx(20.0)]


def test_check_in_and_perform_say_that_they_are_held_back_and_never_wait_for_better_times(world: World):
    weather = Weather(Conditions(battery_level=0.1, network=Network.UNMETERED))
    client = world.client(power_monitor=PowerMonitor(weather))
    with pytest.raises(TrainingPaused) as held:
        client.check_in()
    assert held.value.reason == "battery-low"
    weather.now = Conditions(battery_level=0.9, charging=True, network=Network.UNMETERED)
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    weather.now = Conditions(battery_level=0.1, network=Network.UNMETERED)
    with pytest.raises(TrainingPaused):
        client.perform(reply.assignment)
    weather.now = Conditions(battery_level=0.9, charging=True, network=Network.UNMETERED)
    client.perform(reply.assignment)
    assert world.waits == []
    assert len(world.server.reports) == 1


def test_a_caller_that_stops_training_finds_it_paused(world: World):
    stop = threading.Event()
    client = world.client(program=ToyProgram(world.server.manifest, stop.set))
    client.run(stop=stop)
    assert (client.state.phase, client.training_paused) == (Phase.TRAINING, True)
    client = world.client()
    client.run()
    assert not client.training_paused


def test_a_device_that_gives_up_rests_before_it_tries_in_a_later_slice(world: World):
    world.server.work = 1000
    client = world.client(memory_fraction=1e-9)
    first = client.run_for(1e9)
    assert first.cause == "gave-up"
    assert first.again_after_s is not None
    given = world.server.given
    for _ in range(20):
        assert client.run_for(1e9).cause == "gave-up"
    assert world.server.given == given
    world.now += first.again_after_s
    client.run_for(1e9)
    assert world.server.given > given


def test_a_report_that_was_durable_when_the_process_died_is_not_made_anew_by_a_check_in(world: World, tmp_path: Path):
    budget = private(tmp_path)
    client = world.client(local_privacy=budget)
    reply = client.check_in()
    assert isinstance(reply, Assigned)
    saved = world.store.save_session

    class Dies(BaseException):
        pass

    def dies(state: object) -> None:
        if getattr(state, "phase", None) is Phase.SEALED:
            raise Dies
        saved(state)  # type: ignore[arg-type] # a session's state

    world.store.save_session = dies  # type: ignore[method-assign] # as if killed between two writes
    with pytest.raises(Dies):
        client.perform(reply.assignment)
    world.store.save_session = saved  # type: ignore[method-assign] # the next process
    again = world.client(local_privacy=budget)
    assert again.check_in() == reply
    again.perform(reply.assignment)
    assert budget.ledger.charges().reports == 1
