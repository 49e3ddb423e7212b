"""The parity challenge: commit, reveal, check.

The coefficients of a challenge come from the nonces of a quorum of aggregators, each committed to before any is shown,
and after the reports' ciphertexts are fixed: neither a device nor the coordinator can choose a share for them. What an
aggregator answers is masked by one random element that each device shared for this purpose. A mask hides one answer,
so each report is challenged once, ever; and all aggregators must use the same coefficients, or their answers would
differ by a combination of the shares. Hence the signed reveals: each vouches for one transcript, and two quorums have
an honest aggregator in common, which reveals for one of two transcripts at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from sqlalchemy.engine import Connection

from client_sdk.protocol.field import Field, FieldVector
from client_sdk.protocol.secure import SecureLayout, decode_share
from server_ref.secure import queries
from server_ref.secure.distance_messages import ZeroKeys, ZeroKeyShare
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
    projection_seed,
)
from server_ref.secure.projection_messages import ProjectionHeader, ProjectionShare
from server_ref.secure.projections import project
from server_ref.secure.queries import StoredChallenge
from server_ref.secure.store import AggregatorStore
from server_ref.secure.sums import KERNELS
from server_ref.secure.wire import pack, unpack
from server_ref.secure.zero_keys import ZeroKeyDealer
from server_ref.secure.zero_sharing import Subset, fingerprint, held_by, key_holders, zero_shares

_AT_ONCE: Final = 4
"""Shares in memory together: the rows of a projection are expanded once for all of them."""


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
            stored, revealed = self._revealed(connection, request.transcript_sha256)
        if stored.answer_json is None:
            # Only nonces that open this transcript's commitments pass, so there is only one answer.
            self._check_nonces(request, revealed)
            answer_json = self._answer(request, stored, layout).model_dump_json()
            with self._store.transaction() as connection:
                stored, _ = self._revealed(connection, request.transcript_sha256)
                stored = replace(stored, answer_json=answer_json)
                queries.save_challenge(connection, stored)
        return CheckAnswer.model_validate_json(stored.answer_json or "")

    def deal_keys(self, transcript_sha256: str, dealer: ZeroKeyDealer) -> ZeroKeys:
        """This aggregator's part of the zero keys for the norms of a transcript that it revealed its nonce for."""
        with self._store.transaction() as connection:
            self._revealed(connection, transcript_sha256)
        return dealer.deal(transcript_sha256)

    def open_projections(
        self, request: CheckRequest, dealt: Sequence[ZeroKeyShare], layout: SecureLayout, dealer: ZeroKeyDealer
    ) -> ProjectionShare:
        """Shares of the projections and norms of each report of the transcript."""
        with self._store.transaction() as connection:
            stored, revealed = self._revealed(connection, request.transcript_sha256)
        if stored.projections is None:
            self._check_nonces(request, revealed)
            keys = dealer.collect(request.transcript_sha256, dealt)
            made = self._projected(request, stored, layout, keys)
            kept = self._store.put(pack(made.header, [made.payload]))
            with self._store.transaction() as connection:
                # Other keys would hide the same norms in another way: whatever was kept first is the answer.
                stored, _ = self._revealed(connection, request.transcript_sha256)
                if stored.projections is None:
                    stored = replace(stored, projections=kept)
                    queries.save_challenge(connection, stored)
        header, (payload,) = unpack(ProjectionHeader, self._store.get(stored.projections or ""))
        return ProjectionShare(header, bytes(payload))

    @staticmethod
    def _revealed(connection: Connection, transcript_sha256: str) -> tuple[StoredChallenge, RevealRequest]:
        stored = queries.load_challenge(connection, transcript=transcript_sha256)
        if stored is None or stored.reveal_json is None:
            raise ChallengeMismatch("this aggregator has revealed its nonce for no such transcript")
        return stored, RevealRequest.model_validate_json(stored.reveal_json)

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

    def _shares(self, stored: StoredChallenge, layout: SecureLayout) -> Iterator[list[FieldVector]]:
        """The shares of the challenge's reports in order, a few at a time."""
        ids = [ref.report_id for ref in ChallengeRequest.model_validate_json(stored.request_json).reports]
        for at in range(0, len(ids), _AT_ONCE):
            some = ids[at : at + _AT_ONCE]
            with self._store.transaction() as connection:
                reports = queries.load_reports(connection, some, shares=True)
            plaintexts = [bytes(self._store.get_share(reports[report_id])) for report_id in some]
            yield [decode_share(plaintext, layout, self._config.index) for plaintext in plaintexts]

    def _projected(
        self, request: CheckRequest, stored: StoredChallenge, layout: SecureLayout, keys: Mapping[Subset, bytes]
    ) -> ProjectionShare:
        field, me = layout.scheme.field, self._config.index
        seed = projection_seed(request)
        projections: list[FieldVector] = []
        norms: list[int] = []
        for shares in self._shares(stored, layout):
            updates = [share[: layout.size] for share in shares]
            projections += project(updates, seed, field)
            norms += [KERNELS.inner(update, update, field) for update in updates]
        masked = field.add(field.from_ints(norms), zero_shares(keys, me, layout.scheme, len(norms)))
        payload = field.to_bytes(np.concatenate([*projections, masked]))
        header = ProjectionHeader(
            index=me,
            transcript_sha256=request.transcript_sha256,
            key_fingerprints=tuple(fingerprint(keys[s]) for s in held_by(me, key_holders(layout.scheme))),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            signature=UNSIGNED,
        )
        return ProjectionShare(self._keys.sign(header), payload)

    def _answer(self, request: CheckRequest, stored: StoredChallenge, layout: SecureLayout) -> CheckAnswer:
        field = layout.scheme.field
        coefficients = field.expand(challenge_seed(request), layout.share_length - 1)
        values = [
            masked_parity(share, coefficients, field) for shares in self._shares(stored, layout) for share in shares
        ]
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
