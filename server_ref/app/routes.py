"""The routes. Device routes read their body themselves: what is signed are the bytes as sent."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, Future
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from client_sdk.protocol.errors import ProtocolError, ServerBusy
from client_sdk.protocol.messages import MAX_JSON_BYTES, AbandonRequest, CheckInRequest, EnrolRequest, ReportReply
from server_ref.app.problems import problem_response
from server_ref.app.requests import authenticate, headers_of, parse, parse_range, read_body, verify_with
from server_ref.coordinator import Coordinator
from server_ref.metrics import CONTENT_TYPE

_ANSWER_WITHIN_S = 60.0
T = TypeVar("T")


async def _answer(future: Future[T]) -> T:
    """Wait for a write to be durable, but not forever.

    Raises:
        ServerBusy: It takes too long; the request may be repeated.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), _ANSWER_WITHIN_S)
    except TimeoutError as e:
        raise ServerBusy("the server did not get to it in time") from e


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")


def device_router(coordinator: Coordinator) -> APIRouter:
    """Enrolment, check-in, give-back and downloads."""
    router = APIRouter(prefix="/v1", include_in_schema=False)

    @router.post("/devices")
    async def enrol(request: Request) -> Response:
        headers = headers_of(request.scope)
        body = await read_body(request.receive, headers, MAX_JSON_BYTES)
        message = parse(EnrolRequest, body)
        # Signed by the key being enrolled: proof that the device holds it.
        verify_with(message.public_key, request.scope, headers, body)
        reply = await _answer(coordinator.enrol(message))
        return _json(reply)

    @router.post("/check-ins")
    async def check_in(request: Request) -> Response:
        headers = headers_of(request.scope)
        body = await read_body(request.receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(coordinator, request.scope, headers, body)
        reply = await _answer(coordinator.check_in(device_id, parse(CheckInRequest, body)))
        return _json(reply)

    @router.post("/assignments/{assignment_id}/abandon")
    async def abandon(request: Request, assignment_id: str) -> Response:
        headers = headers_of(request.scope)
        body = await read_body(request.receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(coordinator, request.scope, headers, body)
        parse(AbandonRequest, body)
        await _answer(coordinator.abandon(device_id, assignment_id))
        return Response(status_code=204)

    @router.get("/blobs/{sha256}")
    async def blob(request: Request, sha256: str) -> Response:
        etag = f'"{sha256}"'
        headers = {"etag": etag, "cache-control": "public, max-age=31536000, immutable", "accept-ranges": "bytes"}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        data = await asyncio.to_thread(coordinator.blob, sha256)
        part = parse_range(request.headers.get("range"), len(data))
        status = 200
        if part is not None:
            headers["content-range"] = f"bytes {part[0]}-{part[1] - 1}/{len(data)}"
            data, status = data[part[0] : part[1]], 206
        coordinator.metrics.download_bytes.inc(len(data))
        return Response(data, status_code=status, media_type="application/octet-stream", headers=headers)

    return router


class ReportUpload:
    """``PUT /v1/reports/{report_id}`` as a bare ASGI endpoint: the framework's body handling would halve the rate."""

    def __init__(self, coordinator: Coordinator, executor: Executor, max_bytes: int) -> None:
        self._coordinator = coordinator
        self._executor = executor
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one upload."""
        try:
            reply = await self._take(scope, receive)
            response = _json(reply)
        except ProtocolError as e:
            response = problem_response(e)
        await response(scope, receive, send)

    async def _take(self, scope: Scope, receive: Receive) -> ReportReply:
        headers = headers_of(scope)
        body = await read_body(receive, headers, self._max_bytes)
        report_id: str = scope["path_params"]["report_id"]

        def work() -> Future[ReportReply]:
            # Hashing, checking and flushing release the interpreter's lock: off the event loop, all cores help.
            device_id = authenticate(self._coordinator, scope, headers, body)
            return self._coordinator.report(device_id, report_id, body)

        return await _answer(await asyncio.get_running_loop().run_in_executor(self._executor, work))


def public_router(coordinator: Coordinator) -> APIRouter:
    """What anybody may read: the task, its history, health and metrics."""
    router = APIRouter()

    @router.get("/v1/task", tags=["status"], summary="The task and where it stands")
    async def task() -> dict[str, object]:
        return await asyncio.to_thread(coordinator.describe)

    @router.get("/v1/rounds", tags=["status"], summary="Committed rounds, oldest first")
    async def rounds(
        since: Annotated[int, Query(ge=0, le=2**53, description="first round to list")] = 0,
    ) -> list[dict[str, object]]:
        return await asyncio.to_thread(coordinator.history, since)

    @router.get("/health", tags=["operation"], summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready", tags=["operation"], summary="The process can serve: its database answers")
    async def ready() -> Response:
        is_ready = await asyncio.to_thread(coordinator.is_ready)
        return Response(
            '{"status":"ready"}' if is_ready else '{"status":"unavailable"}',
            status_code=200 if is_ready else 503,
            media_type="application/json",
        )

    @router.get("/metrics", tags=["operation"], summary="Prometheus metrics")
    async def metrics() -> Response:
        await asyncio.to_thread(coordinator.refresh_metrics)
        return Response(coordinator.metrics.render(), media_type=CONTENT_TYPE)

    return router
