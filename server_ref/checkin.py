"""Who of the devices that offer themselves gets a slot: ``selection`` at the server's check-in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy.engine import Engine

from server_ref.assignments import AssignmentRecord
from server_ref.config import TaskConfig
from server_ref.rounds import RoundEngine
from server_ref.selection import SelectionPolicy, Selector
from server_ref.store import database


class AtCheckIn:
    """The selector of a task and its limit of participations, told about what counted.

    What it knows follows from the counted reports alone, in the order in which they counted: a restart rebuilds it, and
    a simulation repeats it.

    Args:
        selector: Decides; None accepts whoever comes.
        seed: Of its draws.
        limit: Rounds that count a device at most, on which the privacy budget rests; None for no limit.
        participations: Rounds that counted each device so far; needed with a limit only.
    """

    def __init__(
        self,
        selector: Selector | None,
        seed: int,
        *,
        limit: int | None = None,
        participations: Mapping[str, int] | None = None,
    ) -> None:
        self._selector = selector
        self._seed = seed
        self._limit = limit
        self._participations = Counter(participations)

    @classmethod
    def begin(
        cls,
        config: TaskConfig,
        history: Iterable[tuple[str, float]] = (),
        participations: Mapping[str, int] | None = None,
    ) -> AtCheckIn:
        """From the counted reports so far: (device, seconds), oldest first, and how many of each device."""
        settings = config.selection
        selector = None
        if settings.policy != "any":
            selector = Selector.from_history(history, SelectionPolicy(settings.policy), floor=settings.floor)
        return cls(selector, config.seed, limit=config.privacy.max_participations, participations=participations)

    @classmethod
    def rebuild(cls, config: TaskConfig, engine: Engine) -> AtCheckIn:
        """From the table of assignments."""
        with engine.connect() as connection:
            history = () if config.selection.policy == "any" else database.counted_latencies(connection)
            limited = config.privacy.max_participations is not None
            return cls.begin(config, history, database.counted_participations(connection) if limited else None)

    def admits(self, device_id: str, engine: RoundEngine, now: float) -> bool:
        """Whether a device that offers itself now may have a slot; one that holds an assignment keeps it."""
        if engine.holds(device_id):
            return True
        # A device holds one assignment at a time, so that this one's is the only report that does not count yet.
        if self._limit is not None and self._participations[device_id] >= self._limit:
            return False
        if self._selector is None:
            return True
        digest = hashlib.sha256(f"select:{self._seed}:{device_id}:{now!r}".encode("ascii")).digest()
        return self._selector.accept(device_id, int.from_bytes(digest[:8], "big") / 2**64)

    def record(self, counted: Sequence[AssignmentRecord]) -> None:
        """A buffer was committed."""
        if self._limit is not None:
            self._participations.update(r.device_id for r in counted)
        if self._selector is None:
            return
        for record in sorted(counted, key=lambda r: r.order):
            if record.arrival is not None:
                self._selector.record(record.device_id, max(0.0, record.arrival - record.issued_at))
