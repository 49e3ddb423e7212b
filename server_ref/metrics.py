"""Prometheus metrics with bounded labels: tiers, routes, outcomes. Never a device id, never a version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics in a registry of their own, so that two servers in one process do not collide."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pocketfed_http_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.assignments = Counter(
            "pocketfed_assignments", "Assignments given, by device tier", ["tier"], registry=registry
        )
        self.reports = Counter(
            "pocketfed_reports",
            "Reports by outcome: accepted, repeated, or the problem's type",
            ["outcome"],
            registry=registry,
        )
        self.report_bytes = Counter("pocketfed_report_bytes", "Bytes of accepted reports", registry=registry)
        self.download_bytes = Counter("pocketfed_download_bytes", "Bytes of blobs sent", registry=registry)
        self.devices = Gauge("pocketfed_devices", "Devices enrolled", registry=registry)
        self.outstanding = Gauge("pocketfed_assignments_outstanding", "Assignments without a report", registry=registry)
        self.buffered = Gauge("pocketfed_reports_buffered", "Reports in the open buffer", registry=registry)
        self.round = Gauge("pocketfed_round", "Committed rounds (the model's version)", registry=registry)
        self.accuracy = Gauge(
            "pocketfed_validation_accuracy", "Accuracy of the newest evaluated model", registry=registry
        )
        self.loss = Gauge("pocketfed_validation_loss", "Loss on validation data", registry=registry)
        self.evaluation_failures = Counter(
            "pocketfed_evaluation_failures", "Models whose evaluation failed", registry=registry
        )
        self.commit_seconds = Histogram(
            "pocketfed_commit_seconds",
            "Time to close a buffer: sum, apply, store",
            registry=registry,
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60),
        )

        self.staleness = Histogram(
            "pocketfed_report_staleness",
            "Model versions between a counted report's model and the one it changed",
            registry=registry,
            buckets=(0, 1, 2, 4, 8, 16, 32),
        )
        self.excluded = Counter(
            "pocketfed_reports_excluded", "Counted reports that the robust rule left out", registry=registry
        )
        self.clipped = Counter("pocketfed_reports_clipped", "Counted reports whose norm was clipped", registry=registry)
        self.halted = Gauge("pocketfed_halted", "1 if the task was halted because it diverged", registry=registry)
        self.dense_bytes = Counter(
            "pocketfed_report_dense_bytes", "Bytes that accepted reports' updates have as float32", registry=registry
        )

    def observe_round(self, measurements: Mapping[str, Any]) -> None:
        """Count what a closed buffer measured."""
        for staleness, reports in measurements.get("staleness", {}).items():
            for _ in range(reports):
                self.staleness.observe(int(staleness))
        self.excluded.inc(len(measurements.get("excluded", ())))
        self.clipped.inc(measurements.get("clipped", 0))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
