"""The examples of the documentation run, and print what the pages say they print.

Blocks of Python run one after the other in one namespace and one folder, as a reader would type them; blocks of shell
run where ``<!-- run -->`` stands above them. A ``text`` block right below holds the output; ``...`` in it stands for
anything. Pages that build on one another are one story.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORIES = [
    ("device.md", "protocol.md"),
    ("device-resources.md",),
    ("checkpoints.md",),
    ("personalization.md",),
    ("local-privacy.md",),
    ("selection.md",),
    ("export.md",),
    ("inference.md",),
    ("simulator.md",),
    ("attacks.md",),
    ("compression.md",),
    ("async.md",),
    ("robustness.md",),
    ("aggregation.md",),
    ("privacy.md",),
    ("audit.md",),
    ("frontier.md",),
    ("aggregators.md",),
]

PLAYED_ELSEWHERE = {"server.md": "tests/unit/test_server_config.py, with a bundle and a model at hand"}

_BLOCK = re.compile(r"^(?P<run><!-- run -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"\n\n```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

# Plays a story in a process of its own, because examples start threads and servers and import heavy things.
_PLAYER = """
import contextlib, io, json, subprocess, sys

namespace, printed = {"__name__": "__main__"}, []
try:
    for step in json.load(sys.stdin):
        if step["language"] == "sh":
            command = ["bash", "-euo", "pipefail", "-c", step["code"]]
            printed.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(step["code"], step["where"], "exec"), namespace)
        printed.append(output.getvalue())
finally:
    with open(sys.argv[1], "w") as file:
        json.dump(printed, file)
"""


@dataclass(frozen=True)
class Step:
    """A block that runs; ``expected`` is None where the page does not show its output."""

    where: str
    language: str
    code: str
    expected: str | None


def steps(page: str, text: str) -> list[Step]:
    """The blocks of a page that run, in order."""
    found = []
    for block in _BLOCK.finditer(text):
        if block["language"] == "python" or (block["language"] == "sh" and block["run"]):
            output = _OUTPUT.match(text, block.end())
            line = text.count("\n", 0, block.start("code")) + 1
            found.append(Step(f"{page}:{line}", block["language"], block["code"], output and output["text"]))
    return found


def play(story: list[Step], folder: Path) -> list[str]:
    """Run the steps in a folder, and return what each printed."""
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "NO_PROXY": "127.0.0.1"}
    printed, log = folder / "printed.json", folder / "log"
    # Files, not pipes: a server that an example left running would keep a pipe open.
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PLAYER, str(printed)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        process.communicate(json.dumps([asdict(step) for step in story]), timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log.read_text()
    return json.loads(printed.read_text())


@pytest.mark.parametrize("pages", STORIES, ids="+".join)
def test_the_examples_run_and_print_what_the_page_shows(pages: tuple[str, ...], tmp_path: Path):
    story = [step for page in pages for step in steps(page, (DOCS / page).read_text())]
    printed = play(story, tmp_path)
    wrong = [
        f"{step.where} printed\n{output}instead of\n{step.expected}"
        for step, output in zip(story, printed, strict=True)
        if step.expected is not None
        and not doctest.OutputChecker().check_output(step.expected, output, doctest.ELLIPSIS)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_page_with_examples_is_played():
    with_examples = {page.name for page in DOCS.glob("*.md") if steps(page.name, page.read_text())}
    assert with_examples == {page for story in STORIES for page in story} | PLAYED_ELSEWHERE.keys()


def test_a_block_that_fails_is_told_by_its_line(tmp_path: Path):
    text = "# Page\n\n```python\nx = 1\n```\n\n```python\nprint(x + y)\n```\n"
    with pytest.raises(AssertionError, match=r'"page.md:8", line 1(.|\n)*name .y. is not defined'):
        play(steps("page.md", text), tmp_path)


def test_what_runs_and_what_it_shall_print_is_read_off_the_page():
    text = (
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```sh\nrm -rf precious\n```\n\n"
        "<!-- run -->\n```sh\necho 2\n```\nand no output\n```text\nof this\n```\n"
    )
    assert steps("p", text) == [Step("p:2", "python", "print(1)\n", "1\n"), Step("p:15", "sh", "echo 2\n", None)]
