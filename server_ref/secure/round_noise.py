"""What the coordinator can tell of a noise contribution without opening it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from server_ref.secure.errors import AnswerRejected
from server_ref.secure.identity import PeerKeys, signed_by
from server_ref.secure.messages import NoiseContribution, RoundStatement


def read_contribution(
    contribution: NoiseContribution, index: int, statement: RoundStatement, peers: Sequence[PeerKeys]
) -> NoiseContribution:
    """The contribution, known to be this aggregator's own for this statement.

    Raises:
        AnswerRejected: It would be rejected by those that it is sealed to.
    """
    header = contribution.header
    if (header.sender, header.statement_sha256) != (index, statement.sha256):
        raise AnswerRejected(f"aggregator {index} contributed to another statement")
    if not signed_by(peers, index, header.signed_bytes(), header.signature):
        raise AnswerRejected(f"the noise of aggregator {index} is not signed by its pinned key")
    sealed = tuple(hashlib.sha256(each).hexdigest() for each in contribution.sealed)
    if sealed != header.sealed_sha256 or len(sealed) != len(peers):
        raise AnswerRejected(f"the noise of aggregator {index} is not what it signed")
    return contribution
