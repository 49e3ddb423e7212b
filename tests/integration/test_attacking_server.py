"""The SDK against a server that attacks it, and then against the honest one: bounded, typed, and nothing lost.

The attacker sits where the server is, and knows everything but the server's key, or has even that: a hostile operator.
Whatever it answers, the device ends in a typed error after a bounded number of requests and bytes, and afterwards
delivers its report to the honest server.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from client_sdk import DeviceProfile, MobileClient
from client_sdk.errors import (
    BlobHashMismatch,
    BundleMismatch,
    InvalidReply,
    ServerKeyChanged,
    TransportUnavailable,
    UntrustedReply,
)
from client_sdk.executor import MAX_MANIFEST_BYTES
from client_sdk.protocol.errors import PocketfedError, ProgramError
from client_sdk.protocol.messages import EnrolRequest, ReportReply
from client_sdk.session_state import RetryPolicy
from client_sdk.store import MemoryDeviceStore
from client_sdk.transport import HttpTransport, open_client
from server_ref.server_identity import ServerIdentity
from tests.devices import ToyProgram, ToyServer, make_data
from tests.web import Answer, Request, Server, toy_coordinator

ATTEMPTS = 3
MAX_BYTES = ATTEMPTS * (MAX_MANIFEST_BYTES + 2**18)
"""More than the device takes from any attacker here: it begins with the manifest."""
LONGEST_WAIT_S = 100.0

Twist = Callable[[Request, Answer, Server], Answer]


@dataclass(frozen=True)
class Attack:
    """What the attacker makes of the honest answer to some requests.

    Attributes:
        at: Part of the path of the requests that are attacked.
        twist: Honest answer to what is sent instead.
        ends: Errors that the device may end in.
    """

    name: str
    at: str
    twist: Twist
    ends: tuple[type[PocketfedError], ...] = (InvalidReply,)


def always(answer: Answer) -> Twist:
    return lambda _request, _honest, _server: replace(answer, headers=dict(answer.headers))


def json_of(honest: Answer) -> Any:
    return json.loads(honest.body)


def amended(**changes: Any) -> Twist:
    """The operator itself signs another assignment."""

    def twist(_request: Request, honest: Answer, _server: Server) -> Answer:
        reply = json_of(honest)
        if "assignment" in reply["reply"]:
            reply["reply"]["assignment"] |= changes
        return replace(honest, body=json.dumps(reply).encode())

    return twist


def for_another_device(request: Request, honest: Answer, server: Server) -> Answer:
    """What the server once signed for another request."""
    other = Request(request.method, request.path, {"signature": "sig1=:" + "A" * 86 + "==:"}, request.body)
    return replace(honest, headers=server.signature(other, honest))


def by_another_key(request: Request, honest: Answer, _server: Server) -> Answer:
    signed = ServerIdentity(STRANGER._key).sign_reply(request.headers["signature"], honest.status, honest.body)
    return replace(honest, headers=dict(signed))


def with_another_status(request: Request, honest: Answer, server: Server) -> Answer:
    return replace(honest, status=202, headers=server.signature(request, honest))


def acknowledges_another_report(_request: Request, honest: Answer, _server: Server) -> Answer:
    other = ReportReply(report_id="7" * 32, assignment_id="8" * 32)
    return replace(honest, body=other.model_dump_json().encode())


def cut_json(_request: Request, honest: Answer, _server: Server) -> Answer:
    return replace(honest, body=honest.body[: len(honest.body) // 2])


STRANGER = ServerIdentity.generate()
BOMB = zlib.compress(bytes(50_000_000))
ENDLESS = bytes(20_000_000)
REFUSAL = {"title": "t", "status": 409, "detail": "d"}


def refusal(slug: str, *, signed: bool, **more: Any) -> Twist:
    body = json.dumps(REFUSAL | {"type": f"urn:pocketfed:problem:{slug}"} | more).encode()
    return always(Answer(409, body, {"content-type": "application/problem+json"}, signed=signed))


ATTACKS = [
    # without the server's key
    Attack("unsigned", "check-ins", lambda _r, h, _s: replace(h, signed=False), (UntrustedReply,)),
    Attack("unsigned acknowledgement", "reports", lambda _r, h, _s: replace(h, signed=False), (UntrustedReply,)),
    Attack("another device's reply", "check-ins", for_another_device, (UntrustedReply,)),
    Attack("another key", "check-ins", by_another_key, (ServerKeyChanged,)),
    Attack("another key at the report", "reports", by_another_key, (ServerKeyChanged,)),
    Attack("another status", "check-ins", with_another_status, (UntrustedReply,)),
    Attack("forged stale report", "reports", refusal("stale-report", signed=False), (UntrustedReply,)),
    Attack("forged refusal", "reports", refusal("invalid-update", signed=False), (UntrustedReply,)),
    Attack("captive portal", "v1", always(Answer(200, b"<html>log in", {"content-type": "text/html"}, signed=False))),
    Attack("redirect", "v1", always(Answer(302, b"", {"location": "http://127.0.0.1:1/"}, signed=False))),
    Attack("redirect to another host", "blobs", always(Answer(307, b"", {"location": "http://example.invalid/"}))),
    Attack("not modified", "check-ins", always(Answer(304, b"", signed=False))),
    Attack("not modified blob", "blobs", always(Answer(304, b""))),
    Attack("model swapped", "blobs", always(Answer(200, b"another model")), (BlobHashMismatch,)),
    Attack("endless reply", "check-ins", always(Answer(200, ENDLESS, {"transfer-encoding": "chunked"}))),
    Attack("endless blob", "blobs", always(Answer(200, ENDLESS, {"transfer-encoding": "chunked"}))),
    Attack("endless refusal", "v1", always(Answer(503, ENDLESS, {"transfer-encoding": "chunked"}))),
    Attack("length lies long", "v1", always(Answer(200, b"{}", cut=1, length=1000)), (TransportUnavailable,)),
    Attack("length lies absurdly", "v1", always(Answer(200, b"{}", cut=1, length=10**18))),
    Attack("gzip bomb", "v1", always(Answer(200, BOMB, {"content-encoding": "deflate"}))),
    Attack("cookies", "v1", always(Answer(200, b"{}", {"set-cookie": "a=" + "x" * 4000}, signed=False))),
    Attack("hangs up", "v1", always(Answer(0)), (TransportUnavailable,)),
    Attack("waits forever", "v1", always(Answer(503, b"", {"retry-after": "9999999"})), (TransportUnavailable,)),
    Attack("wrong range", "blobs", always(Answer(206, b"x", {"content-range": "bytes 7-8/9"}))),
    # with it: a hostile operator
    Attack("truncated JSON", "check-ins", cut_json),
    Attack("deep JSON", "check-ins", always(Answer(200, b"[" * 60_000))),
    Attack("wrong content type", "check-ins", always(Answer(200, b"<xml/>", {"content-type": "text/xml"}))),
    Attack("acknowledges another report", "reports", acknowledges_another_report),
    Attack(
        "huge window",
        "check-ins",
        refusal("server-busy", signed=True, retry={"min_s": 1e9, "max_s": 1e9}),
        (PocketfedError,),
    ),
    Attack(
        "program of another model",
        "check-ins",
        amended(parameter_table_sha256="0" * 64),
        (BundleMismatch, ProgramError),
    ),
    Attack("lease beyond all bounds", "check-ins", amended(lease_s=1e300)),
]


class Field:
    """A device, the honest server, and the attacker that may stand before it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.toy = ToyServer(work=2)
        self.honest = toy_coordinator(self.toy, server.identity.public_key)
        self.store = MemoryDeviceStore()
        self.waits: list[float] = []
        self.attacks = 0
        self.http = open_client(server.url, read_timeout_s=5)
        self.transport = HttpTransport(server.url, self.store.identity, client=self.http, server_keys=self.store)
        server.answer = self.honest

    def attack(self, attack: Attack) -> None:
        def answer(request: Request) -> Answer:
            if attack.at not in request.path:
                return self.honest(request)
            self.attacks += 1
            honest = self.honest(request) if attack.at == "check-ins" else Answer()
            return attack.twist(request, honest, self.server)

        self.server.answer = answer

    def client(self) -> MobileClient:
        return MobileClient(
            ToyProgram(),
            DeviceProfile("attacked"),
            data=make_data(),
            transport=self.transport,
            store=self.store,
            policy=RetryPolicy(max_attempts=ATTEMPTS, max_wait_s=LONGEST_WAIT_S),
            wait=lambda delay, _stop: self.waits.append(delay),
            max_blob_bytes=100_000,
        )


@pytest.fixture
def field() -> Iterator[Field]:
    with Server() as server:
        made = Field(server)
        yield made
        made.http.close()


def enrol(field: Field) -> None:
    """The first reply is the honest server's: from now on the device knows its key."""
    field.transport.enrol(EnrolRequest(public_key=field.store.identity.public_key.hex()))
    assert field.store.server_key() == field.server.identity.public_key


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_ends_in_a_typed_error_and_nothing_is_lost(field: Field, attack: Attack):
    enrol(field)
    field.attack(attack)
    summary = field.client().run(max_reports=1)
    assert summary.cause in {"gave-up", "refused"}
    assert summary.reports == 0
    assert isinstance(summary.error, attack.ends), summary
    assert 1 <= field.attacks <= 10 * ATTEMPTS
    assert all(0 <= wait <= LONGEST_WAIT_S for wait in field.waits)
    assert field.transport.counters.bytes_down <= MAX_BYTES
    assert len(field.http.cookies) == 0
    field.server.answer = field.honest
    assert field.client().run(max_reports=1).reports == 1
    assert len(field.toy.reports) == 1, "delivered once"


def test_a_lease_of_nothing_is_given_up_and_the_next_one_kept(field: Field):
    enrol(field)
    first = amended(lease_s=0.0)
    seen: list[int] = []

    def answer(request: Request) -> Answer:
        honest = field.honest(request)
        if "check-ins" in request.path:
            seen.append(1)
            if len(seen) == 1:
                return first(request, honest, field.server)
        return honest

    field.server.answer = answer
    assert field.client().run(max_reports=1).reports == 1
    assert len(field.toy.reports) == 1


def test_a_reply_that_only_drips_is_left(field: Field):
    """A timeout of single reads alone would let a server hold a device for as many minutes as a reply has bytes."""
    now = itertools.count(step=61)
    field.transport = HttpTransport(
        field.server.url,
        field.store.identity,
        client=field.http,
        server_keys=field.store,
        monotonic=lambda: float(next(now)),
    )
    with pytest.raises(TransportUnavailable, match="drips"):
        enrol(field)
    field.transport = HttpTransport(field.server.url, field.store.identity, client=field.http, server_keys=field.store)
    assert field.client().run(max_reports=1).reports == 1


def test_the_honest_way_works(field: Field):
    enrol(field)
    assert field.client().run(max_reports=1).reports == 1
    assert field.waits == []
