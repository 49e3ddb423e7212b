"""The parity challenge: commit, reveal, check.

The coefficients of a challenge come from the nonces of a quorum of aggregators, each committed to before any is shown,
and after the reports' ciphertexts are fixed: neither a device nor the coordinator can choose a share for them. What an
aggregator answers is masked by one random element that each device shared for this purpose. A mask hides one answer,
so each report is challenged once, ever; and all aggregators must use the same coefficients, or their answers would
differ by a combination of the shares. Hence the signed reveals: each vouches for one transcript, and two quorums have
an honest aggregator in common, which reveals for one of two transcripts at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sqlalchemy.engine import Connection

from client_sdk.protocol.field import Field, FieldVector
from client_sdk.protocol.secure import SecureLayout, decode_share
from server_ref.secure import queries
from server_ref.secure.errors import AlreadyChallenged, ChallengeMismatch, DuplicateEntry, UnknownReport
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import (
    UNSIGNED,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    RevealRequest,
    challenge_seed,
    nonce_commitment,
)
from server_ref.secure.queries import StoredChallenge, StoredReport
from server_ref.secure.store import AggregatorStore
from server_ref.secure.sums import KERNELS


class Challenges:
    """The challenges of one aggregator.

    Args:
        config: Index, peers, quorum.
        keys: To sign with.
        store: Where nonces, transcripts and answers are kept before they are sent.
        random: The operating system's randomness.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        keys: AggregatorKeys,
        store: AggregatorStore,
        random: Callable[[int], bytes],
    ) -> None:
        self._config = config
        self._keys = keys
        self._store = store
        self._random = random

    def commit(self, request: ChallengeRequest) -> ChallengeCommitment:
        """Draw a nonce for these reports, once, and commit to it."""
        name = request.sha256()
        with self._store.transaction() as connection:
            stored = queries.load_challenge(connection, challenge=name)
            if stored is None:
                self._require_fresh(connection, request)
                stored = StoredChallenge(name, request.model_dump_json(), self._random(32).hex())
                queries.save_challenge(connection, stored)
        return self._commitment(stored)

    def reveal(self, request: RevealRequest) -> ChallengeNonce:
        """Bind the reports to this transcript, and show the nonce."""
        transcript = request.transcript()
        with self._store.transaction() as connection:
            stored = queries.load_challenge(connection, challenge=request.challenge_sha256)
            if stored is None:
                raise ChallengeMismatch("this aggregator has committed to no such challenge")
            if stored.transcript is None:
                self._check_commitments(request, self._commitment(stored))
                challenged = ChallengeRequest.model_validate_json(stored.request_json)
                self._require_fresh(connection, challenged)
                queries.mark_reports(connection, [ref.report_id for ref in challenged.reports], challenge=transcript)
                stored = replace(stored, transcript=transcript, reveal_json=request.model_dump_json())
                queries.save_challenge(connection, stored)
            elif stored.transcript != transcript:
                raise ChallengeMismatch("this aggregator has revealed its nonce for other commitments")
        return self._keys.sign(
            ChallengeNonce(
                index=self._config.index, transcript_sha256=transcript, nonce=stored.nonce, signature=UNSIGNED
            )
        )

    def check(self, request: CheckRequest, layout: SecureLayout) -> CheckAnswer:
        """The masked parity value of each report of the transcript."""
        with self._store.transaction() as connection:
            stored = queries.load_challenge(connection, transcript=request.transcript_sha256)
            if stored is None or stored.reveal_json is None:
                raise ChallengeMismatch("this aggregator has revealed its nonce for no such transcript")
            challenged = ChallengeRequest.model_validate_json(stored.request_json)
            reports = queries.load_reports(connection, [ref.report_id for ref in challenged.reports], shares=True)
        if stored.answer_json is None:
            # Only nonces that open this transcript's commitments pass, so there is only one answer.
            self._check_nonces(request, RevealRequest.model_validate_json(stored.reveal_json))
            answer = self._answer(request, [reports[ref.report_id] for ref in challenged.reports], layout)
            stored = replace(stored, answer_json=answer.model_dump_json())
            with self._store.transaction() as connection:
                queries.save_challenge(connection, stored)
        return CheckAnswer.model_validate_json(stored.answer_json or "")

    def _commitment(self, stored: StoredChallenge) -> ChallengeCommitment:
        index = self._config.index
        return ChallengeCommitment(
            index=index,
            challenge_sha256=stored.challenge,
            commitment=nonce_commitment(index, stored.challenge, stored.nonce),
        )

    def _require_fresh(self, connection: Connection, request: ChallengeRequest) -> None:
        ids = [ref.report_id for ref in request.reports]
        if len(set(ids)) < len(ids):
            raise DuplicateEntry("a report stands in the challenge twice")
        known = queries.load_reports(connection, ids)
        for ref in request.reports:
            report = known.get(ref.report_id)
            if report is None or report.digest != ref.digest or not report.kept:
                raise UnknownReport(f"this aggregator keeps no such share of report {ref.report_id}")
            if report.challenge is not None:
                raise AlreadyChallenged(f"report {ref.report_id} was challenged before")

    def _check_commitments(self, request: RevealRequest, own: ChallengeCommitment) -> None:
        indices = [each.index for each in request.commitments]
        if indices != sorted(set(indices)) or indices[-1] > len(self._config.peers):
            raise ChallengeMismatch("commitments are of distinct aggregators, in order of their indices")
        if len(indices) < self._config.parameters.effective_quorum:
            raise ChallengeMismatch(
                f"{len(indices)} commitments are fewer than the quorum of {self._config.parameters.effective_quorum}"
            )
        if any(each.challenge_sha256 != request.challenge_sha256 for each in request.commitments):
            raise ChallengeMismatch("a commitment belongs to another challenge")
        if own not in request.commitments:
            raise ChallengeMismatch("this aggregator's own commitment is not among them")

    def _check_nonces(self, request: CheckRequest, revealed: RevealRequest) -> None:
        if [nonce.index for nonce in request.nonces] != [each.index for each in revealed.commitments]:
            raise ChallengeMismatch("there is not one nonce for each commitment, in order")
        for nonce, each in zip(request.nonces, revealed.commitments, strict=True):
            if nonce_commitment(nonce.index, revealed.challenge_sha256, nonce.nonce) != each.commitment:
                raise ChallengeMismatch(f"the nonce of aggregator {nonce.index} does not open its commitment")
            if nonce.transcript_sha256 != request.transcript_sha256 or not self._config.signed(
                nonce.index, nonce.signed_bytes(), nonce.signature
            ):
                raise ChallengeMismatch(f"aggregator {nonce.index} has not revealed its nonce for this transcript")

    def _answer(self, request: CheckRequest, reports: list[StoredReport], layout: SecureLayout) -> CheckAnswer:
        field = layout.scheme.field
        coefficients = field.expand(challenge_seed(request), layout.share_length - 1)
        values = []
        for report in reports:
            share = decode_share(bytes(self._store.get_share(report)), layout, self._config.index)
            values.append(masked_parity(share, coefficients, field))
        return self._keys.sign(
            CheckAnswer(
                index=self._config.index,
                transcript_sha256=request.transcript_sha256,
                values=tuple(values),
                signature=UNSIGNED,
            )
        )


def masked_parity(share: FieldVector, coefficients: FieldVector, field: Field) -> str:
    """``<coefficients, share> + mask``, an encoded field element (hex), where the mask is the share's last element."""
    (mask,) = field.to_ints(share[-1:])
    return field.to_bytes(field.from_ints([KERNELS.inner(coefficients, share[:-1], field) + mask])).hex()
