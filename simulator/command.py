"""The command that repeats a run."""

from __future__ import annotations

import shlex
from typing import Any, Final

from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from server_ref.aggregation.staleness import StalenessPolicy, StalenessWeighting
from server_ref.protection import SecureConfig
from simulator.config import SimulationConfig, flag_of, flat
from simulator.recipes import recipe_of

# Shown even where they are the default: what a run is about.
_ALWAYS: Final = frozenset({"dataset", "devices", "rounds", "model", "partition", "seed"})


def command_of(config: SimulationConfig) -> str:
    """``pocketfed simulate`` with every setting that is not the default.

    Parsing its words gives the same configuration, but for settings that no flag can say (they come from a caller of
    the library): those are left out.
    """
    defaults, values = (flat(c.model_dump(mode="json", exclude={"profiles"})) for c in (SimulationConfig(), config))
    defaults |= flat({"meta": MetaPlan().model_dump()})
    # What is written nowhere is the data set's recipe, and not the default.
    recipe = flat(recipe_of(config.dataset, config.algorithm))
    adapts = config.algorithm in META_ALGORITHMS
    words = []
    for path, value in values.items():
        if path[0] == "secure" or (adapts and path == ("epochs",)):
            continue
        flag = "--personalize" if adapts and path == ("algorithm",) else flag_of(path)
        shown = path[0] in _ALWAYS or value != defaults[path] or value != recipe.get(path, value)
        if value is None or not shown or not flag.startswith("--") or path[0] in {"format", "staleness"}:
            continue
        words.append(_word(flag, value))
    if config.profiles is not None:
        words.append(f"--profiles {config.profiles.built_in or 'FILE'}")
    words += _staleness(config.staleness)
    if config.secure is not None:
        words += _secure(config.secure)
    return " ".join(["pocketfed simulate", *words, "--out DIR"])


def _word(flag: str, value: Any) -> str:  # noqa: ANN401 - a setting of any type
    if value is True:
        return flag
    if isinstance(value, list):
        value = ",".join(value)
    return f"{flag} {shlex.quote(_number(value) if isinstance(value, float) else str(value))}"


def _number(value: float) -> str:
    """The shortest text that is read as this very number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _secure(secure: SecureConfig) -> list[str]:
    """One flag says how many there are, and of the others those that are not the default."""
    shares = f"{secure.threshold}of{secure.num_aggregators}"
    values = secure.model_dump(mode="json", exclude={"threshold", "num_aggregators"}, exclude_defaults=True)
    return [f"--secure {shares}", *(_word(flag_of(("secure", name)), value) for name, value in values.items())]


def _staleness(policy: StalenessPolicy) -> list[str]:
    """One flag says the weights, and none of them means anything without the tolerance."""
    words = []
    match policy.weighting:
        case StalenessWeighting.CONSTANT:
            words.append("--staleness constant")
        case StalenessWeighting.ADAPTIVE:
            words.append(f"--staleness adaptive:{_number(policy.exponent)}..{_number(policy.final_exponent)}")
        case _ if policy.exponent != StalenessPolicy().exponent:
            words.append(f"--staleness polynomial:{_number(policy.exponent)}")
    if policy.tighten_rounds is not None:
        words.append(f"--tighten {policy.tighten_rounds}")
    if policy.scale_learning_rate:
        words.append("--stale-lr")
    if policy.max_staleness or words:
        words.insert(0, f"--max-staleness {policy.max_staleness}")
    return words
