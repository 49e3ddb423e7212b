"""The aggregators of a task, reached as the server's settings say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from client_sdk.protocol.errors import ConfigurationError, PocketfedError
from client_sdk.protocol.messages import SecurePlan
from server_ref.config import AggregatorsConfig, ServerConfig
from server_ref.recipe import select_by_distance
from server_ref.secure.compiled import CompiledKernels
from server_ref.secure.distance_rules import DISTANCE_LEAKAGE
from server_ref.secure.embedded import EmbeddedAggregators
from server_ref.secure.keys import Peers, create_coordinator_key, read_public
from server_ref.secure.parameters import PRICES, PinnedParameters
from server_ref.secure.port import FullPort
from server_ref.secure.round import SecureRound
from server_ref.secure.round_messages import Journal
from server_ref.task import Task

if TYPE_CHECKING:
    from server_ref.secure.client import HttpAggregator

EMBEDDED_FOLDER: Final = "aggregators"
"""Below the data directory: stores and keys of embedded aggregators."""
_KEY_FILE: Final = "coordinator-key.json"

_log = logging.getLogger("pocketfed.coordinator")


@dataclass(frozen=True)
class OpenedRounds:
    """Aggregators that were found, and what devices are told of them."""

    rounds: SecureRound
    plan: SecurePlan
    closing: tuple[Callable[[], None], ...] = ()

    def close(self) -> None:
        """Let go of them."""
        self.rounds.close()
        for close in self.closing:
            close()


def open_rounds(config: ServerConfig, task: Task, journal: Journal) -> OpenedRounds:
    """Reach the aggregators of a task.

    Args:
        config: Where they run.
        task: With shared updates.
        journal: Keeps the state of rounds.

    Raises:
        ConfigurationError: The settings do not fit the task.
    """
    sharing = task.sharing
    if sharing is None:
        raise ConfigurationError("the updates of this task are not shared: set task.secure")
    binding = sharing.binding(task.task_id, task.manifest.parameter_table_sha256)
    ports: Sequence[FullPort]
    closing: tuple[Callable[[], None], ...]
    if config.aggregators.mode == "embedded":
        embedded = EmbeddedAggregators.open(config.data_dir / EMBEDDED_FOLDER, sharing.pinned, suite=sharing.suite)
        ports, peers, closing = embedded.ports, embedded.peers, (embedded.close,)
    else:
        remote, peers = _remote(config)
        ports, closing = remote, tuple(port.close for port in remote)
    if peers.suite is not sharing.suite:
        raise ConfigurationError(
            f"the aggregators' keys are for {peers.suite}, and task.secure.suite is {sharing.suite}: make them agree"
        )
    _check_pinned(ports, sharing.pinned)
    plan = sharing.announce([peer.sealing_key for peer in peers.peers])
    _log.info(
        "updates are shared among %d aggregators, any %d of whom open sums; keys %s",
        len(ports),
        sharing.pinned.needed,
        peers.fingerprint(),
    )
    _log.info("checks of shared updates: %s", PRICES[sharing.pinned.checking])
    if sharing.pinned.distances:
        _log.warning(DISTANCE_LEAKAGE)
    rounds = SecureRound(
        ports,
        peers,
        sharing.pinned,
        binding,
        journal,
        select=select_by_distance(task.settings),
        kernels=CompiledKernels(),
    )
    return OpenedRounds(rounds, plan, closing)


def _check_pinned(ports: Sequence[FullPort], expected: PinnedParameters) -> None:
    """Refuse to begin where an aggregator that answers pins something else: no round would ever close."""
    for index, port in enumerate(ports, 1):
        try:
            pinned = port.describe().parameters
        except PocketfedError as e:
            _log.warning("aggregator %d does not answer yet: %s", index, e)
            continue
        if pinned != expected:
            own, wanted = pinned.model_dump(), expected.model_dump()
            different = ", ".join(name for name, value in wanted.items() if own[name] != value)
            raise ConfigurationError(
                f"aggregator {index} pins other parameters than this task has: {different}; `pocketfed aggregator "
                "parameters --server-config FILE` prints those of the task"
            )


def _remote(config: ServerConfig) -> tuple[list[HttpAggregator], Peers]:
    from server_ref.secure.client import HttpAggregator  # noqa: PLC0415 - an HTTP client, for remote ones only

    settings: AggregatorsConfig = config.aggregators
    if settings.peers_file is None:
        raise ConfigurationError("remote aggregators are given by aggregators.urls and aggregators.peers_file")
    peers = read_public(settings.peers_file, Peers)
    path = settings.key_file or config.data_dir / _KEY_FILE
    key, created = create_coordinator_key(path)
    if created:
        _log.warning("a new coordinator key is in %s; every aggregator pins its public part: %s", path, key.public)
    return [
        HttpAggregator(index, url, key, ca_file=settings.ca_file) for index, url in enumerate(settings.urls, 1)
    ], peers
