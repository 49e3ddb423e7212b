"""Aggregators behind real HTTP in this process: one server for all of a test's aggregators, told apart by the path."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.types import Receive, Scope, Send

from client_sdk.protocol.signing import device_id_of, sign_request
from server_ref.secure.app import create_app
from server_ref.secure.client import HttpAggregator, Patience
from server_ref.secure.identity import SigningKey
from server_ref.secure.port import AggregatorPort
from tests.hosted import Host

COORDINATOR = SigningKey(bytes(range(32)))
QUICK = Patience(connect_s=5.0, reply_s=30.0, attempts=3, first_wait_s=0.0)


class AggregatorHost:
    """Serves the aggregators that are added, on one port."""

    def __init__(self) -> None:
        self.apps: dict[int, Any] = {}
        self.clients: dict[int, HttpAggregator] = {}
        self.connections: set[tuple[str, int]] = set()
        self._host = Host(self._serve)

    @property
    def url(self) -> str:
        return self._host.url

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.connections.add(tuple(scope["client"]))
        parts = scope["path"].split("/")
        index = int(parts[3]) if parts[1:3] == ["v1", "aggregators"] else 1
        await self.apps[index](scope, receive, send)

    def start(self) -> None:
        self._host.start()

    def stop(self) -> None:
        for client in self.clients.values():
            client.close()
        self._host.stop()

    def add(self, aggregator: AggregatorPort) -> HttpAggregator:
        """Serve an aggregator in place of what had its index before, and give a client for it."""
        index = aggregator.describe().index
        if index in self.clients:
            self.clients[index].close()
        self.apps[index] = create_app(aggregator, index, COORDINATOR.public)
        self.clients[index] = HttpAggregator(index, self.url, COORDINATOR, patience=QUICK)
        return self.clients[index]


@contextlib.contextmanager
def hosting() -> Iterator[AggregatorHost]:
    """A host for the duration of a block."""
    host = AggregatorHost()
    host.start()
    try:
        yield host
    finally:
        host.stop()


def signed_headers(method: str, path: str, body: bytes, key: SigningKey = COORDINATOR) -> dict[str, str]:
    """What authenticates a request."""
    private = Ed25519PrivateKey.from_private_bytes(key.private_bytes())
    device_id = device_id_of(bytes.fromhex(key.public))
    return sign_request(private, device_id, method, path, body, nonce=secrets.token_hex(16))


def send(
    url: str,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    key: SigningKey = COORDINATOR,
    headers: Mapping[str, str | None] = MappingProxyType({}),
    sent: bytes | None = None,
) -> httpx.Response:
    """One signed request, with headers (or what is sent as the body) changed afterwards."""
    changed = {**signed_headers(method, path, body, key), **headers}
    kept = {name: value for name, value in changed.items() if value is not None}
    with httpx.Client(trust_env=False) as client:
        return client.request(method, url + path, content=body if sent is None else sent, headers=kept)


def begin(url: str, method: str, path: str, headers: Mapping[str, str]) -> str:
    """A request whose body never comes: the first line of the answer."""
    name, port = url.removeprefix("http://").split(":")
    lines = [f"{method} {path} HTTP/1.1", "host: here", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    with socket.create_connection((name, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(4096).decode().splitlines()[0]
