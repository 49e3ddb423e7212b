"""Settings of the server optimizers, as a configuration file or a flag names them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerName(StrEnum):
    """Which optimizer applies the aggregates."""

    SGD = "sgd"
    ADAGRAD = "adagrad"
    ADAM = "adam"
    YOGI = "yogi"


SETTINGS: Mapping[OptimizerName, frozenset[str]] = {
    OptimizerName.SGD: frozenset({"momentum", "nesterov"}),
    OptimizerName.ADAGRAD: frozenset({"beta1", "epsilon"}),
    OptimizerName.ADAM: frozenset({"beta1", "beta2", "epsilon", "bias_correction"}),
    OptimizerName.YOGI: frozenset({"beta1", "beta2", "epsilon"}),
}
"""Which settings, beside those that all of them have, belong to which optimizer."""


class OptimizerConfig(BaseModel):
    """Settings of a server optimizer. What is left out has the optimizer's own default.

    Raises:
        pydantic.ValidationError: A value out of its range, or a setting that the named optimizer does not have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: OptimizerName = Field(OptimizerName.SGD, description="sgd, adagrad, adam or yogi")
    learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of the server; 1 and sgd: plain averaging; default: 1, of meta-gradients the plan's meta rate",
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="sgd: share of the last step in the next; default: 0")
    nesterov: bool | None = Field(None, description="sgd: look ahead along the momentum; default: no")
    beta1: float | None = Field(None, ge=0, lt=1, description="momentum of the others; default: 0.9 (adagrad: 0)")
    beta2: float | None = Field(None, ge=0, lt=1, description="memory of the second moment; default: 0.99")
    epsilon: float | None = Field(None, ge=1e-30, le=1e30, description="added to its root; default: 1e-3")
    bias_correction: bool | None = Field(None, description="adam: as by Kingma and Ba; default: no, as by Reddi et al.")
    rescale_every: int = Field(100, ge=0, description="steps between rescalings of what is accumulated; 0: as needed")

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        others = self.settings().keys() - SETTINGS[self.name]
        if others:
            raise ValueError(f"{self.name} has no {' and no '.join(sorted(others))}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum: set one")
        return self

    def settings(self) -> dict[str, float | bool]:
        """What is set of the settings that only some optimizers have."""
        return self.model_dump(exclude={"name", "learning_rate", "rescale_every"}, exclude_none=True)
