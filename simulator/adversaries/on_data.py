"""Attacks on data: the device learns the wrong thing, and sends what it learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from simulator.adversaries import vectors
from simulator.adversaries.base import Attack, AttackContext, parameter
from simulator.adversaries.examples import Float32Array, Int64Array, check_class, flip_labels, plant_backdoor


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Learns wrong labels."""

    name: ClassVar[str] = "label-flip"
    summary: ClassVar[str] = "training on wrong labels: mirrored, or TARGET for SOURCE"
    source: int | None = parameter(None, "class that is relabelled", int, high=1e6, absent="all")
    target: int | None = parameter(None, "what it is called", int, high=1e6, absent="mirrored")

    def check(self, num_classes: int) -> None:
        """Whether the classes exist."""
        flip_labels(np.zeros(0, np.int64), num_classes, self.source, self.target)

    def poison(
        self,
        x: Float32Array,
        y: Int64Array,
        num_classes: int,
        rng: np.random.Generator,  # noqa: ARG002 - nothing is chosen
    ) -> tuple[Float32Array, Int64Array]:
        """See ``examples.flip_labels``."""
        return x, flip_labels(y, num_classes, self.source, self.target)


_REPLACE: Final = "replace"


@dataclass(frozen=True)
class Backdoor(Attack):
    """Learns to answer a trigger with a class of its choice, and nothing else that would be noticed."""

    name: ClassVar[str] = "backdoor"
    summary: ClassVar[str] = "training on images with a trigger, labelled TARGET; the update times SCALE"
    target: int = parameter(0, "class that the trigger shall mean", int, high=1e6)
    scale: float | None = parameter(
        1.0, f"times the update; {_REPLACE}: n / f, which replaces the model", float, absent=_REPLACE
    )
    size: int = parameter(3, "pixels along the trigger's edge", int, low=1, high=1e4)
    share: float = parameter(0.5, "of a device's examples that carry the trigger", float, high=1.0)

    def check(self, num_classes: int) -> None:
        """Whether the class exists."""
        check_class(self.target, num_classes)

    def poison(
        self,
        x: Float32Array,
        y: Int64Array,
        num_classes: int,  # noqa: ARG002 - the target is checked when the run begins
        rng: np.random.Generator,
    ) -> tuple[Float32Array, Int64Array]:
        """See ``examples.plant_backdoor``."""
        return plant_backdoor(x, y, target=self.target, size=self.size, share=self.share, rng=rng)

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:
        """See ``vectors.scaled``."""
        scale = context.reports / context.attackers if self.scale is None else self.scale
        return own if scale == 1 else vectors.scaled(own, scale)
