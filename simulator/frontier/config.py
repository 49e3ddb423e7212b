"""What the frontier is drawn from: budgets, fractions of attackers, attacks, and modes that are sound under noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from simulator.adversaries.base import Attack
from simulator.adversaries.registry import parse_attack

DELTA: Final = 1e-5
NONE: Final = "none"


@dataclass(frozen=True)
class Mode:
    """A way to aggregate whose noise has a proved sensitivity.

    Attributes:
        name: In the table.
        kind: ``mean``: one noised sum. ``buckets``: noised sums of buckets, and a rule on those. ``centred``: one
            noised sum of clipped differences from what was released before.
        clip_norm: C, or the radius of ``centred``.
        learning_rate: The server's.
        buckets: R.
        rule: On the buckets.
    """

    name: str
    kind: Literal["mean", "buckets", "centred"]
    clip_norm: float
    learning_rate: float
    buckets: int = 0
    rule: str = ""

    @property
    def num_byzantine(self) -> int:
        """Bad buckets that the rule is told to stand: as many as Krum's bound allows."""
        return max(0, (self.buckets - 3) // 2)


MODES: Final = (
    Mode("noised mean", "mean", clip_norm=0.2, learning_rate=12.0),
    Mode("buckets, geometric median", "buckets", clip_norm=0.5, learning_rate=2.0, buckets=7, rule="geometric-median"),
    Mode("buckets, multi-krum", "buckets", clip_norm=0.5, learning_rate=2.0, buckets=7, rule="multi-krum"),
    Mode("centred clipping", "centred", clip_norm=1.0, learning_rate=1.0),
)
"""Clip norms and learning rates by accuracy on the validation split at epsilon 1, without and with attackers."""


class FrontierSettings(BaseModel):
    """What all cells share.

    Attributes:
        dataset: Name of a data set; the model is softmax regression.
        devices: All take part in every round, with one local step on all of their examples.
        rounds: Model updates.
        momentum: The server's.
        epsilons: Budgets at delta 1e-5, client level, zero-out adjacency; None: no noise.
        fractions: Of the devices that attack.
        attacks: What they do, as ``simulate --attack`` takes them.
        knowledge: Colluders whose honest updates the attackers put together.
        seed: Of the partition, the roster and the attack; never of noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "fashion-mnist-14"
    devices: int = Field(12_000, ge=2)
    rounds: int = Field(80, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    epsilons: tuple[float | None, ...] = (1.0, 3.0, 8.0, None)
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    attacks: tuple[str, ...] = ("sign-flip", "ipm:1000")
    knowledge: int = Field(500, ge=1)
    seed: int = 1

    def cells(self) -> Iterator[Cell]:
        """Every run of the study: without attackers there is one for each mode and budget."""
        for mode in MODES:
            for epsilon in self.epsilons:
                for fraction in self.fractions:
                    for attack in self.attacks if fraction else (NONE,):
                        yield Cell(mode, epsilon, fraction, attack)

    def attackers(self, fraction: float) -> int:
        """How many devices a fraction is, rounded down."""
        return math.floor(round(fraction * self.devices, 9))


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        mode: How updates are aggregated.
        epsilon: Budget of the run; None: no noise.
        fraction: Of the devices that attack.
        attack: What they do, or ``none``.
    """

    mode: Mode
    epsilon: float | None
    fraction: float
    attack: str

    @property
    def key(self) -> str:
        """What tells it from all other cells of its study."""
        return f"{self.mode.name}; {self.epsilon}; {self.fraction}; {self.attack}"

    @property
    def parsed(self) -> Attack | None:
        """The attack."""
        return None if self.attack == NONE else parse_attack(self.attack)
