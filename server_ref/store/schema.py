"""The tables. Changed only together with a migration in ``migrations/versions``."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# One row: the task that this data directory belongs to, and the engine's state that no other row implies.
task = Table(
    "task",
    metadata,
    Column("task_id", String(32), primary_key=True),
    Column("config_json", Text, nullable=False),
    Column("invitations", Integer, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("clock_now", Float, nullable=False),
    Column("halted", Text),
    Column("divergence_json", Text),
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", String(32), primary_key=True),
    Column("public_key", String(64), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("enrolled_at", Float, nullable=False),
)

model_versions = Table(
    "model_versions",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("validation_accuracy", Float),
    Column("validation_loss", Float),
    Column("state_sha256", String(64)),
    Column("control_sha256", String(64)),
)

# A committed round r turned model version r into r + 1.
rounds = Table(
    "rounds",
    metadata,
    Column("round_id", Integer, primary_key=True, autoincrement=False),
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float, nullable=False),
    Column("reports", Integer, nullable=False),
    Column("superseded", Integer, nullable=False),
    Column("total_weight", BigInteger, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("train_loss", Float),
    Column("accepted_set_sha256", String(64), nullable=False),
    Column("measurements_json", Text),
)

# An assignment and, once it is there, its report: one row, because there is at most one report per assignment.
assignments = Table(
    "assignments",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("assignment_id", String(32), nullable=False, unique=True),
    Column("device_id", String(32), ForeignKey("devices.device_id"), nullable=False),
    Column("round_id", Integer, nullable=False),
    Column("model_version", Integer, nullable=False),
    Column("weight", Integer, nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("arrival", Float),
    Column("state", String(16), nullable=False),
    Column("report_id", String(32), unique=True),
    Column("report_sha256", String(64)),
    Column("report_bytes", BigInteger),
    Column("train_loss", Float),
    Column("counted_in", Integer),
    Index("ix_assignments_state", "state"),
    Index("ix_assignments_counted_in", "counted_in"),
)

# What a round's release cost of the privacy budget: written before the release is used, never changed or deleted.
# ``release_sha256`` names the noised aggregate, which is drawn once: a crash before the commit goes on with it.
privacy_charges = Table(
    "privacy_charges",
    metadata,
    Column("round_id", Integer, primary_key=True, autoincrement=False),
    Column("event_json", Text, nullable=False),
    Column("charged_at", Float, nullable=False),
    Column("release_sha256", String(64)),
)

# Small values by name, of work that a crash may interrupt and the next process goes on with.
journal = Table(
    "journal",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

# What selection remembers of each device (``server_ref.selection.history``): one row a device, written with the
# assignments that change it, and twice an hour at most for the hours at which it comes.
device_history = Table(
    "device_history",
    metadata,
    Column("device_id", String(32), ForeignKey("devices.device_id"), primary_key=True),
    Column("joined_turns", BigInteger, nullable=False),
    Column("counted", BigInteger, nullable=False),
    Column("open_turns", BigInteger, nullable=False),
    Column("given_then", BigInteger, nullable=False),
    Column("tier", BigInteger, nullable=False),
    Column("stratum", BigInteger, nullable=False),
    Column("given_in", BigInteger, nullable=False),
    Column("counted_in", BigInteger, nullable=False),
    Column("seen_hour", BigInteger, nullable=False),
    Column("seen_round", BigInteger, nullable=False),
    Column("former_hour", BigInteger, nullable=False),
    Column("former_day", BigInteger, nullable=False),
    Column("latency_s", Float),
    Column("came_s", Float),
    Column("interval_s", Float),
    Column("former_interval_s", Float),
    Column("days", LargeBinary(96), nullable=False),
)
