"""A device's life among kills, full disks, flat batteries, lost networks and lying clocks, hundreds of steps long.

Whatever happens, and in whichever order: once it stops happening the device delivers each report once, in the bits of a
device that nothing ever befell, and remembers the same.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from client_sdk import MobileClient
from client_sdk.conditions import Conditions, Network
from client_sdk.errors import InvalidReply, StateDirUnusable, TransportUnavailable
from client_sdk.files import OS_FILES
from client_sdk.power import PowerMonitor, PowerPolicy
from client_sdk.protocol.errors import ServerBusy
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan
from client_sdk.session_state import RetryPolicy
from client_sdk.store import FileDeviceStore
from tests.devices import BATCH, NUM_PARAMETERS, ToyProgram, ToyServer, make_assignment, make_data
from tests.faults import FaultyFiles, Killed, disk_full, input_output_error

REPORTS = 4
PLAN = TrainingPlan(local_epochs=3, batch_size=3 * BATCH, learning_rate=0.3)  # three calls a step
DATA = make_data(40)
NETWORK_FAULTS = (TransportUnavailable, InvalidReply, ServerBusy)
WORK: dict[str, Callable[[], ToyServer]] = {
    "accumulated": lambda: asking(ToyServer(work=REPORTS), PLAN),
    "compressed": lambda: asking(ToyServer(work=REPORTS).compress("topk:0.3"), PLAN),
    "scaffold": lambda: ToyServer(work=REPORTS).scaffold(np.full(NUM_PARAMETERS, 0.25, np.float32)),
}
GOOD = Conditions(battery_level=0.9, charging=True, network=Network.UNMETERED)
BAD = (
    Conditions(battery_level=0.12, network=Network.UNMETERED),
    Conditions(battery_level=0.02, network=Network.UNMETERED),
    Conditions(battery_level=0.9, charging=True, network=Network.METERED),
    Conditions(battery_level=0.9, temperature_c=49.0, network=Network.UNMETERED),
    Conditions(battery_level=0.9, user_active=True, network=Network.UNMETERED),
)


def asking(server: ToyServer, plan: TrainingPlan) -> ToyServer:
    server.amend |= {"plan": plan}
    return server


@dataclass
class Fate:
    """What befalls a device: a draw at each step, until so many have befallen it.

    It is the network, the disk, the battery and the clock of the device, whose processes come and go.
    """

    rng: random.Random
    left: int
    now: float = 1e6
    weather: Conditions = GOOD
    steps: int = 0
    befallen: dict[str, int] = field(default_factory=dict)

    def strikes(self, what: str, chance: float) -> bool:
        self.steps += 1
        if self.left == 0 or self.rng.random() >= chance:
            return False
        self.left -= 1
        self.befallen[what] = self.befallen.get(what, 0) + 1
        return True

    def read(self) -> Conditions:
        """As a source of conditions; weather changes, and mends once nothing befalls the device any more."""
        if self.strikes("weather", 0.2):
            self.weather = self.rng.choice(BAD)
        elif self.left == 0 or self.rng.random() < 0.5:
            self.weather = GOOD
        return self.weather

    def clock(self) -> float:
        """Seconds that jump: an hour on, a day back."""
        if self.strikes("clock", 0.02):
            self.now += self.rng.choice([3600.0, -86_400.0])
        self.now += 0.1
        return self.now

    def program_call(self) -> None:
        if self.strikes("kill in training", 0.08):
            raise Killed

    def request(self, _: str) -> None:
        """Before a request acts, or after it has: its answer is lost."""
        if self.strikes("kill in a request", 0.05):
            raise Killed
        if self.strikes("network", 0.1):
            raise self.rng.choice(NETWORK_FAULTS)("drawn")

    def wait(self, delay_s: float, _: threading.Event) -> None:
        self.now += delay_s
        if self.strikes("kill while waiting", 0.1):
            raise Killed

    def disk(self) -> FaultyFiles:
        """The disk of one process: a kill at some byte of some write, or it is full or broken for a moment."""
        fault, name = self.rng.choice(
            [(Killed, "kill in a write"), (disk_full, "full"), (input_output_error, "broken")]
        )
        survives = self.rng.randrange(20_000) if self.strikes(name, 0.6) else -1
        return FaultyFiles(OS_FILES, survives, fault=fault, recovers=fault is not Killed, flushes=False)


def one_process(server: ToyServer, folder: Path, fate: Fate, seen: list[str]) -> bool:
    """From its start to its end, whichever it is; whether the task is finished."""
    server.before = server.after = fate.request
    try:
        with closing(FileDeviceStore(folder, files=fate.disk())) as store:
            client = MobileClient(
                ToyProgram(server.manifest, fate.program_call),
                DeviceProfile("phone", DeviceTier.LOW_END),
                data=DATA,
                transport=server.device(store.identity.device_id),
                store=store,
                rng=random.Random(0),
                policy=RetryPolicy(max_attempts=5),
                clock=fate.clock,
                monotonic=lambda: fate.clock() * 100,  # a period of checkpoints is over every few calls
                wait=fate.wait,
                power_monitor=PowerMonitor(fate, PowerPolicy(check_every_calls=2, grace_calls=2), clock=fate.clock),
                on_event=lambda event: seen.append(type(event).__name__),
            )
            return client.run_for(fate.rng.choice([50.0, 1e9])).cause == "finished"
    except (Killed, StateDirUnusable):
        return False


@pytest.mark.parametrize("work", list(WORK))
@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_everything_befalls_ends_where_an_undisturbed_one_does(tmp_path: Path, work: str, seed: int):
    server, fate, seen = WORK[work](), Fate(random.Random(f"{work}{seed}"), left=60), list[str]()
    for _ in range(400):
        if one_process(server, tmp_path / "state", fate, seen):
            break
    else:
        raise AssertionError(f"no end after 400 processes: {fate}")
    undisturbed, calm = WORK[work](), Fate(random.Random(0), left=0)
    assert one_process(undisturbed, tmp_path / "other", calm, [])
    assert delivered(server) == delivered(undisturbed)
    assert len(server.reports) == REPORTS
    assert remembered(tmp_path / "state") == remembered(tmp_path / "other")
    assert fate.steps > 300
    assert not list((tmp_path / "state" / "checkpoints").glob("*.ckpt")), "nothing is left of what was delivered"


def test_everything_does_befall_it_and_checkpoints_are_what_it_goes_on_from(tmp_path: Path):
    """Else the test above would prove little."""
    befallen, seen = set[str](), set[str]()
    for seed in range(6):
        server, fate, told = WORK["accumulated"](), Fate(random.Random(f"accumulated{seed}"), left=60), list[str]()
        while not one_process(server, tmp_path / str(seed), fate, told):
            pass
        befallen |= fate.befallen.keys()
        seen |= set(told)
    assert befallen == {
        "weather", "clock", "kill in training", "kill in a request", "network", "kill while waiting",
        "kill in a write", "full", "broken",
    }  # fmt: skip
    assert {"Paused", "TrainingResumed", "Waiting", "Uploaded"} <= seen


def delivered(server: ToyServer) -> dict[str, bytes]:
    return {assignment: update.tobytes() for assignment, update in server.updates().items()}


def remembered(folder: Path) -> dict[str, bytes] | None:
    with closing(FileDeviceStore(folder)) as store:
        memory = store.memory(make_assignment().task_id)
    return None if memory is None else {name: vector.tobytes() for name, vector in memory.vectors.items()}
