"""The tables of an aggregator's own database. A change of them takes a new ``SCHEMA_VERSION`` and a migration."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text

SCHEMA_VERSION: Final = 1

metadata = MetaData()

# One row: whose database it is. The task's columns are null until one is bound.
identity = Table(
    "identity",
    metadata,
    Column("schema_version", Integer, primary_key=True, autoincrement=False),
    Column("aggregator_index", Integer, nullable=False),
    Column("parameters_json", Text, nullable=False),
    Column("task_json", Text),
)

# A row outlives its share: a report that was summed once must be recognised for ever. The share is null where it lies
# in a blob, and `kept` says whether there still is one.
reports = Table(
    "reports",
    metadata,
    Column("report_id", String(32), primary_key=True),
    Column("assignment_id", String(32), nullable=False, unique=True),
    Column("device_id", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("norm_bound", BigInteger, nullable=False),
    Column("round_id", BigInteger, nullable=False, index=True),
    Column("kept", Integer, nullable=False),
    Column("share", LargeBinary),
    Column("signed_in", BigInteger, index=True),
    Column("challenge", String(64)),
    Column("compared", String(64)),
)

participations = Table(
    "participations",
    metadata,
    Column("device_id", String(32), primary_key=True),
    Column("count", Integer, nullable=False),
)

challenges = Table(
    "challenges",
    metadata,
    Column("challenge", String(64), primary_key=True),
    Column("request_json", Text, nullable=False),
    Column("nonce", String(64), nullable=False),
    Column("reveal_json", Text),
    Column("transcript", String(64), unique=True),
    Column("answer_json", Text),
    Column("projections", String(64)),
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("request", String(64), primary_key=True),
    Column("answer", String(64), nullable=False),
)

# `statement` is what noise was drawn for until `signature` is there, and what was signed from then on. `contribution`,
# `accepted`, `noise` and `answer` name blobs by their content.
rounds = Table(
    "rounds",
    metadata,
    Column("round_id", BigInteger, primary_key=True, autoincrement=False),
    Column("run", Integer, nullable=False),
    Column("statement", String(64), nullable=False),
    Column("contribution", String(64)),
    Column("accepted", String(64)),
    Column("noise", String(64)),
    Column("signature", String(128)),
    Column("answer", String(64)),
)

ledger = Table(
    "ledger",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("round_id", BigInteger, nullable=False, unique=True),
    Column("event_json", Text, nullable=False),
)
