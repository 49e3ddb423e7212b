"""Which of the devices that could be asked are asked: the three orders, as pure functions of arrays.

Used twice: ``ServerDeviceSelector`` picks from a list; a server whose devices come by themselves picks from those it
expects and admits whoever stands no lower than the last one picked. So a choice is a set of *lines*, each the rank of
the last device that it takes, and a device that nobody expected is judged by the same lines.

The orders (earlier is sooner):
    turns: fewest turns, then whose last report is longest ago, then the round's keyed order.
    speed: speed class, measured before merely claimed, then as by turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError
from server_ref.selection.errors import UnknownStrategy
from server_ref.selection.ties import UInt64Array

SLOWEST_CLASS: Final = 62

Int64Array = npt.NDArray[np.int64]
Rank = tuple[int, ...]


class SelectionPolicy(StrEnum):
    """What a device's turn depends on."""

    FAIR = "fair"
    """How often it had one: the fewest first."""

    FAST = "fast"
    """How long its reports take, but for the floor, which goes by turns."""

    DIVERSE = "diverse"
    """What kind of device it is: each kind by its size, but for the floor, which all kinds get alike."""

    @classmethod
    def parse(cls, name: str) -> SelectionPolicy:
        """The policy of this name.

        Raises:
            UnknownStrategy: There is none.
        """
        try:
            return cls(name)
        except ValueError:
            raise UnknownStrategy(
                f"unknown selection strategy {name!r}; there are {', '.join(policy.value for policy in cls)}"
            ) from None


@dataclass(frozen=True)
class Candidates:
    """Devices to choose from, one per row; arrays of equal length.

    Attributes:
        turns: How often each was asked, as its policy counts; int64.
        last: Round of its last report, lower is longer ago; int64.
        ties: Its place in the round's keyed order; uint64.
        speed: Speed class, 0 the fastest; int64.
        measured: Whether that was measured rather than claimed; bool.
        stratum: Number of its kind; int64.
    """

    turns: Int64Array
    last: Int64Array
    ties: UInt64Array
    speed: Int64Array
    measured: npt.NDArray[np.bool_]
    stratum: Int64Array

    def __len__(self) -> int:
        return len(self.turns)

    def by_turns(self, row: int) -> Rank:
        """The rank of a row in the order of turns."""
        return int(self.turns[row]), int(self.last[row]), int(self.ties[row])

    def by_speed(self, row: int) -> Rank:
        """The rank of a row in the order of speed."""
        return int(self.speed[row]), int(not self.measured[row]), *self.by_turns(row)


@dataclass(frozen=True)
class Choice:
    """Who is asked.

    Attributes:
        rows: The chosen rows, in the order in which they were taken.
        everybody: All are asked: there are no more than are needed.
        turns_line: Rank by turns of the last one taken by it; None: nobody was.
        speed_line: Rank by speed of the last one taken by it; None: nobody was.
        stratum_lines: For each kind that there is, the rank by turns of its last one; None: none of it was taken.
    """

    rows: Int64Array
    everybody: bool = False
    turns_line: Rank | None = None
    speed_line: Rank | None = None
    stratum_lines: Mapping[int, Rank | None] | None = None

    def admits(self, device: Candidates) -> bool:
        """Whether the one row of ``device`` stands no lower than the last one chosen; a new kind is welcome."""
        if self.everybody:
            return True
        if self.stratum_lines is not None:
            stratum = int(device.stratum[0])
            if stratum not in self.stratum_lines:
                return True
            line = self.stratum_lines[stratum]
            return line is not None and device.by_turns(0) <= line
        if self.turns_line is not None and device.by_turns(0) <= self.turns_line:
            return True
        return self.speed_line is not None and device.by_speed(0) <= self.speed_line


def choose(
    policy: SelectionPolicy, candidates: Candidates, target: int, *, floor: float, round_id: int, fraction: float
) -> Choice:
    """Choose ``target`` devices.

    Args:
        policy: By what.
        candidates: From whom; equal sets give equal choices, in any order of rows.
        target: How many; all if there are fewer.
        floor: ``fast``: the share of places that goes by turns alone; ``diverse``: that all kinds get alike.
        round_id: Spreads shares that are no whole numbers of places over the rounds.
        fraction: In [0, 1), fresh each round: which kinds get the places that cannot be divided.

    Returns:
        The choice. ``fair``: the first by turns. ``fast``: the floor's places by turns, the others by speed, so that
        a device waits at most for the devices with no more turns, whatever its speed. ``diverse``: places for each
        kind, within it by turns.
    """
    if target <= 0:
        return Choice(np.zeros(0, np.int64))
    by_turns = np.lexsort((candidates.ties, candidates.last, candidates.turns)).astype(np.int64)
    if target >= len(candidates):
        return Choice(by_turns, everybody=True)
    match policy:
        case SelectionPolicy.FAIR:
            rows = by_turns[:target]
            return Choice(rows, turns_line=candidates.by_turns(rows[-1]))
        case SelectionPolicy.FAST:
            return _fast(candidates, by_turns, target, _share(floor, target, round_id))
        case SelectionPolicy.DIVERSE:
            return _diverse(candidates, by_turns, target, floor, fraction)


def _share(floor: float, target: int, round_id: int) -> int:
    """Whole places of a share: over any rounds in a row ``floor * target`` of each, to less than one in all."""
    return math.floor((round_id + 1) * floor * target) - math.floor(round_id * floor * target)


def _fast(candidates: Candidates, by_turns: Int64Array, target: int, guaranteed: int) -> Choice:
    rows, rest = by_turns[:guaranteed], by_turns[guaranteed:]
    left = np.ones(len(candidates), np.bool_)
    left[rows] = False
    by_speed = np.lexsort(
        (candidates.ties, candidates.last, candidates.turns, ~candidates.measured, candidates.speed)
    ).astype(np.int64)
    fast = by_speed[left[by_speed]][: min(target - guaranteed, len(rest))]
    return Choice(
        np.concatenate((rows, fast)),
        turns_line=candidates.by_turns(rows[-1]) if len(rows) else None,
        speed_line=candidates.by_speed(fast[-1]) if len(fast) else None,
    )


def _diverse(candidates: Candidates, by_turns: Int64Array, target: int, floor: float, fraction: float) -> Choice:
    strata, codes, sizes = np.unique(candidates.stratum[by_turns], return_inverse=True, return_counts=True)
    wanted = target * ((1 - floor) * sizes / len(candidates) + floor / len(strata))
    # Systematic sampling: each kind gets its share rounded up or down, and exactly its share on average.
    ends = np.floor(np.cumsum(wanted) + fraction)
    ends[-1] = target + math.floor(fraction)
    places = np.minimum(np.diff(ends, prepend=math.floor(fraction)).astype(np.int64), sizes)
    # A row's position among its kind, in the order of turns.
    order = np.argsort(codes, kind="stable")
    firsts = np.cumsum(sizes) - sizes
    position = np.empty(len(by_turns), np.int64)
    position[order] = np.arange(len(by_turns)) - np.repeat(firsts, sizes)
    taken = position < places[codes]
    # Places that a small kind could not fill go to whoever is next.
    spare = np.flatnonzero(~taken)[: target - int(taken.sum())]
    taken[spare] = True
    rows = by_turns[taken]
    lines: dict[int, Rank | None] = dict.fromkeys(map(int, strata))
    for row in rows:
        lines[int(candidates.stratum[row])] = candidates.by_turns(row)
    return Choice(rows, stratum_lines=lines)


def check_share(floor: float) -> float:
    """A floor that can be promised.

    Raises:
        ConfigurationError: Outside (0, 1].
    """
    if not 0 < floor <= 1:
        raise ConfigurationError(
            f"floor={floor} must lie above 0, up to 1: without one, slow or rare devices might never be asked"
        )
    return floor
