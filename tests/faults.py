"""A file system on which a process dies: the ``os`` module, killed at its n-th step."""

from __future__ import annotations

import os
from typing import Any


class Killed(BaseException):
    """The process ends here."""


class FaultyOs:
    """The ``os`` module, killed at its n-th step; a written byte is a step, and so is every other call."""

    def __init__(self, survives: int, *, chunk: int = 1) -> None:
        """Let so many steps succeed.

        Args:
            survives: Steps before the kill; negative for none.
            chunk: Bytes that one step writes.
        """
        self.left = survives
        self.chunk = chunk

    def step(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1

    def write(self, descriptor: int, data: memoryview) -> int:
        self.step()
        return os.write(descriptor, data[: self.chunk])

    def fsync(self, _descriptor: int) -> None:
        """A step and nothing else: what a dead process wrote is there, and a thousand flushes take their time."""
        self.step()

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if not callable(value) or name == "close":
            return value

        def call(*args: Any) -> Any:
            self.step()
            return value(*args)

        return call
