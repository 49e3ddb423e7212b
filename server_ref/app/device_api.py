"""The routes that devices use, as one bare ASGI application in front of the framework.

Each device costs three requests a round, so this is where a server spends its time: the framework's routing,
dependency and body machinery would double it. What is signed are the bytes as sent, so every route reads its own body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

from fastapi import Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from client_sdk.protocol.errors import ServerBusy
from client_sdk.protocol.messages import (
    MAX_JSON_BYTES,
    AbandonRequest,
    CheckInRequest,
    EnrolRequest,
    ReportReply,
    UploadReply,
    UploadRequest,
)
from server_ref.app.problems import problem_response
from server_ref.app.requests import AUTHENTICATED, authenticate, headers_of, parse, parse_range, read_body, verify_with
from server_ref.coordinator import Coordinator
from server_ref.uploads import MAX_CHUNK_BYTES

ROUTE_KEY = "pocketfed.route"
"""Key of the ASGI scope that names the matched route, for metrics."""

_ANSWER_WITHIN_S = 60.0
T = TypeVar("T")
Handler = Callable[..., Awaitable[Response]]
"""Called with scope, receive, and the parameters of the path."""


class DeviceApi:
    """Serves the device routes, and hands everything else to ``fallback``.

    Args:
        coordinator: Answers.
        executor: Threads for checking and storing reports.
        fallback: The application behind.
    """

    def __init__(self, coordinator: Coordinator, executor: Executor, fallback: ASGIApp) -> None:
        self._coordinator = coordinator
        self._executor = executor
        self._fallback = fallback
        # Method and what stands at the path's even places; at the odd ones are its parameters.
        self._routes: dict[tuple[str, tuple[str, ...], int], tuple[str, Handler]] = {
            _key(method, template): (template, handler)
            for method, template, handler in (
                ("POST", "/v1/devices", self._enrol),
                ("POST", "/v1/check-ins", self._check_in),
                ("GET", "/v1/model", self._model),
                ("PUT", "/v1/reports/{report_id}", self._report),
                ("POST", "/v1/reports/{report_id}/upload", self._announce),
                ("PUT", "/v1/reports/{report_id}/upload/{offset}", self._chunk),
                ("POST", "/v1/reports/{report_id}/complete", self._complete),
                ("GET", "/v1/blobs/{sha256}", self._blob),
                ("POST", "/v1/assignments/{assignment_id}/abandon", self._abandon),
            )
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        found = self._match(scope) if scope["type"] == "http" else None
        if found is None:
            await self._fallback(scope, receive, send)
            return
        (scope[ROUTE_KEY], handler), parameters = found
        try:
            response = await handler(scope, receive, *parameters)
        except Exception as e:  # noqa: BLE001 - the one place where a device's error becomes an answer
            response = problem_response(e)
        self._sign(scope, response)
        await response(scope, receive, send)

    def _sign(self, scope: Scope, response: Response) -> None:
        """Bind the reply to its request, if that is a device's. Blobs are checked by the hash that a reply named."""
        signature = scope.get(AUTHENTICATED)
        if signature is not None:
            response.headers.update(
                self._coordinator.identity.sign_reply(signature, response.status_code, bytes(response.body))
            )

    def _match(self, scope: Scope) -> tuple[tuple[str, Handler], list[str]] | None:
        key = _key(scope["method"], scope["path"])
        route = self._routes.get(key)
        if route is None:
            return None
        parameters = scope["path"].split("/")[3::2]
        return (route, parameters) if all(parameters) else None

    async def _enrol(self, scope: Scope, receive: Receive) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_JSON_BYTES)
        message = parse(EnrolRequest, body)
        # Signed by the key being enrolled: proof that the device holds it.
        verify_with(message.public_key, scope, headers, body)
        reply = await _answer(self._coordinator.enrol(message))
        return _json(reply)

    async def _check_in(self, scope: Scope, receive: Receive) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(self._coordinator, scope, headers, body)
        reply = await _answer(self._coordinator.check_in(device_id, parse(CheckInRequest, body)))
        return _json(reply)

    async def _model(self, scope: Scope, _receive: Receive) -> Response:
        # A request without a body: one that comes all the same is not what its digest was taken of.
        authenticate(self._coordinator, scope, headers_of(scope), b"")
        return _json(self._coordinator.latest_model())

    async def _abandon(self, scope: Scope, receive: Receive, assignment_id: str) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(self._coordinator, scope, headers, body)
        parse(AbandonRequest, body)
        await _answer(self._coordinator.abandon(device_id, assignment_id))
        return Response(status_code=204)

    async def _report(self, scope: Scope, receive: Receive, report_id: str) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, self._coordinator.max_report_bytes)

        def work() -> Future[ReportReply]:
            # Hashing, checking and flushing release the interpreter's lock: off the event loop, all cores help.
            device_id = authenticate(self._coordinator, scope, headers, body)
            return self._coordinator.report(device_id, report_id, body)

        future = await self._in_thread(work)
        reply = await _answer(future)
        return _json(reply)

    async def _announce(self, scope: Scope, receive: Receive, report_id: str) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(self._coordinator, scope, headers, body)
        request = parse(UploadRequest, body)
        return _json(await self._in_thread(lambda: self._coordinator.uploads.begin(device_id, report_id, request)))

    async def _chunk(self, scope: Scope, receive: Receive, report_id: str, offset: str) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_CHUNK_BYTES)

        def work() -> UploadReply:
            # Nothing is written that is not the device's: the signature covers the offset, the chunk and the report id.
            device_id = authenticate(self._coordinator, scope, headers, body)
            return self._coordinator.uploads.append(device_id, report_id, offset, body)

        return _json(await self._in_thread(work))

    async def _complete(self, scope: Scope, receive: Receive, report_id: str) -> Response:
        headers = headers_of(scope)
        body = await read_body(receive, headers, MAX_JSON_BYTES)
        device_id = authenticate(self._coordinator, scope, headers, body)
        request = parse(UploadRequest, body)
        future = await self._in_thread(lambda: self._coordinator.uploads.complete(device_id, report_id, request))
        reply = await _answer(future)
        return _json(reply)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run what hashes and flushes off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _blob(self, scope: Scope, _receive: Receive, sha256: str) -> Response:
        asked = headers_of(scope)
        etag = f'"{sha256}"'
        headers = {"etag": etag, "cache-control": "public, max-age=31536000, immutable", "accept-ranges": "bytes"}
        if asked.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        data = self._coordinator.current_model(sha256)
        if data is None:
            data = await asyncio.to_thread(self._coordinator.blob, sha256)
        part = parse_range(asked.get("range"), len(data))
        status = 200
        if part is not None:
            headers["content-range"] = f"bytes {part[0]}-{part[1] - 1}/{len(data)}"
            data, status = data[part[0] : part[1]], 206
        self._coordinator.metrics.download_bytes.inc(len(data))
        return Response(data, status_code=status, media_type="application/octet-stream", headers=headers)


def _key(method: str, path: str) -> tuple[str, tuple[str, ...], int]:
    parts = path.split("/")[1:]
    return method, tuple(parts[:2]) + tuple(parts[3::2]), len(parts)


async def _answer(future: Future[T]) -> T:
    """Wait for a write to be durable, but not forever.

    Raises:
        ServerBusy: It takes too long; the request may be repeated.
    """
    try:
        # Shielded: the write goes on, and the repeated request finds what it made.
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), _ANSWER_WITHIN_S)
    except TimeoutError as e:
        raise ServerBusy("the server did not get to it in time") from e


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
