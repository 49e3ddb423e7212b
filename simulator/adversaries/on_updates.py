"""Attacks on updates: the device learns honestly, and sends something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.adversaries import vectors
from simulator.adversaries.base import Attack, AttackContext, CommonAttack, parameter, seeded
from simulator.adversaries.examples import Float32Array
from simulator.adversaries.vectors import Perturbation


@dataclass(frozen=True)
class SignFlip(Attack):
    """Sends its update with the opposite sign."""

    name: ClassVar[str] = "sign-flip"
    summary: ClassVar[str] = "the honest update times -FACTOR"
    factor: float = parameter(1.0, "times the update", float)

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:  # noqa: ARG002 - it needs to know nothing
        """See ``vectors.scaled``."""
        return vectors.scaled(own, -self.factor)


@dataclass(frozen=True)
class Scaling(Attack):
    """Sends a multiple of its update."""

    name: ClassVar[str] = "scaling"
    summary: ClassVar[str] = "the honest update times FACTOR"
    factor: float = parameter(100.0, "times the update", float)

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:  # noqa: ARG002 - it needs to know nothing
        """See ``vectors.scaled``."""
        return vectors.scaled(own, self.factor)


@dataclass(frozen=True)
class GaussianNoise(Attack):
    """Sends noise."""

    name: ClassVar[str] = "gaussian"
    summary: ClassVar[str] = "noise, FACTOR times as large as the honest update"
    factor: float = parameter(10.0, "standard deviation beside the update's root mean square", float)

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:
        """See ``vectors.gaussian``."""
        rng = seeded("gaussian", context.seed, context.version, context.device)
        return vectors.gaussian(own, self.factor, rng)


@dataclass(frozen=True)
class Zero(CommonAttack):
    """Takes part and contributes nothing."""

    name: ClassVar[str] = "zero"
    summary: ClassVar[str] = "an update of zeros: a free rider"

    def vector(self, context: AttackContext) -> Float32Array:
        """Zeros."""
        return np.zeros_like(context.weights)


@dataclass(frozen=True)
class Alie(CommonAttack):
    """A little is enough."""

    name: ClassVar[str] = "alie"
    summary: ClassVar[str] = "a little is enough: the colluders' mean less Z standard deviations"
    z: float | None = parameter(
        None, "standard deviations; max: as many as n and f allow", float, high=1e6, absent="max"
    )

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.a_little_is_enough``."""
        z = vectors.alie_z_max(context.reports, context.attackers) if self.z is None else self.z
        return vectors.a_little_is_enough(context.colluders(), z)


@dataclass(frozen=True)
class InnerProduct(CommonAttack):
    """Inner product manipulation, also called fall of empires."""

    name: ClassVar[str] = "ipm"
    summary: ClassVar[str] = "inner product manipulation: the colluders' mean times -EPSILON"
    epsilon: float = parameter(0.5, "times the mean", float)

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.inner_product``."""
        return vectors.inner_product(context.colluders(), self.epsilon)


@dataclass(frozen=True)
class Mimic(CommonAttack):
    """All repeat one of their own."""

    name: ClassVar[str] = "mimic"
    summary: ClassVar[str] = "the honest update of one device, repeated by all"

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.mimic``."""
        return vectors.mimic(context.colluders())


@dataclass(frozen=True)
class MinMax(CommonAttack):
    """No further from any update than the furthest two are from each other."""

    name: ClassVar[str] = "min-max"
    summary: ClassVar[str] = "as far off the mean as the two furthest updates are from each other"
    perturbation: Perturbation = parameter(Perturbation.STD, "direction", Perturbation)  # noqa: RUF009 - a field

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.min_max``."""
        return vectors.min_max(context.colluders(), self.perturbation)


@dataclass(frozen=True)
class MinSum(CommonAttack):
    """No further from all updates together than one of them is."""

    name: ClassVar[str] = "min-sum"
    summary: ClassVar[str] = "as far off the mean as the sum of squared distances lets pass"
    perturbation: Perturbation = parameter(Perturbation.STD, "direction", Perturbation)  # noqa: RUF009 - a field

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.min_sum``."""
        return vectors.min_sum(context.colluders(), self.perturbation)


@dataclass(frozen=True)
class Collude(CommonAttack):
    """One poison for all, in the same direction all the time."""

    name: ClassVar[str] = "collude"
    summary: ClassVar[str] = "one common random direction, FACTOR times as long as an honest update"
    factor: float = parameter(10.0, "length beside an honest update's", float)

    def vector(self, context: AttackContext) -> Float32Array:
        """See ``vectors.common_poison``."""
        return vectors.common_poison(context.colluders(), self.factor, seeded("collude", context.seed))
