"""An aggregator's store and messages: what is kept, for how long, in which bytes; and what goes on at the same time."""

from __future__ import annotations

import hashlib
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError, StorageUnavailable
from server_ref.secure import queries, store, tables
from server_ref.secure.canonical import digest, encode
from server_ref.secure.errors import AnswerDiscarded, RoundCommitted, StaleRun, UnknownReport
from server_ref.secure.messages import (
    MAX_CONTROL_BYTES,
    MAX_SET_ENTRIES,
    AcceptedSet,
    RoundStatement,
    SetEntry,
    VerdictReason,
)
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import Parties, hex_id, pinned, pinned_privacy

FIELDS = st.lists(
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
)


# --- canonical bytes -----------------------------------------------------------------------------------------------


@given(FIELDS, FIELDS)
def test_no_two_lists_of_fields_have_one_encoding(first, second):
    # Compared with their types and bits: 1, 1.0 and True are equal to Python, and so are 0.0 and -0.0.
    def identity(fields):
        return [(type(f).__name__, struct.pack(">d", f) if isinstance(f, float) else f) for f in fields]

    assert (encode("x", first) == encode("x", second)) == (identity(first) == identity(second))
    assert encode("x", first) != encode("y", first)


def test_an_encoding_is_what_it_is_documented_to_be():
    """Another implementation has to make the same bytes."""
    expected = (
        b"s" + struct.pack(">Q", 23) + b"pocketfed/secure/1/test"
        b"i" + struct.pack(">q", -5) + b"f" + struct.pack(">d", 0.1) + b"s" + struct.pack(">Q", 1) + b"a"
        b"b" + struct.pack(">Q", 2) + b"\x00\x01" + b"n"
    )
    assert encode("test", [-5, 0.1, "a", b"\x00\x01", None]) == expected
    assert digest("test", [-5, 0.1, "a", b"\x00\x01", None]) == hashlib.sha256(expected).hexdigest()


def entry(number: int, weight: int = 1) -> SetEntry:
    return SetEntry(
        report_id=hex_id(number, "report"), device_id=hex_id(number, "device"), digest=f"{number:064x}", weight=weight
    )


def statement(**changes: object) -> RoundStatement:
    values = {
        "task_id": "7a" * 16,
        "round_id": 4,
        "run": 2,
        "contributors": (1, 2, 3),
        "accepted": AcceptedSet(parts=((entry(1), entry(2)), (entry(3),))),
        "parameters": pinned().round_parameters(),
    } | changes
    return RoundStatement(**values)


def test_the_commit_hash_covers_everything():
    parts = statement().accepted.parts
    parameters = statement().parameters
    changes = [
        {"task_id": "7b" * 16},
        {"round_id": 5},
        {"run": 3},
        {"contributors": (1, 2, 4)},
        {"contributors": (1, 2)},
        *(
            {"accepted": AcceptedSet(parts=changed)}
            for changed in (
                (parts[0][::-1], parts[1]),
                parts[::-1],
                (parts[0][:1], (parts[0][1], *parts[1])),
                ((*parts[0], *parts[1]),),
                ((entry(1, 2), entry(2)), parts[1]),
                ((entry(1).model_copy(update={"device_id": "00" * 16}), entry(2)), parts[1]),
                ((entry(1).model_copy(update={"digest": "00" * 32}), entry(2)), parts[1]),
                ((entry(1).model_copy(update={"report_id": "00" * 16}), entry(2)), parts[1]),
            )
        ),
        *(
            {"parameters": parameters.model_copy(update=changed)}
            for changed in (
                {"noise_multiplier": 5.0},
                {"bound": 7},
                {"max_weight": 2},
                {"fraction_bits": 7},
                {"indicator_noise_multiplier": 1.0},
            )
        ),
    ]
    hashes = {statement(**change).sha256 for change in changes}
    assert len(hashes | {statement().sha256}) == len(changes) + 1


def test_a_statement_survives_json_with_its_hash():
    made = statement()
    again = RoundStatement.model_validate_json(made.model_dump_json())
    assert again == made
    assert again.sha256 == made.sha256


def test_the_largest_statement_fits_the_limit_and_a_larger_one_is_refused():
    one = len(statement(accepted=AcceptedSet(parts=((entry(1, 2**39),),))).model_dump_json())
    per_entry = len(entry(1, 2**39).model_dump_json()) + 1
    assert one + MAX_SET_ENTRIES * per_entry < MAX_CONTROL_BYTES
    with pytest.raises(ValidationError, match="at most"):
        AcceptedSet(parts=((entry(1),) * (MAX_SET_ENTRIES + 1),))


@pytest.mark.parametrize(
    "wrong",
    [
        {"round_id": -1},
        {"round_id": 2**62},
        {"run": -1},
        {"run": True},
        {"contributors": (0,)},
        {"contributors": (65,)},
        {"task_id": "XY" * 16},
        {"surprise": 1},
    ],
    ids=str,
)
def test_messages_are_closed_and_bounded(wrong):
    with pytest.raises(ValidationError):
        statement(**wrong)


# --- the store ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "aggregator.db").write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(ConfigurationError, match="not a usable database"):
        AggregatorStore(tmp_path)


def test_a_store_of_another_release_is_refused(tmp_path):
    parties = Parties(tmp_path, live=[1])
    with parties.stores[1].transaction() as connection:
        connection.execute(sa.update(tables.identity).values(schema_version=tables.SCHEMA_VERSION + 1))
    with pytest.raises(ConfigurationError, match="another release"):
        parties.restart(1)
    parties.close()


def test_a_transaction_is_undone_as_a_whole(tmp_path):
    with closing(AggregatorStore(tmp_path)) as own:
        with pytest.raises(RuntimeError), own.transaction() as connection:  # noqa: PT012 - the block is what fails
            queries.count_participations(connection, ["aa"])
            raise RuntimeError
        with own.transaction() as connection:
            assert queries.load_participations(connection, ["aa"]) == {}
            queries.count_participations(connection, ["aa"])
        with own.transaction() as connection:
            assert queries.load_participations(connection, ["aa"]) == {"aa": 1}


def test_a_database_that_cannot_be_used_is_a_typed_error(tmp_path):
    with closing(AggregatorStore(tmp_path)) as own:
        with own.transaction() as connection:
            tables.ledger.drop(connection)
        with pytest.raises(StorageUnavailable), own.transaction() as connection:
            queries.append_event(connection, 1, "{}")


def test_blobs_that_nothing_names_are_swept_when_the_store_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "INLINE_BYTES", 0)
    parties = Parties(tmp_path)
    uploads = parties.uploads(range(2))
    made = parties.statement(uploads)
    noise = parties.contributions(made)
    blobs = parties.stores[4].blobs
    kept = sorted(blobs.keys(""))
    assert len(kept) == 3, "two shares and a contribution"
    blobs.put("shares/ff/ff", b"of an operation that was interrupted")
    parties.stores[4].put(b"another one")
    parties.restart(4)
    assert sorted(blobs.keys("")) == kept
    assert parties.open(parties.answers(0, parties.commit(made, noise)))
    parties.close()


def test_answers_and_unused_reports_are_kept_for_so_many_rounds(tmp_path):
    """The harness keeps two. What is gone is never computed anew, and a spent report stays spent."""
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(epsilon=9.0)))
    unused = parties.upload(99)
    parties.deliver([unused], 0)
    first = parties.uploads(range(2))
    old = parties.commit(parties.statement(first))
    answers = parties.answers(0, old)
    for round_id in range(1, 4):
        assert parties.answers(0, old) == answers
        uploads = parties.uploads(range(10 * round_id, 10 * round_id + 2), round_id)
        parties.run(parties.statement(uploads, round_id=round_id))
    with pytest.raises(AnswerDiscarded):
        parties[1].answer(0, old)
    assert len(parties.stores[1].blobs.keys("content")) == 3 * 4, "three rounds are kept: set, noise and answers"
    with pytest.raises(AnswerDiscarded):
        parties.restart(1).answer(0, old)
    # Nor is noise drawn anew for a sum that others may still be asked to open.
    with pytest.raises(AnswerDiscarded):
        parties[1].contribute(parties.statement(first))
    with pytest.raises(RoundCommitted):
        parties[1].contribute(parties.statement(first, run=1))
    late = parties.uploads([61], 4)
    with pytest.raises(UnknownReport, match="no longer kept"):
        parties[1].contribute(parties.statement([unused, *late], round_id=4))
    assert parties[1].deliver(4, [parties.upload(99, [1] * 6).share(1)])[0].reason is VerdictReason.CONFLICT
    parties.deliver([unused], 4)
    assert parties.run(parties.statement([unused, *late], round_id=4))
    parties.close()


def test_a_sum_takes_the_memory_of_a_few_models_however_many_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "INLINE_BYTES", 0)
    size = 50_000
    parties = Parties(tmp_path, pinned(privacy=None), size=size, live=[1, 2, 4, 5])
    uploads = [parties.upload(number, [number] * size) for number in range(24)]
    parties.deliver(uploads, to=[1, 2, 4, 5])
    made = parties.statement(uploads)
    signatures = parties.commit(made, by=[1, 2, 4, 5])
    tracemalloc.start()
    parties[4].answer(0, signatures)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 8 * size, "24 shares would be three times as much"
    parties.close()


# --- at the same time ----------------------------------------------------------------------------------------------


def test_of_many_statements_at_once_one_is_signed(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=None), live=[1])
    uploads = [parties.upload(number) for number in range(8)]
    parties.deliver(uploads, to=[1])
    statements = [parties.statement(uploads[i : i + 2], run=i) for i in range(7)]
    barrier = threading.Barrier(7)

    def sign(made: RoundStatement) -> str | None:
        barrier.wait()
        try:
            return parties[1].commit(made, []).statement_sha256
        except (RoundCommitted, StaleRun):
            return None

    with ThreadPoolExecutor(7) as pool:
        signed = [found for found in pool.map(sign, statements) if found is not None]
    assert len(signed) == 1
    parties.close()


def test_calls_at_once_get_one_noise(tmp_path):
    parties = Parties(tmp_path, live=[1])
    uploads = [parties.upload(number) for number in range(2)]
    parties.deliver(uploads, to=[1])
    made = parties.statement(uploads)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: parties[1].contribute(made), range(8)))
    assert all(each == drawn[0] for each in drawn)
    parties.close()


def test_the_noise_of_a_round_that_was_never_signed_is_not_drawn_a_second_time_either(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(epsilon=9.0)))
    first = parties.uploads(range(2))
    abandoned = parties.statement(first)
    parties[1].contribute(abandoned)
    for round_id in range(1, 4):
        uploads = parties.uploads(range(10 * round_id, 10 * round_id + 2), round_id)
        parties.run(parties.statement(uploads, round_id=round_id))
    with pytest.raises(AnswerDiscarded):
        parties[1].contribute(abandoned)
    parties.close()


@pytest.mark.parametrize("inline_bytes", [0, store.INLINE_BYTES], ids=["blobs", "rows"])
def test_an_answer_that_another_call_gives_meanwhile_is_given_too(tmp_path, monkeypatch, inline_bytes):
    """A coordinator gave up waiting and asks again while the first call sums: the second lets go of the shares."""
    monkeypatch.setattr(store, "INLINE_BYTES", inline_bytes)
    parties = Parties(tmp_path)
    signatures = parties.commit(parties.statement(parties.uploads(range(3))))
    own, real, answers = parties.stores[4], parties.stores[4].get_share, []

    def interrupted(report: queries.StoredReport) -> bytes | memoryview:
        if not answers:
            answers.append(None)
            answers.append(parties[4].answer(0, signatures))
        return real(report)

    monkeypatch.setattr(own, "get_share", interrupted)
    assert parties[4].answer(0, signatures) == answers[1]
    parties.close()
