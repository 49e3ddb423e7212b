"""All cells of the study: played one by one, each kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client_sdk.protocol.errors import ConfigurationError
from simulator.personal_study.outcome import Outcome, outcome_of
from simulator.personal_study.settings import Cell, StudySettings


def run_study(
    settings: StudySettings,
    kept: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    play: Callable[[Cell, StudySettings], Outcome] = outcome_of,
) -> Mapping[str, Outcome]:
    """Play what is not there yet.

    Args:
        settings: What is compared.
        kept: File with a line for each finished cell, headed by the settings; made if it is not there. A last line
            that was cut off is played anew.
        say: Told about every cell.
        play: What plays a cell.

    Returns:
        Outcomes by ``Cell.key``.

    Raises:
        ConfigurationError: The file is of a study with other settings.
    """
    cells = list(settings.cells())
    # Rates and fleets are part of what a cell is: whoever changes one plays it anew.
    described = {cell.key: repr(cell) for cell in cells}
    done: dict[str, Outcome] = {}
    head = settings.model_dump_json()
    if kept is not None and kept.exists():
        content = kept.read_text()
        first, *lines = content.splitlines()
        if not content.endswith("\n"):
            kept.write_text(content + "\n")
        if first != head:
            raise ConfigurationError(f"{kept} is of another study; remove it, or name another file")
        for line in lines:
            found = _parsed(line)
            if found is not None and described.get(found["key"]) == found["cell"]:
                done[found["key"]] = Outcome.model_validate(found["outcome"])
    elif kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(head + "\n")
    todo = [cell for cell in cells if cell.key not in done]
    for number, cell in enumerate(todo, start=1):
        outcome = done[cell.key] = play(cell, settings)
        if kept is not None:
            entry = {"key": cell.key, "cell": described[cell.key], "outcome": outcome.model_dump(mode="json")}
            with kept.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        say(f"{number} of {len(todo)}: {cell.key}")
    return done


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found
