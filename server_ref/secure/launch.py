"""All aggregators of a task as child processes on this machine: for simulations and tests.

Each has its own process, keys, database and port, so that everything behaves as it would among parties, but secrecy:
whoever runs all of them can read all shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

from client_sdk.protocol.sealing import SealingSuite
from server_ref.child import ChildServer
from server_ref.secure.client import HttpAggregator, Patience
from server_ref.secure.identity import SigningKey
from server_ref.secure.keys import Peers, create_coordinator_key, create_keys
from server_ref.secure.messages import TaskBinding
from server_ref.secure.parameters import PinnedParameters
from server_ref.settings import toml_table, toml_value

CONFIG_FILE: Final = "aggregator.toml"
KEY_FILE: Final = "keys.json"
PEERS_FILE: Final = "peers.json"
COORDINATOR_FILE: Final = "coordinator.key"


class AggregatorProcesses:
    """n aggregator processes in one folder; see ``launch_aggregators``.

    Attributes:
        peers: Their public keys.
        coordinator: The key that they serve.
        ports: Clients, that of aggregator 1 first; of one that was restarted, the new one.
    """

    def __init__(self, folder: Path, peers: Peers, coordinator: SigningKey, patience: Patience | None) -> None:
        self.peers = peers
        self.coordinator = coordinator
        self._patience = patience
        self._children = [
            ChildServer(
                ["aggregator", "--config", str(_home(folder, i) / CONFIG_FILE)],
                _home(folder, i) / "log",
                f"aggregator {i}",
            )
            for i in range(1, len(peers.peers) + 1)
        ]
        self.ports: list[HttpAggregator] = []

    def start(self) -> None:
        """Start all at once, and wait until all listen.

        Raises:
            ChildUnavailable: One of them did not start; the others are stopped again.
        """
        try:
            for child in self._children:
                child.spawn()
            self.ports = [self._client(i, child.wait_until_ready()) for i, child in enumerate(self._children, 1)]
        except BaseException:
            self.stop()
            raise

    def restart(self, index: int) -> HttpAggregator:
        """Start one again that was stopped or killed, and give the client for its new address.

        Raises:
            ChildUnavailable: It did not start.
        """
        child = self._children[index - 1]
        child.stop()
        self.ports[index - 1].close()
        self.ports[index - 1] = self._client(index, child.start())
        return self.ports[index - 1]

    def check(self) -> None:
        """Say what happened where one has ended by itself.

        Raises:
            ChildUnavailable: It did.
        """
        for child in self._children:
            child.check()

    def pid(self, index: int) -> int | None:
        """The process id of one, while it is started."""
        return self._children[index - 1].pid

    def stop(self) -> None:
        """Stop all."""
        for port in self.ports:
            port.close()
        for child in self._children:
            child.stop()

    def _client(self, index: int, url: str) -> HttpAggregator:
        return HttpAggregator(index, url, self.coordinator, patience=self._patience)

    def __enter__(self) -> Self:
        """Start all."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all."""
        self.stop()


def launch_aggregators(
    parameters: PinnedParameters,
    folder: Path,
    *,
    suite: SealingSuite = SealingSuite.X25519,
    task: TaskBinding | None = None,
    patience: Patience | None = None,
) -> AggregatorProcesses:
    """Prepare n aggregator processes on loopback; ``start`` them, or use the result as a context.

    Keys and configurations are made once: processes that are prepared again in the same folder go on where the former
    ones were. They end with this process, however it ends.

    Args:
        parameters: What all of them pin; says how many there are.
        folder: Gets one folder for each.
        suite: How everything is sealed.
        task: The task to serve; None to serve the first that they are bound to.
        patience: Of the clients.

    Raises:
        ConfigurationError: The folder cannot be written, or has other aggregators.
    """
    coordinator, _ = create_coordinator_key(folder / COORDINATOR_FILE)
    indices = range(1, parameters.num_aggregators + 1)
    peers = Peers.of([create_keys(_home(folder, i) / KEY_FILE, i, suite)[0] for i in indices])
    (folder / PEERS_FILE).write_text(peers.model_dump_json(), encoding="utf-8")
    for index in indices:
        lines = _config(index, coordinator.public, parameters, task)
        (_home(folder, index) / CONFIG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return AggregatorProcesses(folder, peers, coordinator, patience)


def _config(index: int, coordinator_key: str, parameters: PinnedParameters, task: TaskBinding | None) -> list[str]:
    settings = {
        "index": index,
        "data_dir": "state",
        "key_file": KEY_FILE,
        "peers_file": f"../{PEERS_FILE}",
        "coordinator_key": coordinator_key,
        "port": 0,
        "exit_with_stdin": True,
    }
    return [
        *(f"{name} = {toml_value(value)}" for name, value in settings.items()),
        *toml_table("parameters", parameters.model_dump(mode="json")),
        *([] if task is None else toml_table("task", task.model_dump(mode="json"))),
    ]


def _home(folder: Path, index: int) -> Path:
    return folder / f"aggregator-{index}"
