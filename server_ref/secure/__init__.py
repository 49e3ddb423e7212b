"""The aggregator role: its core, its service, and the coordinator's client for it."""
