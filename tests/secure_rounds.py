"""Secure rounds for tests: a coordinator over aggregators that fail, lie or die where a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from server_ref.secure.errors import AggregatorUnavailable
from server_ref.secure.keys import Peers
from server_ref.secure.port import AggregatorPort
from server_ref.secure.round import SecureRound
from server_ref.secure.round_messages import RoundState, SealedReport, SecureSum
from tests.secure_parties import Parties, Upload

OPERATIONS = ("bind", "deliver", "challenge_commit", "challenge_reveal", "check", "contribute", "commit", "answer")
"""Those of a round, in order."""


class MemoryJournal:
    """Keeps states in memory, and counts how often."""

    def __init__(self) -> None:
        self.states: dict[int, str] = {}
        self.saves = 0

    def load(self, round_id: int) -> str | None:
        return self.states.get(round_id)

    def save(self, round_id: int, state_json: str) -> None:
        self.states[round_id] = state_json
        self.saves += 1


class FaultyPort:
    """A port that does what the wrapped one does, until a test interferes.

    ``before`` runs ahead of an operation, ``after`` behind it (its answer is lost if that raises), ``alter`` changes
    the answer. ``down`` refuses everything.
    """

    def __init__(self, port: Any) -> None:
        self.port = port
        self.down = False
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.alter: dict[str, Callable[[Any], Any]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self.down:
                raise AggregatorUnavailable("it is down")
            self.calls.append(name)
            self.before.get(name, _nothing)()
            answer = getattr(self.port, name)(*args)
            self.after.get(name, _nothing)()
            return self.alter.get(name, _same)(answer)

        return call

    def fail_at(self, operation: str, *, after: bool = False) -> None:
        """Go down at an operation: before it, or after it, so that its answer is lost."""

        def go_down() -> None:
            self.down = True
            raise AggregatorUnavailable(f"it went down {'after' if after else 'before'} {operation}")

        (self.after if after else self.before)[operation] = go_down

    def recover(self) -> None:
        """Be well again."""
        self.down = False
        for faults in (self.before, self.after, self.alter):
            faults.clear()


def _nothing() -> None:
    pass


def _same(answer: Any) -> Any:
    return answer


class Coordinator:
    """A coordinator over faulty ports that can be replaced by a new one at any time.

    Several in succession may share the same parties: each has a round and uploads of its own.
    """

    _numbers = count()

    def __init__(self, parties: Parties, ports: Sequence[AggregatorPort] | None = None, **options: Any) -> None:
        self.parties = parties
        self.ports = [FaultyPort(port) for port in ports or [parties[i] for i in parties.indices]]
        self.journal = MemoryJournal()
        self.options = options
        self.round_id = next(self._numbers)
        self.secure = self._new()

    def _new(self) -> SecureRound:
        config = self.parties.configs[0]
        peers = Peers(suite=config.suite, peers=config.peers)
        return SecureRound(self.ports, peers, config.parameters, self.parties.task, self.journal, **self.options)

    def port(self, index: int) -> FaultyPort:
        return self.ports[index - 1]

    def recover(self) -> None:
        """All aggregators are well again."""
        for port in self.ports:
            port.recover()

    def replace(self) -> None:
        """Another coordinator takes over, with nothing but the journal."""
        self.secure.close()
        self.secure = self._new()

    def upload(self, **header: Any) -> Upload:
        """The report of a device that nobody has seen before."""
        return self.parties.upload(next(self._numbers), **header)

    def uploads(self, how_many: int = 3) -> list[Upload]:
        """Of several devices."""
        return [self.upload() for _ in range(how_many)]

    def run(self, uploads: Iterable[Upload], weights: Sequence[int] = (), **options: Any) -> SecureSum:
        """This coordinator's round."""
        return self.secure.run(self.round_id, reports(uploads, weights), **options)

    def next_round(self) -> None:
        """What is run from now on is another round."""
        self.round_id = next(self._numbers)

    def state(self) -> RoundState:
        """What the journal has of the round."""
        return RoundState.model_validate_json(self.journal.states[self.round_id])

    def charges(self) -> int:
        """Charges for this round in the aggregators' ledgers, all together."""
        found = 0
        for store in self.parties.stores.values():
            with store.transaction() as connection:
                query = f"SELECT count(*) FROM ledger WHERE round_id = {self.round_id}"  # noqa: S608 - an integer
                found += connection.exec_driver_sql(query).scalar_one()
        return found


def reports(uploads: Iterable[Upload], weights: Sequence[int] = (), parts: Sequence[int] = ()) -> list[SealedReport]:
    """Uploads as the coordinator has them."""
    uploads = list(uploads)
    weights, parts = weights or [1] * len(uploads), parts or [0] * len(uploads)
    return [
        SealedReport(u.header, lambda index, u=u: u.ciphertexts[index - 1], weight=weight, part=part)
        for u, weight, part in zip(uploads, weights, parts, strict=True)
    ]


def plain_sum(uploads: Iterable[Upload], weights: Sequence[int] = ()) -> npt.NDArray[np.int64]:
    """What the aggregators are to find, in ordinary integers."""
    uploads = list(uploads)
    weights = weights or [1] * len(uploads)
    total = [
        sum(w * int(u.codes[i]) for u, w in zip(uploads, weights, strict=True)) for i in range(len(uploads[0].codes))
    ]
    return np.array(total, np.int64)
