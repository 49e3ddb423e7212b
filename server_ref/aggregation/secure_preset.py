"""``SecureAggregator``: the specification's class for sums that no single party can open, over the protocol's sharing.

In the product a device splits its update and seals one share for each aggregator, and aggregators are processes of
their own (``server_ref.secure``). The specification's class has all parts as methods, so here they run in one process,
which keeps nothing from whoever runs it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from client_sdk.protocol.errors import (
    BudgetExceeded,
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    MalformedShare,
    NotEnoughShares,
    ProtocolError,
    ShapeMismatch,
)
from client_sdk.protocol.field import Field, FieldVector, RandomBytes
from client_sdk.protocol.fixed_point import FixedPointGrid
from client_sdk.protocol.privacy import EncodedBounds, choose_private_grid, encode_clipped
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, reconstruct, share_seeded
from client_sdk.protocol.share_checks import check_parity, locate
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref.aggregation.batch import Int64Array, Update
from server_ref.aggregation.errors import MixedKinds
from server_ref.aggregation.intake import Intake, RefusedUpdate, kind_of
from server_ref.aggregation.presets import passes
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.settings import IntakeSettings
from server_ref.aggregation.share_tensors import Tensors, named, parameter_shapes, vector_of
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout, as_numpy, in_kind_of

MAX_ERROR: Final = 1e-6
"""Largest rounding error of a value that bounds may leave room for."""


class SecureAggregator:
    """Sums of updates, opened from shares of sums: any ``threshold`` aggregators together see the sum, fewer nothing.

    A value is rounded to a grid once, when it is split; from there on all arithmetic is exact. So the sum that is
    opened is the sum of the plain codes (``encode``), to the bit, whatever the order and whoever answers; and
    ``aggregate`` gives the bits of ``GradientAggregator(summation="fixed")`` with the same bounds.

    Args:
        num_aggregators: n; aggregator i, from 1 to n, holds the values at i of polynomials whose values at 0 are the
            secrets.
        threshold: t, aggregators that open a sum; t - 1 colluding ones learn nothing.
        field_size: 2**61 - 1, or 2**127 - 1.
        aggregation_method: ``fedavg`` or ``fedprox``: the workers send one vector, which is summed as it is.
        clip_norm: Largest L2 norm of an update, enforced on the codes as well; None for none.
        max_abs: Largest magnitude of a value, where no clip norm is given.
        max_weight: Largest weight of an update; weights are public integers from 1.
        max_workers: Largest number of updates in a sum. The grid is the finest on which such a sum cannot wrap around.
        random: Source of the shares' randomness; anything but a CSPRNG gives the updates away.
        on_rejected: Called with each refusal of ``aggregate``.

    Raises:
        ConfigurationError: Settings that do not go together, or bounds that leave a value an error of ``MAX_ERROR``.
        BudgetExceeded: Bounds within which no sum fits.

    Example:
        >>> import numpy as np
        >>> aggregator = SecureAggregator()
        >>> gradients = [{"w": np.array([0.5, -2.0], np.float32)}, {"w": np.array([1.0, 1.0], np.float32)}]
        >>> workers = [WorkerGradient(str(i), g, num_samples=1, timestamp=0.0) for i, g in enumerate(gradients)]
        >>> split = [aggregator.worker_split_gradient(worker) for worker in workers]
        >>> sums = [aggregator.aggregator_sum_shares(received) for received in zip(*split)]
        >>> aggregator.aggregator_combine_shares([sums[0], sums[2], sums[4]], [1, 3, 5])["w"]
        array([ 1.5, -1. ])
    """

    def __init__(
        self,
        num_aggregators: int = 5,
        threshold: int = 3,
        field_size: int = 2**61 - 1,
        *,
        aggregation_method: str = "fedavg",
        clip_norm: float | None = None,
        max_abs: float = 1024.0,
        max_weight: int = 1,
        max_workers: int = 1000,
        random: RandomBytes = os.urandom,
        on_rejected: Callable[[RefusedUpdate], None] | None = None,
    ) -> None:
        self.scheme = Scheme(threshold, num_aggregators, Field.by_modulus(field_size))
        settings = IntakeSettings.parse(
            {
                "aggregation_method": aggregation_method,
                "clip_norm": clip_norm,
                "max_abs": max_abs if clip_norm is None else None,
                "max_weight": max_weight,
                "max_workers": max_workers,
            }
        )
        if settings.needs_deltas:
            raise ConfigurationError(
                f"{aggregation_method} goes with GradientAggregator: its sums are not of one vector"
            )
        self._intake = Intake(ExactMean(arithmetic="fixed"), settings)
        self._bounds: EncodedBounds | None = None
        if clip_norm is not None:
            self._bounds = choose_private_grid(clip_norm=clip_norm, max_count=max_workers, max_weight=max_weight)
        self.grid = FixedPointGrid.for_bounds(max_abs=max_abs, max_count=max_workers, max_weight=max_weight)
        if self._bounds is not None:
            self.grid = FixedPointGrid(
                fraction_bits=self._bounds.fraction_bits,
                max_abs=self._bounds.clip_norm,
                max_count=max_workers,
                max_weight=max_weight,
            )
        if self.grid.max_error >= MAX_ERROR:
            raise ConfigurationError(
                f"within these bounds a value would be rounded by up to {self.grid.max_error:.1e}, and less than "
                f"{MAX_ERROR:.0e} is promised: lower max_abs (or clip_norm), max_workers or max_weight"
            )
        self._random = random
        self._on_rejected = on_rejected
        self._rejections: tuple[RefusedUpdate, ...] = ()
        self._tampered: tuple[int, ...] = ()

    # --- the worker's part ---------------------------------------------------------------------------------------

    def encode(self, gradient: WorkerGradient) -> Tensors:
        """What is shared of an update: its (clipped) values on the grid, int64, in the plain.

        Raises:
            ProtocolError: An update that cannot be shared: NaN or infinities, values out of range, a weight below 1.
        """
        layout = _layout(gradient)
        return named(self._codes(self._admitted(gradient, layout)), _shapes(layout), layout.entries)

    def worker_split_gradient(self, gradient: WorkerGradient) -> list[Tensors]:
        """Split an update; each tensor's values become elements of the field.

        Args:
            gradient: Tensors of any real dtype; their autograd history plays no part.

        Returns:
            Name -> share, for each aggregator in order. A share has the parameter's shape (with 2**127 - 1 a last
            dimension of two limbs, the lower one first) and is uint64, or int64 with the same bits in torch.

        Raises:
            ProtocolError: An update that cannot be shared: NaN or infinities, values out of range, a weight below 1.
        """
        layout = _layout(gradient)
        shares = self._split(self._admitted(gradient, layout))
        return [named(share, _shapes(layout), layout.entries) for share in shares]

    # --- one aggregator's part -----------------------------------------------------------------------------------

    def aggregator_sum_shares(
        self, shares: Iterable[Mapping[str, Any]], weights: Iterable[int] | None = None
    ) -> Tensors:
        """The sum of the shares that one aggregator was sent: its share of the sum.

        Args:
            shares: One for each worker.
            weights: Their public weights, from 1 to ``max_weight``; 1 each by default.

        Raises:
            EmptyAggregate: No share.
            ConfigurationError: Weights that are out of bounds, or more or fewer than shares.
            MalformedShare: A share that is not canonical.
            ShapeMismatch: Shares of different models.
        """
        given = list(shares)
        factors = [1] * len(given) if weights is None else list(weights)
        if len(factors) != len(given) or not all(1 <= w <= self.grid.max_weight for w in factors):
            raise ConfigurationError(f"each share has one weight, from 1 to {self.grid.max_weight}")
        if not given:
            raise EmptyAggregate("a sum of no shares")
        field, shapes = self.scheme.field, parameter_shapes(given[0], self.scheme.field)
        total = field.zeros(sum(map(math.prod, shapes.values())))
        for share, weight in zip(given, factors, strict=True):
            self._add(total, share, weight, shapes)
        return named(total, shapes, given[0])

    # --- opening -------------------------------------------------------------------------------------------------

    def aggregator_combine_shares(
        self, shares_from_all_workers: Sequence[Mapping[str, Any]], aggregator_ids: Sequence[int]
    ) -> Tensors:
        """Open the sum of all workers' updates.

        Args:
            shares_from_all_workers: Shares, of sums (``aggregator_sum_shares``) or of single workers. What has one
                aggregator's id is added up first.
            aggregator_ids: Whose each one is, from 1. Each aggregator has as many.

        Returns:
            Name -> float64 sum, in the kind given: the exact sum of the codes, rounded once.

        Raises:
            NotEnoughShares: Of fewer than ``threshold`` aggregators.
            MalformedShare: Shares that contradict each other, so that nobody knows which are right; or not as many of
                each aggregator. With two aggregators more than the threshold, one that is wrong is found and left out
                (``tampered``).
            UpdateOutOfRange: The sum is none of ``max_workers`` updates.
        """
        codes = self.combine_codes(shares_from_all_workers, aggregator_ids)
        return {name: in_kind_of(part, np.asarray(self.grid.decode(as_numpy(part)))) for name, part in codes.items()}

    def combine_codes(
        self, shares_from_all_workers: Sequence[Mapping[str, Any]], aggregator_ids: Sequence[int]
    ) -> Tensors:
        """As ``aggregator_combine_shares``, without decoding: the int64 sum of what ``encode`` gives."""
        ids = [int(i) for i in aggregator_ids]
        if len(ids) != len(shares_from_all_workers):
            raise MalformedShare(f"{len(shares_from_all_workers)} shares with {len(ids)} aggregator ids")
        if len(set(Counter(ids).values())) > 1:
            raise MalformedShare("some aggregator lacks a worker's share that another one has: the sums would differ")
        if not ids:
            raise NotEnoughShares(f"{self.scheme.needed} shares are needed, none is here")
        first = shares_from_all_workers[0]
        shapes = parameter_shapes(first, self.scheme.field)
        size = sum(map(math.prod, shapes.values()))
        sums = {i: self.scheme.field.zeros(size) for i in ids}
        for i, share in zip(ids, shares_from_all_workers, strict=True):
            self._add(sums[i], share, 1, shapes)
        return named(self._open(sums, size), shapes, first)

    @property
    def tampered(self) -> tuple[int, ...]:
        """Aggregators whose shares were found wrong, and left out, when a sum was opened last."""
        return self._tampered

    # --- all of it -----------------------------------------------------------------------------------------------

    def aggregate(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any]
    ) -> AggregatedUpdate:
        """The weighted mean of the accepted updates, opened from shares by ``threshold`` aggregators.

        Args:
            worker_gradients: Any iterable, read once. Of two updates with one worker id, the first counts. A weight is
                ``num_samples``, up to ``max_weight``.
            server_model_state: The model: names, shapes and dtypes; its values play no part.

        Raises:
            EmptyAggregate: No update is left.
            MixedKinds: Deltas and gradients in one round.
            BudgetExceeded: More workers than ``max_workers``.
            UpdateOutOfRange: A mean that the model's dtype cannot hold.
        """
        layout = TensorLayout.of(server_model_state)
        field = self.scheme.field
        sums = [field.zeros(layout.size) for _ in self.scheme.indices]
        weights: dict[str, int] = {}
        kinds: set[UpdateKind] = set()
        self._rejections = ()
        for position, worker in enumerate(worker_gradients):
            try:
                if worker.worker_id in weights:
                    raise DuplicateReport("the worker has an update in this round already")
                update = self._admitted(worker, layout)
                shares = self._split(update)
            except ProtocolError as e:
                self._reject(RefusedUpdate(position, worker.worker_id, type(e)))
                continue
            weights[worker.worker_id] = update.weight
            kinds.add(kind_of(worker, self._intake.settings))
            for total, share in zip(sums, shares, strict=True):
                NUMPY_KERNELS.weighted_accumulate(total, share, update.weight, field)
        if len(kinds) > 1:
            raise MixedKinds("the workers send deltas and gradients")
        if not weights:
            raise EmptyAggregate("an aggregate of no updates: none was given, or all were refused (see rejections)")
        if len(weights) > self.grid.max_count:
            raise BudgetExceeded(f"{len(weights)} updates are more than max_workers={self.grid.max_count}")
        total_weight = sum(weights.values())
        codes = self._open(dict(zip(self.scheme.indices, sums, strict=True)), layout.size)
        return AggregatedUpdate(
            layout.unflatten(self.grid.decode_mean(codes, total_weight)),
            kind=kinds.pop(),
            count=len(weights),
            total_weight=total_weight,
            measurements={},
        )

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """Who was refused in the last ``aggregate``, and why."""
        return self._rejections

    def validate_gradient(self, gradient: WorkerGradient, server_model_state: Mapping[str, Any] | None = None) -> bool:
        """As ``GradientAggregator.validate_gradient``."""
        return passes(self._intake, gradient, server_model_state)

    def describe(self) -> str:
        """The pipeline's slots as a table, and how the sum in them is shared."""
        scheme = self.scheme
        return (
            f"{self._intake.describe()}\n"
            f"the sum is opened by {scheme.threshold} of {scheme.num_shares} aggregators, from shares modulo "
            f"2**{scheme.field.bits} - 1; all of them run in this process"
        )

    # --- helpers -------------------------------------------------------------------------------------------------

    def _admitted(self, worker: WorkerGradient, layout: TensorLayout) -> Update:
        kind = kind_of(worker, self._intake.settings)
        return self._intake.pipeline(layout, kind).admit(self._intake.read(worker, 0, layout))

    def _codes(self, update: Update) -> Int64Array:
        return self.grid.encode(update.vector) if self._bounds is None else encode_clipped(update.vector, self._bounds)

    def _split(self, update: Update) -> list[FieldVector]:
        secret = self.scheme.field.from_signed(self._codes(update))
        return share_seeded(secret, self.scheme, self._random).expand(self.scheme, len(secret))

    def _add(
        self, total: FieldVector, share: Mapping[str, Any], weight: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        if parameter_shapes(share, self.scheme.field) != shapes:
            raise ShapeMismatch("the shares belong to different models")
        NUMPY_KERNELS.weighted_accumulate(total, vector_of(share, self.scheme.field), weight, self.scheme.field)

    def _open(self, sums: dict[int, FieldVector], size: int) -> Int64Array:
        """The codes that sums of shares open, without those that are found wrong."""
        self._tampered = ()
        if len(sums) > self.scheme.needed and not check_parity(sums, self.scheme):
            located = locate(sums, self.scheme, random=self._random)
            if located.ambiguous:
                raise MalformedShare(f"the shares of aggregators {sorted(sums)} contradict each other")
            self._tampered = located.bad
            sums = {i: sums[i] for i in located.good}
        return self.scheme.field.to_signed(reconstruct(sums, self.scheme, size))

    def _reject(self, rejection: RefusedUpdate) -> None:
        self._rejections += (rejection,)
        if self._on_rejected is not None:
            self._on_rejected(rejection)


def _layout(gradient: WorkerGradient) -> TensorLayout:
    try:
        return TensorLayout.of(gradient.gradients)
    except ConfigurationError as e:
        raise ShapeMismatch(str(e)) from e


def _shapes(layout: TensorLayout) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in layout.entries.items()}
