"""What aggregators answer in the checking mode ``projections``."""

from __future__ import annotations

from dataclasses import dataclass

from client_sdk.protocol.messages import Message, Sha256
from server_ref.secure.canonical import encode
from server_ref.secure.messages import Index, Signature


class ProjectionHeader(Message):
    """What an aggregator signs of its answer.

    ``key_fingerprints`` are those of the zero keys that it used, in order of its sets: all holders must agree.
    """

    index: Index
    transcript_sha256: Sha256
    key_fingerprints: tuple[Sha256, ...]
    payload_sha256: Sha256
    signature: Signature

    def signed_bytes(self) -> bytes:
        """What ``signature`` is taken over."""
        return encode("projections", [self.index, self.transcript_sha256, *self.key_fingerprints, self.payload_sha256])


@dataclass(frozen=True)
class ProjectionShare:
    """One aggregator's shares of what is opened of each report of a challenge.

    Attributes:
        header: Signed.
        payload: Canonical bytes of one vector: for each report in the challenge's order ``ROWS`` projections, then for
            each report its squared norm, hidden by a share of zero.
    """

    header: ProjectionHeader
    payload: bytes
