"""Tasks, devices, models, rounds and assignments."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "task",
        sa.Column("task_id", sa.String(32), primary_key=True),
        sa.Column("config_json", sa.Text, nullable=False),
        sa.Column("invitations", sa.Integer, nullable=False),
        sa.Column("opened_at", sa.Float, nullable=False),
        sa.Column("clock_now", sa.Float, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("device_id", sa.String(32), primary_key=True),
        sa.Column("public_key", sa.String(64), nullable=False),
        sa.Column("tier", sa.String(16), nullable=False),
        sa.Column("enrolled_at", sa.Float, nullable=False),
    )
    op.create_table(
        "model_versions",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("validation_accuracy", sa.Float),
        sa.Column("validation_loss", sa.Float),
    )
    op.create_table(
        "rounds",
        sa.Column("round_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("opened_at", sa.Float, nullable=False),
        sa.Column("closed_at", sa.Float, nullable=False),
        sa.Column("reports", sa.Integer, nullable=False),
        sa.Column("superseded", sa.Integer, nullable=False),
        sa.Column("total_weight", sa.BigInteger, nullable=False),
        sa.Column("bytes_up", sa.BigInteger, nullable=False),
        sa.Column("train_loss", sa.Float),
        sa.Column("accepted_set_sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "assignments",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("assignment_id", sa.String(32), nullable=False, unique=True),
        sa.Column("device_id", sa.String(32), sa.ForeignKey("devices.device_id"), nullable=False),
        sa.Column("round_id", sa.Integer, nullable=False),
        sa.Column("model_version", sa.Integer, nullable=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("deadline", sa.Float, nullable=False),
        sa.Column("arrival", sa.Float),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("report_id", sa.String(32), unique=True),
        sa.Column("report_sha256", sa.String(64)),
        sa.Column("report_bytes", sa.BigInteger),
        sa.Column("train_loss", sa.Float),
        sa.Column("counted_in", sa.Integer),
    )
    op.create_index("ix_assignments_state", "assignments", ["state"])
    op.create_index("ix_assignments_counted_in", "assignments", ["counted_in"])


def downgrade() -> None:
    for table in ("assignments", "rounds", "model_versions", "devices", "task"):
        op.drop_table(table)
