"""The check of a round's reports against each other: commit, reveal, check, judge.

The coefficients come from all aggregators that take part, after the ciphertexts are fixed; a report is challenged once,
ever. So the challenge goes into the journal before anything is revealed, and another coordinator continues the very
same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from client_sdk.protocol.secure import SecureLayout
from client_sdk.protocol.shamir import Scheme
from server_ref.secure.errors import AlreadyChallenged, AnswerRejected, NotEnoughAggregators, SecureRoundError
from server_ref.secure.messages import (
    MAX_CHALLENGED,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckRequest,
    ReportRef,
    RevealRequest,
)
from server_ref.secure.panel import Panel
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.parity import ParityVerdict, judge, read_check
from server_ref.secure.port import FullPort
from server_ref.secure.projection_opening import judge_projections
from server_ref.secure.projections import ProjectionSettings
from server_ref.secure.round_messages import Challenge, RoundState, SaveState, SealedReport
from server_ref.secure.stages_table import Stage, StagesTable
from server_ref.secure.zero_key_relay import ask_dealers, keys_for

_log = logging.getLogger("pocketfed.secure")


class ReportCheck:
    """Leaves reports out whose shares do not fit together.

    Args:
        panel: The aggregators.
        table: Of what is needed.
        layout: Of the shares.
        save: Keeps the state durably, with changes.
        required: Whether a round waits for an aggregator that cuts its check short. In the mode ``projections`` it
            does.
    """

    def __init__(
        self, panel: Panel, table: StagesTable, layout: SecureLayout, save: SaveState, *, required: bool
    ) -> None:
        self._panel = panel
        self._table = table
        self._scheme = layout.scheme
        self._save = save
        projected = table.parameters.checking is CheckingMode.PROJECTIONS
        self._projections = table.parameters.projection_settings(layout.size) if projected else None
        self._required = required or projected

    def run(
        self, state: RoundState, reports: Sequence[SealedReport], holders: tuple[int, ...]
    ) -> tuple[RoundState, tuple[int, ...]]:
        """Challenge what was not challenged yet, finish what was, and judge.

        Returns:
            The state with the reports that are rejected, and the aggregators that take part from here on.

        Raises:
            SecureRoundError, AlreadyChallenged: The check is required and cannot be had (now).
        """
        if self._required:
            self._table.require_live(Stage.CHECK if self._projections is None else Stage.PROJECTIONS, holders)
        elif len(holders) < self._table.needed(Stage.CHECK):
            return state.model_copy(update={"parity": "too few aggregators"}), holders
        challenged = {ref.report_id for each in state.challenges for ref in each.request.reports}
        fresh = [r for r in reports if r.report_id not in challenged and r.report_id not in state.rejected]
        state = self._save(state, challenges=(*state.challenges, *challenges_of(state.round_id, fresh)))
        try:
            for number in range(len(state.challenges)):
                state, holders = self._finish(state, number, holders)
        except (SecureRoundError, AlreadyChallenged) as e:
            if self._required:
                raise
            _log.warning("round %d goes on without the check of its reports: %s", state.round_id, e)
            return state.model_copy(update={"parity": "cut short"}), holders
        return state.model_copy(update={"parity": "checked"}), holders

    def _finish(self, state: RoundState, number: int, holders: tuple[int, ...]) -> tuple[RoundState, tuple[int, ...]]:
        fixed = fix_commitments(state.challenges[number], self._panel, self._table, holders)
        challenges = (*state.challenges[:number], fixed, *state.challenges[number + 1 :])
        state = self._save(state, challenges=challenges)
        spare = len(holders) > self._table.needed(Stage.COMMIT)
        nonces = reveal(fixed, self._panel)
        verdict = check(fixed, nonces, self._panel, self._table, self._scheme, spare=spare)
        for index in verdict.liars:
            _log.error("aggregator %d spoils the check of most reports, and is left out", index)
        reports = [ref.report_id for ref in fixed.request.reports]
        rejected = dict.fromkeys((reports[position] for position in verdict.bad_reports), "parity")
        if self._projections is not None:
            accepted = project(fixed, nonces, self._panel, self._table, self._projections)
            refused = [report for report, good in zip(reports, accepted, strict=True) if not good]
            rejected = {**dict.fromkeys(refused, "projections"), **rejected}
        left = tuple(i for i in holders if i not in verdict.liars)
        return state.model_copy(update={"rejected": {**state.rejected, **rejected}}), left


def challenges_of(round_id: int, reports: Sequence[SealedReport]) -> tuple[Challenge, ...]:
    """The reports, as many at a time as one challenge takes."""
    refs = [ReportRef(report_id=report.report_id, digest=report.header.digest()) for report in reports]
    some = (refs[at : at + MAX_CHALLENGED] for at in range(0, len(refs), MAX_CHALLENGED))
    return tuple(Challenge(request=ChallengeRequest(round_id=round_id, reports=tuple(each))) for each in some)


def fix_commitments(challenge: Challenge, panel: Panel, table: StagesTable, live: Sequence[int]) -> Challenge:
    """The challenge with the commitments of the aggregators that can take part.

    Raises:
        AlreadyChallenged: The reports were challenged before, in another composition.
        NotEnoughAggregators: Fewer commitments than a quorum.
    """
    if challenge.reveal is not None:
        return challenge
    name = challenge.request.sha256()

    def commit(port: FullPort, index: int) -> ChallengeCommitment:
        commitment = port.challenge_commit(challenge.request)
        if (commitment.index, commitment.challenge_sha256) != (index, name):
            raise AnswerRejected(f"aggregator {index} committed to another challenge")
        return commitment

    replies = panel.ask(live, commit, "commit to a challenge")
    for error in replies.failed.values():
        if isinstance(error, AlreadyChallenged):
            raise error
    table.require_live(Stage.CHALLENGE, replies.indices, replies.why())
    commitments = tuple(replies.good[i] for i in replies.indices)
    return challenge.model_copy(update={"reveal": RevealRequest(challenge_sha256=name, commitments=commitments)})


def reveal(challenge: Challenge, panel: Panel) -> CheckRequest:
    """The nonces of all that committed.

    Raises:
        SecureRoundError: One of them does not reveal: without all nonces there are no coefficients, and with fewer
            there would be a choice of them.
    """
    fixed = _revealed(challenge)
    transcript = fixed.transcript()

    def show(port: FullPort, index: int) -> ChallengeNonce:
        nonce = port.challenge_reveal(fixed)
        authentic = panel.signed(index, nonce.signed_bytes(), nonce.signature)
        if (nonce.index, nonce.transcript_sha256) != (index, transcript) or not authentic:
            raise AnswerRejected(f"aggregator {index} revealed no nonce of this challenge")
        return nonce

    nonces = panel.ask(_committed(challenge), show, "reveal its nonce")
    if nonces.failed:
        # Whoever committed has to reveal; the challenge is kept, and goes on when they are back.
        raise NotEnoughAggregators(
            f"a challenge waits to be revealed: {nonces.why()}",
            stage=Stage.CHALLENGE,
            needed=len(_committed(challenge)),
            live=nonces.indices,
        )
    return CheckRequest(transcript_sha256=transcript, nonces=tuple(nonces.good[i] for i in nonces.indices))


def check(
    challenge: Challenge, nonces: CheckRequest, panel: Panel, table: StagesTable, scheme: Scheme, *, spare: bool
) -> ParityVerdict:
    """Whose shares do not fit together: the same verdict whenever the same aggregators answer.

    Args:
        challenge: With its commitments.
        nonces: What ``reveal`` gave.
        panel: The aggregators.
        table: Of what is needed.
        scheme: Of the shares.
        spare: Whether an aggregator can be left out.

    Raises:
        NotEnoughAggregators: Too few answer.
    """
    values = panel.ask(
        _committed(challenge),
        lambda port, index: read_check(port.check(nonces), index, challenge, scheme, panel.peers),
        "check",
    )
    table.require_live(Stage.CHECK, values.indices, values.why())
    return judge(values.good, scheme, spare=spare)


def project(
    challenge: Challenge, nonces: CheckRequest, panel: Panel, table: StagesTable, settings: ProjectionSettings
) -> tuple[bool, ...]:
    """Which updates are as short as they claim, in the challenge's order.

    Raises:
        NotEnoughAggregators: Too few answer.
        ProjectionsInconsistent: A dealer gave out different keys.
    """
    committed, transcript = _committed(challenge), nonces.transcript_sha256
    dealt = ask_dealers(panel, committed, transcript, lambda port: port.deal_zero_keys(transcript))
    answers = panel.ask(
        committed, lambda port, index: port.open_projections(nonces, keys_for(index, dealt)), "open projections"
    )
    authentic = {i: each for i, each in answers.good.items() if each.header.index == i}
    table.require_live(Stage.PROJECTIONS, tuple(sorted(authentic)), answers.why())
    count = len(challenge.request.reports)
    return judge_projections(transcript, count, list(authentic.values()), settings, panel.signed)


def _revealed(challenge: Challenge) -> RevealRequest:
    if challenge.reveal is None:
        raise SecureRoundError("a challenge is revealed after its commitments are fixed")
    return challenge.reveal


def _committed(challenge: Challenge) -> list[int]:
    return [each.index for each in _revealed(challenge).commitments]
