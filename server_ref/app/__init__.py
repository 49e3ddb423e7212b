"""HTTP: routes only. Rules live in the coordinator, errors become HTTP in ``problems``."""
