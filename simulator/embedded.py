"""The server of a simulation: a child process on loopback that cannot outlive its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from server_ref.child import ChildServer
from server_ref.settings import toml_table
from simulator.errors import ServerUnavailable

CONFIG_FILE: Final = "config.toml"
LOG_FILE: Final = "server.log"


def write_server_config(folder: Path, task: dict[str, Any], aggregators: dict[str, Any] | None = None) -> Path:
    """Write the configuration of an embedded server on the virtual clock.

    Args:
        folder: The server's folder; database and blobs go below it.
        task: Settings of the task, as ``pocketfed serve`` documents them; None leaves one out.
        aggregators: Where its aggregators run, if not in its own process.

    Returns:
        The file.
    """
    lines = [
        "# Written by `pocketfed simulate`; the server of one simulation, on simulated time.",
        'data_dir = "data"',
        'host = "127.0.0.1"',
        "port = 0",
        'clock = "virtual"',
        "exit_with_stdin = true",
        *([] if aggregators is None else toml_table("aggregators", aggregators)),
        *toml_table("task", task),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class EmbeddedServer(ChildServer):
    """``pocketfed serve`` as a child process, which ends with this one.

    Raises:
        ServerUnavailable: When started or checked: it did not start, or ended by itself; quotes the end of its log.
    """

    def __init__(self, config: Path) -> None:
        log = config.with_name(LOG_FILE)
        super().__init__(["serve", "--config", str(config)], log, "the embedded server", ServerUnavailable)
