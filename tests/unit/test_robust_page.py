"""The tables of docs/robustness.md name the rules, conditions and defaults that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server_ref.aggregation.robust import RULES, DistanceMode, Mixing, RuleOptions, sensitivity_replace_one

TEXT = (Path(__file__).resolve().parents[2] / "docs/robustness.md").read_text()


def rows(header: str) -> list[list[str]]:
    """Cells of the table with this header."""
    body = TEXT.split(header + "\n", 1)[1].splitlines()[1:]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_rule_is_there_with_what_it_needs():
    needs = {name.strip("`"): condition for name, condition, *_ in rows("| rule | needs | outcome | time |")}
    assert needs == {name: rule.condition for name, rule in RULES.items()}


def test_every_mode_and_mixing_is_explained():
    for mode in set(DistanceMode) - {DistanceMode.EXACT}:
        assert f'`mode="{mode.value}"`' in TEXT
    for mixing in set(Mixing) - {Mixing.NONE}:
        assert f'`mixing="{mixing.value}"`' in TEXT
    assert f"k = {RuleOptions().sketch_size}" in TEXT
    assert f"r = {RuleOptions().peers}" in TEXT


@pytest.mark.parametrize("row", rows("| rule | replace one |"), ids=lambda row: row[0])
def test_a_rule_has_a_sensitivity_where_the_page_says_so(row):
    for name in re.findall(r"`([a-z-]+)`", row[0]):
        options = RuleOptions(radius=1.0, iterations=1) if name == "centered-clipping" else RuleOptions()
        found = sensitivity_replace_one(name, 50, 3, 1.0, options, public_centre=True)
        assert (found is None) == (row[1] == "not proved")
