"""A noise stage for tests of the pipeline: calibrated to the sensitivity that it reads off the aggregate."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from server_ref.aggregation import Adjacency, Aggregate, Facts, PrivateAggregate, Slot, require_sensitivity


@dataclass(frozen=True)
class CalibratedNoise:
    """Gaussian noise from a fixed generator: fit to be looked at, not to protect anybody.

    It is told no clip norm and no count: all it knows is what stands on the aggregate.
    """

    noise_multiplier: float
    adjacency: Adjacency = Adjacency.ZERO_OUT

    @property
    def slot(self) -> Slot:
        return Slot.NOISE

    @property
    def title(self) -> str:
        return f"Gaussian noise, noise_multiplier {self.noise_multiplier:g} ({self.adjacency} adjacency)"

    def derive(self, facts: Facts) -> Facts:
        require_sensitivity(facts, self.adjacency)
        return replace(facts, noised=True)

    def release(self, aggregate: Aggregate) -> Aggregate:
        stddev = self.noise_multiplier * aggregate.sensitivity[self.adjacency]
        noise = np.random.default_rng(0).normal(0.0, stddev, aggregate.values.shape)
        kept = {field.name: getattr(aggregate, field.name) for field in fields(Aggregate)}
        kept["values"] = aggregate.values + noise
        return PrivateAggregate(**kept, noise_stddev=stddev, adjacency=self.adjacency)
