"""Simulated devices: who they are, how fast they are, when they show up, and when they vanish.

Every figure is a function of (seed, device, session) and the device's profile, drawn by hashing: nothing is measured,
and nothing depends on the order of calls. That is what makes a run repeatable.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Final

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.meta_learning import MetaPlan
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan
from simulator.profiles import FleetProfiles, Profile, read_profiles

_NORMAL = NormalDist()
# Virtual time is kept in whole milliseconds, so that a libm that rounds the last bit of exp() differently on another
# machine does not change the order of events.
_TICKS_PER_S: Final = 1000


def examples_trained(plan: TrainingPlan, num_samples: int) -> int:
    """Examples that a session of such training takes in, each as often as it is seen."""
    if plan.meta is not None:
        return _examples_of_meta(plan, plan.meta, num_samples)
    examples = num_samples * plan.local_epochs
    return examples if plan.max_steps is None else min(examples, plan.max_steps * plan.batch_size)


def _examples_of_meta(plan: TrainingPlan, meta: MetaPlan, num_samples: int) -> int:
    """Of examples that are all different; of others the judging part may be a little smaller or larger."""

    def stream(examples: int, batches: int) -> int:
        """Epoch after epoch, the last batch of each being the rest."""
        epochs, more = divmod(batches, math.ceil(examples / plan.batch_size))
        return epochs * examples + min(more * plan.batch_size, examples)

    if plan.algorithm == "reptile":
        return stream(num_samples, meta.inner_steps)
    query = max(1, min(round(meta.query_fraction * num_samples), num_samples - 1))
    support = max(1, num_samples - query)
    if plan.algorithm == "per-fedavg":
        return 2 * stream(support, meta.inner_steps) + stream(query, meta.inner_steps)
    return stream(support, meta.inner_steps) + min(query, meta.query_batches * plan.batch_size)


@dataclass(frozen=True)
class Workload:
    """What one session costs, apart from the device.

    Attributes:
        flops_per_example: Floating-point operations of one example's forward and backward pass.
        bytes_down: Model and, the first time, program; bytes.
        bytes_up: The report, bytes.
        plan: The local training.
        flops_per_session: Of a whole session, where its steps are counted and not its examples.
    """

    flops_per_example: float
    bytes_down: int
    bytes_up: int
    plan: TrainingPlan
    flops_per_session: float | None = None

    def flops(self, num_samples: int) -> float:
        """Floating-point operations of a session on so many examples."""
        if self.flops_per_session is not None:
            return self.flops_per_session
        return examples_trained(self.plan, num_samples) * self.flops_per_example


@dataclass(frozen=True)
class Phases:
    """What a session spends its time on, seconds."""

    startup_s: float
    download_s: float
    training_s: float
    upload_s: float

    @property
    def total_s(self) -> float:
        """From assignment to report."""
        return self.startup_s + self.download_s + self.training_s + self.upload_s


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
        profiles: What the devices are like.
    """

    seed: int
    devices: int
    dropout: float = 0.0
    check_in_interval_s: float = 60.0
    check_in_spread: float = 0.5
    jitter: float = 0.25
    stragglers: float = 0.0
    slowdown: float = 10.0
    profiles: FleetProfiles = field(default_factory=functools.partial(read_profiles, "steady"))
    _prefix: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefix", f"pocketfed-population-v1:{self.seed}:".encode())

    def uniform(self, purpose: str, device: int, number: int = 0) -> float:
        """Uniform in (0, 1), a pure function of its arguments and the seed."""
        digest = hashlib.blake2b(self._prefix + f"{purpose}:{device}:{number}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") + 0.5) / 2**64

    def normal(self, purpose: str, device: int, number: int = 0) -> float:
        """Standard normal, likewise."""
        return _NORMAL.inv_cdf(self.uniform(purpose, device, number))

    @cached_property
    def slow_devices(self) -> frozenset[int]:
        """Which devices are stragglers: drawn from all tiers alike."""
        count = round(self.stragglers * self.devices)
        if not count:
            return frozenset()
        return frozenset(sorted(range(self.devices), key=lambda d: self.uniform("straggler", d))[:count])

    def kind(self, device: int) -> Profile:
        """The profile that the device has, drawn with the profiles' shares."""
        u = self.uniform("tier", device)
        for profile in self.profiles.profile:
            if u < profile.share:
                return profile
            u -= profile.share
        return self.profiles.profile[-1]

    def tier(self, device: int) -> DeviceTier:
        """The device's tier."""
        return self.kind(device).tier

    def profile(self, device: int) -> DeviceProfile:
        """What the device says about itself."""
        kind = self.kind(device)
        return DeviceProfile(f"sim-{device}", kind.tier, kind.memory_mb, kind.cpu_cores)

    def clock_error(self, device: int) -> tuple[float, float]:
        """How wrong the device's clock is: seconds at the start of the run, and seconds more in every second."""
        error = self.kind(device).clock
        if error is None:
            return 0.0, 0.0
        return (
            error.offset_s * self.normal("clock-offset", device),
            error.skew_ppm * 1e-6 * self.normal("clock-skew", device),
        )

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
        return _to_ticks(self.check_in_interval_s * self.uniform("first-check-in", device))

    def pause_s(self, device: int, check_in: int) -> float:
        """Time from the device's ``check_in``-th offer (or its end) to the next one."""
        off = self.check_in_spread * (2 * self.uniform("pause", device, check_in) - 1)
        return _to_ticks(self.check_in_interval_s * (1 + off))

    def retry_fraction(self, device: int, check_in: int) -> float:
        """Where in a retry window of the server the device comes back, in (0, 1)."""
        return self.uniform("retry", device, check_in)

    def typical_phases(self, device: int, num_samples: int, work: Workload) -> Phases:
        """A session of this device without jitter."""
        kind = self.kind(device)
        # Devices of a kind differ among themselves, each by a fixed factor.
        speed = math.exp(kind.speed_spread * self.normal("speed", device))
        slower = (self.slowdown if device in self.slow_devices else 1.0) / speed
        up = 8 * work.bytes_up / (kind.upload_mbit * 1e6)
        down = 8 * work.bytes_down / (kind.download_mbit * 1e6)
        return Phases(
            startup_s=slower * kind.startup_s,
            download_s=slower * (down + 2 * kind.latency_s),
            training_s=slower * (work.flops(num_samples) / (kind.mflops * 1e6)),
            upload_s=slower * (up + kind.latency_s),
        )

    def typical_duration_s(self, device: int, num_samples: int, work: Workload) -> float:
        """The same in all, seconds."""
        return self.typical_phases(device, num_samples, work).total_s

    def jitter_of(self, device: int, session: int) -> float:
        """By what a session takes longer than usual."""
        return math.exp(self.jitter * self.normal("duration", device, session))

    def vanishes(self, device: int, session: int) -> bool:
        """Whether the device drops out of a session, by the coin that is the same for all."""
        return self.uniform("dropout", device, session) < self.dropout

    def duration_s(self, device: int, session: int, num_samples: int, work: Workload) -> float | None:
        """Virtual time from assignment to report of the device's ``session``-th session; None if it drops out.

        Of a device whose conditions never change; ``traces`` plays the others.

        Args:
            device: Which device.
            session: How many assignments it had before this one.
            num_samples: Examples it holds.
            work: What a session costs.

        Returns:
            Seconds, at least one millisecond.
        """
        if self.vanishes(device, session):
            return None
        return whole_ticks(self.typical_duration_s(device, num_samples, work) * self.jitter_of(device, session))


def whole_ticks(seconds: float) -> float:
    """A duration in whole milliseconds, at least one."""
    return max(_to_ticks(seconds), 1 / _TICKS_PER_S)


def _to_ticks(seconds: float) -> float:
    return round(seconds * _TICKS_PER_S) / _TICKS_PER_S
