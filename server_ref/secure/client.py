"""An aggregator over HTTP: the port as the coordinator uses it when the aggregator runs elsewhere.

The only module of the server that imports httpx. Every operation is idempotent, so whatever goes wrong on the way is
answered by sending again, a bounded number of times; what an aggregator refuses comes back as the same typed error.
What is not an answer in this protocol is an ``AnswerRejected``: asking again would not make it one.
"""

from __future__ import annotations

import random
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Final, Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.protocol.errors import ConfigurationError, OversizedBody, ProtocolError, from_problem
from client_sdk.protocol.messages import Message, Problem
from client_sdk.protocol.signing import device_id_of, sign_request
from server_ref.secure import wire
from server_ref.secure.distance_messages import (
    DistanceHeader,
    DistanceRequest,
    DistanceShare,
    ZeroKeys,
    ZeroKeyShare,
)
from server_ref.secure.errors import AggregatorUnavailable, AnswerRejected
from server_ref.secure.identity import SigningKey
from server_ref.secure.messages import (
    MAX_DELIVERY,
    AggregateShare,
    AggregatorInfo,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    CommitSignature,
    DeliveredShare,
    NoiseContribution,
    NoiseShare,
    RevealRequest,
    RoundStatement,
    TaskBinding,
    Verdict,
)
from server_ref.secure.projection_messages import ProjectionHeader, ProjectionShare

JSON: Final = "application/json"
FRAME: Final = "application/octet-stream"
_NOT_NOW: Final = frozenset({408, 425, 429})
"""Answers of a gateway that mean "later" without speaking our protocol."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long an aggregator is waited for, in seconds.

    Attributes:
        connect_s: For a connection.
        reply_s: For each piece of a reply; a sum of many reports takes its time. Then it is not tried again at once.
        attempts: Tries of one operation in all.
        first_wait_s: Longest pause before the second try; it doubles from there. Each pause is drawn between half of
            it and all of it, so that operations which failed together do not come back together.
        longest_wait_s: Longest pause of all.
    """

    connect_s: float = 5.0
    reply_s: float = 120.0
    attempts: int = 4
    first_wait_s: float = 0.25
    longest_wait_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.connect_s, self.reply_s) <= 0 or self.first_wait_s < 0:
            raise ConfigurationError("an operation is tried at least once, and with some time for it")

    def pauses(self) -> Iterator[float]:
        """The longest pause before each further try."""
        for retry in range(self.attempts - 1):
            yield min(self.longest_wait_s, self.first_wait_s * 2**retry)


class HttpAggregator:
    """Satisfies ``FullPort`` over HTTP; safe for concurrent calls.

    Guarantees: each request is signed by the coordinator's key for this aggregator alone; connections are reused;
    replies beyond their limit are cut off while they arrive; redirects are not followed. Besides the port's own errors
    every operation raises ``AggregatorUnavailable`` when nobody answers after all tries, and ``AnswerRejected`` when
    the answer is malformed.

    Args:
        index: The aggregator's index, from 1.
        url: ``http(s)://host[:port][/prefix]``.
        key: The coordinator's private key; the aggregator pins the public one.
        patience: Timeouts and retries.
        ca_file: Certificates to trust instead of the system's.
        sleep: Waits; replaced in tests.

    Raises:
        ConfigurationError: Not such a URL, or no such file.
    """

    def __init__(
        self,
        index: int,
        url: str,
        key: SigningKey,
        *,
        patience: Patience | None = None,
        ca_file: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.index = index
        self.url = _checked(url)
        self._base = f"{httpx.URL(self.url).path.rstrip('/')}/v1/aggregators/{index}"
        self._key = Ed25519PrivateKey.from_private_bytes(key.private_bytes())
        self._key_id = device_id_of(bytes.fromhex(key.public))
        self._patience = patience or Patience()
        self._sleep = sleep
        self._limits: wire.Limits | None = None
        self._client = _open(self.url, self._patience, ca_file)

    def describe(self) -> AggregatorInfo:
        """See ``AggregatorPort``."""
        info = self._ask(AggregatorInfo, "GET", "", b"")
        self._learn(info)
        return info

    def bind(self, task: TaskBinding) -> AggregatorInfo:
        """See ``AggregatorPort``."""
        info = self._tell(AggregatorInfo, "/task", task)
        self._learn(info)
        return info

    def deliver(self, round_id: int, reports: Sequence[DeliveredShare]) -> tuple[Verdict, ...]:
        """See ``AggregatorPort``; sent in as many requests as their size asks for."""
        if len(reports) > MAX_DELIVERY:
            raise OversizedBody(f"{len(reports)} reports were delivered at once; {MAX_DELIVERY} are accepted")
        verdicts: list[Verdict] = []
        for some in _batches(reports):
            body = wire.pack_delivery(round_id, some)
            reply = self._exchange("POST", "/deliveries", body, FRAME, wire.CONTROL_LIMIT)
            verdicts += _read(wire.DeliverReply, reply).verdicts
        return tuple(verdicts)

    def challenge_commit(self, request: ChallengeRequest) -> ChallengeCommitment:
        """See ``AggregatorPort``."""
        return self._tell(ChallengeCommitment, "/challenges/commitment", request)

    def challenge_reveal(self, request: RevealRequest) -> ChallengeNonce:
        """See ``AggregatorPort``."""
        return self._tell(ChallengeNonce, "/challenges/nonce", request)

    def check(self, request: CheckRequest) -> CheckAnswer:
        """See ``AggregatorPort``."""
        return self._tell(CheckAnswer, "/challenges/answer", request)

    def deal_zero_keys(self, transcript_sha256: str) -> ZeroKeys:
        """See ``ProjectionPort``."""
        request = wire.ProjectionKeysRequest(transcript_sha256=transcript_sha256)
        return self._keys("/projections/keys", request)

    def open_projections(self, request: CheckRequest, keys: Sequence[ZeroKeyShare]) -> ProjectionShare:
        """See ``ProjectionPort``."""
        body = wire.pack_projection_request(request, keys)
        return ProjectionShare(*self._opened(ProjectionHeader, "/projections/answer", body))

    def deal_distance_keys(self, request: DistanceRequest) -> ZeroKeys:
        """See ``DistancePort``."""
        return self._keys("/distances/keys", request)

    def compare(self, request: DistanceRequest, keys: Sequence[ZeroKeyShare]) -> DistanceShare:
        """See ``DistancePort``."""
        body = wire.pack_compare(request, keys)
        return DistanceShare(*self._opened(DistanceHeader, "/distances/answer", body))

    def contribute(self, statement: RoundStatement) -> NoiseContribution:
        """See ``AggregatorPort``."""
        body = statement.model_dump_json().encode()
        return _framed(
            wire.unpack_contribution, self._exchange("POST", "/contributions", body, JSON, self._bounds().noise)
        )

    def commit(self, statement: RoundStatement, noise: Sequence[NoiseShare]) -> CommitSignature:
        """See ``AggregatorPort``."""
        body = wire.pack_commit(statement, noise)
        return _read(CommitSignature, self._exchange("POST", "/commits", body, FRAME, wire.CONTROL_LIMIT))

    def answer(self, round_id: int, signatures: Sequence[CommitSignature]) -> AggregateShare:
        """See ``AggregatorPort``."""
        request = wire.AnswerRequest(round_id=round_id, signatures=tuple(signatures))
        body = request.model_dump_json().encode()
        return _framed(wire.unpack_answer, self._exchange("POST", "/answers", body, JSON, self._bounds().answer))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()

    def __repr__(self) -> str:
        return f"HttpAggregator({self.index}, {self.url})"

    # --- pieces ---

    def _tell(self, reply: type[M], path: str, request: Message) -> M:
        return self._ask(reply, "POST", path, request.model_dump_json().encode())

    def _ask(self, reply: type[M], method: str, path: str, body: bytes) -> M:
        return _read(reply, self._exchange(method, path, body, JSON, wire.CONTROL_LIMIT))

    def _keys(self, path: str, request: Message) -> ZeroKeys:
        body = request.model_dump_json().encode()
        return _framed(wire.unpack_keys, self._exchange("POST", path, body, JSON, wire.CONTROL_LIMIT))

    def _opened(self, header: type[M], path: str, body: bytes) -> tuple[M, bytes]:
        reply = self._exchange("POST", path, body, FRAME, self._bounds().opened)
        return _framed(lambda frame: wire.unpack_opened(header, frame), reply)

    def _learn(self, info: AggregatorInfo) -> wire.Limits:
        """How much any honest reply can hold follows from the parameters and the task."""
        self._limits = wire.Limits.of(info.parameters, info.task)
        return self._limits

    def _bounds(self) -> wire.Limits:
        return self._limits or self._learn(self.describe())

    def _exchange(self, method: str, path: str, body: bytes, content_type: str, limit: int) -> bytes:
        """One operation, tried again while that may help."""
        pauses = self._patience.pauses()
        while True:
            try:
                return self._send(method, self._base + path, body, content_type, limit)
            except (AggregatorUnavailable, ProtocolError) as e:
                if not _worth_retrying(e):
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise
                wanted = getattr(e, "retry_after_s", None)
                least = pause if wanted is None else min(wanted[0], self._patience.longest_wait_s)
                self._sleep(random.SystemRandom().uniform(least / 2, max(least, pause)))

    def _send(self, method: str, path: str, body: bytes, content_type: str, limit: int) -> bytes:
        headers = sign_request(self._key, self._key_id, method, path, body, nonce=secrets.token_hex(16))
        headers |= {"content-type": content_type, "accept-encoding": "identity"}
        url = httpx.URL(self.url).copy_with(raw_path=path.encode("ascii"))
        try:
            with self._client.stream(method, url, content=body, headers=headers) as response:
                reply = self._receive(response, limit)
                if response.status_code == 200:
                    return reply
                raise self._refusal(response, reply)
        except httpx.TransportError as e:
            raise AggregatorUnavailable(f"aggregator {self.index} at {self.url}: {e or type(e).__name__}") from e

    def _receive(self, response: httpx.Response, limit: int) -> bytes:
        chunks, received = [], 0
        for chunk in response.iter_raw():
            received += len(chunk)
            if received > limit:
                raise AnswerRejected(f"aggregator {self.index} sent more than {limit} bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    def _refusal(self, response: httpx.Response, body: bytes) -> ProtocolError | AggregatorUnavailable:
        status = response.status_code
        if response.headers.get("content-type", "").startswith("application/problem+json"):
            try:
                problem = Problem.model_validate_json(body)
            except ValueError:
                pass
            else:
                error = from_problem(problem.type, problem.detail or problem.title, http_status=status)
                error.retry_after_s = None if problem.retry is None else (problem.retry.min_s, problem.retry.max_s)
                return error
        said = f"aggregator {self.index} at {self.url} answered {status} without a problem description"
        return AggregatorUnavailable(said) if status in _NOT_NOW or status >= 500 else AnswerRejected(said)


def _worth_retrying(error: AggregatorUnavailable | ProtocolError) -> bool:
    """Whether the same request may succeed at once. One that was not answered in time would take as long again."""
    if isinstance(error, ProtocolError):
        return error.retryable
    cause = error.__cause__
    return not isinstance(cause, httpx.TimeoutException) or isinstance(cause, httpx.ConnectTimeout)


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ConfigurationError(f"{url!r} is not a URL: {e}") from e
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.query or parsed.fragment:
        raise ConfigurationError(f"{url!r} is not an aggregator's address; write it like https://agg1.example.org")
    return url.rstrip("/")


def _open(url: str, patience: Patience, ca_file: Path | None) -> httpx.Client:
    parsed = httpx.URL(url)
    if parsed.scheme == "http":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as e:
            raise ConfigurationError(f"cannot read the certificates in {ca_file}: {e}") from e
    return httpx.Client(
        verify=context,
        trust_env=parsed.host not in {"localhost", "127.0.0.1", "::1"},
        limits=httpx.Limits(max_connections=4, max_keepalive_connections=4),
        timeout=httpx.Timeout(patience.reply_s, connect=patience.connect_s),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


def _batches(reports: Sequence[DeliveredShare]) -> Iterator[list[DeliveredShare]]:
    """The reports, as many together as one request takes."""
    some: list[DeliveredShare] = []
    size = 0
    for report in reports:
        if some and size + len(report.ciphertext) > wire.DELIVERY_BYTES:
            yield some
            some, size = [], 0
        some.append(report)
        size += len(report.ciphertext)
    if some:
        yield some


def _read(model: type[M], body: bytes) -> M:
    try:
        return model.model_validate_json(body)
    except ValueError as e:
        raise AnswerRejected(f"what an aggregator answered is no {model.__name__}") from e


def _framed(unpack: Callable[[bytes], T], body: bytes) -> T:
    """A reply's frame; one that is malformed is the aggregator's fault and not this side's."""
    try:
        return unpack(body)
    except ProtocolError as e:
        raise AnswerRejected(f"what an aggregator answered is malformed: {e}") from e
