"""docs/native-abi.md against the header and the adapter."""

from __future__ import annotations

import re
from pathlib import Path

from client_sdk.native import adapter
from client_sdk.native.build import RUNTIME, SHARING, WARNINGS

PAGE = (Path(__file__).resolve().parents[2] / "docs/native-abi.md").read_text()
HEADER = RUNTIME.header.read_text()


def macro(name: str, header: str = HEADER) -> str:
    found = re.search(rf"^#define {name} (.*?)(?: /\*.*)?$", header, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_statuses_are_those_of_the_header_and_the_errors_those_of_python():
    rows = re.findall(r"^\| (\d) `(PF_\w+)` \|.*?\| (?:`(\w+)` )?\|$", PAGE, re.MULTILINE)
    assert [(name, code) for code, name, _ in rows] == re.findall(r"^  (PF_\w+) = (\d)", HEADER, re.MULTILINE)[:10]
    for code, _, error in rows[1:]:
        raised = adapter._ERRORS.get(int(code), adapter.ProgramExecutionError)
        assert raised.__name__ == error


def test_the_limits_are_those_of_the_headers():
    assert macro("PF_MAX_PROGRAM_BYTES") == f"UINT64_C({2**31 - 1})"
    assert macro("PF_MAX_PLANNED_BYTES") == f"UINT64_C({2**32})"
    limits = PAGE.split("**Limits.**")[1].split("**Change.**")[0]
    for stated in ("2^31 - 1 bytes", "4 GiB", f"rank {macro('PF_MAX_RANK')},", f"| {macro('PF_MAX_THREADS')} |"):
        assert stated in limits
    sharing = SHARING.header.read_text()
    assert macro("PFS_MAX_ELEMENTS", sharing) == "(UINT64_C(1) << 48)"
    assert f"| 2^48; {macro('PFS_MAX_VALUES', sharing)} |" in limits


def test_the_warnings_are_those_of_the_build():
    assert " ".join(WARNINGS) in PAGE
