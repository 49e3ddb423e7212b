"""The HTTP transport against a small real server that answers as each test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client_sdk.errors import BlobHashMismatch, InvalidReply, ServerKeyChanged, TransportUnavailable, UntrustedReply
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import (
    AuthenticationFailed,
    ConfigurationError,
    ProtocolError,
    RangeNotSatisfiable,
    ServerBusy,
    StaleReport,
    UnknownAssignment,
    UnknownBlob,
    UnknownDevice,
)
from client_sdk.protocol.messages import (
    MAX_JSON_BYTES,
    AbandonRequest,
    Assigned,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    Finished,
    ModelReply,
    ReportReply,
)
from client_sdk.protocol.signing import device_id_of, signing_device, verify_request
from client_sdk.store import MemoryDeviceStore
from client_sdk.transport import HttpTransport, open_client
from server_ref.server_identity import ServerIdentity
from tests.devices import make_assignment, sha
from tests.web import Answer, Request, Server, problem

IDENTITY = DeviceIdentity.generate()
REPORT, ASSIGNMENT = "1" * 32, "2" * 32
LATEST = ModelReply.model_validate(make_assignment().model_dump(include=set(ModelReply.model_fields)), strict=False)
ACCEPTED = ReportReply(report_id=REPORT, assignment_id=ASSIGNMENT).model_dump_json().encode()


def enrolled(server: Server, **changes: str) -> bytes:
    """What the server says to an enrolment."""
    facts = {"device_id": IDENTITY.device_id, "server_key": server.identity.public_key}
    return EnrolReply(**facts | changes).model_dump_json().encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def transport(server: Server) -> Iterator[HttpTransport]:
    with HttpTransport(server.url, IDENTITY) as transport:
        yield transport


def test_requests_are_signed_by_the_device(server: Server, transport: HttpTransport):
    answers = {
        "/v1/devices": enrolled(server).decode(),
        "/v1/check-ins": json.dumps({"reply": Assigned(assignment=make_assignment()).model_dump(mode="json")}),
        "/v1/model": LATEST.model_dump_json(),
        f"/v1/reports/{REPORT}": ACCEPTED.decode(),
        f"/v1/assignments/{ASSIGNMENT}/abandon": "",
    }
    server.answer = lambda r: Answer(200 if answers[r.path] else 204, answers[r.path].encode())
    assert transport.enrol(EnrolRequest(public_key=IDENTITY.public_key.hex())).device_id == IDENTITY.device_id
    assert transport.check_in(CheckInRequest(num_samples=3)) == Assigned(assignment=make_assignment())
    assert transport.latest_model() == LATEST
    assert transport.upload(REPORT, b"frame") == ReportReply(report_id=REPORT, assignment_id=ASSIGNMENT)
    transport.abandon(ASSIGNMENT, AbandonRequest(reason="no-memory"))
    key = Ed25519PublicKey.from_public_bytes(IDENTITY.public_key)
    assert [r.path for r in server.requests] == list(answers)
    for request in server.requests:
        assert signing_device(request.headers) == device_id_of(IDENTITY.public_key)
        verify_request(key, request.headers, request.method, request.path, request.body)
    assert [r.method for r in server.requests] == ["POST", "POST", "GET", "PUT", "POST"]
    assert [r.body for r in server.requests[2:4]] == [b"", b"frame"]
    assert server.connections == 1, "one connection serves them all"


def test_a_prefix_in_the_address_is_part_of_the_signed_path(server: Server):
    server.answer = lambda _: Answer(body=ACCEPTED)
    with HttpTransport(server.url + "/fl/", IDENTITY) as transport:
        transport.upload(REPORT, b"frame")
    request = server.requests[0]
    assert request.path == f"/fl/v1/reports/{REPORT}"
    verify_request(
        Ed25519PublicKey.from_public_bytes(IDENTITY.public_key), request.headers, "PUT", request.path, b"frame"
    )


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_uploaded(server: Server, transport: HttpTransport, kind: type):
    server.answer = lambda _: Answer(body=ACCEPTED)
    transport.upload(REPORT, kind(b"frame"))
    assert server.requests[0].body == b"frame"


def test_bodies_are_counted_as_sent_and_received(server: Server, transport: HttpTransport):
    blob = bytes(100_000)
    server.answer = lambda r: Answer(body=blob if r.method == "GET" else ACCEPTED)
    transport.upload(REPORT, b"x" * 1000)
    transport.fetch(sha(blob), bytearray(), max_bytes=len(blob))
    counters = transport.counters
    assert (counters.requests, counters.bytes_up, counters.bytes_down) == (2, 1000, len(ACCEPTED) + len(blob))


def test_devices_share_a_client_and_its_connections(server: Server):
    server.answer = lambda _: Answer(body=ACCEPTED)
    with open_client(server.url, max_connections=1) as client:
        transports = [HttpTransport(server.url, DeviceIdentity.generate(), client=client) for _ in range(5)]
        for transport in transports:
            transport.upload(REPORT, b"frame")
            transport.close()
        assert len({signing_device(r.headers) for r in server.requests}) == 5
        assert server.connections == 1
        assert not client.is_closed


def test_a_refusal_comes_back_as_the_error_it_was(server: Server, transport: HttpTransport):
    server.answer = lambda _: problem(StaleReport("round 3 is over"))
    with pytest.raises(StaleReport, match="round 3 is over") as caught:
        transport.upload(REPORT, b"frame")
    assert caught.value.retry_after_s is None


def test_a_busy_server_says_when_to_come_back(server: Server, transport: HttpTransport):
    server.answer = lambda _: problem(ServerBusy("full"), retry={"min_s": 3, "max_s": 9})
    with pytest.raises(ServerBusy) as caught:
        transport.check_in(CheckInRequest(num_samples=1))
    assert caught.value.retry_after_s == (3, 9)
    assert caught.value.retryable


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_gateway_that_says_not_now_is_transient(server: Server, transport: HttpTransport, status: int):
    server.answer = lambda _: Answer(status, b"<html>sorry</html>", {"retry-after": "7"})
    with pytest.raises(TransportUnavailable, match=str(status)) as caught:
        transport.check_in(CheckInRequest(num_samples=1))
    assert caught.value.retry_after_s == (7, 14)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"<html>please log in</html>", {"content-type": "text/html"}),
        Answer(200, b""),
        Answer(200, b"[" * 10_000),
        Answer(200, b'{"reply": {"status": "assigned"}}'),
        Answer(200, b'{"reply": {"status": "finished", "model_version": 1, "extra": 1}}'),
        Answer(200, b"\xff" * 100),
        Answer(302, b"", {"location": "http://127.0.0.1:1/"}),
        Answer(404, b"nothing here"),
        Answer(400, b"{}", {"content-type": "application/problem+json"}),
        Answer(400, b"x", {"content-type": "application/problem+json"}),
        Answer(200, b"x" * (MAX_JSON_BYTES + 1)),
        Answer(200, b"x" * (MAX_JSON_BYTES + 1), {"transfer-encoding": "chunked"}),
        Answer(503, b"x" * (MAX_JSON_BYTES + 1), {"content-type": "application/problem+json"}),
        Answer(200, b"{}", {"content-encoding": "gzip"}),
    ],
    ids=lambda a: f"{a.status}-{a.body[:12]!r}-{len(a.body)}",
)
def test_what_does_not_speak_the_protocol_is_told_apart(server: Server, transport: HttpTransport, answer: Answer):
    server.answer = lambda _: answer
    with pytest.raises(InvalidReply):
        transport.check_in(CheckInRequest(num_samples=1))
    assert len(server.requests) == 1, "redirects are not followed, garbage is not asked for twice"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(200, LATEST.model_dump_json().encode(), signed=False), UntrustedReply),
        (Answer(200, b"{}"), InvalidReply),
        (Answer(200, LATEST.model_dump_json().replace("a" * 64, "../" + "a" * 61).encode()), InvalidReply),
        (Answer(200, LATEST.model_copy(update={"model_version": -1}).model_dump_json().encode()), InvalidReply),
        (Answer(200, LATEST.model_dump_json().replace('"fedavg"', '"maml"').encode()), InvalidReply),
        (Answer(200, b"[" * 60_000), InvalidReply),
        (Answer(200, b"x" * (MAX_JSON_BYTES + 1)), InvalidReply),
        (Answer(304, b"", signed=False), UntrustedReply),
    ],
    ids=lambda v: getattr(v, "__name__", None) or f"{v.status}-{len(v.body)}",
)
def test_whoever_says_which_model_is_the_newest_is_not_believed_blindly(
    server: Server, transport: HttpTransport, answer: Answer, error: type[Exception]
):
    server.answer = lambda _: answer
    with pytest.raises(error):
        transport.latest_model()
    assert len(server.requests) == 1


def test_another_servers_newest_model_is_not_taken(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(body=LATEST.model_dump_json().encode())
    assert transport.latest_model() == LATEST
    server.identity = ServerIdentity.generate()
    with pytest.raises(ServerKeyChanged):
        transport.latest_model()


def test_an_endless_reply_is_cut_off(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(200, bytes(50_000_000), {"transfer-encoding": "chunked"})
    with pytest.raises(InvalidReply, match="more than"):
        transport.check_in(CheckInRequest(num_samples=1))
    assert transport.counters.bytes_down < 1_000_000


def test_another_device_id_than_the_keys_is_refused(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(body=enrolled(server, device_id="0" * 32))
    with pytest.raises(InvalidReply, match="another device id"):
        transport.enrol(EnrolRequest(public_key=IDENTITY.public_key.hex()))


# --- whose reply it is ---


def check_in(transport: HttpTransport) -> object:
    return transport.check_in(CheckInRequest(num_samples=1))


FINISHED = b'{"reply": {"status": "finished", "model_version": 1}}'
REFUSALS = [StaleReport("over"), UnknownDevice("never heard of"), AuthenticationFailed("no"), UnknownAssignment("no")]


def test_the_first_signed_reply_decides_whose_server_it_is(server: Server):
    server.answer = lambda _: Answer(body=FINISHED)
    keys = MemoryDeviceStore()
    with HttpTransport(server.url, IDENTITY, server_keys=keys) as transport:
        assert check_in(transport) == Finished(model_version=1)
        assert keys.server_key() == server.identity.public_key
        server.identity = ServerIdentity.generate()
        with pytest.raises(ServerKeyChanged, match=server.identity.public_key) as caught:
            check_in(transport)
        assert not caught.value.retryable, "waiting does not bring the key back"


def test_a_key_that_the_app_brings_is_the_only_one(server: Server):
    server.answer = lambda _: Answer(body=FINISHED)
    with HttpTransport(server.url, IDENTITY, server_key=server.identity.public_key) as transport:
        assert check_in(transport) == Finished(model_version=1)
    with HttpTransport(server.url, IDENTITY, server_key="0" * 64) as transport, pytest.raises(ServerKeyChanged):
        check_in(transport)
    both = ["0" * 64, server.identity.public_key]
    with HttpTransport(server.url, IDENTITY, server_key=both) as transport:
        assert check_in(transport) == Finished(model_version=1), "while the server changes its key"
    for wrong in ("", "0" * 63, "F" * 64, "key", [], ["0" * 64, "x"]):
        with pytest.raises(ConfigurationError, match="64 lower-case hex digits"):
            HttpTransport(server.url, IDENTITY, server_key=wrong)


@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
def test_an_unsigned_reply_is_nobodys(server: Server, transport: HttpTransport, known: bool):
    server.answer = lambda _: Answer(body=FINISHED)
    if known:
        check_in(transport)
    server.answer = lambda _: Answer(body=FINISHED, signed=False)
    with pytest.raises(UntrustedReply, match="no signature") as caught:
        check_in(transport)
    assert caught.value.retryable


@pytest.mark.parametrize("error", REFUSALS, ids=lambda e: e.slug)
def test_an_unsigned_refusal_drops_nothing(server: Server, transport: HttpTransport, error: ProtocolError):
    """Whoever stands between could otherwise make a device forget a report, or stop for good."""
    answer = problem(error)
    server.answer = lambda _: answer
    with pytest.raises(type(error)):
        check_in(transport)
    answer.signed = False
    with pytest.raises(UntrustedReply, match=error.detail):
        check_in(transport)


def test_who_says_not_now_is_believed_but_not_for_long(server: Server, transport: HttpTransport):
    answer = problem(ServerBusy("full"), retry={"min_s": 10_000, "max_s": 1e9})
    server.answer = lambda _: answer
    with pytest.raises(ServerBusy) as caught:
        check_in(transport)
    assert caught.value.retry_after_s == (10_000, 1e9), "how long the device really waits is the session's business"
    answer.signed = False
    with pytest.raises(ServerBusy) as caught:
        check_in(transport)
    assert caught.value.retry_after_s == (3600, 3600)
    server.answer = lambda _: Answer(503, b"<html>", {"retry-after": "9999999"}, signed=False)
    with pytest.raises(TransportUnavailable) as caught_unavailable:
        check_in(transport)
    assert caught_unavailable.value.retry_after_s == (3600, 3600)


def test_a_reply_to_another_request_is_refused(server: Server, transport: HttpTransport):
    """A cache, or a thief of old replies: also where both requests say the same."""
    kept: list[dict[str, str]] = []

    def answer(request: Request) -> Answer:
        first = Answer(body=FINISHED)
        kept.append(server.signature(request, first))
        return first if len(kept) == 1 else Answer(body=FINISHED, headers=kept[0])

    server.answer = answer
    check_in(transport)
    with pytest.raises(UntrustedReply, match="does not verify"):
        check_in(transport)
    assert server.requests[0].body == server.requests[1].body


def test_another_status_than_the_signed_one_is_refused(server: Server, transport: HttpTransport):
    refused = problem(StaleReport("over"))

    def answer(request: Request) -> Answer:
        return Answer(200, refused.body, server.signature(request, refused))

    server.answer = answer
    with pytest.raises(UntrustedReply, match="does not verify"):
        transport.upload(REPORT, b"frame")


def test_the_key_named_at_enrolment_must_be_the_one_that_signs(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(body=enrolled(server, server_key="0" * 64))
    with pytest.raises(InvalidReply, match="another key"):
        transport.enrol(EnrolRequest(public_key=IDENTITY.public_key.hex()))


def test_nobody_listening_is_transient():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with HttpTransport(url, IDENTITY) as transport, pytest.raises(TransportUnavailable, match=url):
            transport.check_in(CheckInRequest(num_samples=1))


def test_a_server_that_never_answers_is_left(server: Server):
    release = threading.Event()

    def answer(_: Request) -> Answer:
        release.wait()
        return Answer(0)

    server.answer = answer
    try:
        with (
            open_client(server.url, read_timeout_s=0.05) as client,
            pytest.raises(TransportUnavailable, match="timed out"),
        ):
            HttpTransport(server.url, IDENTITY, client=client).check_in(CheckInRequest(num_samples=1))
    finally:
        release.set()
    assert len(server.requests) == 1, "a slow server is not asked twice at once"


def test_a_connection_closed_without_a_word_is_tried_once_more_at_once(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(0) if len(server.requests) == 1 else Answer(body=ACCEPTED)
    transport.upload(REPORT, b"frame")
    assert [r.body for r in server.requests] == [b"frame", b"frame"]
    assert (transport.counters.requests, transport.counters.bytes_up) == (2, 10)


def test_a_server_that_always_hangs_up_is_unavailable(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(0)
    with pytest.raises(TransportUnavailable):
        transport.upload(REPORT, b"frame")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://[::1", "127.0.0.1:8080", "http://x/?q=1", "http://x/#f", "http://a\x00b"]
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(url: str):
    with pytest.raises(ConfigurationError, match=r"URL|address"):
        HttpTransport(url, IDENTITY)


# --- downloads ---

BLOB = bytes(i % 251 for i in range(300_000))


def ranged(request: Request, blob: bytes = BLOB, cut: int | None = None) -> Answer:
    """A server that honours ranges."""
    asked = request.headers.get("range")
    if asked is None:
        return Answer(200, blob, cut=cut)
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start >= len(blob):
        return problem(RangeNotSatisfiable(f"the blob has {len(blob)} bytes"))
    return Answer(206, blob[start:], {"content-range": f"bytes {start}-{len(blob) - 1}/{len(blob)}"}, cut=cut)


def fetch(transport: HttpTransport, into: bytearray | None = None, *, max_bytes: int = len(BLOB)) -> bytearray:
    into = bytearray() if into is None else into
    transport.fetch(sha(BLOB), into, max_bytes=max_bytes)
    return into


def test_a_blob_is_fetched_unsigned_and_whole(server: Server, transport: HttpTransport):
    server.answer = ranged
    assert fetch(transport) == BLOB
    assert server.requests[0].path == f"/v1/blobs/{sha(BLOB)}"
    assert "signature" not in server.requests[0].headers


def test_a_cut_download_goes_on_where_it_was_cut(server: Server, transport: HttpTransport):
    server.answer = lambda r: ranged(r, cut=70_000)
    assert fetch(transport) == BLOB
    starts = [r.headers.get("range") for r in server.requests]
    assert starts == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]
    assert transport.counters.bytes_down == len(BLOB), "no byte came twice"


def test_a_chunked_download_that_lost_only_its_last_mark_is_complete(server: Server, transport: HttpTransport):
    def answer(request: Request) -> Answer:
        first = ranged(request, cut=len(BLOB))
        if first.status == 200:
            first.headers["transfer-encoding"] = "chunked"
        return first

    server.answer = answer
    assert fetch(transport) == BLOB
    assert server.requests[-1].headers["range"] == f"bytes={len(BLOB)}-"


def test_resuming_is_bounded_and_the_next_call_goes_on(server: Server, transport: HttpTransport):
    server.answer = lambda r: ranged(r, cut=10_000)
    into = bytearray()
    with pytest.raises(TransportUnavailable):
        fetch(transport, into)
    assert len(into) == 60_000
    server.answer = ranged
    fetch(transport, into)
    assert into == BLOB
    assert server.requests[-1].headers["range"] == "bytes=60000-"


DRIPPED = bytes(range(256)) * 256


class Drip:
    """A blob that comes piece by piece, and a clock by which each takes its time.

    A piece is sent when the device has looked at the clock after the one before. So both are in step, and nobody waits.
    """

    def __init__(self, size: int, seconds: Callable[[int], float]) -> None:
        self.size, self.seconds = size, seconds
        self.now, self.over = 0.0, False
        self.looked: list[threading.Semaphore] = []

    def monotonic(self) -> float:
        now = self.now
        self.looked[-1].release()
        return now

    def pieces(self, begin: int, looked: threading.Semaphore) -> Iterator[bytes]:
        for at in range(begin, len(DRIPPED), self.size):
            looked.acquire()
            if self.over or looked is not self.looked[-1]:
                return
            self.now += self.seconds(at)
            yield DRIPPED[at : at + self.size]

    def answer(self, request: Request) -> Answer:
        begin, size = int(request.headers.get("range", "bytes=0-")[6:-1]), len(DRIPPED)
        self.looked.append(threading.Semaphore(0))
        return Answer(
            206 if begin else 200,
            b"",
            {"content-range": f"bytes {begin}-{size - 1}/{size}"} if begin else {},
            pieces=self.pieces(begin, self.looked[-1]),
            length=size - begin,
        )

    def fetch(self, server: Server, into: bytearray) -> None:
        server.answer = self.answer
        try:
            with HttpTransport(server.url, IDENTITY, monotonic=self.monotonic) as transport:
                transport.fetch(sha(DRIPPED), into, max_bytes=len(DRIPPED))
        finally:
            self.over = True
            for looked in self.looked:
                looked.release()


@pytest.mark.parametrize("fast", [0, 32 * 1024])
def test_a_blob_that_only_drips_is_left_and_what_arrived_is_kept(server: Server, fast: int):
    """Each piece within the time of a read would hold a device for days; having been fast before buys no time."""
    drip, into = Drip(256, lambda at: 50.0 * (at >= fast)), bytearray()
    with pytest.raises(TransportUnavailable, match="drips"):
        drip.fetch(server, into)
    assert fast < len(into) <= fast + 6 * 2 * 256
    assert into == DRIPPED[: len(into)]
    assert drip.now <= 6 * 3 * 50, "asked again a few times, and left each time within minutes"
    Drip(4096, lambda _: 1.0).fetch(server, into)
    assert into == DRIPPED


def test_a_slow_network_with_stalls_is_not_taken_for_one_that_drips(server: Server):
    into = bytearray()
    Drip(1024, lambda at: 55.0 if at == 16 * 1024 else 0.95).fetch(server, into)
    assert into == DRIPPED
    assert len(server.requests) == 1


def test_no_progress_is_not_tried_again_at_once(server: Server, transport: HttpTransport):
    server.answer = lambda r: ranged(r, cut=0)
    with pytest.raises(TransportUnavailable):
        fetch(transport)
    assert len(server.requests) == 1


def test_a_server_without_ranges_starts_over(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(200, BLOB, cut=50_000 if len(server.requests) == 1 else None)
    assert fetch(transport) == BLOB


@pytest.mark.parametrize("content_range", [None, "bytes 5-9/10", "bytes x-y/z", "pages 1-2/3"])
def test_another_range_than_the_one_asked_for_is_refused(server: Server, transport: HttpTransport, content_range):
    headers = {} if content_range is None else {"content-range": content_range}
    server.answer = lambda _: Answer(206, BLOB[100:], headers)
    into = bytearray(BLOB[:100])
    with pytest.raises(InvalidReply, match="another range"):
        fetch(transport, into)
    assert into == b"", "the next attempt starts clean"


@pytest.mark.parametrize(
    "lie", [BLOB[:-1], BLOB + b"x", b"", bytes(len(BLOB))], ids=["short", "long", "empty", "zeros"]
)
def test_other_bytes_than_those_named_are_refused(server: Server, transport: HttpTransport, lie: bytes):
    server.answer = lambda r: ranged(r, lie)
    into = bytearray()
    with pytest.raises(BlobHashMismatch):
        fetch(transport, into, max_bytes=10**6)
    assert into == b""


def test_a_wrong_beginning_is_found_out_and_not_built_upon(server: Server, transport: HttpTransport):
    server.answer = ranged
    into = bytearray(b"not the beginning")
    with pytest.raises(BlobHashMismatch):
        fetch(transport, into)
    assert fetch(transport, into) == BLOB


@pytest.mark.parametrize("headers", [{}, {"transfer-encoding": "chunked"}], ids=["declared", "chunked"])
def test_a_blob_larger_than_the_device_accepts_is_cut_off(server: Server, transport: HttpTransport, headers: dict):
    server.answer = lambda _: Answer(200, BLOB, dict(headers))
    into = bytearray()
    with pytest.raises(InvalidReply, match=r"at most|more than"):
        fetch(transport, into, max_bytes=100_000)
    assert into == b""
    assert transport.counters.bytes_down <= 200_000


def test_an_absurd_declared_length_is_refused_before_anything_is_read(server: Server, transport: HttpTransport):
    server.answer = lambda _: Answer(200, b"x", cut=1, length=10**18)
    with pytest.raises(InvalidReply, match="announces"):
        fetch(transport)
    assert transport.counters.bytes_down == 0


def test_an_unknown_blob_is_told(server: Server, transport: HttpTransport):
    server.answer = lambda _: problem(UnknownBlob("gone"))
    with pytest.raises(UnknownBlob):
        fetch(transport)
