"""SCAFFOLD's server side: the update carries two vectors, and the state carries the control variate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, InvalidUpdate
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Facts, Float32Array, Float64Array
from server_ref.aggregation.server_state import CONTROL, ServerState
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Apply


@dataclass(frozen=True)
class Scaffold:
    """Applies the first half of an aggregate by another optimizer, and adds the second half to the control variate.

    A buffer of S updates (delta, delta of the device's control) moves the model by the mean delta and the control by
    ``S / N`` of the mean control delta, N devices being in the population [Karimireddy et al. 2020, Algorithm 1].

    Attributes:
        optimizer: What applies the model's half.
        cohort_fraction: S / N, in (0, 1].
    """

    optimizer: Apply
    cohort_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.cohort_fraction <= 1:
            raise ConfigurationError(
                f"SCAFFOLD's buffer is a fraction of {self.cohort_fraction:g} of the population; declare a population "
                "of at least buffer_size devices"
            )

    @property
    def slot(self) -> Slot:
        """``apply``."""
        return Slot.APPLY

    @property
    def title(self) -> str:
        """The optimizer, and the share of the population in a buffer."""
        return f"{self.optimizer.title}; control variate + {self.cohort_fraction:.3g} of the mean control delta"

    def derive(self, facts: Facts) -> Facts:
        """Two vectors in one."""
        if facts.size % 2 or facts.kind is not UpdateKind.DELTA:
            raise ConfigurationError("SCAFFOLD's update is a delta followed by the delta of a control, of one size")
        return facts

    def initial(self, weights: Float32Array) -> ServerState:
        """The optimizer's state with a control variate of zero."""
        state = self.optimizer.initial(weights)
        return replace(state, tensors={**state.tensors, CONTROL: np.zeros(weights.size)})

    def step(
        self, state: ServerState, aggregate: Float64Array, kind: UpdateKind, *, learning_rate_scale: float = 1.0
    ) -> ServerState:
        """Both halves, or neither; see ``stages.Apply``."""
        control = state.tensors[CONTROL]
        inner = replace(state, tensors={name: t for name, t in state.tensors.items() if name != CONTROL})
        moved = self.optimizer.step(inner, aggregate[: control.size], kind, learning_rate_scale=learning_rate_scale)
        control = control + self.cohort_fraction * aggregate[control.size :]
        if not np.isfinite(control.astype(np.float32)).all():
            raise InvalidUpdate("the update would make the control variate infinite or NaN")
        return replace(moved, tensors={**moved.tensors, CONTROL: control})


if TYPE_CHECKING:
    _applies: type[Apply] = Scaffold
