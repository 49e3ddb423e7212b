"""Run one aggregator in this process: its keys, its store, its sockets."""

from __future__ import annotations

import logging
import sys

from server_ref.listening import listen
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.app import create_app
from server_ref.secure.config import AggregatorSettings
from server_ref.secure.keys import load_keys
from server_ref.secure.store import AggregatorStore
from server_ref.store.blobs import BlobStore

_log = logging.getLogger("pocketfed.aggregator")


def serve(settings: AggregatorSettings) -> int:
    """Serve until SIGINT or SIGTERM (or, if so configured, until standard input closes).

    Returns:
        Exit status.

    Raises:
        ConfigurationError: Keys, peers, store and settings do not belong together.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = settings.aggregator_config()
    keys = load_keys(settings.key_file, settings.index, config.suite)
    blobs = BlobStore(settings.data_dir / "blobs", settings.blob_quota_bytes)
    store = AggregatorStore(settings.data_dir, blobs)
    try:
        aggregator = Aggregator(config, keys, store)
        _log.info(
            "aggregator %d of %d on %s; coordinator %s",
            config.index,
            config.parameters.num_aggregators,
            settings.data_dir,
            settings.coordinator_key[:16],
        )
        listened = listen(
            create_app(aggregator, config.index, settings.coordinator_key),
            host=settings.host,
            port=settings.port,
            exit_with_stdin=settings.exit_with_stdin,
            certificate=settings.tls_certificate,
            private_key=settings.tls_key,
        )
    finally:
        store.close()
    return 0 if listened else 1
