"""A real HTTP server whose answers a test decides: any function, a toy coordinator, a proxy before another server."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client_sdk.protocol.errors import ProtocolError
from client_sdk.protocol.messages import AbandonRequest, CheckInReply, CheckInRequest, EnrolReply, EnrolRequest
from client_sdk.protocol.signing import request_signature, signing_device, verify_request
from server_ref.server_identity import ServerIdentity
from tests.devices import ToyServer

_UPSTREAM = httpx.Client(trust_env=False, timeout=60)
"""Connections of all proxies of a process."""
_PASSED_ON = ("content-type", "content-digest", "signature-input", "signature", "retry-after", "content-range")
"""Headers that a proxy leaves as they are."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What to send; ``cut`` closes the connection after so many bytes of the body, ``pieces`` are sent one by one.

    ``signed`` as the server's reply to the request, if that was signed; what the headers say already comes first.
    """

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pieces: Iterable[bytes] = ()
    length: int | None = None
    signed: bool = True


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A device that was killed in the middle of a request is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """A real HTTP server whose answers are a function of the request."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.identity = ServerIdentity.generate()
        self.connections = 0
        self.answer: Callable[[Request], Answer] = lambda _: Answer()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                outer.requests.append(request)
                self.reply(request, outer.answer(request))

            def reply(self, request: Request, answer: Answer) -> None:
                if answer.status == 0:  # hang up without a word
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                chunked = answer.headers.get("transfer-encoding") == "chunked"
                if not chunked:
                    self.send_header(
                        "content-length", str(len(answer.body) if answer.length is None else answer.length)
                    )
                for name, value in (outer.signature(request, answer) | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                body = answer.body if answer.cut is None else answer.body[: answer.cut]
                with contextlib.suppress(ConnectionError):
                    self.wfile.writelines(answer.pieces)
                    for at in range(0, len(body), 1 << 16):
                        part = body[at : at + (1 << 16)]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                    if chunked and answer.cut is None:
                        self.wfile.write(b"0\r\n\r\n")
                self.close_connection |= answer.cut is not None

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - the names that http.server looks for

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.http = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def signature(self, request: Request, answer: Answer) -> dict[str, str]:
        """Headers that make an answer this server's."""
        asked = request_signature(request.headers)
        if asked is None or not answer.signed:
            return {}
        return dict(self.identity.sign_reply(asked, answer.status, answer.body))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self._thread.join()
        self.http.server_close()


def problem(error: ProtocolError, **extra: object) -> Answer:
    body = {"type": error.type_uri, "title": error.title, "status": error.http_status, "detail": error.detail} | extra
    return Answer(error.http_status, json.dumps(body).encode(), {"content-type": "application/problem+json"})


def toy_coordinator(toy: ToyServer, server_key: str) -> Callable[[Request], Answer]:
    """A toy server's side of the protocol over HTTP; it checks the signatures of what it gets.

    Args:
        toy: What answers.
        server_key: Public key of the ``Server`` that signs the answers.
    """
    keys: dict[str, Ed25519PublicKey] = {}

    def answer(request: Request) -> Answer:
        if request.method == "GET" and "/blobs/" in request.path:
            return Answer(body=toy.blobs[request.path.rpartition("/")[2]])
        device_id = signing_device(request.headers)
        device = toy.device(device_id)
        *_, resource, last = request.path.split("/")
        if last == "devices":
            enrolment = EnrolRequest.model_validate_json(request.body)
            keys[device_id] = Ed25519PublicKey.from_public_bytes(bytes.fromhex(enrolment.public_key))
        verify_request(keys[device_id], request.headers, request.method, request.path, request.body)
        if last == "devices":
            device.enrol(enrolment)
            return Answer(body=EnrolReply(device_id=device_id, server_key=server_key).model_dump_json().encode())
        if last == "check-ins":
            reply = CheckInReply(reply=device.check_in(CheckInRequest.model_validate_json(request.body)))
            return Answer(body=reply.model_dump_json().encode())
        if last == "model":
            return Answer(body=device.latest_model().model_dump_json().encode())
        if last == "abandon":
            device.abandon(resource, AbandonRequest.model_validate_json(request.body))
            return Answer(204, b"")
        return Answer(body=device.upload(last, request.body).model_dump_json().encode())

    def guarded(request: Request) -> Answer:
        try:
            return answer(request)
        except ProtocolError as error:
            return problem(error)

    return guarded


def proxy(url: str, alter: Callable[[Request], bytes]) -> Callable[[Request], Answer]:
    """Pass requests on to a server with the body that ``alter`` makes of them."""

    def answer(request: Request) -> Answer:
        body = alter(request)
        headers = {k: v for k, v in request.headers.items() if k not in {"host", "content-length"}}
        reply = _UPSTREAM.request(request.method, url + request.path, content=body, headers=headers)
        passed = {name: reply.headers[name] for name in _PASSED_ON if name in reply.headers}
        return Answer(reply.status_code, reply.content, passed, signed=False)

    return answer
