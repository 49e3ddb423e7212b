"""An ASGI application on a socket of this process, in a thread of its own."""

from __future__ import annotations

import threading
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp


class _Announced(uvicorn.Server):
    """Says when it accepts connections."""

    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._ready.set()


class Host:
    """Serves an application; ``url`` is known once it is started."""

    def __init__(self, app: ASGIApp) -> None:
        self._ready = threading.Event()
        self.url = ""
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none", interface="asgi3"
        )
        self._server = _Announced(config, self._ready)
        self._thread = threading.Thread(target=self._server.run, name="hosted", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        self.url = "http://{}:{}".format(*self._server.servers[0].sockets[0].getsockname()[:2])

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
