"""`pocketfed device` as real processes, which may kill themselves at a named point."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client_sdk.blobs import Buffer
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment
from client_sdk.reports import build_report
from client_sdk.runtime import load_program
from client_sdk.session_state import SessionState
from client_sdk.training import LocalTrainer

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
after(store.FileDeviceStore, "stage_memory", "staged")
after(store.FileDeviceStore, "count_participation", "counted")
after(store.FileDeviceStore, "seal", "sealed")
after(store.FileDeviceStore, "settle_memory", "settled")
after(store.FileDeviceStore, "discard", "discarded")
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

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Its examples."""
        return self.x, self.y

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

    @property
    def identity(self) -> DeviceIdentity:
        """What the state directory has."""
        return DeviceIdentity.from_private_bytes(bytes.fromhex((self.state / "identity.key").read_text()))

    def honest_report(self, assignment: Assignment, model: bytes, bundle: Path) -> Buffer:
        """The frame that an undisturbed device sends."""
        program = load_program(bundle, "native")
        weights = np.frombuffer(decode_frame(model).payload, np.float32)
        trained = LocalTrainer(program).train(weights, self.x, self.y, assignment.plan, assignment.shuffle_seed)
        program.close()
        identity = self.identity
        return build_report(
            assignment,
            identity.report_id(assignment.assignment_id),
            trained.delta,
            device_id=identity.device_id,
            steps=trained.steps,
            train_loss=trained.last_epoch_loss,
        ).frame
