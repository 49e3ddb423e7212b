"""Run the server in this process: sockets, signals, and the line that says where it listens."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable

import uvicorn

from server_ref.app.factory import create_app
from server_ref.clock import VirtualClock, WallClock
from server_ref.config import ServerConfig
from server_ref.coordinator import Coordinator
from server_ref.evaluation import ProgramEvaluator


class _AnnouncingServer(uvicorn.Server):
    """Prints one JSON line on standard output once it accepts connections."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # looser on purpose
        await super().startup(sockets)  # type: ignore[arg-type]  # passed through unchanged
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(json.dumps({"url": f"http://{host}:{port}", "pid": os.getpid()}), flush=True)  # noqa: T201 - contract


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
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("pocketfed.serve").info(
        "opening %s; the first start after an installation compiles the kernels, which takes some ten seconds",
        config.data_dir,
    )
    coordinator = build_coordinator(config, on_event=on_event)
    # Before any socket is opened: what is wrong with the data directory is an error of this command.
    coordinator.start()
    try:
        if config.exit_with_stdin:
            _stop_when_stdin_closes()
        server = _AnnouncingServer(
            uvicorn.Config(
                create_app(coordinator),
                host=config.host,
                port=config.port,
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=75,
            )
        )
        server.run()
    finally:
        coordinator.stop()
    return 0 if server.started else 1


def _stop_when_stdin_closes() -> None:
    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="pocketfed-parent", daemon=True).start()
