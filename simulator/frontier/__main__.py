"""``python -m simulator.frontier``: run the study, and write its page and its picture. See docs/frontier.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from client_sdk.atomic import write_atomically
from simulator.frontier.config import FrontierSettings
from simulator.frontier.report import Frontier, as_markdown, as_picture
from simulator.frontier.study import run_study


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulator.frontier", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, as Markdown")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="the picture, as SVG")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="finished cells: the same command goes on from them")
    args = parser.parse_args(argv)
    settings = FrontierSettings()
    frontier = Frontier(settings, run_study(settings, args.kept, lambda line: print(line, file=sys.stderr, flush=True)))  # noqa: T201 - progress
    write_atomically(args.out, as_markdown(frontier).encode(), mode=0o644)
    write_atomically(args.picture, as_picture(frontier).encode(), mode=0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
