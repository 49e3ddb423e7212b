"""kill -9 of the server at any step: no acknowledged report is lost, and the models are the same bits."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.protocol.messages import Assigned
from client_sdk.protocol.program import Manifest
from tests.servers import RawDevice, ServerProcess, get_json, start_server, write_config

_DEVICES = 3
_ROUNDS = 2


class Run:
    """Three devices and two rounds; whatever kills the server, each request is repeated until it is answered."""

    def __init__(self, folder: Path, bundle: Path, kill_at: tuple[str, int] | None) -> None:
        self.config = write_config(folder, bundle, rounds=_ROUNDS, buffer_size=_DEVICES)
        self.size = Manifest.from_json((bundle / "manifest.json").read_bytes()).num_parameters
        self.kills = 0
        self.server: ServerProcess = start_server(self.config, kill_at=kill_at)
        self.devices = [
            RawDevice(self.server.url, key=Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32)))
            for i in range(_DEVICES)
        ]

    def insist(self, action):
        """Do it, over as many lives of the server as it takes."""
        while True:
            try:
                return action()
            except httpx.TransportError:
                assert self.server.wait() == -9, "only the planned kill may end the server"
                self.kills += 1
                self.server = start_server(self.config)
                for device in self.devices:
                    device.url = self.server.url

    def play(self) -> list[dict[str, object]]:
        for device in self.devices:
            self.insist(device.enrol)
        for round_id in range(_ROUNDS):
            replies = [self.insist(lambda d=d, i=i: d.check_in(5 + i)) for i, d in enumerate(self.devices)]
            for i, (device, reply) in enumerate(zip(self.devices, replies, strict=True)):
                assert isinstance(reply, Assigned), f"device {i} got {reply} in round {round_id}"
                rng = np.random.default_rng([round_id, i])
                update = rng.standard_normal(self.size).astype(np.float32)
                report_id = f"{round_id:016x}{i:016x}"
                answer = self.insist(
                    lambda d=device, a=reply.assignment, u=update, r=report_id: d.upload(a, u, report_id=r)
                )
                assert answer.status_code == 200, answer.text
        self.insist(lambda: get_json(self.server.url, "/v1/task"))
        history = self.insist(lambda: get_json(self.server.url, "/v1/rounds"))
        self.server.kill()
        return [{k: r[k] for k in ("round_id", "reports", "total_weight", "model_sha256")} for r in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, softmax_bundle) -> list[dict[str, object]]:
    return Run(tmp_path_factory.mktemp("undisturbed"), softmax_bundle, None).play()


@pytest.mark.parametrize(
    "kill_at",
    [
        ("report-stored", 2),
        ("report-stored", 6),
        ("batch-committed", 2),
        ("batch-committed", 6),
        ("batch-committed", 8),
        ("batch-committed", 10),
        ("batch-committed", 13),
        ("report-folded", 1),
        ("report-folded", 3),
        ("report-folded", 5),
        ("buffer-summed", 1),
        ("buffer-summed", 2),
        ("round-committed", 1),
        ("round-committed", 2),
    ],
    ids=lambda point: f"{point[0]}-{point[1]}",
)
def test_a_killed_server_reaches_the_same_bits(tmp_path, softmax_bundle, undisturbed, kill_at):
    run = Run(tmp_path, softmax_bundle, kill_at)
    assert run.play() == undisturbed
    assert run.kills == 1, "the kill happened"
