"""What private rounds leave on disk: what was released and what it cost, and how far secure rounds have come."""

from __future__ import annotations

import hashlib

from pydantic import TypeAdapter
from sqlalchemy.engine import Connection, Engine

from client_sdk.protocol.errors import StorageUnavailable, UnknownBlob
from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper, PrivacyEvent
from server_ref.aggregation.batch import PrivateAggregate
from server_ref.clock import Clock
from server_ref.releases import decode_release, encode_release
from server_ref.store import database
from server_ref.store.blobs import BlobStore

PREFIX = "releases"
"""Of the blobs: none that anybody may download by its hash."""

_EVENT: TypeAdapter[PrivacyEvent] = TypeAdapter(PrivacyEvent)


class ReleaseStore:
    """The releases of one task.

    Args:
        db: The task's database.
        blobs: Its blobs.
        clock: The server's time.
        keeper: The ledger in memory, rebuilt from the table; None in a task without noise.
    """

    def __init__(self, db: Engine, blobs: BlobStore, clock: Clock, keeper: LedgerKeeper | None) -> None:
        self._db = db
        self._blobs = blobs
        self._clock = clock
        self._keeper = keeper
        self._pending: dict[int, str] = {}

    def reload(self, connection: Connection, version: int) -> None:
        """Rebuild the ledger, and know what was drawn for rounds that are not committed.

        Args:
            connection: To the database.
            version: Of the newest model: rounds from here on are not committed.
        """
        if self._keeper is None:
            return
        charges = database.load_charges(connection)
        self._keeper.restore([_EVENT.validate_json(charge.event_json) for charge in charges])
        self._pending = {c.round_id: c.release_sha256 for c in charges if c.release_sha256 and c.round_id >= version}

    def load_release(self, round_id: int) -> PrivateAggregate | None:
        """What was released in a round that is not committed yet; None for nothing.

        Raises:
            StorageUnavailable: It is missing or damaged.
        """
        sha256 = self._pending.get(round_id)
        if sha256 is None:
            return None
        try:
            data = bytes(self._blobs.get(_key(sha256)))
        except UnknownBlob as e:
            # Its noise is drawn once: without it, the round waits for whoever has a copy.
            raise StorageUnavailable(f"the release of round {round_id} is missing on disk") from e
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageUnavailable(f"the release of round {round_id} is damaged on disk")
        return decode_release(data)

    def save_release(self, event: GaussianRelease, aggregate: PrivateAggregate) -> None:
        """Keep a release together with what it costs: both are durable when this returns, or neither is."""
        data = encode_release(aggregate)
        sha256 = hashlib.sha256(data).hexdigest()
        self._blobs.put(_key(sha256), data)
        self._blobs.sync()
        charge = database.PrivacyCharge(event.round_id, event.model_dump_json(), self._clock.now(), sha256)
        with self._db.begin() as connection:
            database.save_charge(connection, charge)
        self._pending[event.round_id] = sha256

    def forget(self, connection: Connection, round_id: int) -> None:
        """Delete the state of a secure round, in the transaction that commits it: it is never run again."""
        database.delete_note(connection, _note(round_id))

    def committed(self, round_id: int) -> list[str]:
        """A round is committed: keys of the blobs that nothing can need any more."""
        sha256 = self._pending.pop(round_id, None)
        return [] if sha256 is None else [_key(sha256)]

    def delete_orphans(self) -> None:
        """What was drawn and never paid for, or not deleted before the last process died."""
        wanted = {_key(sha256) for sha256 in self._pending.values()}
        for key in self._blobs.keys(PREFIX):
            if key not in wanted:
                self._blobs.delete(key)

    # --- as ``secure.round_messages.Journal`` ------------------------------------------------------------

    def load(self, round_id: int) -> str | None:
        """The state saved last for a secure round, if any."""
        with self._db.connect() as connection:
            return database.load_note(connection, _note(round_id))

    def save(self, round_id: int, state_json: str) -> None:
        """Keep the state; durable when this returns."""
        with self._db.begin() as connection:
            database.save_note(connection, _note(round_id), state_json)


def _key(sha256: str) -> str:
    return f"{PREFIX}/{sha256}"


def _note(round_id: int) -> str:
    return f"secure-round-{round_id}"
