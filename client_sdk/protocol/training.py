"""The local training that an assignment asks for, and what both ends must compute alike about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.updates import UpdateKind

Algorithm = Literal["fedavg", "scaffold", "fednova", "maml", "fomaml", "reptile", "per-fedavg"]


class TrainingPlan(BaseModel):
    """Hyperparameters of one device's local training; travels in the assignment.

    ``algorithm`` decides what the device sends (d parameters):

    - ``fedavg``: the delta ``w_local - w_global``, float32 ``[d]``.
    - ``scaffold``: the delta, then the delta of the device's control variate, float32 ``[2 d]``
      [Karimireddy et al. 2020].
    - ``fednova``: the delta divided by ``normaliser``, float32 ``[d]`` [Wang et al. 2020].

    ``prox_mu`` is the coefficient of the proximal term mu/2 ||w - w_global||^2 [Li et al. 2020, FedProx]. It goes
    with ``fedavg``, and with ``fednova`` while ``learning_rate * prox_mu < 1``. It does not go with ``scaffold``:
    option II reads the device's mean gradient off its displacement, which the proximal pull would falsify.

    ``maml``, ``fomaml``, ``reptile`` and ``per-fedavg`` learn a model that adapts well: ``meta_learning`` says what
    each sends and what ``meta`` is, which they need and nothing else has. ``learning_rate`` is then that of adaptation;
    their steps are counted by ``meta.inner_steps``, and ``local_epochs`` and ``max_steps`` stay at their defaults.

    ``personal`` names layers that each device keeps for itself (``personal_layers.SharedLayers``): it trains them with
    the others, and sends nothing of them. They go with fedavg and reptile, whose update is the delta of one vector.

    ``adaptive`` makes ``batch_size`` and ``local_epochs`` the most that is asked for: each device does what its memory
    and its tier allow (``adapted``). ``max_steps`` holds all the same. Without it every device trains as planned, or
    not at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_epochs: int = Field(1, ge=1, le=1000)
    batch_size: int = Field(32, ge=1, le=65536)
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    prox_mu: float = Field(0.0, ge=0, allow_inf_nan=False)
    shuffle: bool = True
    max_steps: int | None = Field(None, ge=1)
    algorithm: Algorithm = "fedavg"
    adaptive: bool = False
    # Left out where they are off: plans of earlier releases have the same JSON, which hashes and devices go by.
    meta: MetaPlan | None = Field(None, exclude_if=lambda value: value is None)
    personal: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        (), max_length=256, exclude_if=lambda value: not value
    )

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.prox_mu > 0 and self.algorithm == "scaffold":
            raise ValueError("prox_mu has no meaning with scaffold; set it to 0 or choose fedavg or fednova")
        if self.algorithm == "fednova" and self.learning_rate * self.prox_mu >= 1:
            raise ValueError("fednova needs learning_rate * prox_mu < 1: the proximal step must not overshoot")
        if self.personal and self.algorithm not in {"fedavg", "reptile"}:
            raise ValueError(f"personal layers go with fedavg and reptile, not with {self.algorithm}")
        meta = self.algorithm in META_ALGORITHMS
        if meta != (self.meta is not None):
            needs = "needs" if meta else "has no"
            raise ValueError(f"{self.algorithm} {needs} meta settings; they go with {', '.join(META_ALGORITHMS)}")
        if meta and (self.prox_mu > 0 or self.adaptive or self.max_steps is not None or self.local_epochs != 1):
            raise ValueError(
                f"{self.algorithm} takes meta.inner_steps steps on every device: leave prox_mu, adaptive, max_steps "
                "and local_epochs out"
            )
        return self

    @property
    def update_kind(self) -> UpdateKind:
        """How the server applies what devices send: gradients are subtracted, deltas added."""
        return UpdateKind.GRADIENT if self.algorithm in {"maml", "fomaml", "per-fedavg"} else UpdateKind.DELTA


def update_size(plan: TrainingPlan, num_parameters: int) -> int:
    """Length of the flat update: ``2 d`` for scaffold (delta, then control delta), else ``d``.

    Args:
        plan: What devices train.
        num_parameters: d, of the *shared* layers: ``SharedLayers.of(manifest.parameters, plan.personal).size``.
    """
    return 2 * num_parameters if plan.algorithm == "scaffold" else num_parameters


_EPOCHS_OF_FIVE: Mapping[DeviceTier, int] = {
    DeviceTier.HIGH_END: 5,
    DeviceTier.MID_RANGE: 3,
    DeviceTier.LOW_END: 1,
}


def tier_epochs(plan: TrainingPlan, tier: DeviceTier) -> int:
    """Epochs that a device of this tier trains under an adaptive plan: of five planned ones 5, 3 or 1.

    Returns:
        That share of ``plan.local_epochs``, rounded down; at least 1.
    """
    return max(1, plan.local_epochs * _EPOCHS_OF_FIVE[tier] // 5)


def adapted(plan: TrainingPlan, tier: DeviceTier, batch_size: int) -> TrainingPlan:
    """What one device really trains under an adaptive plan; both engines of a simulation compute it here.

    The learning rate is the planned one, whatever the batch. The device's update says nothing of what was adapted but
    its steps, which with fednova bring its normaliser, bounded by ``max_steps``.

    Args:
        plan: An adaptive plan.
        tier: The device's.
        batch_size: Examples per step that its memory allows, at most the plan's.

    Returns:
        A plan that is not adaptive.

    Raises:
        ConfigurationError: The plan is not adaptive, or asks for smaller batches.
    """
    if not plan.adaptive:
        raise ConfigurationError("the plan is not adaptive: each device trains exactly what it says")
    if not 1 <= batch_size <= plan.batch_size:
        raise ConfigurationError(f"an adapted batch has 1 to {plan.batch_size} examples, not {batch_size}")
    return plan.model_copy(
        update={"batch_size": batch_size, "local_epochs": tier_epochs(plan, tier), "adaptive": False}
    )


def normaliser(plan: TrainingPlan, steps: int) -> float:
    """What a device divides its delta by; the server computes it again from the report's ``steps``.

    For FedNova it is ``a_i``, the L1 norm of the weights that the local steps' gradients have in the delta [Wang et
    al. 2020, section 4]: ``steps`` for plain SGD, and ``(1 - (1 - lr mu)^steps) / (lr mu)`` with the proximal term.
    1 for the other algorithms.

    Args:
        plan: What the assignment asks for.
        steps: Local optimizer steps taken, at least 1.

    Returns:
        A float64 in ``[1, steps]``.
    """
    if plan.algorithm != "fednova":
        return 1.0
    pull = plan.learning_rate * plan.prox_mu
    if pull == 0:
        return float(steps)
    # expm1 and log1p: with a small pull the plain formula is a difference of two numbers near 1.
    return -math.expm1(steps * math.log1p(-pull)) / pull
