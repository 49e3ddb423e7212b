"""Which devices of a fleet attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from simulator.errors import AttackError


@dataclass(frozen=True)
class Roster:
    """The attackers: ``floor(fraction * devices)`` of them, drawn by the seed.

    Rosters of one seed are nested: who attacks at a fraction attacks at every larger one, so that a study over
    fractions compares the same devices.

    Attributes:
        devices: Size of the fleet.
        attackers: Who attacks, in the order of the draw.
    """

    devices: int
    attackers: tuple[int, ...]

    @classmethod
    def of(cls, seed: int, devices: int, fraction: float) -> Roster:
        """Draw a roster.

        Raises:
            AttackError: The fraction is not one, or too small for a single attacker.
        """
        if not 0 < fraction < 1:
            raise AttackError(f"the attackers' fraction must lie between 0 and 1, got {fraction:g}")
        # A fraction like 0.3 of 10 is 3, whatever the last bit of the product says.
        count = math.floor(round(fraction * devices, 9))
        if count == 0:
            raise AttackError(
                f"a fraction of {fraction:g} of {devices} devices is no attacker; take {1 / devices:.3g} or more"
            )
        order = np.random.default_rng([seed, 0x6174_7461]).permutation(devices)
        return cls(devices, tuple(order[:count].tolist()))
