"""Facts about the repository itself: what it must not mention, and what must agree across files."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The bar keeps this file from holding what it looks for.
FORBIDDEN = [
    word.replace("|", "")
    for word in (
        "/wo|rk/",
        "/ro|ot/",
        "/opt/|wheels",
        "/opt/|pypi",
        "pypi|.org",
        "python|hosted.org",
        "npm|js.",
        "deb.deb|ian.org",
        "download.py|torch.org",
    )
]


def files() -> list[Path]:
    """Every file that is, or could be, part of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def mentions(text: str) -> list[str]:
    return [word for word in FORBIDDEN if word in text]


def test_no_file_names_a_machine_s_path_or_a_registry_s_host():
    found = {
        str(path.relative_to(ROOT)): words
        for path in files()
        if (words := mentions(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize("word", FORBIDDEN)
def test_a_forbidden_word_is_found(word: str):
    assert mentions(f"a line with {word} in it") == [word]


def test_torch_is_pinned_once_and_the_makefile_reads_it_from_there():
    extras = PYPROJECT["project"]["optional-dependencies"]
    pins = [d for group in extras.values() for d in group if re.match(r"torch\b", d)]
    assert len(pins) == 1
    makefile = (ROOT / "Makefile").read_text()
    assert pins[0].removeprefix("torch==") not in makefile
    shown = subprocess.run(
        ["grep", "-owm1", "torch==[0-9.]*", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == pins[0]


def test_a_device_s_dependencies_hold_no_torch():
    names = [re.split(r"[<>=\[; ]", d)[0] for d in PYPROJECT["project"]["dependencies"]]
    assert set(names) == {"numpy", "pydantic", "cryptography", "httpx", "executorch"}


def test_the_development_extra_brings_every_other_one():
    extras = PYPROJECT["project"]["optional-dependencies"]
    reached, todo = set(), ["dev"]
    while todo:
        extra = todo.pop()
        reached.add(extra)
        for dependency in extras[extra]:
            if match := re.match(r"pocketfed\[(.+)\]", dependency):
                todo += [e for e in match[1].split(",") if e not in reached]
    assert reached == set(extras)


def test_the_ci_script_runs_what_the_readme_names():
    script = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in script
    assert "make test" in script
    assert "make check" in script
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_licence_is_the_one_declared():
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
