"""How many aggregators each stage of a secure round needs, and the refusal of what n of them cannot give.

The counts follow from the degree of the polynomials that shares lie on. ``needed = t + k - 1`` values (t the threshold,
k the packing) fix a polynomial of a fresh share; each value beyond that lets one wrong value show, and each two locate
one. Products of shares, which norms and distances are, have twice the degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from client_sdk.protocol.errors import ConfigurationError
from server_ref.secure.errors import NotEnoughAggregators
from server_ref.secure.parameters import PinnedParameters


class Stage(StrEnum):
    """What aggregators are needed for."""

    CHALLENGE = "challenge reports"
    CHECK = "check reports"
    CONTRIBUTE = "add noise"
    COMMIT = "commit to a set"
    OPEN = "open a sum"
    DETECT = "detect a wrong answer"
    CORRECT = "correct a wrong answer"
    PROJECTIONS = "open projections and norms"
    DISTANCES = "open distances"


@dataclass(frozen=True)
class StagesTable:
    """The table for one task.

    Attributes:
        parameters: What the aggregators pin.
    """

    parameters: PinnedParameters

    def needed(self, stage: Stage) -> int:
        """Aggregators that the stage needs."""
        p = self.parameters
        degree = p.needed - 1
        match stage:
            case Stage.CHALLENGE | Stage.COMMIT:
                return p.effective_quorum
            case Stage.CONTRIBUTE:
                # t - 1 of them may know their own noise: at least one more has to be honest.
                return p.threshold if p.aggregators_add_noise else 0
            case Stage.OPEN:
                return p.needed
            case Stage.CHECK | Stage.DETECT:
                return p.needed + 1
            case Stage.CORRECT:
                return p.needed + 2
            case Stage.PROJECTIONS | Stage.DISTANCES:
                return 2 * degree + 1

    def possible(self, stage: Stage) -> bool:
        """Whether all aggregators together are enough."""
        return self.needed(stage) <= self.parameters.num_aggregators

    def correctable(self, answers: int) -> int:
        """Wrong answers among so many that are located and corrected."""
        return max(0, (answers - self.parameters.needed) // 2)

    def rows(self) -> tuple[tuple[Stage, int, bool], ...]:
        """Each stage, what it needs, and whether that can be had."""
        return tuple((stage, self.needed(stage), self.possible(stage)) for stage in Stage)

    def require_possible(self, *stages: Stage) -> None:
        """Refuse a configuration that asks for what so few aggregators cannot give.

        Raises:
            ConfigurationError: Names what they can.
        """
        n = self.parameters.num_aggregators
        missing = [f"{stage} needs {self.needed(stage)}" for stage in stages if not self.possible(stage)]
        if missing:
            can = ", ".join(f"{stage} ({needed})" for stage, needed, possible in self.rows() if possible and needed)
            raise ConfigurationError(
                f"{n} aggregators with threshold {self.parameters.threshold} and packing {self.parameters.packing} are "
                f"too few: {'; '.join(missing)}. What {n} can do: {can}"
            )

    def require_live(self, stage: Stage, live: tuple[int, ...], why: str = "") -> None:
        """Refuse to go on with too few aggregators.

        Args:
            stage: What is to be done.
            live: Indices of those that take part.
            why: What is known of the others.

        Raises:
            NotEnoughAggregators: Nothing was released; the same can be tried again when more of them answer.
        """
        needed = self.needed(stage)
        if len(live) < needed:
            raise NotEnoughAggregators(
                f"to {stage} takes {needed} aggregators, {len(live)} take part{f': {why}' if why else ''}",
                stage=stage,
                needed=needed,
                live=live,
            )
