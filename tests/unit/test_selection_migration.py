"""Selection over a data folder that an older release wrote: migration 0004, and a server that goes on with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from client_sdk.protocol.messages import Assigned, Wait
from server_ref.assignments import AssignmentRecord, AssignmentState
from server_ref.config import TaskConfig
from server_ref.selection.history import NEVER, DeviceHistory
from server_ref.store import database, schema
from server_ref.task import load_task
from tests.served import Served


def migrated(engine: sa.Engine, revision: str) -> None:
    """Bring the schema to a revision, up or down."""
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


@pytest.fixture
def old(tmp_path):
    """A database as it was before there was a history: two devices that were counted, one that never was."""
    path = tmp_path / "pocketfed.db"
    engine = database.open_database(path)
    migrated(engine, "0003")
    devices = [
        {"device_id": name * 32, "public_key": name * 64, "tier": tier, "enrolled_at": 0.0}
        for name, tier in (("a", "high_end"), ("b", "low_end"), ("c", "mid_range"))
    ]
    # Device, round, taken, arrived, counted.
    given = [
        ("a", 0, 100.0, 110.0, True),
        ("a", 1, 200.0, 230.0, True),
        ("b", 0, 100.0, 160.0, True),
        ("b", 1, 200.0, None, False),
        ("c", 1, 200.0, 201.0, False),
    ]
    records = []
    for number, (name, round_id, issued, arrival, counted) in enumerate(given):
        record = AssignmentRecord(
            number, f"{number:032x}", name * 32, round_id, round_id, 1, issued, issued + 600, arrival=arrival
        )
        record.state = AssignmentState.COUNTED if counted else AssignmentState.EXPIRED
        record.counted_in = round_id if counted else None
        records.append(record)
    with engine.begin() as connection:
        connection.execute(sa.insert(schema.devices), devices)
        database.save_assignments(connection, records, 0)
    engine.dispose()
    return path


def test_the_history_begins_with_what_the_assignments_say(old):
    engine = database.open_database(old)
    with engine.connect() as connection:
        history = DeviceHistory.load(database.load_device_history(connection))
    engine.dispose()
    assert sorted(history.ids) == ["a" * 32, "b" * 32], "who was never counted is a newcomer"
    for name, tier, counted, last, latency in (("a", 0, 2, 1, 20.0), ("b", 2, 1, 0, 60.0)):
        row = history.row(name * 32)[0]
        assert (row["tier"], row["counted"], row["counted_in"], row["latency_s"]) == (tier, counted, last, latency)
        assert row["joined_turns"] == row["open_turns"] == 0
        assert np.isnan(row["interval_s"])
        assert (row["days"] == NEVER).all()
    assert not history.expected(2, 500_000).any(), "the hours are learned anew"


def test_a_server_on_an_old_folder_goes_on_by_turns(tmp_path, softmax_bundle):
    with Served(
        tmp_path,
        softmax_bundle,
        buffer_size=1,
        rounds=30,
        selection={"policy": "fair"},
        divergence={"enabled": False},
    ) as served:
        update = np.full(served.size, 1e-3)

        def turn(name: str) -> bool:
            reply = served.check_in(name)
            if isinstance(reply, Assigned):
                served.report(name, reply.assignment, update)
                return True
            assert isinstance(reply, Wait)
            return False

        # Nobody else is there, so that it has four turns.
        assert all(turn("eager") for _ in range(4))
        assert turn("other")
        served.coordinator.stop()
        engine = database.open_database(tmp_path / "state" / "pocketfed.db")
        migrated(engine, "0003")
        with engine.begin() as connection:
            # An older release had no key.
            connection.execute(sa.text("DELETE FROM journal WHERE name = 'selection-key'"))
        engine.dispose()
        served.restart()
        history = {row["device_id"]: row["counted"] for row in served.rows("device_history")}
        assert history == {served.enrol("eager"): 4, served.enrol("other"): 1}
        # Nobody is expected before having come once, and then who was ahead waits until the other one has caught up.
        assert turn("eager")
        assert turn("other")
        for _ in range(3):
            assert not turn("eager")
            assert turn("other")
        assert {row["counted"] for row in served.rows("device_history")} == {5}


def test_what_a_release_added_and_is_off_leaves_old_tasks_what_they_were(softmax_bundle):
    """Or no older folder would be taken: these are the settings that a task's identity held before."""

    def task(**changes):
        return load_task(TaskConfig.model_validate({"bundle": softmax_bundle, **changes}))

    identity = json.loads(task().identity_json)
    assert identity["selection"] == {"floor": 0.2, "policy": "any"}
    assert identity["plan"].keys() == {
        "algorithm", "batch_size", "learning_rate", "local_epochs", "max_steps", "prox_mu", "shuffle",
    }  # fmt: skip
    assert task(selection={"patience_s": 5.0}).task_id == task().task_id, "it may be changed while a task runs"
    assert task(plan={"adaptive": True}).task_id != task().task_id
