"""One secure round at the coordinator: from sealed reports to the sum that a quorum of aggregators agreed on.

The coordinator relays, and is trusted with nothing but availability: what an aggregator says is checked against its
pinned key, and what the coordinator asks for is checked by each aggregator against its own configuration.

A round survives its coordinator. Before anything happens that cannot be undone, the state goes into the journal, so
that another coordinator finishes the round with the same set, the same noise and hence the same bits::

    CHECKING      before reports are challenged (each is challenged once)
    CONTRIBUTING  the set is fixed; another run draws other noise for the same set
    COMMITTING    before the first signature is asked for; from here on nothing changes any more
    COMMITTED     a quorum has signed; the sum can be opened again and again

Too few aggregators end a run with ``NotEnoughAggregators``: nothing is released, and ``run`` is called again later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.shamir import NUMPY_KERNELS, SharingKernels
from server_ref.secure.agreement import Agreement, stated
from server_ref.secure.delivery import Delivery
from server_ref.secure.errors import (
    AnswersInconsistent,
    NotEnoughAggregators,
    RoundAbandoned,
)
from server_ref.secure.keys import Peers
from server_ref.secure.layout import secure_layout
from server_ref.secure.messages import (
    MAX_SET_ENTRIES,
    AcceptedSet,
    RoundStatement,
    TaskBinding,
)
from server_ref.secure.panel import Panel, Replies
from server_ref.secure.parameters import CheckingMode, PinnedParameters, RoundParameters
from server_ref.secure.port import FullPort
from server_ref.secure.recovery import open_sums, read_answer
from server_ref.secure.round_check import ReportCheck
from server_ref.secure.round_messages import (
    Journal,
    Parity,
    Phase,
    RoundState,
    SealedReport,
    SecureSum,
)
from server_ref.secure.round_selection import ReportSelection, Select
from server_ref.secure.rules import check_statement
from server_ref.secure.stages_table import Stage, StagesTable

_log = logging.getLogger("pocketfed.secure")


Deal = Callable[[Sequence[SealedReport]], Sequence[int]]
"""From reports to the part that each is in, from 0."""


class SecureRound:
    """Runs the secure rounds of one task, one at a time.

    Args:
        ports: The aggregators, that with index 1 first: ``HttpAggregator``, or ``Aggregator`` in this process.
        peers: Their public keys, as every party pins them.
        parameters: What all aggregators pin.
        task: The task that they serve.
        journal: Keeps the state of rounds.
        parity: Whether reports' shares are checked against each other. In the mode ``projections`` they are, whatever
            this says.
        select: Which reports count, by the distances between them; with ``parameters.distances`` only.
        correct: Demand enough aggregators for correcting a wrong answer. Wrong answers are looked for anyway.
        kernels: What computes on shares.

    Raises:
        ConfigurationError: So few aggregators cannot do what is asked for; the message says what they can.
    """

    def __init__(
        self,
        ports: Sequence[FullPort],
        peers: Peers,
        parameters: PinnedParameters,
        task: TaskBinding,
        journal: Journal,
        *,
        parity: Parity = Parity.WHEN_POSSIBLE,
        select: Select | None = None,
        correct: bool = False,
        kernels: SharingKernels = NUMPY_KERNELS,
    ) -> None:
        n = parameters.num_aggregators
        if not len(ports) == len(peers.peers) == n:
            raise ConfigurationError(
                f"{n} aggregators have as many ports and keys, not {len(ports)} and {len(peers.peers)}"
            )
        self.table = StagesTable(parameters)
        wanted = [Stage.COMMIT, Stage.OPEN, Stage.CONTRIBUTE]
        wanted += [Stage.CHECK] if parity is Parity.REQUIRED else []
        wanted += [Stage.CORRECT] if correct else []
        if parameters.checking is CheckingMode.PROJECTIONS:
            wanted.append(Stage.PROJECTIONS)
            parity = Parity.REQUIRED
        self.table.require_possible(*wanted)
        self._panel = Panel(dict(enumerate(ports, 1)), peers.peers, parameters, task)
        self._parameters = parameters
        self._task = task
        self._journal = journal
        self._parity = parity
        self._kernels = kernels
        self._layout = secure_layout(parameters, task, peers.suite)
        self._delivery = Delivery(self._panel, self.table, self._layout)
        self._check = ReportCheck(self._panel, self.table, self._layout, self._save, required=parity is Parity.REQUIRED)
        self._selection = None if select is None else ReportSelection(select, self._panel, self.table, self._save)
        self._agreement = Agreement(self._panel, self.table, self._delivery, self._save)

    def close(self) -> None:
        """Let go of the threads; the ports stay open."""
        self._panel.close()

    def deliver(self, round_id: int, reports: Sequence[SealedReport]) -> None:
        """Pass reports on as they come in, so that ``run`` need not. Failures do not matter: ``run`` tries again."""
        self._delivery.deliver(round_id, reports, self._panel.last_present or self._panel.present().indices)

    def abandon(self, round_id: int) -> None:
        """Give a round up for good. What was signed stays spent: its reports, its part of the budget."""
        state = self._load(round_id) or RoundState(round_id=round_id, phase=Phase.ABANDONED)
        self._save(state.model_copy(update={"phase": Phase.ABANDONED}))

    def run(
        self,
        round_id: int,
        reports: Sequence[SealedReport],
        *,
        noise_multiplier: float | None = None,
        deal: Deal | None = None,
    ) -> SecureSum:
        """Sum these reports, or finish what was begun for the round.

        Args:
            round_id: Never used for two sums.
            reports: In the order in which ties are broken. Of a round that was begun, those that it names are needed
                again; others are left out once its set is fixed.
            noise_multiplier: Of a public noise schedule, where it is above the pinned one.
            deal: Deals the reports that count out to parts, in the mode ``buckets``: called once they are known, and
                never again once their set is fixed. None: as the reports say.

        Raises:
            NotEnoughAggregators: Too few answer now; nothing was released. Call again later.
            AnswersInconsistent: As that; with more answers the wrong ones might be located.
            RoundAbandoned: The round will give no sum.
            ConfigurationError: More reports than one set holds.
            AggregatorRefusal: The aggregators refuse the set or its parameters (``CohortTooSmall``, ``BudgetSpent``,
                ...), and nobody has signed it.
        """
        if len(reports) > MAX_SET_ENTRIES:
            raise ConfigurationError(f"a round sums at most {MAX_SET_ENTRIES} reports, not {len(reports)}")
        state = self._load(round_id)
        if state is not None and state.phase is Phase.ABANDONED:
            raise RoundAbandoned(f"round {round_id} was abandoned")
        present = self._panel.present()
        self.table.require_live(Stage.OPEN, present.indices, present.why())
        if state is None or state.statement is None:
            state = self._fix_set(
                state, round_id, reports, present.indices, noise_multiplier=noise_multiplier, deal=deal
            )
        by_id = {report.report_id: report for report in reports}
        if state.phase is Phase.CONTRIBUTING:
            state = self._agreement.contribute(state, by_id)
        if state.phase is Phase.COMMITTING:
            state = self._agreement.commit(state, by_id, present.indices)
        try:
            return self._open(state, present)
        except (NotEnoughAggregators, AnswersInconsistent):
            # Who was away when the others signed may be back, and answer too.
            more = self._agreement.commit(state, by_id, present.indices)
            if more.signatures == state.signatures:
                raise
            return self._open(more, present)

    # --- the journal ---

    def _load(self, round_id: int) -> RoundState | None:
        found = self._journal.load(round_id)
        return None if found is None else RoundState.model_validate_json(found)

    def _save(self, state: RoundState, **changes: Any) -> RoundState:  # noqa: ANN401 - fields of the state
        state = state.model_copy(update=changes)
        self._journal.save(state.round_id, state.model_dump_json())
        return state

    # --- the set ---

    def _fix_set(
        self,
        state: RoundState | None,
        round_id: int,
        reports: Sequence[SealedReport],
        live: tuple[int, ...],
        *,
        noise_multiplier: float | None,
        deal: Deal | None,
    ) -> RoundState:
        state = state or RoundState(round_id=round_id, phase=Phase.CHECKING)
        holders, refused = self._delivery.settle(round_id, reports, live)
        state = state.model_copy(update={"rejected": {**state.rejected, **refused}})
        if self._parity is not Parity.OFF:
            state, holders = self._check.run(state, reports, holders)
        if self._selection is not None:
            state = self._selection.run(state, self._task.task_id, reports, holders)
        counted = [report for report in reports if report.report_id not in state.rejected]
        places = [report.part for report in counted] if deal is None else list(deal(counted))
        parts: list[list[SealedReport]] = [[] for _ in range(1 + max(places, default=0))]
        for report, place in zip(counted, places, strict=True):
            parts[place].append(report)
        statement = RoundStatement(
            task_id=self._task.task_id,
            round_id=round_id,
            run=0,
            contributors=holders if self._parameters.aggregators_add_noise else (),
            accepted=AcceptedSet(parts=tuple(tuple(r.entry() for r in part) for part in parts)),
            parameters=self._round_parameters(counted, noise_multiplier),
        )
        check_statement(statement, self._parameters, self._task.task_id)
        return self._save(state, phase=Phase.CONTRIBUTING, statement=statement)

    def _round_parameters(self, counted: Sequence[SealedReport], noise_multiplier: float | None) -> RoundParameters:
        """What is pinned, or more: the noise covers the largest norm that a counted device was given."""
        pinned = self._parameters.round_parameters()
        bits = self._parameters.fraction_bits
        norms = {report.header.clip_norm for report in counted}
        bounds = [EncodedBounds(clip_norm=norm, fraction_bits=bits).norm_bound for norm in norms]
        changes: dict[str, Any] = {"bound": max(bounds, default=pinned.bound)}
        if noise_multiplier is not None:
            changes["noise_multiplier"] = noise_multiplier
        return pinned.model_copy(update=changes)

    # --- the sum ---

    def _open(self, state: RoundState, present: Replies[Any]) -> SecureSum:
        statement = stated(state)
        replies = self._panel.ask(
            present.indices,
            lambda port, index: read_answer(
                port.answer(state.round_id, state.signatures), index, statement, self._layout, self._panel.peers
            ),
            "answer",
        )
        self.table.require_live(Stage.OPEN, replies.indices, replies.why())
        opened = open_sums(replies.good, self._layout, self._kernels)
        for index in opened.tampered:
            _log.error("aggregator %d answered round %d wrongly; its share was left out", index, state.round_id)
        size = self._layout.size
        parts = statement.accepted.parts
        return SecureSum(
            sums=tuple(values[:size] for values in opened.values),
            indicator_sums=tuple(int(v[size]) for v in opened.values) if self._layout.indicator else None,
            counted=tuple(tuple(entry.report_id for entry in part) for part in parts),
            total_weights=tuple(sum(entry.weight for entry in part) for part in parts),
            rejected=dict(state.rejected),
            statement=statement,
            measurements={
                "run": statement.run,
                "parity": state.parity,
                "contributors": list(statement.contributors),
                "signed": [signature.index for signature in state.signatures],
                "answered": list(replies.indices),
                "integrity": str(opened.integrity),
                "tampered": list(opened.tampered),
                "missing": {i: type(e).__name__ for i, e in sorted({**present.failed, **replies.failed}.items())},
            },
        )
