"""Follows a run: keeps its sessions, asks the server for its rounds, and tells a display how far it is."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from client_sdk.protocol.errors import ConfigurationError, StaleReport
from client_sdk.protocol.profile import DeviceTier
from server_ref.selection import selection_ratio
from simulator.journal import Journal
from simulator.population import Population
from simulator.results import RoundResult, TierResult
from simulator.sessions import Outcome, Session, counted_sessions
from simulator.view import CommittedRound

_RECENT_ROUNDS: Final = 5


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        rounds: Committed so far.
        of_rounds: In all.
        reports: Delivered for the open round.
        cohort: Needed for it.
        latest: The newest round whose validation figures are known.
        bytes_up: Sent by the devices so far.
        bytes_down: Received by them.
        saved: Share of the counted updates' bytes as float32 that was not sent; None where nothing was saved.
        sessions: Delivered so far.
        clients_per_s: Of late, in this process.
        eta_s: Seconds left, None while nobody can know.
    """

    rounds: int
    of_rounds: int
    reports: int
    cohort: int
    latest: CommittedRound | None
    bytes_up: int
    bytes_down: int
    saved: float | None
    sessions: int
    clients_per_s: float
    eta_s: float | None


class Display(Protocol):
    """Shows a run's progress."""

    def show(self, standing: Standing) -> None:
        """Something happened."""
        ...

    def round_done(self, committed: CommittedRound, standing: Standing) -> None:
        """A round is committed and scored; called once a round, in order."""
        ...


class RunMonitor:
    """Implements ``fleet.FleetObserver``.

    Attributes:
        sessions: All sessions so far, in order of assignment.
        delivered: Sessions that this process delivered itself (not those it replayed).
    """

    def __init__(
        self,
        read_rounds: Callable[[int], list[CommittedRound]],
        journal: Journal,
        display: Display,
        *,
        of_rounds: int,
        cohort: int,
        dense_report_bytes: int = 0,
        first_version: int = 0,
        scored: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to follow.

        Args:
            read_rounds: The server's committed rounds from a number on.
            journal: Wall-clock times of rounds; told about new ones.
            display: Is told how far the run is.
            of_rounds: Rounds of the run.
            cohort: Reports per round.
            dense_report_bytes: What one update would take as float32.
            first_version: Model version that the run began with (a foreign server may have had rounds before).
            scored: Whether the server evaluates its models.
            clock: Seconds.
        """
        self.sessions: list[Session] = []
        self.delivered = 0
        self._read_rounds = read_rounds
        self._journal = journal
        self._display = display
        self._of_rounds = of_rounds
        self._cohort = cohort
        self._dense_bytes = dense_report_bytes
        self._first = first_version
        self._scored = scored
        self._clock = clock
        self._known: dict[int, CommittedRound] = {}
        self._latest: CommittedRound | None = None
        self._version = first_version
        self._shown = first_version
        self._reports = 0
        self._ended = 0
        self._bytes_up = self._bytes_down = 0
        self._counted_reports = self._counted_bytes = 0
        self._begun = self._mark = clock()
        self._spent_before = journal.pending_seconds
        self._recent: deque[float] = deque(maxlen=_RECENT_ROUNDS)

    # --- what the fleet tells ----------------------------------------------------------------------------

    def assigned(self, session: Session) -> None:
        """A device got work."""
        self.sessions.append(session)

    def ended(self, session: Session) -> None:
        """A report arrived, was refused, or will never come."""
        if session.end is None or session.end.outcome is Outcome.DROPPED:
            return
        self._bytes_up += session.end.bytes_up
        self._bytes_down += session.end.bytes_down
        if session.end.outcome is Outcome.FAILED:
            return
        self._ended += 1
        if session.model_version == self._version:
            self._reports += 1
        if not self._journal.replaying:
            self.delivered += 1
            self._display.show(self.standing())

    def advanced(self, rounds_committed: int) -> None:
        """The server has committed a round."""
        newly = range(self._version, rounds_committed)
        self._version = rounds_committed
        self._reports = 0
        fresh = [r for r in newly if r not in self._journal.round_seconds]
        now = self._clock()
        for r in fresh:
            # Several at once only where nobody looked in between.
            seconds = (self._spent_before + now - self._mark) / len(fresh)
            self._recent.append(seconds)
            self._journal.record_round(r, seconds)
        if fresh:
            self._mark, self._spent_before = now, 0.0
        if not self._journal.replaying:
            self.refresh()

    # --- what it knows -----------------------------------------------------------------------------------

    @property
    def wall_s(self) -> float:
        """Seconds since this process began to follow."""
        return self._clock() - self._begun

    @property
    def open_round_s(self) -> float:
        """Wall-clock seconds that this process has spent on the open round."""
        return self._clock() - self._mark

    def standing(self) -> Standing:
        """How far the run is."""
        done = self._version - self._first
        eta = sum(self._recent) / len(self._recent) * (self._of_rounds - done) if self._recent else None
        return Standing(
            rounds=done,
            of_rounds=self._of_rounds,
            reports=min(self._reports, self._cohort),
            cohort=self._cohort,
            latest=self._latest,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            saved=self._saved(),
            sessions=self._ended,
            clients_per_s=self.delivered / max(self.wall_s, 1e-9),
            eta_s=eta,
        )

    def _saved(self) -> float | None:
        dense = self._dense_bytes * self._counted_reports
        return 1 - self._counted_bytes / dense if 0 < self._counted_bytes < dense else None

    def refresh(self) -> bool:
        """Ask the server for rounds that are new or were not scored yet.

        Returns:
            Whether all committed rounds are known and (where the server evaluates) scored.
        """
        for committed in self._read_rounds(self._shown):
            if committed.round_id not in self._known:
                self._counted_reports += committed.reports
                self._counted_bytes += committed.bytes_up
            self._known[committed.round_id] = committed
        while (committed_next := self._known.get(self._shown)) is not None:
            if self._scored and committed_next.validation_accuracy is None:
                break
            self._shown += 1
            self._latest = committed_next
            self._display.round_done(committed_next, self.standing())
        self._display.show(self.standing())
        return self._shown >= self._version

    def round_results(
        self, counted: Sequence[Sequence[Session]] = (), attacks: Callable[[int], bool] = lambda _device: False
    ) -> tuple[RoundResult, ...]:
        """All committed rounds, with the traffic of the devices assigned in each.

        Args:
            counted: The sessions that each round counted; only needed where devices attack.
            attacks: Whether a device does.
        """
        attackers = {s.number for s in self.sessions if attacks(s.device)}
        up, down = Counter[int](), Counter[int]()
        for session in self.sessions:
            if session.end is not None:
                up[session.round_id] += session.end.bytes_up
                down[session.round_id] += session.end.bytes_down
        return tuple(
            RoundResult(
                round=r + 1,
                accuracy=committed.validation_accuracy,
                loss=committed.validation_loss,
                train_loss=committed.train_loss,
                reports=committed.reports,
                discarded=committed.discarded,
                bytes_up=up[r],
                bytes_down=down[r],
                seconds=self._journal.round_seconds.get(r, 0.0),
                opened_at_s=committed.opened_at_s,
                closed_at_s=committed.closed_at_s,
                bytes_dense=self._dense_bytes * committed.reports,
                bytes_counted=committed.bytes_up,
                excluded=tuple(committed.measurements.excluded),
                attackers=sum(s.number in attackers for s in counted[r]) if attackers else 0,
                excluded_attackers=sum(number in attackers for number in committed.measurements.excluded),
                num_byzantine=committed.measurements.num_byzantine,
                degraded=committed.measurements.degraded,
                clipped=committed.measurements.clipped,
                norm_median=committed.measurements.norm_median,
                norm_max=committed.measurements.norm_max,
                aggregate_norm=committed.measurements.aggregate_norm,
                staleness=committed.measurements.staleness,
                unchanged=committed.measurements.unchanged,
                epsilon=committed.measurements.privacy.epsilon,
                noise_stddev=committed.measurements.privacy.noise_stddev,
                shares_rejected=committed.measurements.shares_rejected,
                noise_from=committed.measurements.contributors,
                opened_by=committed.measurements.answered,
                tampered=committed.measurements.tampered,
                integrity=committed.measurements.integrity,
                model_sha256=committed.model_sha256,
            )
            for r, committed in sorted(self._known.items())
        )

    def counted(self, tolerance: Callable[[int], int]) -> list[list[Session]]:
        """The sessions that each committed round counted."""
        reports = [0] * self._first + [committed.reports for _, committed in sorted(self._known.items())]
        return counted_sessions(self.sessions, reports, tolerance)

    def tier_results(
        self, population: Population, counted: Sequence[Sequence[Session]], examples: Sequence[int] | None = None
    ) -> tuple[TierResult, ...]:
        """What became of all sessions, tier by tier.

        Args:
            population: The devices.
            counted: The sessions that each round counted.
            examples: Device -> examples that a session of it trains; None where nobody here knows.
        """
        devices = Counter(population.tier(d) for d in range(population.devices))
        kinds: dict[DeviceTier, Counter[str]] = {tier: Counter() for tier in DeviceTier}
        in_a_model = {id(s) for sessions in counted for s in sessions}
        trained = Counter[DeviceTier]()
        if examples is not None:
            for session in (s for sessions in counted for s in sessions):
                trained[population.tier(session.device)] += examples[session.device]
        for session in self.sessions:
            kinds[population.tier(session.device)][_kind(session, id(session) in in_a_model)] += 1
        return tuple(
            TierResult(
                tier=tier,
                devices=devices[tier],
                counted=kinds[tier]["counted"],
                late=kinds[tier]["late"],
                dropped=kinds[tier]["dropped"],
                refused=kinds[tier]["refused"],
                unfinished=kinds[tier]["unfinished"],
                examples=None if examples is None else trained[tier],
            )
            for tier in DeviceTier
        )

    def refusals(self, counted: Sequence[Sequence[Session]]) -> dict[str, int]:
        """Why reports are in no model: problem type -> sessions, the commonest first.

        In virtual time a report that came too late counts as stale whether or not its upload beat the commit on this
        machine.
        """
        in_a_model = {id(s) for sessions in counted for s in sessions}
        reasons = Counter(
            s.end.reason or StaleReport.slug
            for s in self.sessions
            if s.end is not None and s.end.outcome is not Outcome.DROPPED and id(s) not in in_a_model
        )
        return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def participation(population: Population, counted: Sequence[Sequence[Session]]) -> list[int]:
    """How often each device counted."""
    times = Counter(s.device for sessions in counted for s in sessions)
    return [times[device] for device in range(population.devices)]


def slow_share(population: Population, times: Sequence[int]) -> float | None:
    """How often a slow device counted, on average, beside one of the others; None where nothing can be compared.

    Slow are the stragglers; in a fleet without them, the devices of the lowest tier.
    """
    slow = population.slow_devices or {d for d in range(population.devices) if population.tier(d) is DeviceTier.LOW_END}
    try:
        return selection_ratio({str(d): n for d, n in enumerate(times)}, map(str, slow))
    except ConfigurationError:
        return None


def _kind(session: Session, counted: bool) -> str:
    if counted:
        return "counted"
    if session.end is None:
        return "unfinished"
    return {Outcome.DROPPED: "dropped", Outcome.FAILED: "refused"}.get(session.end.outcome, "late")
