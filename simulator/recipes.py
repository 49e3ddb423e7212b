"""What a run takes where no flag says it: tuned for each data set and, of what adapts, for each algorithm.

Loads nothing heavy, since ``pocketfed simulate --help`` tells these values too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from server_ref.flags import merged
from simulator.personalization.settings import META_RECIPES

# Local training that suits a data set's size and difficulty, tuned on its validation split with 100 and 200 devices and
# a Dirichlet(0.5) partition.
RECIPES: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "digits": {"epochs": 5, "batch_size": 8, "learning_rate": 0.5},
        "fashion-mnist": {"epochs": 5, "batch_size": 16, "learning_rate": 0.1},
        # One step on all of a device's few images: clipping wants small updates of about one norm.
        "fashion-mnist-14": {"model": "softmax", "epochs": 1, "batch_size": 8, "learning_rate": 1.0},
        # Each device speaks one language.
        "manpages": {
            "model": "byte-mlp",
            "partition": "by-group",
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 0.3,
        },
    }
)


def recipe_of(dataset: str, algorithm: str) -> dict[str, Any]:
    """What is not given, nested like the configuration; the rest are its defaults."""
    return merged(dict(RECIPES.get(dataset, {})), dict(META_RECIPES.get(dataset, {}).get(algorithm, {})))


def told_rates() -> str:
    """The learning rates in words, for a flag's help."""
    plain = ", ".join(f"{recipe['learning_rate']:g} for {name}" for name, recipe in RECIPES.items())
    return "; ".join([plain, *_told_adapting(lambda recipe: recipe["learning_rate"])])


def told_meta_rates() -> str:
    """The meta rates in words, for a flag's help."""
    tuned = _told_adapting(lambda recipe: recipe.get("meta", {}).get("meta_learning_rate"))
    return "; ".join([*tuned, "else 0.05"])


def _told_adapting(rate: Callable[[Mapping[str, Any]], float | None]) -> list[str]:
    """``with --personalize on digits: maml 0.1, ...`` of every data set that has such recipes."""
    return [
        f"with --personalize on {dataset}: "
        + ", ".join(f"{name} {value:g}" for name, recipe in of.items() if (value := rate(recipe)) is not None)
        for dataset, of in META_RECIPES.items()
    ]
