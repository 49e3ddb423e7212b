"""``AsyncGradientAggregator``: buffered asynchronous aggregation as one object, safe from any thread.

Every ``min_workers_per_round`` accepted updates make one aggregate, whatever model each was computed on. An update is
refused for its age before anything looks at its values, and again under the lock that accepts it, because the round
may have moved on while its values were checked. The sum is exact: any interleaving of the same accepted updates gives
the same bits.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Unpack

import numpy as np
from pydantic import ValidationError

from client_sdk.protocol.errors import (
    ConfigurationError,
    ProtocolError,
    ReportMismatch,
    ShapeMismatch,
    StaleReport,
)
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref.aggregation.batch import Aggregate, Update
from server_ref.aggregation.buffer import Submission, UpdateBuffer
from server_ref.aggregation.delay import DelayCorrection
from server_ref.aggregation.intake import Gathered, Intake, RefusedUpdate, kind_of
from server_ref.aggregation.monitoring import DivergenceDetector, DivergenceState
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.presets import OnRejected, one_vector
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.settings import AggregationMethod, IntakeSettings, MethodOptions
from server_ref.aggregation.stages import Reduce, Slot
from server_ref.aggregation.staleness import BufferedSchedule, StalenessPolicy
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout
from server_ref.selection import LatencyTracker, selection_probabilities

REJECTIONS_KEPT: Final = 1000
"""Latest refusals that are kept one by one; their numbers are kept for all."""


@dataclass(frozen=True)
class _Task:
    """What the first accepted update decides: where each tensor lies, and the pipeline for vectors of that size."""

    layout: TensorLayout
    pipeline: Pipeline


class AsyncGradientAggregator:
    """Aggregates updates as they come: each buffer of ``min_workers_per_round`` makes one.

    Guarantees: every submission has exactly one outcome, counted in one aggregate or refused with a reason, from any
    number of threads; what is refused leaves no trace. Staleness weights are divided by the constant 256, and the sum
    by the weights without them (the buffer's size where ``max_weight=1``), so that staleness costs an update its
    influence also where all are equally stale. A worker counts once in a buffer; a report with a ``report_id`` in its
    metadata counts once ever, however often it is sent.

    Args:
        min_workers_per_round: Accepted updates that make an aggregate.
        max_staleness: Oldest update accepted: aggregates made since its model.
        staleness_weighting: ``polynomial`` (1 / (1 + staleness) ** exponent), ``constant``, or ``adaptive``: polynomial
            with an exponent that rises from ``staleness_exponent`` to 2 over ``total_rounds``.
        staleness_exponent: The exponent.
        enable_stragglers_mitigation: Whether ``get_worker_selection_probabilities`` prefers fast workers.
        total_rounds: Declared number of aggregates; adaptive weighting needs it.
        min_staleness: What the tolerance falls to over ``tighten_rounds``.
        tighten_rounds: Aggregates over which it falls; None: it does not.
        step_times_curvature: Declared learning rate times largest curvature: ages at which descent is not stable are
            refused (``staleness.stability_limit``).
        scale_learning_rate: Divide each aggregate by 1 + the buffer's mean staleness.
        delay_damping: Correct each mean by the steps that its updates had not seen (``delay.DelayCorrection``): the
            learning rate times the largest curvature, at most 1. None: no correction.
        reduce: Another rule than the exact mean.
        model_state: Tensors whose names, shapes, dtypes and kind the aggregates have. None: those of the first update
            that is accepted.
        selection_floor: Share of the selection probability that all workers get alike.
        detector: Judges the losses of ``observe_loss``.
        watch_norms: Let it judge the norms of the aggregates too.
        clock: Seconds since the epoch, beside which workers' timestamps are looked at.
        on_rejected: Called with each refusal, in the thread that submitted it.
        **options: See ``IntakeSettings``: ``clip_norm``, ``max_weight``, ``kind``, ``aggregation_method`` (not
            scaffold), ...

    Raises:
        ConfigurationError: Settings that do not go together; the message says what to change.
        BudgetExceeded: Bounds within which no exact sum is possible.

    Source: J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), 2022.

    Example:
        >>> aggregator = AsyncGradientAggregator(min_workers_per_round=2)
        >>> ones = {"w": np.ones(2, np.float32)}
        >>> aggregator.submit_gradient_async(WorkerGradient("a", ones, num_samples=10, timestamp=0.0), 0)
        >>> aggregator.submit_gradient_async(WorkerGradient("b", ones, num_samples=10, timestamp=0.0), 0)["w"]
        array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        min_workers_per_round: int = 5,
        max_staleness: int = 10,
        staleness_weighting: str = "polynomial",
        staleness_exponent: float = 0.5,
        enable_stragglers_mitigation: bool = True,
        *,
        total_rounds: int | None = None,
        min_staleness: int = 0,
        tighten_rounds: int | None = None,
        step_times_curvature: float | None = None,
        scale_learning_rate: bool = False,
        delay_damping: float | None = None,
        reduce: Reduce | None = None,
        model_state: Mapping[str, Any] | None = None,
        selection_floor: float = 0.2,
        detector: DivergenceDetector | None = None,
        watch_norms: bool = False,
        clock: Callable[[], float] = time.time,
        on_rejected: OnRejected | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        if "max_workers" in options:
            raise ConfigurationError("a buffer holds min_workers_per_round updates; leave max_workers out")
        settings = one_vector(IntakeSettings.parse({**options, "max_workers": min_workers_per_round}))
        renormalise = settings.aggregation_method is AggregationMethod.FEDNOVA
        if delay_damping is not None and (reduce is not None or renormalise):
            raise ConfigurationError("delay_damping corrects a plain mean; drop it, or the other rule or method")
        self.policy = _policy(
            weighting=staleness_weighting,
            exponent=staleness_exponent,
            max_staleness=max_staleness,
            min_staleness=min_staleness,
            tighten_rounds=tighten_rounds,
            total_rounds=total_rounds,
            step_times_curvature=step_times_curvature,
            scale_learning_rate=scale_learning_rate,
        )
        self._schedule = BufferedSchedule(self.policy, min_workers_per_round)
        self._intake = Intake(reduce or ExactMean(renormalise=renormalise), settings)
        # Whatever does not fit together is refused now, not with the first update.
        self._nothing_yet = self._build(TensorLayout.of({"any": np.zeros(1, np.float32)}), None)
        delay = None
        if delay_damping is not None:
            delay = DelayCorrection(damping=delay_damping, max_staleness=max_staleness)
        self._selection_floor = selection_floor if enable_stragglers_mitigation else None
        selection_probabilities({}, floor=selection_floor)
        self._detector = detector or DivergenceDetector()
        self._watch_norms = watch_norms
        self._clock = clock
        self._on_rejected = on_rejected

        self._lock = threading.Lock()
        self._buffer = UpdateBuffer(min_workers_per_round, self._schedule, max_staleness, delay=delay)
        self._submissions = 0
        self._layout = None if model_state is None else TensorLayout.of(model_state)
        self._task: _Task | None = None
        self._latencies = LatencyTracker()
        self._rejections: deque[RefusedUpdate] = deque(maxlen=REJECTIONS_KEPT)
        self._rejection_counts: Counter[str] = Counter()
        self._health = DivergenceState()

    # --- what workers call -------------------------------------------------------------------------------

    def submit_gradient_async(self, worker_gradient: WorkerGradient, model_version: int) -> AggregatedUpdate | None:
        """A worker submits its update; whoever fills the buffer receives the aggregate.

        Args:
            worker_gradient: The update; not changed, and its tensors must not change during the call.
            model_version: ``current_round`` when the model was made that it was computed on.

        Returns:
            If this update filled the buffer, the aggregate: its ``kind`` says whether it is added or subtracted, and
            ``apply_update`` knows. None while the buffer is not full, and for an update that is too old (which is in
            ``rejections``).

        Raises:
            DuplicateReport: This worker is in the buffer already, or this report was accepted before.
            ReportMismatch: A version from the future, another kind than before, a weight below 1.
            NonFiniteUpdate: NaN or infinities.
            UpdateOutOfRange: A value beyond the declared bound.
            ShapeMismatch: Other names, shapes or types than before.
            DivergenceDetected: Training was halted.
        """
        submission = Submission(worker_gradient.worker_id, model_version, _report_of(worker_gradient))
        with self._lock:
            number = self._submissions
            self._submissions += 1
        try:
            with self._lock:
                self._check(submission)
                task = self._task
            # Values are looked at outside the lock, so that many workers can be served at once.
            task = task or self._first_task(worker_gradient)
            opened = self._open(worker_gradient, task, number)
            with self._lock:
                # The round may have moved on: what counts is the age now, under the lock that accepts.
                self._check(submission)
                if self._task is not None and self._task is not task:
                    task = self._task  # another thread's first update came in between
                    opened = self._open(worker_gradient, task, number)
                layout = task.layout
                result = self._buffer.accept(
                    submission, opened, task.pipeline, lambda aggregate: self._release(aggregate, layout)
                )
                self._task = task
                self._track_latency(worker_gradient)
                return result
        except ProtocolError as refusal:
            self._reject(worker_gradient, number, refusal)
            if isinstance(refusal, StaleReport):
                return None
            raise

    def observe_loss(self, loss: float) -> None:
        """Tell the loss of the newest model on data of the server's own.

        Raises:
            DivergenceDetected: Training has diverged. From now on every submission is refused like this, until
                ``resume``.
            ConfigurationError: A negative loss.
        """
        with self._lock:
            self._health = self._detector.next(self._health, loss=loss)
            self._detector.check(self._health)

    def resume(self) -> None:
        """Go on after an earlier model was restored. The open buffer is kept: its updates are refused if too old."""
        with self._lock:
            self._health = self._health.after_rollback()

    def get_worker_selection_probabilities(self) -> dict[str, float]:
        """Chance of each worker that ever reported to be selected next: inverse to its mean latency, above the floor.

        The latency is the time from a worker's own timestamp to its submission (the last ten count), so a worker can
        claim to be fast. A server that hands out work measures it (``server_ref.selection.Selector``).

        Returns:
            Worker -> probability, summing to 1; empty if stragglers are not to be mitigated, or nobody reported yet.
        """
        if self._selection_floor is None:
            return {}
        with self._lock:
            means = self._latencies.means()
        return selection_probabilities(means, floor=self._selection_floor)

    # --- what may be asked -------------------------------------------------------------------------------

    @property
    def current_round(self) -> int:
        """Aggregates made so far: the version of the model that they lead to."""
        with self._lock:
            return self._buffer.round_id

    @property
    def pending(self) -> int:
        """Updates in the open buffer."""
        with self._lock:
            return len(self._buffer)

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """The latest refusals (a thousand at most), oldest first; ``position`` is the number of the submission."""
        with self._lock:
            return tuple(self._rejections)

    @property
    def rejection_counts(self) -> dict[str, int]:
        """Number of all refusals by their error's slug, such as ``stale-report``."""
        with self._lock:
            return dict(self._rejection_counts)

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        task = self._task
        return (self._nothing_yet if task is None else task.pipeline).describe()

    # --- under the lock ----------------------------------------------------------------------------------

    def _check(self, submission: Submission) -> None:
        self._detector.check(self._health)
        self._buffer.check(submission)

    def _release(self, aggregate: Aggregate, layout: TensorLayout) -> AggregatedUpdate:
        """The aggregate as tensors, if its norm does not say that training has diverged."""
        if self._watch_norms:
            self._health = self._detector.next(self._health, norm=float(np.linalg.norm(aggregate.values)))
            self._detector.check(self._health)
        return Gathered(aggregate, layout).named(aggregate.values)

    def _track_latency(self, gradient: WorkerGradient) -> None:
        latency = self._clock() - gradient.timestamp
        if math.isfinite(latency):
            self._latencies.record(gradient.worker_id, max(latency, 0.0))

    # --- without the lock --------------------------------------------------------------------------------

    def _reject(self, gradient: WorkerGradient, number: int, refusal: ProtocolError) -> None:
        rejection = RefusedUpdate(number, gradient.worker_id, type(refusal))
        with self._lock:
            self._rejections.append(rejection)
            self._rejection_counts[refusal.slug] += 1
            if isinstance(refusal, StaleReport):
                self._track_latency(gradient)  # too slow to count is slow all the same
        if self._on_rejected is not None:
            self._on_rejected(rejection)

    def _open(self, gradient: WorkerGradient, task: _Task, number: int) -> Update:
        """Values into a flat vector, checked and clipped."""
        kind = kind_of(gradient, self._intake.settings)
        if kind is not task.pipeline.entry.kind:
            raise ReportMismatch(f"a {kind} among updates of kind {task.pipeline.entry.kind}")
        return task.pipeline.open(self._intake.read(gradient, number, task.layout))

    def _first_task(self, gradient: WorkerGradient) -> _Task:
        """What this update would decide if it is the first to be accepted."""
        kind = kind_of(gradient, self._intake.settings)
        try:
            layout = self._layout or TensorLayout.of(gradient.gradients)
        except ConfigurationError as e:
            raise ShapeMismatch(str(e)) from e
        return _Task(layout, self._build(layout, kind))

    def _build(self, layout: TensorLayout, kind: UpdateKind | None) -> Pipeline:
        """The pipeline of synchronous rounds with another schedule, and a fixed number of updates."""
        plain = self._intake.pipeline(layout, kind)
        others = [stage for slot, stage in plain.stages.items() if slot is not Slot.SCHEDULE]
        facts = replace(plain.entry, count=plain.entry.capacity)
        return Pipeline.build(self._schedule, *others, facts=facts)


def _report_of(gradient: WorkerGradient) -> tuple[str, str] | None:
    """Worker and report id, where the worker's metadata has one."""
    report_id = (gradient.metadata or {}).get("report_id")
    return None if report_id is None else (gradient.worker_id, str(report_id))


def _policy(**settings: Any) -> StalenessPolicy:  # noqa: ANN401 - the policy's own fields
    try:
        return StalenessPolicy(**settings)
    except ValidationError as e:
        causes = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise ConfigurationError(causes) from e
