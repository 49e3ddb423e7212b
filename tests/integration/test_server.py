"""The server over real HTTP: a round's life, every refusal, and what never costs the round anything."""

from __future__ import annotations

import json
import math
import secrets
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest

from client_sdk.protocol.errors import PROBLEM_PREFIX
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, Finished, ModelReply, VirtualTiming, Wait
from client_sdk.protocol.program import Manifest
from tests.servers import RawDevice, get_json, report_facts, running_server, start_server, write_config


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """Validation data for the softmax bundle."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "validation.npz"
    np.savez(path, x=rng.standard_normal((21, 6)).astype(np.float32), y=rng.integers(0, 3, 21))
    return path


@pytest.fixture
def server(tmp_path, softmax_bundle):
    with running_server(write_config(tmp_path, softmax_bundle, rounds=50)) as running:
        yield running


@pytest.fixture(scope="session")
def size(softmax_bundle) -> int:
    """Number of parameters."""
    return Manifest.from_json((softmax_bundle / "manifest.json").read_bytes()).num_parameters


def problem(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json", response.text
    body = response.json()
    assert body["status"] == response.status_code
    return body["type"].removeprefix(PROBLEM_PREFIX)


def fill_round(server, size: int, values=(0.5, -0.25)) -> None:
    """Two good devices complete the open round."""
    devices = [RawDevice(server.url).enrol() for _ in values]
    assigned = [d.assigned() for d in devices]
    for device, assignment, value in zip(devices, assigned, values, strict=True):
        assert device.upload(assignment, np.full(size, value, np.float32)).status_code == 200


def test_reports_become_the_weighted_mean_added_to_the_model(tmp_path, softmax_bundle, size, examples):
    rng = np.random.default_rng(1)
    config = write_config(
        tmp_path,
        softmax_bundle,
        rounds=1,
        buffer_size=3,
        weight_cap=20,
        validation_data=str(examples),
        optimizer={"learning_rate": 0.5},
    )
    with running_server(config) as server:
        devices = [RawDevice(server.url).enrol() for _ in range(3)]
        assigned = [d.assigned(n) for d, n in zip(devices, (5, 12, 4000), strict=True)]
        assert [a.weight for a in assigned] == [5, 12, 20], "the cap is public"
        before = devices[0].weights(assigned[0])
        updates = rng.standard_normal((3, size)).astype(np.float32)
        for i in (2, 0, 1):
            assert devices[i].upload(assigned[i], updates[i]).json()["status"] == "accepted"
        finished = devices[0].check_in()
        assert finished == Finished(model_version=1)

        task = get_json(server.url, "/v1/task")
        frame = httpx.get(f"{server.url}/v1/blobs/{task['model_sha256']}", trust_env=False).content
        after = np.frombuffer(frame[8 + int.from_bytes(frame[:8], "little") :], np.float32)
        products = updates.astype(np.float64) * np.array([[5.0], [12.0], [20.0]])
        mean = np.array([math.fsum(column) / 37 for column in products.T])
        expected = (before.astype(np.float64) + 0.5 * mean).astype(np.float32)
        assert after.tobytes() == expected.tobytes()

        [committed] = get_json(server.url, "/v1/rounds")
        assert committed["reports"] == 3
        assert committed["total_weight"] == 37
        assert committed["model_sha256"] == task["model_sha256"]
        assert committed["train_loss"] == pytest.approx(0.5)


def test_every_new_model_is_evaluated_through_the_exported_program(tmp_path, softmax_bundle, size, examples):
    config = write_config(tmp_path, softmax_bundle, rounds=1, validation_data=str(examples))
    with running_server(config) as server:
        fill_round(server, size)
        # The server finishes its evaluations before it stops; then a new process reads them back.
        server.process.terminate()
        server.wait()
    with running_server(config) as server:
        [committed] = get_json(server.url, "/v1/rounds")
        assert 0.0 <= committed["validation_accuracy"] <= 1.0
        assert committed["validation_loss"] > 0.0


def test_a_bad_report_is_refused_by_type_and_the_round_goes_on(server, size):
    device = RawDevice(server.url).enrol()
    assignment = device.assigned()
    good = np.full(size, 0.5, np.float32)
    facts = report_facts(assignment)

    def send(tensors, metadata=facts, *, raw: bytes | None = None) -> str:
        body = encode_frame(tensors, metadata) if raw is None else raw
        return problem(device.send("PUT", f"/v1/reports/{facts['report_id']}", body))

    frame = encode_frame({REPORT_TENSOR: good}, facts)
    header = 8 + int.from_bytes(frame[:8], "little")
    nan, infinite, huge = good.copy(), good.copy(), good.copy()
    nan[1], infinite[2], huge[3] = np.nan, -np.inf, 1e9
    refused = {
        "truncated": send({}, raw=frame[:-1]),
        "header-cut": send({}, raw=frame[: header // 2]),
        "empty": send({}, raw=b""),
        "noise": send({}, raw=b"\xff" * 64),
        "trailing": send({}, raw=frame + b"\x00"),
        "json": send({}, raw=json.dumps(good.tolist()).encode()),
        "nan": send({REPORT_TENSOR: nan}),
        "infinite": send({REPORT_TENSOR: infinite}),
        "out-of-range": send({REPORT_TENSOR: huge}),
        "short": send({REPORT_TENSOR: good[:-1]}),
        "matrix": send({REPORT_TENSOR: good.reshape(1, -1)}),
        "float64": send({REPORT_TENSOR: good[:4].astype(np.float64)}),
        "other-name": send({"weights": good}),
        "no-facts": send({REPORT_TENSOR: good}, {}),
        "other-version": send({REPORT_TENSOR: good}, facts | {"model_version": "7"}),
        "other-table": send({REPORT_TENSOR: good}, facts | {"parameter_table_sha256": "0" * 64}),
        "gradient": send({REPORT_TENSOR: good}, facts | {"kind": "gradient"}),
        "other-report": send({REPORT_TENSOR: good}, facts | {"report_id": secrets.token_hex(16)}),
        "other-assignment": send({REPORT_TENSOR: good}, facts | {"assignment_id": secrets.token_hex(16)}),
    }
    assert refused == {
        "truncated": "truncated-frame",
        "header-cut": "truncated-frame",
        "empty": "truncated-frame",
        "noise": "oversized-body",
        "trailing": "malformed-frame",
        "json": "oversized-body",
        "nan": "non-finite-update",
        "infinite": "non-finite-update",
        "out-of-range": "update-out-of-range",
        "short": "shape-mismatch",
        "matrix": "shape-mismatch",
        "float64": "shape-mismatch",
        "other-name": "shape-mismatch",
        "no-facts": "malformed-message",
        "other-version": "report-mismatch",
        "other-table": "report-mismatch",
        "gradient": "report-mismatch",
        "other-report": "report-mismatch",
        "other-assignment": "unknown-assignment",
    }
    assert device.upload(assignment, good).status_code == 200
    fill_round_with_one_more(server, size)
    assert get_json(server.url, "/v1/task")["model_version"] == 1


def fill_round_with_one_more(server, size: int) -> None:
    device = RawDevice(server.url).enrol()
    assert device.upload(device.assigned(), np.zeros(size, np.float32)).status_code == 200


def test_ten_gigabytes_declared_are_refused_before_they_are_read(server):
    host, port = server.url.removeprefix("http://").split(":")
    lines = [
        f"PUT /v1/reports/{'a' * 32} HTTP/1.1",
        f"Host: {host}",
        f"Content-Length: {10 * 2**30}",
        "Connection: close",
    ]
    head = "\r\n".join([*lines, "", ""])
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "urn:pocketfed:problem:oversized-body" in answer
    assert get_json(server.url, "/health") == {"status": "ok"}


def test_a_body_cut_short_leaves_the_server_well(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"PUT /v1/reports/{'a' * 32} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 200\r\n\r\n"
    for sent in (0, 1, 199):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head.encode() + b"x" * sent)
    assert get_json(server.url, "/health") == {"status": "ok"}


def test_the_same_report_a_hundred_times_counts_once(server, size):
    device = RawDevice(server.url).enrol()
    assignment = device.assigned()
    facts = report_facts(assignment)
    body = encode_frame({REPORT_TENSOR: np.ones(size, np.float32)}, facts)
    answers = {device.send("PUT", f"/v1/reports/{facts['report_id']}", body).text for _ in range(100)}
    assert len(answers) == 1, "every repetition gets the same answer"
    assert get_json(server.url, "/v1/task")["model_version"] == 0
    fill_round_with_one_more(server, size)
    # Also after its round: a device whose acknowledgement was lost asks until it hears it.
    assert device.send("PUT", f"/v1/reports/{facts['report_id']}", body).text in answers
    assert get_json(server.url, "/v1/rounds")[0]["reports"] == 2


def test_two_devices_with_one_identity_share_one_assignment_and_one_report(server, size):
    first = RawDevice(server.url).enrol()
    second = RawDevice(server.url, key=first.key).enrol()
    assignment = first.assigned()
    assert second.assigned().assignment_id == assignment.assignment_id
    assert first.upload(assignment, np.ones(size, np.float32)).status_code == 200
    assert problem(second.upload(assignment, np.full(size, 9.0, np.float32))) == "duplicate-report"
    assert second.check_in() == first.check_in()
    assert isinstance(first.check_in(), Wait)


def test_requests_that_the_device_did_not_sign_are_refused(server, size):
    device, stranger = RawDevice(server.url).enrol(), RawDevice(server.url)
    assignment = device.assigned()
    body = encode_frame({REPORT_TENSOR: np.ones(size, np.float32)}, report_facts(assignment))
    path = f"/v1/reports/{report_facts(assignment)['report_id']}"
    assert problem(httpx.put(server.url + path, content=body, trust_env=False)) == "authentication-failed"
    assert problem(stranger.send("PUT", path, body)) == "unknown-device"
    assert problem(device.send("PUT", path, body, {"content-digest": "sha-256=:AAAA:"})) == "body-altered"
    forged = device.send("PUT", path, body, {"signature": "sig1=:" + "A" * 86 + "==:"})
    assert problem(forged) == "authentication-failed"
    other = RawDevice(server.url).enrol()
    assert problem(other.upload(assignment, np.ones(size, np.float32))) == "unknown-assignment"


def test_enrolment_needs_proof_of_the_key(server):
    victim, thief = RawDevice(server.url), RawDevice(server.url)
    body = json.dumps({"public_key": victim.public_key.hex()}).encode()
    assert problem(thief.send("POST", "/v1/devices", body)) == "authentication-failed"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "malformed-message"),
        (b"{", "malformed-message"),
        (b'{"num_samples": 0}', "malformed-message"),
        (b'{"num_samples": 10, "model_version": 3}', "malformed-message"),
        (b'{"num_samples": 10, "protocol_version": 2}', "malformed-message"),
        (b'{"num_samples": 10, "virtual": {"now_s": 1.0, "duration_s": 2.0}}', "malformed-message"),
        (b'{"num_samples": 10, "x": "' + b"x" * 70000 + b'"}', "oversized-body"),
    ],
)
def test_check_ins_that_do_not_fit_are_refused(server, body, expected):
    assert problem(RawDevice(server.url).enrol().send("POST", "/v1/check-ins", body)) == expected


def test_the_newest_model_is_told_to_whoever_is_enrolled_and_signs(server, size):
    device = RawDevice(server.url)
    assert problem(device.send("GET", "/v1/model", b"")) == "unknown-device"
    assert problem(httpx.get(f"{server.url}/v1/model", trust_env=False)) == "authentication-failed"
    device.enrol()
    assert problem(device.send("GET", "/v1/model", b"{}")) == "body-altered"
    first = ModelReply.model_validate_json(device.send("GET", "/v1/model", b"").content)
    assert first.model_version == 0
    fill_round(server, size)
    second = ModelReply.model_validate_json(device.send("GET", "/v1/model", b"").content)
    assert second.model_version == 1
    assert second.model_sha256 != first.model_sha256
    rounds = get_json(server.url, "/v1/rounds")
    assert second.model_sha256 == rounds[-1]["model_sha256"]


def test_an_abandoned_assignment_is_replaced_and_its_report_refused(server, size):
    device = RawDevice(server.url).enrol()
    assignment = device.assigned()
    for _ in range(2):
        answer = device.send("POST", f"/v1/assignments/{assignment.assignment_id}/abandon", b'{"reason":"user"}')
        assert answer.status_code == 204
    assert problem(device.upload(assignment, np.ones(size, np.float32))) == "stale-report"
    assert device.assigned().assignment_id != assignment.assignment_id


def test_a_straggler_is_told_that_its_round_is_over(tmp_path, softmax_bundle, size):
    with running_server(write_config(tmp_path, softmax_bundle, concurrency=3, refill_at=3)) as server:
        straggler = RawDevice(server.url).enrol()
        late = straggler.assigned()
        fill_round(server, size)
        assert problem(straggler.upload(late, np.full(size, np.nan, np.float32))) == "stale-report"
        assert straggler.assigned().model_version == 1


def test_blobs_come_by_hash_in_ranges_and_once(server):
    device = RawDevice(server.url).enrol()
    url = f"{server.url}/v1/blobs/{device.assigned().program_sha256}"
    whole = device.client.get(url)
    assert whole.headers["etag"] in url.join('""') or whole.headers["etag"].strip('"') in url
    part = device.client.get(url, headers={"range": "bytes=100-"})
    assert part.status_code == 206
    assert part.content == whole.content[100:]
    assert part.headers["content-range"] == f"bytes 100-{len(whole.content) - 1}/{len(whole.content)}"
    assert device.client.get(url, headers={"range": "bytes=0-9"}).content == whole.content[:10]
    assert device.client.get(url, headers={"range": "bytes=-5"}).content == whole.content[-5:]
    assert problem(device.client.get(url, headers={"range": "bytes=99999999-"})) == "range-not-satisfiable"
    assert device.client.get(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    assert problem(device.client.get(f"{server.url}/v1/blobs/{'0' * 64}")) == "unknown-blob"
    assert problem(device.client.get(f"{server.url}/v1/blobs/..%2F..%2Fpocketfed.db")) in {"unknown-blob", "not-found"}


def test_a_full_disk_refuses_reports_and_the_round_goes_on_when_there_is_room(tmp_path, softmax_bundle, size):
    config = write_config(tmp_path, softmax_bundle, blob_quota_bytes=1)
    with running_server(write_config(tmp_path, softmax_bundle)) as server:
        device = RawDevice(server.url).enrol()
        assignment = device.assigned()
    write_config(tmp_path, softmax_bundle, blob_quota_bytes=1)
    with running_server(config) as server:
        device.url = server.url
        answer = device.upload(assignment, np.ones(size, np.float32))
        assert problem(answer) == "storage-unavailable"
        assert answer.status_code == 507
        assert int(answer.headers["retry-after"]) > 0
    write_config(tmp_path, softmax_bundle)
    with running_server(config) as server:
        device.url = server.url
        assert device.upload(assignment, np.ones(size, np.float32)).status_code == 200
        fill_round_with_one_more(server, size)
        assert get_json(server.url, "/v1/task")["model_version"] == 1


def test_a_data_directory_belongs_to_one_task(tmp_path, softmax_bundle, size):
    with running_server(write_config(tmp_path, softmax_bundle, rounds=1)) as server:
        fill_round(server, size)
        assert get_json(server.url, "/v1/task")["finished"]
    config = write_config(tmp_path, softmax_bundle, weight_cap=7)
    with pytest.raises(RuntimeError, match="holds another task; it differs in weight_cap"), running_server(config):
        pass
    # More rounds are the same task: it goes on.
    with running_server(write_config(tmp_path, softmax_bundle, rounds=2)) as server:
        assert RawDevice(server.url).enrol().assigned().model_version == 1


def test_a_plan_that_the_bundle_cannot_train_is_refused_at_start(tmp_path, softmax_bundle):
    config = write_config(tmp_path, softmax_bundle, plan={"batch_size": 7})
    with pytest.raises(RuntimeError, match=r"task.plan.batch_size: .* cannot train with batch size 7"):
        start_server(config)


def test_health_readiness_and_metrics(server, size):
    fill_round(server, size)
    assert get_json(server.url, "/health") == {"status": "ok"}
    assert get_json(server.url, "/ready") == {"status": "ready"}
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    assert 'pocketfed_reports_total{outcome="accepted"} 2.0' in text
    assert "pocketfed_round 1.0" in text
    assert "pocketfed_devices 2.0" in text
    assert 'pocketfed_http_requests_total{route="/v1/reports/{report_id}",status="200"} 2.0' in text
    assert 'pocketfed_http_requests_total{route="/v1/check-ins",status="200"} 2.0' in text


def test_metrics_labels_stay_bounded_whatever_a_client_asks_for(server):
    for i in range(5):
        httpx.get(f"{server.url}/nothing/{i}", trust_env=False)
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    assert 'pocketfed_http_requests_total{route="unmatched",status="404"} 5.0' in text


def test_the_api_describes_itself(server):
    document = get_json(server.url, "/openapi.json")
    routes = {"/v1/devices", "/v1/check-ins", "/v1/model", "/v1/reports/{report_id}", "/v1/blobs/{sha256}"}
    assert routes <= set(document["paths"])
    references = {value for value in _strings(document) if value.startswith("#/components/schemas/")}
    assert {r.rsplit("/", 1)[-1] for r in references} <= set(document["components"]["schemas"])
    assert document["paths"]["/v1/check-ins"]["post"]["requestBody"]["content"]["application/json"]["example"]


def _strings(node: object) -> list[str]:
    if isinstance(node, dict):
        return [s for value in node.values() for s in _strings(value)]
    if isinstance(node, list):
        return [s for value in node for s in _strings(value)]
    return [node] if isinstance(node, str) else []


def test_the_server_leaves_with_its_parent(tmp_path, softmax_bundle):
    with running_server(write_config(tmp_path, softmax_bundle)) as server:
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.wait() is not None


def test_no_torch_in_a_server_that_evaluates(tmp_path, softmax_bundle, size, examples):
    config = write_config(tmp_path, softmax_bundle, rounds=1, validation_data=str(examples))
    with running_server(config) as server:
        fill_round(server, size)
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "executorch" in maps or "pocketfed" in maps


class TestVirtualClock:
    """A server built with the virtual clock takes the time from its devices, and only then."""

    def test_wall_clock_check_ins_are_refused(self, tmp_path, softmax_bundle):
        with running_server(write_config(tmp_path, softmax_bundle, clock="virtual")) as server:
            device = RawDevice(server.url).enrol()
            assert problem(device.send("POST", "/v1/check-ins", b'{"num_samples": 3}')) == "malformed-message"

    def test_the_earliest_virtual_arrivals_make_the_model(self, tmp_path, softmax_bundle, size):
        config = write_config(tmp_path, softmax_bundle, clock="virtual", concurrency=3, refill_at=3)
        with running_server(config) as server:
            devices = [RawDevice(server.url).enrol() for _ in range(3)]
            replies = [
                d.check_in(virtual=VirtualTiming(now_s=0.0, duration_s=s))
                for d, s in zip(devices, (30.0, 10.0, 20.0), strict=True)
            ]
            before = devices[0].weights(replies[0].assignment)
            for i, value in ((0, 100.0), (1, 1.0), (2, 3.0)):
                devices[i].upload(replies[i].assignment, np.full(size, value, np.float32)).raise_for_status()
            again = devices[1].check_in(virtual=VirtualTiming(now_s=25.0, duration_s=1.0))
            assert again.assignment.model_version == 1
            assert np.array_equal(devices[1].weights(again.assignment), before + np.float32(2.0))
            [committed] = get_json(server.url, "/v1/rounds")
            assert (committed["closed_at_s"], committed["discarded"]) == (20.0, 1)
