"""What a robustness study compares: rules, attacks, fractions of attackers, seeds; and what all its cells share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.training import TrainingPlan
from server_ref.aggregation.robust.limits import RULES
from server_ref.aggregation.robust.options import Mixing, RuleOptions
from simulator.adversaries.base import Attack
from simulator.adversaries.registry import parse_attack
from simulator.adversaries.roster import Roster
from simulator.config import flag_of
from simulator.partition import parse_partition

T = TypeVar("T")

NONE: Final = "none"
MEAN: Final = "mean"
DEFAULT_RULES: Final = (MEAN, *RULES)
DEFAULT_ATTACKS: Final = (
    NONE, "sign-flip", "scaling", "gaussian", "zero", "alie", "alie:1.5", "ipm", "ipm:10", "mimic", "min-max",
    "min-sum", "collude", "label-flip", "backdoor", "backdoor:scale=replace",
)  # fmt: skip


@dataclass(frozen=True)
class RuleChoice:
    """A rule, with what replaces the updates before it sees them. Prints as it is parsed, e.g. ``nnm+krum``."""

    name: str
    mixing: Mixing = Mixing.NONE

    def __str__(self) -> str:
        return self.name if self.mixing is Mixing.NONE else f"{self.mixing}+{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``mean``, a robust rule's name, or ``nnm+RULE`` or ``bucketing+RULE``.

        Raises:
            ConfigurationError: Something else; the message lists what there is.
        """
        before, plus, name = text.rpartition("+")
        mixings = [m.value for m in Mixing if m is not Mixing.NONE]
        if name not in DEFAULT_RULES or (plus and (before not in mixings or name == MEAN)):
            raise ConfigurationError(
                f"there is no rule {text!r}; choose one of {', '.join(DEFAULT_RULES)}, and put {' or '.join(mixings)} "
                "and a + in front of a robust one"
            )
        return cls(name, Mixing(before) if plus else Mixing.NONE)

    @property
    def options(self) -> RuleOptions:
        """For ``RobustRule``."""
        return RuleOptions(mixing=self.mixing)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        rule: The aggregation, which reckons with exactly as many attackers as there are.
        attack: What they do; None: they are honest after all.
        fraction: Their part of the fleet.
        seed: Of partition, roster, shuffles and attack.
    """

    rule: RuleChoice
    attack: Attack | None
    fraction: float
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells it from all other cells of its study."""
        return (str(self.rule), str(self.attack or NONE), self.fraction, self.seed)


class StudySettings(BaseModel):
    """What all cells of a study share. Every device reports in every round, and all reports weigh the same.

    Attributes:
        dataset: Name of a data set.
        model: Reference model, from the same initial weights in every cell.
        devices: Reports in each round.
        rounds: Model updates.
        partition: How the training examples are dealt out.
        epochs: Local passes over a device's examples.
        batch_size: Examples per local step.
        learning_rate: Of the local steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "digits"
    model: Literal["softmax", "mlp", "cnn"] = "mlp"
    devices: int = Field(40, ge=3, le=10_000)
    rounds: int = Field(20, ge=1, le=100_000)
    partition: str = "dirichlet:1"
    epochs: int = Field(2, ge=1, le=1000)
    batch_size: int = Field(8, ge=1, le=4096)
    learning_rate: float = Field(0.3, gt=0, le=1e3, allow_inf_nan=False)

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        return str(parse_partition(value))

    @classmethod
    def parse(cls, values: dict[str, object]) -> Self:
        """Validate values from the command line; missing ones take the data set's recipe, then the defaults.

        Raises:
            ConfigurationError: A value out of range; the message names the flag.
            PartitionError: An unknown partition.
        """
        recipe = _RECIPES.get(str(values.get("dataset")), {})
        try:
            return cls.model_validate({**recipe, **values})
        except ValidationError as e:
            raise ConfigurationError(
                "; ".join(f"{flag_of(err['loc'])}: {err['msg']} (got {err['input']!r})" for err in e.errors())
            ) from e

    @property
    def plan(self) -> TrainingPlan:
        """The devices' local training."""
        return TrainingPlan(local_epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate)

    def attackers(self, fraction: float) -> int:
        """How many devices a fraction is, rounded down."""
        # A fraction like 0.3 of 10 is 3, whatever the last bit of the product says.
        return math.floor(round(fraction * self.devices, 9))


# What a larger data set needs to stay a matter of minutes; not tuned. The defaults above are for digits.
_RECIPES: Final[dict[str, dict[str, object]]] = {
    "fashion-mnist": {"devices": 50, "rounds": 20, "epochs": 1, "batch_size": 32, "learning_rate": 0.1},
}


@dataclass(frozen=True)
class Axes:
    """What a study varies.

    Attributes:
        rules: Aggregations.
        attacks: What attackers do; None: nothing.
        fractions: Parts of the fleet that attack, in [0, 0.5). At 0 there is nobody to carry an attack out.
        seeds: Repetitions.
    """

    rules: tuple[RuleChoice, ...]
    attacks: tuple[Attack | None, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def parse(cls, rules: str, attacks: str, fractions: str, seeds: str) -> Self:
        """Read comma-separated lists, as the command line has them; what is named twice counts once.

        An attack's own parameters are separated by commas too: those after the first are told by their ``name=``.

        Raises:
            ConfigurationError: An entry that cannot be read.
            AttackError: No such attack.
        """
        return cls(
            rules=_unique(RuleChoice.parse(word) for word in _words(rules, "--rules")),
            attacks=_unique(None if word == NONE else parse_attack(word) for word in split_attacks(attacks)),
            fractions=_unique(_fraction(word) for word in _words(fractions, "--fractions")),
            seeds=_unique(_seed(word) for word in _words(seeds, "--seeds")),
        )

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed, so that what is done first is a whole table of one seed."""
        for seed in self.seeds:
            for fraction in self.fractions:
                attacks = self.attacks if fraction > 0 else tuple(a for a in self.attacks if a is None)
                for attack in attacks:
                    for rule in self.rules:
                        yield Cell(rule, attack, fraction, seed)

    def check(self, settings: StudySettings, num_classes: int) -> None:
        """Whether every cell can be begun.

        Raises:
            AttackError: A fraction of nobody, or an attack that the data set has no class for.
            ConfigurationError: There is nothing to do.
        """
        if not any(True for _ in self.cells()):
            raise ConfigurationError(
                "there are no cells: fraction 0 takes the attack none; name it, or other fractions"
            )
        for attack in self.attacks:
            if attack is not None:
                attack.check(num_classes)
        for fraction in self.fractions:
            if fraction > 0:
                Roster.of(0, settings.devices, fraction)


def split_attacks(text: str) -> list[str]:
    """Attacks of a comma-separated list.

    >>> split_attacks("none,backdoor:target=7,scale=5,alie:1.5")
    ['none', 'backdoor:target=7,scale=5', 'alie:1.5']
    """
    found: list[str] = []
    for word in _words(text, "--attacks"):
        if "=" in word and ":" not in word and found:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigurationError(f"{flag} names nothing")
    return words


def _unique(values: Iterator[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _fraction(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < 0.5:
        raise ConfigurationError(f"--fractions lie in [0, 0.5): no rule stands half of the devices; got {word!r}")
    return value


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**31:
        raise ConfigurationError(f"--seeds are whole numbers from 0 to {2**31 - 1}, got {word!r}")
    return int(word)
