"""The simulator's transport against a real HTTP server that answers what each test wants."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from client_sdk.errors import BlobHashMismatch, InvalidReply, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import ServerBusy, StaleReport
from client_sdk.protocol.messages import AbandonRequest, CheckInRequest, EnrolRequest, Wait
from client_sdk.protocol.signing import verify_request
from client_sdk.transport import Transport
from simulator.loopback import LoopbackConnections, LoopbackTransport

IDENTITY = DeviceIdentity.from_private_bytes(bytes(range(32)))
WAIT = {"reply": {"status": "wait", "reason": "round-full", "retry": {"min_s": 1, "max_s": 2}}}


class Server:
    """Answers every request with ``status`` and ``body``; keeps what it was asked."""

    def __init__(self):
        self.status, self.body, self.hangs_up = 200, b"", False
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.status)
                self.send_header("content-length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)
                # Without a word: what an idle timeout does.
                self.close_connection = outer.hangs_up

            do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names that http.server calls

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, status, body):
        self.status, self.body = status, body if isinstance(body, bytes) else json.dumps(body).encode()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    with contextlib.closing(Server()) as running:
        yield running


@pytest.fixture
def transport(server):
    with contextlib.closing(LoopbackConnections(server.url)) as connections:
        yield LoopbackTransport(connections, IDENTITY)


def test_it_is_a_transport(transport):
    typed: Transport = transport
    assert typed.counters.requests == 0


def test_requests_are_signed_by_the_device(server, transport):
    server.answer(200, WAIT)
    assert isinstance(transport.check_in(CheckInRequest(num_samples=3)), Wait)
    ((method, path, headers, body),) = server.requests
    assert (method, path) == ("POST", "/v1/check-ins")
    verify_request(IDENTITY._key.public_key(), headers, method, path, body)


def test_enrolment_and_reports_go_where_the_protocol_says(server, transport):
    server.answer(200, {"device_id": IDENTITY.device_id, "server_key": "5" * 64})
    transport.enrol(EnrolRequest(public_key=IDENTITY.public_key.hex()))
    report_id = "a" * 32
    server.answer(200, {"status": "accepted", "report_id": report_id, "assignment_id": "b" * 32})
    assert transport.upload(report_id, memoryview(b"frame")).report_id == report_id
    server.answer(204, b"")
    transport.abandon("b" * 32, AbandonRequest())
    assert [(m, p) for m, p, *_ in server.requests] == [
        ("POST", "/v1/devices"),
        ("PUT", f"/v1/reports/{report_id}"),
        ("POST", f"/v1/assignments/{'b' * 32}/abandon"),
    ]
    assert server.requests[1][3] == b"frame"


def test_a_blob_is_checked_against_its_hash(server, transport):
    blob = bytes(1000)
    server.answer(200, blob)
    into = bytearray()
    transport.fetch(hashlib.sha256(blob).hexdigest(), into, max_bytes=1000)
    assert into == blob
    for sha256, limit, error in (
        ("0" * 64, 1000, BlobHashMismatch),
        (hashlib.sha256(blob).hexdigest(), 999, InvalidReply),
    ):
        fresh = bytearray()
        with pytest.raises(error):
            transport.fetch(sha256, fresh, max_bytes=limit)
        assert not fresh


def test_bytes_are_counted_both_ways(server, transport):
    server.answer(200, bytes(100))
    with contextlib.suppress(BlobHashMismatch):
        transport.fetch("0" * 64, bytearray(), max_bytes=1000)
    server.answer(200, {"status": "accepted", "report_id": "a" * 32, "assignment_id": "b" * 32})
    transport.upload("a" * 32, bytes(70))
    counters = transport.counters
    assert (counters.requests, counters.bytes_up, counters.bytes_down) == (2, 70, 100 + len(server.body))


@pytest.mark.parametrize(("error", "status"), [(StaleReport, 409), (ServerBusy, 503)])
def test_refusals_are_the_protocols_own_errors(server, transport, error, status):
    problem = {"type": f"urn:pocketfed:problem:{error.slug}", "title": error.title, "status": status, "detail": "why"}
    server.answer(status, {**problem, "retry": {"min_s": 3, "max_s": 4}})
    with pytest.raises(error, match="why") as raised:
        transport.upload("a" * 32, b"frame")
    assert raised.value.retry_after_s == (3, 4)


def test_a_refusal_without_a_problem_is_not_the_protocol(server, transport):
    server.answer(500, b"<html>oops</html>")
    with pytest.raises(InvalidReply, match="answered 500"):
        transport.check_in(CheckInRequest(num_samples=3))


def test_a_connection_that_was_closed_while_idle_is_opened_again(server, transport):
    server.answer(200, WAIT)
    server.hangs_up = True
    for _ in range(3):
        assert isinstance(transport.check_in(CheckInRequest(num_samples=3)), Wait)


def test_a_server_that_is_gone_is_unavailable(server, transport):
    server.answer(200, WAIT)
    server.hangs_up = True
    transport.check_in(CheckInRequest(num_samples=3))
    server.close()
    with pytest.raises(TransportUnavailable, match="/v1/check-ins"):
        transport.check_in(CheckInRequest(num_samples=3))


def test_every_thread_has_a_connection_of_its_own(server, transport):
    server.answer(200, WAIT)
    barrier = threading.Barrier(4)
    replies = []

    def check_in():
        barrier.wait(10)
        replies.append(transport.check_in(CheckInRequest(num_samples=3)))

    threads = [threading.Thread(target=check_in) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(replies) == 4
