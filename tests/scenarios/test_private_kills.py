"""kill -9 of a server between noise and model: whenever it dies, a round is paid for once and has one noise."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assigned
from client_sdk.reports import build_report
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.releases import decode_release
from tests.servers import RawDevice, ServerProcess, get_json, start_server, write_config

_KILLED_IN = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
from server_ref.config import load_config
from server_ref.serve import serve
module, _, path = sys.argv[2].partition(":")
*owners, name = path.split(".")
owner = import_module(module)
for each in owners:
    owner = getattr(owner, each)
real = getattr(owner, name)
def killed(*args, **kwargs):
    if sys.argv[3] == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
sys.exit(serve(load_config(Path(sys.argv[1]))))
"""

Point = tuple[str, str]
UNPAID: Point = ("server_ref.store.database:save_charge", "before")
"""The noise is drawn and lies on disk, and nothing says so."""
PAID: Point = ("server_ref.release_store:ReleaseStore.save_release", "after")
"""What was drawn is durable together with what it costs."""


class Lives:
    """Some devices and one round, over as many lives of a server as points are named at which it dies."""

    def __init__(self, folder: Path, bundle: Path, points: list[Point], *, devices: int = 2, **settings: Any) -> None:
        self.folder = folder
        self.config = write_config(folder, bundle, rounds=1, buffer_size=devices, **settings)
        self.points = list(points)
        self.seen: list[tuple[int, list[bytes]]] = []
        self.server = self._start()
        self.devices = [
            RawDevice(self.server.url, key=Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32)))
            for i in range(devices)
        ]

    def _start(self) -> ServerProcess:
        if not self.points:
            return start_server(self.config)
        target, when = self.points.pop(0)
        return start_server(self.config, command=[sys.executable, "-c", _KILLED_IN, str(self.config), target, when])

    def insist(self, action: Any) -> Any:
        """Do it, over as many lives as it takes."""
        while True:
            try:
                return action()
            except httpx.TransportError:
                assert self.server.wait() == -9, "only the planned kill may end the server"
                self.seen.append((self.charges(), [file.read_bytes() for file in self.releases()]))
                while True:
                    try:
                        self.server = self._start()
                        break
                    except RuntimeError:
                        # It died at its start, closing what the last life had left.
                        self.seen.append((self.charges(), [file.read_bytes() for file in self.releases()]))
                for device in self.devices:
                    device.url = self.server.url

    def play(self) -> tuple[np.ndarray, np.ndarray]:
        """The round; the weights before and after it, float32."""
        for device in self.devices:
            self.insist(device.enrol)
        replies = [self.insist(lambda d=d: d.check_in()) for d in self.devices]
        assert all(isinstance(reply, Assigned) for reply in replies)
        before = self.devices[0].weights(replies[0].assignment)
        for i, (device, reply) in enumerate(zip(self.devices, replies, strict=True)):
            update = np.random.default_rng(i).standard_normal(before.size).astype(np.float32)
            report_id = f"{i:032x}"
            given = {"device_id": device.device_id, "steps": 1, "train_loss": 0.5}
            frame = bytes(build_report(reply.assignment, report_id, update, **given).frame)
            answer = self.insist(lambda d=device, r=report_id, f=frame: d.send("PUT", f"/v1/reports/{r}", f))
            assert answer.status_code == 200, answer.text
            self.insist(device.enrol)
        after = self.insist(self._model)
        self.server.kill()
        assert self.points == [], "all kills happened"
        return before, after

    def _model(self) -> np.ndarray:
        url = self.server.url
        sha256 = get_json(url, "/v1/task")["model_sha256"]
        [committed] = get_json(url, "/v1/rounds")
        assert "privacy" in committed["measurements"], committed
        response = httpx.get(f"{url}/v1/blobs/{sha256}", trust_env=False)
        return np.frombuffer(decode_frame(response.content).payload, np.float32)

    def charges(self) -> int:
        """In the server's ledger."""
        return self._count(self.folder / "state" / "pocketfed.db", "privacy_charges")

    def aggregators_charges(self) -> list[int]:
        """In each aggregator's."""
        files = sorted((self.folder / "state" / "aggregators").glob("*/aggregator.db"))
        return [self._count(file, "ledger") for file in files]

    @staticmethod
    def _count(file: Path, table: str) -> int:
        connection = sqlite3.connect(file)
        [found] = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - a table of ours
        connection.close()
        return int(found)

    def releases(self) -> list[Path]:
        """Files of stored releases."""
        return [path for path in (self.folder / "state" / "blobs" / "releases").glob("**/*") if path.is_file()]


def moved(before: np.ndarray, release: bytes) -> bytes:
    """The model that a stored release makes."""
    return (before.astype(np.float64) + decode_release(release).values).astype(np.float32).tobytes()


def test_noise_of_the_server_is_charged_once_and_drawn_once(tmp_path, softmax_bundle):
    settings = {"aggregation": {"clip_norm": 1.0}, "privacy": {"noise": "server", "noise_multiplier": 1.0}}
    lives = Lives(tmp_path, softmax_bundle, [UNPAID, PAID], **settings)
    before, after = lives.play()
    (unpaid, [lost]), (paid, [kept]) = lives.seen
    assert (unpaid, paid, lives.charges()) == (0, 1, 1), "what is not durable is not charged, and nobody has seen it"
    assert lost != kept, "drawn anew: the first draw left the process nowhere"
    assert after.tobytes() == moved(before, kept)
    assert lives.releases() == []


def test_noise_of_the_aggregators_is_charged_once_and_drawn_once(tmp_path, softmax_bundle):
    settings = {
        "aggregation": {"clip_norm": 1.0},
        "privacy": {"noise": "aggregators", "noise_multiplier": 1.0},
        "secure": {},
    }
    lives = Lives(tmp_path, softmax_bundle, [PAID], **settings)
    before, after = lives.play()
    [(paid, [kept])] = lives.seen
    assert (paid, lives.charges()) == (1, 1)
    assert lives.aggregators_charges() == [1] * 5
    assert after.tobytes() == moved(before, kept)


def test_an_adaptive_clip_norm_goes_where_the_release_says_that_outlived_the_kill(tmp_path, softmax_bundle):
    settings = {
        "aggregation": {"clip_norm": 1.0},
        "privacy": {"noise": "server", "noise_multiplier": 0.5, "adaptive_clipping": True},
    }
    lives = Lives(tmp_path, softmax_bundle, [PAID], devices=4, **settings)
    before, after = lives.play()
    [(_, [kept])] = lives.seen
    assert after.tobytes() == moved(before, kept)
    connection = sqlite3.connect(tmp_path / "state" / "pocketfed.db")
    [[note]] = connection.execute("SELECT value FROM journal WHERE name = 'clip-norm'").fetchall()
    connection.close()
    release = decode_release(kept)
    assert release.indicator is not None
    assert json.loads(note)["clip_norm"] == AdaptiveClipNorm(clip_norm=1.0).after(release.indicator, 4).clip_norm
