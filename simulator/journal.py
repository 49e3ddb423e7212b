"""The simulator's own durable state: what the server answered, in order, and which sessions are over.

The fleet's loop is a deterministic function of the configuration and of the answers to its check-ins. So those answers
are the whole state: replaying them from the start rebuilds every queue and counter without asking the server again.
Each line is written before anything acts on it; what is being sent when the process dies is sent again on resume, which
the protocol makes harmless. The file survives ``kill -9`` of the simulator at any moment (a torn last line is
dropped); it is not forced to disk per line, so after a power cut a run has to be started afresh.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_sdk.protocol.messages import Assigned, Finished, Wait
from simulator.errors import ResumeMismatch
from simulator.sessions import Outcome, SessionEnd

Reply = Assigned | Wait | Finished
_HEADER: Final = {"pocketfed-journal": 1}


class CheckInEntry(BaseModel):
    """One answered check-in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: int
    at: float
    reply: Assigned | Wait | Finished = Field(discriminator="status")


class Journal:
    """Append-only JSON lines. Everything but ``record_done`` belongs to one thread.

    Attributes:
        done: Assignment id -> end of the sessions that were over when the file was opened.
        round_seconds: Round id -> wall-clock seconds it took, of the rounds seen before.
        pending_seconds: Wall-clock seconds that earlier processes spent on the round that is still open.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, reading what it holds.

        Raises:
            ResumeMismatch: Not a journal of this version, or damaged other than by a torn last line.
        """
        self.path = path
        self.done: dict[str, SessionEnd] = {}
        self.round_seconds: dict[int, float] = {}
        self.pending_seconds = 0.0
        self._replies: deque[CheckInEntry] = deque()
        self._lock = threading.Lock()
        path.touch()
        self._file = path.open("r+b", buffering=0)
        kept = self._load(path.read_bytes())
        self._file.truncate(kept)
        self._file.seek(0, os.SEEK_END)
        if kept == 0:
            self._append(_HEADER)

    def _load(self, data: bytes) -> int:
        """Read all whole lines; returns how many bytes they take."""
        kept = data.rfind(b"\n") + 1
        lines = data[:kept].splitlines()
        try:
            for number, line in enumerate(lines):
                self._read_line(number, line)
        except (ValueError, KeyError, TypeError, ValidationError) as e:
            self._file.close()
            raise ResumeMismatch(f"{self.path} is damaged or of another version: {e}") from e
        return kept

    def _read_line(self, number: int, line: bytes) -> None:
        if line.startswith(b'{"device"'):
            self._replies.append(CheckInEntry.model_validate_json(line))
            return
        entry: dict[str, Any] = json.loads(line)
        if number == 0:
            if entry != _HEADER:
                raise ValueError("the first line is not this version's header")
        elif "done" in entry:
            end = SessionEnd(
                Outcome(entry["outcome"]), int(entry["bytes_up"]), int(entry["bytes_down"]), entry.get("reason")
            )
            self.done[str(entry["done"])] = end
        elif "round" in entry:
            self.round_seconds[int(entry["round"])] = float(entry["seconds"])
            self.pending_seconds = 0.0
        else:
            self.pending_seconds += float(entry["paused_after_s"])

    def _append(self, entry: dict[str, Any]) -> None:
        self._write(json.dumps(entry, separators=(",", ":")).encode())

    def _write(self, line: bytes) -> None:
        with self._lock:
            # One unbuffered write: a killed process leaves the whole line or a torn one at the very end.
            self._file.write(line + b"\n")

    @property
    def replaying(self) -> bool:
        """Whether recorded answers are left."""
        return bool(self._replies)

    def replay(self, device: int, at: float) -> Reply | None:
        """The recorded answer to the next check-in, or None where the record ends.

        Raises:
            ResumeMismatch: The record's next check-in is another one: code or configuration changed since.
        """
        if not self._replies:
            return None
        entry = self._replies.popleft()
        if (entry.device, entry.at) != (device, at):
            raise ResumeMismatch(
                f"{self.path} says that device {entry.device} checked in at {entry.at} s, this version has device "
                f"{device} at {at} s; the run cannot be resumed by it"
            )
        return entry.reply

    def accepted(self) -> dict[int, list[str]]:
        """Device -> assignments of its sessions that were over and accepted, in order. Asked before any replay."""
        found: dict[int, list[str]] = {}
        for entry in self._replies:
            if isinstance(entry.reply, Assigned):
                end = self.done.get(entry.reply.assignment.assignment_id)
                if end is not None and end.outcome is Outcome.ACCEPTED:
                    found.setdefault(entry.device, []).append(entry.reply.assignment.assignment_id)
        return found

    def record_reply(self, device: int, at: float, reply: Reply) -> None:
        """Write down an answer, before anything acts on it."""
        self._write(CheckInEntry(device=device, at=at, reply=reply).model_dump_json().encode())

    def record_done(self, assignment_id: str, end: SessionEnd) -> None:
        """Write down that a session is over. Thread-safe."""
        self._append({"done": assignment_id, **asdict(end)})

    def record_round(self, round_id: int, seconds: float) -> None:
        """Write down that a round is committed, and the wall-clock time it took."""
        self.round_seconds[round_id] = seconds
        self._append({"round": round_id, "seconds": seconds})

    def record_pause(self, seconds: float) -> None:
        """Write down how long the open round has run so far, before the process ends."""
        self._append({"paused_after_s": seconds})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
