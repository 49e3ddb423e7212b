"""The robustness study: which aggregation rule stands which attack by how many devices."""
