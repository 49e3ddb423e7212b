"""What selection remembers of each device: one row a device, whatever the number of rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NEVER = -1_000_000
_SINCE_ROUNDS = ("given_in", "counted_in", "seen_hour", "seen_round", "former_hour", "former_day")
_COUNTS = ("joined_turns", "counted", "open_turns", "given_then", "tier", "stratum")


def upgrade() -> None:
    op.create_table(
        "device_history",
        sa.Column("device_id", sa.String(32), sa.ForeignKey("devices.device_id"), primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in (*_COUNTS, *_SINCE_ROUNDS)),
        *(sa.Column(name, sa.Float) for name in ("latency_s", "came_s", "interval_s", "former_interval_s")),
        sa.Column("days", sa.LargeBinary(96), nullable=False),
    )
    # A task that began before goes on with what its assignments say; the hours are learned anew.
    connection = op.get_bind()
    counted = connection.execute(
        sa.text(
            "SELECT a.device_id, d.tier, COUNT(*), MAX(a.counted_in), AVG(a.arrival - a.issued_at) "
            "FROM assignments a JOIN devices d ON d.device_id = a.device_id "
            "WHERE a.counted_in IS NOT NULL GROUP BY a.device_id, d.tier"
        )
    ).all()
    tiers = {"high_end": 0, "mid_range": 1, "low_end": 2}
    table = sa.table(
        "device_history",
        *map(sa.column, ("device_id", *_COUNTS, *_SINCE_ROUNDS, "latency_s")),
        sa.column("days", sa.LargeBinary),
    )
    rows = [
        {
            **dict.fromkeys(_COUNTS, 0),
            **dict.fromkeys(_SINCE_ROUNDS, _NEVER),
            "device_id": device_id,
            "tier": tiers[tier],
            "counted": count,
            "counted_in": last,
            "latency_s": latency,
            "days": _NEVER.to_bytes(4, "little", signed=True) * 24,
        }
        for device_id, tier, count, last, latency in counted
    ]
    if rows:
        op.bulk_insert(table, rows)


def downgrade() -> None:
    op.drop_table("device_history")
