"""A task's coordinator in this process, over real stores, and devices that report to it what a test says."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import sqlalchemy as sa

from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assigned, Assignment, CheckInRequest, EnrolRequest, Finished, Wait
from client_sdk.protocol.program import Manifest
from client_sdk.protocol.signing import device_id_of
from client_sdk.reports import build_report
from server_ref.clock import WallClock
from server_ref.config import load_config
from server_ref.coordinator import Coordinator
from server_ref.secure.embedded import EmbeddedAggregators
from tests.secure_parties import quick_store
from tests.secure_rounds import FaultyPort
from tests.servers import write_config

_WITHIN_S = 60.0
"""Far longer than anything here takes; a test that waits so long has failed."""


class Ports:
    """The embedded aggregators of every coordinator that is started while this is installed, as faulty ports.

    They do not wait for the disk: these tests end objects and processes, not power.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ports: list[FaultyPort] = []
        opened = EmbeddedAggregators.open.__func__  # type: ignore[attr-defined]

        def wrapped(cls: type[EmbeddedAggregators], *args: Any, **kwargs: Any) -> EmbeddedAggregators:
            found: EmbeddedAggregators = opened(cls, *args, **kwargs)
            self._ports = [FaultyPort(port) for port in found.ports]
            return replace(found, ports=tuple(self._ports))

        monkeypatch.setattr(EmbeddedAggregators, "open", classmethod(wrapped))
        monkeypatch.setattr("server_ref.secure.embedded.AggregatorStore", quick_store)

    def __getitem__(self, index: int) -> FaultyPort:
        """Aggregator ``index``, from 1."""
        return self._ports[index - 1]

    def recover(self) -> None:
        """All are well again."""
        for port in self._ports:
            port.recover()


class Served:
    """One task: a coordinator that can be replaced by another over the same folder.

    Args:
        folder: For its state.
        bundle: What is trained.
        settings: Of the task; see ``write_config``.
    """

    def __init__(self, folder: Path, bundle: Path, **settings: Any) -> None:
        self.folder, self.bundle, self.settings = folder, bundle, settings
        self.size = Manifest.from_json((bundle / "manifest.json").read_bytes()).num_parameters
        self.on_event: Callable[[str], None] = lambda _name: None
        self.seen: list[str] = []
        self._committed = threading.Condition()
        self._rounds = 0
        self._ids = itertools.count()
        self.coordinator = self._start()

    def _start(self) -> Coordinator:
        config = load_config(write_config(self.folder, self.bundle, **self.settings))
        coordinator = Coordinator(config, WallClock(), lambda: f"{next(self._ids):032x}", on_event=self._event)
        _hurry(coordinator)
        coordinator.start()
        return coordinator

    def _event(self, name: str) -> None:
        self.seen.append(name)
        self.on_event(name)
        if name == "round-committed":
            with self._committed:
                self._rounds += 1
                self._committed.notify_all()

    def restart(self, **changes: Any) -> None:
        """Another coordinator over the same folder, perhaps with other settings."""
        self.coordinator.stop()
        self.settings |= changes
        self.coordinator = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.coordinator.stop()

    # --- devices ---------------------------------------------------------------------------------------------------

    def enrol(self, name: str) -> str:
        """A device of this name; its id."""
        key = hashlib.sha256(name.encode()).digest()
        self.coordinator.enrol(EnrolRequest(public_key=key.hex())).result(_WITHIN_S)
        return device_id_of(key)

    def check_in(self, name: str, samples: int = 10) -> Assigned | Wait | Finished:
        """What the device is told."""
        request = CheckInRequest(num_samples=samples)
        return self.coordinator.check_in(self.enrol(name), request).result(_WITHIN_S).reply

    def assigned(self, name: str, samples: int = 10) -> Assignment:
        """The device's work."""
        reply = self.check_in(name, samples)
        assert isinstance(reply, Assigned), reply
        return reply.assignment

    def report(
        self,
        name: str,
        assignment: Assignment,
        update: np.ndarray,
        *,
        amend: Callable[[bytes], bytes] = lambda frame: frame,
        **facts: Any,
    ) -> None:
        """The device sends its update, as the SDK makes a report of it; returns when it has been taken."""
        report_id = hashlib.sha256(assignment.assignment_id.encode()).hexdigest()[:32]
        given = {"device_id": self.enrol(name), "steps": 1, "train_loss": 0.5} | facts
        frame = amend(bytes(build_report(assignment, report_id, update.astype(np.float32), **given).frame))
        self.coordinator.report(self.enrol(name), report_id, frame).result(_WITHIN_S)
        self.settle()

    def settle(self) -> None:
        """Wait until whatever was queued is done: writes are in order, and a buffer closes before the next one."""
        for _ in range(2):
            self.enrol("nobody")

    def play(self, updates: Mapping[str, np.ndarray] | Sequence[np.ndarray], samples: Sequence[int] = ()) -> None:
        """A round: all devices get work, then report in order."""
        named = updates if isinstance(updates, Mapping) else {f"d{i}": u for i, u in enumerate(updates)}
        work = {name: self.assigned(name, n) for name, n in zip(named, samples or [10] * len(named), strict=True)}
        for name, update in named.items():
            self.report(name, work[name], update)

    # --- what came of it -------------------------------------------------------------------------------------------

    @property
    def model_sha256(self) -> str:
        """Of the newest model."""
        return str(self.coordinator.describe()["model_sha256"])

    @property
    def weights(self) -> np.ndarray:
        """Of the newest model, float32."""
        return np.frombuffer(decode_frame(self.coordinator.blob(self.model_sha256)).payload, np.float32)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The committed ones."""
        return self.coordinator.history(0)

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """Of the committed rounds."""
        return [r["measurements"] for r in self.rounds]

    @property
    def halted(self) -> str | None:
        """Why the task is over before its time, if it is."""
        found = self.coordinator.describe()["halted"]
        return None if found is None else str(found)

    def wait_for_rounds(self, number: int) -> None:
        """Until so many rounds are committed, by whoever."""
        with self._committed:
            assert self._committed.wait_for(lambda: self._rounds >= number, _WITHIN_S), "no round was committed"

    # --- what is on disk -------------------------------------------------------------------------------------------

    def rows(self, table: str) -> list[dict[str, Any]]:
        """A table of the server's database."""
        return rows(self.folder / "state" / "pocketfed.db", table)

    def releases(self) -> list[Path]:
        """Files of stored releases."""
        return sorted(p for p in (self.folder / "state" / "blobs" / "releases").glob("**/*") if p.is_file())

    def ledgers(self) -> list[int]:
        """Charges in the ledger of each embedded aggregator."""
        folders = sorted((self.folder / "state" / "aggregators").glob("aggregator-*"))
        return [sum(len(rows(file, "ledger")) for file in folder.glob("*.db")) for folder in folders]


def rows(file: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table of an SQLite file."""
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT * FROM {table}").mappings().all()  # noqa: S608 - a test's own name
    engine.dispose()
    return [dict(row) for row in found]


def _hurry(coordinator: Coordinator) -> None:
    """Do not wait for the disk: these tests end objects, not power."""
    engine = coordinator._state.db
    engine.dispose()

    @sa.event.listens_for(engine, "connect")
    def _no_flush(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")


def updates(seed: int, count: int, size: int, scale: float = 1.0) -> list[np.ndarray]:
    """Normal vectors, float32."""
    rng = np.random.default_rng([seed, count, size])
    return [(scale * rng.standard_normal(size)).astype(np.float32) for _ in range(count)]
