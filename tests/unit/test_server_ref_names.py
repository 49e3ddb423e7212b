"""The server's public names: loaded on first use, and only those."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest

import server_ref
import server_ref.aggregation

SPECIFIED = {
    "AsyncGradientAggregator",
    "ByzantineRobustAggregator",
    "CompressedGradientAggregator",
    "DivergenceDetected",
    "ExactAccumulator",
    "GradientAggregator",
    "PersonalizedFederatedAggregator",
    "SecureAggregator",
    "ServerDeviceSelector",
    "WorkerGradient",
    "apply_update",
}


def test_importing_the_packages_loads_none_of_their_modules():
    code = (
        "import json, sys; before = set(sys.modules); import server_ref, server_ref.aggregation; "
        "print(json.dumps([m for m in set(sys.modules) - before if m.startswith(('server_ref.', 'client_sdk'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["server_ref.aggregation"]


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (server_ref, server_ref.aggregation) for name in package.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_public_name_resolves_to_itself(package: ModuleType, name: str):
    found = getattr(package, name)
    assert found.__name__ == name
    assert getattr(package, name) is found
    assert name in dir(package)


def test_the_specification_s_names_are_among_them():
    assert set(server_ref.__all__) >= SPECIFIED


@pytest.mark.parametrize("package", [server_ref, server_ref.aggregation])
def test_an_unknown_name_is_an_attribute_error(package: ModuleType):
    with pytest.raises(AttributeError, match="no attribute 'Torch'"):
        package.Torch  # noqa: B018 - the access is the test
