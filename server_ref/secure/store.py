"""An aggregator's durable state: its database and its blobs. Facts only, no rules.

SQLite, write-ahead log, full synchronisation. Each transaction takes the write lock when it begins, so that what it
reads is still so when it writes, whatever other threads do. A blob is flushed before the row that names it is written;
a blob that no row names is left over from an interrupted operation and is removed when the store is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from client_sdk.protocol.errors import ConfigurationError, StorageUnavailable
from server_ref.secure import tables
from server_ref.secure.queries import StoredReport
from server_ref.store.blobs import BlobStore

INLINE_BYTES = 64 * 1024
"""Shares up to this size lie in the database: for small ones a file of their own costs more than the share."""


class AggregatorStore:
    """One folder.

    Args:
        folder: Created if needed.
        blobs: Where large values go; by default in the folder.

    Raises:
        ConfigurationError: The folder holds something else, or was written by another release.
    """

    def __init__(self, folder: Path, blobs: BlobStore | None = None) -> None:
        self.blobs = BlobStore(folder / "blobs") if blobs is None else blobs
        path = folder / "aggregator.db"
        # The driver's own transactions begin at the first write; these begin when they are told to.
        self.engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "isolation_level": None})

        @sa.event.listens_for(self.engine, "connect")
        def _pragmas(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own type
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @sa.event.listens_for(self.engine, "begin")
        def _immediate(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        try:
            with self.engine.begin() as connection:
                tables.metadata.create_all(connection)
        except sa.exc.DatabaseError as e:
            raise ConfigurationError(f"{path} is not a usable database: {e.orig}") from e

    def close(self) -> None:
        """Close the database."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One atomic change; rolled back if the block raises.

        Raises:
            StorageUnavailable: The database cannot be read or written now.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as e:
            raise StorageUnavailable("the aggregator's database cannot be used now") from e

    def put(self, data: bytes) -> str:
        """Keep bytes durably under their hash, which is returned."""
        sha256 = self.blobs.put_content(data)
        self.blobs.sync()
        return sha256

    def get(self, sha256: str) -> bytes:
        """Bytes that were ``put``."""
        return bytes(self.blobs.get_content(sha256))

    def put_share(self, digest: str, share: bytes) -> bytes | None:
        """Keep a report's share: in a blob if it is large (then null is for the row), else in the row.

        The blob is named by the report, not by its content: another report with the same content has its own.
        """
        if len(share) <= INLINE_BYTES:
            return share
        self.blobs.put(_share_key(digest), share)
        return None

    def get_share(self, report: StoredReport) -> bytes | memoryview:
        """The share of a report that is still kept."""
        return self.blobs.get(_share_key(report.digest)) if report.share is None else report.share

    def drop(self, names: Iterable[str]) -> None:
        """Remove what was ``put`` under these hashes."""
        for sha256 in names:
            self.blobs.delete(self.blobs.content_key(sha256))

    def drop_shares(self, digests: Iterable[str]) -> None:
        """Remove the blobs of these reports' shares, where there are any."""
        for digest in digests:
            self.blobs.delete(_share_key(digest))

    def sweep(self) -> None:
        """Remove blobs that no row names."""
        r, reports = tables.rounds.c, tables.reports.c
        others = (tables.challenges.c.projections, tables.comparisons.c.answer)
        with self.transaction() as connection:
            named = {
                self.blobs.content_key(sha256)
                for column in (r.contribution, r.accepted, r.noise, r.answer, *others)
                for sha256 in connection.scalars(sa.select(column).where(column.is_not(None)))
            }
            kept = sa.select(reports.digest).where(reports.kept == 1, reports.share.is_(None))
            named |= {_share_key(digest) for digest in connection.scalars(kept)}
        for key in self.blobs.keys(""):
            if key not in named:
                self.blobs.delete(key)


def _share_key(digest: str) -> str:
    return f"shares/{digest[:2]}/{digest}"
