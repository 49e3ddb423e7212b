"""What an aggregator demands of a statement before it looks at its own records."""

from __future__ import annotations

from collections import Counter

from client_sdk.protocol.accountant import SMALLEST_STDDEV
from server_ref.secure.errors import (
    CohortTooSmall,
    ContributorsRefused,
    DuplicateEntry,
    ParametersBelowPinned,
    PartitionRefused,
    TaskMismatch,
    WeightTooLarge,
)
from server_ref.secure.messages import RoundStatement
from server_ref.secure.parameters import PinnedParameters


def check_statement(statement: RoundStatement, pinned: PinnedParameters, task_id: str) -> None:
    """Refuse a statement that this aggregator would sign under no circumstances.

    Args:
        statement: As the coordinator states it.
        pinned: The aggregator's own parameters.
        task_id: The task that it serves.

    Raises:
        TaskMismatch: Another task.
        ParametersBelowPinned: Parameters weaker than the pinned ones, or noise too coarse for its proof.
        PartitionRefused: More parts than the mode opens sums.
        CohortTooSmall: The set, or a part of it, has too few reports.
        DuplicateEntry: A report or a device stands in it twice, in the same part or in two.
        WeightTooLarge: A weight beyond what the noise covers.
        SumOutOfRange: The sum with its noise could wrap around.
        ContributorsRefused: With these contributors the noise of the honest ones would not suffice.
    """
    if statement.task_id != task_id:
        raise TaskMismatch(f"the aggregator serves task {task_id}, not {statement.task_id}")
    parameters = statement.parameters
    pinned.require(parameters)
    _check_set(statement, pinned)
    for part in statement.accepted.parts:
        parameters.require_range(sum(entry.weight for entry in part), pinned.threshold)
    _check_contributors(statement, pinned)


def _check_set(statement: RoundStatement, pinned: PinnedParameters) -> None:
    accepted = statement.accepted
    if len(accepted.parts) > pinned.max_parts:
        raise PartitionRefused(f"{len(accepted.parts)} parts: this aggregator opens {pinned.max_parts} sums per round")
    if len(accepted.entries) < pinned.min_cohort:
        raise CohortTooSmall(f"{len(accepted.entries)} reports are fewer than the minimum of {pinned.min_cohort}")
    smallest = min(map(len, accepted.parts))
    if smallest < pinned.smallest_part:
        raise CohortTooSmall(f"a part of {smallest} reports is smaller than the minimum of {pinned.smallest_part}")
    for name in ("report_id", "device_id"):
        value, count = Counter(getattr(entry, name) for entry in accepted.entries).most_common(1)[0]
        if count > 1:
            raise DuplicateEntry(f"{name} {value} stands in the set {count} times")
    heaviest = max(accepted.entries, key=lambda entry: entry.weight)
    if heaviest.weight > statement.parameters.max_weight:
        raise WeightTooLarge(
            f"report {heaviest.report_id} has weight {heaviest.weight}, above {statement.parameters.max_weight}"
        )


def _check_contributors(statement: RoundStatement, pinned: PinnedParameters) -> None:
    contributors = statement.contributors
    if not pinned.aggregators_add_noise:
        if contributors:
            raise ContributorsRefused("the aggregators add no noise in this task, so none contributes")
        return
    if list(contributors) != sorted(set(contributors)) or any(i > pinned.num_aggregators for i in contributors):
        raise ContributorsRefused("contributors are distinct indices of aggregators, ascending")
    honest = honest_contributors(statement, pinned)
    if honest < 1:
        raise ContributorsRefused(
            f"of {len(contributors)} contributors {pinned.threshold - 1} may be dishonest: none is left to be relied on"
        )
    parameters = statement.parameters
    variances = [parameters.noise_variance(honest)]
    if pinned.indicator:
        variances.append(parameters.indicator_variance(honest))
    if min(variances) < SMALLEST_STDDEV**2:
        raise ParametersBelowPinned(
            f"each contributor's noise would have a standard deviation below {SMALLEST_STDDEV:g} grid steps: "
            "raise fraction_bits or the noise multipliers"
        )


def honest_contributors(statement: RoundStatement, pinned: PinnedParameters) -> int:
    """h: how many of the contributors are relied on; below 1 if the others could be all."""
    return len(statement.contributors) - (pinned.threshold - 1)
