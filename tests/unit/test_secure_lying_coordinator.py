"""A coordinator that lies, rule by rule: what an aggregator refuses, and in places what the lie would have gained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from server_ref.secure.aggregator import Aggregator
from server_ref.secure.errors import (
    AggregatorRefusal,
    BudgetSpent,
    CohortTooSmall,
    ContributorsRefused,
    DuplicateEntry,
    NoiseRejected,
    ParametersBelowPinned,
    ParticipationsExhausted,
    PartitionRefused,
    QuorumMissing,
    ReportSpent,
    RoundCommitted,
    StaleRun,
    SumOutOfRange,
    UnknownReport,
    WeightTooLarge,
)
from server_ref.secure.identity import AggregatorKeys
from server_ref.secure.messages import (
    UNSIGNED,
    AggregatorInfo,
    CommitSignature,
    NoiseContribution,
    NoiseShare,
    RoundStatement,
    VerdictReason,
)
from server_ref.secure.noise_shares import make_contribution
from server_ref.secure.parameters import CheckingMode, PinnedParameters
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import Parties, default_codes, hex_id, pinned, pinned_privacy, reweighted


@pytest.fixture
def parties(tmp_path) -> Iterator[Parties]:
    made = Parties(tmp_path)
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path) -> Iterator[Parties]:
    made = Parties(tmp_path, pinned(privacy=None))
    yield made
    made.close()


def refuses(parties: Parties, statement: RoundStatement, error: type[AggregatorRefusal]) -> None:
    """Both stages refuse, and afterwards nothing has been signed or charged."""
    with pytest.raises(error):
        parties[1].contribute(statement)
    others = [
        make_contribution(statement, parties.configs[i - 1], parties.keys[i - 1], parties.layout, parties.random)
        for i in parties.indices
        if i in statement.contributors
    ]
    with pytest.raises(error):
        parties[1].commit(statement, [one.for_receiver(1) for one in others])


# --- parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weaker",
    [
        {"noise_multiplier": 3.99},
        {"noise_multiplier": 0.0},
        {"bound": 2**16 - 1},
        {"fraction_bits": 15, "bound": 2**16},
        {"fraction_bits": 17, "bound": 2**17},
        {"max_weight": 2},
        {"indicator_noise_multiplier": 10.0},
    ],
    ids=str,
)
def test_parameters_weaker_than_the_pinned_ones_are_refused(tmp_path, weaker):
    parties = Parties(tmp_path, pinned(max_weight=3))
    uploads = parties.uploads(range(3))
    parameters = parties.parameters.round_parameters().model_copy(update=weaker)
    with pytest.raises(ParametersBelowPinned):
        parties[1].contribute(parties.statement(uploads, parameters=parameters))
    with pytest.raises(ParametersBelowPinned):
        parties[1].commit(parties.statement(uploads, parameters=parameters, contributors=()), [])
    parties.close()


def test_more_noise_than_pinned_is_accepted(parties):
    uploads = parties.uploads(range(3))
    parameters = parties.parameters.round_parameters()
    more = parameters.model_copy(update={"noise_multiplier": 8.0, "bound": 2**17, "max_weight": 2})
    assert len(parties.commit(parties.statement(uploads, parameters=more))) == 5


@pytest.mark.parametrize("contributors", [(), (1,), (1, 2), (1, 1, 2), (2, 1, 3), (1, 2, 9)], ids=str)
def test_contributors_whose_noise_would_not_suffice_are_refused(parties, contributors):
    uploads = parties.uploads(range(3))
    statement = parties.statement(uploads, contributors=contributors)
    with pytest.raises(ContributorsRefused):
        parties[1].contribute(statement)
    with pytest.raises(ContributorsRefused):
        parties[1].commit(statement, [])


def test_noise_is_asked_of_contributors_only(parties):
    uploads = parties.uploads(range(3))
    with pytest.raises(ContributorsRefused):
        parties[4].contribute(parties.statement(uploads, contributors=(1, 2, 3)))
    assert len(parties.commit(parties.statement(uploads, contributors=(1, 2, 3)))) == 5


def test_noise_that_is_too_coarse_for_integers_is_refused(tmp_path):
    """Below three steps of the grid a sum of discrete Gaussians is not accounted for; so for the indicator's noise."""
    for name, changes in {
        "update": {"fraction_bits": 0, "privacy": pinned_privacy(noise_multiplier=5.1)},
        "indicator": {"indicator": True, "privacy": pinned_privacy(indicator_noise_multiplier=5.1)},
    }.items():
        parties = Parties(tmp_path / name, pinned(**changes))
        uploads = parties.uploads(range(3))
        with pytest.raises(ParametersBelowPinned, match="below 3 grid steps"):
            parties[1].contribute(parties.statement(uploads))
        # With fewer contributors each draws more: 5.1 / sqrt(1) is enough.
        assert parties[1].contribute(parties.statement(uploads, contributors=(1, 2, 3)))
        parties.close()


def test_a_task_without_noise_has_no_contributors(plain):
    statement = plain.statement(plain.uploads(range(3))).model_copy(update={"contributors": (1, 2, 3)})
    with pytest.raises(ContributorsRefused):
        plain[1].contribute(statement)


# --- sets ------------------------------------------------------------------------------------------------------


def test_a_cohort_below_the_minimum_is_refused(tmp_path):
    parties = Parties(tmp_path, pinned(min_cohort=3))
    uploads = parties.uploads(range(3))
    refuses(parties, parties.statement(uploads[:2]), CohortTooSmall)
    assert len(parties.commit(parties.statement(uploads))) == 5
    parties.close()


def test_a_report_or_a_device_counts_once_in_a_set(parties):
    uploads = parties.uploads(range(3))
    refuses(parties, parties.statement([*uploads, uploads[0]]), DuplicateEntry)
    second = parties.upload(7, device_id=uploads[0].header.device_id)
    parties.deliver([second])
    refuses(parties, parties.statement([*uploads, second]), DuplicateEntry)


def test_a_weight_beyond_the_stated_largest_is_refused(tmp_path):
    parties = Parties(tmp_path, pinned(max_weight=3))
    uploads = parties.uploads(range(3))
    refuses(parties, parties.statement([*reweighted(uploads[:2], 1), uploads[2].entry(4)]), WeightTooLarge)
    parties.close()


def test_a_sum_that_could_wrap_around_is_refused(tmp_path):
    # The devices' sum by itself, and its noise.
    for name, changes in {
        "sum": {"fraction_bits": 40, "clip_norm": 2.0**19, "privacy": None},
        "noise": {"fraction_bits": 40, "clip_norm": 2.0**14},
    }.items():
        parties = Parties(tmp_path / name, pinned(**changes))
        statement = parties.statement(parties.uploads(range(3)))
        for act in (parties[1].contribute, lambda what, port=parties[1]: port.commit(what, [])):
            with pytest.raises(SumOutOfRange):
                act(statement)
        parties.close()


def test_one_sum_per_round_unless_the_mode_is_buckets(parties):
    uploads = parties.uploads(range(4))
    refuses(parties, parties.statement(uploads[:2], uploads[2:]), PartitionRefused)


def test_a_report_that_was_not_accepted_or_is_described_differently_is_refused(parties):
    uploads = parties.uploads(range(3))
    refuses(parties, parties.statement([*uploads, parties.upload(8)]), UnknownReport)
    for wrong in ({"device_id": hex_id(8, "device")}, {"digest": "00" * 32}):
        entries = [*reweighted(uploads[:2], 1), uploads[2].entry().model_copy(update=wrong)]
        refuses(parties, parties.statement(entries), UnknownReport)


def test_a_report_that_was_summed_is_never_summed_again(plain):
    uploads = plain.uploads(range(3))
    first = plain.run(plain.statement(uploads))[0]
    more = plain.uploads(range(3, 5), round_id=1)
    # What it would have gained: the difference of the two sums is the third device's update.
    gained = first - np.sum([upload.codes for upload in (*uploads[:2],)], axis=0)
    assert gained.tolist() == uploads[2].codes.tolist()
    with pytest.raises(ReportSpent):
        plain[1].commit(plain.statement([*uploads[:2], *more], round_id=1), [])
    assert plain.restart(1).describe()
    with pytest.raises(ReportSpent):
        plain[1].commit(plain.statement([*uploads[:2], *more], round_id=7), [])
    assert plain.run(plain.statement(more, round_id=1))[0].tolist() == (more[0].codes + more[1].codes).tolist()


def test_a_share_is_not_counted_under_two_names(plain):
    uploads = plain.uploads(range(2))
    twin = replace(uploads[0], header=uploads[0].header.model_copy(update={"report_id": hex_id(9, "report")}))
    for index in plain.indices:
        assert plain[index].deliver(0, [twin.share(index)])[0].reason is VerdictReason.CONFLICT
    renamed = replace(twin, header=twin.header.model_copy(update={"assignment_id": hex_id(9, "assign")}))
    assert plain[1].deliver(0, [renamed.share(1)])[0].reason is VerdictReason.UNSEALABLE


def test_one_signature_per_round(plain):
    uploads = plain.uploads(range(4))
    plain[1].commit(plain.statement(uploads[:2]), [])
    for other in (plain.statement(uploads[2:]), plain.statement(uploads[:2], run=1), plain.statement(uploads)):
        with pytest.raises(RoundCommitted):
            plain[1].commit(other, [])
    plain.restart(1)
    with pytest.raises(RoundCommitted):
        plain[1].commit(plain.statement(uploads[2:]), [])


# --- participations and budget -----------------------------------------------------------------------------------


def test_a_device_is_counted_k_times_at_most(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(max_participations=2)))
    device = hex_id(99, "device")
    for round_id in range(3):
        uploads = [parties.upload(10 * round_id + i) for i in range(2)]
        uploads.append(parties.upload(10 * round_id + 5, device_id=device))
        parties.deliver(uploads, round_id)
        statement = parties.statement(uploads, round_id=round_id)
        if round_id < 2:
            parties.run(statement)
            parties.restart(1)
        else:
            refuses(parties, statement, ParticipationsExhausted)
            parties.run(parties.statement(uploads[:2], round_id=round_id))
    parties.close()


def test_participations_are_counted_with_the_signature_whether_or_not_the_sum_is_opened(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(max_participations=1)))
    uploads = parties.uploads(range(2))
    parties.commit(parties.statement(uploads))
    again = [parties.upload(20 + i, device_id=upload.header.device_id) for i, upload in enumerate(uploads)]
    parties.deliver(again, 1)
    refuses(parties, parties.statement(again, round_id=1), ParticipationsExhausted)
    parties.close()


def test_the_budget_is_checked_before_a_signature_and_nothing_is_paid_back(tmp_path):
    # One release of multiplier 4 costs about 0.93 and two 1.35, so that a budget of 1.2 is for one.
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(epsilon=1.2)))
    parties.commit(parties.statement(parties.uploads(range(2))))  # signed, and never opened
    statement = parties.statement(parties.uploads(range(2, 4), round_id=1), round_id=1)
    refuses(parties, statement, BudgetSpent)
    parties.restart(1)
    refuses(parties, statement, BudgetSpent)
    parties.close()


def test_no_more_releases_than_pinned(tmp_path):
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(epsilon=50.0, max_rounds=1)))
    parties.run(parties.statement(parties.uploads(range(2))))
    refuses(parties, parties.statement(parties.uploads(range(2, 4), round_id=1), round_id=1), BudgetSpent)
    parties.close()


# --- runs and noise ----------------------------------------------------------------------------------------------


def test_noise_is_drawn_once_in_a_run_and_repeated_byte_for_byte(parties):
    statement = parties.statement(parties.uploads(range(3)))
    first = parties[1].contribute(statement)
    assert parties[1].contribute(statement) == first
    parties.restart(1)
    assert parties[1].contribute(statement) == first
    parties.commit(statement)
    assert parties[1].contribute(statement) == first


def test_a_run_belongs_to_one_statement_and_later_ones_replace_it(parties):
    uploads = parties.uploads(range(4))
    parties[1].contribute(parties.statement(uploads, run=3))
    for stale in (parties.statement(uploads[:3], run=3), parties.statement(uploads, run=2)):
        refuses(parties, stale, StaleRun)
    restarted = parties.statement(uploads, run=4, contributors=(1, 2, 3, 4))
    assert parties[1].contribute(restarted) == parties[1].contribute(restarted)
    refuses(parties, parties.statement(uploads, run=3), StaleRun)


def test_there_is_no_restart_after_a_signature(parties):
    uploads = parties.uploads(range(3))
    parties.commit(parties.statement(uploads), by=[1])
    refuses(parties, parties.statement(uploads, run=1), RoundCommitted)
    refuses(parties, parties.statement(uploads, run=1, contributors=(1, 2, 3)), RoundCommitted)


def replaced(parties: Parties, statement: RoundStatement, sender: int, noise: NoiseContribution) -> list[NoiseShare]:
    """The noise for aggregator 1, with one contribution replaced."""
    contributions = parties.contributions(statement)
    contributions[sender - 1] = noise
    return [one.for_receiver(1) for one in contributions]


def test_noise_of_another_statement_is_refused(parties):
    uploads = parties.uploads(range(4))
    statement = parties.statement(uploads[:3], run=1)
    others = {
        "round": parties.statement(uploads[:3], round_id=1, run=1),
        "run": parties.statement(uploads[:3], run=0),
        "contributors": parties.statement(uploads[:3], run=1, contributors=(1, 2, 3)),
        "set": parties.statement(uploads, run=1),
        "weights": parties.statement([*uploads[:2], uploads[2].entry(2)], run=1),
        "parameters": parties.statement(
            uploads[:3],
            run=1,
            parameters=parties.parameters.round_parameters().model_copy(update={"noise_multiplier": 5.0}),
        ),
    }
    for what, other in others.items():
        replayed = make_contribution(other, parties.configs[1], parties.keys[1], parties.layout, parties.random)
        with pytest.raises(NoiseRejected):
            parties[1].commit(statement, replaced(parties, statement, 2, replayed))
        # Nor does it help to claim that it was made for this one: the signature says otherwise.
        claimed = replayed.header.model_copy(update={"statement_sha256": statement.sha256})
        with pytest.raises(NoiseRejected, match="not signed"):
            (
                parties[1].commit(
                    statement, replaced(parties, statement, 2, NoiseContribution(claimed, replayed.sealed))
                ),
                what,
            )


def test_noise_that_another_made_is_refused(parties):
    statement = parties.statement(parties.uploads(range(3)))
    honest = parties[2].contribute(statement)
    # The coordinator draws the noise itself, so that it knows it, and signs by a colluder's key or by its own.
    for keys in (parties.keys[2], AggregatorKeys.generate()):
        forged = make_contribution(statement, parties.configs[1], keys, parties.layout, parties.random)
        with pytest.raises(NoiseRejected, match="not signed"):
            parties[1].commit(statement, replaced(parties, statement, 2, forged))
    swapped = NoiseContribution(honest.header, honest.sealed[::-1])
    with pytest.raises(NoiseRejected, match="not what it sealed"):
        parties[1].commit(statement, replaced(parties, statement, 2, swapped))
    with pytest.raises(NoiseRejected):
        parties[1].commit(statement, replaced(parties, statement, 2, parties[3].contribute(statement)))


def test_noise_of_a_contributor_is_neither_dropped_nor_doubled_nor_added(parties):
    statement = parties.statement(parties.uploads(range(3)), contributors=(1, 2, 3, 4))
    mine = [one.for_receiver(1) for one in parties.contributions(statement)]
    for wrong in (mine[:3], [*mine, mine[0]], [mine[0], mine[0], mine[2], mine[3]], mine[::-1], []):
        with pytest.raises(NoiseRejected):
            parties[1].commit(statement, wrong)


# --- the quorum ----------------------------------------------------------------------------------------------------


def test_an_answer_takes_a_quorum_of_distinct_pinned_keys_over_the_same_statement(parties):
    uploads = parties.uploads(range(4))
    statement = parties.statement(uploads)
    signatures = parties.commit(statement)
    other = parties.statement(uploads[:3])

    def signed(index: int, what: RoundStatement, round_id: int = 0) -> CommitSignature:
        unsigned = CommitSignature(index=index, round_id=round_id, statement_sha256=what.sha256, signature=UNSIGNED)
        return parties.keys[index - 1].sign(unsigned)

    assert signed(4, statement) == signatures[3], "what follows is signed in the right way"
    stranger = AggregatorKeys.generate().sign(signatures[3])
    for fourth in (
        signatures[2],
        signatures[3].model_copy(update={"signature": UNSIGNED}),
        signatures[2].model_copy(update={"index": 4}),
        signatures[3].model_copy(update={"index": 9}),
        stranger,
        signed(4, other),
        signed(4, other).model_copy(update={"statement_sha256": statement.sha256}),
        signed(4, statement, round_id=1),
    ):
        with pytest.raises(QuorumMissing):
            parties[1].answer(0, [*signatures[:3], fourth])
        with pytest.raises(QuorumMissing):
            parties[1].answer(0, [*signatures[:3], *[fourth] * 3])
    assert parties[1].answer(0, [*signatures[:3], stranger, signatures[3]])


def split_view(folder: Path, parameters: PinnedParameters) -> list[np.ndarray]:
    """What a coordinator opens that shows aggregators different sets, with aggregators 1 and 2 on its side.

    The two accomplices have two stores each, so that they sign both sets. Aggregator 3 is shown the set with device 3,
    aggregators 4 and 5 the one without.
    """
    parties = Parties(folder, parameters)
    uploads = parties.uploads(range(4))
    views = [uploads, uploads[:3]]
    opened = []
    for name, view, honest in zip("ab", views, ([3], [4, 5]), strict=True):
        second = [
            Aggregator(parties.configs[i], parties.keys[i], AggregatorStore(folder / f"{name}-{i}")) for i in (0, 1)
        ]
        statement = parties.statement(view)
        for aggregator, index in zip(second, (1, 2), strict=True):
            aggregator.deliver(0, [upload.share(index) for upload in uploads])
        signers = [*second, *(parties[i] for i in honest)]
        signatures = [signer.commit(statement, []) for signer in signers]
        with suppress(QuorumMissing):
            opened += parties.open([signer.answer(0, signatures) for signer in signers[:3]])
    parties.close()
    return opened


def test_two_accomplices_and_a_split_view_open_one_set_at_most(tmp_path):
    careless = pinned(privacy=None, quorum=3, assume_consistent_coordinator=True)
    with_device, without = split_view(tmp_path / "careless", careless)
    assert (with_device - without).tolist() == default_codes(3, with_device.size), "what a smaller quorum gives away"
    assert len(split_view(tmp_path / "safe", pinned(privacy=None))) <= 1


@pytest.mark.parametrize(("quorum", "sums"), [(None, 3), (5, 2)], ids=["4 of 5", "5 of 5"])
def test_how_far_accomplices_get_beyond_the_pinned_number_of_sums(tmp_path, quorum, sums):
    """Each honest aggregator signs two; the coordinator asks only as many as it needs, each time others."""
    privacy = pinned_privacy(
        noise="devices", device_noise_variance=str(Fraction(4 * 2**16) ** 2 / 2), honest_devices=2, max_rounds=2
    )
    parties = Parties(tmp_path, pinned(privacy=privacy, quorum=quorum), live=[3, 4, 5])
    assert parties.parameters.overrun == Fraction(sums, 2)
    opened = 0
    for round_id, asked in enumerate(((3, 4), (4, 5), (3, 5), (3, 4), (4, 5), (3, 5))):
        uploads = [parties.upload(10 * round_id + i) for i in range(2)]
        parties.deliver(uploads, round_id, to=[3, 4, 5])
        statement = parties.statement(uploads, round_id=round_id)
        honest = asked if quorum is None else (3, 4, 5)
        unsigned = CommitSignature(index=1, round_id=round_id, statement_sha256=statement.sha256, signature=UNSIGNED)
        accomplices = [parties.keys[i - 1].sign(unsigned.model_copy(update={"index": i})) for i in (1, 2)]
        with suppress(BudgetSpent):
            signatures = [*accomplices, *parties.commit(statement, [], by=honest)]
            opened += bool(parties[honest[0]].answer(round_id, signatures).payload)
    assert opened == sums
    parties.close()


# --- the rest ------------------------------------------------------------------------------------------------------


def test_in_buckets_each_part_is_large_enough_and_disjoint(tmp_path):
    parameters = pinned(checking=CheckingMode.BUCKETS, max_parts=2, min_cohort=4, min_bucket=2)
    parties = Parties(tmp_path, parameters)
    uploads = parties.uploads(range(6))
    refuses(parties, parties.statement(uploads[:5], uploads[5:]), CohortTooSmall)
    refuses(parties, parties.statement(uploads[:3]), CohortTooSmall)
    refuses(parties, parties.statement(uploads[:4], uploads[3:]), DuplicateEntry)
    refuses(parties, parties.statement(uploads[:2], uploads[2:4], uploads[4:]), PartitionRefused)
    assert len(parties.run(parties.statement(uploads[:3], uploads[3:]))) == 2
    parties.close()


def test_what_an_aggregator_pins_is_signed(parties):
    info = parties[1].describe()
    weaker = info.parameters.model_copy(update={"min_cohort": 9})
    forged = AggregatorInfo(**{**{name: getattr(info, name) for name in type(info).model_fields}, "parameters": weaker})
    assert not parties.configs[0].signed(1, forged.signed_bytes(), forged.signature)
