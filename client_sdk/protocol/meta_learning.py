"""Meta-learning: what a device is asked for beside a local training, and which of its examples play which part.

What the four algorithms send (w the global weights, U_K(w) the weights after K steps of gradient descent on the
support examples, L the mean loss of the query examples, alpha the plan's learning rate):

==========  ========  ====================================================================================
algorithm   kind      update
==========  ========  ====================================================================================
maml        gradient  grad of L(U_K(w)) with respect to w, through all K steps [Finn et al. 2017]
fomaml      gradient  grad of L at U_K(w): first order                          [Finn et al. 2017; Nichol et al. 2018]
reptile     delta     U_K(w) - w, on all examples                              [Nichol et al. 2018]
per-fedavg  gradient  sum of K local meta-gradients, each at the weights that the one before led to with the local
                      meta rate beta [Fallah et al. 2020, Per-FedAvg (HF)]
==========  ========  ====================================================================================

A local meta-gradient of Per-FedAvg is ``(I - alpha H(w; D'')) grad(w - alpha grad(w; D); D')``, of three batches: D and
D'' of the support, D' of the query examples. With the server learning rate beta the mean of such updates leads to the
mean of the devices' weights, which is the paper's average.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from client_sdk.protocol.errors import NotEnoughExamples

MetaAlgorithm = Literal["maml", "fomaml", "reptile", "per-fedavg"]
META_ALGORITHMS: Final[tuple[str, ...]] = get_args(MetaAlgorithm)

Int64Array = npt.NDArray[np.int64]


class MetaPlan(BaseModel):
    """The part of a ``TrainingPlan`` that only meta-learning has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inner_steps: int = Field(5, ge=1, le=100, description="K: steps of adaptation, or of Per-FedAvg's local training")
    query_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of a device's examples that adaptation never sees"
    )
    query_batches: int = Field(
        1, ge=1, le=64, description="batches of query examples that a meta-gradient of maml or fomaml is averaged over"
    )
    meta_learning_rate: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=False,
        description="beta: rate of Per-FedAvg's local meta steps; of gradients the server's, unless that has its own",
    )


@dataclass(frozen=True)
class ExampleSplit:
    """Which examples adapt, and which judge the adapted model.

    Attributes:
        support: Rows, int64, ascending; at least one.
        query: The others, int64, ascending.
    """

    support: Int64Array
    query: Int64Array

    @classmethod
    def of(
        cls, x: npt.NDArray[np.float32], y: Int64Array, query_fraction: float, *, require_query: bool = True
    ) -> Self:
        """Split by what the examples are.

        Guarantees: equal examples are on one side, so that none is known from the other; the split of an example with
        its label depends on the device's examples alone, not on their order, a seed or the round, so that while they
        stay the same what judged a model once never adapts one later. ``query_fraction`` of the different examples are
        query ones, at least one, and of each class about as large a part. One of each class adapts, unless no class has
        a second one.

        Args:
            x: float32 ``[n, ...]``.
            y: int64 ``[n]``.
            query_fraction: In (0, 1).
            require_query: Whether to refuse examples of which none can judge, instead of leaving ``query`` empty.

        Raises:
            NotEnoughExamples: None at all; with ``require_query`` fewer than two different ones.
        """
        if not len(x):
            raise NotEnoughExamples("there are no examples to adapt with")
        rows = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
        groups: dict[bytes, list[int]] = {}
        for i in range(len(x)):
            digest = hashlib.blake2b(rows[i].tobytes() + int(y[i]).to_bytes(8, "little", signed=True), digest_size=16)
            groups.setdefault(digest.digest(), []).append(i)
        by_class: dict[int, list[bytes]] = {}
        for key in sorted(groups):  # by hash: as good as drawn, and the same in any order of the examples
            by_class.setdefault(int(y[groups[key][0]]), []).append(key)
        sizes = {label: len(by_class[label]) for label in sorted(by_class)}
        counts = _query_counts(sizes, query_fraction)
        chosen = [key for label, count in counts.items() for key in by_class[label][:count]]
        if not chosen and require_query:
            raise NotEnoughExamples(
                "meta-learning needs at least two different examples, one to adapt with and one to judge by"
            )
        query = np.array(sorted(i for key in chosen for i in groups[key]), np.int64)
        mine = np.ones(len(x), np.bool_)
        mine[query] = False
        return cls(np.flatnonzero(mine).astype(np.int64), query)


def _query_counts(sizes: Mapping[int, int], fraction: float) -> dict[int, int]:
    """Class -> different examples of it that judge: largest remainders, ties to the lowest label."""
    total = max(1, round(fraction * sum(sizes.values())))
    spare = {label: size - 1 for label, size in sizes.items()}
    counts = {label: min(int(fraction * size), spare[label]) for label, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda label: (counts[label] - fraction * sizes[label], label))
    while sum(counts.values()) < total:
        label = next((label for label in by_remainder if counts[label] < spare[label]), None)
        if label is None:
            break
        counts[label] += 1
        by_remainder.remove(label)
        by_remainder.append(label)
    if not any(counts.values()) and len(sizes) > 1:
        # One example of each class: one judges, the others adapt.
        counts[min(sizes)] = 1
    return counts


_SUPPORT, _QUERY, _HESSIAN = range(3)  # streams of one seed


@dataclass(frozen=True)
class MetaBatches:
    """The batches of one device's session, as rows of its examples; whoever trains alike draws alike.

    Attributes:
        support: K batches that adaptation sees, one a step; of maml, fomaml and reptile those of the inner loop, of
            per-fedavg those called D.
        query: Batches of the meta-gradient: of maml and fomaml at most ``query_batches`` that share no example, of
            per-fedavg K (those called D'), of reptile none.
        hessian: Of per-fedavg K batches of support examples, called D''; else none.
    """

    support: tuple[Int64Array, ...]
    query: tuple[Int64Array, ...]
    hessian: tuple[Int64Array, ...]

    @classmethod
    def of(
        cls, algorithm: MetaAlgorithm, plan: MetaPlan, split: ExampleSplit, *, batch_size: int, seed: int, shuffle: bool
    ) -> Self:
        """Draw a session's batches.

        Each stream goes through its examples in epochs, shuffled by Philox with the key (seed, epoch and stream); the
        last batch of an epoch may be short. Reptile, which judges nothing, adapts with all examples: query ones too.

        Args:
            algorithm: Of the plan.
            plan: K and the numbers of batches.
            split: See ``ExampleSplit``.
            batch_size: B, the most examples of a batch.
            seed: In ``[0, 2**64)``: the assignment's shuffle seed.
            shuffle: Whether epochs are shuffled; else rows in ascending order.
        """

        def stream(rows: Int64Array, which: int, count: int) -> tuple[Int64Array, ...]:
            batches = _batches(rows, batch_size, seed, which, shuffle=shuffle)
            return tuple(next(batches) for _ in range(count))

        k = plan.inner_steps
        if algorithm == "reptile":
            everything = np.sort(np.concatenate([split.support, split.query]))
            return cls(stream(everything, _SUPPORT, k), (), ())
        support = stream(split.support, _SUPPORT, k)
        if algorithm == "per-fedavg":
            return cls(support, stream(split.query, _QUERY, k), stream(split.support, _HESSIAN, k))
        count = min(plan.query_batches, math.ceil(len(split.query) / batch_size))
        return cls(support, stream(split.query, _QUERY, count), ())


def _batches(rows: Int64Array, size: int, seed: int, which: int, *, shuffle: bool) -> Iterator[Int64Array]:
    epoch = 0
    while True:
        # The low 64 bits are the seed's, as in ``epoch_order``; stream 0 then shuffles as ordinary training does.
        key = seed | (epoch | which << 32) << 64
        order = rows[np.random.Generator(np.random.Philox(key=key)).permutation(len(rows))] if shuffle else rows
        for at in range(0, len(order), size):
            yield order[at : at + size]
        epoch += 1
