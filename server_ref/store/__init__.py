"""Durable state: a database for facts, a blob store for bytes."""
