"""What a device insists on, whatever the server says: whom it sends shares to, and how often it takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk import MobileClient
from client_sdk.errors import ParticipationsSpent, StateDirUnusable, UntrustedAggregators
from client_sdk.participations import ParticipationFile, Participations
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Assignment, I64SharesEncoding
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.store import FileDeviceStore, MemoryDeviceStore
from client_sdk.trust import TrustedAggregators, check_willing, load_aggregator_keys, trusted_aggregators
from tests.devices import ToyProgram, ToyServer, make_assignment, make_data
from tests.vectors.generate import PLAN

TASK, OTHER_TASK = "f" * 32, "e" * 32
IDS = [f"{number:032x}" for number in range(8)]
KEYS = PLAN.aggregator_keys
TRUSTED = TrustedAggregators(KEYS)


def secure_assignment(number: int = 1, max_participations: int | None = None) -> Assignment:
    plan = PLAN.model_copy(update={"max_participations": max_participations})
    return make_assignment(number, encoding=I64SharesEncoding(), secure=plan)


# --- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_read_in_their_order(tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS))
    assert load_aggregator_keys(path) == KEYS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON list"),
        ("{}", "not a JSON list"),
        ('["not hex", "neither"]', "not a JSON list"),
        (json.dumps([key.upper() for key in KEYS]), "lower-case"),
        (json.dumps([1, 2]), "not a JSON list"),
        (json.dumps(KEYS[:1]), "at least two"),
        (json.dumps([*KEYS, KEYS[0]]), "no two of them alike"),
    ],
)
def test_a_file_of_anything_but_keys_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_aggregator_keys(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"none\.json: No such file"):
        load_aggregator_keys(tmp_path / "none.json")


# --- whom it trusts ----------------------------------------------------------------------------------------------


def test_a_device_that_was_told_nobody_trusts_the_server():
    check_willing(secure_assignment(), None, MemoryDeviceStore())
    check_willing(make_assignment(1), None, MemoryDeviceStore())
    check_willing(secure_assignment(), TRUSTED, MemoryDeviceStore())


@pytest.mark.parametrize(
    "others",
    [KEYS[::-1], KEYS[:4], (*KEYS[:4], "0" * 64), (*KEYS, "0" * 64)],
    ids=["order", "fewer", "another", "more"],
)
def test_shares_for_others_are_refused(others: tuple[str, ...]):
    with pytest.raises(UntrustedAggregators, match="for other aggregators"):
        check_willing(secure_assignment(), TrustedAggregators(others), MemoryDeviceStore())


@pytest.mark.parametrize("least", [None, 3])
def test_shares_that_fewer_of_them_could_read_are_refused(least: int | None):
    """Of the trusted ones two may be dishonest. Told that the threshold is 2, a device would hand them its update."""
    trusted, store = TrustedAggregators(KEYS, least), MemoryDeviceStore()
    for threshold in range(2, 6):
        plan = PLAN.model_copy(update={"threshold": threshold})
        assignment = make_assignment(1, encoding=I64SharesEncoding(), secure=plan)
        if threshold >= 3:
            check_willing(assignment, trusted, store)
            continue
        with pytest.raises(UntrustedAggregators, match="any 2 aggregators can read, fewer than 3"):
            check_willing(assignment, trusted, store)
    low = PLAN.model_copy(update={"threshold": 2})
    check_willing(
        make_assignment(1, encoding=I64SharesEncoding(), secure=low), TrustedAggregators(KEYS, min_threshold=2), store
    )


@pytest.mark.parametrize("least", [0, 1, 6])
def test_a_threshold_that_the_aggregators_cannot_have_is_refused(least: int):
    with pytest.raises(ConfigurationError, match=f"from 2 to 5, not {least}"):
        trusted_aggregators(KEYS, least)


def test_a_threshold_of_nobody_is_refused():
    assert trusted_aggregators(None, None) is None
    with pytest.raises(ConfigurationError, match="give their keys too"):
        trusted_aggregators(None, 3)


def test_an_update_in_the_clear_is_refused_by_whoever_trusts_aggregators():
    with pytest.raises(UntrustedAggregators, match="in the clear"):
        check_willing(make_assignment(1), TRUSTED, MemoryDeviceStore())


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "other-keys"])
def test_a_refusing_device_trains_nothing_sends_nothing_and_says_why(secure: bool):
    server = ToyServer(work=3)
    if secure:
        server.amend |= {"encoding": I64SharesEncoding(), "secure": PLAN}
    store, program = MemoryDeviceStore(), ToyProgram(server.manifest)
    client = MobileClient(
        program,
        DeviceProfile("phone", DeviceTier.LOW_END),
        data=make_data(),
        transport=server.device(store.identity.device_id),
        store=store,
        aggregator_keys=["0" * 64, "1" * 64],
    )
    summary = client.run()
    assert (summary.cause, summary.reports) == ("refused", 0)
    assert isinstance(summary.error, UntrustedAggregators)
    assert [reason for _, reason in server.abandoned] == ["privacy"]
    assert "upload" not in server.requests
    assert program.runs == 0


# --- how often ---------------------------------------------------------------------------------------------------


ASSIGNMENTS = st.lists(
    st.tuples(st.sampled_from([TASK, OTHER_TASK]), st.sampled_from(IDS)), unique_by=lambda each: each[1]
)


@given(ASSIGNMENTS, st.data())
def test_each_assignment_counts_once_however_often_it_is_sealed(assignments: list[tuple[str, str]], data):
    """A device holds one assignment at a time, and may seal it again after a crash."""
    counts = Participations()
    for task, assignment in assignments:
        before = counts.without(task, assignment)
        for _ in range(data.draw(st.integers(1, 3))):
            counts = Participations.model_validate_json(counts.counting(task, assignment).model_dump_json())
        assert counts.without(task, assignment) == before
    for task in (TASK, OTHER_TASK):
        assert counts.without(task, "a" * 32) == [each for each, _ in assignments].count(task)


@pytest.mark.parametrize("durable", [False, True], ids=["memory", "files"])
def test_a_device_takes_part_k_times_and_no_more(tmp_path: Path, durable: bool):
    store = FileDeviceStore(tmp_path / "state") if durable else MemoryDeviceStore()
    for number in (1, 2, 3):
        assignment = secure_assignment(number, max_participations=3)
        check_willing(assignment, None, store)
        store.count_participation(assignment.task_id, assignment.assignment_id)
        check_willing(assignment, None, store)  # the same one, after a crash
        if durable:
            store.close()
            store = FileDeviceStore(tmp_path / "state")
    with pytest.raises(ParticipationsSpent, match="this one has sealed 3"):
        check_willing(secure_assignment(4, max_participations=3), None, store)
    check_willing(secure_assignment(4, max_participations=4), None, store)
    check_willing(secure_assignment(4).model_copy(update={"task_id": OTHER_TASK}), None, store)
    store.close()


@pytest.mark.parametrize("content", [b"", b"{}x", b'{"tasks":{"f":1}}', b'{"tasks":{}', b"\xff"])
def test_a_device_that_cannot_read_its_count_does_not_begin_again_at_zero(tmp_path: Path, content: bytes):
    store = FileDeviceStore(tmp_path / "state")
    store.count_participation(TASK, IDS[0])
    path = tmp_path / "state" / "participations.json"
    path.write_bytes(content)
    with pytest.raises(StateDirUnusable, match="is damaged"):
        check_willing(secure_assignment(2, max_participations=9), None, store)
    with pytest.raises(StateDirUnusable, match="is damaged"):
        store.count_participation(TASK, IDS[1])
    assert path.read_bytes() == content
    check_willing(secure_assignment(2), None, store)
    store.close()


def test_counts_survive_being_written_and_read(tmp_path: Path):
    file = ParticipationFile(tmp_path / "participations.json")
    assert file.load() == Participations()
    counts = Participations().counting(TASK, IDS[0]).counting(TASK, IDS[1]).counting(OTHER_TASK, IDS[2])
    file.save(counts)
    assert file.load() == counts
