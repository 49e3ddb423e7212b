"""The HTTP service around one aggregator: the port's operations for its coordinator, health and metrics for anybody.

Only requests that the pinned coordinator key signed reach the aggregator, and the signature is checked before the body
is read: a stranger cannot make this process hold more than a request's headers. The path holds the aggregator's index,
so that a request signed for one aggregator says nothing to another. Replaying a request is harmless, because each
operation is idempotent. Secrecy on the wire is TLS's job; shares and noise are sealed besides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response

from client_sdk.protocol.errors import AuthenticationFailed, BodyAltered, ProtocolError
from client_sdk.protocol.messages import Message, Problem
from client_sdk.protocol.signing import content_digest, device_id_of, signing_device, verify_headers
from server_ref.app import problems
from server_ref.app.requests import headers_of, public_key, read_body
from server_ref.metrics import CONTENT_TYPE
from server_ref.secure.metrics import AggregatorMetrics
from server_ref.secure.operations import FRAME, JSON, Operation, Operations
from server_ref.secure.port import FullPort

_THREADS = 4
"""Operations at once; opening shares and flushing them release the interpreter's lock."""
_DESCRIPTION = """\
One aggregator of several: it holds a share of each update, and gives its share of a sum only for a set that a quorum
of aggregators signed. Its one client is the coordinator, whose Ed25519 key it pins and who signs every request
(HTTP Message Signatures over method, path and content digest). Operations with shares take or give one binary frame
whose tensor `control` is the JSON described here, and whose tensors `0`, `1`, ... are the ciphertexts or payloads.
"""


class AggregatorApi:
    """Authenticates, bounds and dispatches the coordinator's requests.

    Args:
        aggregator: Answers.
        coordinator_key: The coordinator's Ed25519 public key, hex: the only one whose requests are served.
    """

    def __init__(self, aggregator: FullPort, coordinator_key: str) -> None:
        self._aggregator = aggregator
        self._key = public_key(coordinator_key)
        self._key_id = device_id_of(bytes.fromhex(coordinator_key))
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="pocketfed-aggregator")
        self.metrics = AggregatorMetrics()
        self.operations = Operations(aggregator, self.metrics)

    async def serve(self, operation: Operation, request: Request) -> Response:
        """Answer one request."""
        try:
            body = await self._authentic_body(operation, request)
            reply = await asyncio.get_running_loop().run_in_executor(self.executor, operation.run, body)
            response = Response(reply, media_type=operation.reply_type)
        except Exception as e:  # noqa: BLE001 - the one place where an operation's error becomes an answer
            if isinstance(e, ProtocolError):
                self.metrics.refusals.labels(e.slug).inc()
            response = problems.problem_response(e)
        self.metrics.requests.labels(operation.path or "/", str(response.status_code)).inc()
        return response

    def is_ready(self) -> bool:
        """Whether the aggregator's store answers."""
        try:
            self._aggregator.describe()
        except ProtocolError:
            return False
        return True

    async def _authentic_body(self, operation: Operation, request: Request) -> bytes:
        headers = headers_of(request.scope)
        if signing_device(headers) != self._key_id:
            raise AuthenticationFailed("only the coordinator whose key is pinned here is served")
        path = request.scope.get("raw_path") or request.scope["path"].encode("ascii", "replace")
        claimed = verify_headers(self._key, headers, operation.method, path.decode("latin-1"))
        if operation.request is None:
            body = b""
        else:
            body = await read_body(request.receive, headers, operation.limit(self.operations.limits))
        if content_digest(body) != claimed:
            raise BodyAltered("the content digest is not that of the body")
        return body


def create_app(aggregator: FullPort, index: int, coordinator_key: str) -> FastAPI:
    """The ASGI application of one aggregator.

    Args:
        aggregator: Answers; outlives the application.
        index: Its index, part of every path.
        coordinator_key: The pinned coordinator's Ed25519 public key, hex.
    """
    api = AggregatorApi(aggregator, coordinator_key)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        api.executor.shutdown()

    app = FastAPI(
        title="pocketfed aggregator", version=version("pocketfed"), description=_DESCRIPTION, lifespan=lifespan
    )
    problems.install(app)
    for operation in api.operations.table():
        _add_route(app, api, operation, f"/v1/aggregators/{index}")
    _add_public_routes(app, api)
    return app


def _add_route(app: FastAPI, api: AggregatorApi, operation: Operation, prefix: str) -> None:
    async def endpoint(request: Request) -> Response:
        return await api.serve(operation, request)

    extra: dict[str, Any] = {"security": [{"coordinatorSignature": []}]}
    if operation.request is not None:
        schema = operation.request.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        content = {"schema": schema} if operation.request_type == JSON else _frame_of(operation.request)
        extra["requestBody"] = {"required": True, "content": {operation.request_type: content}}
    reply: dict[str, Any] = {"model": operation.reply} if operation.reply_type == JSON else {}
    app.add_api_route(
        prefix + operation.path,
        endpoint,
        methods=[operation.method],
        summary=operation.summary,
        tags=["coordinator"],
        response_class=Response,
        responses={
            200: reply or {"description": "Done", "content": {FRAME: _frame_of(operation.reply)}},
            "default": {"model": Problem, "description": "Refused"},
        },
        openapi_extra=extra,
    )


def _frame_of(control: type[Message]) -> dict[str, Any]:
    return {
        "schema": {"type": "string", "format": "binary", "description": f"a frame whose control is {control.__name__}"}
    }


def _add_public_routes(app: FastAPI, api: AggregatorApi) -> None:
    @app.get("/health", tags=["operation"], summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"], summary="The aggregator can serve: its store answers")
    async def ready() -> Response:
        is_ready = await asyncio.to_thread(api.is_ready)
        return Response(
            '{"status":"ready"}' if is_ready else '{"status":"unavailable"}',
            status_code=200 if is_ready else 503,
            media_type=JSON,
        )

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(api.metrics.render(), media_type=CONTENT_TYPE)
