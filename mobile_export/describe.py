"""The methods of a bundle as a table for people: ``python -m mobile_export.describe BUNDLE``.

It is made from the manifest alone, so it needs neither torch nor a runtime.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from client_sdk.protocol.errors import PocketfedError
from client_sdk.protocol.program import Manifest, TensorSpec
from client_sdk.runtime import read_manifest

BEGIN: Final = "<!-- methods: python -m mobile_export.describe BUNDLE --into THIS_PAGE -->"
END: Final = "<!-- end of methods -->"


def method_table(manifest: Manifest) -> str:
    """A Markdown table: a row for each method, its tensors in the order in which a host passes them.

    Planned memory is left out: it changes with the exporter, and a host reads it from the manifest that it got.
    """
    rows = [f"| `{m.name}` | {_tensors(m.inputs)} | {_tensors(m.outputs)} |" for m in manifest.methods]
    return "\n".join(["| method | inputs, in this order | outputs, in this order |", "|---|---|---|", *rows, ""])


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"`{spec.name}` {spec.dtype}{list(spec.shape)}" for spec in specs)


def replaced(page: str, table: str) -> str:
    """A page with the table between its two markers.

    Raises:
        ValueError: It has no such markers.
    """
    between = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not between.search(page):
        raise ValueError(f"the page has no line {BEGIN!r}, or none {END!r} after it")
    return between.sub(lambda _: f"{BEGIN}\n\n{table}\n{END}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or put it into a page."""
    parser = argparse.ArgumentParser(prog="python -m mobile_export.describe", description="the methods of a bundle")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the table between the markers of this page")
    options = parser.parse_args(arguments)
    try:
        table = method_table(read_manifest(options.bundle))
        if options.into is None:
            sys.stdout.write(table)
        else:
            options.into.write_text(replaced(options.into.read_text(), table))
    except (PocketfedError, OSError, ValueError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
