"""`pocketfed device` as real processes against a real server: killed anywhere, cut off, stopped, and kept small."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from client_sdk.blobs import Buffer
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.reports import build_report
from client_sdk.runtime import load_program
from client_sdk.session_state import Phase, SessionState
from client_sdk.training import LocalTrainer
from tests.servers import ServerProcess, get_json, running_server, start_server, write_config

PLAN = {"local_epochs": 3, "batch_size": 8, "learning_rate": 0.25}

# Runs the device command, and SIGKILLs its own process at a named point.
KILLED_DEVICE = """
import os, signal, sys
import httpcore._backends.sync as sockets
from client_sdk import device, events, store, transport
from client_sdk.cli import main

point, countdown = sys.argv[1], int(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def count(name):
    global countdown
    if name == point:
        countdown -= 1
        if countdown == 0:
            die()

def after(owner, name, label, when=lambda *_: True):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            count(label)
        return result
    setattr(owner, name, wrapper)

after(device.ProgressLines, "__call__", "training", lambda _, event: isinstance(event, events.TrainingProgress))
after(store.FileDeviceStore, "seal", "sealed")
after(store.FileDeviceStore, "save_session", "saved")
after(transport.HttpTransport, "check_in", "checked-in")
after(transport.HttpTransport, "fetch", "fetched")
after(transport.HttpTransport, "upload", "uploaded")

send = sockets.SyncStream.write
def cut(self, buffer, timeout=None):
    # The body of an upload is the one write that begins like a frame.
    if point == "half-uploaded" and bytes(buffer[8:10]) == b'{"':
        send(self, buffer[: len(buffer) // 2], timeout)
        die()
    send(self, buffer, timeout)
sockets.SyncStream.write = cut

sys.exit(main(["device", *sys.argv[3:]]))
"""


@dataclass
class DeviceProcess:
    """One device: its files, and the processes that play it."""

    url: str
    folder: Path
    seed: int = 0
    state: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        self.x, self.y = rng.standard_normal((30, 6)).astype(np.float32), rng.integers(0, 3, 30)
        np.savez(self.folder / "data.npz", x=self.x, y=self.y)
        self.state = self.folder / "state"

    def arguments(self, *more: str) -> list[str]:
        files = ["--data", str(self.folder / "data.npz"), "--state-dir", str(self.state)]
        return ["--server", self.url, *files, *more]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("pocketfed")), "device", *self.arguments(*more)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("pocketfed")), "device", *self.arguments(*more)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def run_killed_at(self, point: str, countdown: int) -> SessionState:
        """Run until the kill, and return what the state directory knows then."""
        command = [sys.executable, "-c", KILLED_DEVICE, point, str(countdown), *self.arguments("--once")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, f"the planned kill did not happen:\n{done.stderr}"
        return SessionState.model_validate_json((self.state / "session.json").read_bytes())

    def honest_report(self, assignment: Assignment, model: bytes, bundle: Path) -> Buffer:
        """The frame that an undisturbed device sends."""
        program = load_program(bundle, "native")
        weights = np.frombuffer(decode_frame(model).payload, np.float32)
        trained = LocalTrainer(program).train(weights, self.x, self.y, assignment.plan, assignment.shuffle_seed)
        program.close()
        identity = DeviceIdentity.from_private_bytes(bytes.fromhex((self.state / "identity.key").read_text()))
        return build_report(
            assignment,
            identity.report_id(assignment.assignment_id),
            trained.delta,
            steps=trained.steps,
            train_loss=trained.last_epoch_loss,
        ).frame


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, softmax_bundle: Path) -> Iterator[ServerProcess]:
    """A server whose rounds are made by one report each."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(write_config(folder, softmax_bundle, rounds=100, buffer_size=1, plan=PLAN)) as running:
        yield running


def rounds_of(server: ServerProcess) -> list[dict]:
    return get_json(server.url, "/v1/rounds")


AFTER_SEALING = {"sealed", "half-uploaded", "uploaded"}
KILLS = [
    ("checked-in", 1),
    ("fetched", 2),
    ("training", 1),
    ("training", 7),
    ("sealed", 1),
    ("half-uploaded", 1),
    ("uploaded", 1),
]


@pytest.mark.parametrize(("point", "countdown"), KILLS, ids=str)
def test_a_killed_device_goes_on_and_its_report_counts_once(
    server: ServerProcess, softmax_bundle: Path, tmp_path: Path, point: str, countdown: int
):
    device = DeviceProcess(server.url, tmp_path / "device")
    rounds_before = len(rounds_of(server))
    killed = device.run_killed_at(point, countdown)
    sealed = sorted((device.state / "reports").glob("*.frame"))
    if point in AFTER_SEALING:
        assert killed.assignment is not None
        model = (device.state / "blobs" / killed.assignment.model_sha256).read_bytes()
        assert [f.read_bytes() for f in sealed] == [device.honest_report(killed.assignment, model, softmax_bundle)]
    else:
        assert sealed == []
    finished = device.run("--once")
    assert finished.returncode == 0, finished.stderr
    assert "1 report accepted" in finished.stderr
    assert "enrolled" not in finished.stderr, "the same device, not a new one"
    rounds = rounds_of(server)
    assert len(rounds) == rounds_before + 1
    assert rounds[-1]["reports"] == 1
    assert rounds[-1]["discarded"] == 0
    asked_again = "got model version" in finished.stderr
    assert asked_again is (killed.assignment is None), "an assignment that was saved is kept"
    assert ("trained on" in finished.stderr) is (point not in AFTER_SEALING)
    after = SessionState.model_validate_json((device.state / "session.json").read_bytes())
    assert (after.phase, after.reports) == (Phase.IDLE, 1)
    assert after.device_id == killed.device_id
    assert list((device.state / "reports").iterdir()) == []


def test_a_device_that_dies_after_every_single_step_still_delivers_its_report_once(
    server: ServerProcess, tmp_path: Path
):
    device = DeviceProcess(server.url, tmp_path / "device")
    before = len(rounds_of(server))
    phases: list[Phase] = []
    while Phase.DONE not in phases or phases[-1] is not Phase.IDLE:
        # A life that begins with a sealed report saves once before it sends and once after.
        state = device.run_killed_at("saved", 2 if phases and phases[-1] is Phase.SEALED else 1)
        phases.append(state.phase)
    assert phases == [
        "eligible",
        "eligible",
        "assigned",
        "downloading",
        "downloading",
        "training",
        "sealed",
        "done",
        "idle",
    ]
    assert state.reports == 1
    assert [r["reports"] for r in rounds_of(server)[before:]] == [1]


def test_a_device_imports_neither_torch_nor_the_server_and_stays_small(tmp_path: Path, cnn_bundle: Path):
    data = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.standard_normal((60, 8, 8)).astype(np.float32), y=rng.integers(0, 10, 60))
    # Watched by a small process: ru_maxrss starts at what the forking process had.
    outside = "import os, sys; p = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ); print(os.wait4(p, 0)[1:])"
    inside = (
        "import json, sys; from client_sdk.cli import main; status = main(['device', *sys.argv[1:]]); "
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules}))); sys.exit(status)"
    )
    with running_server(write_config(tmp_path / "server", cnn_bundle, rounds=2, buffer_size=1, plan=PLAN)) as running:
        command = [sys.executable, "-c", inside, "--server", running.url, "--data", str(data)]
        done = subprocess.run(
            [sys.executable, "-c", outside, *command, "--state-dir", str(tmp_path / "state"), "--max-reports", "2"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert "2 reports accepted" in done.stderr, done.stderr
    modules, usage = done.stdout.splitlines()
    heavy = {"torch", "numba", "fastapi", "sqlalchemy", "server_ref", "mobile_export", "simulator", "executorch"}
    assert heavy.isdisjoint(json.loads(modules))
    max_rss_kib = int(usage.partition("ru_maxrss=")[2].partition(",")[0])
    assert 0 < max_rss_kib <= 120 * 1024


def test_a_device_outlives_its_server(tmp_path: Path, softmax_bundle: Path):
    folder = tmp_path / "server"
    server = start_server(write_config(folder, softmax_bundle, rounds=3, buffer_size=1, plan=PLAN))
    port = int(server.url.rpartition(":")[2])
    process = None
    try:
        device = DeviceProcess(server.url, tmp_path / "device")
        assert device.run("--once").returncode == 0
        server.kill()
        process = device.start()
        assert process.stderr is not None
        waiting = next(line for line in process.stderr if "waiting" in line)
        assert "refused" in waiting
        server = start_server(write_config(folder, softmax_bundle, rounds=3, buffer_size=1, plan=PLAN, port=port))
        assert "2 reports accepted" in process.stderr.read()
        assert process.wait() == 0
        assert len(rounds_of(server)) == 3
    finally:
        if process is not None:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        server.kill()


def test_a_waiting_device_ends_cleanly_on_sigterm(tmp_path: Path, softmax_bundle: Path):
    config = write_config(tmp_path / "server", softmax_bundle, buffer_size=1, retry_min_s=500.0, retry_max_s=600.0)
    with running_server(config) as server:
        first = DeviceProcess(server.url, tmp_path / "first")
        first.run_killed_at("checked-in", 1)  # holds the only slot
        second = DeviceProcess(server.url, tmp_path / "second", seed=1)
        process = second.start()
        assert process.stderr is not None
        with process.stderr:
            waiting = next(line for line in process.stderr if "waiting" in line)
            assert "round-full" in waiting
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
        assert process.wait() == 0
        assert "the state is kept; 0 reports accepted" in rest
        assert first.run("--once").returncode == 0


def test_two_processes_of_one_device_do_not_get_in_each_others_way(tmp_path: Path, softmax_bundle: Path):
    config = write_config(tmp_path / "server", softmax_bundle, buffer_size=1, retry_min_s=500.0, retry_max_s=600.0)
    with running_server(config) as server:
        DeviceProcess(server.url, tmp_path / "holder").run_killed_at("checked-in", 1)
        device = DeviceProcess(server.url, tmp_path / "device", seed=1)
        process = device.start()
        assert process.stderr is not None
        with process.stderr:
            next(line for line in process.stderr if "waiting" in line)
            second = device.run()
            process.terminate()
        process.wait()
    assert second.returncode == 2
    assert f"error: {device.state} is used by another process (pid {process.pid})" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "http://127.0.0.1:1", "--data", "{folder}/bad.npz"], "x is float64; save it as float32"),
        (["--server", "ftp://x", "--data", "{folder}/data.npz"], "not a server's address"),
        (["--server", "http://127.0.0.1:1", "--data", "{folder}/none.npz"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path: Path, arguments: list[str], message: str):
    device = DeviceProcess("", tmp_path)
    np.savez(tmp_path / "bad.npz", x=device.x.astype(np.float64), y=device.y)
    command = [str(Path(sys.executable).with_name("pocketfed")), "device", "--state-dir", str(device.state)]
    done = subprocess.run(
        [*command, *(a.format(folder=tmp_path) for a in arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_data_that_does_not_fit_the_model_stops_the_device_and_gives_the_assignment_back(
    server: ServerProcess, tmp_path: Path
):
    device = DeviceProcess(server.url, tmp_path / "device")
    np.savez(device.folder / "data.npz", x=device.x[:, :5].copy(), y=device.y)
    done = device.run()
    assert done.returncode == 2
    assert "features must be float32" in done.stderr.splitlines()[-1]
    other = DeviceProcess(server.url, tmp_path / "other", seed=1)
    assert other.run("--once").returncode == 0, "the slot was free again"
