"""The aggregator's HTTP service: whom it serves, what it reads, what it says of itself; and its client's manners."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, OversizedBody, ServerBusy, StorageUnavailable
from server_ref.secure import wire
from server_ref.secure.client import HttpAggregator, Patience
from server_ref.secure.distance_messages import DistanceRequest
from server_ref.secure.distance_opening import open_distances
from server_ref.secure.distances import distance_settings
from server_ref.secure.errors import AggregatorUnavailable, AnswerRejected, CohortTooSmall
from server_ref.secure.identity import SigningKey
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.zero_key_relay import keys_for
from tests.aggregator_http import COORDINATOR, AggregatorHost, begin, hosting, send, signed_headers
from tests.secure_parties import Parties, pinned, quick_store
from tests.secure_rounds import Coordinator, plain_sum
from tests.web import Answer, Request, Server, problem

STRANGER = SigningKey(bytes(32))


@pytest.fixture(scope="module")
def host() -> Iterator[AggregatorHost]:
    with hosting() as running:
        yield running


@pytest.fixture(scope="module")
def parties(tmp_path_factory, host) -> Iterator[Parties]:
    """Three of five over HTTP, without noise."""
    made = Parties(tmp_path_factory.mktemp("http"), pinned(privacy=None), open_store=quick_store, wrap=host.add)
    yield made
    made.close()


def problem_type(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()["type"].removeprefix("urn:pocketfed:problem:")


# --- the service -------------------------------------------------------------------------------------------------


def test_a_whole_round_over_http_gives_the_plain_sum_on_few_connections(parties, host):
    coordinator = Coordinator(parties)
    made = coordinator.uploads(4)
    before = len(host.connections)
    np.testing.assert_array_equal(coordinator.run(made).sums[0], plain_sum(made))
    coordinator.next_round()
    more = coordinator.uploads(4)
    np.testing.assert_array_equal(coordinator.run(more).sums[0], plain_sum(more))
    coordinator.secure.close()
    assert len(host.connections) - before <= 5, "connections are reused"


def test_projections_travel_over_http_too(tmp_path):
    with hosting() as own:
        parameters = pinned(num_aggregators=3, threshold=2, checking=CheckingMode.PROJECTIONS, privacy=None)
        parties = Parties(tmp_path, parameters, open_store=quick_store, wrap=own.add)
        coordinator = Coordinator(parties)
        made = coordinator.uploads()
        too_long = parties.upload(5, [parameters.bounds.norm_bound, 1, 0, 0, 0, 0])
        found = coordinator.run([*made, too_long])
        np.testing.assert_array_equal(found.sums[0], plain_sum(made))
        assert found.rejected == {too_long.header.report_id: "projections"}
        coordinator.secure.close()
        parties.close()


def test_distances_travel_over_http_too(tmp_path):
    with hosting() as own:
        parameters = pinned(
            num_aggregators=3, threshold=2, checking=CheckingMode.PROJECTIONS, distances=True, privacy=None
        )
        parties = Parties(tmp_path, parameters, open_store=quick_store, wrap=own.add)
        made = parties.uploads(range(3))
        request = DistanceRequest(task_id=parties.task.task_id, round_id=0, reports=tuple(u.ref for u in made))
        parties.challenge(made)
        dealt = {i: parties[i].deal_distance_keys(request) for i in parties.indices}
        answers = [parties[i].compare(request, keys_for(i, dealt)) for i in parties.indices]
        opened = open_distances(request, answers, distance_settings(parameters), parties.configs[0].signed)
        parties.close()
    expected = [int(((a.codes - b.codes) ** 2).sum()) for a, b in itertools.combinations(made, 2)]
    assert opened == expected


def test_reports_that_do_not_fit_into_one_request_are_sent_in_several(parties, monkeypatch):
    monkeypatch.setattr(wire, "DELIVERY_BYTES", 300)
    made = [parties.upload(9_000_000 + i) for i in range(9)]
    requests = []
    exchange = HttpAggregator._exchange
    monkeypatch.setattr(
        HttpAggregator, "_exchange", lambda self, *args: requests.append(args[1]) or exchange(self, *args)
    )
    verdicts = parties[4].deliver(0, [upload.share(4) for upload in made])
    assert [v.report_id for v in verdicts] == [u.header.report_id for u in made]
    assert all(v.ok for v in verdicts)
    assert requests.count("/deliveries") == 5


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"key": STRANGER}, 401, "authentication-failed"),
        ({"headers": {"signature": None, "signature-input": None}}, 401, "authentication-failed"),
        ({"headers": {"signature": "sig1=:AAAA:"}}, 401, "authentication-failed"),
        ({"headers": {"content-digest": None}}, 401, "authentication-failed"),
        ({"headers": {"content-digest": "sha-256=:AAAA:"}}, 401, "authentication-failed"),
        ({"sent": b'{"tampered":1}'}, 400, "body-altered"),
    ],
    ids=["stranger", "unsigned", "forged", "no digest", "other digest", "altered"],
)
def test_only_what_the_pinned_coordinator_signed_is_served(parties, host, changes, status, kind):
    body = parties.task.model_dump_json().encode()
    response = send(host.url, "POST", "/v1/aggregators/2/task", body, **changes)
    assert (response.status_code, problem_type(response)) == (status, kind)


def test_even_who_it_is_is_told_to_the_coordinator_only(host, parties):
    assert send(host.url, "GET", "/v1/aggregators/2").status_code == 200
    assert send(host.url, "GET", "/v1/aggregators/2", key=STRANGER).status_code == 401
    assert httpx.get(f"{host.url}/v1/aggregators/2", trust_env=False).status_code == 401


def test_a_request_that_was_signed_for_one_aggregator_says_nothing_to_another(host, parties):
    body = parties.task.model_dump_json().encode()
    signed = signed_headers("POST", "/v1/aggregators/1/task", body)
    for index, status in ((1, 200), (2, 401)):
        url = f"{host.url}/v1/aggregators/{index}/task"
        assert httpx.post(url, content=body, headers=signed, trust_env=False).status_code == status


def test_a_stranger_s_body_is_refused_before_it_is_read(host, parties):
    unsigned = {"content-length": "1000000"}
    assert "401" in begin(host.url, "POST", "/v1/aggregators/1/deliveries", unsigned)
    by_a_stranger = unsigned | signed_headers("POST", "/v1/aggregators/1/deliveries", b"", STRANGER)
    assert "401" in begin(host.url, "POST", "/v1/aggregators/1/deliveries", by_a_stranger)


@pytest.mark.parametrize(
    ("path", "size"),
    [("/deliveries", wire.DELIVERY_BYTES + 4 * 2**20), ("/answers", wire.CONTROL_LIMIT + 1), ("/task", 2**40)],
)
def test_bodies_are_bounded_by_what_the_operation_can_need(host, parties, path, size):
    path = "/v1/aggregators/1" + path
    headers = signed_headers("POST", path, b"") | {"content-length": str(size)}
    assert "413" in begin(host.url, "POST", path, headers)


def test_a_length_must_be_declared(host, parties):
    path = "/v1/aggregators/1/task"
    assert "422" in begin(host.url, "POST", path, signed_headers("POST", path, b""))


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/task", b"no json", "malformed-message"),
        ("/task", b'{"task_id": 3}', "malformed-message"),
        ("/answers", b'{"round_id": 1, "signatures": [], "more": 1}', "malformed-message"),
        ("/deliveries", b"none", "truncated-frame"),
        ("/commits", wire.pack(wire.DeliverReply(verdicts=()), []), "malformed-message"),
        ("/commits", wire.pack(wire.DeliverReply(verdicts=()), [b"x"])[:-1], "truncated-frame"),
    ],
    ids=["not json", "schema", "unknown field", "not a frame", "other control", "cut"],
)
def test_malformed_requests_get_a_stable_type(host, parties, path, body, kind):
    response = send(host.url, "POST", f"/v1/aggregators/1{path}", body)
    assert problem_type(response) == kind


def test_a_path_that_is_not_there_is_a_problem_too(host, parties):
    assert problem_type(send(host.url, "POST", "/v1/aggregators/1/nothing")) == "not-found"
    assert problem_type(send(host.url, "GET", "/v1/aggregators/1/task")) == "method-not-allowed"


def test_anybody_may_ask_whether_it_is_well_and_learns_no_name(host, parties):
    parties.deliver([parties.upload(9_100_000)])
    with pytest.raises(CohortTooSmall):
        parties[1].commit(parties.statement([parties.upload(9_100_000)], round_id=9_100_000), [])
    with httpx.Client(base_url=host.url, trust_env=False) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200
        metrics = client.get("/metrics").text
        paths = client.get("/openapi.json").json()["paths"]
    assert 'pocketfed_aggregator_reports_total{verdict="accepted"}' in metrics
    assert 'pocketfed_aggregator_refusals_total{type="cohort-too-small"} ' in metrics
    assert 'pocketfed_aggregator_requests_total{operation="/commits",status="409"}' in metrics
    assert parties.upload(9_100_000).header.report_id not in metrics
    assert parties.upload(9_100_000).header.device_id not in metrics
    assert set(paths) >= {f"/v1/aggregators/1{p}" for p in ("/task", "/deliveries", "/commits", "/answers")}
    schema = paths["/v1/aggregators/1/answers"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"round_id", "signatures"}


def test_an_aggregator_without_its_database_is_not_ready(tmp_path):
    with hosting() as own:
        parties = Parties(tmp_path, pinned(privacy=None), open_store=quick_store, live=[1], wrap=own.add)
        assert httpx.get(f"{own.url}/ready", trust_env=False).status_code == 200
        parties.close()
        (tmp_path / "aggregator-1" / "aggregator.db").unlink()
        (tmp_path / "aggregator-1" / "aggregator.db").mkdir()
        assert httpx.get(f"{own.url}/ready", trust_env=False).status_code == 503
        with pytest.raises(StorageUnavailable):
            parties[1].describe()


# --- the client ----------------------------------------------------------------------------------------------------


class Slept(list):
    """Remembers how long it was told to wait."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def scripted() -> Iterator:
    """A server that gives scripted answers, and a client for it."""
    with Server() as server:
        slept = Slept()
        patience = Patience(attempts=4, first_wait_s=1.0, longest_wait_s=3.0)
        client = HttpAggregator(3, server.url, COORDINATOR, patience=patience, sleep=slept)

        def play(*answers: Answer) -> Slept:
            left = list(answers)
            server.answer = lambda _: left.pop(0) if len(left) > 1 else left[0]
            slept.clear()
            return slept

        yield server, client, play
        client.close()


def info_of(parties: Parties) -> Answer:
    return Answer(body=parties[3].describe().model_dump_json().encode())


def test_what_is_lost_on_the_way_is_sent_again_with_growing_pauses(scripted, parties):
    server, client, play = scripted
    slept = play(Answer(status=0), Answer(503, b"busy"), problem(ServerBusy()), info_of(parties))
    assert client.describe().index == 3
    assert len(server.requests) == 4
    for pause, longest in zip(slept, (1.0, 2.0, 3.0), strict=True):
        assert longest / 2 <= pause <= longest
    bodies = {(r.path, r.headers["content-digest"]) for r in server.requests}
    assert len(bodies) == 1, "the same request each time"


def test_an_aggregator_that_never_answers_is_not_asked_again_at_once(scripted):
    server, _client, _play = scripted
    released = threading.Event()

    def never(_request: Request) -> Answer:
        released.wait()
        return Answer()

    server.answer = never
    with HttpAggregator(3, server.url, COORDINATOR, patience=Patience(reply_s=0.05, attempts=4)) as client:
        with pytest.raises(AggregatorUnavailable, match="timed out"):
            client.describe()
        released.set()
    assert len(server.requests) == 1


def test_tries_are_bounded(scripted):
    server, client, play = scripted
    slept = play(Answer(status=0))
    with pytest.raises(AggregatorUnavailable, match="aggregator 3 at http"):
        client.describe()
    assert (len(server.requests), len(slept)) == (4, 3)


def test_how_long_to_wait_may_be_said_by_the_aggregator_within_limits(scripted, parties):
    _server, client, play = scripted
    slept = play(
        problem(StorageUnavailable(), retry={"min_s": 2.5, "max_s": 5.0}),
        problem(StorageUnavailable(), retry={"min_s": 900.0, "max_s": 900.0}),
        info_of(parties),
    )
    client.describe()
    assert 1.25 <= slept[0] <= 2.5
    assert slept[1] <= 3.0


def test_a_refusal_is_not_tried_again(scripted, parties):
    server, client, play = scripted
    play(problem(CohortTooSmall("3 reports are fewer than the minimum of 100")))
    with pytest.raises(CohortTooSmall, match="fewer than the minimum"):
        client.bind(parties.task)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"no json"),
        Answer(body=b'{"index": 3}'),
        Answer(404, b"nothing here"),
        Answer(302, b"", {"location": "http://127.0.0.1:1/"}),
        Answer(400, b"[]", {"content-type": "application/problem+json"}),
        Answer(body=b"x" * (wire.CONTROL_LIMIT + 1)),
    ],
    ids=["not json", "schema", "not found", "redirect", "bad problem", "too long"],
)
def test_what_is_no_answer_in_this_protocol_is_not_tried_again(scripted, answer):
    server, client, play = scripted
    play(answer)
    with pytest.raises(AnswerRejected):
        client.describe()
    assert len(server.requests) == 1


def test_a_frame_that_is_none_is_the_aggregator_s_fault(scripted, parties):
    _server, client, play = scripted
    play(info_of(parties), Answer(body=b"garbage"))
    with pytest.raises(AnswerRejected, match="malformed"):
        client.answer(0, [])


def test_a_reply_is_bounded_by_what_the_task_can_need(scripted, parties):
    _server, client, play = scripted
    play(info_of(parties), Answer(body=bytes(2 * 2**20)))
    with pytest.raises(AnswerRejected, match="sent more than"):
        client.answer(0, [])


def test_nobody_at_the_address(scripted):
    client = HttpAggregator(1, "http://127.0.0.1:9", COORDINATOR, patience=Patience(attempts=1))
    with pytest.raises(AggregatorUnavailable):
        client.describe()
    client.close()


def test_a_delivery_of_too_many_is_refused_before_it_is_sent(scripted, parties):
    server, client, _play = scripted
    share = parties.upload(9_200_000).share(3)
    with pytest.raises(OversizedBody):
        client.deliver(0, [share] * 1025)
    assert server.requests == []


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://", "http://host/?q=1", "http://host:port"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigurationError):
        HttpAggregator(1, url, COORDINATOR)


def test_certificates_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="certificates"):
        HttpAggregator(1, "https://host", COORDINATOR, ca_file=tmp_path / "none.pem")


@pytest.mark.parametrize("changes", [{"attempts": 0}, {"connect_s": 0.0}, {"first_wait_s": -1.0}], ids=str)
def test_impatience_is_refused(changes):
    with pytest.raises(ConfigurationError):
        Patience(**changes)


def test_no_key_is_shown(scripted):
    _server, client, _play = scripted
    assert COORDINATOR.private_bytes().hex() not in repr(client) + json.dumps(repr(COORDINATOR))
