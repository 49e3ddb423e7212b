"""The server of a simulation: a child process on loopback that cannot outlive its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final, Self

from simulator.errors import ServerUnavailable

CONFIG_FILE: Final = "config.toml"
LOG_FILE: Final = "server.log"
# The `pocketfed` command of this very interpreter, whatever is on the PATH.
_SERVE: Final = "import sys; from client_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
_READY_WITHIN_S: Final = 120.0
_STOP_WITHIN_S: Final = 30.0
# Settings of the server may come from the environment and would win over our file: a simulation must not be changed
# by what happens to be exported in the shell that starts it.
_KEPT_VARIABLES: Final = ("POCKETFED_CACHE", "POCKETFED_DEBUG")


def write_server_config(folder: Path, task: dict[str, Any]) -> Path:
    """Write the configuration of an embedded server on the virtual clock.

    Args:
        folder: The server's folder; database and blobs go below it.
        task: Settings of the task, as ``pocketfed serve`` documents them; None leaves one out.

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
        *_table("task", task),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _table(name: str, values: dict[str, Any]) -> list[str]:
    """A TOML table, then the tables inside it."""
    lines = ["", f"[{name}]"]
    tables = []
    for key, value in values.items():
        if isinstance(value, dict):
            tables += _table(f"{name}.{key}", value)
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    return lines + tables


def _toml_value(value: Any) -> str:  # noqa: ANN401 - strings, paths and numbers
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case _:
            # A JSON string without escaped non-ASCII characters is a TOML basic string.
            return json.dumps(str(value), ensure_ascii=False)


class EmbeddedServer:
    """``pocketfed serve`` as a child process.

    The child watches its standard input, a pipe whose other end this process holds: when this process ends, however
    it ends, the kernel closes the pipe and the child stops. It runs in a session of its own, so that Ctrl-C in the
    terminal reaches the simulator alone, which then lets its devices finish before it stops the server.
    """

    def __init__(self, config: Path) -> None:
        self._config = config
        self.log = config.with_name(LOG_FILE)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> str:
        """Start the child and wait until it accepts requests.

        Returns:
            Its address.

        Raises:
            ServerUnavailable: It ended, or said nothing, before it was ready.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith("POCKETFED_") or k in _KEPT_VARIABLES}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and command
                [sys.executable, "-c", _SERVE, "serve", "--config", str(self._config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=kept,
                start_new_session=True,
            )
        line = self._first_line(self._process)
        try:
            self.url = str(json.loads(line)["url"])
        except (ValueError, KeyError, TypeError):
            self.stop()
            raise ServerUnavailable(f"the embedded server did not start: {self._last_words()}") from None
        return self.url

    @staticmethod
    def _first_line(process: subprocess.Popen[bytes]) -> bytes:
        """What the child prints first; nothing if it ends or stays silent."""
        lines: list[bytes] = []

        def read() -> None:
            if process.stdout is not None:
                lines.append(process.stdout.readline())

        reader = threading.Thread(target=read, name="server-ready", daemon=True)
        reader.start()
        reader.join(_READY_WITHIN_S)
        return lines[0] if lines else b""

    def check(self) -> None:
        """Say what happened where the child has ended by itself.

        Raises:
            ServerUnavailable: It did; quotes the end of its log.
        """
        if self._process is not None and self._process.poll() is not None:
            raise ServerUnavailable(
                f"the embedded server ended with status {self._process.returncode}: {self._last_words()}"
            )

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f"{lines[-1].removeprefix('error: ') if lines else 'it logged nothing'} (see {self.log})"

    def stop(self) -> None:
        """Let the child finish and end; kill it if it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            # Safe: what the server has acknowledged is on disk.
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()
