"""results.json is a closed schema; report.html stands alone and says what the results say."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.profile import DeviceTier
from simulator import figures, figures_aggregation
from simulator.command import command_of
from simulator.config import SimulationConfig
from simulator.progress import human_bytes, human_time
from simulator.report import write_report
from simulator.results import DatasetFacts, RoundResult, SimulationResults, TierResult, versions
from simulator.sessions import Outcome, Session, SessionEnd

HASH = "0" * 64
CONFIG = SimulationConfig(devices=4, rounds=3, cohort=2, dataset="digits")
LABELS = np.array([[5, 0, 1], [0, 3, 0], [1, 1, 8], [2, 2, 0]])


def round_result(number, **changes):
    values = {
        "round": number, "accuracy": number / (number + 5), "loss": 1.5, "train_loss": 0.9, "reports": 2,
        "discarded": 1, "bytes_up": 4000, "bytes_down": 5000, "seconds": 0.25, "opened_at_s": 10.0 * (number - 1),
        "closed_at_s": 10.0 * number, "bytes_counted": 12_400, "bytes_dense": 12_000, "excluded": (), "attackers": 0,
        "excluded_attackers": 0, "num_byzantine": None, "degraded": False, "clipped": 0,
        "norm_median": None, "norm_max": None, "aggregate_norm": 0.5,
        "staleness": {0: 2}, "unchanged": None, "epsilon": None, "noise_stddev": None, "shares_rejected": {},
        "noise_from": (), "opened_by": (), "tampered": (), "integrity": None, "model_sha256": HASH,
    }  # fmt: skip
    return RoundResult(**{**values, **changes})


def tier_result(tier, **changes):
    values = dict.fromkeys(("devices", "counted", "late", "dropped", "refused", "unfinished", "examples"), 0)
    return TierResult(tier=tier, **{**values, **changes})


def results(rounds=3, **changes):
    values = {
        "status": "completed", "final_accuracy": 0.8765, "final_loss": 0.4, "model_sha256": HASH, "halted": None,
        "pipeline": {"reduce": "exact weighted mean (float64 bins)"}, "repeatable": True,
        "privacy": None, "secrecy": None,
        "rounds": tuple(round_result(n) for n in range(1, rounds + 1)),
        "tiers": (
            tier_result(DeviceTier.HIGH_END, devices=1, counted=4, dropped=1, examples=48),
            tier_result(DeviceTier.MID_RANGE, devices=2, counted=2, late=1, examples=16),
            tier_result(DeviceTier.LOW_END, devices=1, late=2, unfinished=1),
        ),
        "days": None, "personalization": None,
        "refusals": {"stale-report": 3}, "jain_index": 0.75, "slow_share": 0.0,
        "sessions": 9, "seconds": 0.75, "clients_per_second": 12.0, "bytes_up": 12000, "bytes_down": 15000,
        "virtual_seconds": 30.0, "config": CONFIG, "server": "embedded", "runtime": "native", "workers": 2,
        "dataset": DatasetFacts(name="digits", sha256=HASH, train=10, validation=3, test=4), "parameters": 100,
        "versions": versions(),
    }  # fmt: skip
    return SimulationResults(**{**values, **changes})


def session(device, round_id, arrives_s, outcome=Outcome.ACCEPTED):
    return Session(device, device, round_id, round_id, 10.0 * round_id, arrives_s, SessionEnd(outcome))


def report(folder, facts, sessions=(), counted=()):
    path = write_report(
        folder, facts, label_counts=LABELS, sessions=sessions, counted=counted, tier_of=lambda _d: DeviceTier.LOW_END
    )
    return path.read_text()


class Elements(HTMLParser):
    """All attributes and the texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.attributes, self.figures, self._tag, self.words = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_data(self, data):
        if self._tag not in {"script", "style"}:
            self.words.append(data)


# --- results.json --------------------------------------------------------------------------------------------


def test_results_are_read_back_as_written(tmp_path):
    facts = results()
    assert SimulationResults.read(facts.write(tmp_path)) == facts


def test_results_hold_what_other_tools_look_for(tmp_path):
    written = json.loads(results().write(tmp_path).read_text())
    assert written["final_accuracy"] == 0.8765
    assert {"accuracy", "loss", "reports", "bytes_up", "bytes_down", "seconds"} <= set(written["rounds"][0])
    assert written["config"]["seed"] == CONFIG.seed
    assert {"pocketfed", "torch", "executorch", "python"} <= set(written["versions"])


@pytest.mark.parametrize(
    "changes",
    [
        {"final_accuracy": 1.5}, {"final_accuracy": float("nan")}, {"status": "fine"}, {"model_sha256": "x"},
        {"extra": 1}, {"bytes_up": -1},
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(changes):
    with pytest.raises(ValidationError):
        results(**changes)


def test_a_file_that_is_no_results_file_is_named(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"results\.json is not a results file"):
        SimulationResults.read(tmp_path / "results.json")


# --- report.html ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    counted = [[session(0, 0, 4.0), session(1, 0, 10.0)], [session(2, 1, 15.0)], []]
    sessions = [*counted[0], *counted[1], session(3, 1, 25.0), session(0, 2, None, Outcome.DROPPED)]
    return report(tmp_path_factory.mktemp("report"), results(), sessions, counted)


def test_the_page_fetches_nothing(page):
    elements = Elements(page)
    loading = [
        (tag, name, value) for tag, name, value in elements.attributes if name in {"src", "href", "action", "data"}
    ]
    assert loading == []
    assert not [tag for tag, *_ in elements.attributes if tag in {"link", "iframe", "img", "object", "base"}]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_forbids_itself_to_fetch(page):
    policy = next(v for tag, name, v in Elements(page).attributes if tag == "meta" and name == "content" and "src" in v)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_headline_says_what_the_results_say(page):
    words = " ".join(Elements(page).words)
    for expected in ("87.65 %", "completed", "12 kB", "15 kB", "digits, mlp, 4 devices"):
        assert expected in words


def test_every_plot_has_a_title_a_description_and_axes_with_titles(page):
    elements = Elements(page)
    described = {v for tag, name, v in elements.attributes if tag == "div" and name == "aria-label"}
    assert len(described) == 8
    assert len(drawn(page)) == 8
    for name, figure in drawn(page).items():
        axes = [axis for key, axis in figure["layout"].items() if re.match(r"[xy]axis", key)]
        assert any(axis["title"]["text"] for axis in axes), name
        assert figure["data"], name


def test_an_interrupted_run_says_how_to_go_on_and_shows_no_test_accuracy(tmp_path):
    text = report(tmp_path, results(2, status="interrupted", final_accuracy=None, final_loss=None))
    words = " ".join(Elements(text).words)
    assert "pocketfed simulate --resume" in words
    assert "validation accuracy" in words
    assert "test accuracy is measured when it is complete" in words


def test_a_run_without_any_round_has_a_report_too(tmp_path):
    text = report(tmp_path, results(0, status="interrupted", final_accuracy=None, final_loss=None, model_sha256=None))
    assert "Which classes the devices hold" in text


@pytest.mark.parametrize("rounds", [1, 2, 100])
def test_any_number_of_rounds_can_be_drawn(tmp_path, rounds):
    assert "Accuracy per round" in report(tmp_path, results(rounds))


def test_rounds_without_validation_are_drawn_as_gaps(tmp_path):
    gaps = tuple(round_result(n, accuracy=None, loss=None, train_loss=None) for n in (1, 2, 3))
    assert "Accuracy per round" in report(tmp_path, results(rounds=0).model_copy(update={"rounds": gaps}))


def test_a_foreign_run_says_whose_clock_it_was(tmp_path):
    facts = results(server="http://example.org:80/<script>", repeatable=False, virtual_seconds=None)
    text = report(tmp_path, facts)
    assert "the server's own clock" in " ".join(Elements(text).words)
    assert "/<script>" not in text, "values are escaped"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(30.0, "0:30 (minutes:seconds)"), (3599.7, "1:00:00 (hours:minutes:seconds)"), (1e5, "27:46:40 (hours:")],
)
def test_the_length_of_a_run_names_its_units(tmp_path, seconds, told):
    words = " ".join(Elements(report(tmp_path, results(virtual_seconds=seconds))).words)
    assert f"All rounds together took {told}" in words


def test_many_reports_are_thinned_out_and_the_report_says_so(tmp_path):
    sessions = [session(d % 4, 0, 1.0 + d / 1000) for d in range(figures.MAX_POINTS * 2)]
    _, every = figures.timeline(results(), sessions, [sessions, [], []], lambda _d: DeviceTier.HIGH_END)
    assert every == 2
    assert "One report in 2 is drawn" in report(tmp_path, results(), sessions, [sessions, [], []])


def test_many_devices_are_thinned_out():
    _, shown = figures.labels(np.ones((figures.MAX_COLUMNS * 3, 3), np.int64))
    assert shown == figures.MAX_COLUMNS


# --- aggregation ---------------------------------------------------------------------------------------------


def words_of(text):
    return re.sub(r"\s+", " ", " ".join(Elements(text).words))


def drawn(text):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1])


def bars_of(figure):
    return {trace["name"]: trace["y"] for trace in figure["data"]}


def config_with(**settings):
    return SimulationConfig.parse({"devices": 4, "rounds": 3, "cohort": 2, "dataset": "digits", **settings})


AGGREGATION = {"bytes-saved", "excluded", "norms", "clipped", "staleness", "participation"}


def test_the_pipeline_is_told_step_by_step_without_the_steps_that_do_nothing(tmp_path):
    pipeline = {"clip": "none", "reduce": "median against 1 <b>dishonest</b> update", "noise": "none (no privacy)"}
    text = report(tmp_path, results(pipeline=pipeline))
    assert "median against 1 <b>dishonest</b> update" in words_of(text), "values are escaped"
    assert "no privacy" not in words_of(text)


def test_nothing_is_shown_that_is_not_in_use(page):
    assert AGGREGATION & set(drawn(page)) == {"norms"}
    assert "saved by compression" not in words_of(page)
    assert 'class="box alert' not in page


def test_what_compression_saved_is_a_headline_and_a_figure(tmp_path):
    rounds = tuple(round_result(n, bytes_counted=600, bytes_dense=12_000) for n in (1, 2, 3))
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    assert "saved by compression 95.0 % 1.8 kB instead of 36 kB" in words_of(text)
    assert bars_of(drawn(text)["bytes-saved"]) == {"as float32": [12.0] * 3, "sent": [0.6] * 3}


def test_exclusions_are_split_into_attackers_and_honest_devices(tmp_path):
    rounds = (
        round_result(1, reports=5, excluded=(1, 2, 3), attackers=2, excluded_attackers=2, num_byzantine=1),
        round_result(2, reports=5, excluded=(4,), attackers=2, excluded_attackers=0, num_byzantine=2),
    )
    config = config_with(attack="sign-flip", byzantine=0.5, aggregation={"rule": "multi-krum"})
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert (
        "The rule (multi-krum) left 4 of 10 counted reports out; it reckoned with 1 to 2 dishonest ones a round. 2 of "
        "those were attackers' (precision 50.0 %); of the attackers' 4 reports 2 were let in (recall 50.0 %). In 1 of "
        "2 rounds more attackers reported than the rule reckoned with."
    ) in words_of(text)
    figure = drawn(text)["excluded"]
    assert bars_of(figure) == {
        "attackers', left out": [2, 0],
        "honest, left out": [1, 1],
        "attackers', let in": [0, -2],
    }
    assert figure["data"][2]["customdata"] == [0, 2], "downwards, but told as it is"


def test_without_an_attack_nobody_is_called_an_attacker(tmp_path):
    rounds = (round_result(1, excluded=(1,), num_byzantine=1),)
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    assert "left 1 of 2 counted reports out; it reckoned with 1 dishonest ones a round." in words_of(text)
    assert bars_of(drawn(text)["excluded"]) == {"left out": [1]}
    assert "precision" not in words_of(text)


def test_an_attack_on_a_rule_that_leaves_nobody_out_is_told_in_words(tmp_path):
    rounds = (round_result(1, attackers=1),)
    config = config_with(attack="zero", byzantine=0.5, aggregation={"rule": "median"})
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert "1 of 2 counted reports were attackers' (zero)" in words_of(text)
    assert "excluded" not in drawn(text)


def test_a_rule_that_stands_fewer_than_it_was_to_is_told(tmp_path):
    rounds = (round_result(1, num_byzantine=1, degraded=True), round_result(2, num_byzantine=1))
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    assert "In 1 of 2 rounds the buffer was too small: the rule stood 1 dishonest report" in words_of(text)


def test_norms_and_clipping_are_drawn_where_updates_are_clipped(tmp_path):
    rounds = tuple(round_result(n, clipped=1, norm_median=2.0, norm_max=30.0 * n, aggregate_norm=None) for n in (1, 2))
    config = config_with(aggregation={"clip_norm": 3.0})
    one = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert "2 of 4 counted updates were longer than allowed" in words_of(one)
    assert bars_of(drawn(one)["norms"]) == {
        "aggregate": [None, None],
        "median update": [2.0, 2.0],
        "largest update": [30.0, 60.0],
        "clipped to 3": [3.0, 3.0],
    }
    # A logarithm of nothing cannot be drawn: a gap.
    rounds = (*rounds, round_result(3, aggregate_norm=0.0), round_result(4, aggregate_norm=1e-9, norm_max=1e9))
    two = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert bars_of(drawn(two)["norms"])["aggregate"] == [None, None, None, 1e-9]
    assert "the longest of all 1e+09" in words_of(two)


@pytest.mark.parametrize(("largest", "dtick"), [(2.0, None), (50.0, "D2"), (1e4, 1), (1e25, 3), (1e-200, 20)])
def test_norms_of_any_range_have_ticks(largest, dtick):
    rounds = (round_result(1, aggregate_norm=1.0), round_result(2, aggregate_norm=largest))
    assert figures_aggregation.norms(rounds, None)["layout"]["yaxis"].get("dtick") == dtick


def test_a_run_whose_updates_are_all_zero_has_no_figure_of_their_norms(tmp_path):
    rounds = (round_result(1, aggregate_norm=0.0, norm_median=0.0, norm_max=0.0),)
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    assert "norms" not in drawn(text)


def test_ages_are_drawn_where_any_report_was_stale(tmp_path):
    rounds = (round_result(1, staleness={0: 2}), round_result(2, staleness={1: 1, 3: 1}))
    config = config_with(staleness={"max_staleness": 5})
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert bars_of(drawn(text)["staleness"]) == {"reports": [2, 1, 0, 1]}
    assert "50.0 % of 4 counted reports started from the model that they changed" in words_of(text)
    assert "1.00 versions old, the oldest 3 (accepted: up to 5)" in words_of(text)


def test_who_took_part_is_told_where_speed_has_a_say(tmp_path):
    facts = results().model_copy(update={"config": config_with(overselect=2.0)})
    counted = [[session(0, 0, 4.0), session(1, 0, 10.0)], [session(0, 1, 15.0)], []]
    text = report(tmp_path, facts, counted[0] + counted[1], counted)
    # Devices 2 and 3 never counted, 1 did once, 0 twice; all of the low tier, as this test has it.
    assert bars_of(drawn(text)["participation"])["low end"] == [2, 1, 1]
    assert "A device counted 0 to 2 times; 2 of 4 never did. Jain's fairness index is 0.750" in words_of(text)
    assert "A low-end device counted 0.00 times as often as another device." in words_of(text)


@pytest.mark.parametrize("devices", [1, 31, 400])
def test_any_number_of_participations_can_be_drawn(devices):
    times = list(range(devices))
    figure = figures_aggregation.participation(times, lambda _d: DeviceTier.HIGH_END)
    assert len(figure["data"][0]["x"]) <= 30
    assert sum(sum(trace["y"]) for trace in figure["data"]) == devices


def test_reports_in_no_model_are_told_with_the_reason(tmp_path):
    refusals = {"stale-report": 7, "update-out-of-range": 2, "training-diverged": 1, "from-the-future": 1}
    words = words_of(report(tmp_path, results(refusals=refusals)))
    assert "stale-report 7 The assignment's round is over." in words
    assert "update-out-of-range 2 The update holds values beyond the declared bound." in words
    assert "training-diverged 1 Local training left the finite numbers" in words
    assert "from-the-future 1" in words


def test_a_halted_run_says_why_and_what_was_best(tmp_path):
    facts = results(halted="a loss of <8> after a best of 2", rounds=2)
    text = report(tmp_path, facts)
    assert "Training was halted after round 2 of 3" in words_of(text)
    assert "Why: a loss of <8> after a best of 2." in words_of(text)
    assert "The best model so far was that of round 2" in words_of(text)
    assert '<span class="status halted">halted</span>' in text


@pytest.mark.parametrize(("line", "told"), [("topk:0.01", True), ("topk:0.01,feedback=off", False), (None, False)])
def test_a_halted_run_with_error_feedback_is_told_that_it_could_send_more(tmp_path, line, told):
    facts = results(halted="a loss of 8 after a best of 2").model_copy(update={"config": config_with(compression=line)})
    words = words_of(report(tmp_path, facts))
    assert ("a compression that sends more" in words) is told
    assert (f"{line} delays what it leaves out" in words) is told


def test_a_rule_that_leaves_nobody_out_is_told_to_be_overrun_too(tmp_path):
    rounds = tuple(round_result(n, reports=5, attackers=n, num_byzantine=1) for n in (1, 2, 3))
    config = config_with(attack="alie:1.5", byzantine=0.25, aggregation={"rule": "median"})
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds, "config": config}))
    assert "In 2 of 3 rounds more attackers reported than the rule reckoned with." in words_of(text)


def test_a_run_that_halts_before_its_first_model_shows_why(tmp_path):
    refusals = {"training-diverged": 41}
    text = report(tmp_path, results(0, halted="41 sessions in a row came to nothing", refusals=refusals))
    assert "Training was halted in its first round" in words_of(text)
    assert "training-diverged 41" in words_of(text)


@pytest.mark.parametrize(
    ("line", "rule", "why"),
    [("topk:0.01", "median", True), ("topk:0.01", "multi-krum", False), ("quantize:8", "median", False)],
)
def test_rounds_whose_aggregate_is_zero_are_not_overlooked(tmp_path, line, rule, why):
    rounds = tuple(round_result(n, aggregate_norm=0.0 if n < 3 else 0.5) for n in (1, 2, 3))
    config = config_with(compression=line, aggregation={"rule": rule})
    facts = results(rounds=0).model_copy(update={"rounds": rounds, "config": config})
    words = words_of(report(tmp_path, facts))
    assert "2 of 3 rounds aggregated to zero Round 1, 2: what the reports became was 0 in every coordinate." in words
    assert (f"( {line} ), and so does their {rule}" in words) is why


def test_rounds_that_changed_nothing_are_not_overlooked(tmp_path):
    rounds = tuple(round_result(n, unchanged="TooManyByzantine" if n > 1 else None) for n in range(1, 13))
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    assert "11 of 12 rounds left the model as it was" in words_of(text)
    assert "Round 2, 3, 4, 5, 6, 7, 8, 9 and 3 more: the rule does not stand so many" in words_of(text)


def test_the_table_of_rounds_has_columns_for_what_is_in_use(tmp_path):
    rounds = (round_result(1, excluded=(1,), clipped=1, norm_median=1.0, norm_max=1.0, staleness={4: 2}),)
    text = report(tmp_path, results(rounds=0).model_copy(update={"rounds": rounds}))
    for head in ("left out", "clipped", "oldest"):
        assert f'<th scope="col" class="n">{head}</th>' in text


def test_the_command_repeats_the_run():
    config = SimulationConfig.parse({"dataset": "fashion-mnist", "seed": 9, "dropout": 0.1, "overselect": 1.3})
    words = command_of(config).split()
    assert words[:2] == ["pocketfed", "simulate"]
    given_flags = dict(zip(words[2:-2:2], words[3:-2:2], strict=True))
    assert given_flags["--seed"] == "9"
    assert given_flags["--dropout"] == "0.1"
    assert given_flags["--lr"] == "0.1", "a recipe is written out"
    assert "--refill-at" not in given_flags


@given(st.integers(0, 9 * 10**14))
def test_sizes_keep_at_most_three_digits(count):
    number, unit = human_bytes(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * scale - count) <= 0.005 * count + 0.5
    assert "e" not in number


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0, "0:00"), (59.6, "1:00"), (3661, "1:01:01")])
def test_durations_are_written_with_colons(seconds, text):
    assert human_time(seconds) == text
