"""All attacks by name, and how they are written on a command line."""

from __future__ import annotations

from typing import Any, Final

from simulator.adversaries.base import Attack
from simulator.adversaries.on_data import Backdoor, LabelFlip
from simulator.adversaries.on_updates import (
    Alie,
    Collude,
    GaussianNoise,
    InnerProduct,
    Mimic,
    MinMax,
    MinSum,
    Scaling,
    SignFlip,
    Zero,
)
from simulator.errors import AttackError

_KINDS: Final = (
    SignFlip, Scaling, GaussianNoise, Zero, Alie, InnerProduct, Mimic, MinMax, MinSum, Collude, LabelFlip, Backdoor,
)  # fmt: skip
ATTACKS: Final[dict[str, type[Attack]]] = {kind.name: kind for kind in _KINDS}
# Names under which the literature knows them too.
_ALIASES: Final = {"foe": InnerProduct.name, "free-rider": Zero.name}


def attack_forms() -> list[str]:
    """How each attack is written, e.g. ``scaling[:FACTOR]``."""
    return [_form(kind) for kind in _KINDS]


def _form(kind: type[Attack]) -> str:
    names = list(kind.parameters())
    if not names:
        return kind.name
    if len(names) == 1:
        return f"{kind.name}[:{names[0].upper()}]"
    return f"{kind.name}[:{','.join(f'{name}={name.upper()}' for name in names)}]"


def parse_attack(text: str) -> Attack:
    """Parse the command line's form: a name, then values or ``name=value`` pairs.

    >>> parse_attack("scaling:1000")
    Scaling(factor=1000.0)
    >>> str(parse_attack("backdoor:target=7,scale=5"))
    'backdoor:target=7,scale=5'

    Raises:
        AttackError: No such attack, no such parameter, or a value out of range; the message lists what there is.
    """
    name, colon, rest = text.partition(":")
    kind = ATTACKS.get(_ALIASES.get(name, name))
    if kind is None:
        raise AttackError(f"there is no attack {name!r}; choose one of {', '.join(attack_forms())}")
    parameters = kind.parameters()
    values: dict[str, Any] = {}
    for position, word in enumerate(rest.split(",") if colon else []):
        key, equals, value = word.partition("=")
        if not equals:
            key, value = (list(parameters)[position] if position < len(parameters) else ""), word
        if key not in parameters or key in values:
            raise AttackError(f"{text!r} cannot be read at {word!r}; the form is {_form(kind)}")
        try:
            values[key] = parameters[key].parse(value)
        except ValueError as e:
            raise AttackError(f"{kind.name}'s {key} ({parameters[key].meaning}) {e}, got {value!r}") from e
    return kind(**values)
