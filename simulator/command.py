"""The command that repeats a run."""

from __future__ import annotations

import shlex
from typing import Any, Final

from server_ref.aggregation.staleness import StalenessPolicy, StalenessWeighting
from simulator.config import SimulationConfig, flag_of, flat

# Shown even where they are the default: what a run is about.
_ALWAYS: Final = frozenset({"dataset", "devices", "rounds", "model", "partition", "seed"})
# Said by --staleness, or by no flag at all.
_ELSEWHERE: Final = frozenset(
    {"format", "weighting", "exponent", "final_exponent", "total_rounds", "min_staleness", "step_times_curvature"}
)


def command_of(config: SimulationConfig) -> str:
    """``pocketfed simulate`` with every setting that is not the default.

    Settings that no flag can say (they come from a caller of the library) are left out.
    """
    defaults, values = flat(SimulationConfig().model_dump(mode="json")), flat(config.model_dump(mode="json"))
    words = []
    for path, value in values.items():
        shown = path[0] in _ALWAYS or value != defaults[path]
        if value is None or not shown or path[-1] in _ELSEWHERE or path[0] == "divergence":
            continue
        words.append(_word(flag_of(path), value))
    words += _staleness(config.staleness)
    return " ".join(["pocketfed simulate", *words, "--out DIR"])


def _word(flag: str, value: Any) -> str:  # noqa: ANN401 - a setting of any type
    return flag if value is True else f"{flag} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"


def _staleness(policy: StalenessPolicy) -> list[str]:
    usual = StalenessPolicy()
    match policy.weighting:
        case StalenessWeighting.CONSTANT:
            return ["--staleness constant"]
        case StalenessWeighting.ADAPTIVE:
            return [f"--staleness adaptive:{policy.exponent:g}..{policy.final_exponent:g}"]
        case _ if policy.exponent != usual.exponent:
            return [f"--staleness polynomial:{policy.exponent:g}"]
    return []
