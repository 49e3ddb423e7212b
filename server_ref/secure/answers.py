"""An aggregator's share of a round's sums: computed from what it has kept, which it then lets go of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout
from server_ref.secure import queries
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import UNSIGNED, AggregateShare, AnswerHeader, RoundStatement, SetEntry
from server_ref.secure.queries import StoredRound
from server_ref.secure.store import AggregatorStore
from server_ref.secure.sums import weighted_sum

_AT_ONCE: Final = 32
"""Shares whose rows are read together; the small ones lie in them."""


class Answers:
    """The answers of one aggregator.

    Args:
        config: Its index, and for how many rounds things are kept.
        keys: To sign with.
        store: Where the reports and the noise are.
    """

    def __init__(self, config: AggregatorConfig, keys: AggregatorKeys, store: AggregatorStore) -> None:
        self._config = config
        self._keys = keys
        self._store = store

    def compute(self, stored: StoredRound, layout: SecureLayout) -> AggregateShare:
        """The share of each part's sum with its noise, signed: the same bytes whenever it is computed.

        Raises:
            UnknownBlob: The shares are gone, because the round was answered.
        """
        statement = RoundStatement.model_validate_json(self._store.get(stored.accepted or ""))
        field = layout.scheme.field
        parts = statement.accepted.parts
        noise: list[FieldVector | None] = [None] * len(parts)
        if stored.noise is not None:
            flat = field.from_bytes(self._store.get(stored.noise))
            noise = [flat[at : at + layout.share_length] for at in range(0, len(flat), layout.share_length)]
        payload = b"".join(
            field.to_bytes(weighted_sum(self._shares(part), layout, self._config.index, part_noise))
            for part, part_noise in zip(parts, noise, strict=True)
        )
        header = AnswerHeader(
            index=self._config.index,
            round_id=stored.round_id,
            statement_sha256=stored.statement,
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            signature=UNSIGNED,
        )
        return AggregateShare(self._keys.sign(header), payload)

    def _shares(self, part: Sequence[SetEntry]) -> Iterator[tuple[int, bytes | memoryview]]:
        """Weight and plaintext of each report's share, a few at a time."""
        for at in range(0, len(part), _AT_ONCE):
            entries = part[at : at + _AT_ONCE]
            with self._store.transaction() as connection:
                reports = queries.load_reports(connection, [entry.report_id for entry in entries], shares=True)
            for entry in entries:
                yield entry.weight, self._store.get_share(reports[entry.report_id])

    def discard_needless(self, round_id: int) -> None:
        """Let go of shares that were summed, and of all that is too old. Rows go first: a blob without one is swept."""
        before = round_id - self._config.keep_rounds
        with self._store.transaction() as connection:
            digests = queries.discardable(connection, before)
            queries.discard(connection, digests)
            finished = queries.finished_rounds(connection, before)
            for old in finished:
                queries.save_round(connection, replace(old, contribution=None, accepted=None, noise=None, answer=None))
        self._store.drop_shares(digests)
        self._store.drop(
            sha256 for old in finished for sha256 in (old.contribution, old.accepted, old.noise, old.answer) if sha256
        )
