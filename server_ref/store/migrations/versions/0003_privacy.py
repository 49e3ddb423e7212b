"""What was spent of a task's privacy budget, and small state that must outlive a crash between two rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "privacy_charges",
        sa.Column("round_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("event_json", sa.Text, nullable=False),
        sa.Column("charged_at", sa.Float, nullable=False),
        sa.Column("release_sha256", sa.String(64)),
    )
    op.create_table(
        "journal",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("journal")
    op.drop_table("privacy_charges")
