"""Algorithms of personalisation against one another, on data that calls for it: docs/personalization-figures.md."""
