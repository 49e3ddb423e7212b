"""Who may import whom, and which third parties: the table of docs/adr/0001, held as an allow-list.

import-linter forbids the edges we know to be wrong; this refuses everything that was not permitted, and looks at
what an import really loads (a permitted third party may drag in a forbidden one).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client_sdk", "server_ref", "mobile_export", "simulator")

PROTOCOL_THIRD_PARTIES = frozenset({"numpy", "pydantic", "cryptography"})
DEVICE_THIRD_PARTIES = PROTOCOL_THIRD_PARTIES | {"httpx", "executorch"}
# What would cost a device hundreds of megabytes, or make it a server.
HEAVY = frozenset(
    {
        "torch",
        "numba",
        "scipy",
        "pandas",
        "sklearn",
        "plotly",
        "fastapi",
        "starlette",
        "uvicorn",
        "sqlalchemy",
        "alembic",
    }
)


@dataclass(frozen=True)
class Rule:
    """What the modules of one package may import.

    Attributes:
        third_parties: Top-level names.
        siblings: Modules or packages of ours, beside the package itself.
        lazy_siblings: Likewise, but inside functions only.
    """

    third_parties: frozenset[str]
    siblings: tuple[str, ...] = ()
    lazy_siblings: tuple[str, ...] = ()


# Longest matching prefix wins.
RULES = {
    "client_sdk.protocol": Rule(PROTOCOL_THIRD_PARTIES),
    "client_sdk": Rule(DEVICE_THIRD_PARTIES, ("client_sdk",)),
    "server_ref": Rule(
        frozenset(
            {
                "numpy",
                "numba",
                "llvmlite",  # numba's own code generator, of the release that it pins
                "torch",
                "pydantic",
                "pydantic_settings",
                "cryptography",
                "dp_accounting",
                "fastapi",
                "starlette",
                "uvicorn",
                "sqlalchemy",
                "alembic",
                "obstore",
                "prometheus_client",
            }
        ),
        ("client_sdk.protocol",),
    ),
    "mobile_export": Rule(
        frozenset({"numpy", "torch", "executorch", "pydantic", "rich"}), ("client_sdk.protocol", "client_sdk.runtime")
    ),
    "simulator": Rule(
        DEVICE_THIRD_PARTIES | {"torch", "sklearn", "plotly", "rich"},
        ("client_sdk", "server_ref", "mobile_export"),
    ),
}
# The coordinator is the client of aggregators that run elsewhere.
RULES["server_ref.secure.client"] = Rule(RULES["server_ref"].third_parties | {"httpx"}, ("client_sdk.protocol",))
RULES["server_ref.evaluation"] = Rule(
    RULES["server_ref"].third_parties, ("client_sdk.protocol",), lazy_siblings=("client_sdk.runtime",)
)


@dataclass(frozen=True)
class Import:
    """One import statement's target: a module as it can be named, and where it stands."""

    target: str
    line: int
    lazy: bool


def imports_of(module: str, source: str, *, is_package: bool = False) -> Iterator[Import]:
    """All imports of a module's source, relative ones resolved; ``from a import b`` counts as ``a.b``."""
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parents, *filter(None, [base])])
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, lazy=lazy or function)

    yield from walk(ast.parse(source), lazy=False)


def within(target: str, prefixes: tuple[str, ...]) -> bool:
    return any(target == p or target.startswith(p + ".") for p in prefixes)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Each import of ``module`` that its package's rule does not permit, as readable lines."""
    scope = max((p for p in RULES if within(module, (p,))), key=len)
    rule = RULES[scope]
    own = scope if scope == "client_sdk.protocol" else module.partition(".")[0]
    found = []
    for imported in imports_of(module, source, is_package=is_package):
        top = imported.target.partition(".")[0]
        if top in sys.stdlib_module_names or within(imported.target, (own,)):
            continue
        if top in PACKAGES:
            allowed = within(imported.target, rule.siblings) or (
                imported.lazy and within(imported.target, rule.lazy_siblings)
            )
            private = any(part.startswith("_") for part in imported.target.split("."))
            if allowed and not private:
                continue
        elif top in rule.third_parties:
            continue
        found.append(f"{module}:{imported.line} imports {imported.target}")
    return found


def modules_of(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_what_their_package_may(package: str):
    found = [
        line
        for module, path in modules_of(package)
        for line in violations(module, path.read_text(), is_package=path.name == "__init__.py")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("client_sdk.training", "import torch"),
        ("client_sdk.training", "def f():\n    from server_ref import rounds"),
        ("client_sdk.protocol.frames", "import httpx"),
        ("client_sdk.protocol.frames", "from client_sdk.runtime import load_program"),
        ("client_sdk.protocol.frames", "from .. import runtime"),
        ("client_sdk.protocol.frames", "from ..native import adapter"),
        ("server_ref.rounds", "from client_sdk.session import Session"),
        ("server_ref.rounds", "from client_sdk import runtime"),
        ("server_ref.rounds", "def f():\n    import client_sdk.runtime"),
        ("server_ref.evaluation", "from client_sdk.runtime import load_program"),
        ("server_ref.app.routes", "import simulator.run"),
        ("server_ref.app.routes", "import requests"),
        ("server_ref.app.routes", "import httpx"),
        ("server_ref.secure.round", "import httpx"),
        ("mobile_export.export", "import client_sdk.transport"),
        ("mobile_export.export", "import server_ref"),
        ("simulator.run", "from server_ref.rounds import _private"),
        ("simulator.run", "import requests"),
    ],
)
def test_an_import_that_is_not_permitted_is_found(module: str, source: str):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("client_sdk.transport", "import httpx, numpy.typing\nfrom client_sdk.protocol.frames import encode_frame"),
        ("client_sdk.protocol.frames", "from client_sdk.protocol import errors\nfrom . import program\nimport json"),
        ("server_ref.rounds", "from client_sdk.protocol import errors\nfrom server_ref.clock import Clock"),
        ("server_ref.evaluation", "def f():\n    from client_sdk.runtime import load_program"),
        ("server_ref.secure.client", "import httpx"),
        ("mobile_export.parity", "import torch\nfrom client_sdk.runtime import load_program"),
        ("simulator.run", "from client_sdk import MobileClient\nimport server_ref.app"),
    ],
)
def test_a_permitted_import_passes(module: str, source: str):
    assert violations(module, source) == []


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def import_all(package: str, but: tuple[str, ...] = ()) -> str:
    modules = (module for module, _ in modules_of(package) if "migrations" not in module)
    return "import " + ", ".join(module for module in modules if module not in but)


def test_importing_the_sdk_loads_nothing_beyond_the_standard_library():
    assert loaded_after("import client_sdk") & (HEAVY | DEVICE_THIRD_PARTIES | set(PACKAGES)) == {"client_sdk"}


def test_importing_the_protocol_loads_no_transport_and_no_runtime():
    loaded = loaded_after(import_all("client_sdk/protocol"))
    assert "client_sdk" in loaded
    assert loaded & (HEAVY | {"httpx", "executorch", "server_ref", "mobile_export", "simulator"}) == set()


def test_importing_the_whole_sdk_brings_in_neither_torch_nor_a_server():
    loaded = loaded_after(import_all("client_sdk"))
    assert loaded & (HEAVY | {"server_ref", "mobile_export", "simulator"}) == set()


def test_importing_the_whole_server_brings_in_neither_torch_nor_a_device():
    # What talks to aggregators elsewhere, or starts them, is loaded where that is configured.
    remote = ("server_ref.secure.client", "server_ref.secure.launch")
    code = import_all("server_ref", remote)
    code += "\nassert not [m for m in sys.modules if m.startswith('client_sdk.runtime')]"
    assert loaded_after(code) & {"torch", "executorch", "httpx", "mobile_export", "simulator"} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_s_commands_are_cheap_to_load(package: str):
    loaded = loaded_after(f"import {package}.cli")
    assert loaded & (HEAVY | {"executorch", "httpx"} | (set(PACKAGES) - {package, "client_sdk"})) == set()
