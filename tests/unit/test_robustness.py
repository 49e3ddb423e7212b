"""A robustness study: what it compares, what it keeps, what it says, and how it is drawn."""

from __future__ import annotations

import csv
import json
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import ConfigurationError
from simulator.errors import AttackError, OutputDirectoryInUse, PartitionError, ResumeMismatch
from simulator.robustness import heatmap
from simulator.robustness.cell import CellResult
from simulator.robustness.config import DEFAULT_ATTACKS, DEFAULT_RULES, Axes, RuleChoice, StudySettings, split_attacks
from simulator.robustness.folder import CELLS_FILE, StudyFolder
from simulator.robustness.heatmap import Panel, Scale, Square
from simulator.robustness.report import as_markdown, write_study
from simulator.robustness.summary import Summary, as_csv, as_json, command_of

SETTINGS = StudySettings()


def axes(rules="mean,krum", attacks="none,alie,backdoor", fractions="0,0.2", seeds="1,2"):
    return Axes.parse(rules, attacks, fractions, seeds)


def result(cell, accuracy=0.5, **changes):
    rule, attack, fraction, seed = cell.key
    facts = {"num_byzantine": SETTINGS.attackers(fraction), "status": "completed", "rounds": 20}
    return CellResult(
        rule=rule, attack=attack, fraction=fraction, seed=seed, **{"accuracy": accuracy, **facts, **changes}
    )


def summary_of(chosen, accuracy, **changes):
    """A summary with figures of the test's own: ``accuracy`` maps a cell's key to one, None leaves the cell undone."""
    done = {c.key: result(c, accuracy(c.key), **changes) for c in chosen.cells() if accuracy(c.key) is not None}
    return Summary.of(SETTINGS, chosen, done)


# --- what is compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mean", "krum", "nnm+krum", "bucketing+median"])
def test_a_rule_is_read_and_written(text):
    assert str(RuleChoice.parse(text)) == text


@pytest.mark.parametrize("text", ["crum", "", "nnm+mean", "mix+krum", "+krum", "nnm+nnm+krum", "none+krum"])
def test_a_rule_that_does_not_exist_is_refused_with_those_that_do(text):
    with pytest.raises(ConfigurationError, match="choose one of mean, krum"):
        RuleChoice.parse(text)


def test_every_default_can_be_read():
    chosen = Axes.parse(",".join(DEFAULT_RULES), ",".join(DEFAULT_ATTACKS), "0,0.1,0.2,0.3", "1")
    assert [str(rule) for rule in chosen.rules] == list(DEFAULT_RULES)
    assert len(chosen.attacks) == len(DEFAULT_ATTACKS)
    chosen.check(SETTINGS, 10)


def test_the_parameters_of_an_attack_in_a_list_stay_with_it():
    assert split_attacks("none, backdoor:target=7,scale=5,share=0.1,alie:1.5,label-flip:source=1,target=2") == [
        "none",
        "backdoor:target=7,scale=5,share=0.1",
        "alie:1.5",
        "label-flip:source=1,target=2",
    ]


def test_what_is_named_twice_counts_once():
    chosen = axes("mean,mean", "ipm,ipm:0.5,foe", "0.2,0.20", "1,1")
    assert len(list(chosen.cells())) == 1


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"rules": ","}, ConfigurationError, "--rules names nothing"),
        ({"attacks": "alei"}, AttackError, "choose one of"),
        ({"fractions": "0.5"}, ConfigurationError, "half of the devices"),
        ({"fractions": "nan"}, ConfigurationError, "half of the devices"),
        ({"fractions": "a"}, ConfigurationError, "got 'a'"),
        ({"seeds": "-1"}, ConfigurationError, "--seeds are whole numbers"),
        ({"seeds": str(2**31)}, ConfigurationError, "--seeds are whole numbers"),
    ],
)
def test_axes_that_cannot_be_are_refused(changes, error, says):
    with pytest.raises(error, match=says):
        axes(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"fractions": "0.01"}, AttackError, "no attacker"),
        ({"attacks": "backdoor:target=10"}, AttackError, "no class 10"),
        ({"attacks": "alie", "fractions": "0"}, ConfigurationError, "there are no cells"),
    ],
)
def test_a_study_that_could_not_be_finished_is_not_begun(changes, error, says):
    with pytest.raises(error, match=says):
        axes(**changes).check(SETTINGS, 10)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"devices": 2}, ConfigurationError, "--devices"),
        ({"learning_rate": 0.0}, ConfigurationError, "--lr"),
        ({"partition": "odd"}, PartitionError, "unknown partition"),
    ],
)
def test_settings_out_of_range_are_refused(values, error, says):
    with pytest.raises(error, match=says):
        StudySettings.parse(values)


def test_a_data_set_brings_its_own_settings_unless_told():
    fashion = StudySettings.parse({"dataset": "fashion-mnist"})
    assert fashion.batch_size != SETTINGS.batch_size
    assert StudySettings.parse({"dataset": "fashion-mnist", "batch_size": 7}).batch_size == 7


def test_there_is_nothing_to_attack_with_at_fraction_0():
    cells = list(axes().cells())
    assert [c.attack for c in cells if c.fraction == 0] == [None] * 4
    assert len({c.key for c in cells}) == len(cells) == 2 * (2 + 2 * 3)
    assert [c.seed for c in cells] == [1] * 8 + [2] * 8, "a whole table of the first seed comes first"


# --- what is kept ------------------------------------------------------------------------------------------------


def test_finished_cells_are_found_again_and_others_may_be_added(tmp_path):
    first, *others = axes().cells()
    with StudyFolder(tmp_path / "s", SETTINGS) as folder:
        folder.record(result(first, 0.25))
    with StudyFolder(tmp_path / "s", SETTINGS) as folder:
        assert list(folder.done) == [first.key]
        for cell in others:
            folder.record(result(cell))
    with StudyFolder(tmp_path / "s", SETTINGS) as folder:
        assert folder.done[first.key].accuracy == 0.25
        assert len(folder.done) == 16


@settings(max_examples=20)
@given(st.integers(0, 400))
def test_a_process_killed_while_it_wrote_loses_that_cell_alone(tmp_path_factory, kept):
    folder_path = tmp_path_factory.mktemp("study") / "s"
    first, second, third = list(axes().cells())[:3]
    with StudyFolder(folder_path, SETTINGS) as folder:
        folder.record(result(first))
        whole = (folder_path / CELLS_FILE).stat().st_size
        folder.record(result(second))
    path = folder_path / CELLS_FILE
    data = path.read_bytes()
    torn = min(whole + kept, len(data) - 1)
    path.write_bytes(data[:torn])
    with StudyFolder(folder_path, SETTINGS) as folder:
        assert list(folder.done) == [first.key]
        folder.record(result(third))
    with StudyFolder(folder_path, SETTINGS) as folder:
        assert list(folder.done) == [first.key, third.key]


def test_cells_of_other_settings_are_not_mixed_in(tmp_path):
    with StudyFolder(tmp_path / "s", SETTINGS) as folder:
        folder.record(result(next(axes().cells())))
    other = SETTINGS.model_copy(update={"rounds": 7})
    with pytest.raises(ResumeMismatch, match=r"rounds 7 \(the study has 20\)"):
        StudyFolder(tmp_path / "s", other)
    with StudyFolder(tmp_path / "s", other, overwrite=True) as folder:
        assert not folder.done


@pytest.mark.parametrize("name", ["study.json", CELLS_FILE])
def test_damaged_files_are_named(tmp_path, name):
    StudyFolder(tmp_path / "s", SETTINGS).close()
    (tmp_path / "s" / name).write_text("{}\n" if name == CELLS_FILE else "{")
    with pytest.raises(ResumeMismatch, match=re.escape(name)):
        StudyFolder(tmp_path / "s", SETTINGS)
    # Nobody is locked out by the failure.
    StudyFolder(tmp_path / "s", SETTINGS, overwrite=True).close()


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(OutputDirectoryInUse, match=r"thesis\.tex"):
        StudyFolder(tmp_path, SETTINGS, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_one_process_at_a_time(tmp_path):
    with StudyFolder(tmp_path / "s", SETTINGS), pytest.raises(OutputDirectoryInUse, match="another process"):
        StudyFolder(tmp_path / "s", SETTINGS)


# --- what it says ------------------------------------------------------------------------------------------------


def test_an_entry_is_the_mean_over_its_seeds():
    summary = summary_of(axes(), lambda key: 0.5 if key[3] == 1 else 0.75)
    spread = summary.entries["krum", "alie", 0.2].accuracy
    assert (spread.mean, spread.low, spread.high, spread.count) == (0.625, 0.5, 0.75, 2)


def test_the_worst_attack_is_the_one_that_costs_most_on_average():
    figures = {"none": 0.1, "alie": 0.6, "backdoor": 0.7}
    summary = summary_of(axes(), lambda key: figures[key[1]])
    name, spread = summary.worst("krum", 0.2)
    assert (name, spread.mean) == ("alie", 0.6), "to be honest is no attack, however little is learned"
    assert summary.worst("krum", 0.0) is None


def test_what_a_rule_refuses_has_no_figure_and_says_why():
    chosen = axes()
    done = {c.key: result(c, None, status="refused", rounds=0, detail="n >= 4f + 3") for c in chosen.cells()}
    summary = Summary.of(SETTINGS, chosen, done)
    entry = summary.entries["krum", "alie", 0.2]
    assert entry.accuracy is None
    assert entry.note == "refused: n >= 4f + 3"
    assert summary.worst("krum", 0.2) is None
    assert "n/a" in as_markdown(summary)


def test_the_table_has_a_line_for_each_cell():
    summary = summary_of(axes(), lambda _: 0.5)
    rows = list(csv.DictReader(as_csv(summary.cells).splitlines()))
    assert len(rows) == 16
    assert {(r["rule"], r["attack"], float(r["fraction"]), int(r["seed"])) for r in rows} == {
        c.key for c in axes().cells()
    }
    assert all(float(r["accuracy"]) == 0.5 for r in rows)


def test_the_results_say_whether_they_are_complete():
    whole = as_json(summary_of(axes(), lambda _: 0.5))
    part = as_json(summary_of(axes(), lambda key: 0.5 if key[3] == 1 else None))
    assert whole["complete"]
    assert not part["complete"]
    assert json.loads(json.dumps(whole)) == whole
    assert len(part["cells"]) == 8
    assert whole["axes"]["attacks"] == ["none", "alie", "backdoor"]


def test_the_command_repeats_the_study():
    command = command_of(SETTINGS.model_copy(update={"rounds": 7, "learning_rate": 0.2}), axes(rules="mean,nnm+krum"))
    assert command == (
        "pocketfed robustness --dataset digits --rounds 7 --lr 0.2 --rules mean,nnm+krum "
        "--attacks none,alie,backdoor --fractions 0,0.2 --seeds 1,2 --out DIR"
    )


# --- how it is drawn ---------------------------------------------------------------------------------------------


def drawing(tmp_path, summary):
    write_study(tmp_path, summary)
    return ET.fromstring((tmp_path / "img/robustness.svg").read_text())  # noqa: S314 - our own file


def test_every_figure_stands_in_its_square_and_in_words(tmp_path):
    figures = {c.key: (i + 1) / 100 for i, c in enumerate(axes(seeds="1").cells())}
    svg = drawing(tmp_path, summary_of(axes(seeds="1"), figures.get))
    squares = [
        (g.findtext("{*}title"), g.findtext("{*}text")) for g in svg.findall("{*}g") if g.find("{*}rect") is not None
    ]
    for (rule, attack, _, _), accuracy in figures.items():
        assert (f"{rule} against {attack}: {100 * accuracy:.1f} %", f"{100 * accuracy:.1f}") in squares
    assert len(squares) == len(figures) + 2, "and the worst attack on each of two rules"


def test_the_backdoor_has_a_picture_of_its_own_where_there_is_one(tmp_path):
    drawing(tmp_path, summary_of(axes(), lambda _: 0.5, trigger_success=0.9))
    assert "90.0" in (tmp_path / "img/robustness-backdoor.svg").read_text()
    # A study of other attacks in the same folder leaves no old picture behind.
    drawing(tmp_path, summary_of(axes(attacks="none,alie"), lambda _: 0.5))
    assert not (tmp_path / "img/robustness-backdoor.svg").exists()


def test_an_unfinished_study_can_be_looked_at(tmp_path):
    svg = drawing(tmp_path, summary_of(axes(), lambda key: 0.5 if key[0] == "mean" else None))
    titles = [g.findtext("{*}title") for g in svg.findall("{*}g")]
    assert "krum against alie: not run yet" in titles
    assert "8 of 16 cells" in (tmp_path / "report.html").read_text()


def test_the_page_fetches_nothing(tmp_path):
    drawing(tmp_path, summary_of(axes(), lambda _: 0.5, trigger_success=0.9))
    page = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}


def luminance(colour):
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@given(st.floats(0, 1))
def test_figures_can_be_read_on_every_colour(place):
    colour = heatmap._colour(place)
    ink = heatmap._ink_on(colour)
    light, dark = sorted([luminance(colour), luminance([int(ink[i : i + 2], 16) for i in (1, 3, 5)])], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@given(st.floats(-1, 2), st.booleans())
def test_a_scale_keeps_to_its_ends_in_either_direction(value, upwards):
    scale = Scale(0.1, 0.9, "") if upwards else Scale(0.9, 0.1, "")
    assert 0 <= scale.place(value) <= 1
    assert scale.place(0.9) == pytest.approx(float(upwards))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30))
def test_any_name_makes_a_well_formed_picture(name):
    square = Square(0.5, name, name)
    svg = heatmap.heatmap(name, name, [name], [Panel(name, [(name, [square])])], Scale(0, 1, name))
    assert ET.fromstring(svg).findtext("{*}title") == name  # noqa: S314 - our own
