"""What a cohort's clients are asked for, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client_sdk.protocol.errors import ProgramError
from client_sdk.protocol.program import Float32Array
from client_sdk.protocol.training import TrainingPlan
from client_sdk.training import Controls
from simulator.cohort.batches import Int64Array


@dataclass(frozen=True)
class LocalWork:
    """One client's local training.

    Attributes:
        rows: int64[n], its examples: rows of the trainer's data, n >= 1.
        shuffle_seed: As in ``LocalTrainer.train``.
        controls: With scaffold, and only there; the server's control is the same for all clients of one call.
        plan: What it trains of the call's plan: batch size and numbers of epochs and steps of its own. None for all.
        own: float32[p], its personal layers, where the plan has some and it has trained them before; None for those
            of the weights that all start from.
    """

    rows: Int64Array
    shuffle_seed: int
    controls: Controls | None = None
    plan: TrainingPlan | None = None
    own: Float32Array | None = None


@dataclass(frozen=True)
class CohortResult:
    """What local training produced for c clients.

    Attributes:
        updates: float32[c, update_size(plan, d)], what each client sends before compression, d counting the shared
            layers alone; zeros where it failed.
        steps: int64[c], optimizer steps taken; of meta-learning, ``inner_steps``.
        first_epoch_losses: float64[c], as in ``TrainingResult``.
        last_epoch_losses: float64[c], likewise; where a meta-gradient was sent, the mean query loss.
        failures: Position of a client -> why it has no update: TrainingDiverged, or NotEnoughExamples.
        personal: float32[c, p], what each client keeps of its personal layers; None in a plan without any.
    """

    updates: Float32Array
    steps: Int64Array
    first_epoch_losses: npt.NDArray[np.float64]
    last_epoch_losses: npt.NDArray[np.float64]
    failures: Mapping[int, ProgramError]
    personal: Float32Array | None = None


class Figures(NamedTuple):
    """How a batch of c clients fared.

    Attributes:
        steps: int64[c], steps taken.
        first: float64[c], mean loss of the first epoch.
        last: float64[c], of the last one.
        diverged: bool[c], whether a loss, or what would be sent or kept, is not finite.
    """

    steps: Int64Array
    first: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    diverged: npt.NDArray[np.bool_]


def finite_rows(values: Tensor) -> Tensor:
    """bool[c]: whether a row is finite throughout."""
    finite = torch.isfinite(values.sum(dim=1))
    for i in torch.nonzero(~finite).flatten().tolist():  # a sum may overflow where no addend did
        finite[i] = torch.isfinite(values[i]).all()
    return finite
