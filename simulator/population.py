"""Simulated devices: who they are, how fast they are, when they show up, and when they vanish.

Every figure is a function of (seed, device, session) and the device's profile, drawn by hashing: nothing is measured,
and nothing depends on the order of calls. That is what makes a run repeatable.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Final

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan

_NORMAL = NormalDist()
# Virtual time is kept in whole milliseconds, so that a libm that rounds the last bit of exp() differently on another
# machine does not change the order of events.
_TICKS_PER_S: Final = 1000


@dataclass(frozen=True)
class TierModel:
    """What the devices of one tier have in common.

    Attributes:
        share: Fraction of the population.
        memory_mb: Memory available to the app, MiB.
        cpu_cores: Number of cores.
        mflops: Sustained speed of training, million floating-point operations a second.
        bandwidth_mbit: Median network speed in either direction, Mbit/s.
        latency_s: Round-trip time of one request, seconds.
        startup_s: Time to wake the app and load the program, seconds.
    """

    share: float
    memory_mb: int
    cpu_cores: int
    mflops: float
    bandwidth_mbit: float
    latency_s: float
    startup_s: float


# Orders of magnitude of the three phone classes, not measurements of particular models; the specification fixes the
# tiers and their memory.
TIERS: Final[dict[DeviceTier, TierModel]] = {
    DeviceTier.HIGH_END: TierModel(0.2, 8192, 8, 2000.0, 50.0, 0.03, 1.0),
    DeviceTier.MID_RANGE: TierModel(0.5, 2048, 8, 600.0, 20.0, 0.06, 2.0),
    DeviceTier.LOW_END: TierModel(0.3, 512, 4, 150.0, 5.0, 0.15, 5.0),
}


@dataclass(frozen=True)
class Workload:
    """What one session costs, apart from the device.

    Attributes:
        flops_per_example: Floating-point operations of one example's forward and backward pass.
        bytes_down: Model and, the first time, program; bytes.
        bytes_up: The report, bytes.
        plan: The local training.
    """

    flops_per_example: float
    bytes_down: int
    bytes_up: int
    plan: TrainingPlan


@dataclass(frozen=True)
class Population:
    """A fleet of ``devices`` simulated devices.

    Attributes:
        seed: Fixes everything.
        devices: How many; they are numbered from 0.
        dropout: Probability that a session never reports.
        check_in_interval_s: Mean time between two offers of a device that is not training, virtual seconds.
        check_in_spread: How far a single such time may lie from the mean, as a fraction of it. Wide by default, so
            that who comes first after a commit is a fresh draw every round.
        jitter: Standard deviation of the log of a session's duration around its device's typical one.
        stragglers: Fraction of the devices that are slow for good, rounded to a whole number of devices.
        slowdown: How many times longer their sessions take.
    """

    seed: int
    devices: int
    dropout: float = 0.0
    check_in_interval_s: float = 60.0
    check_in_spread: float = 0.5
    jitter: float = 0.25
    stragglers: float = 0.0
    slowdown: float = 10.0
    _prefix: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefix", f"pocketfed-population-v1:{self.seed}:".encode())

    def _uniform(self, purpose: str, device: int, number: int = 0) -> float:
        """Uniform in (0, 1), a pure function of its arguments and the seed."""
        digest = hashlib.blake2b(self._prefix + f"{purpose}:{device}:{number}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") + 0.5) / 2**64

    @cached_property
    def slow_devices(self) -> frozenset[int]:
        """Which devices are stragglers: drawn from all tiers alike."""
        count = round(self.stragglers * self.devices)
        if not count:
            return frozenset()
        return frozenset(sorted(range(self.devices), key=lambda d: self._uniform("straggler", d))[:count])

    def tier(self, device: int) -> DeviceTier:
        """The device's tier, drawn with the shares of ``TIERS``."""
        u = self._uniform("tier", device)
        for tier, model in TIERS.items():
            if u < model.share:
                return tier
            u -= model.share
        return DeviceTier.LOW_END

    def profile(self, device: int) -> DeviceProfile:
        """What the device says about itself."""
        tier = self.tier(device)
        model = TIERS[tier]
        return DeviceProfile(f"sim-{device}", tier, model.memory_mb, model.cpu_cores)

    def identity(self, device: int) -> DeviceIdentity:
        """The device's key and id, derived from the seed.

        A *simulation identity*: anybody who knows the seed can compute it. Never enrol one on a production server;
        a real device draws its key from the operating system and keeps it.
        """
        return DeviceIdentity.from_private_bytes(
            hashlib.blake2b(self._prefix + f"simulation-identity:{device}".encode(), digest_size=32).digest()
        )

    def first_check_in_s(self, device: int) -> float:
        """When the device first offers itself, seconds after the start of the run."""
        return _to_ticks(self.check_in_interval_s * self._uniform("first-check-in", device))

    def pause_s(self, device: int, check_in: int) -> float:
        """Time from the device's ``check_in``-th offer (or its end) to the next one."""
        off = self.check_in_spread * (2 * self._uniform("pause", device, check_in) - 1)
        return _to_ticks(self.check_in_interval_s * (1 + off))

    def retry_fraction(self, device: int, check_in: int) -> float:
        """Where in a retry window of the server the device comes back, in (0, 1)."""
        return self._uniform("retry", device, check_in)

    def typical_duration_s(self, device: int, num_samples: int, work: Workload) -> float:
        """A session of this device without jitter: start-up, download, training, upload; seconds."""
        model = TIERS[self.tier(device)]
        # Devices of a tier differ among themselves, each by a fixed factor.
        speed = math.exp(0.3 * _NORMAL.inv_cdf(self._uniform("speed", device)))
        examples = num_samples * work.plan.local_epochs
        if work.plan.max_steps is not None:
            examples = min(examples, work.plan.max_steps * work.plan.batch_size)
        compute = examples * work.flops_per_example / (model.mflops * 1e6)
        network = 8 * (work.bytes_down + work.bytes_up) / (model.bandwidth_mbit * 1e6) + 3 * model.latency_s
        slowdown = self.slowdown if device in self.slow_devices else 1.0
        return slowdown * (model.startup_s + compute + network) / speed

    def duration_s(self, device: int, session: int, num_samples: int, work: Workload) -> float | None:
        """Virtual time from assignment to report of the device's ``session``-th session; None if it drops out.

        Args:
            device: Which device.
            session: How many assignments it had before this one.
            num_samples: Examples it holds.
            work: What a session costs.

        Returns:
            Seconds, at least one millisecond.
        """
        if self._uniform("dropout", device, session) < self.dropout:
            return None
        noise = math.exp(self.jitter * _NORMAL.inv_cdf(self._uniform("duration", device, session)))
        return max(_to_ticks(self.typical_duration_s(device, num_samples, work) * noise), 1 / _TICKS_PER_S)


def _to_ticks(seconds: float) -> float:
    return round(seconds * _TICKS_PER_S) / _TICKS_PER_S
