"""The package's public names: loaded on first use, and only those."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import client_sdk


def test_importing_the_package_loads_none_of_its_modules():
    code = (
        "import json, sys; before = set(sys.modules); import client_sdk; "
        "print(json.dumps([m for m in set(sys.modules) - before if m.startswith('client_sdk.')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", client_sdk.__all__)
def test_every_public_name_resolves_to_itself(name: str):
    found = getattr(client_sdk, name)
    assert found.__name__ == name
    assert getattr(client_sdk, name) is found
    assert name in dir(client_sdk)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Torch'"):
        client_sdk.Torch  # noqa: B018 - the access is the test
