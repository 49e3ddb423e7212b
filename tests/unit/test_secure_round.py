"""The coordinator's secure round over aggregators that fail, lie or die: the right bits, or nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.secure import encode_shares
from client_sdk.protocol.shamir import share_seeded
from server_ref.secure.errors import (
    AnswersInconsistent,
    BudgetSpent,
    CohortTooSmall,
    NotEnoughAggregators,
    ParametersBelowPinned,
    ReportSpent,
    RoundAbandoned,
    RoundCommitted,
    SecureRoundError,
)
from server_ref.secure.identity import AggregatorKeys
from server_ref.secure.integer_krum import integer_krum
from server_ref.secure.messages import AggregateShare, CheckAnswer
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.round_messages import Parity, Phase, RoundState
from tests.secure_parties import Parties, Upload, pinned, pinned_privacy, quick_store
from tests.secure_rounds import OPERATIONS, Coordinator, plain_sum, reports

LONG_RUN = {"max_rounds": 1000, "epsilon": 100.0}
STEPS = [(operation, after) for operation in OPERATIONS for after in (False, True)]


def step_name(value: object) -> str:
    return {True: "after", False: "before"}.get(value, value)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def exact_parties(tmp_path_factory) -> Iterator[Parties]:
    """Three of five, without noise: a sum can be compared with plain integers."""
    parties = Parties(tmp_path_factory.mktemp("exact"), pinned(privacy=None, max_weight=1000), open_store=quick_store)
    yield parties
    parties.close()


@pytest.fixture(scope="module")
def noisy_parties(tmp_path_factory) -> Iterator[Parties]:
    """Three of five, with noise by the aggregators."""
    privacy = pinned_privacy(**LONG_RUN)
    parties = Parties(tmp_path_factory.mktemp("noisy"), pinned(privacy=privacy), open_store=quick_store)
    yield parties
    parties.close()


@pytest.fixture
def exact(exact_parties) -> Iterator[Coordinator]:
    coordinator = Coordinator(exact_parties)
    yield coordinator
    coordinator.secure.close()


@pytest.fixture
def noisy(noisy_parties) -> Iterator[Coordinator]:
    coordinator = Coordinator(noisy_parties)
    yield coordinator
    coordinator.secure.close()


@pytest.fixture
def with_parameters(tmp_path) -> Iterator:
    """Makes coordinators over parties of their own."""
    made = []

    def make(parameters=None, own=None, **options) -> Coordinator:
        parties = Parties(tmp_path / str(len(made)), parameters, own=own, open_store=quick_store)
        made.append(parties)
        return Coordinator(parties, **options)

    yield make
    for parties in made:
        parties.close()


# --- the sum -----------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(data=st.data())
def test_the_sum_is_that_of_plain_integers_for_every_cohort_weight_and_order(exact_parties, data):
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=2, max_size=5))
    order = data.draw(st.permutations(range(len(weights))))
    coordinator = Coordinator(exact_parties)
    made = coordinator.uploads(len(weights))
    made, weights = [made[i] for i in order], [weights[i] for i in order]
    found = coordinator.run(made, weights)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made, weights))
    assert found.total_weights == (sum(weights),)
    assert found.counted == (tuple(u.header.report_id for u in made),)
    coordinator.secure.close()


@pytest.mark.parametrize(
    "changes", [{"packing": 2}, {"field": "m127"}, {"num_aggregators": 3, "threshold": 2}], ids=lambda c: next(iter(c))
)
def test_other_schemes_give_the_same_sum(with_parameters, changes):
    coordinator = with_parameters(pinned(privacy=None, **changes))
    made = coordinator.uploads()
    np.testing.assert_array_equal(coordinator.run(made).sums[0], plain_sum(made))


def test_each_part_of_a_partition_is_summed_by_itself(with_parameters):
    parameters = pinned(checking=CheckingMode.BUCKETS, max_parts=2, min_cohort=4, min_bucket=2, privacy=None)
    coordinator = with_parameters(parameters)
    made = coordinator.uploads(5)
    found = coordinator.secure.run(0, reports(made, parts=[0, 1, 0, 1, 1]))
    np.testing.assert_array_equal(found.sums[0], plain_sum([made[0], made[2]]))
    np.testing.assert_array_equal(found.sums[1], plain_sum([made[1], made[3], made[4]]))
    assert found.total_weights == (2, 3)


def test_a_round_with_noise_is_noised_once_and_charged_once(noisy):
    made = noisy.uploads()
    first = noisy.run(made)
    noisy.replace()
    again = noisy.run(made)
    np.testing.assert_array_equal(first.sums[0], again.sums[0])
    # The standard deviation is 4 x 2**16 in each of six coordinates.
    assert np.abs(first.sums[0] - plain_sum(made)).max() > 1
    assert first.statement.contributors == (1, 2, 3, 4, 5)
    assert noisy.charges() == 5


def test_a_schedule_may_ask_for_more_noise_but_not_for_less(noisy):
    found = noisy.run(noisy.uploads(), noise_multiplier=6.0)
    assert found.statement.parameters.noise_multiplier == 6.0
    noisy.next_round()
    with pytest.raises(ParametersBelowPinned, match="noise_multiplier 3 is below the pinned 4"):
        noisy.run(noisy.uploads(), noise_multiplier=3.0)


def test_the_indicator_is_summed_beside_the_update(with_parameters):
    privacy = pinned_privacy(indicator_noise_multiplier=100.0, **LONG_RUN)
    coordinator = with_parameters(pinned(indicator=True, privacy=privacy))
    found = coordinator.run([coordinator.upload(clip_norm=norm) for norm in (1.0, 3.0, 2.0)])
    assert found.sums[0].shape == (6,)
    assert found.indicator_sums is not None
    # The noise covers the largest norm that a counted device was given.
    assert found.statement.parameters.bound == 3 * 2**16


# --- aggregators that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "after"), [s for s in STEPS if s[0] != "contribute"], ids=step_name)
def test_one_aggregator_may_fail_at_any_step(exact, operation, after):
    """Four of five are a quorum."""
    made = exact.uploads()
    exact.port(2).fail_at(operation, after=after)
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["answered"] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("operation", "after"), [s for s in STEPS if s[0] in {"check", "contribute", "commit"}], ids=step_name
)
def test_who_fails_before_its_noise_is_there_does_not_contribute(noisy, operation, after):
    noisy.port(2).fail_at(operation, after=after)
    found = noisy.run(noisy.uploads())
    expected = [1, 2, 3, 4, 5] if operation == "commit" else [1, 3, 4, 5]
    assert found.measurements["contributors"] == expected
    assert found.measurements["run"] == (operation != "commit")


@pytest.mark.parametrize(("operation", "after"), [s for s in STEPS if s[0] != "answer"], ids=step_name)
def test_two_failures_before_the_quorum_release_nothing_and_the_round_is_finished_later(noisy, operation, after):
    made = noisy.uploads()
    for index in (2, 4):
        noisy.port(index).fail_at(operation, after=after)
    with pytest.raises(NotEnoughAggregators) as caught:
        noisy.run(made)
    assert set(caught.value.live) == {1, 3, 5}
    assert all("answer" not in port.calls for port in noisy.ports)
    noisy.recover()
    noisy.replace()
    noisy.run(made)
    assert noisy.charges() == 5


def test_once_a_quorum_has_signed_three_answers_are_enough_and_two_are_not(exact):
    made = exact.uploads()
    for index in (1, 3):
        exact.port(index).fail_at("answer")
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["integrity"] == "unchecked"
    exact.port(5).down = True
    with pytest.raises(NotEnoughAggregators, match="open a sum takes 3 aggregators, 2 take part"):
        exact.run(made)
    exact.port(5).down = False
    np.testing.assert_array_equal(exact.run(made).sums[0], plain_sum(made))


def test_who_was_away_signs_later_when_signers_are_gone(exact):
    made = exact.uploads()
    exact.port(1).fail_at("commit")
    exact.run(made)
    exact.recover()
    for index in (2, 3):
        exact.port(index).down = True
    # Of the four signers two are left; aggregator 1 holds the reports, and signs now.
    np.testing.assert_array_equal(exact.run(made).sums[0], plain_sum(made))


def test_an_aggregator_that_lost_its_reports_gets_them_again(exact):
    made = exact.uploads()
    exact.secure.deliver(exact.round_id, reports(made))
    with exact.parties.stores[2].transaction() as connection:
        connection.exec_driver_sql("DELETE FROM reports")
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["signed"] == [1, 2, 3, 4, 5]


def test_reports_that_were_passed_on_early_are_not_sent_again(exact):
    made = exact.uploads()
    exact.secure.deliver(exact.round_id, reports(made))
    exact.run(made)
    assert [port.calls.count("deliver") for port in exact.ports] == [1] * 5


# --- aggregators that lie ----------------------------------------------------------------------------------------


def tampered(parties: Parties, position: int = 0):
    """Adds 1 to an element of an answer, as something on the way would."""

    def alter(answer: AggregateShare) -> AggregateShare:
        field = parties.layout.scheme.field
        vector = field.from_bytes(answer.payload)
        vector[position] = field.add(vector[position : position + 1], field.from_ints([1]))[0]
        return replace(answer, payload=field.to_bytes(vector))

    return alter


def made_up(parties: Parties, index: int, position: int = 0):
    """As ``tampered``, by an aggregator that signs what it made up."""

    def alter(answer: AggregateShare) -> AggregateShare:
        changed = tampered(parties, position)(answer)
        header = changed.header.model_copy(update={"payload_sha256": hashlib.sha256(changed.payload).hexdigest()})
        return replace(changed, header=parties.keys[index - 1].sign(header))

    return alter


def test_one_wrong_answer_of_five_is_named_and_left_out(exact, caplog):
    made = exact.uploads()
    exact.port(4).alter["answer"] = made_up(exact.parties, 4)
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["integrity"] == "corrected"
    assert found.measurements["tampered"] == [4]
    assert f"aggregator 4 answered round {exact.round_id} wrongly" in caplog.text


def test_one_wrong_answer_of_four_is_detected_and_nothing_comes_of_it(exact):
    made = exact.uploads()
    exact.port(1).down = True
    exact.port(4).alter["answer"] = made_up(exact.parties, 4)
    with pytest.raises(AnswersInconsistent) as caught:
        exact.run(made)
    assert caught.value.answered == (2, 3, 4, 5)
    exact.port(1).recover()
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["tampered"] == [4]


def test_two_wrong_answers_of_five_are_detected(exact):
    for index in (2, 4):
        exact.port(index).alter["answer"] = made_up(exact.parties, index, position=index)
    with pytest.raises(AnswersInconsistent, match="at most 1 wrong ones can be located"):
        exact.run(exact.uploads())


def test_a_wrong_answer_in_one_part_only_is_located_too(with_parameters):
    parameters = pinned(checking=CheckingMode.BUCKETS, max_parts=2, min_cohort=4, min_bucket=2, privacy=None)
    coordinator = with_parameters(parameters)
    made = coordinator.uploads(4)
    coordinator.port(3).alter["answer"] = made_up(coordinator.parties, 3, position=6 + 2)
    found = coordinator.secure.run(0, reports(made, parts=[0, 0, 1, 1]))
    np.testing.assert_array_equal(found.sums[1], plain_sum(made[2:]))
    assert found.measurements["tampered"] == [3]


@pytest.mark.parametrize("operation", ["challenge_reveal", "check", "contribute", "commit", "answer"])
def test_what_a_pinned_key_did_not_sign_counts_as_no_answer(noisy, operation):
    forger = noisy.parties.keys[1]

    def forged(answer):
        framed = operation in {"contribute", "answer"}
        return replace(answer, header=forger.sign(answer.header)) if framed else forger.sign(answer)

    noisy.port(3).alter[operation] = forged
    found = noisy.run(noisy.uploads())
    who = {"contribute": "contributors", "commit": "signed", "answer": "answered"}.get(operation)
    if who is None:
        assert found.measurements["parity"] == {"challenge_reveal": "cut short", "check": "checked"}[operation]
    else:
        assert found.measurements[who] == [1, 2, 4, 5]


def test_what_was_changed_on_the_way_is_dropped_before_anything_is_computed(exact):
    made = exact.uploads()
    exact.port(4).alter["answer"] = tampered(exact.parties)
    found = exact.run(made)
    assert found.measurements["answered"] == [1, 2, 3, 5]
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))


def test_noise_that_was_changed_on_the_way_is_not_passed_on(noisy):
    noisy.port(3).alter["contribute"] = lambda noise: replace(noise, sealed=noise.sealed[::-1])
    assert noisy.run(noisy.uploads()).measurements["contributors"] == [1, 2, 4, 5]


def test_an_answer_to_another_round_is_no_answer(exact):
    kept = []
    exact.port(2).alter["answer"] = lambda answer: kept.append(answer) or answer
    exact.run(exact.uploads())
    exact.next_round()
    exact.port(2).alter["answer"] = lambda _: kept[0]
    made = exact.uploads()
    found = exact.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["answered"] == [1, 3, 4, 5]


def test_an_aggregator_that_spoils_the_check_of_all_reports_is_left_out_instead_of_them(noisy):
    def spoiled(answer: CheckAnswer) -> CheckAnswer:
        field = noisy.parties.layout.scheme.field
        values = field.from_bytes(bytes.fromhex("".join(answer.values)))
        changed = field.add(values, field.from_ints([1] * len(values)))
        texts = tuple(field.to_bytes(changed[i : i + 1]).hex() for i in range(len(changed)))
        return noisy.parties.keys[1].sign(answer.model_copy(update={"values": texts}))

    noisy.port(2).alter["check"] = spoiled
    found = noisy.run(noisy.uploads())
    assert found.rejected == {}
    assert found.measurements["contributors"] == [1, 3, 4, 5]


def test_an_aggregator_that_refuses_all_reports_is_left_out_instead_of_them(noisy):
    noisy.port(5).alter["deliver"] = lambda verdicts: tuple(
        verdict.model_copy(update={"reason": "unsealable"}) for verdict in verdicts
    )
    found = noisy.run(noisy.uploads())
    assert found.rejected == {}
    assert found.measurements["contributors"] == [1, 2, 3, 4]


def test_who_pins_other_parameters_does_not_take_part(with_parameters):
    coordinator = with_parameters(pinned(privacy=None), own={5: pinned(min_cohort=3, privacy=None)})
    made = coordinator.uploads()
    found = coordinator.run(made)
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.measurements["missing"] == {5: "TaskMismatch"}


@pytest.mark.parametrize("signer", [1, 2], ids=["another", "itself"])
def test_who_shows_other_keys_than_those_that_are_pinned_does_not_take_part(noisy, signer):
    """By itself: after a change of its sealing key that the others know nothing of."""
    keys, other = noisy.parties.keys, AggregatorKeys.generate()
    shown = {"sealing_key": other.public.sealing_key} if signer == 2 else {"signing_key": keys[0].public.signing_key}
    noisy.port(2).alter["bind"] = lambda info: keys[signer - 1].sign(info.model_copy(update=shown))
    found = noisy.run(noisy.uploads())
    assert found.measurements["missing"] == {2: "AnswerRejected"}
    assert found.measurements["answered"] == [1, 3, 4, 5]


# --- devices that send nonsense ----------------------------------------------------------------------------------


def crooked(coordinator: Coordinator, at: int) -> Upload:
    """A device whose share for one aggregator does not fit the others', though each is well formed."""
    parties, layout = coordinator.parties, coordinator.parties.layout
    upload = coordinator.upload()
    shares, others = (
        encode_shares(share_seeded(layout.secret(codes, bytes(32)), layout.scheme), layout)
        for codes in (upload.codes, upload.codes + 1)
    )
    shares[at - 1] = others[at - 1]
    return parties.seal(upload.header.model_dump(exclude={"ciphertext_ids"}), shares, upload.codes)


@pytest.mark.parametrize("at", [1, 4])
def test_a_report_whose_shares_do_not_fit_together_does_not_count(exact, at):
    made = exact.uploads()
    bad = crooked(exact, at)
    found = exact.run([*made, bad])
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.rejected == {bad.header.report_id: "parity"}
    assert found.measurements["parity"] == "checked"


def test_without_the_check_such_a_report_makes_an_aggregator_look_wrong(exact_parties):
    coordinator = Coordinator(exact_parties, parity=Parity.OFF)
    found = coordinator.run([*coordinator.uploads(), crooked(coordinator, at=4)])
    coordinator.secure.close()
    assert found.measurements["tampered"] == [4]


def test_an_unreadable_report_does_not_count_and_the_reason_is_kept(exact):
    made = exact.uploads()
    bad = exact.upload()
    broken = replace(bad, ciphertexts=(*bad.ciphertexts[:2], bytes(len(bad.ciphertexts[2])), *bad.ciphertexts[3:]))
    found = exact.run([*made, broken])
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))
    assert found.rejected == {bad.header.report_id: "header-mismatch"}
    exact.replace()
    assert exact.run([*made, broken]).rejected == found.rejected


def test_too_few_sound_reports_are_no_cohort_and_more_may_still_come(exact):
    made, bad = exact.uploads(2), crooked(exact, at=1)
    with pytest.raises(CohortTooSmall):
        exact.run([made[0], bad])
    assert exact.run([made[0], bad, made[1]]).counted == (tuple(u.header.report_id for u in made),)


@pytest.mark.parametrize("operation", ["challenge_reveal", "check"])
def test_a_required_check_waits_for_who_cuts_it_short(with_parameters, operation):
    coordinator = with_parameters(pinned(num_aggregators=4, privacy=None), parity=Parity.REQUIRED)
    made = coordinator.uploads()
    coordinator.port(1).fail_at(operation)
    with pytest.raises(SecureRoundError):
        coordinator.run(made)
    coordinator.recover()
    coordinator.replace()
    found = coordinator.run(made)
    assert found.measurements["parity"] == "checked"
    np.testing.assert_array_equal(found.sums[0], plain_sum(made))


@pytest.mark.parametrize("threshold", [2, 3])
def test_an_update_that_is_longer_than_it_claims_does_not_count_in_the_mode_projections(with_parameters, threshold):
    parameters = pinned(checking=CheckingMode.PROJECTIONS, threshold=threshold, privacy=None)
    coordinator = with_parameters(parameters, parity=Parity.OFF)
    made = coordinator.uploads()
    bound = parameters.bounds.norm_bound
    longest = coordinator.parties.upload(900, [bound, 0, 0, 0, 0, 0])
    too_long = coordinator.parties.upload(901, [bound, 1, 0, 0, 0, 0])
    wraps_around = coordinator.parties.upload(902, [2**60 - 7, 0, 0, 0, 0, 0])
    found = coordinator.run([*made, longest, too_long, wraps_around])
    np.testing.assert_array_equal(found.sums[0], plain_sum([*made, longest]))
    assert found.rejected == {u.header.report_id: "projections" for u in (too_long, wraps_around)}


@pytest.mark.parametrize("operation", ["deal_zero_keys", "open_projections"])
def test_projections_wait_for_all_that_they_need(with_parameters, operation):
    coordinator = with_parameters(pinned(checking=CheckingMode.PROJECTIONS, privacy=None))
    made = coordinator.uploads()
    coordinator.port(2).fail_at(operation)
    with pytest.raises(NotEnoughAggregators, match="open projections and norms takes 5"):
        coordinator.run(made)
    coordinator.recover()
    coordinator.replace()
    np.testing.assert_array_equal(coordinator.run(made).sums[0], plain_sum(made))


def test_keys_that_the_dealer_did_not_sign_are_not_passed_on(with_parameters):
    coordinator = with_parameters(pinned(checking=CheckingMode.PROJECTIONS, privacy=None))
    coordinator.port(1).alter["deal_zero_keys"] = lambda keys: replace(keys, sealed=keys.sealed[::-1])
    with pytest.raises(NotEnoughAggregators, match="the keys of aggregator 1 are missing"):
        coordinator.run(coordinator.uploads())


def krum(distances, count):
    """Multi-Krum over integers: half of the reports, by the rule that is used on plain updates."""
    return integer_krum(distances, count, 1, m=count - 3).selected


DISTANCES = {
    "checking": CheckingMode.PROJECTIONS,
    "distances": True,
    "privacy": None,
    "num_aggregators": 3,
    "threshold": 2,
}


def test_a_rule_selects_on_shares_what_it_selects_on_plain_updates(with_parameters):
    coordinator = with_parameters(pinned(**DISTANCES), select=krum)
    codes = [[i, 2, 3, 4, 5, 6] for i in (0, 1, 2, 40, 4, 5, 90)]
    made = [coordinator.parties.upload(700 + i, each) for i, each in enumerate(codes)]
    plain = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in itertools.combinations(codes, 2)]
    expected = [made[i] for i in sorted(krum(plain, len(codes)))]
    found = coordinator.run(made)
    assert found.counted == (tuple(u.header.report_id for u in expected),)
    np.testing.assert_array_equal(found.sums[0], plain_sum(expected))
    assert set(found.rejected.values()) == {"not-selected"}
    coordinator.replace()
    assert coordinator.run(made).counted == found.counted


def test_a_cohort_that_was_begun_stays_the_same(with_parameters):
    coordinator = with_parameters(pinned(**DISTANCES), select=krum)
    made = coordinator.uploads(6)
    coordinator.port(2).fail_at("compare", after=True)
    with pytest.raises(NotEnoughAggregators, match="open distances takes 3"):
        coordinator.run(made)
    coordinator.recover()
    coordinator.replace()
    late = coordinator.upload()
    found = coordinator.run([*made, late])
    assert found.rejected[late.header.report_id] == "not-compared"
    assert len(found.counted[0]) == 3


def test_a_rule_needs_distances_that_are_pinned(with_parameters):
    with pytest.raises(ConfigurationError, match="do not pin distances"):
        with_parameters(pinned(**DISTANCES | {"distances": False}), select=krum)


# --- a coordinator that dies -------------------------------------------------------------------------------------


class Killed(BaseException):
    """The coordinator ends here."""


class Countdown:
    """Kills at the n-th event."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def test_a_coordinator_killed_at_any_step_is_replaced_by_one_that_reaches_the_same_release(noisy_parties):
    """A step is each save of the journal, before and after it, and each answer of one aggregator."""
    step, killed = 0, True
    while killed:
        step += 1
        coordinator = Coordinator(noisy_parties)
        countdown = Countdown(step)
        coordinator.port(1).after = dict.fromkeys(OPERATIONS, countdown)
        save = coordinator.journal.save

        def dying(round_id: int, state_json: str, save=save, countdown=countdown) -> None:
            countdown()
            save(round_id, state_json)
            countdown()

        coordinator.journal.save = dying
        made = coordinator.uploads(2)
        try:
            coordinator.run(made)
        except Killed:
            pass
        else:
            killed = False
        coordinator.journal.save = save
        coordinator.recover()
        coordinator.replace()
        states = coordinator.journal.states
        fixed = coordinator.round_id in states and coordinator.state().statement is not None
        # What came in the meantime belongs to the next round, once the set is fixed.
        all_of_them = [*made, coordinator.upload()]
        found = coordinator.run(all_of_them)
        assert found.counted[0] == tuple(u.header.report_id for u in (made if fixed else all_of_them))
        assert coordinator.run(all_of_them).sums[0].tolist() == found.sums[0].tolist()
        assert coordinator.charges() == 5
        coordinator.secure.close()
    assert step > 12


def test_once_somebody_may_have_signed_no_other_run_is_begun(noisy):
    """The coordinator dies among the signatures, and then a contributor is away: its noise cannot be done without."""
    made = noisy.uploads()
    noisy.port(1).after["commit"] = Countdown(1)
    with pytest.raises(Killed):
        noisy.run(made)
    noisy.recover()
    noisy.replace()
    noisy.port(5).down = True
    with pytest.raises(NotEnoughAggregators, match="the noise of a contributor that does not answer is missing"):
        noisy.run(made)
    assert noisy.state().phase is Phase.COMMITTING
    noisy.recover()
    found = noisy.run(made)
    assert (found.statement.run, found.statement.contributors) == (0, (1, 2, 3, 4, 5))
    assert noisy.charges() == 5


def test_a_coordinator_that_lost_its_journal_gets_no_second_sum(noisy):
    made = noisy.uploads()
    found = noisy.run(made)
    noisy.journal.states.clear()
    noisy.replace()
    with pytest.raises(RoundCommitted):
        noisy.run([*made, noisy.upload()])
    noisy.journal.states.clear()
    np.testing.assert_array_equal(noisy.run(made).sums[0], found.sums[0])
    assert noisy.charges() == 5


def test_a_run_number_that_the_journal_lost_is_caught_up_with(noisy):
    """As after the coordinator's backup was restored."""
    made = noisy.uploads()
    noisy.secure.deliver(noisy.round_id, reports(made))
    statement = noisy.parties.statement(made[:2], round_id=noisy.round_id, run=20)
    noisy.parties[1].contribute(statement)
    assert noisy.run(made).measurements["run"] > 20


def test_an_abandoned_round_stays_abandoned_and_what_was_signed_is_spent(noisy):
    made = noisy.uploads()
    for index in (2, 3):
        noisy.port(index).fail_at("commit")
    with pytest.raises(NotEnoughAggregators):
        noisy.run(made)
    noisy.secure.abandon(noisy.round_id)
    noisy.recover()
    noisy.replace()
    with pytest.raises(RoundAbandoned):
        noisy.run(made)
    noisy.next_round()
    with pytest.raises(ReportSpent):
        noisy.run(made)
    noisy.next_round()
    assert noisy.run(noisy.uploads()).total_weights == (3,)


def test_the_state_of_a_round_is_one_small_json_value(noisy):
    noisy.run(noisy.uploads())
    state = noisy.state()
    assert (state.phase, len(state.signatures)) == (Phase.COMMITTED, 5)
    assert RoundState.model_validate_json(state.model_dump_json()) == state
    assert len(state.model_dump_json()) < 10_000


# --- what the aggregators refuse ---------------------------------------------------------------------------------


def test_a_spent_budget_ends_a_round_before_anything_is_signed(with_parameters):
    coordinator = with_parameters(pinned(privacy=pinned_privacy(max_rounds=1)))
    coordinator.run(coordinator.uploads())
    coordinator.next_round()
    with pytest.raises(BudgetSpent):
        coordinator.run(coordinator.uploads())
    assert coordinator.charges() == 0


@pytest.mark.parametrize(
    ("strangers", "error"), [((3, 4, 5), RoundAbandoned), ((1, 2, 3, 4, 5), RoundCommitted)], ids=["some", "all"]
)
def test_a_round_for_which_others_signed_another_set_is_over(noisy, strangers, error):
    """As after a coordinator that lied: these aggregators sign something else in the meantime."""
    made, others = noisy.uploads(), noisy.uploads()
    for each in (made, others):
        noisy.secure.deliver(noisy.round_id, reports(each))
    lie = noisy.parties.statement(others, round_id=noisy.round_id, run=5, contributors=strangers)
    save = noisy.journal.save

    def meanwhile(round_id: int, state_json: str) -> None:
        save(round_id, state_json)
        if noisy.state().phase is Phase.COMMITTING:
            noisy.parties.commit(lie, by=strangers)

    noisy.journal.save = meanwhile
    with pytest.raises(error):
        noisy.run(made)
    assert all("answer" not in port.calls for port in noisy.ports)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"num_aggregators": 4}, {"correct": True}, "correct a wrong answer needs 5"),
        ({"packing": 2}, {"correct": True}, "correct a wrong answer needs 6"),
        ({"num_aggregators": 3}, {"parity": Parity.REQUIRED}, "check reports needs 4"),
    ],
    ids=["correct", "packed", "check"],
)
def test_what_so_few_aggregators_cannot_do_is_refused_with_what_they_can(with_parameters, changes, options, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        with_parameters(pinned(privacy=None, **changes), **options)
    assert "open a sum" in str(caught.value)


def test_as_many_ports_as_aggregators_are_needed(exact_parties):
    with pytest.raises(ConfigurationError, match="5 aggregators have as many ports"):
        Coordinator(exact_parties, ports=[exact_parties[i] for i in range(1, 5)])
