"""Prometheus metrics of an aggregator, with bounded labels: operations, outcomes. Never a report, never a device."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class AggregatorMetrics:
    """One aggregator's metrics in a registry of their own, so that several in one process do not collide."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pocketfed_aggregator_requests",
            "Requests by operation and status",
            ["operation", "status"],
            registry=registry,
        )
        self.refusals = Counter(
            "pocketfed_aggregator_refusals", "Refused requests by the problem's type", ["type"], registry=registry
        )
        self.reports = Counter(
            "pocketfed_aggregator_reports",
            "Delivered shares by verdict, repeated deliveries included",
            ["verdict"],
            registry=registry,
        )
        self.signed_round = Gauge(
            "pocketfed_aggregator_signed_round", "The latest round that was signed since the start", registry=registry
        )
        self.answered_round = Gauge(
            "pocketfed_aggregator_answered_round",
            "The latest round that was answered since the start",
            registry=registry,
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
