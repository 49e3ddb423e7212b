"""What a run says of its privacy and secrecy: the claim and against whom, what it leaves out, what it cost."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from client_sdk.protocol.errors import ConfigurationError
from server_ref import status
from server_ref.aggregation.accounting import GaussianRelease
from server_ref.config import TaskConfig
from server_ref.task import load_task
from simulator import report_privacy, tally
from simulator.cli import given_settings, simulate_command
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.prepare import Fleet, Prepared
from simulator.results import PrivacyResult, SecrecyResult, SimulationResults
from simulator.summary import summary_of
from simulator.view import CommittedRound, Measurements, PrivacyClaim, Secrecy
from tests.unit.test_simulator_report import bars_of, config_with, drawn, report, results, round_result, words_of

CLAIM = PrivacyResult(
    noise="server", epsilon=2.0, spent=1.5, delta=1e-5, adjacency="zero-out", noise_multiplier=3.0, participations=2,
)  # fmt: skip
SECRECY = SecrecyResult(
    threshold=3, num_aggregators=5, field="m61", packing=1, suite="x25519", checks="trust-devices", minimum_cohort=2,
    embedded=True,
)  # fmt: skip
SHARED = {"noise_from": (1, 2, 3, 4, 5), "opened_by": (1, 2, 3, 4, 5), "integrity": "checked"}
FIGURES = {"epsilon", "noise", "upload", "rejected"}


def noised(number: int, **changes: Any):
    return round_result(number, epsilon=0.5 * number, noise_stddev=0.25, train_loss=None, **changes)


def a_run(claim: PrivacyResult | None, secrecy: SecrecyResult | None, *, rounds=None, **settings: Any):
    config = config_with(aggregation={"clip_norm": 0.5}, **settings)
    made = rounds if rounds is not None else tuple(noised(n, **(SHARED if secrecy else {})) for n in (1, 2, 3))
    return results(rounds=0, privacy=claim, secrecy=secrecy).model_copy(update={"rounds": made, "config": config})


def by_aggregators(**changes: Any) -> PrivacyResult:
    return CLAIM.model_copy(update={"noise": "aggregators", **changes})


def section_of(tmp_path: Path, facts: SimulationResults) -> str:
    """The words of the section alone."""
    words = words_of(report(tmp_path, facts))
    return words[words.index("Privacy and secrecy") : words.index("Sessions per device tier")]


# --- only what is in use ----------------------------------------------------------------------------------------


def test_a_run_without_either_has_no_such_section(tmp_path):
    text = report(tmp_path, results())
    assert "Privacy and secrecy" not in words_of(text)
    assert not FIGURES & set(drawn(text))


@pytest.mark.parametrize(
    ("claim", "secrecy", "plots"),
    [
        (CLAIM, None, {"epsilon", "noise"}),
        (None, SECRECY, {"upload"}),
        (by_aggregators(), SECRECY, {"epsilon", "noise", "upload"}),
    ],
)
def test_plots_are_of_what_was_in_use(tmp_path, claim, secrecy, plots):
    rounds = tuple((noised if claim else round_result)(n, **(SHARED if secrecy else {})) for n in (1, 2))
    assert set(drawn(report(tmp_path, a_run(claim, secrecy, rounds=rounds)))) & FIGURES == plots


@pytest.mark.parametrize("rounds", [(), (round_result(1, unchanged="CohortTooSmall"),)])
def test_a_run_that_released_nothing_has_its_claim_told_too(tmp_path, rounds):
    words = words_of(report(tmp_path, a_run(by_aggregators(), SECRECY, rounds=rounds)))
    assert "epsilon 2 at delta 1e-05, for a whole device" in words


# --- the claim --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adjacency", "told"),
    [
        ("zero-out", "with a device's updates in it as with zeros in their place"),
        ("add-remove", "with a device as without it"),
        ("replace-one", "as with any others in their place"),
    ],
)
def test_the_claim_is_told_with_its_adjacency_its_delta_and_what_epsilon_means(tmp_path, adjacency, told):
    words = section_of(tmp_path, a_run(CLAIM.model_copy(update={"adjacency": adjacency}), None))
    assert told in words
    assert "exp(epsilon) = 7.39, but for a chance of about 1e-05" in words
    assert f"adjacency {adjacency}" in words
    assert "a device counts in at most 2 rounds" in words


def test_an_epsilon_beyond_all_meaning_has_a_report_all_the_same(tmp_path):
    section_of(tmp_path, a_run(CLAIM.model_copy(update={"epsilon": 1e9}), None))


WHOM = {
    "server noise": (CLAIM, None, "not the server, which sees every update as it is"),
    "one process": (by_aggregators(), SECRECY, "not the operator, in whose one process all shares come together"),
    "processes": (
        by_aggregators(),
        SECRECY.model_copy(update={"embedded": False}),
        "the server, any 2 of the aggregators, the other devices and whoever sees models",
    ),
}


@pytest.mark.parametrize("case", WHOM)
def test_it_says_against_whom(tmp_path, case):
    claim, secrecy, told = WHOM[case]
    facts = a_run(claim, secrecy)
    assert told in section_of(tmp_path, facts)
    assert told in "\n".join(summary_of(facts, Path("x")))


def test_processes_of_one_machine_are_not_passed_off_as_different_operators(tmp_path):
    facts = a_run(by_aggregators(), SECRECY.model_copy(update={"embedded": False}))
    words = section_of(tmp_path, facts)
    assert "in this run one machine ran them all" in words
    assert "a rehearsal of different operators" in words


@pytest.mark.parametrize(
    ("embedded", "told"),
    [(None, "the server does not tell"), (False, "elsewhere, with keys that the server pins"), (True, "no secrecy")],
)
def test_of_a_foreign_server_nothing_is_told_but_what_it_says(embedded, told):
    config = SimulationConfig.parse({"devices": 4, "rounds": 3, "cohort": 2, "server": "http://127.0.0.1:1"})
    secrecy = SECRECY.model_copy(update={"embedded": embedded})
    facts = results(privacy=by_aggregators(), secrecy=secrecy).model_copy(update={"config": config})
    assert told in report_privacy.holders(facts, secrecy)
    assert tally.noise_lengths(facts) == [None] * 3, "nobody knows how many coordinates it shares"
    assert tally.longest_mean(facts) is None


def test_one_process_is_an_alert_and_several_are_none(tmp_path):
    title = "All aggregators ran in one process: no secrecy from its operator"
    assert title in section_of(tmp_path, a_run(None, SECRECY))
    assert title not in section_of(tmp_path, a_run(None, SECRECY.model_copy(update={"embedded": False})))


@pytest.mark.parametrize(
    ("claim", "secrecy", "told", "untold"),
    [
        (None, SECRECY, "no epsilon is claimed", "each costs its own epsilon"),
        (CLAIM, None, "they see every update before noise is added", "aggregators"),
        (by_aggregators(), SECRECY, "That a device takes part, when", "before noise is added"),
        (by_aggregators(), SECRECY, "shift a sum by any amount", "Random projections"),
        (
            by_aggregators(),
            SECRECY.model_copy(update={"checks": "projections"}),
            "no epsilon holds against whoever sees them",
            "shift a sum by any amount",
        ),
        (by_aggregators(), SECRECY.model_copy(update={"embedded": False}), "Any 3 aggregators together", "its process"),
        (CLAIM.model_copy(update={"adjacency": "add-remove"}), None, "its own epsilon", "takes part, when"),
        (CLAIM, None, "This page: it shows what the simulated devices hold", "projections"),
    ],
)
def test_what_is_not_covered_is_said(claim, secrecy, told, untold):
    words = " ".join(report_privacy.not_covered(a_run(claim, secrecy)))
    assert told in words
    assert untold not in words


def test_losses_that_devices_keep_to_themselves_are_not_drawn(tmp_path):
    text = report(tmp_path, a_run(CLAIM, None))
    assert set(bars_of(drawn(text)["loss"])) == {"validation"}
    assert "Devices kept their own losses to themselves." in words_of(text)


# --- the figures ------------------------------------------------------------------------------------------------


def test_epsilon_is_drawn_beside_its_budget(tmp_path):
    text = report(tmp_path, a_run(CLAIM, None))
    assert bars_of(drawn(text)["epsilon"]) == {"spent so far": [0.5, 1.0, 1.5], "budget: 2": [2.0, 2.0]}
    assert "1.5 of 2 after 3 rounds" in words_of(text)
    assert "A device counts in at most 2 rounds" in words_of(text), "fewer than the run has"


def test_noise_is_drawn_beside_the_aggregate_and_what_updates_can_come_to(tmp_path):
    text = report(tmp_path, a_run(CLAIM, None))
    found = bars_of(drawn(text)["noise"])
    assert found["noised aggregate"] == [0.5, 0.5, 0.5]
    assert found["of it the noise, expected"] == [pytest.approx(0.25 * 10)] * 3, "100 parameters"
    assert found["mean of the updates, at most: 0.5"] == [0.5, 0.5]
    assert "at least 5 times as long as what the updates come to" in words_of(text)


@pytest.mark.parametrize(
    ("claim", "secrecy", "settings", "changes", "stretch"),
    [
        (CLAIM, None, {}, {}, 1.0),
        # Three honest ones suffice: five that are honest add five thirds of the variance.
        (by_aggregators(), SECRECY, {}, SHARED, math.sqrt(5 / 3)),
        (by_aggregators(), SECRECY, {}, {**SHARED, "noise_from": (1, 3, 4)}, math.sqrt(3)),
        (by_aggregators(noise="devices", honest_devices=1), SECRECY, {}, {**SHARED, "noise_from": ()}, math.sqrt(2)),
        (
            by_aggregators(noise="devices", honest_devices=1),
            SECRECY,
            {},
            {**SHARED, "noise_from": (), "shares_rejected": {"parity": 1}},
            1.0,
        ),
        (by_aggregators(), SECRECY, {"compression": "randomk:0.25,feedback=off"}, SHARED, math.sqrt(5 / 3) / 2),
        (CLAIM, None, {"compression": "randomk:0.25"}, {}, 1.0),
    ],
)
def test_all_noise_is_reckoned_with_and_not_only_what_the_account_relies_on(claim, secrecy, settings, changes, stretch):
    facts = a_run(claim, secrecy, rounds=(noised(1, **changes),), **settings)
    assert tally.noise_lengths(facts) == [pytest.approx(0.25 * math.sqrt(100) * stretch)]


def test_a_rule_on_noised_buckets_leaves_an_unknown_length_of_noise(tmp_path):
    facts = a_run(CLAIM.model_copy(update={"buckets": 4}), None)
    assert tally.noise_lengths(facts) == [None] * 3
    text = report(tmp_path, facts)
    assert "noise" not in drawn(text)
    assert "buckets 4 noised sums a round" in words_of(text)


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 0.5),
        ({"compression": "randomk:0.25,feedback=off"}, None),
        ({"staleness": {"max_staleness": 2}, "refill_at": 1, "delay_damping": 0.5}, None),
    ],
)
def test_the_mean_of_clipped_updates_is_bounded_where_nothing_stretches_it(settings, bound):
    assert tally.longest_mean(a_run(None, SECRECY, **settings)) == bound


def test_what_a_device_sends_is_compared_with_plain_float32(tmp_path):
    rounds = tuple(round_result(n, bytes_counted=2 * 100 * 25, **SHARED) for n in (1, 2))
    text = report(tmp_path, a_run(None, SECRECY, rounds=rounds))
    (trace,) = drawn(text)["upload"]["data"]
    assert dict(zip(trace["y"], trace["x"], strict=True)) == {"as sent, in shares": 25.0, "as float32, in the clear": 4}
    assert "25 bytes a coordinate, sealing included: 6.25 times a plain float32" in words_of(text)
    assert "Of 5 shares 2 are seeds" in words_of(text)


# --- what went wrong --------------------------------------------------------------------------------------------


def test_rejected_shares_and_wrong_answers_are_not_overlooked(tmp_path):
    rounds = (
        noised(1, **{**SHARED, "shares_rejected": {"parity": 1, "malformed": 2}}),
        noised(2, **{**SHARED, "tampered": (4,), "integrity": "corrected"}),
        noised(3, **{**SHARED, "opened_by": (1, 2, 3), "integrity": "unchecked", "shares_rejected": {"malformed": 1}}),
    )
    facts = a_run(by_aggregators(), SECRECY, rounds=rounds)
    text = report(tmp_path, facts)
    words = section_of(tmp_path, facts)
    assert bars_of(drawn(text)["rejected"]) == {"malformed": [2, 0, 1], "parity": [1, 0, 0]}
    assert "malformed 3 is no share of the right length" in words
    assert "parity 1 its shares do not belong together" in words
    assert "Wrong answers of aggregators Aggregator 4 in round 2. They were located and left out" in words
    assert "so that a wrong one would not have shown (round 3)" in words
    table = words[words.index("aggregator rounds with its noise") :]
    assert "4 3 2 1" in table, "aggregator 4: noise in 3 rounds, answers in 2, one of them wrong"
    lines = {line[:16].strip(): line[16:] for line in summary_of(facts, Path("x"))[1:]}
    assert lines["shares rejected"] == "4 reports (malformed 3, parity 1)"
    assert lines["wrong answers"] == "aggregator 4 in 1 rounds; corrected"


def test_a_reason_that_is_news_is_told_by_its_name(tmp_path):
    rounds = (round_result(1, **{**SHARED, "shares_rejected": {"<odd>": 1}}),)
    text = report(tmp_path, a_run(None, SECRECY, rounds=rounds))
    assert "&lt;odd&gt;" in text


def test_the_last_words_say_the_claim_and_what_was_spent():
    lines = {line[:16].strip(): line[16:] for line in summary_of(a_run(by_aggregators(), SECRECY), Path("x"))[1:]}
    assert lines["privacy"] == (
        "epsilon 2 at delta 1e-05 for a whole device (zero-out, 2 rounds each at most); spent 1.5"
    )
    assert lines["secrecy"] == "3 of 5 aggregators; all in one process: no secrecy from its operator"


def test_the_table_of_rounds_has_columns_for_it(tmp_path):
    text = report(tmp_path, a_run(by_aggregators(), SECRECY))
    for head in ("epsilon", "noise per coordinate", "opened by"):
        assert f'<th scope="col" class="n">{head}</th>' in text


# --- from the server to the results -----------------------------------------------------------------------------


def test_what_a_round_measured_is_read_as_the_server_says_it():
    said = {
        "privacy": {"epsilon": 2.1, "delta": 1e-5, "adjacency": "zero-out", "noise_stddev": 0.2},
        "shares_rejected": {"parity": 1}, "contributors": [1, 2, 3], "signed": [1, 2, 3], "answered": [1, 2, 3, 4],
        "integrity": "corrected", "tampered": [2], "missing": {"5": "ConnectError"}, "run": 0, "parity": "checked",
    }  # fmt: skip
    found = Measurements.model_validate(said)
    assert (found.privacy.epsilon, found.privacy.noise_stddev) == (2.1, 0.2)
    assert (found.contributors, found.answered, found.tampered) == ((1, 2, 3), (1, 2, 3, 4), (2,))
    assert Measurements().privacy.epsilon is None
    fields = {"round_id": 0, "model_version": 1, "model_sha256": "0" * 64, "reports": 1, "discarded": 0}
    times = {"opened_at_s": 0.0, "closed_at_s": 1.0, "validation_accuracy": None, "validation_loss": None}
    assert CommittedRound.model_validate({**fields, **times, "measurements": said}).measurements == found


SHARING = {"secure": {"threshold": 2, "num_aggregators": 3, "packing": 2}, "aggregation": {"clip_norm": 1.0}}


def task_with(bundle: Path, **settings: Any):
    return load_task(TaskConfig(bundle=bundle, plan={"batch_size": 4}, rounds=5, **settings))


def test_the_server_says_what_its_task_claims_and_has_spent(softmax_bundle):
    privacy = {"noise": "server", "epsilon": 3.0, "adjacency": "replace-one"}
    task = task_with(softmax_bundle, aggregation={"clip_norm": 1.0}, privacy=privacy)
    told = PrivacyClaim.model_validate(status.privacy_of(task))
    assert (told.epsilon, told.spent, told.participations, told.noise) == (3.0, 0.0, 5, "server")
    assert told.adjacency == "replace-one"
    for round_id in range(5):
        task.keeper.charge(
            GaussianRelease(round_id=round_id, noise_multiplier=told.noise_multiplier, adjacency="replace-one")
        )
    assert PrivacyClaim.model_validate(status.privacy_of(task)).spent == pytest.approx(3.0, rel=1e-6)
    assert status.secrecy_of(task, embedded=True) is None


def test_the_server_says_how_updates_are_shared(softmax_bundle):
    task = task_with(softmax_bundle, **SHARING)
    told = Secrecy.model_validate(status.secrecy_of(task, embedded=False))
    assert (told.threshold, told.num_aggregators, told.packing, told.field) == (2, 3, 2, "m61")
    assert told.embedded is False
    assert status.privacy_of(task) is None
    plain = task_with(softmax_bundle)
    assert status.privacy_of(plain) is status.secrecy_of(plain, embedded=True) is None


# --- flags that do not go together ------------------------------------------------------------------------------


def config_of(*flags: str) -> SimulationConfig:
    parser = argparse.ArgumentParser()
    simulate_command(parser)
    return SimulationConfig.parse(given_settings(parser.parse_args(["--out", "x", *flags])))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epsilon 8", "--epsilon needs a bound.*--clip-norm"),
        ("--noise-multiplier 2", "--noise-multiplier needs a bound.*--clip-norm"),
        ("--secure 3of5", "--secure needs a bound.*--clip-norm"),
        ("--clip-norm 1 --epsilon 8 --noise aggregators", "--noise aggregators.*--secure 3of5.*--noise server"),
        ("--clip-norm 1 --epsilon 8 --secure 3of5 --noise server", "--secure.*--noise aggregators"),
        ("--clip-norm 1 --secure 3of5 --engine cohort", "--engine cohort shares no secrets"),
        ("--clip-norm 1 --epsilon 8 --devices 10 --cohort 5 --rounds 5 --max-participations 1", "--max-participations"),
        ("--aggregators processes", "--secure 3of5"),
        ("--delta 1e-6", "--delta.*--epsilon"),
        ("--adjacency replace-one", "--adjacency.*--epsilon"),
        ("--server http://127.0.0.1:1 --clip-norm 1 --epsilon 8", "the server's to decide"),
        ("--clip-norm 1 --secure 5of3", "threshold 5 of 3"),
    ],
)
def test_a_wrong_combination_says_what_to_change(flags, words):
    with pytest.raises(ConfigurationError, match=words):
        config_of(*flags.split())


def test_sound_combinations_pass():
    assert config_of("--clip-norm", "1", "--epsilon", "8").privacy.noise == "server"
    shared = config_of("--clip-norm", "1", "--epsilon", "8", "--delta", "1e-6", "--secure", "2of3")
    assert shared.privacy.noise == "aggregators"
    assert shared.secure is not None


def test_what_only_the_task_refuses_is_no_traceback(tmp_path):
    """Settings that did not come from flags."""
    config = config_with(
        model="softmax",
        aggregation={"clip_norm": 1.0},
        privacy={"noise": "devices", "honest_devices": 3, "epsilon": 1.0},
        secure={"threshold": 2, "num_aggregators": 3},
    )
    with (
        RunFolder.begin(tmp_path / "run", config) as folder,
        pytest.raises(ConfigurationError, match=r"^honest_devices cannot be more than the reports of a sum"),
    ):
        Prepared.of(folder, Fleet.of(config), lambda _line: None)
