"""The operations of the aggregator's HTTP service: path, schema and largest body of each, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from client_sdk.protocol.messages import Message
from server_ref.app.requests import parse
from server_ref.secure import wire
from server_ref.secure.distance_messages import DistanceHeader, DistanceRequest, ZeroKeyHeader
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
from server_ref.secure.port import FullPort
from server_ref.secure.projection_messages import ProjectionHeader

JSON: Final = "application/json"
FRAME: Final = "application/octet-stream"


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


class Operations:
    """What an aggregator does over HTTP.

    Args:
        aggregator: Answers.
        metrics: Count what it did.
    """

    def __init__(self, aggregator: FullPort, metrics: AggregatorMetrics) -> None:
        self._aggregator = aggregator
        self._metrics = metrics
        self.limits = self._limits_of(aggregator.describe())
        """Those that hold now."""

    def table(self) -> tuple[Operation, ...]:
        """All of them."""
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
                "/projections/keys",
                "Deal keys that hide all of the norms but their values, in the mode projections",
                _control,
                lambda body: wire.pack_keys(
                    a.deal_zero_keys(parse(wire.ProjectionKeysRequest, body).transcript_sha256)
                ),
                wire.ProjectionKeysRequest,
                ZeroKeyHeader,
                reply_type=FRAME,
            ),
            Operation(
                "POST",
                "/projections/answer",
                "Shares of projections and norms, in the mode projections",
                _control,
                lambda body: wire.pack_opened(a.open_projections(*wire.unpack_projection_request(body))),
                wire.ProjectionRequest,
                ProjectionHeader,
                request_type=FRAME,
                reply_type=FRAME,
            ),
            Operation(
                "POST",
                "/distances/keys",
                "Deal keys that hide all but the distances, where they are pinned",
                _control,
                lambda body: wire.pack_keys(a.deal_distance_keys(parse(DistanceRequest, body))),
                DistanceRequest,
                ZeroKeyHeader,
                reply_type=FRAME,
            ),
            Operation(
                "POST",
                "/distances/answer",
                "Masked shares of the distance of every pair of reports, where they are pinned",
                _control,
                lambda body: wire.pack_opened(a.compare(*wire.unpack_compare(body))),
                wire.CompareRequest,
                DistanceHeader,
                request_type=FRAME,
                reply_type=FRAME,
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

    @staticmethod
    def _limits_of(info: AggregatorInfo) -> wire.Limits:
        return wire.Limits.of(info.parameters, info.task)

    def _bind(self, body: bytes) -> bytes:
        info = self._aggregator.bind(parse(TaskBinding, body))
        self.limits = self._limits_of(info)
        return _json(info)

    def _deliver(self, body: bytes) -> bytes:
        round_id, reports = wire.unpack_delivery(body)
        verdicts = self._aggregator.deliver(round_id, reports)
        for verdict in verdicts:
            self._metrics.reports.labels("accepted" if verdict.ok else str(verdict.reason)).inc()
        return _json(wire.DeliverReply(verdicts=verdicts))

    def _commit(self, body: bytes) -> bytes:
        signature = self._aggregator.commit(*wire.unpack_commit(body))
        self._metrics.signed_round.set(signature.round_id)
        return _json(signature)

    def _answer(self, body: bytes) -> bytes:
        request = parse(wire.AnswerRequest, body)
        share = self._aggregator.answer(request.round_id, request.signatures)
        self._metrics.answered_round.set(request.round_id)
        return wire.pack_answer(share)


def _control(_limits: wire.Limits) -> int:
    return wire.CONTROL_LIMIT


def _json(message: Message) -> bytes:
    return message.model_dump_json().encode()
