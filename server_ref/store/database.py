"""The database: opening, migrating, and the statements the coordinator needs. Facts only, no rules.

SQLite by default: write-ahead log, full synchronisation (an acknowledged write survives a power cut), one writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine, RowMapping

from client_sdk.protocol.errors import ConfigurationError
from server_ref.assignments import LIVE_STATES, AssignmentRecord, AssignmentState, ReportFile
from server_ref.store import schema

_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True)
class ModelVersion:
    """One version of the global model."""

    version: int
    sha256: str
    created_at: float
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    state_sha256: str | None = None
    control_sha256: str | None = None


@dataclass(frozen=True)
class CommittedRound:
    """What is kept of a round once it is over."""

    round_id: int
    opened_at: float
    closed_at: float
    reports: int
    superseded: int
    total_weight: int
    bytes_up: int
    train_loss: float | None
    accepted_set_sha256: str
    measurements_json: str | None = None


@dataclass(frozen=True)
class TaskState:
    """The one row of ``task``."""

    task_id: str
    config_json: str
    invitations: int = 0
    opened_at: float = 0.0
    clock_now: float = 0.0
    halted: str | None = None
    divergence_json: str | None = None


@dataclass(frozen=True)
class PrivacyCharge:
    """What one round's release cost of the privacy budget."""

    round_id: int
    event_json: str
    charged_at: float
    release_sha256: str | None = None


def open_database(path: Path) -> Engine:
    """Open (and create) the SQLite database and bring its schema up to date.

    Raises:
        ConfigurationError: The file is not a database, or a newer release wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own type
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    try:
        migrate(engine)
    except sa.exc.DatabaseError as e:
        raise ConfigurationError(f"{path} is not a usable database: {e.orig}") from e
    return engine


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision.

    Raises:
        ConfigurationError: The database has a revision that this release does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as e:
            raise ConfigurationError(f"the database was written by a newer release: {e}") from e


def load_task(connection: Connection) -> TaskState | None:
    """The task of this data directory, if one was ever started."""
    row = connection.execute(sa.select(schema.task)).mappings().first()
    return None if row is None else TaskState(**row)


def save_task(connection: Connection, state: TaskState) -> None:
    """Insert or update the task's row."""
    values = {k: v for k, v in vars(state).items() if k not in {"task_id", "config_json"}}
    result = connection.execute(sa.update(schema.task).where(schema.task.c.task_id == state.task_id).values(**values))
    if result.rowcount == 0:
        connection.execute(
            sa.insert(schema.task).values(task_id=state.task_id, config_json=state.config_json, **values)
        )


def enrol(connection: Connection, device_id: str, public_key: str, tier: str, now: float) -> None:
    """Insert a device, or update its tier."""
    table = schema.devices
    updated = connection.execute(sa.update(table).where(table.c.device_id == device_id).values(tier=tier))
    if updated.rowcount == 0:
        connection.execute(
            sa.insert(table).values(device_id=device_id, public_key=public_key, tier=tier, enrolled_at=now)
        )


def load_device(connection: Connection, device_id: str) -> tuple[str, str] | None:
    """Public key (hex) and tier of a device."""
    table = schema.devices
    row = connection.execute(sa.select(table.c.public_key, table.c.tier).where(table.c.device_id == device_id)).first()
    return None if row is None else (row.public_key, row.tier)


def count_devices(connection: Connection) -> int:
    """Number of enrolled devices."""
    return connection.execute(sa.select(sa.func.count()).select_from(schema.devices)).scalar_one()


def _to_row(record: AssignmentRecord) -> dict[str, Any]:
    report = record.report
    loss = None if report is None or not math.isfinite(report.train_loss) else report.train_loss
    return {
        "number": record.number,
        "assignment_id": record.assignment_id,
        "device_id": record.device_id,
        "round_id": record.round_id,
        "model_version": record.model_version,
        "weight": record.weight,
        "issued_at": record.issued_at,
        "deadline": record.deadline,
        "arrival": record.arrival,
        "state": record.state.value,
        "counted_in": record.counted_in,
        "report_id": report and report.report_id,
        "report_sha256": report and report.sha256,
        "report_bytes": report and report.num_bytes,
        "train_loss": loss,
    }


def _from_row(row: RowMapping) -> AssignmentRecord:
    report = None
    if row["report_id"] is not None:
        loss = math.nan if row["train_loss"] is None else row["train_loss"]
        report = ReportFile(row["report_id"], row["report_sha256"], row["report_bytes"], loss)
    return AssignmentRecord(
        number=row["number"],
        assignment_id=row["assignment_id"],
        device_id=row["device_id"],
        round_id=row["round_id"],
        model_version=row["model_version"],
        weight=row["weight"],
        issued_at=row["issued_at"],
        deadline=row["deadline"],
        arrival=row["arrival"],
        state=AssignmentState(row["state"]),
        report=report,
        counted_in=row["counted_in"],
    )


_MUTABLE = ("arrival", "state", "counted_in", "report_id", "report_sha256", "report_bytes", "train_loss")
# Built once: they run for every report, and building one costs as much as running it.
_INSERT_ASSIGNMENTS = sa.insert(schema.assignments)
_UPDATE_ASSIGNMENTS = (
    sa.update(schema.assignments)
    .where(schema.assignments.c.number == sa.bindparam("key"))
    .values({column: sa.bindparam(f"new_{column}") for column in _MUTABLE})
)


def save_assignments(connection: Connection, records: Sequence[AssignmentRecord], first_new: int) -> None:
    """Write changed records; those numbered from ``first_new`` on are new rows."""
    new = [_to_row(r) for r in records if r.number >= first_new]
    old = [_to_row(r) for r in records if r.number < first_new]
    if new:
        connection.execute(_INSERT_ASSIGNMENTS, new)
    if old:
        rows = [{"key": row["number"], **{f"new_{c}": row[c] for c in _MUTABLE}} for row in old]
        connection.execute(_UPDATE_ASSIGNMENTS, rows)


def load_assignment(connection: Connection, assignment_id: str) -> AssignmentRecord | None:
    """One assignment, live or not."""
    table = schema.assignments
    row = connection.execute(sa.select(table).where(table.c.assignment_id == assignment_id)).mappings().first()
    return None if row is None else _from_row(row)


def assignment_of_report(connection: Connection, report_id: str) -> str | None:
    """Id of the assignment that a report of this id answered."""
    table = schema.assignments
    return connection.execute(
        sa.select(table.c.assignment_id).where(table.c.report_id == report_id)
    ).scalar_one_or_none()


def load_live_assignments(connection: Connection) -> list[AssignmentRecord]:
    """Outstanding and reported assignments, in order of their numbers."""
    table = schema.assignments
    query = sa.select(table).where(table.c.state.in_([s.value for s in LIVE_STATES])).order_by(table.c.number)
    return [_from_row(row) for row in connection.execute(query).mappings()]


def load_given_back(connection: Connection, since: float) -> list[AssignmentRecord]:
    """Assignments that were given back and would have reported after this time."""
    table = schema.assignments
    given_back = (table.c.state == AssignmentState.ABANDONED.value) & (table.c.arrival > since)
    query = sa.select(table).where(given_back).order_by(table.c.number)
    return [_from_row(row) for row in connection.execute(query).mappings()]


def next_assignment_number(connection: Connection) -> int:
    """One more than the largest number given so far."""
    largest = connection.execute(sa.select(sa.func.max(schema.assignments.c.number))).scalar()
    return 0 if largest is None else int(largest) + 1


def latest_model(connection: Connection) -> ModelVersion | None:
    """The newest model version."""
    table = schema.model_versions
    row = connection.execute(sa.select(table).order_by(table.c.version.desc()).limit(1)).mappings().first()
    return None if row is None else ModelVersion(**row)


def save_model(connection: Connection, model: ModelVersion) -> None:
    """Insert a model version."""
    connection.execute(sa.insert(schema.model_versions).values(**vars(model)))


def save_evaluation(connection: Connection, version: int, accuracy: float, loss: float) -> None:
    """Record a model version's validation figures."""
    table = schema.model_versions
    connection.execute(
        sa.update(table)
        .where(table.c.version == version)
        .values(validation_accuracy=accuracy, validation_loss=loss if math.isfinite(loss) else None)
    )


def unevaluated_models(connection: Connection) -> list[ModelVersion]:
    """Model versions without validation figures, oldest first."""
    table = schema.model_versions
    query = sa.select(table).where(table.c.validation_accuracy.is_(None)).order_by(table.c.version)
    return [ModelVersion(**row) for row in connection.execute(query).mappings()]


def save_round(connection: Connection, committed: CommittedRound) -> None:
    """Insert a committed round."""
    connection.execute(sa.insert(schema.rounds).values(**vars(committed)))


def load_history(connection: Connection, since: int) -> Iterable[tuple[CommittedRound, ModelVersion]]:
    """Committed rounds from ``since`` on, each with the model it made."""
    rounds, models = schema.rounds, schema.model_versions
    query = (
        sa.select(rounds, models)
        .join(models, models.c.version == rounds.c.round_id + 1)
        .where(rounds.c.round_id >= since)
        .order_by(rounds.c.round_id)
    )
    for row in connection.execute(query).mappings():
        yield (
            CommittedRound(**{c.name: row[c] for c in rounds.columns}),
            ModelVersion(**{c.name: row[c] for c in models.columns}),
        )


def model_version(connection: Connection, version: int) -> ModelVersion:
    """A model version that exists."""
    table = schema.model_versions
    return ModelVersion(**connection.execute(sa.select(table).where(table.c.version == version)).mappings().one())


def load_measurements(connection: Connection, since: int, before: int | None) -> list[str]:
    """What the rounds from ``since`` on (and before ``before``) measured, as JSON, oldest first."""
    table = schema.rounds
    query = sa.select(table.c.measurements_json).where(
        table.c.round_id >= since, table.c.measurements_json.is_not(None)
    )
    if before is not None:
        query = query.where(table.c.round_id < before)
    return list(connection.execute(query.order_by(table.c.round_id)).scalars())


def load_device_history(connection: Connection) -> list[dict[str, Any]]:
    """What selection remembers of each device."""
    return [dict(row) for row in connection.execute(sa.select(schema.device_history)).mappings()]


def save_device_history(
    connection: Connection, new: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]]
) -> None:
    """Write new rows, and changed ones."""
    table = schema.device_history
    if new:
        connection.execute(sa.insert(table), list(new))
    if changed:
        values: dict[str, Any] = {c.name: sa.bindparam(f"new_{c.name}") for c in table.columns if c.name != "device_id"}
        query = sa.update(table).where(table.c.device_id == sa.bindparam("key")).values(values)
        connection.execute(
            query, [{"key": row["device_id"], **{f"new_{name}": row[name] for name in values}} for row in changed]
        )


def counted_participations(connection: Connection) -> dict[str, int]:
    """How many committed rounds counted a report of each device."""
    table = schema.assignments
    query = (
        sa.select(table.c.device_id, sa.func.count()).where(table.c.counted_in.is_not(None)).group_by(table.c.device_id)
    )
    return {device_id: int(count) for device_id, count in connection.execute(query)}


def load_charges(connection: Connection) -> list[PrivacyCharge]:
    """What was spent of the privacy budget, in order of the rounds."""
    query = sa.select(schema.privacy_charges).order_by(schema.privacy_charges.c.round_id)
    return [PrivacyCharge(**row) for row in connection.execute(query).mappings()]


def save_charge(connection: Connection, charge: PrivacyCharge) -> None:
    """Insert what a round costs. A round is charged once: a second row is an error of the database."""
    connection.execute(sa.insert(schema.privacy_charges).values(**vars(charge)))


def load_note(connection: Connection, name: str) -> str | None:
    """A value of the journal."""
    query = sa.select(schema.journal.c.value).where(schema.journal.c.name == name)
    return connection.execute(query).scalar_one_or_none()


def save_note(connection: Connection, name: str, value: str) -> None:
    """Insert or update a value of the journal."""
    changed = connection.execute(sa.update(schema.journal).where(schema.journal.c.name == name).values(value=value))
    if changed.rowcount == 0:
        connection.execute(sa.insert(schema.journal).values(name=name, value=value))


def delete_note(connection: Connection, name: str) -> None:
    """Remove a value of the journal; a no-op when it is not there."""
    connection.execute(sa.delete(schema.journal).where(schema.journal.c.name == name))
