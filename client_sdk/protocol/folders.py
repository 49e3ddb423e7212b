"""Where this machine's user keeps pocketfed's caches: one rule for the compiled shim, exports and data sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(kind: str, environ: Mapping[str, str] | None = None) -> Path:
    """Folder of one kind of cached files; it need not exist.

    ``$POCKETFED_CACHE/KIND``, else ``$XDG_CACHE_HOME/pocketfed/KIND``, else ``~/.cache/pocketfed/KIND``.
    """
    variables = os.environ if environ is None else environ
    if explicit := variables.get("POCKETFED_CACHE"):
        return Path(explicit) / kind
    return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfed" / kind
