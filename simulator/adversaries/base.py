"""What an attack is: where it acts, what an attacker knows, how its parameters are written.

An attack has two places to act: ``poison`` changes the examples that a device learns from, ``craft`` changes the
update that it sends. Most use one of them; the other is the identity. Both are functions of their arguments alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import numpy as np

from simulator.adversaries.examples import Float32Array, Int64Array


def seeded(*key: object) -> np.random.Generator:
    """Randomness that is a function of its key: no order of calls, and no thread, can change it."""
    digest = hashlib.blake2b(b"pocketfed-attack-v1:" + repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class AttackContext:
    """What an attacker knows when it sends a report.

    Attributes:
        seed: Of the run.
        version: Model that the update starts from.
        device: The attacker.
        reports: n, reports in a round.
        attackers: f, how many of them are the attackers' on average; from 1.
        weights: float32[d], the model.
        colluders: Gives float32[m, d], m >= 1: honest updates of the attackers' own devices from this model, the same
            rows for every attacker. Computed on the first call; an attack that needs none does not ask.
    """

    seed: int
    version: int
    device: int
    reports: int
    attackers: int
    weights: Float32Array
    colluders: Callable[[], Float32Array]


class Adversary(Protocol):
    """A device that does not do as it is told."""

    def poison(
        self, x: Float32Array, y: Int64Array, num_classes: int, rng: np.random.Generator
    ) -> tuple[Float32Array, Int64Array]:
        """The examples that it learns from: as many as it has. Its own are not changed.

        Args:
            x: float32[n, *feature_shape].
            y: int64[n].
            num_classes: Labels are 0 .. num_classes - 1.
            rng: A function of seed and device.
        """
        ...

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:
        """The update that it sends.

        Args:
            own: float32[d], what it learned; not to be changed.
            context: What it knows.

        Returns:
            float32[d], finite: a function of the arguments alone.
        """
        ...


# --- parameters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """How one parameter of an attack is written.

    Attributes:
        meaning: What it is, in a few words.
        kind: ``float``, ``int``, or an enum of words.
        low: Smallest value.
        high: Largest value.
        absent: The word for None, where None is a choice.
    """

    meaning: str
    kind: type[float] | type[int] | type[StrEnum]
    low: float = 0.0
    high: float = 1e12
    absent: str | None = None

    def parse(self, text: str) -> Any:  # noqa: ANN401 - a float, an int, a word or None
        """The value of a text.

        Raises:
            ValueError: Not one; the message says what is.
        """
        if text == self.absent:
            return None
        if issubclass(self.kind, StrEnum):
            words = [word.value for word in self.kind]
            if text not in words:
                raise ValueError(f"must be one of {', '.join(words)}")
            return self.kind(text)
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        # The chain is false for NaN too.
        if value is None or not self.low <= value <= self.high:
            kind = "a whole number" if self.kind is int else "a number"
            other = f", or {self.absent}" if self.absent else ""
            raise ValueError(f"must be {kind} from {self.low:g} to {self.high:g}{other}")
        return value

    def write(self, value: Any) -> str:  # noqa: ANN401 - as above
        """The inverse of ``parse``."""
        if value is None:
            return self.absent or ""
        return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def parameter(default: Any, meaning: str, kind: type[Any], **more: Any) -> Any:  # noqa: ANN401 - as dataclasses.field
    """A dataclass field for a parameter of an attack; ``more`` are further attributes of ``Parameter``."""
    return field(default=default, metadata={"parameter": Parameter(meaning, kind, **more)})


@dataclass(frozen=True)
class Attack:
    """Base of all attacks: an honest device. Prints as it is parsed, e.g. ``scaling:100``.

    Attributes:
        name: As on the command line.
        summary: What it does, in a few words.
        common: Whether all attackers of a model version send the same vector, whatever their own update is.
    """

    name: ClassVar[str] = "honest"
    summary: ClassVar[str] = "does what it is told"
    common: ClassVar[bool] = False

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """Its parameters by name, in the order in which they may be given without it."""
        return {f.name: f.metadata["parameter"] for f in fields(cls)}

    def __str__(self) -> str:
        parameters = self.parameters()
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        words = [parameters[k].write(v) if len(parameters) == 1 else f"{k}={parameters[k].write(v)}" for k, v in given]
        return ":".join([self.name, *([",".join(words)] if words else [])])

    def check(self, num_classes: int) -> None:
        """Whether it can be carried out on this data set.

        Raises:
            AttackError: It cannot.
        """

    def poison(
        self,
        x: Float32Array,
        y: Int64Array,
        num_classes: int,  # noqa: ARG002 - for those that change labels
        rng: np.random.Generator,  # noqa: ARG002 - for those that choose examples
    ) -> tuple[Float32Array, Int64Array]:
        """The device's own examples."""
        return x, y

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:  # noqa: ARG002 - for those that know
        """The device's own update."""
        return own


@dataclass(frozen=True)
class CommonAttack(Attack):
    """Base of those in which all attackers of a model version send one vector."""

    common: ClassVar[bool] = True

    def vector(self, context: AttackContext) -> Float32Array:
        """What all send; a function of the seed, the model and what the colluders know."""
        raise NotImplementedError

    def craft(self, own: Float32Array, context: AttackContext) -> Float32Array:  # noqa: ARG002 - one vector for all
        """The common vector."""
        return self.vector(context)
