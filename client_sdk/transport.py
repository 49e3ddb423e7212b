"""How a device reaches the server: the ``Transport`` protocol and its HTTP implementation.

The only module that imports httpx. Every request is idempotent by the protocol, so a cut connection is answered by
sending again; what else goes wrong becomes a typed error, and whether to retry is the session's business.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, Protocol, Self, TypeVar

import httpx

from client_sdk.errors import BlobHashMismatch, InvalidReply, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import (
    MAX_JSON_BYTES,
    AbandonRequest,
    Assigned,
    CheckInReply,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    Finished,
    Message,
    ModelReply,
    ReportReply,
    UploadReply,
    UploadRequest,
    Wait,
)
from client_sdk.replies import KnownServer, Reply, ServerKeys, check_origin, refusal
from client_sdk.uploads import CHUNK_BYTES, upload_in_chunks

_CONNECT_TIMEOUT_S: Final = 10.0
_READ_TIMEOUT_S: Final = 60.0
_MAX_RESUMES: Final = 5
# A timeout of reading alone would wait for as many minutes as a reply has bytes. What comes more slowly than this uses
# up the time that a single read may take; what comes faster gives it back, up to that time again.
_SLOWEST_BYTES_PER_S: Final = 1024
_JSON: Final = "application/json"
_FRAME: Final = "application/octet-stream"
_CONTENT_RANGE: Final = re.compile(r"^bytes (\d+)-\d+/(?:\d+|\*)$")

Buffer = bytes | bytearray | memoryview
M = TypeVar("M", bound=Message)


@dataclass
class TransferCounters:
    """Body bytes and requests of one device, repeated ones included."""

    bytes_up: int = 0
    bytes_down: int = 0
    requests: int = 0


class Transport(Protocol):
    """The server as one device sees it.

    Every method raises ``ProtocolError`` (the server's own refusal), ``TransportUnavailable`` (nobody answers) or
    ``InvalidReply`` (what answers does not speak the protocol). A transport that checks signatures raises
    ``UntrustedReply`` where what answers is not known to be the server, and ``ServerKeyChanged`` where it is another.
    """

    @property
    def counters(self) -> TransferCounters:
        """Traffic so far."""
        ...

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Introduce the device's key."""
        ...

    def check_in(self, request: CheckInRequest) -> Assigned | Wait | Finished:
        """Ask for work."""
        ...

    def latest_model(self) -> ModelReply:
        """Ask which model is the newest, without asking for work; ``fetch`` brings its blobs."""
        ...

    def fetch(self, sha256: str, into: bytearray, *, max_bytes: int) -> None:
        """Download a blob and check its hash.

        ``into`` holds what arrived so far: empty at first; pass it again after a failure to go on from there.

        Raises:
            BlobHashMismatch: Other bytes came than those named; ``into`` is empty again.
        """
        ...

    def upload(self, report_id: str, frame: Buffer) -> ReportReply:
        """Send a sealed report; sending it again is harmless."""
        ...

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        """Give an assignment back."""
        ...

    def close(self) -> None:
        """Close connections that the transport owns."""
        ...


def open_client(
    base_url: str,
    *,
    max_connections: int = 4,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
    read_timeout_s: float = _READ_TIMEOUT_S,
) -> httpx.Client:
    """An HTTP client that many devices of one process can share.

    Proxy settings of the environment apply, except towards this machine. Cookies are not kept: nothing in the
    protocol uses them, and a hostile server could fill memory with them.
    """
    url = _checked_url(base_url)
    return httpx.Client(
        # Without https no certificate is ever looked at; an empty context spares a device the CA bundle's memory.
        verify=True if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        trust_env=url.host not in {"localhost", "127.0.0.1", "::1"},
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as e:
        raise ConfigurationError(f"{base_url!r} is not a URL: {e}") from e
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
        raise ConfigurationError(f"{base_url!r} is not a server's address; write it like http://127.0.0.1:8470")
    return url


class HttpTransport:
    """The server over HTTP, for one device; see ``Transport``.

    Guarantees: no reply counts that the server's key did not sign for the very request, and no blob that has not the
    hash it was asked for by; replies beyond their size limit, and those that only drip, are cut off while they arrive;
    nothing is decompressed; redirects are not followed. Safe to use from different threads one after the other.
    """

    def __init__(
        self,
        base_url: str,
        identity: DeviceIdentity,
        *,
        client: httpx.Client | None = None,
        server_key: str | Sequence[str] | None = None,
        server_keys: ServerKeys | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to talk to a server; nothing is sent yet.

        Args:
            base_url: ``http(s)://host[:port][/prefix]``.
            identity: Signs the requests.
            client: A client shared with other devices (``open_client``); by default one of its own.
            server_key: The server's Ed25519 public key, hex, where the app knows it: no other is believed. Several
                while the server changes its key.
            server_keys: Without ``server_key``: where the key of the first reply is kept for all time, a
                ``DeviceStore``. With neither it is kept as long as this object.
            chunk_bytes: Reports up to this size go up in one request, longer ones in chunks of at most this size.
            monotonic: Seconds, by which a reply or blob that only drips is left: what arrives at less than 1 KiB/s, for
                longer than the client's read timeout.

        Raises:
            ConfigurationError: Not such a URL, or not such a key.
        """
        url = _checked_url(base_url)
        self._origin = url.copy_with(path="/")
        self._prefix = url.path.rstrip("/")
        self._identity = identity
        self._server = KnownServer(server_key, server_keys)
        self._chunk_bytes = chunk_bytes
        self._monotonic = monotonic
        self._owned = client is None
        self._client = client or open_client(base_url)
        self._extensions = {"timeout": self._client.timeout.as_dict()}
        self._patience_s = self._client.timeout.read or _READ_TIMEOUT_S
        self._host = url.netloc.decode("ascii")
        self.counters = TransferCounters()

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Introduce the device's key."""
        reply = self._post(EnrolReply, "/v1/devices", request)
        if reply.device_id != self._identity.device_id:
            raise InvalidReply("the server enrolled another device id than the one that follows from the key")
        if not self._server.knows(reply.server_key):
            raise InvalidReply("the server names another key than the one that signed its reply")
        return reply

    def check_in(self, request: CheckInRequest) -> Assigned | Wait | Finished:
        """Ask for work."""
        return self._post(CheckInReply, "/v1/check-ins", request).reply

    def latest_model(self) -> ModelReply:
        """Ask which model is the newest."""
        path = "/v1/model"
        return self._parse(ModelReply, path, self._exchange("GET", path, b"", _JSON))

    def fetch(self, sha256: str, into: bytearray, *, max_bytes: int) -> None:
        """Download a blob, going on where a cut connection left off, and check its hash."""
        for resumes_left in range(_MAX_RESUMES, -1, -1):
            before = len(into)
            try:
                self._fetch_rest(f"/v1/blobs/{sha256}", into, max_bytes)
                break
            except TransportUnavailable:
                if not resumes_left or len(into) <= before:
                    raise
        if hashlib.sha256(into).hexdigest() != sha256:
            into.clear()
            raise BlobHashMismatch(f"the server sent other bytes than those of blob {sha256}")

    def upload(self, report_id: str, frame: Buffer) -> ReportReply:
        """Send a sealed report: in one request, or a large one in chunks, going on where a cut upload stands."""
        if len(memoryview(frame).cast("B")) > self._chunk_bytes:
            return upload_in_chunks(self, report_id, frame, chunk_bytes=self._chunk_bytes)
        path = f"/v1/reports/{report_id}"
        return self._parse(ReportReply, path, self._exchange("PUT", path, frame, _FRAME))

    def announce(self, report_id: str, request: UploadRequest) -> UploadReply:
        """Say what will come in chunks, and ask how much of it is there."""
        return self._post(UploadReply, f"/v1/reports/{report_id}/upload", request)

    def send_chunk(self, report_id: str, offset: int, chunk: memoryview) -> UploadReply:
        """Send a report's bytes from ``offset`` on."""
        path = f"/v1/reports/{report_id}/upload/{offset}"
        return self._parse(UploadReply, path, self._exchange("PUT", path, chunk, _FRAME))

    def complete(self, report_id: str, request: UploadRequest) -> ReportReply:
        """Have a report accepted that was sent in chunks."""
        return self._post(ReportReply, f"/v1/reports/{report_id}/complete", request)

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        """Give an assignment back."""
        path = f"/v1/assignments/{assignment_id}/abandon"
        self._exchange("POST", path, request.model_dump_json().encode(), _JSON)

    def close(self) -> None:
        """Close the client, unless it is shared."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()

    # --- pieces ---

    def _post(self, reply: type[M], path: str, request: Message) -> M:
        body = request.model_dump_json().encode()
        return self._parse(reply, path, self._exchange("POST", path, body, _JSON))

    @staticmethod
    def _parse(model: type[M], path: str, body: bytes) -> M:
        try:
            return model.model_validate_json(body)
        except ValueError as e:
            raise InvalidReply(f"the answer to {path} is not a {model.__name__}") from e

    def _exchange(self, method: str, path: str, body: Buffer, content_type: str) -> bytes:
        """Send a signed request and return the reply's small body."""
        path = self._prefix + path
        headers = self._identity.sign(method, path, body)
        headers["content-type"] = content_type
        headers["content-length"] = str(len(body))
        signature = headers["signature"]
        with self._sent(method, path, headers, body) as response:
            reply = self._reply(response, path)
        check_origin(reply, signature, self._server)
        if not reply.is_success:
            raise refusal(reply)
        return reply.body

    def _fetch_rest(self, path: str, into: bytearray, max_bytes: int) -> None:
        path = self._prefix + path
        headers = {"range": f"bytes={len(into)}-"} if into else {}
        with self._sent("GET", path, headers) as response:
            if response.status_code == 416 and into:
                return  # nothing lies beyond what we hold; the hash says whether that is the blob
            if response.status_code not in {200, 206}:
                # Not signed, as nothing about blobs is: the worst that a forged one does is to cost the assignment.
                raise refusal(self._reply(response, path))
            if response.status_code == 200:
                into.clear()
            else:
                match = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
                if match is None or int(match[1]) != len(into):
                    into.clear()
                    raise InvalidReply(f"{path}: the server sent another range than the one asked for")
            try:
                for chunk in self._chunks(response, max_bytes - len(into)):
                    into += chunk
            except InvalidReply:
                into.clear()
                raise

    @contextmanager
    def _sent(
        self, method: str, path: str, headers: dict[str, str], body: Buffer | None = None
    ) -> Iterator[httpx.Response]:
        headers["host"] = self._host
        headers["accept-encoding"] = "identity"
        request = httpx.Request(
            method,
            self._origin.copy_with(raw_path=path.encode("ascii")),
            headers=headers,
            content=None if body is None else bytes(body),  # no copy where it is bytes already
            extensions=self._extensions,
        )
        try:
            response = self._send(request)
            try:
                yield response
            finally:
                response.close()
        except httpx.TransportError as e:
            raise TransportUnavailable(f"{method} {self._origin.copy_with(path=path)}: {e or type(e).__name__}") from e

    def _send(self, request: httpx.Request) -> httpx.Response:
        size = int(request.headers.get("content-length", 0))
        try:
            self._count(size)
            return self._client.send(request, stream=True, follow_redirects=False, auth=None)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # The server closed a kept-alive connection just as it was used again; a fresh one tells more.
            self._count(size)
            return self._client.send(request, stream=True, follow_redirects=False, auth=None)

    def _count(self, size: int) -> None:
        self.counters.requests += 1
        self.counters.bytes_up += size

    def _reply(self, response: httpx.Response, path: str) -> Reply:
        body = b"".join(self._chunks(response, MAX_JSON_BYTES))
        return Reply(path, response.status_code, response.headers, body)

    def _chunks(self, response: httpx.Response, max_bytes: int) -> Iterator[bytes]:
        """The body as it arrives, refused as soon as it breaks the limit."""
        declared = response.headers.get("content-length")
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise InvalidReply(f"the server sent a body in encoding {encoding!r}, which was not asked for")
        if declared is not None and declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
            raise InvalidReply(f"the server announces {declared[:20]} bytes; at most {max_bytes} are accepted here")
        received = 0
        patience = self._patience_s
        last = begun = self._monotonic()
        for chunk in response.iter_raw():
            received += len(chunk)
            self.counters.bytes_down += len(chunk)
            if received > max_bytes:
                raise InvalidReply(f"the server sent more than {max_bytes} bytes")
            yield chunk
            now = self._monotonic()
            patience = min(self._patience_s, patience - (now - last) + len(chunk) / _SLOWEST_BYTES_PER_S)
            last = now
            if patience < 0:
                raise TransportUnavailable(f"the reply drips: {received} bytes in {now - begun:.0f} s")
