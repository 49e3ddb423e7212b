"""The statements that an aggregator runs on its database. Facts only, no rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.engine import Connection

from server_ref.secure import tables

_IN_QUERY = 500
"""Values in one ``IN (...)``."""


@dataclass(frozen=True)
class StoredReport:
    """What is known of a report whose share was accepted here."""

    report_id: str
    assignment_id: str
    device_id: str
    digest: str
    norm_bound: int
    round_id: int
    kept: bool = True
    share: bytes | None = None
    signed_in: int | None = None
    challenge: str | None = None
    compared: str | None = None


@dataclass(frozen=True)
class StoredRound:
    """What is known of a round. The first three fields that name blobs are null until their stage is reached."""

    round_id: int
    run: int
    statement: str
    contribution: str | None = None
    accepted: str | None = None
    noise: str | None = None
    signature: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class StoredChallenge:
    """A challenge: its nonce from the beginning, its transcript once revealed, its answer once given."""

    challenge: str
    request_json: str
    nonce: str
    reveal_json: str | None = None
    transcript: str | None = None
    answer_json: str | None = None
    projections: str | None = None


def _some(values: Iterable[str]) -> Iterator[list[str]]:
    """The values, as many at a time as one query takes."""
    rest = iter(values)
    while some := list(islice(rest, _IN_QUERY)):
        yield some


# --- identity --------------------------------------------------------------------------------------------------


def load_identity(connection: Connection) -> sa.RowMapping | None:
    """Index, parameters and task of this store, if it was ever used."""
    return connection.execute(sa.select(tables.identity)).mappings().first()


def save_identity(connection: Connection, index: int, parameters_json: str) -> None:
    """Claim a new store."""
    connection.execute(
        sa.insert(tables.identity).values(
            schema_version=tables.SCHEMA_VERSION, aggregator_index=index, parameters_json=parameters_json
        )
    )


def save_task(connection: Connection, task_json: str) -> None:
    """Bind the store to a task."""
    connection.execute(sa.update(tables.identity).values(task_json=task_json))


# --- reports ---------------------------------------------------------------------------------------------------


def load_reports(connection: Connection, report_ids: Iterable[str], *, shares: bool = False) -> dict[str, StoredReport]:
    """The reports among these ids that are known, by id; with their inline shares if asked for."""
    table = tables.reports
    columns = [c for c in table.c if shares or c.name != "share"]
    found = {}
    for ids in _some(report_ids):
        for row in connection.execute(sa.select(*columns).where(table.c.report_id.in_(ids))).mappings():
            found[row["report_id"]] = StoredReport(**{**row, "kept": bool(row["kept"])})
    return found


def assignments_known(connection: Connection, assignment_ids: Iterable[str]) -> dict[str, str]:
    """Which of these assignments have a report, and its id."""
    c = tables.reports.c
    found: dict[str, str] = {}
    for ids in _some(assignment_ids):
        query = sa.select(c.assignment_id, c.report_id).where(c.assignment_id.in_(ids))
        found.update({row.assignment_id: row.report_id for row in connection.execute(query)})
    return found


def save_reports(connection: Connection, reports: Sequence[StoredReport]) -> None:
    """Insert reports, or keep the share of one that was discarded again."""
    if not reports:
        return
    statement = upsert(tables.reports)
    statement = statement.on_conflict_do_update(
        index_elements=["report_id"],
        set_={name: statement.excluded[name] for name in ("kept", "share", "round_id")},
    )
    connection.execute(statement, [{**vars(r), "kept": int(r.kept)} for r in reports])


def mark_reports(connection: Connection, report_ids: Sequence[str], **values: object) -> None:
    """Set columns of these reports."""
    c = tables.reports.c
    for ids in _some(report_ids):
        connection.execute(sa.update(tables.reports).where(c.report_id.in_(ids)).values(**values))


def discardable(connection: Connection, before: int) -> list[str]:
    """Digests of kept shares that are no longer needed: summed in an answered round, or delivered before this one."""
    c, r = tables.reports.c, tables.rounds.c
    answered = sa.select(r.round_id).where(r.answer.is_not(None))
    needless = c.signed_in.in_(answered) | (c.signed_in.is_(None) & (c.round_id < before))
    return list(connection.scalars(sa.select(c.digest).where(c.kept == 1, needless)))


def discard(connection: Connection, digests: Sequence[str]) -> None:
    """Note that these shares are gone."""
    c = tables.reports.c
    for some in _some(digests):
        connection.execute(sa.update(tables.reports).where(c.digest.in_(some)).values(kept=0, share=None))


# --- participations --------------------------------------------------------------------------------------------


def load_participations(connection: Connection, device_ids: Iterable[str]) -> dict[str, int]:
    """How often each of these devices was counted, if at all."""
    c = tables.participations.c
    found: dict[str, int] = {}
    for ids in _some(device_ids):
        query = sa.select(c.device_id, c.count).where(c.device_id.in_(ids))
        found.update({row.device_id: row.count for row in connection.execute(query)})
    return found


def count_participations(connection: Connection, device_ids: Sequence[str]) -> None:
    """Count each of these devices once more."""
    statement = upsert(tables.participations)
    statement = statement.on_conflict_do_update(
        index_elements=["device_id"], set_={"count": tables.participations.c.count + 1}
    )
    connection.execute(statement, [{"device_id": device_id, "count": 1} for device_id in device_ids])


# --- rounds, challenges, ledger --------------------------------------------------------------------------------


def load_round(connection: Connection, round_id: int) -> StoredRound | None:
    """A round, if anything was done for it."""
    row = connection.execute(sa.select(tables.rounds).where(tables.rounds.c.round_id == round_id)).mappings().first()
    return None if row is None else StoredRound(**row)


def save_round(connection: Connection, stored: StoredRound) -> None:
    """Insert or replace a round."""
    statement = upsert(tables.rounds).values(**vars(stored))
    names = [name for name in vars(stored) if name != "round_id"]
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["round_id"], set_={name: statement.excluded[name] for name in names}
        )
    )


def finished_rounds(connection: Connection, before: int) -> list[StoredRound]:
    """Rounds older than this one that still hold blobs."""
    c = tables.rounds.c
    held = c.contribution.is_not(None) | c.accepted.is_not(None) | c.noise.is_not(None) | c.answer.is_not(None)
    query = sa.select(tables.rounds).where(c.round_id < before, held)
    return [StoredRound(**row) for row in connection.execute(query).mappings()]


def load_challenge(
    connection: Connection, *, challenge: str | None = None, transcript: str | None = None
) -> StoredChallenge | None:
    """A challenge by its name or by its transcript."""
    c = tables.challenges.c
    which = c.challenge == challenge if transcript is None else c.transcript == transcript
    row = connection.execute(sa.select(tables.challenges).where(which)).mappings().first()
    return None if row is None else StoredChallenge(**row)


def save_challenge(connection: Connection, stored: StoredChallenge) -> None:
    """Insert or replace a challenge."""
    statement = upsert(tables.challenges).values(**vars(stored))
    names = [name for name in vars(stored) if name != "challenge"]
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["challenge"], set_={name: statement.excluded[name] for name in names}
        )
    )


def load_comparison(connection: Connection, request: str) -> str | None:
    """The blob with the answer to a comparison, once given."""
    c = tables.comparisons.c
    return connection.scalar(sa.select(c.answer).where(c.request == request))


def save_comparison(connection: Connection, request: str, answer: str) -> None:
    """Insert the answer to a comparison."""
    connection.execute(sa.insert(tables.comparisons).values(request=request, answer=answer))


def load_events(connection: Connection) -> list[str]:
    """The ledger's events, in order."""
    c = tables.ledger.c
    return list(connection.scalars(sa.select(c.event_json).order_by(c.number)))


def append_event(connection: Connection, round_id: int, event_json: str) -> None:
    """Write an event to the ledger."""
    connection.execute(sa.insert(tables.ledger).values(round_id=round_id, event_json=event_json))
