"""Delivered shares: opened, checked for what one aggregator can tell of them alone, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from sqlalchemy.engine import Connection

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import ConfigurationError, MalformedShare, OversizedBody, SealingFailed
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.sealing import SharingTerms
from client_sdk.protocol.secure import SecureLayout, decode_share
from server_ref.secure import queries
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import (
    MAX_DELIVERY,
    DeliveredShare,
    ShareHeader,
    TaskBinding,
    Verdict,
    VerdictReason,
    ciphertext_id,
)
from server_ref.secure.queries import StoredReport
from server_ref.secure.store import AggregatorStore


def accepted_terms(config: AggregatorConfig, clip_norm: float, indicator_norm: float | None) -> SharingTerms:
    """The only terms, for these norms, under which this aggregator opens a device's share."""
    pinned = config.parameters
    privacy = pinned.privacy
    return SharingTerms(
        field=pinned.field,
        threshold=pinned.threshold,
        num_aggregators=pinned.num_aggregators,
        packing=pinned.packing,
        fraction_bits=pinned.fraction_bits,
        clip_norm=clip_norm,
        indicator_norm=indicator_norm,
        noise_variance=None if privacy is None else privacy.device_noise_variance,
        max_participations=None if privacy is None else privacy.max_participations,
    )


def norm_bound(header: ShareHeader, config: AggregatorConfig) -> int | None:
    """B of a report's codes; None where its header states norms that this aggregator does not accept."""
    pinned = config.parameters
    if (header.indicator_norm is not None) != pinned.indicator:
        return None
    if not pinned.indicator and header.clip_norm != pinned.clip_norm:
        return None
    try:
        return EncodedBounds(clip_norm=header.clip_norm, fraction_bits=pinned.fraction_bits).norm_bound
    except ConfigurationError:
        return None


def open_share(
    report: DeliveredShare, config: AggregatorConfig, keys: AggregatorKeys, task: TaskBinding, layout: SecureLayout
) -> bytes | VerdictReason:
    """The share's plaintext, known to be well formed; or why it is not accepted."""
    header = report.header
    if (
        len(header.ciphertext_ids) != layout.scheme.num_shares
        or ciphertext_id(report.ciphertext, config.suite) != header.ciphertext_ids[config.index - 1]
    ):
        return VerdictReason.HEADER_MISMATCH
    if norm_bound(header, config) is None:
        return VerdictReason.TERMS
    info = sealing.share_info(
        task_id=task.task_id,
        assignment_id=header.assignment_id,
        device_id=header.device_id,
        aggregator_index=config.index,
        model_version=header.model_version,
        parameter_table_sha256=task.parameter_table_sha256,
        terms=accepted_terms(config, header.clip_norm, header.indicator_norm),
    )
    try:
        plaintext = sealing.open(report.ciphertext, keys.sealing, info)
    except SealingFailed:
        return VerdictReason.UNSEALABLE
    # A seed stands for any vector: nothing is learned by expanding it here.
    seeded = config.index <= layout.num_seeds
    try:
        decode_share(plaintext, replace(layout, size=0) if seeded else layout, config.index)
    except MalformedShare:
        return VerdictReason.MALFORMED
    return plaintext


@dataclass(frozen=True)
class _Register:
    """The reports that are known among those of a delivery, and the reports of its assignments."""

    reports: dict[str, StoredReport]
    by_assignment: dict[str, str]

    @classmethod
    def load(cls, connection: Connection, deliveries: Sequence[DeliveredShare]) -> Self:
        headers = [delivery.header for delivery in deliveries]
        return cls(
            queries.load_reports(connection, [header.report_id for header in headers]),
            queries.assignments_known(connection, [header.assignment_id for header in headers]),
        )

    def conflicts(self, header: ShareHeader) -> bool:
        """Whether the report, or its assignment, came with another upload."""
        known = self.reports.get(header.report_id)
        if known is not None and known.digest != header.digest():
            return True
        return self.by_assignment.get(header.assignment_id, header.report_id) != header.report_id

    def settled(self, header: ShareHeader) -> bool:
        """Whether nothing needs to be kept: the share is there, or was summed."""
        known = self.reports.get(header.report_id)
        return known is not None and (known.kept or known.signed_in is not None)

    def add(self, report: StoredReport) -> None:
        self.reports[report.report_id] = report
        self.by_assignment[report.assignment_id] = report.report_id


class Intake:
    """Where an aggregator's shares come in."""

    def __init__(self, config: AggregatorConfig, keys: AggregatorKeys, store: AggregatorStore) -> None:
        self._config = config
        self._keys = keys
        self._store = store

    def deliver(
        self, round_id: int, deliveries: Sequence[DeliveredShare], task: TaskBinding, layout: SecureLayout
    ) -> tuple[Verdict, ...]:
        """Open what is new, and keep what is sound.

        An assignment has one report, under whatever id: the ciphertext opens for the assignment only, so nobody can
        have one share counted twice.

        Raises:
            OversizedBody: More than ``MAX_DELIVERY`` reports.
        """
        if len(deliveries) > MAX_DELIVERY:
            raise OversizedBody(f"{len(deliveries)} reports were delivered at once; {MAX_DELIVERY} are accepted")
        with self._store.transaction() as connection:
            known = _Register.load(connection, deliveries)
        reasons: list[VerdictReason | None] = []
        fresh: list[StoredReport | None] = []
        for delivery in deliveries:
            reason, report = None, None
            if known.conflicts(delivery.header):
                reason = VerdictReason.CONFLICT
            elif not known.settled(delivery.header):
                opened = open_share(delivery, self._config, self._keys, task, layout)
                if isinstance(opened, VerdictReason):
                    reason = opened
                else:
                    report = self._kept(round_id, delivery.header, opened)
            reasons.append(reason)
            fresh.append(report)
        if any(fresh):
            reasons = self._save(deliveries, reasons, fresh)
        return tuple(
            Verdict(report_id=delivery.header.report_id, digest=delivery.header.digest(), reason=reason)
            for delivery, reason in zip(deliveries, reasons, strict=True)
        )

    def _kept(self, round_id: int, header: ShareHeader, plaintext: bytes) -> StoredReport:
        digest = header.digest()
        return StoredReport(
            report_id=header.report_id,
            assignment_id=header.assignment_id,
            device_id=header.device_id,
            digest=digest,
            norm_bound=norm_bound(header, self._config) or 0,
            round_id=round_id,
            share=self._store.put_share(digest, plaintext),
        )

    def _save(
        self,
        deliveries: Sequence[DeliveredShare],
        reasons: list[VerdictReason | None],
        fresh: list[StoredReport | None],
    ) -> list[VerdictReason | None]:
        """Write what is new; what came in the meantime, or earlier in the same delivery, is looked at again."""
        self._store.blobs.sync()
        final = list(reasons)
        written: list[StoredReport] = []
        with self._store.transaction() as connection:
            known = _Register.load(connection, deliveries)
            for i, (delivery, report) in enumerate(zip(deliveries, fresh, strict=True)):
                if report is None:
                    continue
                if known.conflicts(delivery.header):
                    final[i] = VerdictReason.CONFLICT
                elif not known.settled(delivery.header):
                    known.add(report)
                    written.append(report)
            queries.save_reports(connection, written)
        return final
