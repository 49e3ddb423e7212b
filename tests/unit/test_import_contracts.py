"""import-linter's contracts hold for the code as it is, and each one breaks when its forbidden import is planted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS = [contract["name"] for contract in CONFIG["contracts"]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The four packages' sources and the contracts, free to be broken."""
    for package in CONFIG["root_packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, list[str]]:
    """Exit status, and the names of the broken contracts."""
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return done.returncode, [name for name in CONTRACTS if squeezed(f"{name} BROKEN") in squeezed(done.stdout)]


def squeezed(text: str) -> str:
    """Without white space: the report wraps long names."""
    return "".join(text.split())


def test_the_contracts_hold(copy: Path):
    assert lint(copy) == (0, [])


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("client_sdk/cli.py", "import server_ref", "the device never imports the server"),
        ("client_sdk/runtime.py", "def f():\n    import torch", "the device never imports the server"),
        ("client_sdk/protocol/frames.py", "import client_sdk.runtime", "the protocol imports nothing"),
        ("client_sdk/protocol/messages.py", "import httpx", "the protocol imports nothing"),
        ("server_ref/rounds.py", "from client_sdk import session", "the server shares with the device only"),
        ("server_ref/rounds.py", "def f():\n    import client_sdk.runtime", "the server shares with the device only"),
        ("server_ref/secure/round.py", "import httpx", "the server shares with the device only"),
        ("mobile_export/export.py", "import client_sdk.session", "the exporter knows the protocol"),
        ("mobile_export/export.py", "import simulator", "the exporter knows the protocol"),
    ],
)
def test_a_planted_import_breaks_its_contract(copy: Path, module: str, planted: str, contract: str):
    with (copy / module).open("a") as source:
        source.write(f"\n{planted}\n")
    status, broken = lint(copy)
    assert status == 1
    assert any(name.startswith(contract) for name in broken), broken


def test_every_contract_has_a_planted_import():
    mark = next(m for m in test_a_planted_import_breaks_its_contract.pytestmark if m.name == "parametrize")
    tried = [contract for _, _, contract in mark.args[1]]
    assert [name for name in CONTRACTS if not name.startswith(tuple(tried))] == []
