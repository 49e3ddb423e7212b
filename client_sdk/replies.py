"""What a device makes of a reply: whether it is the server's, and which error it stands for.

A reply counts if the server's key signed it for this very request. Without a signature nobody is believed but who says
"not now": whoever stands between could have hung up just as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from client_sdk.errors import InvalidReply, ServerKeyChanged, TransportUnavailable, UntrustedReply
from client_sdk.protocol.errors import (
    AuthenticationFailed,
    ConfigurationError,
    PocketfedError,
    ProtocolError,
    from_problem,
)
from client_sdk.protocol.messages import Problem
from client_sdk.protocol.signing import reply_signer

# Answers of a gateway that say "not now" without speaking our protocol.
_NOT_NOW: Final = frozenset({408, 425, 429})
_UNSIGNED_WAIT_S: Final = 3600.0
"""Longest wait that anybody can ask for who is not known to be the server."""
_PROBLEM: Final = "application/problem+json"
_KEY: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
        path: What was asked for.
        status: HTTP status.
        headers: Lower-case names.
        body: All of it.
    """

    path: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether it is what was asked for."""
        return 200 <= self.status < 300


class ServerKeys(Protocol):
    """Where a device keeps the key of the server that it trusts, from the first reply on."""

    def server_key(self) -> str | None:
        """The pinned key, hex; None before the first reply."""
        ...

    def pin_server_key(self, key: str) -> None:
        """Keep the key durably before this returns.

        Raises:
            StateDirUnusable: It could not be written.
        """
        ...


class KnownServer:
    """Whose replies count: those of the keys that were given, or of the key of the first signed reply."""

    def __init__(self, given: str | Sequence[str] | None = None, kept: ServerKeys | None = None) -> None:
        """Know a server.

        Args:
            given: Its Ed25519 public key, hex; several while it changes its key. None to take the first that comes.
            kept: Where that one is kept; by default in memory.

        Raises:
            ConfigurationError: Not 64 hex digits.
        """
        self._given = None if given is None else frozenset([given] if isinstance(given, str) else given)
        if self._given is not None and not (self._given and all(map(_KEY.fullmatch, self._given))):
            raise ConfigurationError("a server's key is 64 lower-case hex digits: what the server says when it starts")
        self._kept = kept
        self._first: str | None = None

    def knows(self, key: str) -> bool:
        """Whether this is a key of the server's."""
        return key == self._pinned() if self._given is None else key in self._given

    def recognise(self, key: str) -> None:
        """Take a key that has signed a reply; the first one is kept, unless keys were given.

        Raises:
            ServerKeyChanged: It is another one.
            StateDirUnusable: It could not be kept, or the one that was cannot be read.
        """
        if self._given is None and self._pinned() is None:
            if self._kept is None:
                self._first = key
            else:
                self._kept.pin_server_key(key)
        if not self.knows(key):
            known = self._pinned() if self._given is None else ", ".join(sorted(self._given))
            raise ServerKeyChanged(f"the reply is signed by {key}, but the server that this device knows has {known}")

    def _pinned(self) -> str | None:
        return self._first if self._kept is None else self._kept.server_key()


def check_origin(reply: Reply, request_signature: str, server: KnownServer) -> None:
    """Make sure that a reply is the server's and answers this request.

    Raises:
        UntrustedReply: Not signed, or not for this request.
        ServerKeyChanged: Signed for this request, but by another key than the one that is known.
        StateDirUnusable: As ``KnownServer.recognise``.
        TransportUnavailable, ProtocolError: Not signed, and it says "not now".
    """
    try:
        signer = reply_signer(reply.headers, request_signature, reply.status, reply.body)
    except AuthenticationFailed as e:
        raise _unsigned(reply, str(e)) from e
    server.recognise(signer)


def _unsigned(reply: Reply, reason: str) -> PocketfedError:
    error = refusal(reply)
    if isinstance(error, ProtocolError | TransportUnavailable) and error.retryable:
        if error.retry_after_s is not None:
            least, most = error.retry_after_s
            error.retry_after_s = min(least, _UNSIGNED_WAIT_S), min(most, _UNSIGNED_WAIT_S)
        return error
    said = f" (it says: {error})" if isinstance(error, ProtocolError) else ""
    return UntrustedReply(f"{reply.path}: {reason}; the answer, {reply.status}, may be anybody's{said}")


def refusal(reply: Reply) -> ProtocolError | TransportUnavailable | InvalidReply:
    """The error that a reply outside 2xx stands for."""
    window = _retry_after(reply.headers)
    if reply.headers.get("content-type", "").startswith(_PROBLEM):
        try:
            problem = Problem.model_validate_json(reply.body)
        except ValueError:
            pass
        else:
            error = from_problem(problem.type, problem.detail or problem.title, http_status=reply.status)
            error.retry_after_s = window if problem.retry is None else (problem.retry.min_s, problem.retry.max_s)
            return error
    if reply.status in _NOT_NOW or reply.status >= 500:
        return TransportUnavailable(f"{reply.path}: the server answered {reply.status}", retry_after_s=window)
    return InvalidReply(
        f"{reply.path}: the server answered {reply.status} without a problem description", retry_after_s=window
    )


def _retry_after(headers: Mapping[str, str]) -> tuple[float, float] | None:
    """``Retry-After`` in seconds, doubled at the far end so that devices do not come back together."""
    value = headers.get("retry-after", "")
    return (float(value), 2 * float(value)) if value.isdecimal() and len(value) < 8 else None
