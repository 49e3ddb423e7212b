"""The study end to end: real training, worker processes, Ctrl-C, and what the command says."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys

import pytest

from client_sdk.cli import main
from simulator.errors import WorkerLost
from simulator.robustness.cell import run_cell
from simulator.robustness.config import Axes, StudySettings
from simulator.robustness.folder import StudyFolder
from simulator.robustness.study import run_study

SMALL = StudySettings(model="softmax", devices=10, rounds=2, epochs=1)


def cells(rules, attacks, fractions="0.3", seeds="1"):
    return list(Axes.parse(rules, attacks, fractions, seeds).cells())


def outcome(rule, attack, fraction="0.3", settings=SMALL):
    (cell,) = cells(rule, attack, fraction)
    return run_cell(settings, cell)


def quiet(*_):
    """Tells nobody."""


def test_a_cell_repeats_to_the_bit():
    assert outcome("krum", "gaussian") == outcome("krum", "gaussian")


def test_what_the_mean_makes_of_honest_devices_does_not_depend_on_who_might_attack():
    assert outcome("mean", "none").accuracy == outcome("mean", "none", "0").accuracy > 0.5


def test_scaled_updates_ruin_the_mean_and_not_the_median():
    settings = SMALL.model_copy(update={"rounds": 4})
    ruined, kept, honest = (
        outcome(rule, attack, settings=settings)
        for rule, attack in [("mean", "scaling"), ("median", "scaling"), ("median", "none")]
    )
    assert ruined.accuracy < 0.5
    assert kept.accuracy > honest.accuracy - 0.15
    assert (ruined.num_byzantine, ruined.status, ruined.rounds) == (3, "completed", 4)


def test_a_backdoor_opens_the_mean_to_its_trigger():
    planted, honest = outcome("mean", "backdoor:scale=replace"), outcome("mean", "none")
    assert planted.trigger_success > 0.9
    assert honest.trigger_success < 0.5
    assert outcome("mean", "zero").trigger_success is None


def test_a_rule_that_does_not_stand_so_many_is_not_run():
    refused = outcome("bulyan", "zero")
    assert (refused.status, refused.rounds, refused.accuracy) == ("refused", 0, None)
    assert "n >= 4f + 3" in refused.detail


@pytest.mark.parametrize(
    ("rule", "rate", "says"),
    [("mean", 1000.0, "no device could train"), ("krum", 30.0, r"only \d devices could train.*n >= 2f \+ 3")],
)
def test_a_model_beyond_repair_is_an_outcome_and_no_crash(rule, rate, says):
    exploded = outcome(rule, "none", settings=StudySettings(devices=10, rounds=2, learning_rate=rate))
    assert (exploded.status, exploded.rounds) == ("collapsed", 0)
    assert re.match(says, exploded.detail)
    assert exploded.accuracy < 0.5


def test_ctrl_c_loses_no_cell_and_workers_change_none(tmp_path):
    wanted = cells("mean,median", "none,alie,zero")
    told = []

    def interrupt(_result, done, total, _left_s):
        told.append((done, total))
        if len(told) == 1:
            signal.raise_signal(signal.SIGINT)

    with StudyFolder(tmp_path / "s", SMALL) as folder:
        assert not run_study(folder, wanted, workers=1, tell=interrupt, say=quiet)
        kept = dict(folder.done)
    assert 1 <= len(kept) < len(wanted)
    assert told == [(i + 1, len(wanted)) for i in range(len(kept))]
    with StudyFolder(tmp_path / "s", SMALL) as folder:
        assert folder.done == kept
        told.clear()
        assert run_study(folder, wanted, workers=2, tell=lambda *what: told.append(what[0].key), say=quiet)
        assert not set(told) & set(kept), "nothing is run twice"
        assert all(folder.done[cell.key] == run_cell(SMALL, cell) for cell in wanted)
        # Nothing is left to do: no process is started.
        assert run_study(folder, wanted, workers=2, tell=quiet, say=quiet)


def test_a_worker_that_dies_is_named_and_the_rest_is_kept(tmp_path):
    def kill(*_):
        for child in multiprocessing.active_children():
            child.kill()

    with StudyFolder(tmp_path / "s", SMALL) as folder:
        with pytest.raises(WorkerLost, match="finished cells are kept"):
            run_study(folder, cells("mean,krum,median", "none,alie,zero"), workers=1, tell=kill, say=quiet)
        assert folder.done


def test_the_command_runs_goes_on_and_tells_the_worst(tmp_path, capsys):
    out = tmp_path / "s"
    flags = ["--model", "softmax", "--devices", "10", "--rounds", "2", "--epochs", "1", "--fractions", "0.3"]
    command = ["robustness", *flags, "--attacks", "none,scaling", "--workers", "1", "--out", str(out)]
    assert main([*command, "--rules", "mean"]) == 0
    shown = capsys.readouterr()
    assert "cell 2/2  mean against scaling, 3 attackers, seed 1: accuracy 0." in shown.err
    assert "worst attack on each rule, 3 attackers:\n  mean" in shown.out
    assert main([*command, "--rules", "mean,median"]) == 0
    assert "4 cells, 2 of them done already" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert len(results["entries"]) == 4
    assert (out / "report.html").exists()
    assert main([*command, "--rounds", "3"]) == 2
    assert "other settings: rounds 3 (the study has 2)" in capsys.readouterr().err


def test_a_mistake_costs_no_folder(tmp_path, capsys):
    assert main(["robustness", "--attacks", "alei", "--out", str(tmp_path / "s")]) == 2
    assert "there is no attack 'alei'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_asking_for_help_loads_nothing_heavy():
    code = (
        "import sys, argparse; from simulator.robustness.cli import robustness_command;"
        "robustness_command(argparse.ArgumentParser());"
        "print(sorted({'numpy', 'torch', 'numba', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
