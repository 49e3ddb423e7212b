"""``IntegratedFederatedAggregator``: compression, privacy, robustness and asynchrony as one pipeline.

Every update goes the same way, in this order, and the order is the pipeline's:

1. *Age.* A stale update is refused before anything looks at it, a detector included.
2. *Validate, decode.* From the payload and the server's own record of its seed.
3. *Inspect* (without privacy only): the attack detector, on what was sent.
4. *Clip*, after decompression: what is summed is bounded whatever was sent.
5. *Reduce*: the exact sum, one sum a bucket, or a robust rule on updates.
6. *Noise*: the ledger is asked and charged first; noise is calibrated to the clip norm.
7. *Rule*, where there are buckets: post-processing of noised sums. Random-k's factor d / k comes after the release too.

Noise on a rule's outcome comes only where a sensitivity is proved; the pipeline refuses it on Krum.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from client_sdk.protocol.errors import (
    ConfigurationError,
    InvalidUpdate,
    ProtocolError,
    ReportMismatch,
    ShapeMismatch,
    StaleReport,
)
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref.aggregation.accounting import PrivacyEvent, PrivacyLedger
from server_ref.aggregation.batch import (
    Aggregate,
    EncodedUpdate,
    Facts,
    Int64Array,
    PrivateAggregate,
    Update,
)
from server_ref.aggregation.buffer import Submission, UpdateBuffer
from server_ref.aggregation.detectors import IntegratedAttackDetector
from server_ref.aggregation.intake import Gathered, RefusedUpdate
from server_ref.aggregation.integrated_budget import Spending
from server_ref.aggregation.integrated_config import CENTRED, MEAN, FederatedConfig
from server_ref.aggregation.integrated_stages import schedule_of, stages_of, voting_of
from server_ref.aggregation.integrated_wire import Wire, flat
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.presets import OnRejected
from server_ref.aggregation.stages import Decode, Slot
from server_ref.aggregation.support_voting import Support, SupportVoting
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout

_REJECTIONS_KEPT: Final = 1000
"""Latest refusals that are kept."""


@dataclass(frozen=True)
class Task:
    """What one buffer's updates have in common."""

    wire: Wire
    pipeline: Pipeline


@dataclass(frozen=True)
class Examined:
    """An update that nothing speaks against."""

    submission: Submission
    task: Task
    opened: Update


class IntegratedFederatedAggregator:
    """All features at once: every ``buffer_size`` accepted updates make one private, robust aggregate.

    Guarantees: what a section of the configuration promises holds with the others enabled, or the configuration is
    refused. Every aggregate is paid for before its noise is drawn; a worker counts once in a buffer, and in at most
    ``participations`` of them. Calls from several threads are taken one at a time.

    Args:
        config: What is enabled; see ``FederatedConfig``.
        model_state: Names, shapes, dtypes and kind of the aggregates. None: those of the first dense update; a first
            update that is a payload, and a vote, need to be told.
        detector: Judges updates (``inspect_updates``), or released aggregates of the plain private mean.
        ledger: What was spent before, on the same budget.
        counted: With a ledger and bounded participations: how often each worker has counted before.
        persist: Makes an event durable before its release; see ``LedgerKeeper``.
        random: Source of noise and of the buckets' draw. The default is the operating system's.
        on_rejected: Called with each refusal.

    Raises:
        PipelineError: Sections that do not make a sound pipeline, such as noise on Krum's outcome.
        ConfigurationError: Other settings that do not go together; the message says what to change.
    """

    def __init__(
        self,
        config: FederatedConfig | None = None,
        *,
        model_state: Mapping[str, Any] | None = None,
        detector: IntegratedAttackDetector | None = None,
        ledger: PrivacyLedger | None = None,
        counted: Mapping[str, int] | None = None,
        persist: Callable[[PrivacyEvent], None] | None = None,
        random: Callable[[int], bytes] = os.urandom,
        on_rejected: OnRejected | None = None,
    ) -> None:
        self.config = config = config or FederatedConfig()
        timing = config.async_config
        self._random = random
        self._on_rejected = on_rejected
        self._layout = None if model_state is None else TensorLayout.of(model_state)
        self._detector = detector
        self._spending = Spending.of(config, ledger, counted, persist)
        self._buffer = UpdateBuffer(timing.buffer_size, schedule_of(config), timing.max_staleness, delay=None)
        self._lock = threading.RLock()
        self._support: Support | None = None
        self._previous: Aggregate | None = None
        self._task: Task | None = None
        self._submissions = 0
        self._rejections: deque[RefusedUpdate] = deque(maxlen=_REJECTIONS_KEPT)
        self._alarms: Counter[str] = Counter()
        # Whatever does not fit together is refused now, not with the first update.
        self._nothing_yet = self._pipeline(1, UpdateKind.GRADIENT)
        self._check_detector()
        if config.compression.method == "voted" and self._layout is None:
            raise ConfigurationError("workers vote for coordinates of a model; give model_state")

    # --- the device's part -------------------------------------------------------------------------------

    def encode_update(self, update: Mapping[str, Any], model_version: int) -> bytes:
        """The payload of one update, for ``metadata["payload"]``: a pure function, and the same on a device.

        Raises:
            ShapeMismatch: Not an update of this model.
            ConfigurationError: The workers have not elected a support yet.
        """
        with self._lock:
            self._layout = self._layout or TensorLayout.of(update)
            wire = self._wire(self._layout)
        return wire.encode(update, model_version)

    def ballot(self, update: Mapping[str, Any]) -> Int64Array:
        """One worker's vote: the places of its update's largest coordinates, int64, ascending."""
        return self.voting.ballot(flat(update, self._known_layout()))

    # --- the server's part -------------------------------------------------------------------------------

    @property
    def voting(self) -> SupportVoting:
        """The vote about the common support.

        Raises:
            ConfigurationError: The configuration has none.
        """
        return voting_of(self.config, self._known_layout().size, self.noise_multiplier)

    def elect_support(self, ballots: Iterable[Int64Array]) -> Support:
        """Count the votes, once for all rounds, and pay for it as for one aggregate.

        Raises:
            PrivacyBudgetExhausted: Nothing was drawn.
            UpdateOutOfRange: A ballot that is none.
            ConfigurationError: There is a support already, or no vote is wanted.
        """
        voting, spending = self.voting, self._spending
        with self._lock:
            if self._support is not None or spending is None:
                raise ConfigurationError("the support has been elected; another vote would cost another release")
            counts = voting.count(ballots)
            event = spending.next_release()
            self._support = voting.elect(counts, round_id=event, charge=spending.keeper.charge, random=self._random)
            return self._support

    def process_worker_gradient(self, worker_gradient: WorkerGradient, model_version: int) -> AggregatedUpdate | None:
        """Take one update in; whoever fills the buffer receives the aggregate.

        Args:
            worker_gradient: ``metadata["payload"]`` is what ``encode_update`` returned; without it ``gradients`` are
                dense tensors, and are encoded here. ``metadata["report_id"]`` makes a repetition recognisable.
            model_version: ``current_round`` when the model was made that the update was computed on.

        Returns:
            The aggregate, for ``apply_update``, if this update filled the buffer. None while it is not full, and for an
            update that is too old or was found suspicious (both are in ``rejections``).

        Raises:
            PrivacyBudgetExhausted: The budget allows no aggregate any more; the update was not looked at.
            ProtocolError: The refusal, by its class, as ``AsyncGradientAggregator`` has them.
            ConfigurationError: The workers have not elected a support yet.
        """
        with self._lock:
            number = self._submissions
            self._submissions += 1
            try:
                return self._process(worker_gradient, model_version, number)
            except ProtocolError as refusal:
                self._reject(RefusedUpdate(number, worker_gradient.worker_id, type(refusal)))
                if isinstance(refusal, StaleReport):
                    return None
                raise

    def learn(self, worker_gradient: WorkerGradient, model_version: int) -> None:
        """Show the detector an update that is known to be honest; it does not count in any aggregate.

        Raises:
            ConfigurationError: There is no detector of updates.
            ProtocolError: An update that would be refused.
        """
        if self._detector is None or not self.config.security.inspect_updates:
            raise ConfigurationError("there is no detector of updates; set inspect_updates, and give one")
        with self._lock:
            task = self._task_for(worker_gradient)
            values, sent = task.wire.sparse(task.wire.payload_of(worker_gradient, model_version), model_version)
            self._detector.learn(replace(worker_gradient, gradients=values), sent)

    @property
    def current_round(self) -> int:
        """Aggregates made so far: the version of the model that they lead to."""
        return self._buffer.round_id

    @property
    def pending(self) -> int:
        """Updates in the open buffer."""
        return len(self._buffer)

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """The latest refusals (a thousand at most), oldest first."""
        return tuple(self._rejections)

    @property
    def alarms(self) -> Mapping[str, int]:
        """How often the detector found each worker's updates suspicious.

        An honest worker has one alarm in ``1 / alpha`` updates, so that one is no reason to exclude it for good.
        """
        return dict(self._alarms)

    @property
    def ledger(self) -> PrivacyLedger | None:
        """What has been spent; None without privacy."""
        return None if self._spending is None else self._spending.keeper.ledger

    @property
    def participations(self) -> Mapping[str, int]:
        """How often each worker has counted: what ``counted`` takes after a restart."""
        return {} if self._spending is None else dict(self._spending.counted)

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of each release's noise over its sensitivity; 0 without privacy."""
        return 0.0 if self._spending is None else self._spending.noise_multiplier

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        return (self._nothing_yet if self._task is None else self._task.pipeline).describe()

    # --- under the lock ----------------------------------------------------------------------------------

    def _process(self, worker: WorkerGradient, model_version: int, number: int) -> AggregatedUpdate | None:
        examined = self._examined(worker, model_version, number)
        return None if examined is None else self._count(examined)

    def _examined(self, worker: WorkerGradient, model_version: int, number: int) -> Examined | None:
        """An update that may count; None if it was found suspicious, which is in ``rejections`` then."""
        metadata = worker.metadata or {}
        report_id = metadata.get("report_id")
        report = None if report_id is None else (worker.worker_id, str(report_id))
        submission = Submission(worker.worker_id, model_version, report)
        self._buffer.check(submission)
        if self._spending is not None:
            self._spending.check(worker.worker_id)
        task = self._task_for(worker)
        payload = task.wire.payload_of(worker, model_version)
        if self._is_suspicious(worker, payload, model_version, task.wire):
            self._alarms[worker.worker_id] += 1
            self._reject(RefusedUpdate(number, worker.worker_id, InvalidUpdate))
            return None
        opened = task.pipeline.open(EncodedUpdate(number, payload, seed=task.wire.seed(model_version)))
        return Examined(submission, task, opened)

    def _count(self, examined: Examined) -> AggregatedUpdate | None:
        """Take an update into the buffer; the aggregate, if it filled it."""
        submission, task = examined.submission, examined.task
        spending = self._spending
        if spending is not None and len(self._buffer) + 1 == self._buffer.size:
            spending.keeper.open_round(spending.next_release())
        released = self._buffer.accept(submission, examined.opened, task.pipeline, lambda a: self._named(a, task))
        if spending is not None:
            spending.counted[submission.worker_id] += 1
        # With a centre, the next buffer has another one.
        moved = released is not None and spending is not None and self.config.security.rule == CENTRED
        self._task = None if moved else task
        self._layout = task.wire.layout
        return released

    def _named(self, aggregate: Aggregate, task: Task) -> AggregatedUpdate:
        """As tensors, and right in expectation: whatever is done here comes after the release."""
        self._previous = aggregate
        decode = cast("Decode", task.pipeline.stages[Slot.DECODE])
        factor = decode.unbias_factor(task.pipeline.entry)
        values = task.wire.scattered(aggregate.values * factor)
        measured = dict(aggregate.measurements)
        if isinstance(aggregate, PrivateAggregate):
            measured["noise_stddev"] = aggregate.noise_stddev * factor
        named = Gathered(replace(aggregate, measurements=measured), task.wire.layout).named(values)
        if self._detector is not None and not self.config.security.inspect_updates:
            named.measurements = measured | {"alarm": self._detector.detect_dp_masking_attack([], named)}
        return named

    def _is_suspicious(self, worker: WorkerGradient, payload: bytes, model_version: int, wire: Wire) -> bool:
        """What the detector says of an update as it was sent."""
        if self._detector is None or not self.config.security.inspect_updates:
            return False
        values, sent = wire.sparse(payload, model_version)
        return self._detector.detect_compression_exploitation(replace(worker, gradients=values), sent)

    def _reject(self, rejection: RefusedUpdate) -> None:
        self._rejections.append(rejection)
        if self._on_rejected is not None:
            self._on_rejected(rejection)

    # --- layouts and pipelines ----------------------------------------------------------------------------

    def _task_for(self, worker: WorkerGradient) -> Task:
        """The open buffer's, or what this update decides if it is the first to be accepted."""
        try:
            kind = UpdateKind(worker.kind)
        except ValueError as e:
            raise ReportMismatch("the update's kind is neither delta nor gradient") from e
        task, layout = self._task, self._layout
        if task is not None and task.pipeline.entry.kind is kind:
            return task
        if task is not None and len(self._buffer):
            raise ReportMismatch(f"a {kind} among updates of kind {task.pipeline.entry.kind}")
        try:
            layout = layout or TensorLayout.of(worker.gradients)
        except ConfigurationError as e:
            raise ShapeMismatch(str(e)) from e
        return self._new_task(layout, kind)

    def _new_task(self, layout: TensorLayout, kind: UpdateKind) -> Task:
        wire = self._wire(layout)
        return Task(wire, self._pipeline(wire.size, kind))

    def _wire(self, layout: TensorLayout) -> Wire:
        return Wire(self.config.compression, layout, self._support)

    def _pipeline(self, size: int, kind: UpdateKind) -> Pipeline:
        count = self.config.async_config.buffer_size
        facts = Facts(size, kind, capacity=count, count=count)
        stages = stages_of(
            self.config,
            facts,
            keeper=None if self._spending is None else self._spending.keeper,
            noise_multiplier=self.noise_multiplier,
            previous=self._previous,
            random=self._random,
        )
        return Pipeline.build(*stages, facts=facts, private=self._spending is not None)

    def _known_layout(self) -> TensorLayout:
        if self._layout is None:
            raise ConfigurationError("the model is not known yet; give model_state")
        return self._layout

    def _check_detector(self) -> None:
        config = self.config
        if config.security.inspect_updates:
            if config.compression.method == "none" or self._detector is None:
                raise ConfigurationError("to inspect compressed updates takes a compression and a detector")
        elif self._detector is not None and (
            self._spending is None or config.security.rule != MEAN or config.compression.method != "none"
        ):
            raise ConfigurationError(
                "of a released aggregate the detector knows the noise's law only where all coordinates of a plain mean "
                "are noised; use rule='mean' and no compression, or set inspect_updates without privacy"
            )
