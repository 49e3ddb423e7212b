"""Why an aggregator refuses, and why a secure round does not come about.

Refusals cross the wire like every other ``ProtocolError``: the slug is the stable type. They name ids, counts and
limits, never a share, a noise value or a key.
"""

from __future__ import annotations

from client_sdk.protocol.errors import PocketfedError, ProtocolError

# --- what an aggregator answers ------------------------------------------------------------------------------


class AggregatorRefusal(ProtocolError):
    """An aggregator does not do what it was asked to do. Nothing was released and nothing was charged."""

    slug = "aggregator-refusal"
    http_status = 409
    title = "The aggregator refuses the request."


class TaskNotBound(AggregatorRefusal):
    """The aggregator serves no task yet."""

    slug = "aggregator-task-not-bound"
    title = "The aggregator is not bound to a task."


class TaskMismatch(AggregatorRefusal):
    """The aggregator serves another task, or the same task with another layout."""

    slug = "aggregator-task-mismatch"
    title = "The aggregator serves another task."


class ParametersBelowPinned(AggregatorRefusal):
    """The statement's parameters promise less privacy than this aggregator's own configuration demands."""

    slug = "parameters-below-pinned"
    title = "The round's parameters are weaker than those that the aggregator pins."


class SumOutOfRange(AggregatorRefusal):
    """The sum and its noise could leave the field's range."""

    slug = "secure-sum-out-of-range"
    title = "The round's sum could wrap around the field."


class WeightTooLarge(AggregatorRefusal):
    """A report's weight exceeds the largest weight that the noise covers."""

    slug = "weight-too-large"
    title = "A report's weight is larger than the round declares."


class CohortTooSmall(AggregatorRefusal):
    """A sum of fewer reports than the minimum cohort would say too much about each."""

    slug = "cohort-too-small"
    title = "The cohort is smaller than the minimum."


class PartitionRefused(AggregatorRefusal):
    """The statement has more parts than the aggregator opens sums in a round."""

    slug = "partition-refused"
    title = "The set has too many parts."


class DuplicateEntry(AggregatorRefusal):
    """A report, or a device, stands in the set twice."""

    slug = "duplicate-set-entry"
    title = "A report or a device stands in the set twice."


class UnknownReport(AggregatorRefusal):
    """The set names a report that this aggregator did not accept, or describes it differently."""

    slug = "unknown-report"
    title = "The aggregator holds no such report."


class ReportSpent(AggregatorRefusal):
    """A report of the set was in a set that this aggregator signed before."""

    slug = "report-spent"
    title = "A report was summed before."


class ParticipationsExhausted(AggregatorRefusal):
    """A device of the set has contributed as often as it may."""

    slug = "participations-exhausted"
    title = "A device has contributed as often as it may."


class BudgetSpent(AggregatorRefusal):
    """The privacy budget does not allow another release."""

    slug = "privacy-budget-spent"
    title = "The aggregator's privacy budget does not allow another release."


class RoundCommitted(AggregatorRefusal):
    """The aggregator has signed another statement for this round, so the round can neither restart nor change."""

    slug = "round-committed"
    title = "The aggregator has signed another statement for this round."


class StaleRun(AggregatorRefusal):
    """The run is not newer than one that the aggregator knows, and is not that one either."""

    slug = "stale-run"
    title = "The run number belongs to another statement."


class ContributorsRefused(AggregatorRefusal):
    """The contributor set is not one with which the noise would suffice."""

    slug = "contributors-refused"
    title = "The contributor set does not give enough noise."


class NoiseRejected(AggregatorRefusal):
    """A noise share is missing, replaced, replayed, or made for another statement."""

    slug = "noise-rejected"
    title = "A noise share does not belong to this statement."


class NotCommitted(AggregatorRefusal):
    """The aggregator has signed nothing for this round."""

    slug = "round-not-committed"
    title = "The aggregator has signed nothing for this round."


class QuorumMissing(AggregatorRefusal):
    """Too few valid signatures of distinct pinned keys over the same statement."""

    slug = "quorum-missing"
    title = "Too few aggregators have signed the statement."


class AnswerDiscarded(AggregatorRefusal):
    """The round was answered, and the answer is no longer kept. It is never computed anew."""

    slug = "answer-discarded"
    http_status = 410
    title = "The answer is no longer kept."


class AlreadyChallenged(AggregatorRefusal):
    """A report was challenged before; a second challenge would reveal what the mask hides."""

    slug = "report-already-challenged"
    title = "A report was challenged before."


class ChallengeMismatch(AggregatorRefusal):
    """A challenge's commitments or nonces do not fit together."""

    slug = "challenge-mismatch"
    title = "The challenge's commitments and nonces do not fit together."


class DistancesRefused(AggregatorRefusal):
    """The aggregator does not compare these reports: it is not set up to, or one was compared before."""

    slug = "distances-refused"
    title = "The aggregator does not compare these reports."


class ZeroKeyRejected(AggregatorRefusal):
    """A key for shares of zero is missing, replaced, or made for another request."""

    slug = "zero-key-rejected"
    title = "A key for shares of zero does not belong to this request."


class CheckRefused(AggregatorRefusal):
    """The aggregator's checking mode does not open this."""

    slug = "check-refused"
    title = "The aggregator does not open this."


class AnswerRejected(ProtocolError):
    """An aggregator's message is not signed by its pinned key, or is about something else."""

    slug = "aggregator-answer-rejected"
    http_status = 502
    title = "An aggregator's answer is not authentic."


# --- what becomes of a round at the coordinator -----------------------------------------------------------------


class SecureRoundError(PocketfedError):
    """A secure round that gives no sum."""


class NotEnoughAggregators(SecureRoundError):
    """Fewer aggregators answer than the stage needs.

    Attributes:
        stage: Name of the stage.
        needed: How many it needs.
        live: Indices of those that answered.
    """

    def __init__(self, detail: str, *, stage: str, needed: int, live: tuple[int, ...]) -> None:
        super().__init__(detail)
        self.stage = stage
        self.needed = needed
        self.live = live


class ProjectionsInconsistent(SecureRoundError):
    """The aggregators' answers are no projections of the same shares: somebody dealt different keys."""


class DistancesInconsistent(SecureRoundError):
    """The aggregators' answers are no distances: somebody answered wrongly, or dealt different keys."""


class RoundAbandoned(SecureRoundError):
    """The round is over without a sum; reports and budget that were committed are spent."""


class AnswersInconsistent(SecureRoundError):
    """The answers are not shares of one sum, and which of them are wrong cannot be known. Nothing is released.

    Attributes:
        answered: Indices of the aggregators whose authentic answers contradict one another.
    """

    def __init__(self, detail: str, *, answered: tuple[int, ...]) -> None:
        super().__init__(detail)
        self.answered = answered


class AggregatorUnavailable(PocketfedError):
    """An aggregator does not answer, or what answers does not speak the protocol. The request may be repeated."""
