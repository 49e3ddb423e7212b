"""The coordinator's part in keys of shares of zero: ask the dealers, look at what can be seen, hand each its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from server_ref.secure.distance_messages import ZeroKeys, ZeroKeyShare
from server_ref.secure.errors import AnswerRejected
from server_ref.secure.panel import Panel
from server_ref.secure.port import FullPort


def ask_dealers(
    panel: Panel, among: Sequence[int], subject: str, deal: Callable[[FullPort], ZeroKeys]
) -> Mapping[int, ZeroKeys]:
    """The keys that these aggregators deal, by dealer. Without those of one, its share of the receivers cannot answer.

    Args:
        panel: The aggregators.
        among: Whom to ask.
        subject: Hash (hex) of what the keys are for.
        deal: Asks one.
    """

    def ask(port: FullPort, index: int) -> ZeroKeys:
        keys = deal(port)
        header = keys.header
        if (header.sender, header.request_sha256) != (index, subject):
            raise AnswerRejected(f"aggregator {index} dealt keys for something else")
        if not panel.signed(index, header.signed_bytes(), header.signature):
            raise AnswerRejected(f"the keys of aggregator {index} are not signed by its pinned key")
        sealed = tuple(hashlib.sha256(each).hexdigest() for each in keys.sealed)
        if sealed != header.sealed_sha256 or len(sealed) != len(panel.peers):
            raise AnswerRejected(f"the keys of aggregator {index} are not what it signed")
        return keys

    return panel.ask(among, ask, "deal keys").good


def keys_for(index: int, dealt: Mapping[int, ZeroKeys]) -> list[ZeroKeyShare]:
    """What one aggregator is to be given: of each dealer that has something for it."""
    return [keys.for_receiver(index) for keys in dealt.values() if keys.sealed[index - 1]]
