"""How a device makes a model its own: the app's choices, and what is known of the model that came of them. No I/O."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_sdk.programs import ProgramNames
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.training import TrainingPlan

_SHA256 = "^[0-9a-f]{64}$"


class MergePolicy(StrEnum):
    """What becomes of the personal model when a new global model comes."""

    REPLACE = "replace"
    """The global model takes its place, until the app personalises again; nothing of the old one stays."""

    READAPT = "readapt"
    """The new global model is adapted anew, by the same examples and those that have come since."""

    INTERPOLATE = "interpolate"
    """What the device had learned is laid over the new global model, in part or whole."""


class PersonalizationConfig(BaseModel):
    """The app's choices. The first four names are the specification's.

    For a model that a server has trained to adapt well, ``inner_steps`` and ``inner_lr`` are best those of its plan
    (``meta.inner_steps`` and ``learning_rate``): it was trained for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inner_steps: int = Field(5, ge=0, le=100, description="K: steps of adaptation; 0 keeps the global weights")
    inner_lr: float = Field(0.01, gt=0, allow_inf_nan=False, description="rate of each of them")
    meta_lr: float = Field(
        0.001,
        gt=0,
        allow_inf_nan=False,
        description="rate of the local meta steps of train_with_personalization by per-fedavg; else without effect",
    )
    val_split: float = Field(
        0.2, gt=0, lt=1, description="share of the examples that judge the adapted model, and never adapt it"
    )
    batch_size: int | None = Field(
        None, ge=1, le=65536, description="examples of a step; None for the size of the program that fits them best"
    )
    personal_layers: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="parameters, or modules, that adapt; the others stay the global model's. None for all",
    )
    merge: MergePolicy = Field(MergePolicy.READAPT, description="what becomes of it when a new global model comes")
    personal_share: float = Field(
        0.5, ge=0, le=1, description="a, of interpolate: w = new global + a (old personal - old global)"
    )
    merge_steps: int = Field(0, ge=0, le=100, description="steps of adaptation that follow an interpolation")
    refit: bool = Field(
        False,
        description="once judged, adapt anew with all examples; the figures are then those of the model before that",
    )
    seed: int = Field(0, ge=0, lt=2**64, description="of the order in which examples come")
    shuffle: bool = Field(True, description="whether they are shuffled; else in the order they have")

    def for_task(self, plan: TrainingPlan) -> Self:
        """These choices, where what was not chosen follows a server's task, which says how its model is to be adapted.

        Args:
            plan: The task's; without ``meta`` it says nothing but the rate by which its model learns.
        """
        of_task: dict[str, float] = {"inner_lr": plan.learning_rate}
        if plan.meta is not None:
            of_task |= {
                "inner_steps": plan.meta.inner_steps,
                "meta_lr": plan.meta.meta_learning_rate,
                "val_split": plan.meta.query_fraction,
            }
        return self.model_copy(update={k: v for k, v in of_task.items() if k not in self.model_fields_set})


def chosen_config(
    merge: str | None, *, steps: int | None = None, rate: float | None = None, layers: str | None = None
) -> PersonalizationConfig | None:
    """The choices of a command line; what is None is left to the task.

    Args:
        merge: A policy, ``interpolate:A`` with its share; None for no personal model.
        steps: K.
        rate: Of each step.
        layers: Names with commas between them.

    Raises:
        ConfigurationError: Something out of range, or choices for no personal model.

    >>> chosen_config("interpolate:0.25", steps=3).personal_share
    0.25
    """
    names = None if layers is None else tuple(name.strip() for name in layers.split(","))
    chosen: dict[str, object] = {"inner_steps": steps, "inner_lr": rate, "personal_layers": names}
    if merge is None:
        if any(value is not None for value in chosen.values()):
            raise ConfigurationError("choices for a personal model mean nothing without --personalize")
        return None
    policy, _, share = merge.partition(":")
    chosen |= {"merge": policy, "personal_share": share or None}
    try:
        return PersonalizationConfig.model_validate({k: v for k, v in chosen.items() if v is not None})
    except ValidationError as e:
        problem = e.errors()[0]
        raise ConfigurationError(f"personalisation: {problem['loc'][0]}: {problem['msg']}") from e


class Judgement(BaseModel):
    """How a model does on examples that it was not adapted with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int = Field(ge=1)
    correct: int = Field(ge=0, description="where the first largest logit is the label's")
    loss: float = Field(ge=0, allow_inf_nan=False, description="mean cross-entropy, nats")

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.examples

    def gain_over(self, other: Judgement) -> Gain:
        """What this model has before another."""
        return Gain(accuracy=self.accuracy - other.accuracy, loss=other.loss - self.loss)


class Gain(BaseModel):
    """What one model has before another on the same examples; negative where it has less."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float
    loss: float = Field(allow_inf_nan=False, description="by how much the mean loss is lower")


class Retention(BaseModel):
    """How much of what a device had gained outlives a new global model, on the examples that judge.

    Two questions, which differ where the new global model is better by itself. *Kept*: of what the owner had before the
    old global one, how much is still there, whoever's doing it is? Less than 1 is what was forgotten. *Own*: how much
    of such a lead has the personal model now, before the new global one? It shrinks too where the global model has
    learned by itself what only the personal one did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Gain = Field(description="of the old personal model over the old global one")
    renewed: Gain = Field(description="of the new global model over the old global one")
    merged: Gain = Field(description="of the merged model over the new global one, before any step of adaptation")
    after: Gain = Field(description="of the model with these steps over the new global one")

    @property
    def accuracy_merged(self) -> float | None:
        """Share of the accuracy gained that the merge alone keeps; None where there was nothing to keep."""
        return _share(self.merged.accuracy + self.renewed.accuracy, self.before.accuracy)

    @property
    def loss_merged(self) -> float | None:
        """The same of the loss."""
        return _share(self.merged.loss + self.renewed.loss, self.before.loss)

    @property
    def accuracy_kept(self) -> float | None:
        """Share of the accuracy gained that is there in the end; more than 1 where it grew."""
        return _share(self.after.accuracy + self.renewed.accuracy, self.before.accuracy)

    @property
    def loss_kept(self) -> float | None:
        """The same of the loss."""
        return _share(self.after.loss + self.renewed.loss, self.before.loss)

    @property
    def accuracy_own(self) -> float | None:
        """The personal model's lead in accuracy over the new global one, as a share of its former lead."""
        return _share(self.after.accuracy, self.before.accuracy)

    @property
    def loss_own(self) -> float | None:
        """The same of the loss."""
        return _share(self.after.loss, self.before.loss)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


class PersonalRecord(BaseModel):
    """Where a personal model comes from, and how it was judged.

    ``of_global`` and ``of_personal`` are the two models before the choice between them: where the adapted one has the
    higher loss, the device serves the global weights, and ``adapted`` is false. Without examples to judge by both are
    None: the model is adapted, and nobody knows whether it is better.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    program_sha256: str = Field(pattern=_SHA256)
    parameter_table_sha256: str = Field(pattern=_SHA256)
    manifest_sha256: str | None = Field(
        None, pattern=_SHA256, description="by which a server names the program; None for one that the app brought"
    )
    model_version: int = Field(ge=0, description="of the global model")
    global_sha256: str = Field(pattern=_SHA256, description="of its float32 values, little-endian")
    data_sha256: str = Field(pattern=_SHA256, description="data_fingerprint of the device's examples")
    config: PersonalizationConfig
    adapted: bool = Field(description="whether it is the device's own; else it is the global model")
    steps: int = Field(ge=0, description="of adaptation that were taken")
    support_examples: int = Field(ge=0)
    query_examples: int = Field(ge=0)
    of_global: Judgement | None = None
    of_personal: Judgement | None = None
    retention: Retention | None = Field(None, description="where it took the place of another personal model")

    @property
    def program_names(self) -> ProgramNames | None:
        """Its program, as a server names it; None where none did."""
        if self.manifest_sha256 is None:
            return None
        return ProgramNames(self.manifest_sha256, self.program_sha256, self.parameter_table_sha256)

    @property
    def validated(self) -> bool:
        """Whether examples of its own have judged it."""
        return self.of_personal is not None
