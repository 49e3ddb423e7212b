"""Blobs and tables: what is written is there, what is damaged is told apart, the schema follows its migrations."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from client_sdk.protocol.errors import ConfigurationError, StorageUnavailable, UnknownBlob
from server_ref.assignments import AssignmentRecord, AssignmentState, ReportFile
from server_ref.store import database, schema
from server_ref.store.blobs import BlobStore


@pytest.fixture
def db(tmp_path):
    engine = database.open_database(tmp_path / "state" / "pocketfed.db")
    yield engine
    engine.dispose()


def test_blobs_come_back_whole_and_by_key(tmp_path):
    store = BlobStore(tmp_path)
    store.put("reports/a", b"one")
    store.put("reports/a", b"two")
    store.put("reports/b", b"")
    assert bytes(store.get("reports/a")) == b"two"
    assert bytes(store.get("reports/b")) == b""
    assert sorted(store.keys("reports")) == ["reports/a", "reports/b"]
    store.delete("reports/a")
    store.delete("reports/a")
    with pytest.raises(UnknownBlob):
        store.get("reports/a")


def test_content_is_named_by_its_hash_and_checked_against_it(tmp_path):
    store = BlobStore(tmp_path)
    sha256 = store.put_content(b"model")
    assert sha256 == hashlib.sha256(b"model").hexdigest()
    assert store.put_content(b"model") == sha256
    (tmp_path / store.content_key(sha256)).write_bytes(b"mode1")
    with pytest.raises(StorageUnavailable, match="damaged"):
        store.get_content(sha256)


def test_a_blob_is_flushed_and_then_the_folders_that_name_it(tmp_path, monkeypatch):
    flushed: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = BlobStore(tmp_path)
    store.put("reports/a", b"one")
    assert flushed == [tmp_path / "reports" / "a"]
    store.sync()
    assert flushed[1:] == [tmp_path / "reports", tmp_path]
    store.sync()
    assert len(flushed) == 3, "nothing new, nothing to flush"


def test_the_quota_counts_what_is_there_across_restarts(tmp_path):
    BlobStore(tmp_path).put("reports/a", b"x" * 60)
    store = BlobStore(tmp_path, quota_bytes=100)
    with pytest.raises(StorageUnavailable, match="quota"):
        store.put("reports/b", b"x" * 60)
    assert store.keys("reports") == ["reports/a"]
    store.delete("reports/a")
    store.put("reports/b", b"x" * 60)


def test_a_failing_disk_is_a_typed_error_and_leaves_nothing(tmp_path):
    store = BlobStore(tmp_path)
    (tmp_path / "reports").write_text("a file where a folder must be")
    with pytest.raises(StorageUnavailable):
        store.put("reports/a", b"x")


def test_a_data_directory_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="choose another data_dir"):
        BlobStore(tmp_path / "file" / "blobs")


def test_the_migrations_make_exactly_the_schema(db):
    with db.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_opening_again_keeps_what_is_there(tmp_path, db):
    with db.begin() as connection:
        database.save_task(connection, database.TaskState("a" * 32, "{}", opened_at=5.0))
    again = database.open_database(tmp_path / "state" / "pocketfed.db")
    with again.connect() as connection:
        assert database.load_task(connection) == database.TaskState("a" * 32, "{}", opened_at=5.0)
    again.dispose()


def test_a_file_that_is_no_database_is_told(tmp_path):
    (tmp_path / "pocketfed.db").write_bytes(b"certainly not a database" * 100)
    with pytest.raises(ConfigurationError, match="not a usable database"):
        database.open_database(tmp_path / "pocketfed.db")


def test_a_database_of_a_newer_release_is_told(tmp_path, db):
    with db.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="newer release"):
        database.open_database(tmp_path / "state" / "pocketfed.db")


def test_acknowledged_writes_are_flushed_to_the_disk(db):
    with db.connect() as connection:
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar_one() == 2
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"


def test_assignments_come_back_as_they_were(db):
    records = [
        AssignmentRecord(i, f"{i:032x}", "d" * 32, 0, 0, 5, 1.5, 61.5, arrival=2.0 if i else None) for i in range(3)
    ]
    with db.begin() as connection:
        database.enrol(connection, "d" * 32, "0" * 64, "low_end", 0.0)
        database.save_assignments(connection, records, first_new=0)
    records[1].state = AssignmentState.REPORTED
    records[1].report = ReportFile("e" * 32, "f" * 64, 123, 0.25)
    records[2].state = AssignmentState.COUNTED
    records[2].counted_in = 0
    with db.begin() as connection:
        database.save_assignments(connection, records[1:], first_new=3)
    with db.connect() as connection:
        assert database.load_live_assignments(connection) == records[:2]
        assert database.load_assignment(connection, records[2].assignment_id) == records[2]
        assert database.load_assignment(connection, "0" * 31 + "9") is None
        assert database.next_assignment_number(connection) == 3
