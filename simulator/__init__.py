"""The device-fleet simulator: real devices, server and programs; only time is simulated.

Names resolve on first use (PEP 562), so that the command line stays quick where it has nothing to simulate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.config import SimulationConfig
    from simulator.datasets import Dataset, Split, load_dataset
    from simulator.folder import RunFolder
    from simulator.personalization.evaluator import PersonalizationEvaluator
    from simulator.population import Population
    from simulator.prepare import Fleet
    from simulator.results import SimulationResults
    from simulator.run import RunOptions, run_simulation

_HOME = {
    "Dataset": "datasets",
    "Fleet": "prepare",
    "PersonalizationEvaluator": "personalization.evaluator",
    "Population": "population",
    "RunFolder": "folder",
    "RunOptions": "run",
    "SimulationConfig": "config",
    "SimulationResults": "results",
    "Split": "datasets",
    "load_dataset": "datasets",
    "run_simulation": "run",
}

__all__ = [
    "Dataset",
    "Fleet",
    "PersonalizationEvaluator",
    "Population",
    "RunFolder",
    "RunOptions",
    "SimulationConfig",
    "SimulationResults",
    "Split",
    "load_dataset",
    "run_simulation",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name of the package
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
