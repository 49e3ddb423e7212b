"""In virtual time a run's accepted sets depend on the seed, never on the real order of uploads."""

from __future__ import annotations

import heapq
import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.errors import ProtocolError
from server_ref.assignments import LIVE_STATES, AssignmentRecord, ReportFile, RoundPolicy
from server_ref.rounds import RoundEngine


class Run:
    """One run: durations and drop-outs come from ``seed``, the real moment of each upload from the other."""

    def __init__(self, policy: RoundPolicy, seed: int, real_order_seed: int) -> None:
        self.durations, self.real = random.Random(seed), random.Random(real_order_seed)
        self.engine = RoundEngine(policy, virtual_time=True)
        self.ids = (f"{i:032x}" for i in itertools.count())
        self.in_flight: list[AssignmentRecord] = []
        self.sets: list[list[int]] = []

    def upload(self, record: AssignmentRecord) -> None:
        self.in_flight.remove(record)
        try:
            self.engine.report(record, ReportFile(record.assignment_id, "0" * 64, 1, 0.0), 0.0)
        except ProtocolError:
            assert record.state not in LIVE_STATES, "only what is over may be refused"

    def close(self, now: float) -> None:
        while (closing := self.engine.closing(now)) is not None:
            self.sets.append([r.number for r in closing.counted])
            self.engine.commit(closing)

    def settle(self, now: float, device: str) -> None:
        """Upload some of what is in flight; what the device itself has, and all that a full buffer waits for."""
        for record in [r for r in self.in_flight if r.device_id == device]:
            self.upload(record)
        self.close(now)
        while self.in_flight and (self.engine.close_pending(now) or self.real.random() < 0.5):
            self.upload(self.real.choice(self.in_flight))
            self.close(now)

    def check_in(self, device: str, now: float) -> float:
        """Offer a device; the time of its next offer."""
        duration = self.durations.choice([None, *([self.durations.uniform(1.0, 50.0)] * 6)])
        found = self.engine.check_in(device, 10, now, lambda: next(self.ids), duration_s=duration)
        pause = self.durations.uniform(1.0, 10.0)
        if not isinstance(found, AssignmentRecord):
            return now + pause
        if found.arrival is not None:
            self.in_flight.append(found)
        return now + pause + (duration or self.engine.policy.lease_s)


def simulate(policy: RoundPolicy, seed: int, real_order_seed: int, devices: int = 12) -> list[list[int]]:
    run = Run(policy, seed, real_order_seed)
    events = [(float(i), i, f"device{i}") for i in range(devices)]
    for step in itertools.count(devices):
        now, _, device = heapq.heappop(events)
        run.settle(now, device)
        if run.engine.finished or step > 3000:
            return run.sets
        assert not run.engine.close_pending(now)
        heapq.heappush(events, (run.check_in(device, now), step, device))
    raise AssertionError("unreachable")


POLICIES = st.one_of(
    st.builds(
        lambda k, extra, rounds: RoundPolicy(k, k + extra, k + extra, 0, 60.0, 100, rounds),
        st.integers(1, 5),
        st.integers(0, 3),
        st.integers(1, 6),
    ),
    st.builds(
        lambda k, c, stale, rounds: RoundPolicy(k, c, 1, stale, 60.0, 100, rounds),
        st.integers(1, 4),
        st.integers(1, 8),
        st.integers(1, 4),
        st.integers(1, 10),
    ),
)


@given(policy=POLICIES, seed=st.integers(0, 2**32), orders=st.lists(st.integers(0, 2**32), min_size=2, max_size=3))
def test_accepted_sets_do_not_depend_on_the_real_order(policy, seed, orders):
    runs = [simulate(policy, seed, order) for order in orders]
    assert all(run == runs[0] for run in runs)


@given(policy=POLICIES, seed=st.integers(0, 2**32))
def test_every_buffer_is_full_and_counts_no_report_twice(policy, seed):
    sets = simulate(policy, seed, seed + 1)
    assert all(len(numbers) == policy.buffer_size for numbers in sets)
    counted = [n for numbers in sets for n in numbers]
    assert len(counted) == len(set(counted))
