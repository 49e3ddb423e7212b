"""The port's operations as HTTP bodies: control as JSON, shares as the tensors of a frame beside it.

An operation with shares travels as one frame (``client_sdk.protocol.frames``): the tensor ``control`` has the bytes of
the JSON, the tensors ``0``, ``1``, ... have one ciphertext or payload each. All others are plain JSON. Both sides
bound a body before they read it, by what the operation can need for the task (``Limits``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from client_sdk.protocol.errors import MalformedFrame, MalformedMessage
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.messages import MAX_AGGREGATORS, Message, Sha256
from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.distance_messages import (
    MAX_COMPARED,
    DistanceRequest,
    DistanceShare,
    ZeroKeyHeader,
    ZeroKeys,
    ZeroKeyShare,
)
from server_ref.secure.layout import secure_layout
from server_ref.secure.messages import (
    MAX_CHALLENGED,
    MAX_CONTROL_BYTES,
    MAX_DELIVERY,
    AggregateShare,
    AnswerHeader,
    CheckRequest,
    CommitSignature,
    DeliveredShare,
    NoiseContribution,
    NoiseHeader,
    NoiseShare,
    RoundId,
    RoundStatement,
    ShareHeader,
    TaskBinding,
    Verdict,
)
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.projection_messages import ProjectionShare
from server_ref.secure.projections import ROWS

DELIVERY_BYTES: Final = 32 * 1024 * 1024
"""Ciphertexts in one delivery: as many reports as fit, and at least one."""
_CONTROL: Final = "control"
_SPARE_BYTES: Final = 1024 * 1024
"""Headers of frames, and whatever JSON is not counted."""
CONTROL_LIMIT: Final = MAX_CONTROL_BYTES + _SPARE_BYTES
"""Largest JSON body."""
_HEADER_BYTES: Final = 100
"""Of each hash or number in the header of a delivered share, as JSON."""

_MAX_PROJECTED: Final = MAX_CHALLENGED * (ROWS + 1)
_MAX_PAIRS: Final = MAX_COMPARED * (MAX_COMPARED - 1) // 2

M = TypeVar("M", bound=Message)
H = TypeVar("H", bound=Message)
Buffer = bytes | memoryview


class DeliverRequest(Message):
    """What is said of delivered shares; the ciphertexts stand beside it in the frame, in this order."""

    round_id: RoundId
    reports: tuple[ShareHeader, ...] = Field(min_length=1, max_length=MAX_DELIVERY)


class DeliverReply(Message):
    """One verdict per delivered share, in order."""

    verdicts: tuple[Verdict, ...]


class CommitRequest(Message):
    """A statement to sign; this aggregator's sealed shares of the contributors' noise stand beside it."""

    statement: RoundStatement
    noise: tuple[NoiseHeader, ...]


class ProjectionKeysRequest(Message):
    """For which transcript keys of shares of zero are dealt."""

    transcript_sha256: Sha256


class ProjectionRequest(Message):
    """Revealed nonces; this aggregator's sealed keys of each dealer stand beside them."""

    request: CheckRequest
    keys: tuple[ZeroKeyHeader, ...] = Field(max_length=MAX_AGGREGATORS)


class CompareRequest(Message):
    """A cohort to compare; this aggregator's sealed keys of each dealer stand beside it."""

    request: DistanceRequest
    keys: tuple[ZeroKeyHeader, ...] = Field(max_length=MAX_AGGREGATORS)


class AnswerRequest(Message):
    """The quorum against which an aggregator gives its share of the sum."""

    round_id: RoundId
    signatures: tuple[CommitSignature, ...]


@dataclass(frozen=True)
class Limits:
    """Largest bodies, in bytes. What lies beyond is refused before it is read.

    Attributes:
        delivery: A frame with delivered shares.
        noise: A frame with one noise share of each contributor, or with one contribution.
        answer: A frame with a share of the sum.
        opened: A frame with shares of what is opened of single reports: projections and norms, or distances.
    """

    delivery: int
    noise: int
    answer: int
    opened: int

    @classmethod
    def of(cls, parameters: PinnedParameters, task: TaskBinding | None) -> Self:
        """The limits for a task; before one is bound, nothing of any size travels.

        Args:
            parameters: Say how many shares there are, of which field, and of how many parts a sum has.
            task: Says how many coordinates are shared.
        """
        if task is None:
            return cls(delivery=_SPARE_BYTES, noise=_SPARE_BYTES, answer=_SPARE_BYTES, opened=_SPARE_BYTES)
        layout = secure_layout(parameters, task, SealingSuite.MLKEM768_X25519)  # the longer ciphertexts
        share = layout.ciphertext_bytes(parameters.num_aggregators)
        sums = parameters.max_parts * share
        headers = MAX_DELIVERY * _HEADER_BYTES * (parameters.num_aggregators + 8)
        return cls(
            delivery=max(DELIVERY_BYTES, share) + headers + _SPARE_BYTES,
            noise=CONTROL_LIMIT + parameters.num_aggregators * sums,
            answer=_SPARE_BYTES + sums,
            opened=_SPARE_BYTES + layout.scheme.field.element_bytes * max(_MAX_PROJECTED, _MAX_PAIRS),
        )


def pack(control: Message, buffers: Sequence[Buffer]) -> bytes:
    """A frame of one control message and what belongs to it."""
    tensors = {_CONTROL: np.frombuffer(control.model_dump_json().encode(), np.uint8)}
    tensors |= {str(i): np.frombuffer(buffer, np.uint8) for i, buffer in enumerate(buffers)}
    return encode_frame(tensors)


def unpack(model: type[M], body: Buffer) -> tuple[M, list[memoryview]]:
    """The inverse of ``pack``. The buffers are views into the body.

    Raises:
        MalformedFrame: Not such a frame.
        MalformedMessage: The control message does not fit its schema.
    """
    frame = decode_frame(body, FrameLimits(max_bytes=len(body)))
    names = list(frame.tensors)
    if names != [_CONTROL, *map(str, range(len(names) - 1))]:
        raise MalformedFrame("the frame does not hold one control message and numbered buffers")
    tensors = list(frame.tensors.values())
    if any(tensor.dtype != np.uint8 or tensor.ndim != 1 for tensor in tensors):
        raise MalformedFrame("a buffer of the frame is not a string of bytes")
    control, *buffers = (np.ascontiguousarray(tensor).data.cast("B") for tensor in tensors)
    try:
        return model.model_validate_json(bytes(control)), buffers
    except ValidationError as e:
        raise MalformedMessage(f"the control message is no {model.__name__}: {e.error_count()} errors") from e


# --- each operation with shares, there and back ------------------------------------------------------------------


def pack_delivery(round_id: int, reports: Sequence[DeliveredShare]) -> bytes:
    """The body of ``deliver``."""
    request = DeliverRequest(round_id=round_id, reports=tuple(report.header for report in reports))
    return pack(request, [report.ciphertext for report in reports])


def unpack_delivery(body: Buffer) -> tuple[int, list[DeliveredShare]]:
    """The round and the shares of ``pack_delivery``."""
    request, buffers = unpack(DeliverRequest, body)
    _require_one_each(len(request.reports), buffers)
    shares = [DeliveredShare(header, bytes(b)) for header, b in zip(request.reports, buffers, strict=True)]
    return request.round_id, shares


def pack_contribution(contribution: NoiseContribution) -> bytes:
    """The reply of ``contribute``."""
    return pack(contribution.header, contribution.sealed)


def unpack_contribution(body: Buffer) -> NoiseContribution:
    """The contribution of ``pack_contribution``."""
    header, buffers = unpack(NoiseHeader, body)
    _require_one_each(len(header.sealed_sha256), buffers)
    return NoiseContribution(header, tuple(map(bytes, buffers)))


def pack_commit(statement: RoundStatement, noise: Sequence[NoiseShare]) -> bytes:
    """The body of ``commit``."""
    request = CommitRequest(statement=statement, noise=tuple(share.header for share in noise))
    return pack(request, [share.sealed for share in noise])


def unpack_commit(body: Buffer) -> tuple[RoundStatement, list[NoiseShare]]:
    """The statement and the noise shares of ``pack_commit``."""
    request, buffers = unpack(CommitRequest, body)
    _require_one_each(len(request.noise), buffers)
    return request.statement, [NoiseShare(h, bytes(b)) for h, b in zip(request.noise, buffers, strict=True)]


def pack_answer(answer: AggregateShare) -> bytes:
    """The reply of ``answer``."""
    return pack(answer.header, [answer.payload])


def unpack_answer(body: Buffer) -> AggregateShare:
    """The share of ``pack_answer``."""
    header, buffers = unpack(AnswerHeader, body)
    _require_one_each(1, buffers)
    return AggregateShare(header, bytes(buffers[0]))


def pack_keys(keys: ZeroKeys) -> bytes:
    """The reply of the operations that deal keys of shares of zero."""
    return pack(keys.header, keys.sealed)


def unpack_keys(body: Buffer) -> ZeroKeys:
    """The keys of ``pack_keys``."""
    header, buffers = unpack(ZeroKeyHeader, body)
    _require_one_each(len(header.sealed_sha256), buffers)
    return ZeroKeys(header, tuple(map(bytes, buffers)))


def pack_projection_request(request: CheckRequest, keys: Sequence[ZeroKeyShare]) -> bytes:
    """The body of ``open_projections``."""
    control = ProjectionRequest(request=request, keys=tuple(share.header for share in keys))
    return pack(control, [share.sealed for share in keys])


def unpack_projection_request(body: Buffer) -> tuple[CheckRequest, list[ZeroKeyShare]]:
    """The request and the keys of ``pack_projection_request``."""
    control, buffers = unpack(ProjectionRequest, body)
    return control.request, _key_shares(control.keys, buffers)


def pack_compare(request: DistanceRequest, keys: Sequence[ZeroKeyShare]) -> bytes:
    """The body of ``compare``."""
    control = CompareRequest(request=request, keys=tuple(share.header for share in keys))
    return pack(control, [share.sealed for share in keys])


def unpack_compare(body: Buffer) -> tuple[DistanceRequest, list[ZeroKeyShare]]:
    """The cohort and the keys of ``pack_compare``."""
    control, buffers = unpack(CompareRequest, body)
    return control.request, _key_shares(control.keys, buffers)


def pack_opened(opened: ProjectionShare | DistanceShare) -> bytes:
    """The reply of ``open_projections`` and of ``compare``."""
    return pack(opened.header, [opened.payload])


def unpack_opened(header: type[H], body: Buffer) -> tuple[H, bytes]:
    """The signed header and the payload of ``pack_opened``."""
    found, buffers = unpack(header, body)
    _require_one_each(1, buffers)
    return found, bytes(buffers[0])


def _key_shares(headers: Sequence[ZeroKeyHeader], buffers: Sequence[memoryview]) -> list[ZeroKeyShare]:
    _require_one_each(len(headers), buffers)
    return [ZeroKeyShare(header, bytes(b)) for header, b in zip(headers, buffers, strict=True)]


def _require_one_each(count: int, buffers: Sequence[Buffer]) -> None:
    if len(buffers) != count:
        raise MalformedFrame(f"the control message speaks of {count} buffers; {len(buffers)} are there")
