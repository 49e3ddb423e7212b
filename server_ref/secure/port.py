"""What a coordinator can ask of an aggregator, wherever that runs.

The operations of one round, in order:

1. ``deliver``: sealed shares, as reports come in;
2. ``challenge_commit``, ``challenge_reveal``, ``check``: masked parity values of reports, each report once (optional);
3. ``contribute``: noise shares, in tasks with differential privacy; may restart with a higher run before any commit;
4. ``commit``: one signature per round, for one statement;
5. ``answer``: the share of the sum, against a quorum of signatures.

All are idempotent: the same request gets the same answer, byte for byte, also after a restart. A refusal changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from server_ref.secure.distance_messages import DistanceRequest, DistanceShare, ZeroKeys, ZeroKeyShare
from server_ref.secure.messages import (
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
from server_ref.secure.projection_messages import ProjectionShare


class ProjectionPort(Protocol):
    """What the checking mode ``projections`` asks of an aggregator besides, between ``challenge_reveal`` and the set.

    Raises:
        CheckRefused: Both operations, in every other mode.
    """

    def deal_zero_keys(self, transcript_sha256: str) -> ZeroKeys:
        """This aggregator's part of the keys that hide all of the norms but their values. To be relayed to the others.

        Raises:
            ChallengeMismatch: The transcript is not one that this aggregator revealed its nonce for.
        """
        ...

    def open_projections(self, request: CheckRequest, keys: Sequence[ZeroKeyShare]) -> ProjectionShare:
        """Shares of the projections and of the norm of each report of the challenge.

        Args:
            request: The revealed nonces.
            keys: For this aggregator, of each dealer that has some for it.

        Raises:
            ChallengeMismatch: As in ``check``.
            ZeroKeyRejected: A dealer's keys are missing, forged, or of another transcript.
        """
        ...


class DistancePort(Protocol):
    """What distances between updates ask of an aggregator besides, once all reports of a cohort are checked.

    Raises:
        DistancesRefused: Both operations, where they are not pinned, or a report was compared within another cohort.
        UnknownReport: A report is not kept here.
        CohortTooSmall: Too few reports.
    """

    def deal_distance_keys(self, request: DistanceRequest) -> ZeroKeys:
        """This aggregator's part of the keys that hide all but the distances. To be relayed to the others."""
        ...

    def compare(self, request: DistanceRequest, keys: Sequence[ZeroKeyShare]) -> DistanceShare:
        """Masked shares of the distance of every pair of reports. Binds the reports to this cohort.

        Args:
            request: The cohort.
            keys: For this aggregator, of each dealer that has some for it.

        Raises:
            ZeroKeyRejected: A dealer's keys are missing, forged, or of another comparison.
        """
        ...


class AggregatorPort(Protocol):
    """One aggregator, as the coordinator sees it.

    Raises:
        AggregatorRefusal: Any operation may be refused; the subclass says why. Retryable ones say so.
        StorageUnavailable: The aggregator cannot make its answer durable now; the same request may be repeated.
    """

    def describe(self) -> AggregatorInfo:
        """Index, keys, pinned parameters, and the task, once bound."""
        ...

    def bind(self, task: TaskBinding) -> AggregatorInfo:
        """Serve this task from now on.

        Raises:
            TaskMismatch: The aggregator serves, or is configured for, another one.
        """
        ...

    def deliver(self, round_id: int, reports: Sequence[DeliveredShare]) -> tuple[Verdict, ...]:
        """Open, check and keep shares; one verdict per report, in order. Durable when it returns.

        Args:
            round_id: The round that the coordinator collects for; reports may be summed in any later one.
            reports: At most ``MAX_DELIVERY``.
        """
        ...

    def challenge_commit(self, request: ChallengeRequest) -> ChallengeCommitment:
        """Commit to a nonce for challenging these reports.

        Raises:
            UnknownReport: A report was not accepted here.
            AlreadyChallenged: A report belongs to a challenge that was revealed.
        """
        ...

    def challenge_reveal(self, request: RevealRequest) -> ChallengeNonce:
        """Open the nonce, once the commitments of at least a quorum are fixed. Binds the reports to this transcript.

        Raises:
            ChallengeMismatch: Too few commitments, or this aggregator's is not among them, or another transcript of the
                challenge was revealed.
            AlreadyChallenged: A report belongs to another challenge that was revealed.
        """
        ...

    def check(self, request: CheckRequest) -> CheckAnswer:
        """The masked parity value of each report of the challenge.

        Raises:
            ChallengeMismatch: The nonces do not open the transcript's commitments, or are not signed for it.
        """
        ...

    def contribute(self, statement: RoundStatement) -> NoiseContribution:
        """Draw this aggregator's noise for the statement, share it, and seal a share to every aggregator.

        Raises:
            ParametersBelowPinned, SumOutOfRange, WeightTooLarge, CohortTooSmall, PartitionRefused, DuplicateEntry,
            ContributorsRefused, StaleRun, RoundCommitted: The statement is not one that could be signed.
            UnknownReport, ReportSpent, ParticipationsExhausted, BudgetSpent: The set cannot be summed here.
            AnswerDiscarded: The round is too long ago. Its noise is never drawn a second time.
        """
        ...

    def commit(self, statement: RoundStatement, noise: Sequence[NoiseShare]) -> CommitSignature:
        """Sign the statement: the one signature of this round.

        Args:
            statement: What is to be summed.
            noise: The share for this aggregator of each contributor's noise, in order of the contributors.

        Raises:
            NoiseRejected: A noise share is missing, forged, or of another statement.
            UnknownReport, ReportSpent, ParticipationsExhausted, BudgetSpent: The set cannot be summed here.
            RoundCommitted: Another statement was signed for this round.
        """
        ...

    def answer(self, round_id: int, signatures: Sequence[CommitSignature]) -> AggregateShare:
        """This aggregator's share of the sum; always the same bytes.

        Raises:
            NotCommitted: This aggregator has not signed.
            QuorumMissing: Too few valid signatures of distinct pinned keys over the statement that it signed.
            AnswerDiscarded: The round is too long ago.
        """
        ...


class FullPort(AggregatorPort, ProjectionPort, DistancePort, Protocol):
    """All operations, those of every mode: what ``Aggregator`` and ``HttpAggregator`` are."""
