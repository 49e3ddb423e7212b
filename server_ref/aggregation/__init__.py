"""Aggregation: pure functions and values. Names are loaded on first use, because the kernels' compiler is heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.aggregation.accumulator import Accumulator
    from server_ref.aggregation.exact import ExactAccumulator
    from server_ref.aggregation.fixed import Int64Accumulator
    from server_ref.aggregation.plan import AccumulatorPlan
    from server_ref.aggregation.warm import warm_up

__all__ = ["Accumulator", "AccumulatorPlan", "ExactAccumulator", "Int64Accumulator", "warm_up"]

_HOMES = {
    "Accumulator": "server_ref.aggregation.accumulator",
    "AccumulatorPlan": "server_ref.aggregation.plan",
    "ExactAccumulator": "server_ref.aggregation.exact",
    "Int64Accumulator": "server_ref.aggregation.fixed",
    "warm_up": "server_ref.aggregation.warm",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
