"""A malicious device's way to the server: everything as it was, but for the update in its report.

The device itself is the real SDK, and trains honestly. What it uploads is opened here, its update replaced, and framed
again: canonical, complete, signed with the device's own key, within the declared bounds. A server that knows no more
than the protocol cannot tell.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from client_sdk.errors import IllegalTransition
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import (
    REPORT_TENSOR,
    AbandonRequest,
    Assigned,
    Assignment,
    CheckInRequest,
    EnrolReply,
    EnrolRequest,
    F32Encoding,
    Finished,
    ModelReply,
    ReportReply,
    Wait,
)
from client_sdk.transport import Buffer, TransferCounters, Transport
from simulator.adversaries.examples import Float32Array
from simulator.adversaries.vectors import within

# How much further below the bound a compressed update is aimed when its decoded form came out beyond it.
_SAFETY: Final = 0.9


class Attacker(Protocol):
    """Who decides what a device sends."""

    def num_parameters(self, assignment: Assignment) -> int:
        """Length d of the shared layers of the assignment's model."""
        ...

    def craft(self, assignment: Assignment, own: Float32Array) -> Float32Array:
        """What is sent instead of the honest update ``own``; float32, as long as it. A function of its arguments."""
        ...


class AdversarialTransport:
    """A device's ``Transport`` that replaces the update of every report.

    Guarantees: a report that is uploaded twice has the same bytes both times. Where the assignment asks for a
    compression, the crafted update is compressed as an honest one would be (without error feedback: an attacker has no
    errors to make up for), and what the server will decode keeps to the declared bound.
    """

    def __init__(self, inner: Transport, attacker: Attacker) -> None:
        """Wrap a transport.

        Args:
            inner: What really reaches the server.
            attacker: The attack.
        """
        self._inner = inner
        self._attacker = attacker
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

    def latest_model(self) -> ModelReply:
        """Ask which model is the newest."""
        return self._inner.latest_model()

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
        if not isinstance(assignment.encoding, F32Encoding):
            raise ConfigurationError("an attacker on the wire cannot change what is split and sealed: attack the data")
        max_abs = assignment.encoding.max_abs
        if assignment.compression is None:
            own = np.frombuffer(frame.payload, np.float32)
            crafted = within(self._attacker.craft(assignment, own), max_abs)
            return encode_frame({REPORT_TENSOR: crafted}, frame.metadata)
        size = assignment.update_size(self._attacker.num_parameters(assignment))
        codec = Codec(CompressionSpec.parse(assignment.compression), size)
        own = codec.decode(frame.payload, assignment.compression_seed)
        payload = compress_within(
            codec,
            self._attacker.craft(assignment, own),
            seed=assignment.compression_seed,
            rounding_seed=assignment.shuffle_seed,
            max_abs=max_abs,
        )
        return encode_frame({REPORT_TENSOR: np.frombuffer(payload, np.uint8)}, frame.metadata)


def compress_within(codec: Codec, crafted: Float32Array, *, seed: int, rounding_seed: int, max_abs: float) -> bytes:
    """The payload of a crafted update, scaled so that its decoded form (rounded, rotated) stays within the bound."""
    aim = max_abs
    while True:
        payload = codec.encode(within(crafted, aim), seed, rounding_seed=rounding_seed)
        reach = float(np.abs(codec.decode(payload, seed)).max(initial=0.0))
        if reach <= max_abs:
            return payload
        # Ends: each time a tenth less at least, and zeros decode to zeros.
        aim *= _SAFETY * max_abs / reach
