"""How aggregators come to agree on one statement: noise for it in runs, then the one signature of each.

Up to the first signature a run may be replaced by the next. From then on the statement stands: it is signed by a
quorum, now or later, or the round is abandoned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from server_ref.secure.delivery import Delivery
from server_ref.secure.errors import (
    AnswerRejected,
    NotEnoughAggregators,
    RoundAbandoned,
    SecureRoundError,
    StaleRun,
)
from server_ref.secure.identity import PeerKeys, signed_by
from server_ref.secure.messages import CommitSignature, NoiseContribution, RoundStatement
from server_ref.secure.panel import Panel, Replies, most_common
from server_ref.secure.port import FullPort
from server_ref.secure.round_messages import Phase, RoundState, SaveState, SealedReport
from server_ref.secure.stages_table import Stage, StagesTable

_CATCH_UP: Final = 16
"""Runs to find one that no aggregator has used, each twice as far ahead as the last."""


class Agreement:
    """Collects noise and signatures.

    Args:
        panel: The aggregators.
        table: Of what is needed.
        delivery: Brings reports to who lacks them.
        save: Keeps the state durably, with changes.
    """

    def __init__(self, panel: Panel, table: StagesTable, delivery: Delivery, save: SaveState) -> None:
        self._panel = panel
        self._table = table
        self._delivery = delivery
        self._save = save
        self._noise: dict[int, NoiseContribution] = {}

    def contribute(self, state: RoundState, by_id: Mapping[str, SealedReport]) -> RoundState:
        """Collect noise of all contributors, in as many runs as it takes to find contributors that all answer.

        Raises:
            NotEnoughAggregators: Too few contribute.
            AggregatorRefusal: So many refuse the statement that it will never be signed.
        """
        self._noise = {}
        statement = stated(state)
        for attempt in range(self._table.parameters.num_aggregators + _CATCH_UP):
            replies = self._ask_noise(statement, by_id)
            if not replies.failed:
                self._noise = replies.good
                return self._save(state, phase=Phase.COMMITTING)
            # Who refuses only because of another run can take part in the next one.
            refused = {i: e for i, e in replies.refusals().items() if not isinstance(e, StaleRun)}
            stale = replies.refusals().keys() - refused.keys()
            left = tuple(i for i in statement.contributors if i in replies.good or i in stale)
            if self._table.parameters.num_aggregators - len(refused) < self._table.needed(Stage.CONTRIBUTE):
                raise most_common(refused.values())
            self._table.require_live(Stage.CONTRIBUTE, left, replies.why())
            statement = next_run(statement, left, by=2**attempt if stale else 1)
            state = self._save(state, statement=statement)
        raise NotEnoughAggregators(
            "every run finds another aggregator missing",
            stage=Stage.CONTRIBUTE,
            needed=self._table.needed(Stage.CONTRIBUTE),
            live=statement.contributors,
        )

    def _ask_noise(self, statement: RoundStatement, by_id: Mapping[str, SealedReport]) -> Replies[NoiseContribution]:
        def contribute(port: FullPort, index: int) -> NoiseContribution:
            return read_contribution(port.contribute(statement), index, statement, self._panel.peers)

        question = self._delivery.with_reports(contribute, statement, by_id)
        return self._panel.ask(statement.contributors, question, "contribute noise")

    def commit(self, state: RoundState, by_id: Mapping[str, SealedReport], live: tuple[int, ...]) -> RoundState:
        """Collect signatures from those that are there and have not signed.

        Raises:
            NotEnoughAggregators: Fewer than a quorum so far; the same statement can still be signed by others.
            RoundAbandoned: A quorum will never sign.
            AggregatorRefusal: Nobody signed, and so many refuse that nobody needs to; another run may.
        """
        statement = stated(state)
        known = {signature.index: signature for signature in state.signatures}
        replies: Replies[CommitSignature] = Replies()
        noise = self._noise_for(statement, by_id)
        if noise is not None:

            def commit(port: FullPort, index: int) -> CommitSignature:
                signature = port.commit(statement, [one.for_receiver(index) for one in noise])
                return self._authentic(signature, index, statement)

            question = self._delivery.with_reports(commit, statement, by_id)
            replies = self._panel.ask([i for i in live if i not in known], question, "sign")
            known |= replies.good
        signatures = tuple(known[i] for i in sorted(known))
        if len(known) >= self._table.needed(Stage.COMMIT):
            self._noise = {}
            return self._save(state, phase=Phase.COMMITTED, signatures=signatures)
        state = self._save(state, signatures=signatures)
        self._end_if_hopeless(state, replies)
        why = replies.why() if noise is not None else "the noise of a contributor that does not answer is missing"
        self._table.require_live(Stage.COMMIT, tuple(sorted(known)), why)
        return state

    def _noise_for(
        self, statement: RoundStatement, by_id: Mapping[str, SealedReport]
    ) -> tuple[NoiseContribution, ...] | None:
        """What was contributed to this very statement; None if a contributor does not repeat it."""
        held = self._noise
        if any(held[i].header.statement_sha256 != statement.sha256 for i in held) or not held:
            held = self._ask_noise(statement, by_id).good
        if set(held) != set(statement.contributors):
            return None
        self._noise = held
        return tuple(held[i] for i in statement.contributors)

    def _authentic(self, signature: CommitSignature, index: int, statement: RoundStatement) -> CommitSignature:
        about = (signature.index, signature.round_id, signature.statement_sha256)
        if about != (index, statement.round_id, statement.sha256):
            raise AnswerRejected(f"aggregator {index} signed something else")
        if not self._panel.signed(index, signature.signed_bytes(), signature.signature):
            raise AnswerRejected(f"the signature of aggregator {index} is not by its pinned key")
        return signature

    def _end_if_hopeless(self, state: RoundState, replies: Replies[CommitSignature]) -> None:
        """Where so many aggregators refuse that a quorum will never sign, say so."""
        refused = replies.refusals()
        if self._table.parameters.num_aggregators - len(refused) >= self._table.needed(Stage.COMMIT):
            return
        common = most_common(refused.values())
        if not state.signatures and len(refused) == len(replies.failed):
            # Nobody signed, for certain: the round may begin anew, should the reason go away.
            statement = stated(state)
            self._save(state, phase=Phase.CONTRIBUTING, statement=next_run(statement, statement.contributors))
            raise common
        self._save(state, phase=Phase.ABANDONED)
        raise RoundAbandoned(
            f"round {state.round_id} can never be signed by enough aggregators: {replies.why()}"
        ) from common


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


def next_run(statement: RoundStatement, contributors: tuple[int, ...], by: int = 1) -> RoundStatement:
    """The same set for another run, perhaps with other contributors."""
    # A copy would keep the cached hash of the original.
    return RoundStatement(
        task_id=statement.task_id,
        round_id=statement.round_id,
        run=statement.run + by,
        contributors=contributors,
        accepted=statement.accepted,
        parameters=statement.parameters,
    )


def stated(state: RoundState) -> RoundStatement:
    """The statement of a round whose set is fixed."""
    if state.statement is None:
        raise SecureRoundError(f"the journal of round {state.round_id} has no statement in phase {state.phase}")
    return state.statement
