"""The reference server: coordinator, aggregation, durable state."""
