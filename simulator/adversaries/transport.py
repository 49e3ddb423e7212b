"""A malicious device's way to the server: everything as it was, but for the update in its report.

The device itself is the real SDK, and trains honestly. What it uploads is opened here, its update replaced, and framed
again: canonical, complete, signed with the device's own key, within the declared bounds. A server that knows no more
than the protocol cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client_sdk.errors import IllegalTransition
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import (
    REPORT_TENSOR,
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    Finished,
    ReportReply,
    Wait,
)
from client_sdk.transport import Buffer, TransferCounters, Transport
from simulator.adversaries.examples import Float32Array
from simulator.adversaries.vectors import within

Craft = Callable[[Assignment, Float32Array], Float32Array]
"""An assignment and the device's honest update, float32[d] -> what is sent instead, float32[d]."""


class AdversarialTransport:
    """A device's ``Transport`` that replaces the update of every report.

    Guarantees: a report that is uploaded twice has the same bytes both times, as long as ``craft`` is a function of
    its arguments.
    """

    def __init__(self, inner: Transport, craft: Craft) -> None:
        """Wrap a transport.

        Args:
            inner: What really reaches the server.
            craft: The attack.
        """
        self._inner = inner
        self._craft = craft
        self._assignment: Assignment | None = None

    @property
    def counters(self) -> TransferCounters:
        """Traffic so far, as it really went over the wire."""
        return self._inner.counters

    def expect(self, assignment: Assignment) -> None:
        """Announce the assignment that the next report answers, where it did not come by this ``check_in``."""
        self._assignment = assignment

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Introduce the device's key."""
        return self._inner.enrol(request)

    def check_in(self, request: CheckInRequest) -> Assigned | Wait | Finished:
        """Ask for work, and remember it."""
        reply = self._inner.check_in(request)
        if isinstance(reply, Assigned):
            self.expect(reply.assignment)
        return reply

    def fetch(self, sha256: str, into: bytearray, *, max_bytes: int) -> None:
        """Download a blob."""
        self._inner.fetch(sha256, into, max_bytes=max_bytes)

    def upload(self, report_id: str, frame: Buffer) -> ReportReply:
        """Send the report with the update that the attack makes of its own."""
        return self._inner.upload(report_id, self._poisoned(frame))

    def abandon(self, assignment_id: str, request: AbandonRequest) -> None:
        """Give an assignment back."""
        self._inner.abandon(assignment_id, request)

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()

    def _poisoned(self, data: Buffer) -> bytes:
        frame = decode_frame(data)
        assignment = self._assignment
        if assignment is None or frame.metadata["assignment_id"] != assignment.assignment_id:
            raise IllegalTransition("an attacker's report answers an assignment that it was not told of")
        honest = np.frombuffer(frame.payload, np.float32)
        crafted = within(self._craft(assignment, honest), assignment.encoding.max_abs)
        return encode_frame({REPORT_TENSOR: crafted}, frame.metadata)
