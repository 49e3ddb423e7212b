"""What the coordinator and the aggregators say to one another.

Control messages are frozen, closed and bounded; shares travel beside them as bytes. Whatever an aggregator signs or
hashes is the canonical encoding of a message (``canonical``), never its JSON.

The coordinator relays everything: aggregators need not reach one another. What one must know of another (noise shares,
commit signatures, challenge nonces) is signed by the sender's pinned key: the relay can drop it, but not replace it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from client_sdk.protocol.messages import MAX_AGGREGATORS, Id128, Message, Sha256, SigningKeyHex
from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.canonical import digest, encode
from server_ref.secure.parameters import PinnedParameters, RoundParameters

SECURE_PROTOCOL_VERSION: Final = 1
TAG_BYTES: Final = 16
"""Of the authenticated encryption, at the end of every ciphertext."""
MAX_SET_ENTRIES: Final = 100_000
MAX_DELIVERY: Final = 1024
"""Reports in one ``deliver``."""
MAX_CHALLENGED: Final = 16_384
"""Reports in one challenge."""
MAX_CONTROL_BYTES: Final = 32 * 1024 * 1024
"""Largest JSON of a control message: a statement with ``MAX_SET_ENTRIES`` entries fits."""

UNSIGNED: Final = "0" * 128
"""Stands where a signature goes until it is made."""

Index = Annotated[int, Field(ge=1, le=MAX_AGGREGATORS, description="an aggregator's index, from 1: its point x")]
RoundId = Annotated[int, Field(ge=0, lt=2**62)]
Run = Annotated[int, Field(ge=0, lt=2**31)]
Weight = Annotated[int, Field(ge=1, lt=2**40)]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$", description="Ed25519 signature, hex")]
SealingKeyHex = Annotated[str, Field(pattern="^([0-9a-f]{2}){32,2048}$", description="sealing public key, hex")]


# --- who an aggregator is ------------------------------------------------------------------------------------


class TaskBinding(Message):
    """The task that an aggregator serves; once bound, an aggregator serves no other."""

    task_id: Id128
    parameter_table_sha256: Sha256
    size: int = Field(ge=1, lt=2**40, description="update coordinates that a device shares, extras not counted")


class AggregatorInfo(Message):
    """Who an aggregator is, and what it insists on."""

    protocol_version: int = SECURE_PROTOCOL_VERSION
    index: Index
    signing_key: SigningKeyHex
    sealing_key: SealingKeyHex
    parameters: PinnedParameters
    task: TaskBinding | None
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over: a device that pins the signing key can check the rest."""
        task = self.task
        return encode(
            "info",
            [
                self.protocol_version,
                self.index,
                self.signing_key,
                self.sealing_key,
                self.parameters.sha256(),
                None if task is None else task.task_id,
                None if task is None else task.parameter_table_sha256,
                None if task is None else task.size,
            ],
        )


# --- reports -------------------------------------------------------------------------------------------------


class ShareHeader(Message):
    """What is said of one device's report to every aggregator.

    ``ciphertext_ids`` has the ``ciphertext_id`` of the report's sealed share for each aggregator, in order of their
    indices: the ``digest`` names one upload as a whole, so that aggregators which agree on a digest hold shares of the
    same update.
    ``clip_norm`` and ``indicator_norm`` are those of the device's assignment, ``device_id`` is the device's own. The
    share opens only under what the device was really told, and really is, so the coordinator cannot misstate them.
    """

    report_id: Id128
    assignment_id: Id128
    device_id: Id128
    model_version: int = Field(ge=0, lt=2**62)
    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    indicator_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    ciphertext_ids: tuple[Sha256, ...] = Field(min_length=1, max_length=MAX_AGGREGATORS)

    def digest(self) -> str:
        """SHA-256 (hex) that names this upload in sets, challenges and statements."""
        return digest(
            "report",
            [
                self.report_id,
                self.assignment_id,
                self.device_id,
                self.model_version,
                self.clip_norm,
                self.indicator_norm,
                *self.ciphertext_ids,
            ],
        )


def ciphertext_id(ciphertext: bytes | memoryview, suite: SealingSuite) -> str:
    """Name (hex) of a sealed share: SHA-256 of its length, its encapsulated key and its authentication tag.

    The body between them need not be hashed, which would cost more than opening it. Whoever seals draws a new
    encapsulated key each time, and nobody else can change the body so that it still opens under that key and tag.
    """
    head = bytes(ciphertext[: suite.overhead - TAG_BYTES])
    return digest("ciphertext", [len(ciphertext), head, bytes(ciphertext[-TAG_BYTES:])])


@dataclass(frozen=True)
class DeliveredShare:
    """One report's sealed share for one aggregator."""

    header: ShareHeader
    ciphertext: bytes


class VerdictReason(StrEnum):
    """Why a share was not accepted."""

    UNSEALABLE = "unsealable"
    """The ciphertext does not open with this aggregator's key for this assignment, device, model, task and terms."""
    TERMS = "terms"
    """The header states another clip norm than this aggregator pins, or an indicator where it expects none."""
    MALFORMED = "malformed"
    """What was sealed is not the canonical encoding of a share of the right length."""
    HEADER_MISMATCH = "header-mismatch"
    """The header has not one hash per aggregator, or this aggregator's is not that of the ciphertext."""
    CONFLICT = "conflict"
    """The report id or the assignment came before with another upload."""


class Verdict(Message):
    """Whether an aggregator holds a report's share; the same answer whenever the same share is delivered."""

    report_id: Id128
    digest: Sha256
    reason: VerdictReason | None = None

    @property
    def ok(self) -> bool:
        """Whether the share was accepted."""
        return self.reason is None


# --- the challenge: commit, reveal, check ----------------------------------------------------------------------


class ReportRef(Message):
    """A delivered report, by id and digest."""

    report_id: Id128
    digest: Sha256


class ChallengeRequest(Message):
    """Reports to be challenged together. Each report is challenged once, ever."""

    round_id: RoundId
    reports: tuple[ReportRef, ...] = Field(min_length=1, max_length=MAX_CHALLENGED)

    def sha256(self) -> str:
        """Name of the challenge."""
        fields = [f for r in self.reports for f in (r.report_id, r.digest)]
        return digest("challenge", [self.round_id, *fields])


class ChallengeCommitment(Message):
    """An aggregator's commitment to its part of the challenge's seed."""

    index: Index
    challenge_sha256: Sha256
    commitment: Sha256


class RevealRequest(Message):
    """All commitments to one challenge, in order of the aggregators' indices; at least a quorum."""

    challenge_sha256: Sha256
    commitments: tuple[ChallengeCommitment, ...] = Field(min_length=1, max_length=MAX_AGGREGATORS)

    def transcript(self) -> str:
        """SHA-256 (hex) of the challenge and all commitments: what a revealed nonce is signed for."""
        fields = [f for c in self.commitments for f in (c.index, c.commitment)]
        return digest("transcript", [self.challenge_sha256, *fields])


class ChallengeNonce(Message):
    """An aggregator's nonce, signed for one transcript: it reveals for no other."""

    index: Index
    transcript_sha256: Sha256
    nonce: Sha256
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("nonce", [self.index, self.transcript_sha256, self.nonce])


def nonce_commitment(index: int, challenge_sha256: str, nonce: str) -> str:
    """The commitment (hex) that a nonce (hex) opens."""
    return digest("commitment", [index, challenge_sha256, nonce])


class CheckRequest(Message):
    """The revealed nonces of one transcript, in order of the aggregators' indices."""

    transcript_sha256: Sha256
    nonces: tuple[ChallengeNonce, ...] = Field(min_length=1, max_length=MAX_AGGREGATORS)


def challenge_seed(request: CheckRequest) -> bytes:
    """The 32-byte seed that the nonces make: what the parity coefficients are expanded from."""
    fields = [f for n in request.nonces for f in (n.index, n.nonce)]
    return bytes.fromhex(digest("seed", [request.transcript_sha256, *fields]))


def projection_seed(request: CheckRequest) -> bytes:
    """The 32-byte seed of the projections' rows, in the checking mode ``projections``."""
    return bytes.fromhex(digest("projection-seed", [challenge_seed(request)]))


class CheckAnswer(Message):
    """One aggregator's masked parity values.

    ``values`` has one canonical field element (hex) per report of the challenge, in its order: the inner product of
    the seed's coefficients with the share, plus the share's mask element. Over all aggregators they lie on one
    polynomial of low degree if the report's shares do; alone and together they say nothing else.
    """

    index: Index
    transcript_sha256: Sha256
    values: tuple[Annotated[str, Field(pattern="^([0-9a-f]{16}){1,2}$")], ...]
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("check", [self.index, self.transcript_sha256, *self.values])


# --- statements: what one round sums -------------------------------------------------------------------------


class SetEntry(Message):
    """A report in a set, with its public weight."""

    report_id: Id128
    device_id: Id128
    digest: Sha256
    weight: Weight


class AcceptedSet(Message):
    """What one round sums: one part, or (in the mode ``buckets``) a partition. Each part's sum is opened."""

    parts: tuple[tuple[SetEntry, ...], ...] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        count = sum(map(len, self.parts))
        if count > MAX_SET_ENTRIES:
            raise ValueError(f"a set has at most {MAX_SET_ENTRIES} reports, not {count}")
        return self

    @cached_property
    def entries(self) -> tuple[SetEntry, ...]:
        """All entries, part after part."""
        return tuple(entry for part in self.parts for entry in part)

    def sha256(self) -> str:
        """Hash (hex) of the ordered entries of all parts."""
        hashed = hashlib.sha256(encode("set", [len(self.parts)]))
        for part in self.parts:
            hashed.update(struct.pack(">Q", len(part)))
            for e in part:
                hashed.update(bytes.fromhex(e.report_id + e.device_id + e.digest) + struct.pack(">Q", e.weight))
        return hashed.hexdigest()


class RoundStatement(Message):
    """Everything that a commit signature vouches for.

    Attributes:
        contributors: Indices of the aggregators whose noise the sum holds, ascending; empty for a task without noise.
    """

    task_id: Id128
    round_id: RoundId
    run: Run
    contributors: tuple[Index, ...] = Field(max_length=MAX_AGGREGATORS)
    accepted: AcceptedSet
    parameters: RoundParameters

    @cached_property
    def sha256(self) -> str:
        """The commit hash (hex): over task, round, run, contributors, ordered set and parameters."""
        p = self.parameters
        return digest(
            "statement",
            [
                self.task_id,
                self.round_id,
                self.run,
                len(self.contributors),
                *self.contributors,
                self.accepted.sha256(),
                p.noise_multiplier,
                p.bound,
                p.max_weight,
                p.fraction_bits,
                p.indicator_noise_multiplier,
            ],
        )


# --- noise ---------------------------------------------------------------------------------------------------


class NoiseHeader(Message):
    """What a contributor signs of its noise: for which statement it is, and what it sealed to whom."""

    statement_sha256: Sha256
    sender: Index
    sealed_sha256: tuple[Sha256, ...] = Field(
        min_length=1, max_length=MAX_AGGREGATORS, description="hash of the sealed shares, in order of the receivers"
    )
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("noise", [self.statement_sha256, self.sender, *self.sealed_sha256])


@dataclass(frozen=True)
class NoiseShare:
    """One contributor's noise, for one receiver."""

    header: NoiseHeader
    sealed: bytes


@dataclass(frozen=True)
class NoiseContribution:
    """One contributor's noise, sealed to each aggregator in order of their indices (its own included)."""

    header: NoiseHeader
    sealed: tuple[bytes, ...]

    def for_receiver(self, index: int) -> NoiseShare:
        """What the aggregator with this index (from 1) is to be given."""
        return NoiseShare(self.header, self.sealed[index - 1])


# --- commit and answer -----------------------------------------------------------------------------------------


class CommitSignature(Message):
    """An aggregator's one signature for a round."""

    index: Index
    round_id: RoundId
    statement_sha256: Sha256
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("commit", [self.index, self.round_id, self.statement_sha256])


class AnswerHeader(Message):
    """What an aggregator signs of its share of the sum."""

    index: Index
    round_id: RoundId
    statement_sha256: Sha256
    payload_sha256: Sha256
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("answer", [self.index, self.round_id, self.statement_sha256, self.payload_sha256])


@dataclass(frozen=True)
class AggregateShare:
    """An aggregator's share of the (noised) sum of each part.

    Attributes:
        header: Signed.
        payload: For each part in order, the canonical bytes (``Field.to_bytes``) of its share vector, without the mask.
    """

    header: AnswerHeader
    payload: bytes
