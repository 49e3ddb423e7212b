"""Real aggregator processes for scenarios, forked from one that has imported everything: quick to start."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure import launch
from server_ref.secure.client import Patience
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.launch import AggregatorProcesses, launch_aggregators
from server_ref.secure.layout import secure_layout
from server_ref.secure.parameters import PinnedParameters
from tests.secure_parties import TASK, Parties
from tests.secure_rounds import Coordinator

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["server_ref.secure.serve", "server_ref.secure.config", "server_ref.secure.client"])
QUICK = Patience(connect_s=5.0, reply_s=30.0, attempts=2, first_wait_s=0.0)


def _serve(config: str, log: str, said: Any, held: Any) -> None:
    """What `pocketfed aggregator` does, in a forked process: says where it listens, ends when its input does."""
    from server_ref.secure.config import load_settings  # noqa: PLC0415 - in the child, where it is there already
    from server_ref.secure.serve import serve  # noqa: PLC0415

    sys.stdin = os.fdopen(held.fileno(), closefd=False)  # multiprocessing has put another there
    os.dup2(said.fileno(), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    serve(load_settings(Path(config)))


class ForkedServer:
    """In place of ``ChildServer``."""

    def __init__(self, arguments: Sequence[str], log: Path, _name: str) -> None:
        self.log = log
        self.url = ""
        self._config = arguments[-1]
        self._process: Any = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def spawn(self) -> None:
        self._said, said = FORK.Pipe(duplex=False)
        held, self._held = FORK.Pipe(duplex=False)
        self._process = FORK.Process(target=_serve, args=(self._config, str(self.log), said, held))
        self._process.start()
        said.close()
        held.close()

    def wait_until_ready(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._said.fileno(), 4096)
            assert part, f"an aggregator did not start:\n{self.log.read_text()}"
            line += part
        self.url = json.loads(line)["url"]
        return self.url

    def start(self) -> str:
        self.spawn()
        return self.wait_until_ready()

    def check(self) -> None:
        assert self._process.is_alive()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process.close()
            self._said.close()
            self._held.close()
            self._process = None


class Fleet(Parties):
    """Parties whose aggregators are processes: what ``Parties`` does, over HTTP."""

    def __init__(self, folder: Path, parameters: PinnedParameters) -> None:
        self.parameters = parameters
        self.task = TASK
        self.folder = folder
        self.stores = {}
        self.processes: AggregatorProcesses = self._launch()
        self.processes.start()
        self._take_over()

    def _launch(self) -> AggregatorProcesses:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "ChildServer", ForkedServer)
            return launch_aggregators(self.parameters, self.folder, task=TASK, patience=QUICK)

    def _take_over(self) -> None:
        peers = self.processes.peers
        self.configs = [
            AggregatorConfig(index=i, parameters=self.parameters, suite=peers.suite, peers=peers.peers, task=TASK)
            for i in self.indices
        ]
        self.layout = secure_layout(self.parameters, TASK, SealingSuite.X25519)
        self.ports = dict(enumerate(self.processes.ports, 1))

    def kill(self, index: int) -> None:
        """SIGKILL, and wait for the end."""
        child = self.processes._children[index - 1]._process
        os.kill(child.pid, signal.SIGKILL)
        child.join()

    def revive(self, index: int) -> None:
        """Start again what was killed."""
        self.ports[index] = self.processes.restart(index)

    def rotate_keys(self) -> None:
        """Every party makes new keys, exchanges them, and starts again on its old data."""
        self.processes.stop()
        for path in self.folder.glob(f"*/{launch.KEY_FILE}"):
            path.rename(path.with_name("retired.json"))
        self.processes = self._launch()
        self.processes.start()
        self._take_over()

    def rows(self, index: int, query: str) -> list[tuple[Any, ...]]:
        """What stands in an aggregator's database."""
        path = self.folder / f"aggregator-{index}" / "state" / "aggregator.db"
        with sqlite3.connect(path) as connection:
            found = connection.execute(query).fetchall()
        connection.close()
        return found

    def charges(self, round_id: int) -> list[int]:
        """For each aggregator, how often its ledger was charged for a round."""
        query = f"SELECT count(*) FROM ledger WHERE round_id = {round_id}"  # noqa: S608 - an integer
        return [self.rows(index, query)[0][0] for index in self.indices]

    def close(self) -> None:
        self.processes.stop()


class FleetCoordinator(Coordinator):
    """A coordinator of a fleet: aggregators are killed, and clients follow those that are started again."""

    parties: Fleet

    def kill_at(self, index: int, operation: str, *, after: bool = False) -> None:
        """SIGKILL an aggregator just before an operation of it, or after, so that its answer comes still."""
        hooks = self.port(index).after if after else self.port(index).before
        hooks[operation] = lambda: self.parties.kill(index)

    def revive(self, *indices: int) -> None:
        """Start them again."""
        for index in indices:
            self.parties.revive(index)
            self.port(index).port = self.parties[index]
            self.port(index).recover()
