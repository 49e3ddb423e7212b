"""The optimizer's state beside each model, what a round measured, and why a task was halted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task", sa.Column("halted", sa.Text))
    op.add_column("task", sa.Column("divergence_json", sa.Text))
    op.add_column("model_versions", sa.Column("state_sha256", sa.String(64)))
    op.add_column("model_versions", sa.Column("control_sha256", sa.String(64)))
    op.add_column("rounds", sa.Column("measurements_json", sa.Text))


def downgrade() -> None:
    for table, column in (
        ("rounds", "measurements_json"),
        ("model_versions", "control_sha256"),
        ("model_versions", "state_sha256"),
        ("task", "divergence_json"),
        ("task", "halted"),
    ):
        with op.batch_alter_table(table) as batch:
            batch.drop_column(column)
