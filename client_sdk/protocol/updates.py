"""What a device sends: kinds, wire encodings, and the specification's ``WorkerGradient``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

LOCAL_STEPS: Final = "local_steps"
"""Metadata key of a ``WorkerGradient``: how many local steps its delta took (with FedNova, the normaliser a_i)."""


class UpdateKind(StrEnum):
    """How the server applies an update. Kinds never mix in a round."""

    DELTA = "delta"
    """w_local - w_global; the server *adds* it, scaled by its learning rate."""

    GRADIENT = "gradient"
    """The server *subtracts* it, scaled by its learning rate."""


@dataclass
class WorkerGradient:
    """An update from one worker (a torch-free form of the specification's class).

    Attributes:
        worker_id: Who sent it; never used to break ties.
        gradients: Parameter name -> array (``numpy.ndarray`` or ``torch.Tensor``).
        num_samples: Examples it was trained on.
        timestamp: Seconds since the epoch on the worker's clock.
        metadata: Free-form facts.
        kind: How it is to be applied.
    """

    worker_id: str
    gradients: Mapping[str, Any]
    num_samples: int
    timestamp: float
    metadata: dict[str, Any] | None = None
    kind: UpdateKind = UpdateKind.GRADIENT
