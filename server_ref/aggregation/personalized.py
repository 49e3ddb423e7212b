"""``PersonalizedFederatedAggregator``: meta-gradients and differences of adapted models, as ordinary updates.

What a worker sends is its ``gradients``, of the kind that the algorithm has: a ``gradient`` of maml, fomaml and
per-fedavg, a ``delta`` of reptile (``client_sdk.protocol.meta_learning``). Nothing travels beside it: a payload in
the metadata would pass by the clip norm, the noise and the rule. So all that holds of an aggregate of ordinary updates
holds of this one.

*Task-agnostic* is what is aggregated: weights from which a few steps lead to a good model of any device, of one that
never took part too. *Task-specific* is what a device makes of them by those steps, and keeps. Layers that are a
device's own altogether are no part of any update: then ``server_model_state`` has the shared ones only.

Each worker counts alike: it is one task of the mean over tasks that meta-learning minimises [Finn et al. 2017].
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, cast

from client_sdk.protocol.errors import (
    ConfigurationError,
    DuplicateReport,
    EmptyAggregate,
    PocketfedError,
    ProtocolError,
    ReportMismatch,
    ShapeMismatch,
)
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaAlgorithm, MetaPlan
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import UpdateKind, WorkerGradient
from server_ref.aggregation.errors import BufferNotFull
from server_ref.aggregation.intake import RefusedUpdate
from server_ref.aggregation.integrated import Examined, IntegratedFederatedAggregator, Task
from server_ref.aggregation.integrated_config import FederatedConfig
from server_ref.aggregation.integrated_stages import schedule_of
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout

_ELSEWHERE: Final = ("meta_gradient", "fine_tuned_model")
"""Where the specification's sketch has the payload."""


class PersonalizedFederatedAggregator(IntegratedFederatedAggregator):
    """Aggregates what learns a model that adapts well, through everything that a ``FederatedConfig`` enables.

    Guarantees: those of ``IntegratedFederatedAggregator``; and no update counts that is of another kind, algorithm, K
    or rate than this one's. A refused worker costs the others nothing.

    Args:
        meta_learning_algorithm: ``maml``, ``fomaml``, ``reptile`` or ``per-fedavg``.
        personalization_steps: K, steps of adaptation; of per-fedavg its local meta steps.
        personalization_lr: alpha, the rate of each step of adaptation.
        config: What is enabled; see ``FederatedConfig``.
        meta_learning_rate: beta. Of per-fedavg the rate of its local meta steps, and then also the server's, with
            which the mean of the updates leads to the mean of the workers' weights. Of maml and fomaml the server's.
        **kwargs: Of ``IntegratedFederatedAggregator``.

    Raises:
        ConfigurationError: No such algorithm, a number of steps or a rate that cannot be, or as the base class.

    Example:
        >>> from server_ref import apply_update
        >>> from server_ref.aggregation.integrated_config import CompressionConfig, PrivacyConfig, SecurityConfig
        >>> import numpy as np
        >>> plain = FederatedConfig(
        ...     compression=CompressionConfig(method="none"),
        ...     privacy=PrivacyConfig(enabled=False, max_grad_norm=10.0),
        ...     security=SecurityConfig(rule="mean", num_byzantine=0, buckets=None),
        ... )
        >>> aggregator = PersonalizedFederatedAggregator("maml", 1, 0.5, plain)
        >>> model = {"w": np.ones(2, np.float32)}
        >>> found = [np.array([1.0, 0.0], np.float32), np.array([0.0, 4.0], np.float32)]
        >>> workers = [
        ...     WorkerGradient(f"d{i}", {"w": g}, 10, 0.0, {"algorithm": "maml", "inner_steps": 1, "inner_lr": 0.5})
        ...     for i, g in enumerate(found)
        ... ]
        >>> update = aggregator.aggregate_with_personalization(workers, model)
        >>> update.kind.value, update["w"].tolist()
        ('gradient', [0.5, 2.0])
        >>> apply_update(model, update, learning_rate=0.25)["w"].tolist()
        [0.875, 0.5]
    """

    def __init__(
        self,
        meta_learning_algorithm: str = "maml",
        personalization_steps: int = 5,
        personalization_lr: float = 0.01,
        config: FederatedConfig | None = None,
        *,
        meta_learning_rate: float = 0.05,
        **kwargs: Any,  # noqa: ANN401 - the base class's own
    ) -> None:
        if meta_learning_algorithm not in META_ALGORITHMS:
            raise ConfigurationError(
                f"there is no meta-learning algorithm {meta_learning_algorithm!r}; choose one of "
                f"{', '.join(META_ALGORITHMS)}"
            )
        self.meta_learning_algorithm = cast("MetaAlgorithm", meta_learning_algorithm)
        self.personalization_steps = personalization_steps
        self.personalization_lr = personalization_lr
        self.meta_learning_rate = meta_learning_rate
        self._plan = self.training_plan()
        super().__init__(config, **kwargs)

    # --- what workers and server agree on ----------------------------------------------------------------

    def training_plan(
        self, *, batch_size: int = 32, query_fraction: float = 0.2, query_batches: int = 1, shuffle: bool = True
    ) -> TrainingPlan:
        """What devices train so that their updates count here: the plan of an assignment.

        Args:
            batch_size: Examples of each step, and of a query batch.
            query_fraction: Share of a device's examples that adaptation never sees.
            query_batches: Batches of them that a meta-gradient is averaged over.
            shuffle: Whether the order of the examples is drawn anew in each epoch.

        Raises:
            ConfigurationError: A number that cannot be.
        """
        try:
            return TrainingPlan(
                algorithm=self.meta_learning_algorithm,
                batch_size=batch_size,
                learning_rate=self.personalization_lr,
                shuffle=shuffle,
                meta=MetaPlan(
                    inner_steps=self.personalization_steps,
                    query_fraction=query_fraction,
                    query_batches=query_batches,
                    meta_learning_rate=self.meta_learning_rate,
                ),
            )
        except ValueError as e:
            raise ConfigurationError(f"no device could train that: {e}") from e

    @property
    def kind(self) -> UpdateKind:
        """Of the workers' updates, and of the aggregates."""
        return self._plan.update_kind

    def describe(self) -> str:
        """What workers send, above the pipeline's slots as a table."""
        does = "subtracted" if self.kind is UpdateKind.GRADIENT else "added"
        agreed = f"{self.meta_learning_algorithm}: {self.personalization_steps} steps of {self.personalization_lr:g}"
        if self.meta_learning_algorithm == "per-fedavg":
            agreed += f", meta steps of {self.meta_learning_rate:g}"
        return f"{agreed}; each update is a {self.kind}, and is {does}\n{super().describe()}"

    # --- one buffer in one call --------------------------------------------------------------------------

    def aggregate_with_personalization(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any]
    ) -> AggregatedUpdate:
        """One aggregate of these workers: one buffer, whose number of updates is theirs.

        With privacy that number is public and declared: ``async_config.buffer_size``. Fewer wait in the open buffer,
        for another call or for ``process_worker_gradient``.

        Args:
            worker_gradients: Their ``metadata`` says ``algorithm``, and may say ``inner_steps``, ``inner_lr`` and
                ``meta_lr``: an update that names others than this aggregator's is refused. ``model_version`` there is
                the one that it was computed on; without it, the present one (``current_round``).
            server_model_state: Names, shapes, dtypes and kind of the aggregate.

        Returns:
            The mean, or what the rule makes of the updates, for ``apply_update``. Who was refused is in
            ``rejections``.

        Raises:
            EmptyAggregate: No worker is left.
            BufferNotFull: With privacy: fewer were accepted than declared. Nothing was released or charged.
            TooManyByzantine: Fewer are left than the rule stands.
            ShapeMismatch: Another model than before.
            ConfigurationError: More workers than a private buffer has places; or, without privacy, updates of
                ``process_worker_gradient`` are waiting.
            PrivacyBudgetExhausted: As ``process_worker_gradient``.
        """
        workers = list(worker_gradients)
        with self._lock:
            layout = TensorLayout.of(server_model_state)
            if self._layout is not None and self._layout != layout:
                raise ShapeMismatch("the model has other parameters than the one that was aggregated for before")
            self._layout = layout
            return self._of_all(workers, layout) if self._spending is None else self._of_private_buffer(workers)

    def _of_all(self, workers: list[WorkerGradient], layout: TensorLayout) -> AggregatedUpdate:
        if self.pending:
            raise ConfigurationError(f"{self.pending} updates wait in the open buffer; this call makes one of its own")
        if not workers:
            raise EmptyAggregate("an aggregate of no updates")
        size = self.config.async_config.buffer_size
        try:
            return self._of_one_call(workers, layout)
        finally:
            self._buffer.clear()  # of those whose aggregate failed
            self._resize(size)

    def _of_one_call(self, workers: list[WorkerGradient], layout: TensorLayout) -> AggregatedUpdate:
        self._resize(len(workers))
        self._task = self._new_task(layout, self.kind)
        accepted: dict[str, Examined] = {}
        for worker in workers:
            examined = self._tried(worker, accepted)
            if examined is not None:
                accepted[worker.worker_id] = examined
        if not accepted:
            raise EmptyAggregate("an aggregate of no updates: all were refused (see rejections)")
        self._resize(len(accepted))
        # What the rule and the denominator are of is known now.
        task = self._task or self._new_task(layout, self.kind)
        *others, last = (replace(examined, task=task) for examined in accepted.values())
        for examined in others:
            self._count(examined)
        return cast("AggregatedUpdate", self._count(last))

    def _of_private_buffer(self, workers: list[WorkerGradient]) -> AggregatedUpdate:
        size = self.config.async_config.buffer_size
        if len(workers) > size - self.pending:
            raise ConfigurationError(
                f"a private aggregate is of {size} updates, {self.pending} of them are here, and {len(workers)} more "
                "are given: give fewer, or set async_config.buffer_size before the run"
            )
        released = None
        for worker in workers:
            examined = self._tried(worker)
            if examined is not None:
                released = self._count(examined)
        if released is None:
            raise BufferNotFull(
                f"a private aggregate is of {size} updates, and {self.pending} were accepted: they wait for more (see "
                "rejections)"
            )
        return released

    def _resize(self, count: int) -> None:
        """Let a buffer be of so many updates.

        Raises:
            TooManyByzantine: The rule does not stand so few of them; nothing has changed.
        """
        timing, before = self.config.async_config, self.config
        if count == timing.buffer_size:
            return
        self.config = before.model_copy(update={"async_config": timing.model_copy(update={"buffer_size": count})})
        try:
            self._nothing_yet = self._pipeline(1, self.kind)
        except PocketfedError:
            self.config = before
            raise
        self._buffer.resize(count, schedule_of(self.config))
        self._task = None

    def _tried(self, worker: WorkerGradient, others: Container[str] = ()) -> Examined | None:
        """An update that may count; of one that may not, the refusal is in ``rejections``."""
        number = self._submissions
        self._submissions += 1
        try:
            if worker.worker_id in others:
                raise DuplicateReport("this worker has an update in this call already")
            return self._examined(worker, self._version_of(worker), number)
        except ProtocolError as refusal:
            self._reject(RefusedUpdate(number, worker.worker_id, type(refusal)))
            return None

    def _version_of(self, worker: WorkerGradient) -> int:
        version = (worker.metadata or {}).get("model_version", self.current_round)
        if isinstance(version, bool) or not isinstance(version, int):
            raise ReportMismatch("a model version is an integer")
        return version

    def _task_for(self, worker: WorkerGradient) -> Task:
        """As the base class; what is not of this algorithm decides nothing, a buffer's kind neither."""
        self._require_agreed(worker)
        return super()._task_for(worker)

    def _require_agreed(self, worker: WorkerGradient) -> None:
        """Refuse an update that is not what the plan asks for.

        Raises:
            ReportMismatch: Another kind, algorithm, K or rate; or it is in the metadata.
        """
        algorithm, said = self.meta_learning_algorithm, worker.metadata or {}
        elsewhere = [name for name in _ELSEWHERE if name in said]
        if elsewhere:
            raise ReportMismatch(
                f"what is in metadata[{elsewhere[0]!r}] would be neither clipped nor checked: the update of "
                f"{algorithm} is the worker's gradients, of kind {self.kind}"
            )
        if worker.kind != self.kind:
            raise ReportMismatch(f"the update's kind is not that of {algorithm}, whose workers send a {self.kind}")
        if said.get("algorithm") != algorithm:
            raise ReportMismatch(f"the update does not say that it is of {algorithm} (metadata['algorithm'])")
        agreed = {"inner_steps": float(self.personalization_steps), "inner_lr": self.personalization_lr}
        if algorithm == "per-fedavg":
            agreed["meta_lr"] = self.meta_learning_rate
        for name, expected in agreed.items():
            value = said.get(name, expected)
            # A rate may have been rounded to float32 on its way.
            if not isinstance(value, int | float) or not math.isclose(value, expected, rel_tol=1e-6):
                raise ReportMismatch(f"the update was made with another {name} than {expected:g}")
