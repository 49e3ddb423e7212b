"""Who of the devices that offer themselves gets a slot: ``selection`` at the server's check-in.

Devices come by themselves, so the server chooses among those that it expects, and admits who is chosen when it comes:
as many as work at once, and twice as many each time that the round has waited ``patience_s`` without being full. That
must be no less than the time within which devices come again: else the round asks everybody before those have come
whose turn it is, and whoever comes first is given work. Where it is not set it is that time, as observed. Asking more
often changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.profile import DeviceTier
from server_ref.assignments import AssignmentRecord
from server_ref.config import TaskConfig
from server_ref.rounds import RoundEngine
from server_ref.selection.history import SECONDS_PER_HOUR, DeviceHistory
from server_ref.selection.latency import MIN_LATENCY_S
from server_ref.selection.policy import Candidates, Choice, SelectionPolicy, choose
from server_ref.selection.speed import TIER_CODES, SpeedScale
from server_ref.selection.strata import DeviceFacts, Strata
from server_ref.selection.ties import KeyedTies

_MOST_DOUBLINGS: Final = 40


class AtCheckIn:
    """The selection of a task, and its limit of participations.

    Guarantees: with equal keys and histories, any two instances decide alike, also where one began in the middle of a
    round. Every device that comes again is admitted in the end, as long as a round has a free place: its rank rises
    while others take theirs, and who is admitted widens while a round waits.

    Args:
        config: The task's settings.
        history: What is remembered of devices; None where everybody is admitted.
        ties: Decides between equals.
        participations: Rounds that counted each device so far; needed only if there is a limit of them.
    """

    def __init__(
        self,
        config: TaskConfig,
        history: DeviceHistory | None,
        ties: KeyedTies,
        participations: Mapping[str, int] | None = None,
    ) -> None:
        settings = config.selection
        self._policy = None if history is None else SelectionPolicy.parse(settings.policy)
        self._history = DeviceHistory() if history is None else history
        self._ties = ties
        self._floor = settings.floor
        self._target = config.concurrency or config.buffer_size
        self._patience_s = settings.patience_s
        self._least_patience_s = max(config.retry_max_s, config.lease_s / 10)
        self._limit = config.privacy.max_participations
        self._participations = Counter(participations)
        self._strata = Strata()
        self._pool: _Pool | None = None

    @classmethod
    def simulated(cls, config: TaskConfig, task_id: str) -> AtCheckIn:
        """In memory, and repeatable: only for simulated devices."""
        history = None if config.selection.policy == "any" else DeviceHistory()
        return cls(config, history, KeyedTies(simulation_key(config.seed), task_id))

    def admits(
        self, device_id: str, engine: RoundEngine, now: float, *, num_samples: int = 1, tier: str = "mid_range"
    ) -> bool:
        """Whether a device that offers itself now may have a slot; one that holds an assignment keeps it."""
        if engine.holds(device_id):
            return True
        # A device holds one assignment at a time, so that this one's is the only report that does not count yet.
        if self._limit is not None and self._participations[device_id] >= self._limit:
            return False
        if self._policy is None:
            return True
        pool = self._expected(engine.version, int(now // SECONDS_PER_HOUR))
        facts = DeviceFacts(DeviceTier(tier), num_samples)
        row = self._history.offered(
            device_id,
            round_id=pool.round_id,
            now=now,
            joined_turns=pool.typical_turns,
            tier=TIER_CODES[facts.tier],
            stratum=self._strata.code(facts),
        )
        waited = max(0.0, now - engine.opened_at)
        patience_s = self._patience_s or max(self._least_patience_s, pool.interval_s)
        doublings = min(int(waited // patience_s), _MOST_DOUBLINGS)
        choice = pool.choice(self._policy, self._target << doublings, self._floor, self._ties.fraction(pool.round_id))
        return choice.admits(self._asking(device_id, row, pool))

    def given(self, device_id: str, round_id: int) -> None:
        """An admitted device was given an assignment."""
        if self._policy is not None:
            self._history.given(device_id, round_id)

    def record(self, counted: Sequence[AssignmentRecord]) -> None:
        """A buffer was committed; ``remember`` has told the history."""
        if self._limit is not None:
            self._participations.update(r.device_id for r in counted)

    def remember(self, counted: Sequence[AssignmentRecord], round_id: int) -> None:
        """Tell the history what is being committed; where it is stored, in the same transaction."""
        if self._policy is not None:
            remember(self._history, counted, round_id)

    def _expected(self, round_id: int, hour: int) -> _Pool:
        if self._pool is None or (self._pool.round_id, self._pool.hour) != (round_id, hour):
            self._pool = _Pool(self._history, self._ties, round_id, hour, self._limit)
        return self._pool

    def _asking(self, device_id: str, row: npt.NDArray[np.void], pool: _Pool) -> Candidates:
        """As it is now: who lost an assignment in this very round stands one turn lower already."""
        lost, latency = row["open_turns"], row["latency_s"]
        return Candidates(
            turns=row["joined_turns"] + row["counted"] + lost,
            last=row["counted_in"],
            ties=self._ties.places(pool.round_id, [device_id]),
            speed=pool.scale.classes(latency, row["tier"], lost),
            measured=np.isfinite(latency),
            stratum=row["stratum"],
        )


class _Pool:
    """The devices that are expected in an hour of a round, as the round began, and who of them is chosen."""

    def __init__(self, history: DeviceHistory, ties: KeyedTies, round_id: int, hour: int, limit: int | None) -> None:
        self.round_id, self.hour = round_id, hour
        expected = history.expected(round_id, hour)
        rows = history.rows
        if limit is not None:
            expected &= rows["counted"] < limit
        which = np.flatnonzero(expected)
        self.interval_s = history.interval_s(which, hour)
        rows = rows[which]
        turns, lost = history.turns(round_id)[which], history.lost(round_id)[which]
        self.scale = SpeedScale.of(rows["latency_s"], rows["tier"])
        # A newcomer has its place among the typical ones: it need not catch up with what was before its time.
        self.typical_turns = int(np.quantile(turns, 0.5, method="higher")) if len(turns) else 0
        self._candidates = Candidates(
            turns=turns,
            last=rows["counted_in"],
            ties=ties.places(round_id, (history.ids[index] for index in which)),
            speed=self.scale.classes(rows["latency_s"], rows["tier"], lost),
            measured=np.isfinite(rows["latency_s"]),
            stratum=rows["stratum"].copy(),
        )
        self._target = -1
        self._choice: Choice

    def choice(self, policy: SelectionPolicy, target: int, floor: float, fraction: float) -> Choice:
        """Who is chosen where so many are wanted."""
        if target != self._target:
            self._target = target
            self._choice = choose(
                policy, self._candidates, target, floor=floor, round_id=self.round_id, fraction=fraction
            )
        return self._choice


def remember(history: DeviceHistory, counted: Sequence[AssignmentRecord], round_id: int) -> None:
    """Reports that a round counts."""
    for record in counted:
        latency = None if record.arrival is None else max(MIN_LATENCY_S, record.arrival - record.issued_at)
        history.counted(record.device_id, round_id, latency)


def simulation_key(seed: int) -> bytes:
    """A key that anybody can compute: for simulated devices, which try nothing."""
    return hashlib.sha256(f"pocketfed-simulated-selection:{seed}".encode("ascii")).digest()
