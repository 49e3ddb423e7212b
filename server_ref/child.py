"""One of our own commands that serves, as a child process: started, watched and stopped, and never an orphan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from client_sdk.protocol.errors import PocketfedError

# The `pocketfed` command of this very interpreter, whatever is on the PATH.
_COMMAND: Final = "import sys; from client_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
_READY_WITHIN_S: Final = 120.0
_STOP_WITHIN_S: Final = 30.0
# Settings may come from the environment and would win over a file that was written for this child.
_KEPT_VARIABLES: Final = ("POCKETFED_CACHE", "POCKETFED_DEBUG")


class ChildUnavailable(PocketfedError):
    """A child process did not start, or ended by itself."""


class ChildServer:
    """A child that prints one line of JSON with its ``url`` once it listens, and stops with its standard input.

    The child watches its standard input, a pipe whose other end this process holds: when this process ends, however
    it ends, the kernel closes the pipe and the child stops. It runs in a session of its own, so that Ctrl-C in the
    terminal reaches the parent alone, which then finishes before it stops the child.

    Args:
        arguments: Of the ``pocketfed`` command; they configure ``exit_with_stdin``.
        log: What the child writes to standard error is appended there.
        name: What messages call it.
        error: What is raised when it fails.

    Attributes:
        url: Where it listens, once started.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, name: str, error: type[PocketfedError] = ChildUnavailable
    ) -> None:
        self.log = log
        self.url = ""
        self._arguments = list(arguments)
        self._name = name
        self._error = error
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, while it is started."""
        return None if self._process is None else self._process.pid

    def start(self) -> str:
        """Start the child and wait until it accepts requests.

        Returns:
            Its address.

        Raises:
            ChildUnavailable: It ended, or said nothing, before it was ready.
        """
        self.spawn()
        return self.wait_until_ready()

    def spawn(self) -> None:
        """Start the child; several can start at once before one is waited for."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("POCKETFED_") or k in _KEPT_VARIABLES}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and command
                [sys.executable, "-c", _COMMAND, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=kept,
                start_new_session=True,
            )

    def wait_until_ready(self) -> str:
        """The address of a child that was spawned, once it listens.

        Raises:
            ChildUnavailable: It ended, or said nothing.
        """
        line = b"" if self._process is None else self._first_line(self._process)
        try:
            self.url = str(json.loads(line)["url"])
        except (ValueError, KeyError, TypeError):
            self.stop()
            raise self._error(f"{self._name} did not start: {self._last_words()}") from None
        return self.url

    @staticmethod
    def _first_line(process: subprocess.Popen[bytes]) -> bytes:
        """What the child prints first; nothing if it ends or stays silent."""
        lines: list[bytes] = []

        def read() -> None:
            if process.stdout is not None:
                lines.append(process.stdout.readline())

        reader = threading.Thread(target=read, name="child-ready", daemon=True)
        reader.start()
        reader.join(_READY_WITHIN_S)
        return lines[0] if lines else b""

    def check(self) -> None:
        """Say what happened where the child has ended by itself.

        Raises:
            ChildUnavailable: It did; quotes the end of its log.
        """
        if self._process is not None and self._process.poll() is not None:
            raise self._error(f"{self._name} ended with status {self._process.returncode}: {self._last_words()}")

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
