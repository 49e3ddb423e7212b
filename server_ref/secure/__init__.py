"""The aggregator role: its core, its service, and the coordinator's client for it.

Names are loaded on first use (PEP 562), because the kernels' compiler is heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.secure.compiled import CompiledKernels
    from server_ref.secure.port import AggregatorPort
    from server_ref.secure.round import SecureRound
    from server_ref.secure.warm import warm_up

__all__ = ["AggregatorPort", "CompiledKernels", "SecureRound", "warm_up"]

_HOMES = {"AggregatorPort": "port", "CompiledKernels": "compiled", "SecureRound": "round", "warm_up": "warm"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
