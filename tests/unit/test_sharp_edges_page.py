"""docs/sharp-edges.md names tests that exist; docs/threat-model.md and docs/audit.md name what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server_ref.secure.parameters import CheckingMode
from simulator.audit.servers import PLANTED

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHARP_EDGES = (DOCS / "sharp-edges.md").read_text()
NAMED = re.findall(r"\[(test_\w+)\]\((\S+?\.py)\)", SHARP_EDGES)


@pytest.mark.parametrize(("name", "file"), sorted(set(NAMED)), ids=lambda value: value.rpartition("/")[2])
def test_a_named_test_exists(name: str, file: str):
    assert re.search(rf"^def {name}\(", (DOCS / file).read_text(), re.MULTILINE)


def test_every_pitfall_says_how_bad_it_is_and_names_a_test_or_says_that_there_is_none():
    rows = [line.strip("|").split(" | ") for line in SHARP_EDGES.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() != "pitfall"]
    assert len(rows) > 40
    for pitfall, how_bad, prevented, test in rows:
        assert how_bad.split(":")[0].split()[0] in {"fatal", "bad", "annoying"}, pitfall
        assert prevented.strip()
        assert "](../tests/" in test or test.strip() == "-", pitfall


def test_the_threat_model_has_every_checking_mode():
    text = (DOCS / "threat-model.md").read_text()
    assert all(f"| `{mode}` |" in text for mode in CheckingMode)


def test_the_audit_page_has_every_planted_bug():
    text = (DOCS / "audit.md").read_text().replace("`", "")
    assert all(f"| {claimed.name} |" in text for claimed in PLANTED)
