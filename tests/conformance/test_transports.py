"""Every transport behaves alike: the SDK's over HTTP, the simulator's on loopback, and the tests' own in memory.

The first two run against the real application. In front of it stands a relay that loses requests and replies when told
to, and may alter blobs: what a network does.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from client_sdk.errors import BlobHashMismatch, InvalidReply, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import (
    InvalidUpdate,
    ShapeMismatch,
    StaleReport,
    UnknownAssignment,
    UnknownBlob,
    UnknownDevice,
)
from client_sdk.protocol.messages import AbandonRequest, Assigned, Assignment, CheckInRequest, EnrolRequest, Finished
from client_sdk.reports import build_report
from client_sdk.transport import HttpTransport, Transport
from server_ref.app.factory import create_app
from simulator.loopback import LoopbackConnections, LoopbackTransport
from tests.devices import NUM_PARAMETERS, ToyServer, sha
from tests.hosted import Host
from tests.served import Served
from tests.web import Answer, Request, Server, proxy

CHUNK = 200
"""Bytes in a chunk of a report: a few chunks make the toy model's."""

Loses = Literal["request", "reply"]


class Relay:
    """A proxy before the real server: loses what it is told to lose, and replaces blobs."""

    def __init__(self, url: str) -> None:
        self.front = Server()
        self._pass_on = proxy(url, lambda request: request.body)
        self.blobs: dict[str, bytes] = {}
        self.loses: Callable[[Request], Loses | None] = lambda _: None
        self.front.answer = self._answer

    def _answer(self, request: Request) -> Answer:
        lost = self.loses(request)
        if lost == "request":
            return Answer(0)
        replaced = self.blobs.get(request.path.rpartition("/")[2])
        answer = Answer(body=replaced) if replaced is not None else self._pass_on(request)
        return Answer(0) if lost == "reply" else answer


@dataclass
class Rig:
    """A server, and how a device reaches it.

    Attributes:
        open: A device's transport.
        size: Parameters of the model.
        lose: From now on lose what ``name`` (``upload``, ``check-in``, ...) sends or gets; None for nothing.
        replace_blob: What the server has under a hash from now on.
        reports: How many reports were accepted.
        close_server: Nobody answers any more.
    """

    open: Callable[[DeviceIdentity], Transport]
    size: int
    lose: Callable[[str | None, Loses], None]
    replace_blob: Callable[[str, bytes], None]
    reports: Callable[[], int]
    close_server: Callable[[], None]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, softmax_bundle: Path) -> Iterator[tuple[Served, str]]:
    """The application, served in this process: enough work for all tests of the module."""
    folder = tmp_path_factory.mktemp("served")
    with (
        Served(folder, softmax_bundle, rounds=10_000, buffer_size=1000, concurrency=1000) as served,
        Host(create_app(served.coordinator)) as host,
    ):
        yield served, host.url


SAYS = {
    "enrol": ("POST", "/devices"),
    "check-in": ("POST", "/check-ins"),
    "fetch": ("GET", "/blobs/"),
    "latest-model": ("GET", "/model"),
    "upload": ("PUT", "/reports/"),
    "abandon": ("POST", "/abandon"),
}


def over_http(stack: ExitStack, real: tuple[Served, str], open_transport: Callable[..., Transport]) -> Rig:
    served, url = real
    relay = Relay(url)
    stack.enter_context(relay.front)
    before = len(served.seen)

    def lose(name: str | None, what: Loses) -> None:
        def loses(request: Request) -> Loses | None:
            if name is None:
                return None
            method, part = SAYS[name]
            return what if request.method == method and part in request.path else None

        relay.loses = loses

    return Rig(
        lambda identity: open_transport(relay.front.url, identity),
        served.size,
        lose,
        relay.blobs.__setitem__,
        lambda: served.seen[before:].count("report-folded"),
        relay.front.http.server_close,
    )


def in_memory() -> Rig:
    toy = ToyServer(work=1000)

    def lose(name: str | None, what: Loses) -> None:
        def lost(request: str) -> None:
            if request == name:
                raise TransportUnavailable(f"the {what} is lost")

        toy.before = lost if what == "request" else lambda _: None
        toy.after = lost if what == "reply" else lambda _: None

    def nobody(_: str) -> None:
        raise TransportUnavailable("nobody answers")

    return Rig(
        lambda identity: toy.device(identity.device_id),
        NUM_PARAMETERS,
        lose,
        toy.blobs.__setitem__,
        lambda: len(toy.reports),
        lambda: setattr(toy, "before", nobody),
    )


KINDS = ("http", "http-in-chunks", "loopback", "memory")


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, real: tuple[Served, str]) -> Iterator[Rig]:
    with ExitStack() as stack:
        if request.param == "memory":
            yield in_memory()
        elif request.param == "loopback":

            def open_loopback(url: str, identity: DeviceIdentity) -> Transport:
                connections = LoopbackConnections(url)
                stack.callback(connections.close)
                return LoopbackTransport(connections, identity)

            yield over_http(stack, real, open_loopback)
        else:
            chunk = CHUNK if request.param == "http-in-chunks" else 10**6

            def open_http(url: str, identity: DeviceIdentity) -> Transport:
                transport = HttpTransport(url, identity, chunk_bytes=chunk)
                stack.callback(transport.close)
                return transport

            yield over_http(stack, real, open_http)


class Device:
    """One device and its transport."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.identity = DeviceIdentity.generate()
        self.transport = rig.open(self.identity)

    def enrol(self) -> Device:
        self.transport.enrol(EnrolRequest(public_key=self.identity.public_key.hex()))
        return self

    def check_in(self) -> Assignment:
        reply = self.transport.check_in(CheckInRequest(num_samples=5))
        assert isinstance(reply, Assigned), reply
        return reply.assignment

    def report(self, assignment: Assignment, size: int | None = None) -> tuple[str, bytes]:
        """Id and frame of its report."""
        report_id = self.identity.report_id(assignment.assignment_id)
        update = np.linspace(-1, 1, size or self.rig.size, dtype=np.float32)
        frame = build_report(
            assignment, report_id, update, device_id=self.identity.device_id, steps=1, train_loss=0.5
        ).frame
        return report_id, bytes(frame)


@pytest.fixture
def device(rig: Rig) -> Device:
    return Device(rig).enrol()


def test_a_device_gets_the_id_of_its_key_however_often_it_enrols(rig: Rig):
    device = Device(rig)
    for _ in range(3):
        reply = device.transport.enrol(EnrolRequest(public_key=device.identity.public_key.hex()))
        assert reply.device_id == device.identity.device_id


def test_a_device_that_is_not_enrolled_is_told(rig: Rig):
    with pytest.raises(UnknownDevice):
        Device(rig).check_in()


def test_who_holds_an_assignment_gets_it_again(device: Device):
    first, second = device.check_in(), device.check_in()
    assert first.assignment_id == second.assignment_id
    assert first.lease_s >= second.lease_s


def test_a_blob_arrives_whole_also_from_a_beginning(device: Device):
    sha256 = device.check_in().manifest_sha256
    whole = bytearray()
    device.transport.fetch(sha256, whole, max_bytes=10**6)
    assert sha(whole) == sha256
    for have in (1, len(whole) // 2, len(whole)):
        into = whole[:have]
        device.transport.fetch(sha256, into, max_bytes=10**6)
        assert into == whole


def test_other_bytes_than_those_named_are_refused_and_forgotten(device: Device):
    sha256 = device.check_in().model_sha256
    device.rig.replace_blob(sha256, b"something else")
    into = bytearray()
    with pytest.raises(BlobHashMismatch):
        device.transport.fetch(sha256, into, max_bytes=10**6)
    assert into == b""


def test_a_blob_that_is_too_long_is_refused(device: Device):
    into = bytearray()
    with pytest.raises(InvalidReply):
        device.transport.fetch(device.check_in().manifest_sha256, into, max_bytes=100)
    assert into == b""


def test_an_unknown_blob_is_told(device: Device):
    with pytest.raises(UnknownBlob):
        device.transport.fetch("0" * 64, bytearray(), max_bytes=100)


def test_a_report_counts_once_however_often_it_comes(device: Device):
    assignment = device.check_in()
    report_id, frame = device.report(assignment)
    before = device.rig.reports()
    for buffer in (frame, bytearray(frame), memoryview(frame)):
        reply = device.transport.upload(report_id, buffer)
        assert (reply.report_id, reply.assignment_id) == (report_id, assignment.assignment_id)
    Device(device.rig).enrol()  # writes are in order: what came before is done
    assert device.rig.reports() == before + 1


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_lost_upload_is_transient_and_the_next_one_counts_once(device: Device, what: Loses):
    assignment = device.check_in()
    report_id, frame = device.report(assignment)
    before = device.rig.reports()
    device.rig.lose("upload", what)
    with pytest.raises(TransportUnavailable) as caught:
        device.transport.upload(report_id, frame)
    assert caught.value.retryable
    device.rig.lose(None, what)
    assert device.transport.upload(report_id, frame).report_id == report_id
    Device(device.rig).enrol()
    assert device.rig.reports() == before + 1


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_lost_check_in_costs_nothing(device: Device, what: Loses):
    device.rig.lose("check-in", what)
    with pytest.raises(TransportUnavailable):
        device.check_in()
    device.rig.lose(None, what)
    first, again = device.check_in(), device.check_in()
    assert first.assignment_id == again.assignment_id


def test_the_newest_model_is_told_without_work_and_its_blobs_are_there(device: Device):
    latest = device.transport.latest_model()
    assert device.transport.latest_model() == latest
    for sha256 in (latest.manifest_sha256, latest.program_sha256, latest.model_sha256):
        into = bytearray()
        device.transport.fetch(sha256, into, max_bytes=10**7)
        assert sha(into) == sha256
    assignment = device.check_in()
    facts = ("task_id", "model_version", "model_sha256", "program_sha256", "manifest_sha256", "parameter_table_sha256")
    assert [getattr(latest, name) for name in facts] == [getattr(assignment, name) for name in facts]
    assert latest.plan == assignment.plan
    assert device.transport.upload(*device.report(assignment)).assignment_id == assignment.assignment_id


def test_a_device_that_is_not_enrolled_is_not_told_the_newest_model(rig: Rig):
    with pytest.raises(UnknownDevice):
        Device(rig).transport.latest_model()


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_lost_question_for_the_newest_model_is_transient(device: Device, what: Loses):
    device.rig.lose("latest-model", what)
    with pytest.raises(TransportUnavailable) as caught:
        device.transport.latest_model()
    assert caught.value.retryable
    device.rig.lose(None, what)
    assert device.transport.latest_model().task_id


def test_an_assignment_that_was_given_back_is_over(device: Device):
    assignment = device.check_in()
    for _ in range(2):
        device.transport.abandon(assignment.assignment_id, AbandonRequest(reason="user"))
    with pytest.raises((StaleReport, UnknownAssignment)):
        device.transport.upload(*device.report(assignment))
    assert device.check_in().assignment_id != assignment.assignment_id


def test_a_strangers_assignment_is_unknown(device: Device):
    assignment = device.check_in()
    stranger = Device(device.rig).enrol()
    with pytest.raises(UnknownAssignment):
        stranger.transport.upload(*stranger.report(assignment))
    assert device.transport.upload(*device.report(assignment)).assignment_id == assignment.assignment_id


def test_nobody_there_is_transient(device: Device):
    device.transport.close()
    fresh = Device(device.rig)
    device.rig.close_server()
    with pytest.raises(TransportUnavailable) as caught:
        fresh.enrol()
    assert caught.value.retryable


def test_traffic_is_counted_both_ways(device: Device):
    assignment = device.check_in()
    counters = device.transport.counters
    requests, down = counters.requests, counters.bytes_down
    device.transport.fetch(assignment.manifest_sha256, bytearray(), max_bytes=10**6)
    assert counters.requests == requests + 1
    assert counters.bytes_down > down
    up = counters.bytes_up
    report_id, frame = device.report(assignment)
    device.transport.upload(report_id, frame)
    assert counters.bytes_up >= up + len(frame)


# --- of those that reach the real server only ---


@pytest.mark.parametrize("rig", ["http", "http-in-chunks", "loopback"], indirect=True)
def test_an_update_that_does_not_fit_is_refused_by_its_class(device: Device):
    assignment = device.check_in()
    with pytest.raises(ShapeMismatch) as caught:
        device.transport.upload(*device.report(assignment, size=3))
    assert isinstance(caught.value, InvalidUpdate)
    assert device.transport.upload(*device.report(assignment)).assignment_id == assignment.assignment_id


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_a_cut_upload_goes_on_where_the_server_stands(real: tuple[Served, str], lost: Loses):
    """Whatever is sent to the upload is lost twice before it arrives; the device is another process after each loss."""
    served, url = real
    relay = Relay(url)
    tries: Counter[str] = Counter()

    def loses(request: Request) -> Loses | None:
        if request.method != "PUT":
            return None
        tries[request.path] += 1
        return lost if tries[request.path] <= 2 else None

    with relay.front, ExitStack() as stack:

        def open_transport(identity: DeviceIdentity) -> HttpTransport:
            return stack.enter_context(HttpTransport(relay.front.url, identity, chunk_bytes=CHUNK))

        device = Device(Rig(open_transport, served.size, _nothing, _nothing, lambda: 0, _nothing)).enrol()
        report_id, frame = device.report(device.check_in())
        relay.loses = loses
        before = served.seen.count("report-folded")
        for losses in itertools.count():
            try:
                reply = open_transport(device.identity).upload(report_id, frame)
                break
            except TransportUnavailable:
                assert losses < len(frame) // CHUNK + 1, "each process gets further than the one before"
        assert reply.report_id == report_id
        device.enrol()
    assert served.seen.count("report-folded") == before + 1
    offsets = [int(path.rpartition("/")[2]) for path in tries]
    assert offsets == sorted(range(0, len(frame), CHUNK)), "no chunk that had arrived is sent again"


def _nothing(*_: object) -> None:
    """Nothing is lost, replaced or closed."""


def test_a_finished_task_says_so():
    toy = ToyServer(work=0)
    identity = DeviceIdentity.generate()
    transport = toy.device(identity.device_id)
    transport.enrol(EnrolRequest(public_key=identity.public_key.hex()))
    assert transport.check_in(CheckInRequest(num_samples=1)) == Finished(model_version=0)
