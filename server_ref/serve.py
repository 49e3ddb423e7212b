"""Run the server in this process: its real parts, and the sockets."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable

from server_ref.app.factory import create_app
from server_ref.clock import VirtualClock, WallClock
from server_ref.config import ServerConfig
from server_ref.coordinator import Coordinator
from server_ref.evaluation import ProgramEvaluator
from server_ref.listening import listen


def build_coordinator(config: ServerConfig, *, on_event: Callable[[str], None] | None = None) -> Coordinator:
    """Wire the real parts: clock, evaluator, ids from the operating system's CSPRNG."""
    task = config.task
    evaluator = None if task.validation_data is None else ProgramEvaluator.open(task.bundle, task.validation_data)
    clock = VirtualClock() if config.clock == "virtual" else WallClock()
    return Coordinator(config, clock, lambda: secrets.token_hex(16), evaluator=evaluator, on_event=on_event)


def serve(config: ServerConfig, *, on_event: Callable[[str], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM (or, if so configured, until standard input closes).

    Returns:
        Exit status.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # One line for each request to an aggregator would drown what an operator looks for.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("pocketfed.serve").info(
        "opening %s; the first start after an installation compiles the kernels, which takes some ten seconds",
        config.data_dir,
    )
    coordinator = build_coordinator(config, on_event=on_event)
    # Before any socket is opened: what is wrong with the data directory is an error of this command.
    coordinator.start()
    try:
        listened = listen(
            create_app(coordinator), host=config.host, port=config.port, exit_with_stdin=config.exit_with_stdin
        )
    finally:
        coordinator.stop()
    return 0 if listened else 1
