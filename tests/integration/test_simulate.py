"""The whole stack on a small fleet: real server process, real HTTP, real exported programs, simulated time only."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client_sdk.cli import main
from server_ref.aggregation.staleness import StalenessPolicy
from simulator.config import SimulationConfig
from simulator.datasets import Split
from simulator.embedded import EmbeddedServer
from simulator.errors import ResumeMismatch, ServerUnavailable
from simulator.folder import RunFolder
from simulator.prepare import Fleet
from simulator.results import SimulationResults
from simulator.run import RunOptions, run_simulation

# Small, but with everything that could disturb repeatability: over-selection, stragglers, drop-outs.
SMALL = SimulationConfig.parse(
    {"devices": 10, "rounds": 3, "model": "softmax", "cohort": 4, "overselect": 1.5, "dropout": 0.15, "seed": 3}
)
# Long enough to be stopped in the middle.
LONGER = SMALL.model_copy(update={"rounds": 12})


def simulate(config, out, fleet=None, **options):
    with RunFolder.begin(out, config) as folder:
        return run_simulation(folder, RunOptions(**options), fleet)


def resume(out, **options):
    with RunFolder.resume(out, {}) as folder:
        return run_simulation(folder, RunOptions(**options))


def flags(config):
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in config.model_dump(
            include={"devices", "rounds", "model", "cohort", "overselect", "dropout", "seed"}
        ).items()
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small run, as the command carries it out."""
    out = tmp_path_factory.mktemp("small") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["simulate", *flags(SMALL), "--workers", "1", "--no-progress", "--out", str(out)])
    assert status == 0
    return out, SimulationResults.read(out / "results.json"), printed.getvalue()


@pytest.fixture(scope="module")
def longer_sha256(tmp_path_factory):
    return simulate(LONGER, tmp_path_factory.mktemp("longer") / "run").model_sha256


def test_a_run_learns_and_writes_its_results_and_report(small):
    out, results, _ = small
    assert results.config == SMALL
    assert results.status == "completed"
    assert results.repeatable
    assert results.final_accuracy > 0.6
    assert [r.round for r in results.rounds] == [1, 2, 3]
    assert all(r.reports == 4 and r.accuracy is not None and r.loss is not None for r in results.rounds)
    assert results.rounds[-1].model_sha256 == results.model_sha256
    assert (out / "report.html").stat().st_size > 100_000


def test_the_command_prints_the_figures(small):
    out, results, printed = small
    assert results.model_sha256 in printed
    assert f"test accuracy   {results.final_accuracy:.4f}" in printed
    assert str(out / "report.html") in printed


def test_traffic_is_what_the_devices_moved(small):
    _, results, _ = small
    model_bytes = 4 * results.parameters
    for r in results.rounds:
        assert r.bytes_up >= r.reports * model_bytes
        assert r.bytes_down >= r.reports * model_bytes
    assert results.bytes_down > results.rounds[0].bytes_down


def test_threads_and_runtime_do_not_change_the_model(small, tmp_path):
    _, results, _ = small
    other = simulate(SMALL, tmp_path / "run", workers=3, runtime="pybindings")
    assert other.runtime != results.runtime
    assert other.model_sha256 == results.model_sha256
    assert [r.model_sha256 for r in other.rounds] == [r.model_sha256 for r in results.rounds]
    assert [t.counted for t in other.tiers] == [t.counted for t in results.tiers]


def test_another_seed_gives_another_model(small, tmp_path):
    _, results, _ = small
    assert simulate(SMALL.model_copy(update={"seed": 4}), tmp_path / "run").model_sha256 != results.model_sha256


def with_broken_devices(config, broken):
    """A fleet some of whose devices hold numbers on which no training stays finite."""
    fleet = Fleet.of(config)
    x = fleet.dataset.train.x.copy()
    for device in broken:
        x[fleet.parts[device]] *= 1e30
    return replace(fleet, dataset=replace(fleet.dataset, train=Split(x, fleet.dataset.train.y)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"cohort": 2, "overselect": 3.0, "refill_at": 1, "staleness": StalenessPolicy(max_staleness=4), "rounds": 6}],
    ids=["synchronous", "asynchronous"],
)
def test_devices_that_cannot_train_end_no_run_and_change_with_no_thread(tmp_path, changes):
    config = SMALL.model_copy(update=changes)
    one, three = (
        simulate(config, tmp_path / str(n), fleet=with_broken_devices(config, range(0, 10, 3)), workers=n)
        for n in (1, 3)
    )
    assert one.status == three.status == "completed"
    assert one.halted is None
    assert one.model_sha256 == three.model_sha256
    assert one.refusals == three.refusals
    failed = sum(n for reason, n in one.refusals.items() if reason != "stale-report")
    assert failed == sum(t.refused for t in one.tiers) > 0
    assert "refused or failed" in (tmp_path / "1" / "report.html").read_text()


@pytest.mark.parametrize("engine", ["devices", "cohort"])
def test_a_fleet_in_which_nobody_can_train_is_halted_with_a_report_also_when_it_is_resumed(tmp_path, engine):
    config = SMALL.model_copy(update={"engine": engine})
    fleet = with_broken_devices(config, range(config.devices))
    results = simulate(config, tmp_path / "run", fleet=fleet)
    assert results.halted is not None
    assert "sessions in a row came to nothing" in results.halted
    assert results.rounds == ()
    assert sum(results.refusals.values()) == SMALL.devices + 1
    with RunFolder.resume(tmp_path / "run", {}) as folder:
        assert run_simulation(folder, RunOptions(), fleet).halted == results.halted


def test_a_run_that_diverges_says_so_by_its_exit_status_too(tmp_path, capsys):
    arguments = ["--engine", "cohort", "--devices", "4", "--rounds", "2", "--lr", "1000", "--epochs", "20"]
    assert main(["simulate", "--no-progress", *arguments, "--out", str(tmp_path / "run")]) == 3
    assert "halted after 0 of 2 rounds" in capsys.readouterr().out


def test_asynchronous_rounds_are_repeatable_too(tmp_path):
    config = SMALL.model_copy(
        update={
            "cohort": 2,
            "overselect": 3.0,
            "refill_at": 1,
            "staleness": StalenessPolicy(max_staleness=4),
            "rounds": 6,
            "dropout": 0.1,
        }
    )
    first, second = (simulate(config, tmp_path / str(workers), workers=workers) for workers in (1, 4))
    assert first.model_sha256 == second.model_sha256
    assert len(first.rounds) == 6


class Process:
    """``pocketfed simulate`` as a process of its own, and its server."""

    def __init__(self, *arguments):
        code = "import sys; from client_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "simulate", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, start):
        """Read progress until a line that begins so."""
        for line in self.process.stderr:
            if line.startswith(start):
                return
        pytest.fail(f"no line begins with {start!r}")

    def end(self):
        self.process.communicate(timeout=60)
        return self.process.returncode


def server_processes(out):
    """Process descriptors of the servers that run on this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(out / "server" / "config.toml") in (entry / "cmdline").read_text():
                found.append(os.pidfd_open(int(entry.name)))
        except (OSError, UnicodeDecodeError):
            continue
    return found


def has_ended(descriptor):
    """Whether a process ends soon; waits on the kernel, not on a clock."""
    ready, _, _ = select.select([descriptor], [], [], 30)
    os.close(descriptor)
    return bool(ready)


def test_ctrl_c_leaves_a_report_and_a_run_that_resumes_to_the_same_model(tmp_path, longer_sha256):
    out = tmp_path / "run"
    run = Process(*flags(LONGER), "--out", str(out))
    run.wait_for("round 2/")
    (server,) = server_processes(out)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert has_ended(server)
    left = SimulationResults.read(out / "results.json")
    assert left.status == "interrupted"
    assert left.final_accuracy is None
    assert 2 <= len(left.rounds) < LONGER.rounds
    assert "This run was interrupted" in (out / "report.html").read_text()
    done = resume(out)
    assert done.status == "completed"
    assert done.model_sha256 == longer_sha256
    assert done.rounds[: len(left.rounds)] == left.rounds


def test_a_killed_run_takes_its_server_along_and_resumes_to_the_same_model(tmp_path, longer_sha256):
    out = tmp_path / "run"
    run = Process(*flags(LONGER), "--out", str(out))
    run.wait_for("round 4/")
    (server,) = server_processes(out)
    run.process.kill()
    run.end()
    assert has_ended(server), "the server outlives its simulator"
    assert resume(out, workers=3).model_sha256 == longer_sha256


@pytest.mark.parametrize("setting", [{"compression": "topk:0.1"}, {"algorithm": "scaffold"}], ids=str)
def test_devices_of_a_killed_run_remember_what_those_of_an_undisturbed_one_do(tmp_path, setting):
    config = LONGER.model_copy(update=setting)
    undisturbed = simulate(config, tmp_path / "undisturbed")
    out = tmp_path / "run"
    run = Process(*flags(config), *(word for k, v in setting.items() for word in (f"--{k}", v)), "--out", str(out))
    run.wait_for("round 4/")
    run.process.kill()
    run.end()
    assert resume(out, workers=3).model_sha256 == undisturbed.model_sha256


def test_a_server_that_dies_ends_the_run_with_a_word_and_the_rest_follows_later(tmp_path, longer_sha256):
    out = tmp_path / "run"

    class KillsServer:
        def show(self, standing):
            pass

        def round_done(self, committed, standing):  # noqa: ARG002 - the display's interface
            if committed.model_version == 3:
                for descriptor in server_processes(out):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    os.close(descriptor)

    with pytest.raises(ServerUnavailable, match=r"ended with status -9.*server\.log"):
        simulate(LONGER, out, display=KillsServer())
    assert resume(out).model_sha256 == longer_sha256


def test_a_finished_run_can_be_reported_again(small):
    out, results, _ = small
    (out / "report.html").unlink()
    again = resume(out)
    assert (out / "report.html").exists()
    assert again.model_sha256 == results.model_sha256
    assert again.final_accuracy == results.final_accuracy


def test_a_run_is_not_continued_with_other_settings(small):
    out = small[0]
    with pytest.raises(ResumeMismatch, match=r"--seed 9 \(the run has 3\)"):
        RunFolder.resume(out, {"seed": 9})


def test_a_folder_with_a_run_is_refused_without_resume(small, capsys):
    out = small[0]
    assert main(["simulate", "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.fixture
def foreign_server(small, tmp_path, monkeypatch):
    """A server of somebody else, on the wall clock, with the same program."""
    # What is exported in the shell must not reach a server that a simulation starts.
    monkeypatch.setenv("POCKETFED_TASK__ROUNDS", "1")
    bundle = small[0] / "bundle"
    config = tmp_path / "foreign" / "config.toml"
    config.parent.mkdir()
    config.write_text(
        f'data_dir = "data"\nport = 0\nexit_with_stdin = true\n[task]\nbundle = "{bundle}"\n'
        f'validation_data = "{small[0] / "server" / "validation.npz"}"\nrounds = 3\nbuffer_size = 4\nconcurrency = 6\n'
        "retry_min_s = 0.05\nretry_max_s = 0.2\n[task.plan]\nbatch_size = 8\nlearning_rate = 0.5\nlocal_epochs = 2\n"
    )
    with EmbeddedServer(config) as server:
        yield server


def test_a_foreign_server_is_used_on_its_own_clock_and_the_run_says_that_it_is_not_repeatable(foreign_server, tmp_path):
    config = SMALL.model_copy(update={"dropout": 0.0, "server": foreign_server.url})
    results = simulate(config, tmp_path / "run")
    assert results.status == "completed"
    assert not results.repeatable
    assert results.server == foreign_server.url
    assert results.virtual_seconds is None
    assert len(results.rounds) == 3
    assert results.final_accuracy > 0.5
    assert "gives another model" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ResumeMismatch, match="goes on without it"):
        resume(tmp_path / "run")


def test_a_server_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["simulate", "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "run")]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
