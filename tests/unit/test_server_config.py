"""The server's configuration: precedence, typos, and what cannot work together."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_sdk.protocol.errors import ConfigurationError
from server_ref.config import ServerConfig, TaskConfig, load_config
from server_ref.recipe import compression_of

FILE = """
data_dir = "state"
[task]
bundle = "bundle"
rounds = 3
buffer_size = 4
[task.plan]
learning_rate = 0.5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    return path


def test_paths_in_the_file_are_relative_to_the_file(file):
    config = load_config(file)
    assert config.data_dir == file.parent / "state"
    assert config.task.bundle == file.parent / "bundle"


def test_flags_win_over_the_environment_and_the_environment_over_the_file(file, monkeypatch):
    monkeypatch.setenv("POCKETFED_TASK__ROUNDS", "7")
    monkeypatch.setenv("POCKETFED_TASK__BUFFER_SIZE", "8")
    config = load_config(file, {"task": {"rounds": 9}})
    assert (config.task.rounds, config.task.buffer_size, config.task.plan.learning_rate) == (9, 8, 0.5)


def test_a_synchronous_round_is_the_default(file):
    policy = load_config(file).task.policy()
    assert (policy.buffer_size, policy.concurrency, policy.refill_at, policy.max_staleness) == (4, 4, 4, 0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"task": {"roundz": 3}}, "task.roundz"),
        ({"task": {"rounds": 0}}, "task.rounds"),
        ({"task": {"plan": {"learning_rate": float("nan")}}}, "task.plan.learning_rate"),
        ({"task": {"retry_min_s": 9.0, "retry_max_s": 1.0}}, "retry_max_s"),
        ({"task": {"concurrency": 2}}, "concurrency=2 cannot fill buffer_size=4"),
        ({"task": {"concurrency": 5, "refill_at": 6}}, "refill_at=6 can never be reached"),
        ({"port": 70000}, "port"),
        ({"clock": "sundial"}, "clock"),
    ],
)
def test_what_cannot_be_is_named(file, overrides, says):
    with pytest.raises(ConfigurationError, match=says):
        load_config(file, overrides)


def test_missing_settings_are_named_with_their_flags():
    with pytest.raises(ConfigurationError, match=r"--data-dir.*--bundle"):
        load_config()


def test_unreadable_files_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[task\n")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_the_operators_page_names_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    for model, prefix in ((ServerConfig, ""), (TaskConfig, "task.")):
        for name, field in model.model_fields.items():
            if name in {"task", "plan"}:
                continue
            [defaults] = [row[2] for row in rows if f"`{prefix}{name}`" in row[1]]
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                stated = [word.strip("` ") for word in defaults.split(",")]
                assert field.default in [float(n) for n in stated if n.replace(".", "", 1).replace("e-", "").isdigit()]


def test_reports_weigh_what_the_sum_allows(tmp_path):
    """Assignments carry the weight that the pipeline declares, or every report would be refused."""
    plain = TaskConfig(bundle=tmp_path, weight_cap=50)
    uniform = TaskConfig(bundle=tmp_path, weight_cap=50, aggregation={"weighting": "uniform"})
    scaffold = TaskConfig(bundle=tmp_path, weight_cap=50, population=3, plan={"algorithm": "scaffold"})
    assert [c.policy().weight_cap for c in (plain, uniform, scaffold)] == [50, 1, 1]


@pytest.mark.parametrize(("line", "found"), [(None, None), ("none", None), ("topk:1e-2", "topk:0.01")])
def test_no_compression_has_one_form_for_the_devices(tmp_path, line, found):
    spec = compression_of(TaskConfig(bundle=tmp_path, compression=line))
    assert (None if spec is None else str(spec)) == found
