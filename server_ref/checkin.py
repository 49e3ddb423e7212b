"""Who of the devices that offer themselves gets a slot: ``selection`` at the server's check-in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from sqlalchemy.engine import Engine

from server_ref.assignments import AssignmentRecord
from server_ref.config import TaskConfig
from server_ref.rounds import RoundEngine
from server_ref.selection import SelectionPolicy, Selector
from server_ref.store import database


class AtCheckIn:
    """The selector of a task, told about what counted; None accepts whoever comes.

    What it knows follows from the counted reports alone, in the order in which they counted: a restart rebuilds it, and
    a simulation repeats it.

    Args:
        selector: Decides; None for everybody.
        seed: Of its draws.
    """

    def __init__(self, selector: Selector | None, seed: int) -> None:
        self._selector = selector
        self._seed = seed

    @classmethod
    def begin(cls, config: TaskConfig, history: Iterable[tuple[str, float]] = ()) -> AtCheckIn:
        """From the counted reports so far: (device, seconds), oldest first."""
        settings = config.selection
        if settings.policy == "any":
            return cls(None, config.seed)
        policy = SelectionPolicy(settings.policy)
        return cls(Selector.from_history(history, policy, floor=settings.floor), config.seed)

    @classmethod
    def rebuild(cls, config: TaskConfig, engine: Engine) -> AtCheckIn:
        """From the table of assignments."""
        if config.selection.policy == "any":
            return cls.begin(config)
        with engine.connect() as connection:
            return cls.begin(config, database.counted_latencies(connection))

    def admits(self, device_id: str, engine: RoundEngine, now: float) -> bool:
        """Whether a device that offers itself now may have a slot; one that holds an assignment keeps it."""
        if self._selector is None or engine.holds(device_id):
            return True
        digest = hashlib.sha256(f"select:{self._seed}:{device_id}:{now!r}".encode("ascii")).digest()
        return self._selector.accept(device_id, int.from_bytes(digest[:8], "big") / 2**64)

    def record(self, counted: Iterable[AssignmentRecord]) -> None:
        """A buffer was committed."""
        if self._selector is None:
            return
        for record in sorted(counted, key=lambda r: r.order):
            if record.arrival is not None:
                self._selector.record(record.device_id, max(0.0, record.arrival - record.issued_at))
