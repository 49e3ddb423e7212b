"""The server's configuration: precedence, typos, and what cannot work together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydantic import BaseModel

from client_sdk.protocol.errors import PROBLEM_PREFIX, ConfigurationError, from_problem
from client_sdk.protocol.messages import WaitReason
from server_ref.config import ServerConfig, TaskConfig, load_config
from server_ref.models import encode_model
from server_ref.recipe import compression_of
from server_ref.task import load_task
from tests.bundles import tiny_bundle

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
        ({"task": {"lease_s": float("inf")}}, "task.lease_s: .*less than or equal"),
        ({"task": {"retry_max_s": float("inf")}}, "task.retry_max_s: .*less than or equal"),
        ({"task": {"retry_min_s": float("nan")}}, "task.retry_min_s"),
        ({"task": {"resolution": float("inf")}}, "task.resolution: .*less than or equal"),
        ({"task": {"resolution": 1e-320}}, "task.resolution: .*greater than or equal"),
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


PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def settings(model=ServerConfig, prefix=""):
    """Every setting by its full name, with its default; ``...`` where it must be given."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert field.is_required() or field.default == field.annotation(), "a section's defaults are its fields'"
            yield from settings(field.annotation, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", ... if field.is_required() else field.default
        for section in get_args(field.annotation):
            # A section that may be missing has settings of its own.
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from settings(section, f"{prefix}{name}.")


def stated(page):
    """Setting -> what its row says of the default; a row may hold several of each."""
    found = {}
    for line in page.split("## Settings")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            names = re.findall(r"`([^`]+)`", cells[0])
            defaults = [word.strip(" `") for word in cells[1].split(",")]
            assert len(names) == len(defaults), line
            assert not set(names) & set(found), line
            found |= dict(zip(names, defaults, strict=True))
    return found


def as_stated(name, value):
    match value:
        case None | ():
            return {"task.concurrency": "buffer_size", "task.refill_at": "concurrency"}.get(name, "none")
        case bool():
            return str(value).lower()
        case int() | float():
            return f"{value:g}".replace("e-0", "e-")
        case _:
            return "" if value is ... else str(value)


def test_the_operators_page_names_every_setting_with_its_default():
    assert stated(PAGE.read_text()) == {name: as_stated(name, value) for name, value in settings()}


def test_a_setting_that_the_page_forgets_or_gets_wrong_is_found():
    rows = "## Settings\n| `a`, `b.c` | 1, `x` | words, `more` |\n| if | `no` row | of settings |\n"
    assert stated(rows) == {"a": "1", "b.c": "x"}
    everything = dict(settings())
    assert everything["task.staleness.max_staleness"] == 0
    assert everything["task.aggregation.rule"] == "mean"
    assert everything["task.bundle"] is ...


def test_every_type_of_refusal_that_the_page_names_exists():
    section = PAGE.read_text().split("## Refused, and why")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    slugs = {slug for row in rows for slug in re.findall(r"`([a-z-]+)`", row)}
    assert {from_problem(PROBLEM_PREFIX + slug).slug for slug in slugs} == slugs
    assert set(get_args(WaitReason)) <= set(re.findall(r"`([a-z-]+)`", section))


def test_a_halted_task_goes_on_from_its_best_model_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = tiny_bundle("softmax", tmp_path / "bundles" / "mlp")
    best = encode_model(7, np.linspace(-1, 1, bundle.manifest.num_parameters).astype(np.float32), bundle.manifest)
    Path("best.safetensors").write_bytes(best.frame)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/server.md", "exec"), {})  # noqa: S102 - our own page
    task = load_task(TaskConfig(bundle="bundles/again", plan={"batch_size": 4}))
    assert task.initial_weights.tolist() == best.weights.tolist()


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
