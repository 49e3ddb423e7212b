"""Runs benchmarks one after another and makes a page of what they print: one JSON line a case, in and out.

    .venv/bin/python tests/benchmarks/collect.py                     # all of them, then docs/benchmarks.md
    .venv/bin/python tests/benchmarks/collect.py robust compression  # these anew; the others stay as they were

The lines are kept in build/benchmarks.jsonl, so that a benchmark can be run again by itself. What is timed depends on
the machine; what is compared (ratios to a peer or to one pass over memory in the same run) much less so.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
LINES = ROOT / "build" / "benchmarks.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"

SKIPPED = frozenset({"large"})
"""Takes gigabytes and minutes: ``make bench-large`` and ``make bench-leak`` run it."""

PACKAGES = ("numpy", "numba", "torch", "executorch", "pydantic", "sqlalchemy")

_INTRO = """\
# Benchmarks

Written by `make bench`; do not edit. Each section is one script of `tests/benchmarks/`, whose docstring says what is
measured and how; run it by itself to see more. Times are medians on an otherwise idle machine. `L` is one pass over
the same data in memory, timed in the same run. A column named after a peer is that peer's figure in the same run.

"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress


def names() -> list[str]:
    """All benchmarks that are run by default."""
    found = (path.stem.removeprefix("bench_") for path in sorted(FOLDER.glob("bench_*.py")))
    return [name for name in found if name not in SKIPPED]


def run(name: str) -> list[dict[str, Any]]:
    """The JSON lines that a benchmark prints; its other output passes through."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(FOLDER / f"bench_{name}.py")]
    cases = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                cases.append({"bench": name} | json.loads(line))
            else:
                say(line.rstrip())
    if process.returncode:
        raise SystemExit(f"bench_{name}.py ended with status {process.returncode}; nothing of it was kept")
    return cases


def read() -> list[dict[str, Any]]:
    """What earlier runs left."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def write(cases: Sequence[Mapping[str, Any]]) -> None:
    """Keep all cases."""
    LINES.parent.mkdir(exist_ok=True)
    LINES.write_text("".join(json.dumps(case) + "\n" for case in cases))


def machine() -> str:
    """What it ran on, in a sentence."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"Machine: {model}, {os.cpu_count()} cores, {pages * size / 2**30:.0f} GiB; {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}; {versions}.\n"
    )


def cell(value: Any) -> str:
    """A value as the page shows it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return ", ".join(cell(v) for v in value)
        case dict():
            return "; ".join(f"{k}: {cell(v)}" for k, v in value.items())
        case _:
            return str(value).replace("|", "\\|")


def table(cases: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A table of cases that have the same keys."""
    keys = list(cases[0])
    yield "| " + " | ".join(key.replace("_", " ") for key in keys) + " |"
    yield "|" + "---|" * len(keys)
    for case in cases:
        yield "| " + " | ".join(cell(case[key]) for key in keys) + " |"
    yield ""


def render(cases: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    lines = [_INTRO + machine()]
    for name in dict.fromkeys(case["bench"] for case in cases):
        title = (ast.get_docstring(ast.parse((FOLDER / f"bench_{name}.py").read_text())) or name).splitlines()[0]
        lines += [f"## {name}", "", title, ""]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for case in cases:
            if case["bench"] == name:
                shown = {k: v for k, v in case.items() if k != "bench"}
                groups.setdefault(tuple(shown), []).append(shown)
        for group in groups.values():
            lines += table(group)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--render", action="store_true", help="run nothing; make the page of what is there")
    args = parser.parse_args()
    unknown = set(args.names) - set(names())
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    cases = read()
    chosen = [] if args.render else args.names or names()
    for number, name in enumerate(chosen, start=1):
        say(f"== {name} ({number} of {len(chosen)})")
        fresh = run(name)
        # Each result is kept as soon as it is there.
        cases = sorted([c for c in cases if c["bench"] != name] + fresh, key=lambda c: str(c["bench"]))
        write(cases)
        PAGE.write_text(render(cases))
    if args.render:
        PAGE.write_text(render(cases))
    say(f"{len(cases)} cases in {LINES.relative_to(ROOT)}, page in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
