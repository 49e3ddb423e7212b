"""The local training that an assignment asks for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TrainingPlan(BaseModel):
    """Hyperparameters of one device's local training; travels in the assignment.

    ``prox_mu`` is the coefficient of the proximal term mu/2 ||w - w_global||^2 [Li et al. 2020, FedProx].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_epochs: int = Field(1, ge=1, le=1000)
    batch_size: int = Field(32, ge=1, le=65536)
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    prox_mu: float = Field(0.0, ge=0, allow_inf_nan=False)
    shuffle: bool = True
    max_steps: int | None = Field(None, ge=1)
