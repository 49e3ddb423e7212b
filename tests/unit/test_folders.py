"""Where caches lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_sdk.protocol.folders import cache_folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"POCKETFED_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/exports"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/pocketfed/exports"),
        ({"HOME": "/c"}, "/c/.cache/pocketfed/exports"),
    ],
)
def test_where_the_cache_lies(environment, expected, monkeypatch):
    for name in ("POCKETFED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("exports") == Path(expected)
