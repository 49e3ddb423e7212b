"""Real servers in processes of their own, and a device reduced to its HTTP requests, for tests to misuse."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import (
    REPORT_TENSOR,
    UNCOMPRESSED,
    Assigned,
    Assignment,
    CheckInReply,
    CheckInRequest,
    EnrolRequest,
    VirtualTiming,
)
from client_sdk.protocol.signing import device_id_of, sign_request
from server_ref.settings import toml_table

_CLIENT = httpx.Client(trust_env=False, timeout=30)
"""One pool of connections for all tests of a process."""

_KILLING = """
import os, signal, sys
from pathlib import Path
from server_ref.config import load_config
from server_ref.serve import serve
event, countdown = sys.argv[2], [int(sys.argv[3])]
def on_event(name):
    if name == event:
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.exit(serve(load_config(Path(sys.argv[1])), on_event=on_event))
"""


def write_config(folder: Path, bundle: Path, **settings: object) -> Path:
    """A configuration file; ``task`` settings may be given flat. Returns its path."""
    top = {k: settings.pop(k) for k in ("clock", "blob_quota_bytes", "port") if k in settings}
    tables = {k: settings.pop(k) for k in [k for k, v in settings.items() if isinstance(v, dict)]}
    task = {"bundle": str(bundle), "rounds": 3, "buffer_size": 2, "retry_min_s": 0.0, "retry_max_s": 0.0} | settings
    lines = [f"{k} = {json.dumps(v)}" for k, v in ({"data_dir": str(folder / "state"), "port": 0} | top).items()]
    lines += ["exit_with_stdin = true", "[task]", *(f"{k} = {json.dumps(v)}" for k, v in task.items())]
    for name, values in tables.items():
        lines += toml_table(f"task.{name}", values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "server.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class ServerProcess:
    """A server process and where it listens."""

    process: subprocess.Popen[str]
    url: str

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the process to end by itself."""
        status = self.process.wait(timeout=60)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        return status


def start_server(
    config: Path, *, kill_at: tuple[str, int] | None = None, command: Sequence[str] | None = None
) -> ServerProcess:
    """Start a server and wait until it listens; with ``kill_at`` it kills itself at the n-th event of a name.

    With ``command`` it is that command's server.
    """
    if command is not None:
        command = list(command)
    elif kill_at is None:
        command = [str(Path(sys.executable).with_name("pocketfed")), "serve", "--config", str(config)]
    else:
        command = [sys.executable, "-c", _KILLING, str(config), kill_at[0], str(kill_at[1])]
    with (config.parent / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        ServerProcess(process, "").wait()
        raise RuntimeError(f"the server did not start:\n{(config.parent / 'server.log').read_text()}")
    return ServerProcess(process, json.loads(line)["url"])


@contextlib.contextmanager
def running_server(config: Path) -> Iterator[ServerProcess]:
    """A server for the duration of a block."""
    server = start_server(config)
    try:
        yield server
    finally:
        server.kill()


@dataclass
class RawDevice:
    """A device that signs correctly and sends whatever a test tells it to."""

    url: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    client: httpx.Client = field(default_factory=lambda: _CLIENT)

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    @property
    def device_id(self) -> str:
        return device_id_of(self.public_key)

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
        signed = sign_request(self.key, self.device_id, method, path, body, nonce=secrets.token_hex(16))
        return self.client.request(method, self.url + path, content=body, headers=signed | dict(headers or {}))

    def enrol(self) -> RawDevice:
        body = EnrolRequest(public_key=self.public_key.hex()).model_dump_json().encode()
        self.send("POST", "/v1/devices", body).raise_for_status()
        return self

    def check_in(self, samples: int = 10, virtual: VirtualTiming | None = None):
        body = CheckInRequest(num_samples=samples, virtual=virtual).model_dump_json(exclude_none=False).encode()
        response = self.send("POST", "/v1/check-ins", body)
        response.raise_for_status()
        return CheckInReply.model_validate_json(response.content).reply

    def assigned(self, samples: int = 10) -> Assignment:
        reply = self.check_in(samples)
        assert isinstance(reply, Assigned), reply
        return reply.assignment

    def upload(self, assignment: Assignment, update: np.ndarray, **changes: str) -> httpx.Response:
        facts = report_facts(assignment) | changes
        report_id = facts["report_id"]
        response = self.send("PUT", f"/v1/reports/{report_id}", encode_frame({REPORT_TENSOR: update}, facts))
        # A report is acknowledged before the buffer it fills is closed. Writes are done in order: once another one is
        # answered, the buffer has closed.
        self.enrol()
        return response

    def weights(self, assignment: Assignment) -> np.ndarray:
        response = self.client.get(f"{self.url}/v1/blobs/{assignment.model_sha256}")
        response.raise_for_status()
        return np.frombuffer(decode_frame(response.content).payload, np.float32)


def report_facts(assignment: Assignment, report_id: str | None = None) -> dict[str, str]:
    """The metadata that a report for this assignment must carry."""
    return {
        "protocol_version": "1",
        "report_id": report_id or secrets.token_hex(16),
        "assignment_id": assignment.assignment_id,
        "model_version": str(assignment.model_version),
        "parameter_table_sha256": assignment.parameter_table_sha256,
        "kind": assignment.kind.value,
        "encoding": assignment.encoding.name,
        "algorithm": assignment.plan.algorithm,
        "compression": assignment.compression or UNCOMPRESSED,
        "compression_seed": str(assignment.compression_seed),
        "steps": "1",
        "train_loss": "0.5",
    }


def get_json(url: str, path: str):
    """GET a public resource."""
    response = _CLIENT.get(url + path)
    response.raise_for_status()
    return response.json()
