"""Memory of the aggregation core: small instances of `make bench-large` and `make bench-leak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/bench_large.py"


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    """In a process of its own: its memory is nobody else's."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


def test_a_stream_of_clients_is_folded_in_the_memory_of_the_bins_and_one_client(reports):
    large = reports["large"]
    # Two bins of 8 bytes, an update of 4 and its clipped copy.
    assert large["peak_bytes_a_parameter"] <= large["bar_bytes_a_parameter"] < 26
    assert large["growth_over_clients_bytes"] < large["parameters"]
    assert large["wrong_of_checked"] == [0, 200]


def test_many_rounds_leave_nothing_behind(reports):
    leak = reports["leak"]
    # One forgotten update of 4 bytes a parameter in each round would be ten times as much.
    assert leak["growth_bytes"] <= leak["bar_bytes"] == 2 * 2**20
    assert leak["growth_objects"] <= 50
