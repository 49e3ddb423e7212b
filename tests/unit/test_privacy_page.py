"""docs/privacy.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from server_ref.aggregation import Adjacency, ScheduleShape, calibrate
from server_ref.aggregation.adaptive_clipping import INDICATOR_NOISE
from server_ref.aggregation.calibration import gaussian_epsilon
from server_ref.aggregation.noise import _SENSITIVITY_BITS

PAGE = (Path(__file__).resolve().parents[2] / "docs/privacy.md").read_text()


def first_column(header: str) -> list[str]:
    lines = PAGE.splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if line.startswith(header)) + 2 :]
    return [re.findall(r"`([^`]+)`", row)[0] for row in rows[: rows.index("")]]


def test_every_adjacency_is_explained():
    assert first_column("| adjacency |") == ["zero-out", "add-remove", "replace-one"]
    assert set(first_column("| adjacency |")) == {str(a) for a in Adjacency}


def test_every_schedule_is_named():
    assert all(f'"{shape}"' in PAGE or f"`{shape}`" in PAGE for shape in ScheduleShape)


def test_the_figures_are_the_code_s():
    assert f"`{calibrate(1.0, 1e-5, participations=1):.4f} sqrt(k)`" in PAGE
    assert f"worth epsilon {gaussian_epsilon(1e-5, 3.7306 / 2):.2f} under replace-one" in PAGE
    assert f"a grid of {_SENSITIVITY_BITS} bits" in PAGE
    assert f"`sigma_b = m / {1 / INDICATOR_NOISE:.0f}`" in PAGE
