"""One aggregator and a coordinator that asks for anything, in any order: what is signed is exactly what may be.

The model below is a few sets and counters. It says for each request whether it may succeed; the aggregator has to
agree, also across restarts, and what it answers has to be the sum of the shares that it signed for.
"""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client_sdk.protocol.secure import decode_share
from server_ref.secure import queries
from server_ref.secure.errors import AggregatorRefusal, AnswerDiscarded, NotCommitted
from server_ref.secure.intake import open_share
from server_ref.secure.ledger import load_ledger
from server_ref.secure.messages import UNSIGNED, CommitSignature, RoundStatement
from tests.secure_parties import Parties, Upload, hex_id, pinned, pinned_privacy

REPORTS = 8
DEVICES = 5
MAX_ROUNDS = 4
PARTICIPATIONS = 2


class AnyCoordinator(RuleBasedStateMachine):
    """Requests to aggregator 4 of five. Device d sends the reports d, d + DEVICES, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        privacy = pinned_privacy(
            noise="devices",
            device_noise_variance=str(Fraction(4 * 2**16) ** 2 / 2),
            honest_devices=2,
            max_participations=PARTICIPATIONS,
            max_rounds=MAX_ROUNDS,
            epsilon=50.0,
        )
        self.parties = Parties(Path(self.folder.name), pinned(privacy=privacy), live=[4])
        self.uploads = [
            self.parties.upload(number, device_id=hex_id(number % DEVICES, "device")) for number in range(REPORTS)
        ]
        self.delivered: set[int] = set()
        self.signed: dict[int, tuple[RoundStatement, list[int]]] = {}
        self.answered: dict[int, bytes] = {}

    def teardown(self) -> None:
        self.parties.close()
        self.folder.cleanup()

    def spent(self) -> set[int]:
        return {number for _, numbers in self.signed.values() for number in numbers}

    def participations(self, device: int) -> int:
        return sum(number % DEVICES == device for number in self.spent())

    def may_sign(self, statement: RoundStatement, numbers: list[int]) -> bool:
        if statement.round_id in self.signed:
            return self.signed[statement.round_id][0] == statement
        devices = [number % DEVICES for number in numbers]
        return (
            len(numbers) >= 2
            and len(set(devices)) == len(devices)
            and set(numbers) <= self.delivered - self.spent()
            and all(self.participations(device) < PARTICIPATIONS for device in devices)
            and len(self.signed) < MAX_ROUNDS
        )

    @rule(numbers=st.lists(st.integers(0, REPORTS - 1), min_size=1, max_size=4), round_id=st.integers(0, 5))
    def deliver(self, numbers: list[int], round_id: int) -> None:
        verdicts = self.parties[4].deliver(round_id, [self.uploads[number].share(4) for number in numbers])
        assert all(verdict.ok for verdict in verdicts)
        self.delivered |= set(numbers)

    @rule(
        numbers=st.lists(st.integers(0, REPORTS - 1), min_size=1, max_size=4),
        round_id=st.integers(0, 5),
        run=st.integers(0, 1),
    )
    def commit(self, numbers: list[int], round_id: int, run: int) -> None:
        statement = self.parties.statement([self.uploads[number] for number in numbers], round_id=round_id, run=run)
        expected = self.may_sign(statement, numbers)
        try:
            signature = self.parties[4].commit(statement, [])
        except AggregatorRefusal:
            assert not expected
        else:
            assert expected
            assert signature.statement_sha256 == statement.sha256
            self.signed[round_id] = (statement, numbers)

    @rule(round_id=st.integers(0, 5))
    def answer(self, round_id: int) -> None:
        statement, numbers = self.signed.get(round_id, (None, []))
        sha256 = "00" * 32 if statement is None else statement.sha256
        signatures = [
            self.parties.keys[i - 1].sign(
                CommitSignature(index=i, round_id=round_id, statement_sha256=sha256, signature=UNSIGNED)
            )
            for i in (1, 2, 3, 5)
        ]
        try:
            found = self.parties[4].answer(round_id, signatures)
        except NotCommitted:
            assert statement is None
            return
        except AnswerDiscarded:
            assert max(self.answered) > round_id + 2, "a round is let go of once a much later one was answered"
            return
        layout = self.parties.layout
        expected = layout.scheme.field.zeros(layout.share_length)
        for number in numbers:
            expected = layout.scheme.field.add(expected, self._share(self.uploads[number]))
        assert found.payload == layout.scheme.field.to_bytes(expected[:-1])
        assert self.answered.setdefault(round_id, found.payload) == found.payload
        # The harness keeps what is unused for two rounds.
        with self.parties.stores[4].transaction() as connection:
            known = queries.load_reports(connection, [u.header.report_id for u in self.uploads])
        ids = {self.uploads[n].header.report_id: n for n in range(REPORTS)}
        self.delivered = {ids[r.report_id] for r in known.values() if r.kept or r.signed_in is not None}

    def _share(self, upload: Upload):
        parties = self.parties
        plaintext = open_share(upload.share(4), parties.configs[3], parties.keys[3], parties.task, parties.layout)
        assert isinstance(plaintext, bytes)
        return decode_share(plaintext, parties.layout, 4)

    @rule()
    def restart(self) -> None:
        self.parties.restart(4)

    @invariant()
    def every_signature_was_charged_once(self) -> None:
        with self.parties.stores[4].transaction() as connection:
            events = load_ledger(connection, self.parties.parameters.privacy).events
            counts = queries.load_participations(connection, [hex_id(d, "device") for d in range(DEVICES)])
        assert sorted(event.round_id for event in events) == sorted(self.signed)
        for device in range(DEVICES):
            assert counts.get(hex_id(device, "device"), 0) == self.participations(device) <= PARTICIPATIONS


TestAnyCoordinator = AnyCoordinator.TestCase
TestAnyCoordinator.settings = settings(max_examples=15, stateful_step_count=16, deadline=None)
