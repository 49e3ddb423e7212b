"""The scripts under docs/examples run, and print what is said of them here."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "docs/examples"
PRINTED = {
    "core_aggregation": """\
loss 0.72 -> 0.3...
[('broken', 'NonFiniteUpdate')]
""",
    "byzantine_workers": """\
mean               -0.99
krum               +0.96  colluders left out: 3
multi-krum         +0.99  colluders left out: 3
median             +0.98
trimmed-mean       +0.98
krum stands f dishonest updates only if n >= 2f + 3; there are 10, and f = 4 is assumed: gather 11, ...
""",
    "compressed_updates": """\
top-k 1 %, error feedback  left   0.1%   sent 0.88% of 36 MB
top-k 1 %, without         left  78.7%   sent 0.77% of 36 MB
with it, 8-bit values      left   0.1%   sent 0.38% of 36 MB
""",
    "secret_shared_gradients": """\
a gradient    [-0.015..., 0.015...]
is shared as  [torch.int64] in 5 parts
they open     [-0.067..., 0.067...]
equal to the sum on the grid: yes
largest error against the plain sum: below 1e-06
""",
}
TESTED_WITH_THEIR_PART = {"long_run_stagnation", "staleness_divergence"}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_is_said_to(name: str, tmp_path: Path):
    script = SCRIPTS / f"{name}.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert doctest.OutputChecker().check_output(PRINTED[name], done.stdout, doctest.ELLIPSIS), done.stdout


def test_every_example_is_run_by_some_test():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == PRINTED.keys() | TESTED_WITH_THEIR_PART
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    assert all(f"{name}.py" in sources for name in TESTED_WITH_THEIR_PART)
