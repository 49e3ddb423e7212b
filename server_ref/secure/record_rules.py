"""What an aggregator's own records permit: one statement a round, each report once, nothing beyond k and the budget."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.engine import Connection

from server_ref.aggregation.accounting import DistributedRelease
from server_ref.secure import queries
from server_ref.secure.errors import (
    ParametersBelowPinned,
    ParticipationsExhausted,
    QuorumMissing,
    ReportSpent,
    RoundCommitted,
    StaleRun,
    UnknownReport,
)
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.ledger import check_budget, release_of
from server_ref.secure.messages import CommitSignature, RoundStatement
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.queries import StoredRound


def current_run(connection: Connection, statement: RoundStatement) -> StoredRound | None:
    """What is stored of this very statement; None if it would begin a new run.

    Raises:
        RoundCommitted: Another statement was signed for the round.
        StaleRun: A run as new, or newer, was begun with another statement.
    """
    stored = queries.load_round(connection, statement.round_id)
    if stored is None or stored.statement == statement.sha256:
        return stored
    if stored.signature is not None:
        raise RoundCommitted(f"another statement was signed for round {statement.round_id}")
    if statement.run <= stored.run:
        raise StaleRun(f"round {statement.round_id} is in run {stored.run}, for another statement")
    return None


def examine(
    connection: Connection, statement: RoundStatement, pinned: PinnedParameters, size: int
) -> DistributedRelease | None:
    """Refuse a set that cannot be summed here (any more); what summing it costs, in a task with noise.

    Args:
        connection: In whose transaction the statement is signed, or noise is drawn for it.
        statement: Passes ``check_statement``.
        pinned: The aggregator's own parameters.
        size: Coordinates of an update.

    Raises:
        UnknownReport, ReportSpent, ParametersBelowPinned, ParticipationsExhausted, BudgetSpent: Why not.
    """
    entries = statement.accepted.entries
    known = queries.load_reports(connection, [entry.report_id for entry in entries])
    for entry in entries:
        report = known.get(entry.report_id)
        if report is None or (report.digest, report.device_id) != (entry.digest, entry.device_id):
            raise UnknownReport(f"this aggregator accepted no such report {entry.report_id}")
        if report.signed_in is not None:
            raise ReportSpent(f"report {entry.report_id} was in the set of round {report.signed_in}")
        if not report.kept:
            raise UnknownReport(f"report {entry.report_id} was not used in time and is no longer kept")
    largest = max(report.norm_bound for report in known.values())
    if statement.parameters.bound < largest:
        raise ParametersBelowPinned(f"bound {statement.parameters.bound} is below a report's own, {largest}")
    privacy = pinned.privacy
    if privacy is None:
        return None
    if privacy.max_participations is not None:
        counts = queries.load_participations(connection, [entry.device_id for entry in entries])
        for device_id, count in counts.items():
            if count >= privacy.max_participations:
                raise ParticipationsExhausted(f"device {device_id} was counted {count} times")
    release = release_of(statement, pinned, privacy, size)
    check_budget(connection, release, privacy)
    return release


def require_quorum(stored: StoredRound, signatures: Sequence[CommitSignature], config: AggregatorConfig) -> None:
    """Refuse fewer than a quorum of distinct pinned keys' signatures over what was signed here; others do not count.

    Raises:
        QuorumMissing: So many are missing.
    """
    valid = {
        signature.index
        for signature in signatures
        if (signature.round_id, signature.statement_sha256) == (stored.round_id, stored.statement)
        and config.signed(signature.index, signature.signed_bytes(), signature.signature)
    }
    if len(valid) < config.parameters.effective_quorum:
        raise QuorumMissing(
            f"{len(valid)} aggregators have signed the statement of round {stored.round_id}; "
            f"{config.parameters.effective_quorum} are needed"
        )
