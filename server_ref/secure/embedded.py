"""All aggregators of a task in the coordinator's own process: for trying things out, and for simulations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.keys import Peers, create_keys, load_keys, public_part
from server_ref.secure.messages import TaskBinding
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.store import AggregatorStore

NO_SECRECY: Final = (
    "All aggregators run in this process: sums are exact, and noised as configured, but whoever operates this server "
    "can read every update. For secrecy, run each aggregator as a service of its own, under another party."
)


class EmbeddedAggregators:
    """n aggregators over n stores in one folder; each with keys of its own, made the first time and kept.

    They follow the same rules as in processes of their own, so that what works here works there. What they do not give
    is secrecy from whoever runs the process: see ``NO_SECRECY``, which a server says at its start.

    Attributes:
        ports: The aggregators, in order of their indices.
        peers: Their public keys.

    Args:
        folder: Keys, databases and blobs.
        parameters: What all of them pin.
        suite: How everything is sealed.
        task: The task to serve; None to be bound later.
        random: The operating system's randomness.

    Raises:
        ConfigurationError: The folder belongs to other aggregators, parameters or another task.
    """

    def __init__(
        self,
        folder: Path,
        parameters: PinnedParameters,
        *,
        suite: SealingSuite = SealingSuite.X25519,
        task: TaskBinding | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        keys = [_keys(folder / f"aggregator-{i}.key", i, suite) for i in range(1, parameters.num_aggregators + 1)]
        self.peers = Peers.of([public_part(own, i) for i, own in enumerate(keys, 1)])
        self._stores: list[AggregatorStore] = []
        ports: list[Aggregator] = []
        try:
            for i, own in enumerate(keys, 1):
                config = AggregatorConfig(
                    index=i, parameters=parameters, suite=suite, peers=self.peers.peers, task=task
                )
                self._stores.append(AggregatorStore(folder / f"aggregator-{i}"))
                ports.append(Aggregator(config, own, self._stores[-1], random))
        except BaseException:
            self.close()
            raise
        self.ports = tuple(ports)

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()


def _keys(path: Path, index: int, suite: SealingSuite) -> AggregatorKeys:
    create_keys(path, index, suite)
    return load_keys(path, index, suite)
