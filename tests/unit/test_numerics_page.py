"""The tables of bounds in docs/numerics.md are what the code computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_sdk.protocol.fixed_point import FixedPointGrid
from server_ref import AccumulatorPlan

PAGE = Path(__file__).resolve().parents[2] / "docs/numerics.md"


def rows(header: str) -> list[list[str]]:
    """Cells of the table with this header."""
    lines = PAGE.read_text().splitlines()
    body = lines[lines.index(header) + 2 :]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


PLANS = rows("| max_abs | max_weight | max_count | resolution | grids | bytes a parameter | exact from |")
GRIDS = rows("| max_abs | max_weight | max_count | fraction bits | largest error |")


@pytest.mark.parametrize("row", PLANS, ids="/".join)
def test_the_grids_of_the_page_are_those_of_the_code(row):
    max_abs, max_weight, max_count, resolution, grids, num_bytes, exact_from = row
    plan = AccumulatorPlan.for_bounds(
        max_abs=float(max_abs), max_weight=int(max_weight), max_count=int(max_count), resolution=float(resolution)
    )
    assert ", ".join(f"2^{e}" for e in plan.grid_exponents) == grids
    assert 8 * plan.num_bins == int(num_bytes)
    assert f"{plan.exact_from:.1e}" == exact_from


@pytest.mark.parametrize("row", GRIDS, ids="/".join)
def test_the_fraction_bits_of_the_page_are_those_of_the_code(row):
    max_abs, max_weight, max_count, bits, error = row
    grid = FixedPointGrid.for_bounds(max_abs=float(max_abs), max_weight=int(max_weight), max_count=int(max_count))
    assert grid.fraction_bits == int(bits)
    assert f"{grid.max_error:.1e}" == error


def test_the_page_has_both_tables():
    assert len(PLANS) >= 5
    assert len(GRIDS) >= 4
