"""What the study compares: fleets, ways to train them, seeds; and its cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from server_ref.aggregation.server_optim import Adam, ServerOptimizer, Sgd
from simulator.personal_study.training import Method, World

Part = Literal["gain", "steps", "languages", "protection"]

LABELS: Final = "two classes each"
WRITERS: Final = "writers"
LANGUAGES: Final = "languages"

WORLDS: Final = (
    World(
        f"digits, {LABELS}",
        "digits",
        "mlp",
        "shards:2",
        devices=100,
        newcomers=20,
        cohort=20,
        batch_size=8,
    ),
    World(
        f"digits, {WRITERS}",
        "digits",
        "mlp",
        "iid",
        skew="writers,rotation:90",
        devices=100,
        newcomers=20,
        cohort=20,
        batch_size=8,
    ),
    World(
        f"fashion-mnist, {LABELS}",
        "fashion-mnist",
        "mlp",
        "shards:2",
        devices=100,
        newcomers=20,
        cohort=20,
        batch_size=16,
    ),
    World(
        f"fashion-mnist, {WRITERS}",
        "fashion-mnist",
        "mlp",
        "iid",
        skew="writers,rotation:180",
        devices=100,
        newcomers=20,
        cohort=20,
        batch_size=32,
    ),
)
"""The fleets of the gains: labels that differ, and pictures that do."""

SPEAKERS: Final = World(
    LANGUAGES,
    "manpages",
    "byte-mlp",
    "by-group",
    devices=80,
    newcomers=8,
    cohort=16,
    batch_size=64,
    # Single bytes are hard to tell, and gradients of few of them noisy.
    adaptation_batch=256,
    adaptation_rate=0.1,
    adaptation_steps=20,
    tests=200,
)

FEDAVG: Final = "fedavg, then fine-tuning"


def methods_of(world: World) -> tuple[Method, ...]:
    """How a fleet is trained: rates by its data set, chosen with one seed, by few trials; the page says on what."""
    if world.name == LANGUAGES:
        adam = Adam(learning_rate=0.01)
        return (
            Method(FEDAVG, "fedavg", 0.3, adam),
            Method("fomaml", "fomaml", 0.3, adam),
            Method("FedPer", "fedavg", 0.3, adam, ("head.output",)),
        )
    alpha = 0.1 if world.dataset == "digits" or WRITERS in world.name else 0.05
    adam = Adam(learning_rate=0.01)
    plain: ServerOptimizer = Sgd(learning_rate=1.0)
    return (
        Method(FEDAVG, "fedavg", 0.1, plain),
        Method("reptile", "reptile", 0.1, Sgd(learning_rate=1.5)),
        Method("fomaml", "fomaml", alpha, adam),
        # Second order makes more of each step, and too much of a long one.
        Method("maml", "maml", alpha if alpha > 0.05 else 0.02, adam),
        Method("per-fedavg", "per-fedavg", 0.1, Sgd(learning_rate=0.2)),
        Method("FedPer", "fedavg", 0.1, plain, ("output",)),
    )


PROTECTIONS: Final[Mapping[str, Mapping[str, object]]] = {
    "none": {},
    "clipped, epsilon 8": {
        "aggregation": {"clip_norm": 0.5},
        "privacy": {"noise": "server", "epsilon": 8.0, "max_participations": 10},
    },
    "topk:0.05": {"compression": "topk:0.05"},
    "a tenth flips signs": {"attack": "sign-flip", "byzantine": 0.1},
    "a tenth flips signs, multi-krum": {
        "attack": "sign-flip",
        "byzantine": 0.1,
        "aggregation": {"rule": "multi-krum"},
    },
}
"""What MAML's meta-gradients pass through: settings of whole runs, with the pipeline of the reference server."""

PROTECTED: Final[Mapping[str, object]] = {
    "dataset": "fashion-mnist-14", "model": "softmax", "partition": "shards:2", "engine": "cohort", "devices": 1000,
    "cohort": 200, "algorithm": "maml", "batch_size": 8, "learning_rate": 0.1,
}  # fmt: skip
"""A linear model and many devices: what differential privacy needs."""


class StudySettings(BaseModel):
    """How much is played.

    Attributes:
        seeds: Of every cell.
        rounds: Of the gains.
        long_rounds: Of the part on steps, whose models are looked at on the way.
        language_rounds: Of the languages.
        protected_rounds: Of the whole runs.
        adaptation: Steps that curves go on for.
        few: Examples of a newcomer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[int, ...] = (1, 2, 3)
    rounds: int = Field(200, ge=2)
    long_rounds: int = Field(500, ge=2)
    language_rounds: int = Field(300, ge=2)
    protected_rounds: int = Field(40, ge=2)
    adaptation: int = Field(10, ge=5)
    few: int = Field(10, ge=1)

    def cells(self) -> Iterator[Cell]:
        """Everything that is played, the short parts first."""
        for seed in self.seeds:
            for world in WORLDS:
                for method in methods_of(world):
                    yield Cell("gain", world, method, seed)
            long = WORLDS[2]
            yield Cell("steps", long, next(m for m in methods_of(long) if m.name == "maml"), seed)
            for name in PROTECTIONS:
                yield Cell("protection", None, None, seed, name)
            for method in methods_of(SPEAKERS):
                yield Cell("languages", SPEAKERS, method, seed)

    def looked_at(self) -> tuple[int, ...]:
        """Rounds of the part on steps whose models newcomers adapt: ever further apart."""
        return tuple(sorted({0, *(max(1, self.long_rounds * share // 100) for share in (2, 5, 10, 20, 40, 70, 100))}))


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        part: Of the study.
        world: Which fleet; None for the whole runs.
        method: How it is trained; likewise.
        seed: Of everything but noise.
        protection: Of the whole runs: a key of ``PROTECTIONS``.
    """

    part: Part
    world: World | None
    method: Method | None
    seed: int
    protection: str = ""

    @property
    def key(self) -> str:
        """What tells it from all other cells of its study."""
        what = [self.world.name if self.world else "", self.method.name if self.method else self.protection]
        return "; ".join([self.part, *filter(None, what), str(self.seed)])
