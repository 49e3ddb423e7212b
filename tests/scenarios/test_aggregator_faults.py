"""Real aggregator processes, killed, lied to and lying: the right bits or nothing, one release, one charge."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server_ref.secure.client import HttpAggregator
from server_ref.secure.errors import (
    AggregatorUnavailable,
    CohortTooSmall,
    ContributorsRefused,
    NoiseRejected,
    NotEnoughAggregators,
    ParametersBelowPinned,
    QuorumMissing,
    ReportSpent,
    RoundCommitted,
    StaleRun,
)
from server_ref.secure.keys import Peers, create_coordinator_key
from server_ref.secure.launch import COORDINATOR_FILE
from server_ref.secure.messages import NoiseShare, ShareHeader
from server_ref.secure.round import SecureRound
from server_ref.secure.round_messages import SealedReport
from tests.aggregator_processes import FORK, QUICK, Fleet, FleetCoordinator
from tests.secure_parties import TASK, Upload, pinned, pinned_privacy
from tests.secure_rounds import OPERATIONS, plain_sum, reports
from tests.web import Answer, Request, Server, proxy

LONG_RUN = pinned_privacy(max_rounds=1000, epsilon=100.0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Iterator[Fleet]:
    """Five processes, threshold three, no noise: sums can be compared with plain integers."""
    fleet = Fleet(tmp_path_factory.mktemp("exact"), pinned(privacy=None))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Iterator[Fleet]:
    """The same with noise, contributed by the aggregators."""
    fleet = Fleet(tmp_path_factory.mktemp("noisy"), pinned(privacy=LONG_RUN))
    yield fleet
    fleet.close()


# --- aggregators killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op != "contribute"])
def test_as_many_as_the_stage_allows_are_killed_and_the_sum_is_right(exact, operation):
    coordinator = FleetCoordinator(exact)
    made = coordinator.uploads()
    victims = [2, 5] if operation == "answer" else [2]
    for index in victims:
        coordinator.kill_at(index, operation)
    found = coordinator.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert set(found.measurements["answered"]).isdisjoint(victims)
    coordinator.revive(*victims)
    np.testing.assert_array_equal(coordinator.run(made).sums[0], plain_sum(made))
    coordinator.secure.close()


@pytest.mark.parametrize("operation", ["deliver", "contribute", "commit"])
def test_one_more_and_nothing_is_released_until_they_are_back(noisy, operation):
    coordinator = FleetCoordinator(noisy)
    made = coordinator.uploads()
    for index in (1, 4):
        coordinator.kill_at(index, operation)
    with pytest.raises(NotEnoughAggregators) as caught:
        coordinator.run(made)
    assert caught.value.live == (2, 3, 5)
    assert all("answer" not in port.calls for port in coordinator.ports)
    coordinator.revive(1, 4)
    coordinator.replace()
    found = coordinator.run(made)
    assert found.counted[0] == tuple(u.header.report_id for u in made)
    assert noisy.charges(coordinator.round_id) == [1] * 5
    coordinator.secure.close()


def test_all_are_killed_between_signing_and_answering_and_give_the_same_answers_later(noisy):
    coordinator = FleetCoordinator(noisy)
    made = coordinator.uploads()
    first = coordinator.run(made)
    for index in noisy.indices:
        noisy.kill(index)
    with pytest.raises(NotEnoughAggregators, match="open a sum takes 3 aggregators, 0 take part"):
        coordinator.run(made)
    coordinator.revive(*noisy.indices)
    np.testing.assert_array_equal(coordinator.run(made).sums[0], first.sums[0])
    assert noisy.charges(coordinator.round_id) == [1] * 5
    coordinator.secure.close()


# --- one aggregator answers something else -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["garbage", "replay", "stale set"])
def test_one_that_answers_wrongly_is_not_believed(exact, kind):
    """A relay before aggregator 4: what it answers is noise, its answer to an earlier round, or for an earlier set."""
    honest = exact.processes.ports[3].url
    answers: list[bytes] = []

    def answer(request: Request) -> Answer:
        given = proxy(honest, lambda r: r.body)(request)
        if not request.path.endswith(("/answers", "/commits")):
            return given
        if kind == "garbage":
            return Answer(body=os.urandom(300))
        if request.path.endswith("/commits" if kind == "stale set" else "/answers"):
            answers.append(given.body)
            return Answer(body=answers[0])
        return given

    with Server() as relay:
        relay.answer = answer
        coordinator = FleetCoordinator(exact)
        port = HttpAggregator(4, relay.url, exact.processes.coordinator, patience=QUICK)
        coordinator.port(4).port = port
        if kind != "garbage":
            coordinator.run(coordinator.uploads())
            coordinator.next_round()
        made = coordinator.uploads()
        found = coordinator.run(made)
        port.close()
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    wrong = {"garbage": "answered", "replay": "answered", "stale set": "signed"}[kind]
    assert found.measurements[wrong] == [1, 2, 3, 5]
    coordinator.secure.close()


# --- the coordinator killed --------------------------------------------------------------------------------------


class FileJournal:
    """One file per round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, round_id: int) -> str | None:
        path = self._folder / f"{round_id}.json"
        return path.read_text() if path.exists() else None

    def save(self, round_id: int, state_json: str) -> None:
        temporary = self._folder / "next"
        temporary.write_text(state_json)
        temporary.rename(self._folder / f"{round_id}.json")


def coordinate(folder: Path, urls: list[str], keys: Path, parameters_json: str, killed: str | None) -> None:
    """A coordinator process: reads the reports, runs the round, releases the sum; dies where it is told to."""
    from server_ref.secure.parameters import PinnedParameters  # noqa: PLC0415

    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731 - a point in time
    key, _ = create_coordinator_key(keys / COORDINATOR_FILE)
    peers = Peers.model_validate_json((keys / "peers.json").read_text())
    journal = FileJournal(folder)
    save = journal.save

    def saving(round_id: int, state_json: str) -> None:
        save(round_id, state_json)
        if json.loads(state_json)["phase"] == killed:
            die()

    journal.save = saving  # type: ignore[method-assign]
    ports = [HttpAggregator(i, url, key, patience=QUICK) for i, url in enumerate(urls, 1)]
    parameters = PinnedParameters.model_validate_json(parameters_json)
    secure = SecureRound(ports, peers, parameters, TASK, journal)
    sealed = [
        SealedReport(ShareHeader.model_validate_json(text), lambda i, p=path: p.with_suffix(f".{i}").read_bytes())
        for path in sorted(folder.glob("*.header"))
        for text in [path.read_text()]
    ]
    found = secure.run(int((folder / "round").read_text()), sealed)
    with (folder / "summed").open("ab") as file:
        file.write(found.sums[0].tobytes())
    if killed == "summed":
        die()
    (folder / "released").write_bytes(found.sums[0].tobytes())


@pytest.mark.parametrize("killed", ["checking", "contributing", "committing", "committed", "summed"])
def test_a_coordinator_killed_on_the_way_to_the_release_is_followed_by_one_release_and_one_charge(
    noisy, tmp_path, killed
):
    coordinator = FleetCoordinator(noisy)  # for its numbers only
    for upload in coordinator.uploads():
        path = tmp_path / f"{upload.header.report_id}.header"
        path.write_text(upload.header.model_dump_json())
        for index, ciphertext in enumerate(upload.ciphertexts, 1):
            path.with_suffix(f".{index}").write_bytes(ciphertext)
    (tmp_path / "round").write_text(str(coordinator.round_id))
    urls = [port.url for port in noisy.processes.ports]
    what = (tmp_path, urls, noisy.folder, noisy.parameters.model_dump_json())
    for dies_at, status in ((killed, -signal.SIGKILL), (None, 0)):
        process = FORK.Process(target=coordinate, args=(*what, dies_at))
        process.start()
        process.join()
        assert process.exitcode == status
        assert (tmp_path / "released").exists() == (dies_at is None)
    summed = np.frombuffer((tmp_path / "summed").read_bytes(), np.int64).reshape(-1, 6)
    assert len(summed) == (2 if killed == "summed" else 1)
    released = np.frombuffer((tmp_path / "released").read_bytes(), np.int64)
    assert (summed == released).all()
    assert noisy.charges(coordinator.round_id) == [1] * 5
    coordinator.secure.close()


# --- a coordinator that lies -------------------------------------------------------------------------------------


def test_a_lying_coordinator_is_refused(noisy):
    numbers = FleetCoordinator(noisy)
    round_id, made = numbers.round_id, numbers.uploads(4)
    noisy.deliver(made, round_id)
    honest = noisy.parameters.round_parameters()

    lowered = honest.model_copy(update={"noise_multiplier": 0.5})
    with pytest.raises(ParametersBelowPinned, match="noise_multiplier"):
        noisy[1].contribute(noisy.statement(made, round_id=round_id, parameters=lowered))
    with pytest.raises(ContributorsRefused):
        noisy[1].contribute(noisy.statement(made, round_id=round_id, contributors=(1, 2)))
    with pytest.raises(CohortTooSmall):
        noisy[1].contribute(noisy.statement(made[:1], round_id=round_id))

    # Replaced noise: the relay seals and signs its own, leaves some out, or swaps them.
    statement = noisy.statement(made, round_id=round_id)
    noise = noisy.contributions(statement)
    own = noisy.processes.coordinator.sign
    for forged in (
        [
            NoiseShare(n.header.model_copy(update={"signature": own(n.header.signed_bytes())}), n.sealed[0])
            for n in noise
        ],
        [replace(n.for_receiver(1), sealed=n.sealed[1]) for n in noise],
        [n.for_receiver(1) for n in noise[1:]],
        [n.for_receiver(1) for n in [noise[0], *noise[:4]]],
    ):
        with pytest.raises(NoiseRejected):
            noisy[1].commit(statement, forged)

    # Different contributor sets, and different sets, for different aggregators.
    signed = noisy.commit(statement, noise, by=[1, 2, 3])
    without_victim = noisy.statement(made[1:], round_id=round_id, run=1)
    fewer = noisy.statement(made, round_id=round_id, run=2, contributors=(3, 4, 5))
    for other in (without_victim, fewer):
        with pytest.raises(RoundCommitted):
            noisy[3].contribute(other)
        with pytest.raises((RoundCommitted, StaleRun)):
            noisy[3].commit(other, [n.for_receiver(3) for n in noise])
    with pytest.raises(QuorumMissing, match="3 aggregators have signed"):
        noisy[1].answer(round_id, signed)

    # A commit replayed: another round's signatures, and the same ones twice.
    everybody = noisy.commit(statement, noise)
    more = numbers.uploads(3)
    noisy.deliver(more, round_id + 10**6)
    later = noisy.statement(more, round_id=round_id + 10**6)
    noisy.commit(later)
    for replayed in (everybody, [signed[0]] * 5):
        with pytest.raises(QuorumMissing):
            noisy[1].answer(round_id + 10**6, replayed)
    with pytest.raises(ReportSpent):
        noisy[1].contribute(noisy.statement(made, round_id=round_id + 10**6 + 1))
    assert noisy.charges(round_id) == [1] * 5
    numbers.secure.close()


@pytest.mark.parametrize("safe", [False, True], ids=["small quorum", "safe quorum"])
def test_what_two_views_of_a_round_would_give_away(tmp_path, safe):
    """Four processes, threshold two: two of them are shown all reports, and the other two all but the victim's.

    With a quorum of two the difference of both sums is the victim's update. A quorum of three does not form twice.
    """
    quorum = {} if safe else {"quorum": 2, "assume_consistent_coordinator": True}
    fleet = Fleet(tmp_path, pinned(num_aggregators=4, threshold=2, privacy=None, **quorum))
    made = fleet.uploads(range(5))
    views = {(1, 2): fleet.statement(made), (3, 4): fleet.statement(made[:-1])}
    opened = []
    for who, statement in views.items():
        signatures = fleet.commit(statement, by=who)
        with contextlib.suppress(QuorumMissing):
            opened.append(fleet.open(fleet.answers(0, signatures, by=who))[0])
    fleet.close()
    if safe:
        assert opened == []
    else:
        np.testing.assert_array_equal(opened[0] - opened[1], made[-1].codes)


# --- keys --------------------------------------------------------------------------------------------------------


def test_after_a_change_of_all_keys_old_shares_do_not_open_and_new_rounds_do(tmp_path):
    fleet = Fleet(tmp_path, pinned(num_aggregators=3, threshold=2, privacy=LONG_RUN))
    before = FleetCoordinator(fleet)
    before.run(before.uploads())
    sealed_to_old_keys = before.uploads()
    before.secure.close()
    fleet.rotate_keys()
    after = FleetCoordinator(fleet)
    with pytest.raises(CohortTooSmall):
        after.run(sealed_to_old_keys)
    assert after.secure.run(after.round_id, reports(mixed := [*sealed_to_old_keys, *after.uploads()])).rejected == {
        upload.header.report_id: "unsealable" for upload in sealed_to_old_keys
    }
    assert len(mixed) == 6
    # The budget is the party's, not the key's.
    assert fleet.charges(before.round_id) == [1] * 3
    assert fleet.charges(after.round_id) == [1] * 3
    after.secure.close()
    fleet.close()


def test_who_is_at_the_address_of_another_does_not_answer_for_it(exact):
    coordinator = FleetCoordinator(exact)
    stranger = HttpAggregator(1, exact.processes.ports[1].url, exact.processes.coordinator, patience=QUICK)
    coordinator.port(1).port = stranger
    made: list[Upload] = coordinator.uploads()
    found = coordinator.run(made)
    assert 1 in found.measurements["missing"]
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    stranger.close()
    coordinator.secure.close()


def test_a_killed_process_is_unavailable_and_nothing_else(exact):
    exact.kill(3)
    with pytest.raises(AggregatorUnavailable, match="aggregator 3"):
        exact[3].describe()
    exact.revive(3)
    assert exact[3].describe().index == 3
