"""What a server remembers of each device that offers itself: turns, latency, kind, and the hours at which it comes.

The decisions of a round must not depend on what happens within it: a server that dies in the middle of one, or another
replica, has to decide alike. So every fact can be read *as the round began*: what changed since is marked with the
round (and, for the hours, the hour) in which it did, and is left out. Whatever else changes does so at a commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from server_ref.selection.policy import Int64Array
from server_ref.selection.speed import updated

NEVER: Final = -(10**6)
"""An hour, day or round before all others."""

REMEMBERED_DAYS: Final = 7
"""A device is expected at an hour of the day if it came then within so many days and has not stayed away since."""

HOURS: Final = 24
SECONDS_PER_HOUR: Final = 3600

_FIELDS: Final = np.dtype(
    [
        ("joined_turns", np.int64),
        ("counted", np.int64),
        ("open_turns", np.int64),
        ("given_in", np.int64),
        ("given_then", np.int64),
        ("counted_in", np.int64),
        ("latency_s", np.float64),
        ("tier", np.int64),
        ("stratum", np.int64),
        ("seen_hour", np.int64),
        ("seen_round", np.int64),
        ("former_hour", np.int64),
        ("former_day", np.int64),
        ("came_s", np.float64),
        ("interval_s", np.float64),
        ("former_interval_s", np.float64),
        ("days", np.int32, (HOURS,)),
    ]
)
REALS: Final = ("latency_s", "came_s", "interval_s", "former_interval_s")
SCALARS: Final = tuple(name for name in _FIELDS.names or () if name not in {"days", *REALS})


class DeviceHistory:
    """The devices of one task. Memory: about 200 bytes a device; no list in it grows with the rounds.

    Attributes of a device:
        joined_turns: Turns that a newcomer is taken to have had, so that a fresh key is worth no more than an old one.
        counted: Its reports in committed rounds.
        open_turns: Assignments given to it since the last of those, lost or under way.
        given_in, given_then: The round of its latest assignment, and how many it was given in that round.
        counted_in: Round of its latest counted report.
        latency_s: Mean latency; NaN: never measured.
        tier, stratum: Codes of what it said when it first came; a device cannot move to where there is room.
        seen_hour, seen_round: The latest hour (since the epoch) in which it came, and in which round it first did then.
        former_hour, former_day: ``seen_hour``, and that hour of the day in ``days``, before that.
        came_s: When it came first in ``seen_hour``, until it comes again; then NaN.
        interval_s: How long it took to come again, an hour at most, measured once an hour; NaN: it never did.
        former_interval_s: That before ``seen_hour``.
        days: For each hour of the day (UTC) the last day on which it came then.
    """

    def __init__(self) -> None:
        self._rows = np.zeros(64, _FIELDS)
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._changed: set[int] = set()
        self._saved = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[str]:
        """Devices in the order of ``rows``."""
        return self._ids

    @property
    def rows(self) -> npt.NDArray[np.void]:
        """All devices' attributes, one row each; a view."""
        return self._rows[: len(self._ids)]

    def row(self, device_id: str) -> npt.NDArray[np.void] | None:
        """One device's attributes, as an array of one row; None: it never came."""
        index = self._index.get(device_id)
        return None if index is None else self._rows[index : index + 1]

    # --- as a round began ------------------------------------------------------------------------------------------

    def turns(self, round_id: int) -> Int64Array:
        """Turns of each device before the round began; int64[n]."""
        rows = self.rows
        since = np.where(rows["given_in"] == round_id, rows["given_then"], 0)
        turns: Int64Array = rows["joined_turns"] + rows["counted"] + rows["open_turns"] - since
        return turns

    def lost(self, round_id: int) -> Int64Array:
        """Assignments since the last counted report, before the round began; int64[n]."""
        turns: Int64Array = self.turns(round_id) - self.rows["joined_turns"] - self.rows["counted"]
        return turns

    def expected(self, round_id: int, hour: int) -> npt.NDArray[np.bool_]:
        """Who may come in this hour, by what was known before the round, or else before the hour; bool[n].

        Whoever came in the last hour or in this one, or at this hour of the day within a week and has since come at
        each hour at which it was expected: who was uninstalled is expected for an hour or two, not for a week.
        """
        rows = self.rows
        now = (rows["seen_hour"] == hour) & (rows["seen_round"] == round_id)
        last = np.where(now, rows["former_hour"], rows["seen_hour"])
        day = np.where(now, rows["former_day"], rows["days"][:, hour % HOURS])
        found: npt.NDArray[np.bool_] = (last >= hour - HOURS) & (day >= hour // HOURS - REMEMBERED_DAYS)
        for missed in range(hour - HOURS + 1, hour):
            habit = rows["days"][:, missed % HOURS] >= missed // HOURS - REMEMBERED_DAYS
            found &= (last >= missed) | ~habit
        found |= last >= hour - 1
        return found

    def interval_s(self, which: npt.NDArray[np.int64], hour: int) -> float:
        """Within which time three quarters of these devices come again, by what was known before the hour; 0: unknown.

        A quarter of them can neither shorten nor stretch it at will.
        """
        rows = self.rows[which]
        intervals = np.where(rows["seen_hour"] == hour, rows["former_interval_s"], rows["interval_s"])
        known = intervals[np.isfinite(intervals)]
        return float(np.quantile(known, 0.75, method="higher")) if len(known) else 0.0

    # --- what happens ----------------------------------------------------------------------------------------------

    def offered(
        self, device_id: str, *, round_id: int, now: float, joined_turns: int, tier: int, stratum: int
    ) -> npt.NDArray[np.void]:
        """A device offers itself. Changes its row at most twice an hour; returns it."""
        hour = int(now // SECONDS_PER_HOUR)
        index = self._index.get(device_id)
        if index is None:
            index = self._add(device_id)
            row = self._rows[index]
            row["joined_turns"], row["tier"], row["stratum"] = joined_turns, tier, stratum
            self._changed.add(index)
        row = self._rows[index]
        came_s, interval_s = float(row["came_s"]), float(row["interval_s"])
        if np.isfinite(came_s) and row["seen_hour"] <= hour:
            row["interval_s"], row["came_s"] = min(max(0.0, now - came_s), SECONDS_PER_HOUR), np.nan
            self._changed.add(index)
        if row["seen_hour"] < hour:
            row["came_s"], row["former_interval_s"] = now, interval_s
            row["former_hour"], row["former_day"] = row["seen_hour"], row["days"][hour % HOURS]
            row["seen_hour"], row["seen_round"] = hour, round_id
            row["days"][hour % HOURS] = hour // HOURS
            self._changed.add(index)
        return self._rows[index : index + 1]

    def given(self, device_id: str, round_id: int) -> None:
        """It was given an assignment."""
        index = self._index[device_id]
        row = self._rows[index]
        row["given_then"] = 1 + (row["given_then"] if row["given_in"] == round_id else 0)
        row["given_in"] = round_id
        row["open_turns"] += 1
        self._changed.add(index)

    def counted(self, device_id: str, round_id: int, latency_s: float | None) -> None:
        """Its report is in a committed round: what it lost before is forgiven."""
        index = self._index.get(device_id)
        if index is None:
            return
        row = self._rows[index]
        row["counted"] += 1
        row["open_turns"] = 0
        row["counted_in"] = round_id
        if latency_s is not None:
            known = None if np.isnan(row["latency_s"]) else float(row["latency_s"])
            row["latency_s"] = updated(known, latency_s)
        self._changed.add(index)

    # --- storing ---------------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """New rows, and changed old ones, since the last call, as the table has them."""
        changed, self._changed = sorted(self._changed), set()
        first_new, self._saved = self._saved, len(self._ids)
        new: list[dict[str, Any]] = []
        old: list[dict[str, Any]] = []
        for index in changed:
            (new if index >= first_new else old).append(self._stored(index))
        return new, old

    @classmethod
    def load(cls, stored: Iterable[Mapping[str, Any]]) -> DeviceHistory:
        """From the table's rows."""
        history = cls()
        for values in stored:
            target = history._rows[history._add(values["device_id"])]
            for name in SCALARS:
                target[name] = values[name]
            for name in REALS:
                target[name] = np.nan if values[name] is None else values[name]
            target["days"] = np.frombuffer(values["days"], "<i4")
        history._saved = len(history)
        return history

    def _stored(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {
            "device_id": self._ids[index],
            **{name: int(row[name]) for name in SCALARS},
            **{name: None if np.isnan(row[name]) else float(row[name]) for name in REALS},
            "days": row["days"].astype("<i4").tobytes(),
        }

    def _add(self, device_id: str) -> int:
        index = len(self._ids)
        if index == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros(index, _FIELDS)))
        row = self._rows[index]
        for name in ("given_in", "counted_in", "seen_hour", "seen_round", "former_hour", "former_day"):
            row[name] = NEVER
        row["days"] = NEVER
        for name in REALS:
            row[name] = np.nan
        self._ids.append(device_id)
        self._index[device_id] = index
        return index
