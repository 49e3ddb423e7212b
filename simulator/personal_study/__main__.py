"""``python -m simulator.personal_study``: play the study, and write its page and its pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from client_sdk.atomic import write_atomically
from simulator.personal_study.report import Study, as_markdown, as_pictures
from simulator.personal_study.settings import StudySettings
from simulator.personal_study.study import run_study


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulator.personal_study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, as Markdown")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="folder of the pictures, as SVG")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="finished cells: the same command goes on from them")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of every cell (default: 3)")
    args = parser.parse_args(argv)
    settings = StudySettings(seeds=tuple(range(1, args.seeds + 1)))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress

    study = Study(settings, run_study(settings, args.kept, say))
    write_atomically(args.out, as_markdown(study).encode(), mode=0o644)
    for name, picture in as_pictures(study).items():
        write_atomically(args.pictures / name, picture.encode(), mode=0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
