"""A study's folder: its settings, and every finished cell, written down before anything else happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Final, Self

from pydantic import ValidationError

from client_sdk.atomic import write_atomically
from simulator.errors import OutputDirectoryInUse, ResumeMismatch
from simulator.folder import lock_folder
from simulator.robustness.cell import CellResult
from simulator.robustness.config import StudySettings

SETTINGS_FILE: Final = "study.json"
CELLS_FILE: Final = "cells.jsonl"
RESULTS_FILE: Final = "results.json"
CSV_FILE: Final = "table.csv"
SUMMARY_FILE: Final = "robustness-table.md"
REPORT_FILE: Final = "report.html"
PICTURES: Final = "img"
_LOCK_FILE: Final = ".lock"
_OURS: Final = frozenset(
    {SETTINGS_FILE, CELLS_FILE, RESULTS_FILE, CSV_FILE, SUMMARY_FILE, REPORT_FILE, PICTURES, _LOCK_FILE}
)


class StudyFolder:
    """A locked folder in which a study's cells collect, over as many runs as it takes.

    A killed process loses the cells that it was at, and nothing else: a torn last line is dropped.

    Attributes:
        path: The folder.
        settings: What all its cells share.
        done: Finished cells by their keys; those of other axes than today's too.
    """

    def __init__(self, path: Path, settings: StudySettings, *, overwrite: bool = False) -> None:
        """Begin a study, or go on with the one that is there.

        Args:
            path: The folder; made if there is none.
            settings: What the caller wants.
            overwrite: Forget an earlier study; anything that is no part of one is never touched.

        Raises:
            OutputDirectoryInUse: It holds something else, or another process uses it.
            ResumeMismatch: The study in it has other settings, or is damaged.
            ConfigurationError: It cannot be created or written.
        """
        self.path = path
        self.settings = settings
        self.done: dict[tuple[str, str, float, int], CellResult] = {}
        self._lock = lock_folder(path)
        try:
            self._check_vacant()
            if overwrite:
                (path / CELLS_FILE).unlink(missing_ok=True)
                (path / SETTINGS_FILE).unlink(missing_ok=True)
            self._check_settings()
            self._file = self._open()
        except BaseException:
            self._lock.close()
            raise

    def _check_vacant(self) -> None:
        strangers = sorted(p.name for p in self.path.iterdir() if p.name not in _OURS)
        if strangers:
            raise OutputDirectoryInUse(
                f"{self.path} holds {strangers[0]!r}, which is no part of a study; choose another folder"
            )

    def _check_settings(self) -> None:
        path = self.path / SETTINGS_FILE
        if not path.exists():
            write_atomically(path, (self.settings.model_dump_json(indent=2) + "\n").encode(), mode=0o644)
            return
        try:
            found = StudySettings.model_validate_json(path.read_bytes())
        except ValidationError as e:
            raise ResumeMismatch(f"{path} is damaged or of another version; give --overwrite to begin anew") from e
        mine, theirs = self.settings.model_dump(), found.model_dump()
        if differences := [f"{k} {mine[k]} (the study has {theirs[k]})" for k in mine if mine[k] != theirs[k]]:
            raise ResumeMismatch(
                f"the cells in {self.path} were made with other settings: {', '.join(differences)}; choose another "
                "folder, or --overwrite to begin anew"
            )

    def _open(self) -> IO[bytes]:
        path = self.path / CELLS_FILE
        path.touch()
        file = path.open("r+b", buffering=0)
        data = path.read_bytes()
        kept = data.rfind(b"\n") + 1
        try:
            for line in data[:kept].splitlines():
                self._remember(CellResult.model_validate_json(line))
        except ValidationError as e:
            file.close()
            raise ResumeMismatch(f"{path} is damaged or of another version; give --overwrite to begin anew") from e
        file.truncate(kept)
        file.seek(0, os.SEEK_END)
        return file

    def _remember(self, result: CellResult) -> None:
        self.done[result.key] = result

    def record(self, result: CellResult) -> None:
        """Keep a finished cell: on the disk, whole, before this returns."""
        # One unbuffered write: a killed process leaves the whole line or a torn one at the very end.
        self._file.write(json.dumps(result.model_dump(), separators=(",", ":")).encode() + b"\n")
        self._remember(result)

    def close(self) -> None:
        """Let another process use the folder."""
        self._file.close()
        (self.path / _LOCK_FILE).unlink(missing_ok=True)
        self._lock.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()
