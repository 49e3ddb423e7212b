"""All aggregators in one process: correct, and no secrecy from whoever runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.keys import Peers, create_keys, load_keys
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.port import AggregatorPort
from server_ref.secure.store import AggregatorStore
from server_ref.store.blobs import BlobStore

_log = logging.getLogger("pocketfed.secure")


def embedded_aggregators(
    folder: Path, parameters: PinnedParameters, suite: SealingSuite
) -> tuple[Sequence[AggregatorPort], Peers]:
    """Stub."""
    n = parameters.num_aggregators
    parts = [create_keys(folder / str(i) / "keys.json", i, suite)[0] for i in range(1, n + 1)]
    peers = Peers.of(parts)
    ports = []
    for i in range(1, n + 1):
        config = AggregatorConfig(index=i, parameters=parameters, suite=suite, peers=peers.peers)
        keys = load_keys(folder / str(i) / "keys.json", i, suite)
        ports.append(Aggregator(config, keys, AggregatorStore(folder / str(i), BlobStore(folder / str(i) / "blobs"))))
    return ports, peers
