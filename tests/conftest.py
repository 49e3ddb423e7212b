"""Fixtures that more than one suite needs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from hypothesis import settings

# No test judges the wall clock: on a busy machine any example may be slow.
settings.register_profile("pocketfed", deadline=None)
settings.load_profile("pocketfed")


@pytest.fixture(scope="session")
def softmax_bundle() -> Path:
    """A real exported program, small enough to run thousands of times: softmax regression, 6 features, 3 classes.

    Every role in batches of 4 and 8. Exported once per machine, then taken from the export cache.
    """
    return runpy.run_path(str(Path(__file__).with_name("programs.py")))["cached_bundle"]()
