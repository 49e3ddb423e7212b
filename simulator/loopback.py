"""The SDK's ``Transport`` for thousands of devices in one process, against the simulation's own server.

The SDK's HTTP transport is made for one device on the open internet: proxies, TLS, cut downloads, hostile replies. All
of that costs more than half a millisecond of CPU a request, which would be half of what a simulation spends. Towards
our own server on loopback none of it is needed: here is the same protocol, with the same signed requests and the same
typed refusals, over the standard library's HTTP client with one kept-alive connection per thread. The signatures of the
replies are not verified: they come from the child process that this one has started. Towards a foreign server simulated
devices use the SDK's own transport.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
from typing import Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from client_sdk.errors import BlobHashMismatch, InvalidReply, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import from_problem
from client_sdk.protocol.messages import (
    AbandonRequest,
    Assigned,
    CheckInReply,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    Finished,
    Message,
    ModelReply,
    Problem,
    ReportReply,
    Wait,
)
from client_sdk.transport import TransferCounters

# A check-in may wait for a commit; a server that takes longer than this is stuck.
_TIMEOUT_S: Final = 120.0

Buffer = bytes | bytearray | memoryview


class LoopbackConnections:
    """One HTTP connection per thread to a server on this machine."""

    def __init__(self, url: str) -> None:
        self._netloc = urlsplit(url).netloc
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[http.client.HTTPConnection] = []

    def exchange(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        """Send a request, read the whole reply.

        Returns:
            Status and body.

        Raises:
            TransportUnavailable: The server cannot be reached, or the connection broke twice.
        """
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
            with self._lock:
                self._all.append(connection)
        try:
            try:
                return _exchange(connection, method, path, body, headers)
            except (OSError, http.client.HTTPException):
                # Once more on a fresh connection: the server may have closed an idle one. Requests are idempotent.
                connection.close()
                return _exchange(connection, method, path, body, headers)
        except (OSError, http.client.HTTPException) as e:
            connection.close()
            raise TransportUnavailable(f"{method} {path}: {e or type(e).__name__}") from e

    def close(self) -> None:
        """Close all connections; no thread may be using one."""
        for connection in self._all:
            connection.close()


class LoopbackTransport:
    """The server as one simulated device sees it; see ``client_sdk.transport.Transport``."""

    def __init__(self, connections: LoopbackConnections, identity: DeviceIdentity) -> None:
        self._connections = connections
        self._identity = identity
        self.counters = TransferCounters()

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Introduce the device's key."""
        return EnrolReply.model_validate_json(self._post("/v1/devices", request))

    def check_in(self, request: CheckInRequest) -> Assigned | Wait | Finished:
        """Ask for work."""
        return CheckInReply.model_validate_json(self._post("/v1/check-ins", request)).reply

    def latest_model(self) -> ModelReply:
        """Ask which model is the newest."""
        return ModelReply.model_validate_json(self._signed("GET", "/v1/model", b""))

    def fetch(self, sha256: str, into: bytearray, *, max_bytes: int) -> None:
        """Download a blob and check its hash."""
        path = f"/v1/blobs/{sha256}"
        status, body = self._connections.exchange("GET", path, None, {})
        self._count(0, len(body))
        _check(status, path, body)
        if len(body) > max_bytes:
            raise InvalidReply(f"the server sent {len(body)} bytes; at most {max_bytes} are accepted here")
        if hashlib.sha256(body).hexdigest() != sha256:
            into.clear()
            raise BlobHashMismatch(f"the server sent other bytes than those of blob {sha256}")
        into[:] = body

    def upload(self, report_id: str, frame: Buffer) -> ReportReply:
        """Send a sealed report."""
        return ReportReply.model_validate_json(self._signed("PUT", f"/v1/reports/{report_id}", bytes(frame)))

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        """Give an assignment back."""
        self._post(f"/v1/assignments/{assignment_id}/abandon", request)

    def close(self) -> None:
        """Nothing: the connections are shared."""

    def _post(self, path: str, request: Message) -> bytes:
        return self._signed("POST", path, request.model_dump_json().encode())

    def _signed(self, method: str, path: str, body: bytes) -> bytes:
        status, reply = self._connections.exchange(method, path, body, self._identity.sign(method, path, body))
        self._count(len(body), len(reply))
        _check(status, path, reply)
        return reply

    def _count(self, up: int, down: int) -> None:
        self.counters.requests += 1
        self.counters.bytes_up += up
        self.counters.bytes_down += down


def _exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, bytes]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def _check(status: int, path: str, body: bytes) -> None:
    """Raise the error that a reply outside 2xx stands for."""
    if 200 <= status < 300:
        return
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError as e:
        raise InvalidReply(f"{path}: the server answered {status} without a problem description") from e
    error = from_problem(problem.type, problem.detail or problem.title, http_status=status)
    error.retry_after_s = None if problem.retry is None else (problem.retry.min_s, problem.retry.max_s)
    raise error
