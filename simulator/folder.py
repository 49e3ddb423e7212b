"""The output folder of a run: what lies in it, who may use it, and what an earlier run left there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final, Self

from pydantic import ValidationError

from client_sdk.atomic import write_atomically
from client_sdk.protocol.errors import ConfigurationError
from server_ref.flags import merged
from simulator.config import SimulationConfig
from simulator.errors import OutputDirectoryInUse, ResumeMismatch

CONFIG_FILE: Final = "config.json"
JOURNAL_FILE: Final = "journal.jsonl"
WORKLOAD_FILE: Final = "workload.json"
BUNDLE_FOLDER: Final = "bundle"
SERVER_FOLDER: Final = "server"
MEMORY_FOLDER: Final = "memory"
AGGREGATORS_FOLDER: Final = "aggregators"
RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"
_LOCK_FILE: Final = ".lock"
_OURS: Final = frozenset(
    {
        CONFIG_FILE,
        JOURNAL_FILE,
        WORKLOAD_FILE,
        BUNDLE_FOLDER,
        SERVER_FOLDER,
        MEMORY_FOLDER,
        AGGREGATORS_FOLDER,
        RESULTS_FILE,
        REPORT_FILE,
        _LOCK_FILE,
    }
)


class RunFolder:
    """A locked output folder with a configuration in it.

    Attributes:
        path: The folder.
        config: The run's configuration.
        fresh: Whether this process began the run.
    """

    def __init__(self, path: Path, lock: IO[bytes], config: SimulationConfig, *, fresh: bool) -> None:
        self.path = path
        self.config = config
        self.fresh = fresh
        self._lock = lock

    @classmethod
    def begin(cls, path: Path, config: SimulationConfig, *, overwrite: bool = False) -> Self:
        """Take an empty (or new) folder for a new run.

        Args:
            path: The folder.
            config: The run.
            overwrite: Remove an earlier run in it first; anything else in it is never touched.

        Raises:
            OutputDirectoryInUse: It is not empty, or another process uses it.
            ConfigurationError: It cannot be created or written.
        """
        lock = lock_folder(path)
        try:
            _check_vacant(path, overwrite=overwrite)
            folder = cls(path, lock, config, fresh=True)
            folder._empty()
            write_atomically(path / CONFIG_FILE, (config.model_dump_json(indent=2) + "\n").encode(), mode=0o644)
        except BaseException:
            lock.close()
            raise
        return folder

    @classmethod
    def resume(cls, path: Path, given: Mapping[str, object]) -> Self:
        """Take the folder of an interrupted run.

        Args:
            path: The folder.
            given: Configuration values that the caller insists on; they must be the run's own.

        Raises:
            ResumeMismatch: No run there, one of another version, or one with other values.
            OutputDirectoryInUse: Another process uses it.
        """
        if not path.is_dir():
            raise ResumeMismatch(f"there is no run to resume in {path}")
        lock = lock_folder(path)
        try:
            config = SimulationConfig.read(path / CONFIG_FILE)
            _check_same(config, given)
            _check_own_server(path, config)
        except BaseException:
            lock.close()
            raise
        return cls(path, lock, config, fresh=False)

    def discard(self) -> None:
        """Remove a run that came to nothing, so that the same command can be given again."""
        self._empty()

    def _empty(self) -> None:
        for name in _OURS - {_LOCK_FILE}:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process use the folder."""
        (self.path / _LOCK_FILE).unlink(missing_ok=True)
        self._lock.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()


def _check_vacant(path: Path, *, overwrite: bool) -> None:
    others = sorted(p.name for p in path.iterdir() if p.name != _LOCK_FILE)
    strangers = [name for name in others if name not in _OURS]
    if strangers or (others and CONFIG_FILE not in others):
        raise OutputDirectoryInUse(
            f"{path} holds {(strangers or others)[0]!r}, which is no part of a run; choose another folder"
        )
    if others and not overwrite:
        raise OutputDirectoryInUse(
            f"{path} holds a run already: continue it with --resume, replace it with --overwrite, or choose another "
            "folder"
        )


def _check_same(config: SimulationConfig, given: Mapping[str, object]) -> None:
    try:
        wanted = SimulationConfig.model_validate(merged(config.model_dump(), dict(given)))
    except ValidationError as e:
        raise ConfigurationError(f"invalid value: {e.errors()[0]['msg']}") from e
    if differences := wanted.differences(config):
        raise ResumeMismatch(
            f"a resumed run keeps its configuration; {', '.join(differences)}. Leave these flags out, or start a new "
            "run"
        )


def _check_own_server(path: Path, config: SimulationConfig) -> None:
    if config.server is not None:
        raise ResumeMismatch(
            f"the run in {path} used the server at {config.server}, which goes on without it; start a new run"
        )


def lock_folder(path: Path) -> IO[bytes]:
    """Create the folder if needed, and lock it; the operating system lets go when the process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK_FILE).open("ab")
    except OSError as e:
        raise ConfigurationError(f"cannot write into {path}: {e.strerror or e}") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.close()
        raise OutputDirectoryInUse(f"another process runs a simulation in {path}") from e
    # The file may have been removed by the process that held it a moment ago.
    if not _is_same(lock, path / _LOCK_FILE):
        lock.close()
        return lock_folder(path)
    return lock


def _is_same(lock: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
