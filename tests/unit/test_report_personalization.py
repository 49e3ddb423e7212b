"""What personalisation gave: in a run's results, its report and its last words, and only where devices adapt."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from simulator import report_personalization
from simulator.config import SimulationConfig
from simulator.results import AdaptationCurve, FairnessResult, ForgettingResult, PersonalizationResult, WorstDecile
from simulator.summary import summary_of
from tests.unit.test_simulator_report import drawn, report, results, words_of

PAIRS = {"0": (0.5, 0.9), "1": (0.5, 0.9), "2": (0.9, 0.9), "4": (0.29, 0.55), "7": (1.0, 0.8)}


def personalization(**changes):
    values = {
        "global_accuracy": 0.638, "personalized_accuracy": 0.81, "personalization_gain": 0.172,
        "per_device_accuracies": PAIRS, "devices": 5, "examples": 50, "steps": 2, "learning_rate": 0.3, "batch_size": 8,
        "personal_layers": (),
        "worst_decile": WorstDecile(
            devices=1, global_accuracy=0.29, personalized_accuracy=0.55, personalization_gain=0.26
        ),
        "fairness": FairnessResult(
            global_stddev=0.26, personalized_stddev=0.14, global_jain=0.86, personalized_jain=0.97,
            worst_decile_gain=-0.2, losing=0.2,
        ),
        "curves": (
            AdaptationCurve(round=0, accuracy=(0.1, 0.3, 0.4)), AdaptationCurve(round=3, accuracy=(0.6, 0.7, 0.8)),
        ),
        "forgetting": (
            ForgettingResult(personal_share=0.5, gain_before=0.2, gain_after=0.17, kept=0.85),
            ForgettingResult(personal_share=1.0, gain_before=0.0, gain_after=0.1, kept=None),
        ),
    }  # fmt: skip
    return PersonalizationResult(**{**values, **changes})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(tmp_path_factory.mktemp("report"), results(personalization=personalization()))


def test_results_with_personalisation_are_read_back(tmp_path):
    facts = results(personalization=personalization())
    assert type(facts).read(facts.write(tmp_path)) == facts


@pytest.mark.parametrize(
    "changes", [{"devices": 0}, {"per_device_accuracies": {"0": (0.5, 1.1)}}, {"personalization_gain": float("nan")}]
)
def test_figures_that_cannot_be_are_refused(changes):
    with pytest.raises(ValidationError):
        personalization(**changes)


def test_a_report_of_devices_that_do_not_adapt_has_no_section_of_it(tmp_path):
    text = report(tmp_path, results())
    assert not {"adaptation", "personal", "gains", "accuracies"} & set(drawn(text))
    assert "Personalisation" not in words_of(text)
    assert "personal models" not in words_of(text)


def test_the_figures_are_told_in_words(page):
    words = words_of(page).replace("\N{NO-BREAK SPACE}", " ")
    assert "personal models 81.0 % 17.2 points above the global one" in words
    assert "model of round 3: 60.0 % before the first step, 70.0 % after one, 80.0 % after 2." in words
    assert "From the initial model, after as many: 40.0 %." in words
    assert "5 devices, each judged by 50 test examples of its own classes and in its own style: 63.8 %" in words
    assert "The device that gains least: \N{MINUS SIGN}20.0 points; 20.0 % of the devices are worse off" in words
    assert "serves worst: 29.0 % with the global one, 55.0 % with their own" in words
    assert "with 50 % of their own 85.0 % of +20.0 points" in words
    assert "with all of their own nothing was gained" in words


@pytest.mark.parametrize(
    ("gain", "beside", "told"),
    [
        (-0.011, "1.1 points below the global one", "\N{MINUS SIGN}1.1 points"),
        (0.0004, "as good as the global one", "no change"),
        (-0.0004, "as good as the global one", "no change"),
        (0.1, "10.0 points above the global one", "+10.0 points"),
    ],
)
def test_a_gain_is_told_with_its_direction(gain, beside, told):
    assert report_personalization.points(gain).replace("\N{NO-BREAK SPACE}", " ") == told
    facts = results(personalization=personalization(personalization_gain=gain))
    [(_, _, note, _)] = report_personalization.cards(facts)
    assert note.replace("\N{NO-BREAK SPACE}", " ").startswith(beside + ",")


def test_a_model_that_is_meant_to_be_adapted_is_called_so(tmp_path):
    config = SimulationConfig.parse({"algorithm": "fomaml", "devices": 4, "cohort": 2})
    (tmp_path / "meta").mkdir()
    told = words_of(report(tmp_path / "meta", results(config=config, personalization=personalization())))
    assert "The global model of fomaml is meant to be adapted" in told
    assert "meant to be adapted" not in words_of(report(tmp_path, results(personalization=personalization())))


def test_the_configuration_tells_settings_once_and_none_without_effect(tmp_path):
    given = {"algorithm": "maml", "devices": 4, "cohort": 2, "meta": {"meta_learning_rate": 0.25}}
    words = words_of(report(tmp_path, results(config=SimulationConfig.parse(given))))
    configuration = words[words.rindex("Configuration") : words.rindex("Repeat it")]
    assert " meta learning rate 0.25 " in configuration
    assert not re.findall(r"meta meta|epochs|personal \[\]", configuration)


def test_devices_at_one_place_are_one_mark_whose_area_tells_how_many(page):
    _, better, alike, worse = drawn(page)["personal"]["data"]
    assert dict(zip(better["text"], zip(better["x"], better["y"], strict=True), strict=True)) == {
        "2 devices": (50, 90),
        "1 device": (29, 55),
    }
    assert better["marker"]["size"][0] ** 2 == pytest.approx(2 * better["marker"]["size"][1] ** 2, rel=0.01)
    assert (alike["x"], alike["y"]) == ([90], [90])
    assert (worse["x"], worse["y"]) == ([100], [80])


def test_gains_fall_and_the_tenth_that_gains_least_is_marked(page):
    others, tenth = drawn(page)["gains"]["data"]
    assert others["y"] == [40, 40, 26, 0]
    assert others["customdata"] == ["device 0", "device 1", "device 4", "device 2"]
    assert (tenth["x"], tenth["y"], tenth["customdata"]) == ([5], [-20], ["device 7"])


def test_every_curve_begins_before_the_first_step(page):
    first, last = drawn(page)["adaptation"]["data"]
    assert (first["name"], last["name"]) == ("initial model", "round 3")
    assert first["x"] == last["x"] == [0, 1, 2]
    assert last["y"] == [60, 70, 80]


def test_the_histogram_counts_every_device_once_on_either_side(page):
    before, after = drawn(page)["accuracies"]["data"]

    def bins(trace):
        return {name: n for name, n in zip(trace["customdata"], trace["y"], strict=True) if n}

    assert bins(before) == {"25 to 30": 1, "50 to 55": 2, "90 to 95": 1, "95 to 100": 1}
    assert bins(after) == {"55 to 60": 1, "80 to 85": 1, "90 to 95": 3}


def test_one_device_and_one_model_make_a_report(tmp_path):
    alone = personalization(
        per_device_accuracies={"0": (0.5, 0.9)}, devices=1,
        curves=(AdaptationCurve(round=0, accuracy=(0.6, 0.7, 0.8)),), forgetting=(),
    )  # fmt: skip
    text = report(tmp_path, results(personalization=alone, rounds=0))
    assert [trace["name"] for trace in drawn(text)["gains"]["data"]] == ["the tenth that gains least"]
    assert "Adapted from the initial model" in words_of(text)


def test_the_head_says_what_meta_learning_trains(tmp_path):
    config = SimulationConfig.parse({"algorithm": "maml", "meta": {"inner_steps": 3}, "devices": 4, "cohort": 2})
    words = words_of(report(tmp_path, results(config=config)))
    assert "maml through 3 steps of adaptation" in words
    assert "local epochs" not in words


def test_the_last_words_tell_what_adaptation_gave():
    def lines(facts):
        return {line[:16].strip(): line[16:] for line in summary_of(facts, Path("runs/x"))}

    told = lines(results(personalization=personalization()))
    assert told["personal models"] == "81.0 % on 5 devices after 2 steps, 63.8 % before (+17.2 points)"
    worse = lines(results(personalization=personalization(personalization_gain=-0.011)))
    assert worse["personal models"].endswith("(-1.1 points)")
    assert told["spread"] == "worst tenth 55.0 %, 29.0 % before; 20.0 % of the devices lose"
    assert "personal models" not in lines(results())
