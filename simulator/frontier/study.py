"""All cells of a frontier: run one by one, each kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from client_sdk.protocol.errors import ConfigurationError
from simulator.frontier.config import FrontierSettings
from simulator.frontier.run import Outcome, World, run_cell


def run_study(
    settings: FrontierSettings, kept: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Mapping[str, Outcome]:
    """Run what is not there yet.

    Args:
        settings: What is compared.
        kept: File with a line for each finished cell, headed by the settings; made if it is not there.
        say: Told about every cell.

    Returns:
        Outcomes by ``Cell.key``.

    Raises:
        ConfigurationError: The file is of a study with other settings.
    """
    done: dict[str, Outcome] = {}
    head = settings.model_dump_json()
    if kept is not None and kept.exists():
        first, *lines = kept.read_text().splitlines()
        if first != head:
            raise ConfigurationError(f"{kept} is of another study; remove it, or name another file")
        done = {cell["key"]: Outcome(**cell["outcome"]) for cell in map(json.loads, lines)}
    elif kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(head + "\n")
    todo = [cell for cell in settings.cells() if cell.key not in done]
    world = World.load(settings)
    for number, cell in enumerate(todo, start=1):
        outcome = done[cell.key] = run_cell(world, cell)
        if kept is not None:
            with kept.open("a") as file:
                file.write(json.dumps({"key": cell.key, "outcome": asdict(outcome)}) + "\n")
        say(f"{number} of {len(todo)}: {cell.key}: {outcome.validation:.4f}")
    return done
