"""All aggregators in the coordinator's own process: the arithmetic and the rules of secret sharing without its secrecy.

For development, and for operators who want the private sums and the ledgers but have no other parties. Whoever has this
process or its folder has all keys and all shares.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.keys import Peers, create_keys, load_keys
from server_ref.secure.messages import TaskBinding
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.store import AggregatorStore

_log = logging.getLogger("pocketfed.secure")

NO_SECRECY = (
    "all %d aggregators run in this process: nobody who can read its memory or %s is kept from single updates. "
    "Run `pocketfed aggregator` at other parties for secrecy from the operator"
)


@dataclass(frozen=True)
class EmbeddedAggregators:
    """n aggregators in this process.

    Attributes:
        ports: The aggregators, that with index 1 first.
        peers: Their public keys.
    """

    ports: tuple[Aggregator, ...]
    peers: Peers
    _stores: tuple[AggregatorStore, ...]

    @classmethod
    def open(
        cls,
        folder: Path,
        parameters: PinnedParameters,
        *,
        suite: SealingSuite = SealingSuite.X25519,
        task: TaskBinding | None = None,
    ) -> Self:
        """Open the aggregators of a folder; at the first time, make their keys. Says that this gives no secrecy.

        Args:
            folder: Below the server's ``data_dir``.
            parameters: What all of them pin; says how many there are.
            suite: How everything is sealed.
            task: The task to serve; None to serve the first that they are bound to.

        Raises:
            ConfigurationError: The folder belongs to other aggregators, or was begun with other parameters.
        """
        _log.warning(NO_SECRECY, parameters.num_aggregators, folder)
        indices = range(1, parameters.num_aggregators + 1)
        homes = {i: folder / f"aggregator-{i}" for i in indices}
        peers = Peers.of([create_keys(homes[i] / "keys.json", i, suite)[0] for i in indices])
        stores: list[AggregatorStore] = []
        ports: list[Aggregator] = []
        try:
            for i in indices:
                config = AggregatorConfig(index=i, parameters=parameters, suite=suite, peers=peers.peers, task=task)
                stores.append(AggregatorStore(homes[i]))
                ports.append(Aggregator(config, load_keys(homes[i] / "keys.json", i, suite), stores[-1]))
        except BaseException:
            for store in stores:
                store.close()
            raise
        return cls(tuple(ports), peers, tuple(stores))

    def close(self) -> None:
        """Close their databases."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()
