"""An aggregator that dies, or whose disk fails, at every single step of a round, and goes on.

Each step is one statement that writes, one commit, one blob, one flush. What it promises: the same bytes as before,
one noise for one sum, one signature, one charge, one participation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import StorageUnavailable
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import decode_share
from server_ref.secure import queries, store
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.intake import open_share
from server_ref.secure.messages import (
    UNSIGNED,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckRequest,
    CommitSignature,
    NoiseContribution,
    RevealRequest,
    nonce_commitment,
)
from server_ref.secure.noise_shares import make_contribution, noise_info
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import Parties, QuickBlobs, Upload, hurry, pinned, pinned_privacy, quick_store

T = TypeVar("T")
VICTIM = 4  # holds vectors, not seeds, so that its shares can lie in blobs
OTHERS = (1, 2, 3, 5)


class Killed(Exception):
    """The process ends here."""


class Fuse:
    """Burns down by one with each step, and ends the process at zero."""

    def __init__(self, steps: int, error: type[Exception]) -> None:
        self.left = steps
        self.error = error
        self.armed = False

    def burn(self) -> None:
        if not self.armed:
            return
        self.left -= 1
        if self.left == 0:
            raise self.error("at the last step")

    @property
    def blown(self) -> bool:
        return self.left <= 0


class FusedBlobs(QuickBlobs):
    """Dies before or after a blob is written, flushed or removed."""

    def __init__(self, root: Path, fuse: Fuse) -> None:
        super().__init__(root)
        self.fuse = fuse

    def put(self, key: str, data: bytes) -> None:
        self.fuse.burn()
        super().put(key, data)
        self.fuse.burn()

    def sync(self) -> None:
        self.fuse.burn()
        super().sync()

    def delete(self, key: str) -> None:
        self.fuse.burn()
        super().delete(key)


class FusedStore(AggregatorStore):
    """Dies before a statement that writes, or right after the commit of one."""

    def __init__(self, folder: Path, fuse: Fuse) -> None:
        super().__init__(folder, FusedBlobs(folder / "blobs", fuse))
        hurry(self)
        self.fuse = fuse
        self.wrote = False
        sa.event.listen(self.engine, "before_cursor_execute", self._before)

    def _before(self, _connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            self.wrote = True
            self.fuse.burn()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        self.wrote = False
        with super().transaction() as connection:
            yield connection
        if self.wrote:
            self.fuse.burn()


class Round:
    """What one round is about: the same for every try, but for the aggregator itself."""

    def __init__(self, folder: Path) -> None:
        self.parties = parties = Parties(
            folder, pinned(privacy=pinned_privacy(max_participations=1)), live=[VICTIM], open_store=AggregatorStore
        )
        self.empty = folder / "aggregator-4"
        parties.close()
        self.uploads = [parties.upload(number) for number in range(3)]
        self.statement = parties.statement(self.uploads)
        self.noise = {
            i: make_contribution(
                self.statement, parties.configs[i - 1], parties.keys[i - 1], parties.layout, parties.random
            )
            for i in OTHERS
        }

    def open(self, store: AggregatorStore) -> Aggregator:
        """The aggregator, with nothing but what the store has."""
        parties, i = self.parties, VICTIM - 1
        return Aggregator(parties.configs[i], parties.keys[i], store, parties.random)


class Coordinator:
    """Plays the round with the aggregator, whose peers it stands in for, and asks again when that dies."""

    def __init__(self, about: Round, port: Aggregator, recover: Callable[[], Aggregator]) -> None:
        self.about = about
        self.parties = about.parties
        self.uploads = about.uploads
        self.statement = about.statement
        self.noise = about.noise
        self.port = port
        self.recover = recover
        self.seen: dict[str, Any] = {}

    def ask(self, what: str, operation: Callable[[Aggregator], T]) -> T:
        """The answer, which must be the one that was given before."""
        try:
            found = operation(self.port)
        except (Killed, StorageUnavailable):
            self.port = self.recover()
            found = operation(self.port)
        assert self.seen.setdefault(what, found) == found
        return found

    def play(self) -> None:
        parties = self.parties
        self.ask("deliver", lambda port: port.deliver(0, [upload.share(VICTIM) for upload in self.uploads]))
        self._challenge()
        own: NoiseContribution = self.ask("contribute", lambda port: port.contribute(self.statement))
        noise = {**self.noise, VICTIM: own}
        mine = [noise[i].for_receiver(VICTIM) for i in parties.indices]
        self.ask("commit", lambda port: port.commit(self.statement, mine))
        signatures = [self._signed(i) for i in OTHERS]
        self.ask("answer", lambda port: port.answer(0, signatures))
        self.noise = noise

    def _challenge(self) -> None:
        request = ChallengeRequest(round_id=0, reports=tuple(upload.ref for upload in self.uploads))
        name = request.sha256()
        own = self.ask("challenge_commit", lambda port: port.challenge_commit(request))
        nonces = {i: f"{i:064x}" for i in OTHERS}
        commitments = {
            i: ChallengeCommitment(index=i, challenge_sha256=name, commitment=nonce_commitment(i, name, nonces[i]))
            for i in OTHERS
        } | {VICTIM: own}
        reveal = RevealRequest(challenge_sha256=name, commitments=tuple(commitments[i] for i in self.parties.indices))
        revealed = {
            i: self.parties.keys[i - 1].sign(
                ChallengeNonce(index=i, transcript_sha256=reveal.transcript(), nonce=nonces[i], signature=UNSIGNED)
            )
            for i in OTHERS
        } | {VICTIM: self.ask("challenge_reveal", lambda port: port.challenge_reveal(reveal))}
        check = CheckRequest(
            transcript_sha256=reveal.transcript(), nonces=tuple(revealed[i] for i in self.parties.indices)
        )
        self.ask("check", lambda port: port.check(check))

    def _signed(self, index: int) -> CommitSignature:
        unsigned = CommitSignature(index=index, round_id=0, statement_sha256=self.statement.sha256, signature=UNSIGNED)
        return self.parties.keys[index - 1].sign(unsigned)

    def verify(self, store: AggregatorStore) -> None:
        """What was promised, by the records and by recomputing the answer from what was sent."""
        parties = self.parties
        with store.transaction() as connection:
            assert len(queries.load_events(connection)) == 1
            devices = [upload.header.device_id for upload in self.uploads]
            assert queries.load_participations(connection, devices) == dict.fromkeys(devices, 1)
        field = parties.layout.scheme.field
        expected = field.zeros(parties.layout.share_length)
        for upload in self.uploads:
            expected = field.add(expected, self._opened(upload))
        for sender, contribution in self.noise.items():
            plaintext = sealing.open(
                contribution.sealed[VICTIM - 1],
                parties.keys[VICTIM - 1].sealing,
                noise_info(self.statement, sender, VICTIM),
            )
            expected = field.add(expected, decode_share(plaintext, parties.layout, VICTIM))
        assert self.seen["answer"].payload == field.to_bytes(expected[:-1])

    def _opened(self, upload: Upload) -> FieldVector:
        parties, i = self.parties, VICTIM - 1
        plaintext = open_share(upload.share(VICTIM), parties.configs[i], parties.keys[i], parties.task, parties.layout)
        assert isinstance(plaintext, bytes)
        return decode_share(plaintext, parties.layout, VICTIM)


def survives(about: Round, folder: Path, fuse: Fuse, *, dies: bool) -> None:
    """Play the round over a store with this fuse, and check what was promised."""
    shutil.copytree(about.empty, folder)
    stores: list[AggregatorStore] = [FusedStore(folder, fuse)]
    port = about.open(stores[0])

    def restart() -> Aggregator:
        stores.pop().close()
        stores.append(quick_store(folder))
        return about.open(stores[0])

    coordinator = Coordinator(about, port, restart if dies else lambda: port)
    fuse.armed = True
    coordinator.play()
    fuse.armed = False
    coordinator.port = restart()
    coordinator.play()
    coordinator.verify(stores[0])
    stores[0].close()


@pytest.mark.parametrize(
    ("inline_bytes", "error", "dies"),
    [(0, Killed, True), (store.INLINE_BYTES, StorageUnavailable, False)],
    ids=["killed", "disk fails"],
)
def test_whatever_step_it_stops_at_it_answers_as_it_did_and_once(tmp_path, monkeypatch, inline_bytes, error, dies):
    monkeypatch.setattr(store, "INLINE_BYTES", inline_bytes)
    about = Round(tmp_path)
    for steps in count(1):
        fuse = Fuse(steps, error)
        survives(about, tmp_path / f"try-{steps}", fuse, dies=dies)
        if not fuse.blown:
            break
    assert steps > 30, "the round has at least that many steps"
