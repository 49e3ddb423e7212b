"""What a device works with: the server, its disk, its data, its clock, and what the app allows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from client_sdk import events
from client_sdk.checkpoint import CheckpointManager, data_fingerprint
from client_sdk.data import Examples
from client_sdk.footprint import BASELINE_BYTES
from client_sdk.planner import MEMORY_FRACTION
from client_sdk.power import PowerMonitor
from client_sdk.privacy import LocalPrivacy
from client_sdk.programs import ProgramProvider
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.store import DeviceStore
from client_sdk.transport import Transport
from client_sdk.trust import TrustedAggregators

MAX_BLOB_BYTES = 256 * 2**20

OnEvent = Callable[[events.Event], None]


@dataclass
class Surroundings:
    """What a device works with.

    Attributes:
        transport: The server.
        store: Durable state.
        programs: Where the programs of assignments come from.
        data: The device's examples.
        profile: Who the device is and what it can spend.
        clock: Seconds that go on across restarts; leases and pauses are noted in them.
        monotonic: Seconds that nobody sets back; training and rests are timed in them.
        wait: Waits some seconds or until the event is set.
        on_event: Told about everything in ``client_sdk.events``.
        conditions: The app's own reason why the device may not work now, or None.
        power: Whether battery, heat, network and user allow it to work; None for always.
        checkpoints: Where training under way is kept; None keeps nothing.
        memory_fraction: Part of the profile's memory that training is planned for.
        baseline_bytes: What the process takes without the task and its examples.
        memory_limit_bytes: What the process may use at most, measured while it trains; None for no limit.
        max_blob_bytes: Largest program or model that is downloaded.
        trusted: Those it sends shares to, and nothing to anyone else; None for whomever the server names.
        local_privacy: Noise of its own on each report; None for none.
    """

    transport: Transport
    store: DeviceStore
    programs: ProgramProvider
    data: Examples
    profile: DeviceProfile
    clock: Callable[[], float]
    monotonic: Callable[[], float]
    wait: Callable[[float, threading.Event], None]
    on_event: OnEvent
    conditions: Callable[[], str | None] = field(default=lambda: None)
    power: PowerMonitor | None = None
    checkpoints: CheckpointManager | None = None
    memory_fraction: float = MEMORY_FRACTION
    baseline_bytes: int = BASELINE_BYTES["native"]
    memory_limit_bytes: int | None = None
    max_blob_bytes: int = MAX_BLOB_BYTES
    trusted: TrustedAggregators | None = None
    local_privacy: LocalPrivacy | None = None
    _data_sha256: str | None = field(default=None, repr=False)

    def data_sha256(self) -> str:
        """Fingerprint of the data, computed once: it does not change while a client lives."""
        if self._data_sha256 is None:
            self._data_sha256 = data_fingerprint(*self.data)
        return self._data_sha256
