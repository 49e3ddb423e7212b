"""The attack on one run: who attacks, how, and what the attackers work out together."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol, Self

import numpy as np

from client_sdk.protocol.training import TrainingPlan
from simulator.adversaries.base import Attack, AttackContext, seeded
from simulator.adversaries.examples import Float32Array
from simulator.adversaries.registry import parse_attack
from simulator.adversaries.roster import Roster
from simulator.datasets import Split
from simulator.partition import Rows

# More would cost training time and hardly change a mean or a standard deviation.
MAX_COLLUDERS: Final = 10

Rehearse = Callable[[Sequence[int]], Float32Array]
"""Devices -> float32[m, d]: their honest updates, in this order; those whose training diverged are left out."""


class AttackedRun(Protocol):
    """What an attack needs of a run's configuration (``SimulationConfig`` has it)."""

    @property
    def attack(self) -> str | None:
        """The attack, as ``parse_attack`` reads it; None: nobody attacks."""
        ...

    @property
    def byzantine(self) -> float:
        """Fraction of the fleet that attacks."""
        ...

    @property
    def seed(self) -> int:
        """Of the run."""
        ...

    @property
    def devices(self) -> int:
        """Size of the fleet."""
        ...

    @property
    def cohort_size(self) -> int:
        """Reports in a round."""
        ...

    @property
    def max_staleness(self) -> int:
        """Model versions that a report may lag behind."""
        ...


@dataclass(frozen=True)
class AttackPlan:
    """Everything about an attack that follows from a run's configuration.

    Attributes:
        attack: What the attackers do.
        roster: Who they are.
        fraction: Their share of the fleet.
        seed: Of the run.
        reports: Reports in a round.
        num_classes: Labels of the data set.
        versions: Model versions that may be under way at once.
    """

    attack: Attack
    roster: Roster
    fraction: float
    seed: int
    reports: int
    num_classes: int
    versions: int = 2

    @classmethod
    def of(cls, run: AttackedRun, num_classes: int) -> Self | None:
        """The attack that a configuration names, None where it names none.

        Raises:
            AttackError: It cannot be carried out on this fleet or data set.
        """
        if run.attack is None:
            return None
        attack = parse_attack(run.attack)
        attack.check(num_classes)
        roster = Roster.of(run.seed, run.devices, run.byzantine)
        return cls(
            attack, roster, run.byzantine, run.seed, run.cohort_size, num_classes, versions=run.max_staleness + 2
        )

    @cached_property
    def _attackers(self) -> frozenset[int]:
        return frozenset(self.roster.attackers)

    def attacks(self, device: int) -> bool:
        """Whether a device is an attacker."""
        return device in self._attackers

    @property
    def colluders(self) -> tuple[int, ...]:
        """The devices whose honest updates all attackers know: the first of the roster, the same in every round."""
        return self.roster.attackers[:MAX_COLLUDERS]

    @property
    def attackers_per_round(self) -> int:
        """The attackers' share of a round's reports, at least 1."""
        return max(1, math.floor(round(self.fraction * self.reports, 9)))

    def poisoned(self, train: Split, parts: Sequence[Rows]) -> Split:
        """What the fleet learns from: all examples, those of the attackers as the attack changes them.

        Args:
            train: The honest examples; not changed.
            parts: Rows of each device, disjoint.

        Returns:
            As many examples, in the same rows. The very arrays that were given where the attack leaves data alone.
        """
        x, y = train.x, train.y
        for device in self.roster.attackers:
            rows = parts[device]
            before = train.x[rows], train.y[rows]
            rng = seeded("poison", self.seed, device)
            after = self.attack.poison(*before, self.num_classes, rng)
            # Copied on first use: most attacks change neither, and few change the images.
            if after[0] is not before[0]:
                x = x.copy() if x is train.x else x
                x[rows] = after[0]
            if after[1] is not before[1]:
                y = y.copy() if y is train.y else y
                y[rows] = after[1]
        for array in (x, y):
            array.flags.writeable = False
        return Split(x, y)

    def rehearsal_seed(self, version: int, device: int) -> int:
        """Shuffle seed, below 2**53, with which a colluder finds out its honest update from a model version."""
        return int(seeded("rehearsal", self.seed, version, device).integers(2**53))


class Coalition:
    """The attackers of a run at work: crafts each one's update. Safe between threads.

    Guarantees:
        A crafted update is a function of the plan, the model, the attacker and its honest update. What all attackers
        of a model version share is worked out once, by whichever thread comes first; it is the same whoever does.
    """

    def __init__(self, plan: AttackPlan) -> None:
        """Bring the attackers of a plan together."""
        self.plan = plan
        self._lock = threading.Lock()
        self._common: dict[int, Float32Array] = {}

    def craft(
        self, device: int, version: int, own: Float32Array, weights: Float32Array, rehearse: Rehearse
    ) -> Float32Array:
        """The update that an attacker sends.

        Args:
            device: The attacker.
            version: Model that it started from.
            own: float32[d], its honest update; not changed.
            weights: float32[d], that model.
            rehearse: Finds out the colluders' honest updates from the same model; only called where the attack needs
                them, at most once for each version while that is remembered.

        Returns:
            float32[d], finite. The honest update itself where the attack needs the colluders' and none of them could
            train (the model is beyond repair): then there is nothing left to attack.
        """
        plan = self.plan

        def colluders() -> Float32Array:
            rows = rehearse(plan.colluders)
            if len(rows) == 0:
                raise _NobodyLearned
            return rows

        context = AttackContext(
            seed=plan.seed,
            version=version,
            device=device,
            reports=plan.reports,
            attackers=plan.attackers_per_round,
            weights=weights,
            colluders=colluders,
        )
        if not plan.attack.common:
            return plan.attack.craft(own, context)
        with self._lock:
            crafted = self._common.get(version)
            if crafted is None:
                try:
                    crafted = plan.attack.craft(own, context)
                except _NobodyLearned:
                    return own
                crafted.flags.writeable = False
                self._common[version] = crafted
                # What belongs to a model that nobody trains any more is forgotten.
                while len(self._common) > plan.versions:
                    self._common.pop(min(self._common))
            return crafted


def plain_plan(plan: TrainingPlan) -> TrainingPlan:
    """What attackers rehearse: SCAFFOLD's correction is each device's own secret, colluders find the plain update."""
    return plan.model_copy(update={"algorithm": "fedavg"}) if plan.algorithm == "scaffold" else plan


def stacked(rows: Sequence[Float32Array], size: int) -> Float32Array:
    """Rows as float32[m, size], also where there are none."""
    return np.stack(rows) if rows else np.empty((0, size), np.float32)


class _NobodyLearned(Exception):
    """No colluder's training stayed finite."""
