"""What a coordinator may rely on, whichever way it reaches an aggregator: one suite for all forms of the port.

A further implementation is one more case of ``wrap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from client_sdk.protocol.errors import OversizedBody
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.errors import (
    AlreadyChallenged,
    ChallengeMismatch,
    CohortTooSmall,
    NoiseRejected,
    NotCommitted,
    ParametersBelowPinned,
    QuorumMissing,
    ReportSpent,
    RoundCommitted,
    StaleRun,
    TaskMismatch,
    UnknownReport,
)
from server_ref.secure.messages import (
    MAX_DELIVERY,
    ChallengeRequest,
    CheckRequest,
    NoiseShare,
    RevealRequest,
    VerdictReason,
)
from server_ref.secure.port import AggregatorPort
from tests.aggregator_http import hosting
from tests.secure_parties import Parties, Upload, pinned, reweighted


@pytest.fixture(scope="module", params=["local", "http"])
def wrap(request) -> Iterator[Callable[[Aggregator], AggregatorPort]]:
    if request.param == "local":
        yield lambda aggregator: aggregator
    else:
        with hosting() as host:
            yield host.add


@pytest.fixture
def parties(tmp_path, wrap) -> Iterator[Parties]:
    made = Parties(tmp_path, wrap=wrap)
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path, wrap) -> Iterator[Parties]:
    """Without noise, so that sums can be compared."""
    made = Parties(tmp_path, pinned(privacy=None, max_weight=9), wrap=wrap)
    yield made
    made.close()


def total(uploads: list[Upload]) -> list[int]:
    return np.sum([upload.codes for upload in uploads], axis=0).tolist()


def test_it_says_who_it_is_and_what_it_insists_on(parties):
    for index in parties.indices:
        info = parties[index].describe()
        assert info.index == index
        assert info.parameters == parties.parameters
        assert info.task == parties.task
        config = parties.configs[0]
        assert info.sealing_key == config.peers[index - 1].sealing_key
        assert config.signed(index, info.signed_bytes(), info.signature)


def test_it_serves_one_task(parties):
    assert parties[1].bind(parties.task) == parties[1].describe()
    for change in ({"task_id": "00" * 16}, {"size": 7}, {"parameter_table_sha256": "00" * 32}):
        with pytest.raises(TaskMismatch):
            parties[1].bind(parties.task.model_copy(update=change))


def test_any_three_answers_open_the_weighted_sum(plain):
    uploads = plain.uploads(range(4))
    entries = [*reweighted(uploads[:2], 9), *reweighted(uploads[2:], 1)]
    answers = plain.answers(0, plain.commit(plain.statement(entries)))
    expected = 9 * np.array(total(uploads[:2])) + np.array(total(uploads[2:]))
    for chosen in ([0, 1, 2], [2, 3, 4], [0, 2, 4]):
        assert plain.open([answers[i] for i in chosen])[0].tolist() == expected.tolist()


def test_with_noise_all_answers_lie_on_one_polynomial_and_near_the_sum(parties):
    uploads = parties.uploads(range(3))
    answers = parties.answers(0, parties.commit(parties.statement(uploads)))
    opened = [parties.open([answers[i] for i in chosen])[0].tolist() for chosen in ([0, 1, 2], [1, 2, 3], [2, 3, 4])]
    assert opened[0] == opened[1] == opened[2]
    stddev = 4.0 * 2**16 * (5 / 3) ** 0.5
    assert 0 < np.abs(np.array(opened[0]) - total(uploads)).max() < 12 * stddev


def test_every_operation_gives_the_same_answer_again(parties):
    uploads = [parties.upload(number) for number in range(3)]
    port = parties[2]
    shares = [upload.share(2) for upload in uploads]
    parties.deliver(uploads, to=[1, 3, 4, 5])
    assert port.deliver(0, shares) == port.deliver(0, shares)
    request = ChallengeRequest(round_id=0, reports=tuple(upload.ref for upload in uploads))
    assert port.challenge_commit(request) == port.challenge_commit(request)
    assert parties.challenge(uploads) == parties.challenge(uploads)
    statement = parties.statement(uploads)
    contributions = parties.contributions(statement)
    assert parties.contributions(statement) == contributions
    signatures = parties.commit(statement, contributions)
    assert parties.commit(statement, contributions) == signatures
    answers = parties.answers(0, signatures)
    assert parties.answers(0, signatures[:4]) == answers, "whoever signed, the bytes are the same"
    assert parties.contributions(statement) == contributions, "others may still need them"
    assert port.deliver(0, shares) == port.deliver(0, shares)


def test_answers_and_parity_values_are_signed(parties):
    uploads = parties.uploads(range(2))
    config = parties.configs[0]
    signed = [
        *parties.challenge(uploads),
        *parties.commit(parties.statement(uploads)),
        *(answer.header for answer in parties.answers(0, parties.commit(parties.statement(uploads)))),
    ]
    assert all(config.signed(message.index, message.signed_bytes(), message.signature) for message in signed)


def test_parity_values_lie_on_one_polynomial(parties):
    uploads = parties.uploads(range(2))
    answers = parties.challenge(uploads)
    p = parties.layout.scheme.field.modulus
    for report in range(2):
        s = [int.from_bytes(bytes.fromhex(answer.values[report]), "little") for answer in answers]
        assert (s[0] - 3 * s[1] + 3 * s[2] - s[3]) % p == 0
        assert (s[1] - 3 * s[2] + 3 * s[3] - s[4]) % p == 0


def test_verdicts_come_in_order_and_say_why(parties):
    good, other = parties.upload(1), parties.upload(2)
    swapped = Upload(other.header, good.ciphertexts, other.codes)
    port = parties[3]
    verdicts = port.deliver(0, [good.share(3), swapped.share(3), other.share(3)])
    assert [verdict.reason for verdict in verdicts] == [None, VerdictReason.HEADER_MISMATCH, None]
    assert [verdict.report_id for verdict in verdicts] == [u.header.report_id for u in (good, other, other)]
    again = parties.upload(1, [5] * 6)
    assert [v.reason for v in port.deliver(0, [again.share(3)])] == [VerdictReason.CONFLICT]


def test_a_delivery_is_bounded(parties):
    share = parties.upload(1).share(1)
    with pytest.raises(OversizedBody):
        parties[1].deliver(0, [share] * (MAX_DELIVERY + 1))


def test_refusals_keep_their_type_and_change_nothing(parties):
    uploads = parties.uploads(range(4))
    statement = parties.statement(uploads[:3])
    parameters = parties.parameters.round_parameters().model_copy(update={"noise_multiplier": 0.1})
    refused = {
        CohortTooSmall: parties.statement(uploads[:1]),
        ParametersBelowPinned: parties.statement(uploads, parameters=parameters),
        UnknownReport: parties.statement([parties.upload(9), *uploads]),
        TaskMismatch: statement.model_copy(update={"task_id": "00" * 16}),
    }
    for error, bad in refused.items():
        with pytest.raises(error):
            parties[1].contribute(bad)
    with pytest.raises(NotCommitted):
        parties[1].answer(0, [])
    contributions = parties.contributions(statement)
    with pytest.raises(StaleRun):
        parties[1].contribute(parties.statement(uploads))
    mine = [one.for_receiver(1) for one in contributions]
    for bad_noise in (mine[:-1], [*mine[:-1], NoiseShare(mine[-1].header, mine[0].sealed)]):
        with pytest.raises(NoiseRejected):
            parties[1].commit(statement, bad_noise)
    signatures = parties.commit(statement, contributions)
    with pytest.raises(QuorumMissing):
        parties[1].answer(0, signatures[:3])
    with pytest.raises(RoundCommitted):
        parties[1].contribute(parties.statement(uploads, run=1))
    with pytest.raises(ReportSpent):
        parties[1].contribute(parties.statement(uploads, round_id=1))
    assert len(parties.answers(0, signatures)) == 5


def test_challenge_refusals_keep_their_type(parties):
    uploads = parties.uploads(range(3))
    parties.challenge(uploads[:2])
    with pytest.raises(AlreadyChallenged):
        parties[1].challenge_commit(ChallengeRequest(round_id=1, reports=(uploads[1].ref, uploads[2].ref)))
    with pytest.raises(UnknownReport):
        parties[1].challenge_commit(ChallengeRequest(round_id=1, reports=(parties.upload(7).ref,)))
    request = ChallengeRequest(round_id=1, reports=(uploads[2].ref,))
    commitments = tuple(parties[i].challenge_commit(request) for i in parties.indices)
    with pytest.raises(ChallengeMismatch):
        parties[1].challenge_reveal(RevealRequest(challenge_sha256=request.sha256(), commitments=commitments[:3]))
    reveal = RevealRequest(challenge_sha256=request.sha256(), commitments=commitments)
    nonce = parties[1].challenge_reveal(reveal)
    with pytest.raises(ChallengeMismatch):
        parties[1].check(CheckRequest(transcript_sha256=reveal.transcript(), nonces=(nonce,)))
