"""The commands of the simulator: help that teaches, and one line for what cannot be."""

import subprocess
import sys

import pytest

from client_sdk.cli import main
from client_sdk.protocol.meta_learning import META_ALGORITHMS, MetaPlan
from server_ref import flags
from simulator import fetch
from simulator.config import SimulationConfig
from simulator.recipes import RECIPES


def fails(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "0"], "--devices"),
        (["--devices", "many"], "--devices"),
        (["--devices", "2000"], "2000 devices cannot each get one of 1259"),
        (["--devices", "5", "--cohort", "6"], "cohort of 6"),
        (["--partition", "random"], "iid, dirichlet:ALPHA"),
        (["--partition", "shards:99", "--devices", "100"], "need 9900 examples"),
        (["--workers", "0"], "--workers"),
        (["--model", "transformer"], "--model"),
        (["--dataset", "imagenet"], "--dataset"),
        (["--personalize", "maml", "--epochs", "3"], "--inner-steps steps: leave --epochs out"),
        (
            ["--personalize", "maml", "--max-steps", "3"],
            "takes --inner-steps steps on every device: leave --max-steps out",
        ),
        (["--personalize", "maml", "--algorithm", "scaffold"], "leave one of them out"),
        (["--inner-steps", "3"], "--inner-steps: fedavg does not adapt; add --personalize maml"),
        (["--meta-lr", "0.1", "--query-fraction", "0.5"], "--meta-lr, --query-fraction: fedavg does not adapt"),
        (
            ["--personalize", "reptile", "--prox-mu", "1", "--local-work", "adaptive"],
            "leave --prox-mu and --local-work",
        ),
        (["--adapt-lr", "0.1"], "--adapt-steps 5"),
        (["--adapt-steps", "many"], "--adapt-steps"),
        (["--resume"], "no run to resume"),
        (["--resume", "--overwrite"], "leave one of them out"),
        (["--server", "127.0.0.1:80"], "write it like http://127.0.0.1:8470"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, words):
    out = tmp_path / "run"
    message = fails(capsys, "simulate", *arguments, "--out", str(out))
    assert words in message
    assert "Traceback" not in message
    assert not out.exists() or list(out.iterdir()) == []


def test_a_data_set_that_is_not_here_names_the_command_that_fetches_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POCKETFED_CACHE", str(tmp_path / "cache"))
    message = fails(capsys, "simulate", "--dataset", "fashion-mnist", "--out", str(tmp_path / "run"))
    assert "pocketfed data fashion-mnist" in message
    assert list((tmp_path / "run").iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, "simulate", "--out", str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("simulate", ["examples:", "--resume --out", "dirichlet:0.5", "report.html"]),
        ("simulate", ["examples:", "--epsilon 8 --max", "--secure 3of5"]),
        ("data", ["examples:", "--from", "Debian", "simulate --dataset manpages", "docs/languages.md"]),
    ],
)
def test_help_teaches_by_example(capsys, command, words):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text


def test_help_tells_the_rates_that_a_run_takes(capsys):
    assert main(["simulate", "--help"]) == 0
    # Lines may break behind the hyphen of per-fedavg.
    text = " ".join(capsys.readouterr().out.split()).replace("per- fedavg", "per-fedavg")
    rates = text.split("--lr X ")[1].split("--local-work")[0]
    meta = text.split("--meta-lr RATE ")[1].split("--personal-layers")[0]
    for dataset in RECIPES:
        assert f"{SimulationConfig.parse({'dataset': dataset}).learning_rate:g} for {dataset}" in rates
    for algorithm in META_ALGORITHMS:
        config = SimulationConfig.parse({"algorithm": algorithm})
        assert f" {algorithm} {config.learning_rate:g}" in rates
        if algorithm != "reptile":
            assert f" {algorithm} {config.plan.meta.meta_learning_rate:g}" in meta
    assert f"else {MetaPlan().meta_learning_rate:g})" in meta


def test_help_loads_neither_torch_nor_numpy():
    code = (
        "import sys; from client_sdk.cli import main; main(['simulate', '--help']); main(['data', '--help']);"
        "assert not {'torch', 'numpy', 'plotly', 'sklearn', 'rich'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_digits_needs_no_fetching(capsys):
    assert main(["data", "digits"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_data_from_a_folder_without_the_files_is_refused(tmp_path, capsys):
    message = fails(capsys, "data", "fashion-mnist", "--from", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "lacks" in message
    assert "train-images-idx3-ubyte.gz" in message


def test_data_that_is_there_already_is_not_fetched_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "is_current", lambda _package, _folder: True)
    assert main(["data", "fashion-mnist", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path)
    assert "unharmed" in printed.err


def test_the_flag_knows_every_algorithm_of_meta_learning():
    # It has its own list, because that of the protocol comes with numpy.
    assert flags.META_ALGORITHMS == META_ALGORITHMS
