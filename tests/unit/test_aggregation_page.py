"""docs/aggregation.md says what the code does: its diagram is generated, its tables list what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import server_ref.aggregation as names
from client_sdk.protocol.errors import BudgetExceeded, TooManyByzantine
from server_ref import GradientAggregator
from server_ref.aggregation import Facts, Pipeline, Slot
from server_ref.aggregation.errors import PipelineError
from server_ref.aggregation.settings import DEFAULT_MAX_ABS, IntakeSettings

PAGE = (Path(__file__).resolve().parents[2] / "docs/aggregation.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rows(header: str) -> list[list[str]]:
    lines = PAGE.splitlines()
    body = lines[lines.index(header) + 2 :]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def documented_pipeline() -> Pipeline:
    source = next(block for block in blocks("python") if "Pipeline.build" in block)
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102 - the page's own example
    return namespace["pipeline"]


def test_the_diagram_is_the_one_that_the_code_draws():
    assert blocks("mermaid") == [documented_pipeline().diagram() + "\n"]


def test_the_slots_are_listed_in_order_with_all_their_stages():
    table = rows("| slot | gets | stages there are | empty, it means |")
    assert [coded(row[0]) for row in table] == [[str(slot)] for slot in Slot]
    listed = {name: coded(row[0])[0] for row in table for name in coded(row[2])}
    candidates = (getattr(names, name) for name in names.__all__)
    stages = {c.__name__ for c in candidates if isinstance(c, type) and hasattr(c, "derive") and hasattr(c, "slot")}
    assert set(listed) == stages
    pipeline = documented_pipeline()
    for slot, stage in pipeline.stages.items():
        assert listed[type(stage).__name__] == str(slot)


def test_every_refusal_is_listed():
    def leaves(cls: type[PipelineError]) -> set[type[PipelineError]]:
        return {leaf for sub in cls.__subclasses__() for leaf in leaves(sub) or {sub}}

    listed = {name for row in rows("| error | for example | change |") for name in coded(row[0])}
    assert listed == {e.__name__ for e in leaves(PipelineError) | {BudgetExceeded, TooManyByzantine}}


def test_every_fact_is_listed():
    listed = {name for row in rows("| fact | from |") for name in coded(row[0])}
    assert listed == set(Facts.__dataclass_fields__)


def test_the_keywords_and_their_defaults_are_those_of_the_code():
    table = rows("| keyword | default | means |")
    assert [coded(row[0]) for row in table] == [[name] for name in IntakeSettings.model_fields]
    defaults = [str(field.default) for field in IntakeSettings.model_fields.values()]
    assert [row[1].strip("`") for row in table] == defaults
    assert f"None: {DEFAULT_MAX_ABS:.0e}".replace("e+", "e") in PAGE


@pytest.mark.parametrize("name", ["GradientAggregator", "ByzantineRobustAggregator", "CompressedGradientAggregator"])
def test_what_the_presets_are_said_to_have_they_have(name: str):
    row = next(row for row in rows("| class | fills | beside it |") if coded(row[0]) == [name])
    for attribute in coded(row[2]):
        assert attribute.startswith("update.") or hasattr(getattr(names, name), attribute)
    assert hasattr(GradientAggregator, "validate_gradient")
