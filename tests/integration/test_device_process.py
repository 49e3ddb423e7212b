"""`pocketfed device` as real processes against a real server: killed anywhere, cut off, stopped, and kept small."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from client_sdk import DeviceProfile, MobileClient
from client_sdk.protocol.errors import BodyAltered
from client_sdk.runtime import load_program
from client_sdk.session_state import Phase, RetryPolicy, SessionState
from client_sdk.store import MemoryDeviceStore
from client_sdk.transport import HttpTransport
from tests.device_process import DeviceProcess
from tests.servers import ServerProcess, get_json, running_server, start_server, write_config
from tests.web import Request, Server, proxy

PLAN = {"local_epochs": 3, "batch_size": 8, "learning_rate": 0.25}


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


class Patient:
    """A device in this process that waits for nothing."""

    def __init__(self, url: str, data: tuple[np.ndarray, np.ndarray], bundle: Path, attempts: int) -> None:
        self.store = MemoryDeviceStore()
        self.program = load_program(bundle, "native")
        self.transport = HttpTransport(url, self.store.identity)
        self.waits: list[float] = []
        self.client = MobileClient(
            self.program,
            DeviceProfile("patient"),
            data=data,
            transport=self.transport,
            store=self.store,
            policy=RetryPolicy(max_attempts=attempts),
            wait=lambda delay, _stop: self.waits.append(delay),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()
        self.program.close()


def flipped(request: Request) -> bytes:
    """The body of an upload with one bit changed."""
    body = bytearray(request.body)
    body[-1] ^= 1
    return bytes(body)


def test_a_body_that_a_proxy_altered_is_sent_again_until_it_arrives(
    server: ServerProcess, tmp_path: Path, softmax_bundle: Path
):
    x, y = DeviceProcess("", tmp_path).data
    before = len(rounds_of(server))
    with Server() as front:
        spoiled = itertools.count()

        def alter(request: Request) -> bytes:
            return flipped(request) if request.method == "PUT" and next(spoiled) < 3 else request.body

        front.answer = proxy(server.url, alter)
        with Patient(front.url, (x, y), softmax_bundle, attempts=12) as device:
            assert device.client.run(max_reports=1).reports == 1
            assert len(device.waits) == 3
        uploads = [r.body for r in front.requests if r.method == "PUT"]
    assert len(uploads) == 4
    assert len(set(uploads)) == 1, "the very bytes that were sealed"
    assert [r["reports"] for r in rounds_of(server)[before:]] == [1]


def test_a_proxy_that_alters_every_body_is_left_and_the_report_kept(
    server: ServerProcess, tmp_path: Path, softmax_bundle: Path
):
    with Server() as front:
        front.answer = proxy(server.url, lambda r: flipped(r) if r.method == "PUT" else r.body)
        with Patient(front.url, DeviceProcess("", tmp_path).data, softmax_bundle, attempts=4) as device:
            summary = device.client.run(max_reports=1)
            assert (summary.cause, summary.reports) == ("gave-up", 0)
            assert isinstance(summary.error, BodyAltered)
            assert len([r for r in front.requests if r.method == "PUT"]) == 4
            front.answer = proxy(server.url, lambda r: r.body)
            assert device.client.run(max_reports=1).reports == 1, "on a better network"


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
