"""The study of personalisation goes on where it stopped, and its page says what its cells came to."""

from __future__ import annotations

import json

import pytest

from client_sdk.protocol.errors import ConfigurationError
from simulator.personal_study.chart import Line, chart
from simulator.personal_study.outcome import Outcome, outcome_of
from simulator.personal_study.report import Study, as_markdown, as_pictures
from simulator.personal_study.settings import PROTECTIONS, SPEAKERS, WORLDS, Cell, StudySettings, methods_of
from simulator.personal_study.study import run_study
from simulator.personal_study.training import INNER_STEPS, Trained, World

SMALL = StudySettings(seeds=(1, 2), rounds=2, long_rounds=10, language_rounds=2, protected_rounds=2)
CURVE = tuple(0.3 + 0.05 * step for step in range(SMALL.adaptation + 1))

LONG_CURVE = tuple(0.3 + 0.03 * step for step in range(SPEAKERS.adaptation_steps + 1))


def invented(cell: Cell, settings: StudySettings) -> Outcome:
    """An outcome that could be, without any training."""
    return Outcome(
        curve=LONG_CURVE if cell.part == "languages" else CURVE,
        of_all=0.3,
        worst_of_all=0.1,
        worst=0.2,
        losing=0.05,
        newcomers=CURVE,
        kept={"readapt": 1.0, "interpolate, share 0.5": 0.5, "interpolate, share 1": None},
        groups={"": (0.3, 0.5)} if cell.part == "protection" else {"en": (0.3, 0.4), "zh": (0.2, 0.35)},
        bits={"en": (3.0, 2.5), "zh": (4.0, 3.0)},
        elsewhere=(3.5, 4.5),
        by_round=dict.fromkeys(settings.looked_at(), CURVE),
    )


def test_every_cell_is_played_once_and_kept(tmp_path):
    kept, played = tmp_path / "deep" / "cells.jsonl", []

    def play(cell, settings):
        played.append(cell.key)
        if len(played) == 5:
            raise KeyboardInterrupt
        return invented(cell, settings)

    with pytest.raises(KeyboardInterrupt):
        run_study(SMALL, kept, play=play)
    # The process died while it wrote a line.
    kept.write_text(kept.read_text() + '{"key": "gain; dig')
    done = run_study(SMALL, kept, play=play)
    keys = [cell.key for cell in SMALL.cells()]
    assert len(keys) == len(set(keys))
    assert set(done) == set(keys)
    assert played == [*keys[:5], *keys[4:]], "only the cell that was interrupted is played twice"
    assert run_study(SMALL, kept, play=play) == done
    assert len(played) == len(keys) + 1


def test_a_cell_whose_rates_changed_is_played_anew(tmp_path):
    kept, played = tmp_path / "cells.jsonl", []

    def play(cell, settings):
        played.append(cell.key)
        return invented(cell, settings)

    run_study(SMALL, kept, play=play)
    head, first, *others = kept.read_text().splitlines()
    entry = json.loads(first)
    kept.write_text("\n".join([head, json.dumps({**entry, "cell": "other rates"}), *others]) + "\n")
    played.clear()
    run_study(SMALL, kept, play=play)
    assert played == [entry["key"]]


def test_cells_of_another_study_are_refused(tmp_path):
    run_study(SMALL, tmp_path / "cells.jsonl", play=invented)
    with pytest.raises(ConfigurationError, match="another study"):
        run_study(SMALL.model_copy(update={"rounds": 3}), tmp_path / "cells.jsonl", play=invented)


def test_the_page_has_every_fleet_method_and_protection():
    study = Study(SMALL, run_study(SMALL, play=invented))
    page = as_markdown(study)
    for world in (*WORLDS, SPEAKERS):
        for method in methods_of(world):
            assert method.name in page
    assert all(world.name in page for world in WORLDS)
    assert all(f"| {name} |" in page for name in PROTECTIONS)
    assert "| 55.0 [55.0, 55.0] | +25.0 [+25.0, +25.0] |" in page, "personal accuracy, and gain over the global model"
    assert "| 30.0 40.0 | 20.0 35.0 | 30.0 90.0 |" in page
    assert "| 3.00 2.50 | 4.00 3.00 | 3.50 4.50 |" in page
    assert "| 8.0 | 10.0 | - |" in page, "steps to 70 % and to 80 % on a curve of 5 points a step; 90 % is not reached"
    pictures = as_pictures(study)
    assert len(pictures) == 3
    assert all(f"img/{name}" in page for name in pictures)


def test_a_chart_has_a_line_and_a_name_for_each():
    svg = chart("A & B", "steps", [Line("one", [(0, 0.1), (5, 0.9)]), Line("two <", [(0, 0.2), (5, 0.3)])])
    assert svg.count("<polyline") == 2
    assert "A &amp; B" in svg
    assert "two &lt; 30" in svg


TINY = World("tiny", "digits", "mlp", "shards:2", devices=10, newcomers=2, cohort=5, batch_size=8)


BY_NAME = {method.name: method for method in methods_of(TINY)}


def test_a_cell_repeats():
    cell = Cell("gain", TINY, BY_NAME["reptile"], seed=1)
    assert outcome_of(cell, SMALL) == outcome_of(cell, SMALL)


@pytest.mark.parametrize("name", ["maml", "FedPer"])
def test_a_cell_is_played(name):
    method = BY_NAME[name]
    outcome = outcome_of(Cell("gain", TINY, method, seed=1), SMALL)
    assert len(outcome.curve) == len(outcome.newcomers) == SMALL.adaptation + 1
    assert outcome.curve[INNER_STEPS] > outcome.curve[0] + 0.05, "two classes are soon told apart"
    assert set(outcome.kept) == (
        set() if method.personal else {"readapt", "interpolate, share 0.5", "interpolate, share 1"}
    )


def test_models_that_were_asked_for_are_kept_and_newcomers_never_train():
    method = BY_NAME["FedPer"]
    trained = Trained.of(TINY, method, rounds=4, seed=1, keep=(0, 2))
    assert sorted(trained.by_round) == [0, 2, 4]
    assert trained.own
    assert set(trained.own) <= set(range(TINY.devices))
    starts = trained.starts(range(TINY.devices + TINY.newcomers))
    mask = trained.layers.mask
    assert (starts[:, mask] == trained.weights[mask]).all(), "what is shared is everybody's"
    assert (starts[-TINY.newcomers :] == trained.weights).all()
