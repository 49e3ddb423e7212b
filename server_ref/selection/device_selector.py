"""``ServerDeviceSelector``: picks the devices of the next round from a list of those available."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from server_ref.selection.latency import checked_latency
from server_ref.selection.policy import Candidates, SelectionPolicy, check_share, choose
from server_ref.selection.speed import TIER_CODES, SpeedScale, updated
from server_ref.selection.strata import DeviceFacts, Strata
from server_ref.selection.ties import KeyedTies

NEVER: Final = -1
"""Round of a device's last selection, if there was none."""


@dataclass(frozen=True)
class DeviceRecord:
    """What is remembered of a device.

    Attributes:
        device_id: Whose.
        count: Selections that were not lost.
        lost: Selections lost since the last one that was not.
        last: Round of the latest selection.
        latency_s: Mean of its latest latencies; None: never measured.
    """

    device_id: str
    count: int = 0
    lost: int = 0
    last: int = NEVER
    latency_s: float | None = None


class ServerDeviceSelector:
    """Server-side device selection for the next training round.

    Guarantees:
        The choice is a function of the key, the task, the round's number, what was recorded, and the *set* of
        available devices: the same in every replica, in any order of the list, and after a restart by ``restore``.
        No id can be made that stands early in it without the key.
        ``fair``: counts of devices that are always available differ by one at most.
        ``fast``: as many places as ``floor`` says go by turns, so that nobody waits forever, however slow.
        ``diverse``: each kind of device has its share of the places on average, and ``floor`` of them are shared alike.
        Memory: O(devices ever selected or measured). Time: O(n log n), a few microseconds a device and round.

    Args:
        selection_strategy: ``fair``, ``fast`` or ``diverse``.
        key: The server's secret, equal in all replicas; None: a fresh one, for a single process.
        task: Sets tasks apart that share a key.
        floor: Share of the places that ``fast`` and ``diverse`` do not decide, above 0 up to 1.
        strata: The labels of kinds that ``diverse`` tells apart; others count as none.

    Raises:
        UnknownStrategy: None of the three; it is a ``ValueError``.
        ConfigurationError: An impossible key or floor.

    Example:
        >>> selector = ServerDeviceSelector("fair", key=b"sixteen bytes or more")
        >>> rounds = [selector.select_devices(["a", "b", "c", "d"], 2, {}) for _ in range(2)]
        >>> sorted(rounds[0] + rounds[1])
        ['a', 'b', 'c', 'd']
        >>> selector.participation_counts == dict.fromkeys("abcd", 1)
        True
    """

    def __init__(
        self,
        selection_strategy: str = "fair",
        *,
        key: bytes | None = None,
        task: str = "",
        floor: float = 0.2,
        strata: Sequence[str] = (),
    ) -> None:
        self._policy = SelectionPolicy.parse(selection_strategy)
        self._floor = check_share(floor)
        self._ties = KeyedTies(secrets.token_bytes(32) if key is None else key, task)
        self._strata = Strata(strata)
        self._records: dict[str, DeviceRecord] = {}
        self._round = 0

    def __repr__(self) -> str:
        return f"ServerDeviceSelector({self.selection_strategy!r}, <key>, round={self._round})"

    @property
    def selection_strategy(self) -> str:
        """Its name."""
        return self._policy.value

    @property
    def round_id(self) -> int:
        """Number of the next round: rounds that were selected for so far."""
        return self._round

    @property
    def participation_counts(self) -> dict[str, int]:
        """How often each device was selected and did not lose its assignment."""
        return {device: record.count for device, record in self._records.items()}

    @property
    def records(self) -> tuple[DeviceRecord, ...]:
        """All that is remembered of devices; with ``round_id`` it is the state that ``restore`` takes."""
        return tuple(self._records.values())

    def restore(self, records: Iterable[DeviceRecord], round_id: int) -> None:
        """Take over the state of another instance, in place of this one's.

        Raises:
            ConfigurationError: A negative round, or a device twice; nothing is changed.
        """
        given = tuple(records)
        found = {record.device_id: record for record in given}
        if round_id < 0 or len(found) < len(given):
            raise ConfigurationError("records are of one device each, and rounds are numbered from 0")
        self._records, self._round = found, round_id

    def select_devices(
        self,
        available_devices: Iterable[str],
        target_num_devices: int,
        device_profiles: Mapping[str, DeviceProfile | DeviceFacts],
    ) -> list[str]:
        """Select devices for the next training round, and count them as having taken part.

        Args:
            available_devices: Ids; any strings, one that is there twice counts once.
            target_num_devices: How many are wanted; all available ones if there are fewer.
            device_profiles: What is known of devices; those without an entry count as of the middle tier.

        Returns:
            Distinct available devices, in the order in which they were chosen.

        Raises:
            ConfigurationError: A negative target, or an id that is not a string; nothing is counted.
        """
        if target_num_devices < 0:
            raise ConfigurationError(f"target_num_devices={target_num_devices} is no number of devices")
        devices = list(dict.fromkeys(available_devices))
        if not all(isinstance(device, str) for device in devices):
            raise ConfigurationError("device ids are strings")
        choice = choose(
            self._policy,
            self._candidates(devices, device_profiles),
            target_num_devices,
            floor=self._floor,
            round_id=self._round,
            fraction=self._ties.fraction(self._round),
        )
        selected = [devices[row] for row in choice.rows]
        for device in selected:
            record = self._of(device)
            self._records[device] = DeviceRecord(device, record.count + 1, record.lost, self._round, record.latency_s)
        self._round += 1
        return selected

    def record_latency(self, device_id: str, latency_s: float) -> None:
        """A selected device has reported, so long after it was asked: its earlier losses are forgiven.

        Raises:
            ConfigurationError: A latency that is negative or not finite; nothing is recorded.
        """
        record = self._of(device_id)
        mean = updated(record.latency_s, checked_latency(latency_s))
        self._records[device_id] = DeviceRecord(device_id, record.count, 0, record.last, mean)

    def record_lost(self, device_id: str) -> None:
        """A selected device has not reported.

        It is not counted as having taken part, but it had its turn until it reports: one that never does is asked no
        more often than the others.

        Raises:
            ConfigurationError: It was not selected.
        """
        record = self._of(device_id)
        if record.count == 0:
            raise ConfigurationError("a device that was not selected has nothing to lose")
        self._records[device_id] = DeviceRecord(
            device_id, record.count - 1, record.lost + 1, record.last, record.latency_s
        )

    def _of(self, device: str) -> DeviceRecord:
        return self._records.get(device) or DeviceRecord(device)

    def _candidates(self, devices: list[str], profiles: Mapping[str, DeviceProfile | DeviceFacts]) -> Candidates:
        n = len(devices)
        records = [self._of(device) for device in devices]
        facts = [DeviceFacts.of(profiles.get(device)) for device in devices]
        lost = np.fromiter((r.lost for r in records), np.int64, n)
        latency = np.fromiter((np.nan if r.latency_s is None else r.latency_s for r in records), np.float64, n)
        tier = np.fromiter((TIER_CODES[DeviceTier(f.tier)] for f in facts), np.int64, n)
        return Candidates(
            turns=np.fromiter((r.count for r in records), np.int64, n) + lost,
            last=np.fromiter((r.last for r in records), np.int64, n),
            ties=self._ties.places(self._round, devices),
            speed=SpeedScale.of(latency, tier).classes(latency, tier, lost),
            measured=np.isfinite(latency),
            stratum=np.fromiter(map(self._strata.code, facts), np.int64, n),
        )
