"""``pocketfed simulate --personalize``: trained by both engines, and judged by what every device will see next."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from client_sdk.cli import main
from simulator.config import SimulationConfig
from simulator.folder import RunFolder
from simulator.monitor import Standing
from simulator.progress import SilentDisplay
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation
from simulator.view import CommittedRound

FLAGS = [
    *("--personalize", "maml", "--devices", "10", "--rounds", "4", "--cohort", "4", "--model", "softmax"),
    *("--partition", "shards:2", "--seed", "3"),
]
ENGINES = ("devices", "cohort")
LAYERS = {
    "personal": ("output.bias",), "devices": 8, "rounds": 2, "cohort": 4, "model": "softmax", "epochs": 1,
    "adapt_steps": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run by the command."""

    out: Path
    results: SimulationResults
    printed: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    """The same run by either engine."""
    found = {}
    for engine in ENGINES:
        out, printed = tmp_path_factory.mktemp(engine) / "run", io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = main(["simulate", *FLAGS, "--engine", engine, "--no-progress", "--out", str(out)])
        assert status == 0
        found[engine] = Run(out, SimulationResults.read(out / "results.json"), printed.getvalue())
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_results_hold_the_figures_under_the_names_of_the_specification(runs, engine):
    results = runs[engine].results
    found = results.personalization
    assert results.config.plan.algorithm == "maml"
    assert found.personalization_gain == pytest.approx(found.personalized_accuracy - found.global_accuracy)
    of_all, own = (sum(column) / 10 for column in zip(*found.per_device_accuracies.values(), strict=True))
    assert (found.global_accuracy, found.personalized_accuracy) == pytest.approx((of_all, own))
    assert [*found.per_device_accuracies] == [str(device) for device in range(10)]
    assert (found.devices, found.steps, found.learning_rate) == (10, 5, results.config.learning_rate)
    assert [curve.round for curve in found.curves] == [0, 1, 2, 4]
    assert all(len(curve.accuracy) == 6 for curve in found.curves)
    assert [row.personal_share for row in found.forgetting] == [0.5, 1.0]
    # Two classes a device: after five steps it knows which.
    assert found.personalization_gain > 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_the_report_and_the_last_words_tell_of_it(runs, engine):
    run = runs[engine]
    assert "<h2>Personalisation</h2>" in (run.out / "report.html").read_text()
    assert f"personal models {100 * run.results.personalization.personalized_accuracy:.1f} %" in run.printed


def test_both_engines_find_the_same_up_to_rounding(runs):
    one, other = (runs[engine].results.personalization for engine in ENGINES)
    assert one.per_device_accuracies.keys() == other.per_device_accuracies.keys()
    assert one.global_accuracy == pytest.approx(other.global_accuracy, abs=0.02)
    assert one.personalized_accuracy == pytest.approx(other.personalized_accuracy, abs=0.02)


def test_sessions_take_the_time_of_their_operations(runs):
    costs = (runs["devices"].out / "workload.json").read_text()
    assert costs == (runs["cohort"].out / "workload.json").read_text()
    assert '"flops_per_session": null' not in costs


class _Stops(SilentDisplay):
    """Presses Ctrl-C after a round."""

    def round_done(self, committed: CommittedRound, standing: Standing) -> None:  # noqa: ARG002 - of the protocol
        if committed.model_version == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_figures(runs, tmp_path):
    whole = runs["devices"].results
    with RunFolder.begin(tmp_path / "run", whole.config) as folder, pytest.raises(KeyboardInterrupt):
        run_simulation(folder, RunOptions(display=_Stops()))
    with RunFolder.resume(tmp_path / "run", {}) as folder:
        resumed = run_simulation(folder, RunOptions())
    assert resumed.model_sha256 == whole.model_sha256
    assert resumed.personalization == whole.personalization


def test_devices_keep_their_layers_and_are_judged_with_them(tmp_path):
    found = {}
    for engine in ENGINES:
        config = SimulationConfig.parse({**LAYERS, "engine": engine})
        with RunFolder.begin(tmp_path / engine, config) as folder:
            results = run_simulation(folder, RunOptions())
        found[engine] = results.personalization
    # Four reports, of float32 numbers, and not one of the ten of the layer that stays.
    assert results.rounds[0].bytes_counted == 4 * 4 * (results.parameters - 10)
    one, other = found.values()
    assert one.personal_layers == other.personal_layers == ("output.bias",)
    assert one.personalized_accuracy == pytest.approx(other.personalized_accuracy, abs=0.02)
    # What devices had in these layers after earlier rounds is not known any more.
    assert [curve.round for curve in one.curves] == [2]
    assert one.forgetting == ()


def test_plain_averaging_is_judged_where_that_is_asked_for_and_only_there(tmp_path):
    given = {"engine": "cohort", "devices": 8, "rounds": 2, "cohort": 4, "model": "softmax"}
    found = []
    for name, more in (("plain", {}), ("tuned", {"adapt_steps": 2, "adapt_learning_rate": 0.1})):
        with RunFolder.begin(tmp_path / name, SimulationConfig.parse({**given, **more})) as folder:
            found.append(run_simulation(folder, RunOptions()))
    plain, tuned = found
    assert plain.model_sha256 == tuned.model_sha256
    assert plain.personalization is None
    assert (tuned.personalization.steps, tuned.personalization.learning_rate) == (2, 0.1)
