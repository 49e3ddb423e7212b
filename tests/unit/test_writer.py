"""Group commit: nothing is promised before it is durable, and memory never runs ahead of the database."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from client_sdk.protocol.errors import ServerBusy, StaleReport, StorageUnavailable
from server_ref.store.writer import GroupCommitWriter


class Counter:
    """In-memory state with one number, and its table."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.value = 0
        self.transactions = 0
        self.fail_flush = False
        self.fail_reload = False
        self.fail_after = False

    def increment(self, _connection: sa.Connection) -> int:
        self.value += 1
        return self.value

    def flush(self, connection: sa.Connection) -> None:
        self.transactions += 1
        connection.execute(sa.text("UPDATE counter SET value = :v"), {"v": self.value})
        if self.fail_flush:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("disk full"))

    def after_commit(self) -> None:
        if self.fail_after:
            raise OSError("no space")

    def reload(self) -> None:
        if self.fail_reload:
            raise OSError("gone")
        self.value = self.stored()

    def stored(self) -> int:
        with self.engine.connect() as connection:
            return connection.execute(sa.text("SELECT value FROM counter")).scalar_one()


@pytest.fixture
def counter(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'counter.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE counter (value INTEGER)"))
        connection.execute(sa.text("INSERT INTO counter VALUES (0)"))
    yield Counter(engine)
    engine.dispose()


@pytest.fixture
def writer(counter):
    writer = GroupCommitWriter(counter.engine, counter)
    writer.start()
    yield writer
    writer.stop()


def test_a_result_is_durable_when_its_future_resolves(counter, writer):
    assert writer.submit(counter.increment).result() == 1
    assert counter.stored() == 1


def test_what_queues_up_shares_one_transaction(counter, writer):
    gate = threading.Event()
    first = writer.submit(lambda _connection: gate.wait(30))
    waiting = [writer.submit(counter.increment) for _ in range(50)]
    gate.set()
    first.result()
    assert [f.result() for f in waiting] == list(range(1, 51))
    assert counter.transactions <= 2


def test_a_refusal_leaves_the_rest_of_its_batch_alone(counter, writer):
    def refuse(_connection):
        raise StaleReport("over")

    gate = threading.Event()
    writer.submit(lambda _connection: gate.wait(30))
    good, bad, also_good = (writer.submit(run) for run in (counter.increment, refuse, counter.increment))
    gate.set()
    assert (good.result(), also_good.result()) == (1, 2)
    with pytest.raises(StaleReport):
        bad.result()
    assert counter.stored() == 2


def test_a_failed_transaction_is_forgotten_in_memory_too(counter, writer):
    writer.submit(counter.increment).result()
    counter.fail_flush = True
    with pytest.raises(StorageUnavailable):
        writer.submit(counter.increment).result()
    counter.fail_flush = False
    assert counter.value == counter.stored() == 1
    assert writer.submit(counter.increment).result() == 2


def test_a_fault_in_one_operation_rolls_its_batch_back(counter, writer):
    with pytest.raises(ServerBusy):
        writer.submit(lambda _connection: 1 // 0).result()
    assert writer.submit(counter.increment).result() == 1


def test_nothing_is_written_while_the_state_cannot_be_read_back(counter, writer):
    counter.fail_flush = counter.fail_reload = True
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            writer.submit(counter.increment).result()
    counter.fail_flush = False
    with pytest.raises(StorageUnavailable, match="cannot be read"):
        writer.submit(counter.increment).result()
    counter.fail_reload = False
    assert writer.submit(counter.increment).result() == 1


def test_work_after_a_commit_that_fails_is_repeated_from_durable_state(counter, writer):
    counter.fail_after = True
    assert writer.submit(counter.increment).result() == 1
    counter.value = 99
    counter.fail_after = False
    assert writer.submit(counter.increment).result() == 2


def test_a_request_given_up_before_its_turn_is_left_out_and_the_writer_lives(counter, writer):
    gate, started = threading.Event(), threading.Event()

    def block(_connection):
        started.set()
        return gate.wait(30)

    blocking = writer.submit(block)
    assert started.wait(30)
    given_up = writer.submit(counter.increment)
    assert given_up.cancel()
    assert not blocking.cancel(), "what runs cannot be given up"
    gate.set()
    assert writer.submit(counter.increment).result(30) == 1
    assert blocking.result(30)


def test_a_stopped_writer_refuses(counter):
    writer = GroupCommitWriter(counter.engine, counter)
    writer.start()
    queued = [writer.submit(counter.increment) for _ in range(10)]
    writer.stop()
    assert [f.result() for f in queued] == list(range(1, 11)), "what was queued is finished"
    with pytest.raises(ServerBusy):
        writer.submit(counter.increment).result()
