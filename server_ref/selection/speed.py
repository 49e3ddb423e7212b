"""How fast a device is taken to be: what was measured, or else what devices of its tier were measured to be.

Classes of speed are coarse on purpose. The fastest quarter is one class, in which turns go round: being faster than
that earns nothing, so that neither the same few devices do all the work nor one that answers without training gains by
it. A tier is the device's own word: it is believed until the first report, and ranks below a measurement of the same
class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.profile import DeviceTier
from server_ref.selection.policy import SLOWEST_CLASS, Int64Array

TIER_CODES: Final[Mapping[DeviceTier, int]] = {
    DeviceTier.HIGH_END: 0,
    DeviceTier.MID_RANGE: 1,
    DeviceTier.LOW_END: 2,
}
MEMORY: Final = 0.25
"""Weight of the newest latency in a device's mean."""

FloatArray = npt.NDArray[np.float64]


def updated(mean_s: float | None, latency_s: float) -> float:
    """A device's mean latency after one more report: exponentially weighted, one number of state."""
    return latency_s if mean_s is None else mean_s + MEMORY * (latency_s - mean_s)


@dataclass(frozen=True)
class SpeedScale:
    """What counts as fast among some devices.

    Attributes:
        reference_s: Latency that a quarter of the measured devices keep; None: nothing was measured.
        tiers_s: For each tier's code the latency that its devices are taken to have.
    """

    reference_s: float | None
    tiers_s: tuple[float, float, float]

    @classmethod
    def of(cls, latency_s: FloatArray, tier: Int64Array) -> SpeedScale:
        """From mean latencies (NaN: none yet; float64[n], seconds) and codes of tiers (int64[n])."""
        known = np.isfinite(latency_s)
        if not known.any():
            # Only claims are there: each tier is taken to be twice as slow as the one above.
            return cls(None, (1.0, 2.0, 4.0))
        measured = latency_s[known]
        median = float(np.quantile(measured, 0.5, method="lower"))
        tiers = []
        for code in range(len(TIER_CODES)):
            own = latency_s[known & (tier == code)]
            tiers.append(float(np.quantile(own, 0.5, method="lower")) if len(own) else median)
        return cls(float(np.quantile(measured, 0.25, method="lower")), (tiers[0], tiers[1], tiers[2]))

    def classes(self, latency_s: FloatArray, tier: Int64Array, lost: Int64Array) -> Int64Array:
        """Speed classes: 0 up to the reference, 1 up to twice that, and so on; one more for each assignment lost."""
        latency = np.where(np.isfinite(latency_s), latency_s, np.asarray(self.tiers_s)[tier])
        doublings = np.ceil(np.log2(latency / (self.reference_s or 1.0)))
        classes: Int64Array = np.clip(doublings.astype(np.int64) + lost, 0, SLOWEST_CLASS)
        return classes
