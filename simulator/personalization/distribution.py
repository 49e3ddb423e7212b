"""How what personalisation gives is spread over devices: a mean hides whom it fails."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server_ref.selection import jain_index
from simulator.results import FairnessResult, ForgettingResult, WorstDecile

Float64Array = npt.NDArray[np.float64]


def size_of_tenth(devices: int) -> int:
    """Devices in a tenth of so many, rounded up."""
    return -(-devices // 10)


def lowest_tenth(values: Float64Array) -> float:
    """Mean of the lowest tenth of the values, rounded up to whole devices.

    Example:
        >>> lowest_tenth(np.array([0.9, 0.1, 0.3] + [0.5] * 8))
        0.2
    """
    return float(np.sort(values)[: size_of_tenth(len(values))].mean())


def worst_decile(of_all: Float64Array, own: Float64Array) -> WorstDecile:
    """The tenth that each model serves worst: not the same devices, so that luck in who is measured favours neither.

    Args:
        of_all: float64[n], accuracy of the global model on each device, n >= 1.
        own: float64[n], of its personal one.
    """
    before, after = lowest_tenth(of_all), lowest_tenth(own)
    return WorstDecile(
        devices=size_of_tenth(len(of_all)),
        global_accuracy=before,
        personalized_accuracy=after,
        personalization_gain=after - before,
    )


def fairness(of_all: Float64Array, own: Float64Array) -> FairnessResult:
    """How unequally devices are served before and after, and how gain and loss are spread.

    Args:
        of_all: As in ``worst_decile``.
        own: Likewise.
    """
    gains = own - of_all
    return FairnessResult(
        global_stddev=float(of_all.std()),
        personalized_stddev=float(own.std()),
        global_jain=min(1.0, jain_index(of_all.tolist())),
        personalized_jain=min(1.0, jain_index(own.tolist())),
        worst_decile_gain=lowest_tenth(gains),
        losing=float((gains < 0).mean()),
    )


def forgetting(
    before: Float64Array, adapted: Float64Array, renewed: Float64Array, merged: Float64Array, *, share: float
) -> ForgettingResult:
    """What is left of a local gain after a new global model came.

    Args:
        before: float64[n], accuracy of the old global model on each device.
        adapted: Of the device's own, adapted from that.
        renewed: Of the new global model.
        merged: Of that with the given share of what the device had learned.
        share: See ``ForgettingResult``.
    """
    gain, left = float((adapted - before).mean()), float((merged - renewed).mean())
    return ForgettingResult(
        personal_share=share, gain_before=gain, gain_after=left, kept=left / gain if gain > 0 else None
    )
