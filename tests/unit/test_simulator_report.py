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
from simulator import figures
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
        "excluded_attackers": 0, "num_byzantine": None, "clipped": 0, "norm_median": None, "norm_max": None,
        "aggregate_norm": 0.5,
        "staleness": {0: 2}, "unchanged": None, "model_sha256": HASH,
    }  # fmt: skip
    return RoundResult(**{**values, **changes})


def results(rounds=3, **changes):
    values = {
        "status": "completed", "final_accuracy": 0.8765, "final_loss": 0.4, "model_sha256": HASH, "halted": None,
        "pipeline": {"reduce": "exact weighted mean (float64 bins)"}, "repeatable": True,
        "rounds": tuple(round_result(n) for n in range(1, rounds + 1)),
        "tiers": (
            TierResult(tier=DeviceTier.HIGH_END, devices=1, counted=4, late=0, dropped=1, refused=0, unfinished=0),
            TierResult(tier=DeviceTier.MID_RANGE, devices=2, counted=2, late=1, dropped=0, refused=0, unfinished=0),
            TierResult(tier=DeviceTier.LOW_END, devices=1, counted=0, late=2, dropped=0, refused=0, unfinished=1),
        ),
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
    drawn = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])
    assert len(drawn) == 8
    for name, figure in drawn.items():
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


def test_many_reports_are_thinned_out_and_the_report_says_so(tmp_path):
    sessions = [session(d % 4, 0, 1.0 + d / 1000) for d in range(figures.MAX_POINTS * 2)]
    _, every = figures.timeline(results(), sessions, [sessions, [], []], lambda _d: DeviceTier.HIGH_END)
    assert every == 2
    assert "One report in 2 is drawn" in report(tmp_path, results(), sessions, [sessions, [], []])


def test_many_devices_are_thinned_out():
    _, shown = figures.labels(np.ones((figures.MAX_COLUMNS * 3, 3), np.int64))
    assert shown == figures.MAX_COLUMNS


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
