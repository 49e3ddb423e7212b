"""From the specification's ``WorkerGradient`` to an aggregate: what its classes have in common.

A preset is a ``reduce`` stage and an ``Intake``. The intake builds the pipeline for a model's layout, reads one worker
after the other into it, and keeps a list of those it refused. Updates are numbered by their position: that, and never
a worker's id, breaks ties.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from client_sdk.protocol.errors import (
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    ProtocolError,
    ReportMismatch,
    ShapeMismatch,
)
from client_sdk.protocol.updates import LOCAL_STEPS, UpdateKind, WorkerGradient
from server_ref.aggregation.admission import ClipGlobal, ClipLayers, ValidateFacts
from server_ref.aggregation.batch import Aggregate, EncodedUpdate, Facts, Float64Array, Update
from server_ref.aggregation.errors import MixedKinds
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.server_optim import Sgd
from server_ref.aggregation.settings import CONTROL_DELTA, AggregationMethod, IntakeSettings
from server_ref.aggregation.stages import Fold, Noise, Reduce, Stage
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout

_ELEMENTS_AT_ONCE: Final = 2**22
"""Coordinates that are read before they are folded together: 16 MiB, in which small models fold four and more at
once, and a model beyond it goes through one update at a time."""


@dataclass(frozen=True)
class RefusedUpdate:
    """One refused update: who and why, and nothing of what it held.

    Attributes:
        position: Its place among the workers that ``aggregate`` was given.
        worker_id: Who sent it.
        error: The refusal's class.
    """

    position: int
    worker_id: str
    error: type[ProtocolError]


@dataclass(frozen=True)
class Gathered:
    """One aggregate, and the layout that it goes back through."""

    aggregate: Aggregate
    layout: TensorLayout

    def named(self, values: Float64Array) -> AggregatedUpdate:
        """These values, float64[layout.size], as the model's tensors.

        Raises:
            UpdateOutOfRange: They do not fit the model's dtypes.
        """
        return AggregatedUpdate(
            self.layout.unflatten(values),
            kind=self.aggregate.kind,
            count=self.aggregate.count,
            total_weight=self.aggregate.total_weight,
            measurements=self.aggregate.measurements,
        )


Opener = Callable[[WorkerGradient, TensorLayout], WorkerGradient]
"""What a worker's tensors go through before anything else (decompression). May refuse with a ``ProtocolError``."""


class Intake:
    """Reads workers into a pipeline. One thread at a time.

    Args:
        reduce: What makes one aggregate of many updates.
        settings: What is declared of the updates.
        opener: What a worker's tensors go through first.
        noise: What protects the aggregate; None where no privacy is claimed.
        on_rejected: Called with each refusal, as it happens.

    Raises:
        PipelineError: The stages do not fit the settings.
        BudgetExceeded: The declared bounds leave no exact sum.
    """

    def __init__(
        self,
        reduce: Reduce,
        settings: IntakeSettings,
        *,
        opener: Opener | None = None,
        noise: Noise | None = None,
        on_rejected: Callable[[RefusedUpdate], None] | None = None,
    ) -> None:
        self.reduce = reduce
        self.settings = settings
        self.opener = opener
        self.noise = noise
        self.rejections: tuple[RefusedUpdate, ...] = ()
        self._on_rejected = on_rejected
        self._layout: TensorLayout | None = None
        # Whatever does not fit together is refused now, not in the first round.
        self.pipeline(TensorLayout.of({"any": np.zeros(1, np.float32)})).start()

    def pipeline(self, layout: TensorLayout, kind: UpdateKind | None = None) -> Pipeline:
        """The pipeline for updates of a model with this layout."""
        settings = self.settings
        copies = 2 if settings.aggregation_method is AggregationMethod.SCAFFOLD else 1
        stages: list[Stage] = [self.reduce, Sgd()]
        if self.noise is not None:
            stages.append(self.noise)
        if settings.aggregation_method is AggregationMethod.FEDNOVA:
            stages.append(ValidateFacts(max_normaliser=settings.max_local_steps))
        if settings.clip_norm is not None and settings.clip_scope == "global":
            stages.append(ClipGlobal(settings.clip_norm))
        elif settings.clip_norm is not None:
            shifts = [i * layout.size for i in range(copies)]
            layers = tuple((shift + start, shift + stop) for shift in shifts for start, stop in layout.layers)
            stages.append(ClipLayers(settings.clip_norm, layers))
        facts = Facts(
            size=copies * layout.size,
            kind=kind or settings.kind or UpdateKind.DELTA,
            capacity=settings.max_workers,
            max_weight=settings.max_weight,
            max_abs=settings.range_bound,
            constant_denominator=settings.denominator,
            arrival_public=settings.arrival_public,
        )
        return Pipeline.build(*stages, facts=facts, private=self.noise is not None)

    def describe(self) -> str:
        """The pipeline's table, for the last model aggregated for (or one of a single parameter)."""
        return self.pipeline(self._layout or TensorLayout.of({"any": np.zeros(1, np.float32)})).describe()

    def check(self, worker: WorkerGradient, model_state: Mapping[str, Any] | None) -> None:
        """Refuse an update that ``gather`` would refuse for what it is (not for a repeated id).

        Args:
            worker: The update.
            model_state: The server's model. None: the last one aggregated for; if there was none, only what the update
                says of itself can be checked.

        Raises:
            ProtocolError: The refusal, by its class.
        """
        layout = self._layout if model_state is None else TensorLayout.of(model_state)
        if layout is None:
            try:
                layout = TensorLayout.of(worker.gradients)
            except ConfigurationError as e:
                raise ShapeMismatch(str(e)) from e
        kind = kind_of(worker, self.settings)
        self.pipeline(layout, kind).open(self.read(worker, 0, layout))

    def gather(self, workers: Iterable[WorkerGradient], model_state: Mapping[str, Any]) -> Gathered:
        """One aggregate of many workers; who was refused is in ``rejections``.

        Args:
            workers: Any iterable, read once; a worker's tensors are copied before the next one is asked for.
            model_state: The server's model: names, shapes, dtypes.

        Raises:
            EmptyAggregate: No worker is left.
            MixedKinds: Deltas and gradients, and ``kind`` was not declared.
            BudgetExceeded: More workers than declared.
        """
        self.rejections = ()
        self._layout = layout = TensorLayout.of(model_state)
        batch = _Batch(self, layout)
        for position, worker in enumerate(workers):
            try:
                batch.take(position, worker)
            except ProtocolError as e:
                self._reject(RefusedUpdate(position, worker.worker_id, type(e)))
        return Gathered(batch.finish(), layout)

    def _reject(self, rejection: RefusedUpdate) -> None:
        self.rejections += (rejection,)
        if self._on_rejected is not None:
            self._on_rejected(rejection)

    def read(self, worker: WorkerGradient, position: int, layout: TensorLayout) -> EncodedUpdate:
        """The worker's update as it enters the pipeline."""
        if self.opener is not None:
            worker = self.opener(worker, layout)
        metadata = worker.metadata or {}
        normaliser = 1.0
        match self.settings.aggregation_method:
            case AggregationMethod.SCAFFOLD:
                vector = np.empty(2 * layout.size, np.float32)
                layout.flatten(_control_delta(metadata), vector[layout.size :])
            case method:
                vector = np.empty(layout.size, np.float32)
                if method is AggregationMethod.FEDNOVA:
                    normaliser = _local_steps(metadata)
        layout.flatten(worker.gradients, vector[: layout.size])
        if normaliser != 1.0:
            np.divide(vector, normaliser, out=vector, dtype=np.float64, casting="same_kind")
        return EncodedUpdate(position, vector, weight=self._weight(worker), normaliser=normaliser)

    def _weight(self, worker: WorkerGradient) -> int:
        try:
            return min(operator.index(worker.num_samples), self.settings.max_weight)
        except TypeError as e:
            raise ReportMismatch("num_samples must be an integer") from e


class _Batch:
    """The updates of one call of ``gather``."""

    def __init__(self, intake: Intake, layout: TensorLayout) -> None:
        self._intake = intake
        self._layout = layout
        self._pipeline: Pipeline | None = None
        self._fold: Fold | None = None
        self._workers: set[str] = set()
        self._pending: list[Update] = []

    def take(self, position: int, worker: WorkerGradient) -> None:
        """Admit one worker; see ``Intake.gather``."""
        kind = kind_of(worker, self._intake.settings)
        if worker.worker_id in self._workers:
            raise DuplicateReport(f"update {position} is of a worker that has one in this round already")
        if self._pipeline is not None and self._pipeline.entry.kind is not kind:
            raise MixedKinds("the workers send deltas and gradients; declare which of them count (kind)")
        pipeline = self._pipeline or self._intake.pipeline(self._layout, kind)
        update = pipeline.admit(self._intake.read(worker, position, self._layout))
        # Only an update that counts decides what the round takes: a refused one leaves no trace.
        self._pipeline = pipeline
        self._fold = self._fold or pipeline.start()
        self._workers.add(worker.worker_id)
        self._pending.append(update)
        if len(self._pending) * update.vector.size >= _ELEMENTS_AT_ONCE:
            self._flush(self._fold)

    def _flush(self, fold: Fold) -> None:
        if self._pending:
            fold.add(self._pending)
            self._pending = []

    def finish(self) -> Aggregate:
        if self._pipeline is None or self._fold is None:
            raise EmptyAggregate("an aggregate of no updates: none was given, or all were refused (see rejections)")
        self._flush(self._fold)
        return self._pipeline.finish(self._fold)


def kind_of(worker: WorkerGradient, settings: IntakeSettings) -> UpdateKind:
    """How the worker's update is to be applied.

    Raises:
        ReportMismatch: It does not say, or it is not what the settings declare.
    """
    try:
        kind = UpdateKind(worker.kind)
    except ValueError as e:
        raise ReportMismatch("the update's kind is neither delta nor gradient") from e
    expected = UpdateKind.DELTA if settings.needs_deltas else settings.kind
    if expected is not None and kind is not expected:
        raise ReportMismatch(f"the update is a {kind}; this round takes a {expected}")
    return kind


def _control_delta(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    found = metadata.get(CONTROL_DELTA)
    if not isinstance(found, Mapping):
        raise ReportMismatch(f"a SCAFFOLD worker sends what its control changed by in metadata[{CONTROL_DELTA!r}]")
    return found


def _local_steps(metadata: Mapping[str, Any]) -> float:
    try:
        steps = float(metadata[LOCAL_STEPS])
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ReportMismatch(f"a FedNova worker says how many steps it took in metadata[{LOCAL_STEPS!r}]") from e
    if not 0 < steps < float("inf"):
        raise ReportMismatch("a FedNova worker has taken a positive number of steps")
    return steps
