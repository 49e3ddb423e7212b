"""The parity challenge: it finds shares that do not belong together, and opens nothing else, whoever relays it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from client_sdk.protocol.secure import encode_shares
from client_sdk.protocol.shamir import SeededShares, share_seeded
from server_ref.secure.errors import AlreadyChallenged, ChallengeMismatch, DuplicateEntry, UnknownReport
from server_ref.secure.identity import AggregatorKeys
from server_ref.secure.messages import (
    ChallengeCommitment,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    RevealRequest,
    ciphertext_id,
    nonce_commitment,
)
from tests.secure_parties import Parties, Upload, pinned


@pytest.fixture
def parties(tmp_path) -> Iterator[Parties]:
    made = Parties(tmp_path, pinned(privacy=None))
    yield made
    made.close()


def request_for(uploads: Sequence[Upload], round_id: int = 0) -> ChallengeRequest:
    return ChallengeRequest(round_id=round_id, reports=tuple(upload.ref for upload in uploads))


def reveal_for(parties: Parties, request: ChallengeRequest, among: Sequence[int]) -> RevealRequest:
    commitments = tuple(parties[i].challenge_commit(request) for i in among)
    return RevealRequest(challenge_sha256=request.sha256(), commitments=commitments)


def checks_of(answers: Sequence[CheckAnswer], report: int, p: int) -> list[int]:
    """The two parity checks of 3 of 5, modulo p."""
    s = [int.from_bytes(bytes.fromhex(answer.values[report]), "little") for answer in answers]
    return [(s[0] - 3 * s[1] + 3 * s[2] - s[3]) % p, (s[1] - 3 * s[2] + 3 * s[3] - s[4]) % p]


@pytest.mark.parametrize("field", ["m61", "m127"])
@pytest.mark.parametrize("packing", [1, 2])
def test_it_finds_the_report_whose_shares_do_not_belong_together(tmp_path, field, packing):
    parameters = pinned(privacy=None, field=field, packing=packing)
    parties = Parties(tmp_path, parameters)
    good, bad = parties.upload(1), crooked(parties)
    parties.deliver([good, bad])
    answers = parties.challenge([good, bad])
    p = parties.layout.scheme.field.modulus
    values = np.array(
        [[int.from_bytes(bytes.fromhex(v), "little") for v in answer.values] for answer in answers], dtype=object
    )
    # The highest difference of five values vanishes on every polynomial of degree below 4: of both packings.
    differences = (values[0] - 4 * values[1] + 6 * values[2] - 4 * values[3] + values[4]) % p
    assert differences[0] == 0
    assert differences[1] != 0
    parties.close()


def crooked(parties: Parties) -> Upload:
    """A report of which share 4 has one element that is one too large."""
    codes = np.arange(parties.layout.num_values)
    shares = share_seeded(parties.layout.secret(codes, os.urandom(32)), parties.layout.scheme)
    field = parties.layout.scheme.field
    off = field.add(shares.vectors[1], field.from_ints([1, *[0] * (parties.layout.share_length - 1)]))
    plaintexts = encode_shares(SeededShares(shares.seeds, (shares.vectors[0], off, shares.vectors[2])), parties.layout)
    return parties.seal(vars_of(parties.upload(9)), plaintexts, codes)


def vars_of(upload: Upload) -> dict[str, object]:
    return upload.header.model_dump(exclude={"ciphertext_ids"})


def test_a_malformed_mask_is_found_too(parties):
    codes = np.arange(6)
    shares = share_seeded(parties.layout.secret(codes, os.urandom(32)), parties.layout.scheme)
    field = parties.layout.scheme.field
    last = field.from_ints([*[0] * (parties.layout.share_length - 1), 1])
    vectors = (*shares.vectors[:2], field.add(shares.vectors[2], last))
    upload = parties.seal(
        vars_of(parties.upload(3)), encode_shares(SeededShares(shares.seeds, vectors), parties.layout), codes
    )
    parties.deliver([upload])
    assert checks_of(parties.challenge([upload]), 0, field.modulus)[1] != 0


def test_what_is_opened_is_masked(parties):
    """Two reports with one update: without the mask their values would open to the same number."""
    uploads = [parties.upload(number, [7, 0, 0, 0, 0, 1]) for number in range(2)]
    parties.deliver(uploads)
    answers = parties.challenge(uploads)
    opened = []
    for report in range(2):
        s = [int.from_bytes(bytes.fromhex(answer.values[report]), "little") for answer in answers]
        opened.append((3 * s[0] - 3 * s[1] + s[2]) % parties.layout.scheme.field.modulus)
    assert opened[0] != opened[1]


def test_the_sum_s_answer_has_no_mask_in_it(parties):
    """With it, the parity values (which are public) would give a combination of the exact sum, noise or not."""
    uploads = parties.uploads(range(2))
    answers = parties.answers(0, parties.commit(parties.statement(uploads)))
    element = parties.layout.scheme.field.element_bytes
    assert {len(answer.payload) for answer in answers} == {(parties.layout.share_length - 1) * element}
    assert parties.layout.share_length - 1 == parties.layout.num_values


def test_a_report_is_challenged_once_ever(parties):
    uploads = parties.uploads(range(3))
    parties.challenge(uploads[:2])
    for again in (request_for(uploads[1:]), request_for(uploads[:2], round_id=1), request_for(uploads[1:2])):
        with pytest.raises(AlreadyChallenged):
            parties[1].challenge_commit(again)
    parties.restart(1)
    with pytest.raises(AlreadyChallenged):
        parties[1].challenge_commit(request_for(uploads[1:]))
    assert parties.challenge(uploads[2:])


def test_of_two_challenges_that_overlap_only_one_is_revealed(parties):
    uploads = parties.uploads(range(3))
    first, second = request_for(uploads[:2]), request_for(uploads[1:])
    reveals = [reveal_for(parties, request, parties.indices) for request in (first, second)]
    parties[1].challenge_reveal(reveals[0])
    with pytest.raises(AlreadyChallenged):
        parties[1].challenge_reveal(reveals[1])
    with pytest.raises(AlreadyChallenged):
        parties.restart(1).challenge_reveal(reveals[1])


def test_the_nonce_is_opened_for_one_list_of_commitments(parties):
    request = request_for(parties.uploads(range(2)))
    reveal = reveal_for(parties, request, parties.indices)
    nonce = parties[1].challenge_reveal(reveal)
    fewer = RevealRequest(challenge_sha256=request.sha256(), commitments=reveal.commitments[:4])
    with pytest.raises(ChallengeMismatch):
        parties[1].challenge_reveal(fewer)
    assert parties.restart(1).challenge_reveal(reveal) == nonce


def test_commitments_come_from_a_quorum_of_distinct_aggregators_with_its_own_among_them(parties):
    request = request_for(parties.uploads(range(2)))
    name = request.sha256()
    honest = reveal_for(parties, request, parties.indices).commitments
    foreign = ChallengeCommitment(index=9, challenge_sha256=name, commitment=nonce_commitment(9, name, "00" * 32))
    other = ChallengeCommitment(index=1, challenge_sha256=name, commitment=nonce_commitment(1, name, "00" * 32))
    elsewhere = honest[4].model_copy(update={"challenge_sha256": "00" * 32})
    for wrong in (
        honest[:3],
        honest[1:],
        (honest[0], honest[0], *honest[2:4]),
        honest[::-1],
        (*honest[:4], foreign),
        (other, *honest[1:]),
        (*honest[:4], elsewhere),
    ):
        with pytest.raises(ChallengeMismatch):
            parties[1].challenge_reveal(RevealRequest(challenge_sha256=name, commitments=wrong))
    with pytest.raises(ChallengeMismatch):
        parties[1].challenge_reveal(RevealRequest(challenge_sha256="00" * 32, commitments=honest))


def test_only_nonces_that_open_the_commitments_and_are_signed_for_the_transcript_count(parties):
    request = request_for(parties.uploads(range(2)))
    reveal = reveal_for(parties, request, parties.indices)
    nonces = tuple(parties[i].challenge_reveal(reveal) for i in parties.indices)
    chosen = parties.keys[4].sign(nonces[4].model_copy(update={"nonce": "00" * 32}))
    unsigned = AggregatorKeys.generate().sign(nonces[4])
    elsewhere = parties.keys[4].sign(nonces[4].model_copy(update={"transcript_sha256": "00" * 32}))
    for wrong in (
        (*nonces[:4], chosen),
        (*nonces[:4], unsigned),
        (*nonces[:4], elsewhere),
        nonces[:4],
        nonces[::-1],
        (*nonces, nonces[4]),
    ):
        with pytest.raises(ChallengeMismatch):
            parties[1].check(CheckRequest(transcript_sha256=reveal.transcript(), nonces=wrong))
    with pytest.raises(ChallengeMismatch):
        parties[1].check(CheckRequest(transcript_sha256="00" * 32, nonces=nonces))
    assert parties[1].check(CheckRequest(transcript_sha256=reveal.transcript(), nonces=nonces))


def test_a_challenge_names_reports_that_are_kept_once_each(parties):
    uploads = parties.uploads(range(2))
    with pytest.raises(DuplicateEntry):
        parties[1].challenge_commit(request_for([uploads[0], uploads[0]]))
    with pytest.raises(UnknownReport):
        parties[1].challenge_commit(request_for([uploads[0], parties.upload(5)]))
    wrong = uploads[1].ref.model_copy(update={"digest": "00" * 32})
    with pytest.raises(UnknownReport):
        parties[1].challenge_commit(ChallengeRequest(round_id=0, reports=(wrong,)))
    parties.run(parties.statement(uploads))
    with pytest.raises(UnknownReport):
        parties[1].challenge_commit(request_for(uploads))


def test_aggregators_that_are_shown_different_commitments_do_not_both_answer(parties):
    """Answers with different coefficients, from one mask, would differ by combinations of the shares themselves.

    The coordinator has aggregators 1 and 2 on its side, whose keys and nonces it knows, and wants aggregator 3 to
    answer for one transcript and aggregators 4 and 5 for another. A transcript takes the nonces of four, signed for it:
    there are not enough honest ones for two.
    """
    uploads = parties.uploads(range(2))
    request = request_for(uploads)
    name = request.sha256()
    honest = {i: parties[i].challenge_commit(request) for i in (3, 4, 5)}

    def transcript(accomplice_nonce: str, honest_ones: Sequence[int]) -> RevealRequest:
        accomplices = [
            ChallengeCommitment(index=i, challenge_sha256=name, commitment=nonce_commitment(i, name, accomplice_nonce))
            for i in (1, 2)
        ]
        return RevealRequest(challenge_sha256=name, commitments=(*accomplices, *(honest[i] for i in honest_ones)))

    with pytest.raises(ChallengeMismatch):
        parties[3].challenge_reveal(transcript("11" * 32, [3]))
    parties[3].challenge_reveal(transcript("11" * 32, [3, 4]))
    parties[5].challenge_reveal(transcript("22" * 32, [4, 5]))
    answered = 0
    for nonce_of_4 in ("11" * 32, "22" * 32):
        try:
            parties[4].challenge_reveal(transcript(nonce_of_4, [3, 4] if nonce_of_4[0] == "1" else [4, 5]))
            answered += 1
        except ChallengeMismatch:
            pass
    assert answered == 1


def test_a_sealed_share_is_named_by_what_nobody_else_can_keep_while_changing_it(parties):
    upload = parties.upload(1)
    suite = parties.layout.suite
    ciphertext = upload.ciphertexts[4]
    name = ciphertext_id(ciphertext, suite)
    assert name == upload.header.ciphertext_ids[4]
    assert name != ciphertext_id(parties.upload(1).ciphertexts[4], suite)
    for at in (0, 31, len(ciphertext) - 16, len(ciphertext) - 1):
        flipped = bytearray(ciphertext)
        flipped[at] ^= 1
        assert ciphertext_id(bytes(flipped), suite) != name
    assert ciphertext_id(ciphertext[:40] + ciphertext[41:], suite) != name
