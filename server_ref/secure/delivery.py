"""Reports on their way to the aggregators: who holds which, and which do not count because one of them refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from client_sdk.protocol.secure import SecureLayout
from server_ref.secure.errors import AnswerRejected, UnknownReport
from server_ref.secure.messages import MAX_DELIVERY, RoundStatement, VerdictReason
from server_ref.secure.panel import Panel
from server_ref.secure.port import FullPort
from server_ref.secure.round_messages import SealedReport
from server_ref.secure.stages_table import Stage, StagesTable

_log = logging.getLogger("pocketfed.secure")
_AT_ONCE_BYTES: Final = 32 * 1024 * 1024
"""Ciphertexts read and sent together, for each aggregator."""

T = TypeVar("T")
Verdicts = dict[str, VerdictReason | None]


class Delivery:
    """Remembers what each aggregator has accepted, so that nothing is sent twice without need.

    Args:
        panel: The aggregators.
        table: Of what is needed.
        layout: Of the shares.
    """

    def __init__(self, panel: Panel, table: StagesTable, layout: SecureLayout) -> None:
        self._panel = panel
        self._table = table
        self._layout = layout
        self._held: dict[int, set[str]] = {index: set() for index in panel.indices}

    def deliver(self, round_id: int, reports: Sequence[SealedReport], live: Sequence[int]) -> dict[int, Verdicts]:
        """Send each aggregator what it does not hold; the verdicts by aggregator and report id."""
        replies = self._panel.ask(
            live, lambda port, index: self._send(port, index, round_id, reports), "take the reports"
        )
        return replies.good

    def settle(
        self, round_id: int, reports: Sequence[SealedReport], live: Sequence[int]
    ) -> tuple[tuple[int, ...], dict[str, str]]:
        """Deliver, and decide what counts: a report that all aggregators hold which take part.

        An aggregator that refuses most of what most others accept (after a change of its keys, say) is left out, as
        long as enough others are there; otherwise the reports are.

        Returns:
            The aggregators that take part, and the reports that do not count, with the reason.

        Raises:
            NotEnoughAggregators: Fewer than a quorum.
        """
        verdicts = self.deliver(round_id, reports, live)
        outliers = _outliers(verdicts, reports)
        if len(verdicts) - len(outliers) >= self._table.needed(Stage.COMMIT):
            for index in outliers:
                _log.error("aggregator %d refuses most reports that others accept, and is left out", index)
                del verdicts[index]
        holders = tuple(sorted(verdicts))
        self._table.require_live(Stage.COMMIT, holders)
        refused: dict[str, str] = {}
        for index in holders:
            for report_id, reason in verdicts[index].items():
                if reason is not None:
                    refused.setdefault(report_id, reason.value)
                    _log.warning("aggregator %d refuses report %s: %s", index, report_id, reason.value)
        return holders, refused

    def with_reports(
        self,
        question: Callable[[FullPort, int], T],
        statement: RoundStatement,
        by_id: Mapping[str, SealedReport],
    ) -> Callable[[FullPort, int], T]:
        """The question, asked again after a delivery where an aggregator does not hold the set's reports (any more)."""
        named = [by_id[entry.report_id] for entry in statement.accepted.entries if entry.report_id in by_id]

        def ask(port: FullPort, index: int) -> T:
            try:
                return question(port, index)
            except UnknownReport:
                self._held[index].clear()
                self._send(port, index, statement.round_id, named)
                return question(port, index)

        return ask

    def _send(self, port: FullPort, index: int, round_id: int, reports: Sequence[SealedReport]) -> Verdicts:
        held = self._held[index]
        digests = {report.report_id: report.header.digest() for report in reports}
        verdicts: Verdicts = dict.fromkeys(digests)
        for some in self._batches([r for r in reports if digests[r.report_id] not in held], index):
            answered = port.deliver(round_id, [report.share(index) for report in some])
            expected = [(report.report_id, digests[report.report_id]) for report in some]
            if [(verdict.report_id, verdict.digest) for verdict in answered] != expected:
                raise AnswerRejected(f"aggregator {index} gave verdicts about other reports")
            verdicts |= {verdict.report_id: verdict.reason for verdict in answered}
            held |= {verdict.digest for verdict in answered if verdict.ok}
        return verdicts

    def _batches(self, reports: Sequence[SealedReport], index: int) -> Iterator[Sequence[SealedReport]]:
        """So many at a time that memory does not grow with their number."""
        each = max(1, min(MAX_DELIVERY, _AT_ONCE_BYTES // self._layout.ciphertext_bytes(index)))
        for at in range(0, len(reports), each):
            yield reports[at : at + each]


def _outliers(verdicts: Mapping[int, Verdicts], reports: Sequence[SealedReport]) -> list[int]:
    """Aggregators that refuse more than half of all reports, though more than half of the aggregators accept them."""
    wide = {
        report.report_id
        for report in reports
        if 2 * sum(each[report.report_id] is None for each in verdicts.values()) > len(verdicts)
    }
    return [
        index
        for index, each in verdicts.items()
        if 2 * sum(each[report_id] is not None for report_id in wide) > len(reports)
    ]
