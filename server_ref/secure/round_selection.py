"""The choice of reports by the distances between their updates, where those are pinned: Krum on shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from client_sdk.protocol.errors import ConfigurationError
from server_ref.secure.distance_messages import DistanceRequest
from server_ref.secure.distance_opening import open_distances
from server_ref.secure.distances import distance_settings
from server_ref.secure.errors import CohortTooSmall
from server_ref.secure.messages import ReportRef
from server_ref.secure.panel import Panel
from server_ref.secure.round_messages import RoundState, SaveState, SealedReport
from server_ref.secure.stages_table import Stage, StagesTable
from server_ref.secure.zero_key_relay import ask_dealers, keys_for

Select = Callable[[Sequence[int], int], Sequence[int]]
"""From the squared distance of every pair of so many reports (in lexicographic order, in squared steps of the grid) to
the positions of those that count."""


class ReportSelection:
    """Leaves out what a rule does not select.

    Args:
        select: The rule.
        panel: The aggregators.
        table: Of what is needed; of a task whose aggregators pin distances.
        save: Keeps the state durably, with changes.

    Raises:
        ConfigurationError: Distances are not pinned, or cannot be had with these parameters.
    """

    def __init__(self, select: Select, panel: Panel, table: StagesTable, save: SaveState) -> None:
        if not table.parameters.distances:
            raise ConfigurationError("a rule selects by distances, and the aggregators do not pin distances")
        table.require_possible(Stage.DISTANCES)
        self._select = select
        self._panel = panel
        self._table = table
        self._save = save
        self._settings = distance_settings(table.parameters)

    def run(
        self, state: RoundState, task_id: str, reports: Sequence[SealedReport], holders: tuple[int, ...]
    ) -> RoundState:
        """Compare the reports that are sound so far: the same ones whenever the round is resumed.

        Returns:
            The state with what is rejected: ``not-selected``, or ``not-compared`` for what came too late.

        Raises:
            CohortTooSmall: Too few of them.
            NotEnoughAggregators: Too few answer.
            DistancesInconsistent: Answers contradict each other.
        """
        cohort = state.cohort
        if cohort is None:
            sound = [report for report in reports if report.report_id not in state.rejected]
            if len(sound) < self._table.parameters.min_cohort:
                raise CohortTooSmall(f"{len(sound)} sound reports are fewer than {self._table.parameters.min_cohort}")
            refs = tuple(ReportRef(report_id=r.report_id, digest=r.header.digest()) for r in sound)
            cohort = DistanceRequest(task_id=task_id, round_id=state.round_id, reports=refs)
            # Before anything is compared: each report is compared in one company, ever.
            state = self._save(state, cohort=cohort)
        chosen = self._chosen(cohort, holders)
        compared = {ref.report_id for ref in cohort.reports}
        left_out = {
            r.report_id: "not-selected" if r.report_id in compared else "not-compared"
            for r in reports
            if r.report_id not in chosen
        }
        return state.model_copy(update={"rejected": {**left_out, **state.rejected}})

    def _chosen(self, cohort: DistanceRequest, live: Sequence[int]) -> set[str]:
        dealt = ask_dealers(self._panel, live, cohort.sha256(), lambda port: port.deal_distance_keys(cohort))
        replies = self._panel.ask(
            live, lambda port, index: port.compare(cohort, keys_for(index, dealt)), "compare reports"
        )
        authentic = {i: each for i, each in replies.good.items() if each.header.index == i}
        self._table.require_live(Stage.DISTANCES, tuple(sorted(authentic)), replies.why())
        distances = open_distances(cohort, list(authentic.values()), self._settings, self._panel.signed)
        return {cohort.reports[position].report_id for position in self._select(distances, len(cohort.reports))}
