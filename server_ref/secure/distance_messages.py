"""What the coordinator and the aggregators say to one another about distances between secret updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from pydantic import Field, model_validator

from client_sdk.protocol.messages import Id128, Message, Sha256
from server_ref.secure.canonical import digest, encode
from server_ref.secure.messages import Index, ReportRef, RoundId, Signature

MAX_COMPARED: Final = 4096
"""Reports in one comparison: 8 million pairs, 64 MiB an answer."""


class DistanceRequest(Message):
    """Which reports are to be compared, in order of their assignment numbers: it decides ties."""

    task_id: Id128
    round_id: RoundId
    reports: tuple[ReportRef, ...] = Field(min_length=3, max_length=MAX_COMPARED)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({r.report_id for r in self.reports}) < len(self.reports):
            raise ValueError("a report is to be compared with itself")
        return self

    @property
    def num_pairs(self) -> int:
        """Distances that are opened."""
        return len(self.reports) * (len(self.reports) - 1) // 2

    def sha256(self) -> str:
        """Name of the comparison, hex."""
        fields = [f for r in self.reports for f in (r.report_id, r.digest)]
        return digest("distances", [self.task_id, self.round_id, *fields])


class ZeroKeyHeader(Message):
    """What a dealer signs of its keys: for which comparison they are, and what it sealed to whom."""

    request_sha256: Sha256
    sender: Index
    sealed_sha256: tuple[Sha256, ...]
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("zero-keys", [self.request_sha256, self.sender, *self.sealed_sha256])


@dataclass(frozen=True)
class ZeroKeyShare:
    """One dealer's keys for one receiver; empty where they have no set in common that the dealer is the first of."""

    header: ZeroKeyHeader
    sealed: bytes


@dataclass(frozen=True)
class ZeroKeys:
    """One dealer's keys, sealed to each aggregator in order of their indices."""

    header: ZeroKeyHeader
    sealed: tuple[bytes, ...]

    def for_receiver(self, index: int) -> ZeroKeyShare:
        """What the aggregator with this index (from 1) is to be given."""
        return ZeroKeyShare(self.header, self.sealed[index - 1])


class DistanceHeader(Message):
    """What an aggregator signs of its answer.

    ``key_fingerprints`` are those of the keys that it used, in order of its sets: all holders of a key must agree.
    """

    index: Index
    request_sha256: Sha256
    key_fingerprints: tuple[Sha256, ...]
    payload_sha256: Sha256
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("distance-answer", [self.index, self.request_sha256, *self.key_fingerprints, self.payload_sha256])


@dataclass(frozen=True)
class DistanceShare:
    """An aggregator's masked shares of all distances: the canonical bytes of a vector, pair after pair."""

    header: DistanceHeader
    payload: bytes
