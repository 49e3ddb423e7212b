"""Centred clipping under differential privacy: every update counts by its clipped difference from a public centre.

    outcome = v + (sum of clip(x_i - v, radius) + noise) / denominator

One pass of the robust rule of that name, from a centre v that does not depend on this round's updates: zero, or what an
earlier round released. An update moves the sum by at most the radius, however far away it lies, so the noise is
calibrated to the radius (twice that, if neighbours replace one). The nearer the centre, the smaller a radius will do,
and the less both noise and dishonest updates weigh.

A centre belongs to a round, so a pipeline with these stages is built for each round.

Source: S. P. Karimireddy, L. He, M. Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.protocol.clipping import clip_global
from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from server_ref.aggregation.batch import Aggregate, Facts, Float32Array, PrivateAggregate, Visibility
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Clip, Noise


@dataclass(frozen=True, eq=False)
class CentredClip:
    """Replaces an update by its difference from the centre, scaled down to an L2 norm of at most ``radius``.

    Made by ``centred_stages``, together with the stage that puts the centre back.

    Attributes:
        centre: float32[size].
        radius: Longest difference that counts in full.
    """

    centre: Float32Array
    radius: float

    @property
    def slot(self) -> Slot:
        """``clip``."""
        return Slot.CLIP

    @property
    def title(self) -> str:
        """The bound."""
        return f"L2 norm of the difference from a public centre <= {self.radius:g}"

    def derive(self, facts: Facts) -> Facts:
        """Enforces a norm bound on what is summed: the radius.

        Raises:
            IndividualUpdatesNeeded: Only a sum is visible: then the devices subtract the centre and clip.
            ShapeMismatch: The centre has another size.
        """
        if facts.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded(
                f"'{self.title}' looks at single updates, but only their sum is visible here; let the devices subtract "
                "the centre and clip, and declare the radius as norm_bound"
            )
        if self.centre.shape != (facts.size,):
            raise ShapeMismatch(f"the centre has {self.centre.size} coordinates, an update {facts.size}")
        return replace(facts, norm_bound=self.radius, max_abs=self.radius)

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        """The clipped difference, how long it was, and whether it was clipped; see ``stages.Clip``."""
        result = clip_global(vector - self.centre, self.radius)
        return result.vector, result.norm, result.clipped


@dataclass(frozen=True, eq=False)
class Recentred:
    """Another noise stage, after which the centre is added back: post-processing of what that stage released.

    Attributes:
        noise: What protects the sum of the differences.
        centre: The clip stage's.
    """

    noise: Noise
    centre: Float32Array

    @property
    def slot(self) -> Slot:
        """``noise``."""
        return Slot.NOISE

    @property
    def title(self) -> str:
        """The noise, and the centre."""
        return f"{self.noise.title}, then the public centre is added back"

    def derive(self, facts: Facts) -> Facts:
        """As the noise stage's."""
        return self.noise.derive(facts)

    def release(self, aggregate: Aggregate) -> Aggregate:
        """What the noise stage releases, moved by the centre; see ``stages.Noise``."""
        released = self.noise.release(aggregate)
        return replace(released, values=released.values + self.centre, integers=None)


def centred_stages(
    noise: Noise, *, size: int, radius: float, previous: Aggregate | None = None
) -> tuple[CentredClip, Recentred]:
    """The two stages of a round with a centre: for ``clip`` and for ``noise``.

    Args:
        noise: The stage that noises the sum of the differences.
        size: Coordinates of an update.
        radius: Bound of a difference's L2 norm; the sum's sensitivity (twice that under replace-one adjacency).
        previous: What an earlier round released, to be the centre; None for zero.

    Raises:
        ConfigurationError: A radius that is not positive and finite, or a centre that was released without noise: it
            would carry what it knows of its own round's updates past the noise.
        ShapeMismatch: A centre of another size.
    """
    if not 0 < radius < math.inf:
        raise ConfigurationError(f"the radius must be positive and finite, got {radius}")
    centre = np.zeros(size, np.float32)
    if previous is not None:
        if not isinstance(previous, PrivateAggregate):
            raise ConfigurationError(
                "the centre is an aggregate without noise, and whatever is released around it would give it away; use "
                "an aggregate that was released with noise, or start from zero"
            )
        if previous.values.shape != (size,):
            raise ShapeMismatch(f"the centre has {previous.values.size} coordinates, an update {size}")
        centre = previous.values.astype(np.float32)
    centre.flags.writeable = False
    return CentredClip(centre, radius), Recentred(noise, centre)


if TYPE_CHECKING:
    _clips: type[Clip] = CentredClip
    _noises: type[Noise] = Recentred
