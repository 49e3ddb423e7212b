"""Byzantine-robust rules: pure functions from n vectors to one.

Names are loaded on first use, and the compiler with the first rule that is applied.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.aggregation.robust.estimate import estimate_num_byzantine
    from server_ref.aggregation.robust.limits import RULES, Rule, check_options
    from server_ref.aggregation.robust.mixing import Mixed, bucketing, nearest_neighbor_mixing
    from server_ref.aggregation.robust.options import DistanceMode, Mixing, RuleOptions
    from server_ref.aggregation.robust.reduction import Reduction
    from server_ref.aggregation.robust.rules import (
        apply_rule,
        bulyan,
        centered_clipping,
        geometric_median,
        krum,
        median,
        multi_krum,
        trimmed_mean,
    )
    from server_ref.aggregation.robust.sensitivity import sensitivity_replace_one
    from server_ref.aggregation.robust.warm import warm_robust

__all__ = [
    "RULES",
    "DistanceMode",
    "Mixed",
    "Mixing",
    "Reduction",
    "Rule",
    "RuleOptions",
    "apply_rule",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "check_options",
    "estimate_num_byzantine",
    "geometric_median",
    "krum",
    "median",
    "multi_krum",
    "nearest_neighbor_mixing",
    "sensitivity_replace_one",
    "trimmed_mean",
    "warm_robust",
]

_MODULES = {
    "estimate": ("estimate_num_byzantine",),
    "limits": ("RULES", "Rule", "check_options"),
    "mixing": ("Mixed", "bucketing", "nearest_neighbor_mixing"),
    "options": ("DistanceMode", "Mixing", "RuleOptions"),
    "reduction": ("Reduction",),
    "rules": (
        "apply_rule",
        "bulyan",
        "centered_clipping",
        "geometric_median",
        "krum",
        "median",
        "multi_krum",
        "trimmed_mean",
    ),
    "sensitivity": ("sensitivity_replace_one",),
    "warm": ("warm_robust",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
