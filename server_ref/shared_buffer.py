"""The buffer of a task whose updates are shared: what is in it only the aggregators can add up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, cast

import numpy as np

from client_sdk.protocol.compression import Codec, CompressionMethod
from client_sdk.protocol.compression.streams import support
from client_sdk.protocol.errors import StorageUnavailable
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.secure import shared_codec
from server_ref.aggregation.batch import Aggregate, Float64Array, PrivateAggregate, Update
from server_ref.aggregation.buckets import BucketedRule, assign_buckets
from server_ref.aggregation.shared_sum import SharedSum
from server_ref.assignments import AssignmentRecord
from server_ref.recipe import bucketed_rule
from server_ref.secure.messages import ShareHeader, ciphertext_id
from server_ref.secure.round import Deal
from server_ref.secure.round_messages import SealedReport, SecureSum
from server_ref.task import Task


class SecureRounds(Protocol):
    """Whoever asks the aggregators: ``SecureRound``."""

    def run(
        self,
        round_id: int,
        reports: Sequence[SealedReport],
        *,
        noise_multiplier: float | None = None,
        deal: Deal | None = None,
    ) -> SecureSum:
        """The sum of a round's reports; the same bits whenever it is asked again.

        Raises:
            PocketfedError: By its class; nothing was released, and the round is tried again.
        """
        ...


class SharedBuffer:
    """As ``OpenBuffer``, for sealed shares: they are read when the buffer closes, and nothing is folded before.

    Args:
        task: Whose updates these are.
        plan: What devices were told with the first model.
        rounds: Asks the aggregators.
        load: Reads the sealed shares of a report back, in order of the aggregators.
    """

    def __init__(
        self,
        task: Task,
        plan: SecurePlan,
        rounds: SecureRounds,
        load: Callable[[AssignmentRecord], Sequence[memoryview]],
    ) -> None:
        self._task = task
        self._plan = plan
        self._rounds = rounds
        self._load = load
        self._codec = shared_codec(task.compression, task.pipeline.entry.size)
        self._rule = bucketed_rule(task.settings)

    def reset(self) -> None:
        """Nothing is kept."""

    def fold(self, record: AssignmentRecord, update: Update, version: int) -> None:
        """Nothing is folded before the buffer closes."""

    def reduce(self, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        """The aggregate of those of these reports that all aggregators could open.

        Raises:
            PocketfedError: By its class; nothing was released, and the buffer closes later.
        """
        reports = [self._sealed(record, version) for record in counted]
        found = self._rounds.run(
            version,
            reports,
            noise_multiplier=self._scheduled(version),
            deal=None if self._rule is None else self._deal,
        )
        released = [
            self._task.pipeline.release(self._aggregate(found, part, counted, version))
            for part in range(len(found.sums))
        ]
        if self._rule is None:
            (only,) = released
            return only
        return self._combined(self._rule, released)

    def _scheduled(self, version: int) -> float | None:
        """What aggregators are asked for where it is more than they pin: the noise of a public schedule."""
        privacy = self._task.privacy
        if privacy is None or privacy.schedule is None:
            return None
        return privacy.noise_per_clip_norm_at(version)

    def _deal(self, reports: Sequence[SealedReport]) -> Sequence[int]:
        """Which bucket each report is in: drawn when it is known which ones count, and kept with the set of them."""
        num_buckets = 1 if self._rule is None else self._rule.num_buckets
        buckets = assign_buckets(range(len(reports)), num_buckets, os.urandom(32))
        places = {position: place for place, positions in enumerate(buckets) for position in positions}
        return [places[position] for position in range(len(reports))]

    @staticmethod
    def _combined(rule: BucketedRule, released: Sequence[Aggregate]) -> Aggregate:
        ages: Counter[str] = Counter()
        for each in released:
            ages.update(each.measurements["staleness"])
        found = rule.combine(released)
        return replace(found, measurements={**released[0].measurements, **found.measurements, "staleness": dict(ages)})

    def _sealed(self, record: AssignmentRecord, version: int) -> SealedReport:
        if record.report is None:
            raise StorageUnavailable(f"assignment {record.assignment_id} has no report to read back")
        shares, plan = self._load(record), self._task.announced(self._plan)
        header = ShareHeader(
            report_id=record.report.report_id,
            assignment_id=record.assignment_id,
            device_id=record.device_id,
            model_version=record.model_version,
            clip_norm=plan.clip_norm,
            indicator_norm=plan.indicator_norm,
            ciphertext_ids=tuple(ciphertext_id(share, plan.suite) for share in shares),
        )
        scale = self._task.pipeline.schedule.scale(version - record.model_version, version)

        def load(index: int) -> bytes:
            # Read again for each aggregator: a cohort's shares need not fit into memory at once.
            return bytes(self._load(record)[index - 1])

        return SealedReport(header, load, record.weight * scale)

    def _aggregate(self, found: SecureSum, part: int, counted: Sequence[AssignmentRecord], version: int) -> Aggregate:
        pipeline, parameters = self._task.pipeline, found.statement.parameters
        within = set(found.counted[part])
        records = [r for r in counted if r.report is not None and r.report.report_id in within]
        noise = None
        if self._task.privacy is not None:
            # In steps of the grid: a multiple of what one update can add to the sum.
            multiplier = self._task.privacy.noise_per_clip_norm_at(version)
            stddev = multiplier * parameters.max_weight * parameters.bound
            noise = (stddev, self._task.privacy.budget.adjacency)
        codes = found.sums[part]
        ages = Counter(str(version - r.model_version) for r in records)
        opened = cast("SharedSum", pipeline.reduce).aggregate(
            codes,
            replace(pipeline.admitted, size=len(codes)),
            count=len(records),
            total_weight=sum(r.weight for r in records),
            noise=noise,
            indicator=None if found.indicator_sums is None else found.indicator_sums[part],
            measurements={
                "staleness": dict(sorted(ages.items())),
                "shares_rejected": dict(Counter(found.rejected.values())),
                **found.measurements,
            },
        )
        return opened if self._codec is None else self._dense(opened, self._codec, version)

    def _dense(self, opened: Aggregate, codec: Codec, version: int) -> Aggregate:
        """The opened sum at the coordinates of the update, right in expectation."""
        factor = codec.unbias_factor
        values = _expanded(codec, opened.values * factor, self._task.round_seed(version))
        sensitivity = {adjacency: factor * value for adjacency, value in opened.sensitivity.items()}
        changed = replace(opened, values=values, sensitivity=sensitivity, integers=None)
        if isinstance(changed, PrivateAggregate):
            return replace(changed, noise_stddev=factor * changed.noise_stddev)
        return changed


def _expanded(codec: Codec, values: Float64Array, seed: int) -> Float64Array:
    if codec.spec.method is CompressionMethod.RANDOMK and not codec.spec.rotation:
        # Moved, not rounded: the same bits as if the sum had been made of what single devices sent.
        dense = np.zeros(codec.size, np.float64)
        dense[support(seed, codec.size, len(values))] = values
        return dense
    return codec.expand(values.astype(np.float32), seed).astype(np.float64)
