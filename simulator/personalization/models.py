"""The models of a run that devices adapt, to see how adaptation changes with the rounds trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from client_sdk.protocol.program import Float32Array


@dataclass(frozen=True)
class Models:
    """What devices adapt from.

    Attributes:
        by_round: Round -> the model that it made, float32[d]: those of ``rounds_to_keep``.
        own: Device -> its personal layers' coordinates after the last round, float32[p]; of others those of the model.
    """

    by_round: Mapping[int, Float32Array]
    own: Mapping[int, Float32Array] = field(default_factory=dict)


def rounds_to_look_at(of_rounds: int, last: int) -> tuple[int, ...]:
    """A handful of rounds, ever further apart: the initial model (0), and some up to the last one.

    Example:
        >>> rounds_to_look_at(60, 60), rounds_to_look_at(60, 20), rounds_to_look_at(2, 2)
        ((0, 8, 15, 30, 60), (0, 8, 15, 20), (0, 1, 2))

    Args:
        of_rounds: That the run was to have.
        last: Of those that it had.
    """
    planned = {0, *(-(-of_rounds // 2**k) for k in range(4))}
    return tuple(sorted({r for r in planned if r <= last} | {last}))


def rounds_to_keep(of_rounds: int, last: int) -> frozenset[int]:
    """Those, and the last but one, which the last one takes the place of."""
    return frozenset({*rounds_to_look_at(of_rounds, last), max(0, last - 1)})


class ModelKeeper:
    """Keeps of a run's models those that will be looked at, told one after the other.

    Args:
        of_rounds: That the run is to have.

    Attributes:
        by_round: Round -> model, of the rounds so far.
    """

    def __init__(self, of_rounds: int) -> None:
        self._of_rounds = of_rounds
        self.by_round: dict[int, Float32Array] = {}

    def keep(self, number: int, weights: Float32Array) -> None:
        """A round made this model; it is copied."""
        self.by_round[number] = weights.copy()
        wanted = rounds_to_keep(self._of_rounds, number)
        self.by_round = {r: kept for r, kept in self.by_round.items() if r in wanted}
