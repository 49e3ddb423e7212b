"""The HTTP service around one aggregator: the port's operations for its coordinator, health and metrics for anybody.

Only requests that the pinned coordinator key signed reach the aggregator, and the signature is checked before the body
is read: a stranger cannot make this process hold more than a request's headers. The path holds the aggregator's index,
so that a request signed for one aggregator says nothing to another. Replaying a request is harmless, because each
operation is idempotent. Secrecy on the wire is TLS's job; shares and noise are sealed besides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response

from client_sdk.protocol.errors import AuthenticationFailed, BodyAltered, ProtocolError
from client_sdk.protocol.messages import Message, Problem
from client_sdk.protocol.signing import content_digest, device_id_of, signing_device, verify_headers
from server_ref.app import problems
from server_ref.app.requests import headers_of, parse, public_key, read_body
from server_ref.metrics import CONTENT_TYPE
from server_ref.secure import wire
from server_ref.secure.messages import (
    AggregatorInfo,
    AnswerHeader,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    CommitSignature,
    NoiseHeader,
    RevealRequest,
    RoundStatement,
    TaskBinding,
)
from server_ref.secure.metrics import AggregatorMetrics
from server_ref.secure.port import AggregatorPort

JSON = "application/json"
FRAME = "application/octet-stream"
_THREADS = 4
"""Operations at once; opening shares and flushing them release the interpreter's lock."""
_DESCRIPTION = """\
One aggregator of several: it holds a share of each update, and gives its share of a sum only for a set that a quorum
of aggregators signed. Its one client is the coordinator, whose Ed25519 key it pins and who signs every request
(HTTP Message Signatures over method, path and content digest). Operations with shares take or give one binary frame
whose tensor `control` is the JSON described here, and whose tensors `0`, `1`, ... are the ciphertexts or payloads.
"""


@dataclass(frozen=True)
class Operation:
    """One route.

    Attributes:
        method, path: Below ``/v1/aggregators/{index}``.
        summary: For the reference.
        limit: Largest body, given the limits that hold now.
        run: From the body to the reply.
        request, reply: Schemas; None for no body.
        request_type, reply_type: JSON, or a frame with the schema as its control message.
    """

    method: str
    path: str
    summary: str
    limit: Callable[[wire.Limits], int]
    run: Callable[[bytes], bytes]
    request: type[Message] | None
    reply: type[Message]
    request_type: str = JSON
    reply_type: str = JSON


class AggregatorApi:
    """Authenticates, bounds and dispatches the coordinator's requests.

    Args:
        aggregator: Answers.
        index: Its index.
        coordinator_key: The coordinator's Ed25519 public key, hex: the only one whose requests are served.
    """

    def __init__(self, aggregator: AggregatorPort, index: int, coordinator_key: str) -> None:
        self._aggregator = aggregator
        self._index = index
        self._key = public_key(coordinator_key)
        self._key_id = device_id_of(bytes.fromhex(coordinator_key))
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="pocketfed-aggregator")
        self.metrics = AggregatorMetrics()
        self._limits = self._limits_of(aggregator.describe())

    def operations(self) -> tuple[Operation, ...]:
        """The table of routes."""
        a = self._aggregator
        return (
            Operation(
                "GET",
                "",
                "Who the aggregator is, and what it insists on",
                lambda _: 0,
                lambda _: _json(a.describe()),
                None,
                AggregatorInfo,
            ),
            Operation(
                "POST",
                "/task",
                "Serve this task from now on",
                _control,
                self._bind,
                TaskBinding,
                AggregatorInfo,
            ),
            Operation(
                "POST",
                "/deliveries",
                "Open, check and keep shares",
                lambda limits: limits.delivery,
                self._deliver,
                wire.DeliverRequest,
                wire.DeliverReply,
                request_type=FRAME,
            ),
            Operation(
                "POST",
                "/challenges/commitment",
                "Commit to a nonce for challenging reports",
                _control,
                lambda body: _json(a.challenge_commit(parse(ChallengeRequest, body))),
                ChallengeRequest,
                ChallengeCommitment,
            ),
            Operation(
                "POST",
                "/challenges/nonce",
                "Open the nonce, once the commitments are fixed",
                _control,
                lambda body: _json(a.challenge_reveal(parse(RevealRequest, body))),
                RevealRequest,
                ChallengeNonce,
            ),
            Operation(
                "POST",
                "/challenges/answer",
                "The masked parity value of each challenged report",
                _control,
                lambda body: _json(a.check(parse(CheckRequest, body))),
                CheckRequest,
                CheckAnswer,
            ),
            Operation(
                "POST",
                "/contributions",
                "Draw noise for a statement, and seal a share of it to every aggregator",
                _control,
                lambda body: wire.pack_contribution(a.contribute(parse(RoundStatement, body))),
                RoundStatement,
                NoiseHeader,
                reply_type=FRAME,
            ),
            Operation(
                "POST",
                "/commits",
                "Sign a statement: once per round",
                lambda limits: limits.noise,
                self._commit,
                wire.CommitRequest,
                CommitSignature,
                request_type=FRAME,
            ),
            Operation(
                "POST",
                "/answers",
                "The share of the sum, against a quorum of signatures",
                _control,
                self._answer,
                wire.AnswerRequest,
                AnswerHeader,
                reply_type=FRAME,
            ),
        )

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
            body = await read_body(request.receive, headers, operation.limit(self._limits))
        if content_digest(body) != claimed:
            raise BodyAltered("the content digest is not that of the body")
        return body

    # --- operations with more than one step ---

    def _limits_of(self, info: AggregatorInfo) -> wire.Limits:
        return wire.Limits.of(info.parameters, info.task)

    def _bind(self, body: bytes) -> bytes:
        info = self._aggregator.bind(parse(TaskBinding, body))
        self._limits = self._limits_of(info)
        return _json(info)

    def _deliver(self, body: bytes) -> bytes:
        round_id, reports = wire.unpack_delivery(body)
        verdicts = self._aggregator.deliver(round_id, reports)
        for verdict in verdicts:
            self.metrics.reports.labels("accepted" if verdict.ok else str(verdict.reason)).inc()
        return _json(wire.DeliverReply(verdicts=verdicts))

    def _commit(self, body: bytes) -> bytes:
        signature = self._aggregator.commit(*wire.unpack_commit(body))
        self.metrics.signed_round.set(signature.round_id)
        return _json(signature)

    def _answer(self, body: bytes) -> bytes:
        request = parse(wire.AnswerRequest, body)
        share = self._aggregator.answer(request.round_id, request.signatures)
        self.metrics.answered_round.set(request.round_id)
        return wire.pack_answer(share)


def create_app(aggregator: AggregatorPort, index: int, coordinator_key: str) -> FastAPI:
    """The ASGI application of one aggregator.

    Args:
        aggregator: Answers; outlives the application.
        index: Its index, part of every path.
        coordinator_key: The pinned coordinator's Ed25519 public key, hex.
    """
    api = AggregatorApi(aggregator, index, coordinator_key)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        api.executor.shutdown()

    app = FastAPI(
        title="pocketfed aggregator", version=version("pocketfed"), description=_DESCRIPTION, lifespan=lifespan
    )
    problems.install(app)
    for operation in api.operations():
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


def _control(_limits: wire.Limits) -> int:
    return wire.CONTROL_LIMIT


def _json(message: Message) -> bytes:
    return message.model_dump_json().encode()
