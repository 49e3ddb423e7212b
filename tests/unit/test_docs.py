"""The documentation points at things that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])
RECORDS = sorted((ROOT / "docs/adr").glob("0*.md"))
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Anchors that renderers give a page's headings: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", LINK.sub(r"\g<text>", heading).lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


def links(page: Path) -> list[tuple[Path, str]]:
    """Target file and anchor of each link inside the repository."""
    found = []
    for _, target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def broken_links(page: Path) -> list[str]:
    found = []
    for target, anchor in links(page):
        if not target.exists() or not target.is_relative_to(ROOT):
            found.append(f"{page.name}: no file {target}")
        elif anchor and anchor not in anchors(target.read_text()):
            found.append(f"{page.name}: no heading #{anchor} in {target.name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](missing.md) [b](#two) [c](#one) [d](https://example.org/)\n```\n[e](in-a-fence.md)\n```\n"
    )
    assert [line.split(": ")[1].split()[:2] for line in broken_links(page)] == [
        ["no", "file"],
        ["no", "file"],
        ["no", "file"],
    ]


def test_headings_become_anchors_as_renderers_make_them():
    assert anchors("# Two words & more\n## A [link](x.md)\n```\n# a comment\n```\n") == {"two-words--more", "a-link"}


def test_every_page_is_reached_from_the_map():
    reached, todo = set(), [ROOT / "docs/README.md"]
    while todo:
        page = todo.pop()
        if page.suffix == ".md" and page.is_file() and page not in reached:
            reached.add(page)
            todo += [target for target, _ in links(page)]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


def test_decision_records_are_numbered_without_gaps_and_indexed():
    assert [record.name[:4] for record in RECORDS] == [f"{i:04d}" for i in range(len(RECORDS))]
    index = (ROOT / "docs/adr/README.md").read_text()
    for record in RECORDS:
        assert f"({record.name})" in index


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_decision_record_says_why_what_and_at_what_cost(record: Path):
    text = record.read_text()
    assert re.search(r"^Status: \w", text, re.MULTILINE)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert re.search(r"\*\*(What it costs|Costs)", text)
    if not record.name.startswith("0000"):
        assert text.startswith(f"# {record.name[:4]}: ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_named_in_the_documentation_exist(page: Path):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pocketfed.commands"]
    )
    in_fences = re.findall(r"^make ([a-z-]+)", "\n".join(FENCE.findall(text)), re.MULTILINE)
    assert {*re.findall(r"`make ([a-z-]+)", text), *in_fences} <= targets
    assert set(re.findall(r"[`/]pocketfed ([a-z]+)", text)) <= commands


def test_every_target_of_the_makefile_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert {"setup", "demo", "test", "check", "bench", "docs", "clean", "help"} <= set(phony)
    for target in phony:
        assert re.search(rf"^{target}:.* ## \S", makefile, re.MULTILINE), target
