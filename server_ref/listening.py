"""Listen on a socket in this process: signals, the line that says where, the end of an orphan."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp


class _AnnouncingServer(uvicorn.Server):
    """Prints one JSON line on standard output once it accepts connections."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # looser on purpose
        await super().startup(sockets)  # type: ignore[arg-type]  # passed through unchanged
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            print(json.dumps({"url": f"{scheme}://{host}:{port}", "pid": os.getpid()}), flush=True)  # noqa: T201 - contract


def listen(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    exit_with_stdin: bool = False,
    certificate: Path | None = None,
    private_key: Path | None = None,
) -> bool:
    """Serve until SIGINT or SIGTERM; once it listens, one line of JSON with ``url`` and ``pid`` is printed.

    Args:
        app: What to serve.
        host: Address to listen on.
        port: Port; 0 picks a free one.
        exit_with_stdin: Stop when standard input closes: for a parent that must not leave orphans.
        certificate: PEM chain for TLS; None for plain HTTP.
        private_key: PEM key of the certificate.

    Returns:
        Whether it ever listened.
    """
    if exit_with_stdin:
        _stop_when_stdin_closes()
    server = _AnnouncingServer(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
            ssl_certfile=certificate,
            ssl_keyfile=private_key,
        )
    )
    server.run()
    return server.started


def _stop_when_stdin_closes() -> None:
    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="pocketfed-parent", daemon=True).start()
