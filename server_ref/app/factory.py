"""The ASGI application around a coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server_ref.app import openapi, problems
from server_ref.app.device_api import ROUTE_KEY, DeviceApi
from server_ref.app.routes import public_router
from server_ref.coordinator import Coordinator
from server_ref.metrics import Metrics

_UPLOAD_THREADS = 8
"""Uploads checked and flushed at once; flushing waits for the disk, so more than cores is right."""

_DESCRIPTION = """\
How a device takes part in federated training: enrol once, check in, download what the assignment names by content
hash, train, upload one report. Errors are problem+json with a stable `type`. Tensors travel in binary frames.
"""


def create_app(coordinator: Coordinator) -> ASGIApp:
    """Build the application over a coordinator that the caller starts before, and stops after."""
    executor = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="pocketfed-upload")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        executor.shutdown()

    app = FastAPI(title="pocketfed", version=version("pocketfed"), description=_DESCRIPTION, lifespan=lifespan)
    app.include_router(public_router(coordinator))
    problems.install(app)
    openapi.install(app)
    return _CountRequests(DeviceApi(coordinator, executor, app), coordinator.metrics)


class _CountRequests:
    """Counts requests by route template and status: bounded labels, whatever paths a client invents."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get(ROUTE_KEY) or getattr(scope.get("route"), "path", "unmatched")
                self._requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count)
