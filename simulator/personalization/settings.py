"""How devices adapt at the end of a run, and what meta-learning takes to learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

DEFAULT_STEPS: Final = 5
"""Of adaptation, where no plan says how many."""

# Data set -> algorithm -> rates, from few trials: 60 rounds of 100 devices, with two classes each and pictures turned
# by up to 45 degrees, and with a Dirichlet(0.5) partition. Those of maml and fomaml are smaller than what suits softmax
# regression best, with which a perceptron's training diverges. The meta rate is the server's too, of those that send
# gradients.
META_RECIPES: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "digits": {
            "maml": {"learning_rate": 0.1, "meta": {"meta_learning_rate": 0.5}},
            "fomaml": {"learning_rate": 0.1, "meta": {"meta_learning_rate": 0.5}},
            "reptile": {"learning_rate": 0.3},
            "per-fedavg": {"learning_rate": 0.1, "meta": {"meta_learning_rate": 0.3}},
        },
    }
)


@dataclass(frozen=True)
class Adaptation:
    """How devices adapt.

    Attributes:
        steps: K, at least 1.
        learning_rate: Of each step.
        batch_size: The most examples of a step.
        personal_layers: That each device keeps for itself.
    """

    steps: int
    learning_rate: float
    batch_size: int
    personal_layers: tuple[str, ...] = ()
