"""The audit in one run: a thousand coins at once, and an attacker who sees what the server publishes.

A server is given the updates of every round, some of them canaries', and publishes aggregates (and, if it adapts it,
the clip norm). The attacker knows all canaries and how often each takes part, but not the coins; from what was
published it guesses them. More right guesses than an (epsilon, delta)-private server can give away refute the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from simulator.audit.bounds import LowerBound, best_lower_bound
from simulator.audit.canaries import BoolArray, Canaries, Norms, always, every_other, ladder

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

ERROR: Final = 0.05
"""Probability with which a correct server may be refuted, over all programs, attackers and numbers of guesses."""

QUANTILE: Final = 0.9
"""Of the norms, that an attacker takes a published clip norm for: what the specification's adaptive clipping does."""

_WIDEST_GAP: Final = 40


@dataclass(frozen=True)
class Published:
    """What everybody sees of a round.

    Attributes:
        values: float64[size], the released aggregate.
        clip_norm: To which the next round's updates are clipped.
    """

    values: Float64Array
    clip_norm: float


PROGRAMS: Final[Mapping[str, Callable[[int, float], Norms]]] = MappingProxyType(
    {"always": always, "every other round": every_other, "a norm each": ladder}
)
"""What canaries do, by name."""


class Server(Protocol):
    """What is audited. Every object runs once."""

    @property
    def clip_norm(self) -> float:
        """To which the first round's updates are clipped."""
        ...

    def round(self, updates: Iterator[Float32Array]) -> Published:
        """Aggregate one round's updates, one a client in a fixed order, float32[size] each, and publish."""
        ...


@dataclass(frozen=True)
class Claimed:
    """A private server, and what it claims of a whole run.

    Attributes:
        name: In reports.
        start: A new server for ``clients`` updates of ``size`` coordinates a round, over so many rounds.
        epsilon: Claimed for the run, under zero-out adjacency: a canary that is out sends zero.
        delta: Likewise.
    """

    name: str
    start: Callable[[int, int, int], Server]
    epsilon: float
    delta: float


@dataclass(frozen=True)
class AuditPlan:
    """How much is tried.

    Attributes:
        canaries: m.
        size: d, coordinates.
        rounds: T.
        seed: Of canaries and coins; None for the operating system's randomness. Never of noise.
        programs: Which of ``PROGRAMS`` the canaries follow, by name; one run each.
    """

    canaries: int = 1000
    size: int = 20_000
    rounds: int = 50
    seed: int | None = None
    programs: tuple[str, ...] = ("always", "every other round", "a norm each")

    def __post_init__(self) -> None:
        if not self.programs or not set(self.programs) <= PROGRAMS.keys():
            raise ConfigurationError(f"programs {self.programs}; choose among {', '.join(PROGRAMS)}")
        if self.rounds < 2 or self.canaries < 16 or self.size < self.canaries:
            raise ConfigurationError(
                f"{self.canaries} canaries of {self.size} coordinates over {self.rounds} rounds show nothing: take 16 "
                "canaries or more, as many coordinates, and two rounds or more"
            )

    @property
    def numbers_of_guesses(self) -> tuple[int, ...]:
        """From a few sure ones to all: fixed before anything is seen."""
        return tuple(sorted({max(8, self.canaries // part) for part in (1, 2, 4, 8, 20)}, reverse=True))


@dataclass(frozen=True)
class AuditOutcome:
    """What an audit of one server found.

    Attributes:
        claimed: What was audited.
        bound: The largest epsilon that was refuted, and by whom.
        program: What the canaries did then.
    """

    claimed: Claimed
    bound: LowerBound
    program: str

    @property
    def holds(self) -> bool:
        """Whether the claim was not refuted."""
        return self.bound.epsilon <= self.claimed.epsilon


@dataclass
class Transcript:
    """What was published in a run, reduced to what attackers use.

    Attributes:
        along: float64 (rounds, canaries), each round's release along each canary.
        clip_norms: float64 (rounds), published after each round.
    """

    along: Float64Array
    clip_norms: Float64Array = field(default_factory=lambda: np.zeros(0))


def audit(claimed: Claimed, plan: AuditPlan) -> AuditOutcome:
    """Audit a server by all programs and attackers.

    Args:
        claimed: Server and claim.
        plan: How much is tried.

    Returns:
        A correct server is refuted with a probability of at most ``ERROR``. One that is not refuted may still be wrong.
    """
    random = np.random.default_rng(plan.seed)
    outcomes = []
    for name in plan.programs:
        canaries = Canaries.draw(plan.canaries, plan.size, random)
        included = random.random(plan.canaries) < 0.5
        server = claimed.start(plan.canaries, plan.size, plan.rounds)
        norms = PROGRAMS[name](plan.canaries, server.clip_norm)
        transcript = run(server, canaries, included, norms, plan.rounds)
        bound = best_lower_bound(
            scores(transcript, norms),
            included,
            plan.numbers_of_guesses,
            delta=claimed.delta,
            error=ERROR / len(plan.programs),
        )
        outcomes.append(AuditOutcome(claimed, bound, name))
    return max(outcomes, key=lambda outcome: outcome.bound.epsilon)


def run(server: Server, canaries: Canaries, included: BoolArray, norms: Norms, rounds: int) -> Transcript:
    """Let the canaries take part in every round, and keep what is published."""
    along, clip_norms = [], []
    for round_id in range(rounds):
        published = server.round(canaries.updates(included, norms(round_id)))
        along.append(canaries.along(published.values))
        clip_norms.append(published.clip_norm)
    return Transcript(np.stack(along), np.array(clip_norms))


def scores(transcript: Transcript, norms: Norms) -> list[tuple[str, Float64Array]]:
    """What each attacker thinks of each coin; larger means rather in."""
    lengths = np.stack([norms(round_id) for round_id in range(len(transcript.along))])
    return [
        ("sum of all rounds", _weighted_sum(transcript.along, lengths)),
        ("difference of neighbouring rounds", _differences(transcript.along, lengths)),
        ("published clip norms", _owners(transcript.clip_norms, lengths)),
    ]


def _weighted_sum(along: Float64Array, lengths: Float64Array) -> Float64Array:
    """The matched filter: rounds in which a canary takes part, added."""
    return np.asarray((along * (lengths > 0)).sum(axis=0))


def _differences(along: Float64Array, lengths: Float64Array) -> Float64Array:
    """What changes when a canary pauses: noise that is the same in both rounds is gone."""
    steps = np.sign(np.diff((lengths > 0).astype(np.float64), axis=0))
    return np.asarray((np.diff(along, axis=0) * steps).sum(axis=0))


def _owners(clip_norms: Float64Array, lengths: Float64Array) -> Float64Array:
    """Between whose norms a published clip norm lies, if it is a quantile: they are in, and nobody between them is."""
    count = lengths.shape[1]
    found = np.zeros(count)
    place = QUANTILE * (count - 1)
    part = place - int(place)
    for published, sent in zip(clip_norms, lengths, strict=True):
        order = np.argsort(sent, kind="stable")
        ordered = sent[order]
        for gap in range(1, min(_WIDEST_GAP, count)):
            between = (1 - part) * ordered[:-gap] + part * ordered[gap:]
            matches = np.flatnonzero(np.isclose(between, published, rtol=1e-6, atol=0.0) & (ordered[:-gap] > 0))
            if matches.size:
                first = int(matches[0])
                found[order[[first, first + gap]]] += 1
                found[order[first + 1 : first + gap]] -= 1
                break
    return found
