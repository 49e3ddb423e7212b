"""docs/aggregators.md says what the code has: settings, stages, metrics, refusals, a configuration that loads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from client_sdk.cli import main
from client_sdk.protocol.errors import PROBLEM_PREFIX, from_problem
from client_sdk.protocol.messages import Message
from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.config import AggregatorSettings, load_settings
from server_ref.secure.identity import AggregatorKeys
from server_ref.secure.keys import Peers, public_part
from server_ref.secure.metrics import AggregatorMetrics
from server_ref.secure.parameters import PinnedParameters, PinnedPrivacy
from server_ref.secure.stages_table import StagesTable
from server_ref.task import load_task
from tests.bundles import tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/aggregators.md").read_text()


def rows(header: str) -> list[list[str]]:
    """Cells of the table with this header."""
    lines = PAGE.splitlines()
    body = lines[lines.index(header) + 2 :]
    table = body[: next(i for i, line in enumerate([*body, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def shown(default: object) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return str(default).lower()
        case float() | int():
            return str(default)
        case _:
            return f"`{default}`"


def defaults(model: type, prefix: str = "") -> dict[str, str]:
    """Each setting of a model and its default as the page writes it."""
    found = {}
    for name, field in model.model_fields.items():
        if name == "parameters":
            continue
        found[prefix + name] = "" if field.default is PydanticUndefined else shown(field.default)
    return found


def test_every_setting_is_listed_with_its_default():
    expected = (
        defaults(AggregatorSettings)
        | defaults(PinnedParameters, "parameters.")
        | defaults(PinnedPrivacy, "parameters.privacy.")
    )
    listed: dict[str, str] = {}
    for names, values, _ in rows("| setting | default | meaning |"):
        each = re.findall(r"`([^`]+)`", names)
        given = [value.strip() for value in values.split(",")]
        given += [""] * (len(each) - len(given))
        listed |= dict(zip(each, given, strict=True))
    assert listed == expected


@pytest.fixture
def configured(tmp_path) -> Path:
    """The page's configuration, with peers beside it."""
    text = re.search(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert text is not None
    key = AggregatorKeys.generate().signing.public
    found = re.sub(r'coordinator_key = "\w{64}"', f'coordinator_key = "{key}"', text[1])
    (tmp_path / "aggregator.toml").write_text(found)
    parts = [public_part(AggregatorKeys.generate(), index) for index in (1, 2, 3)]
    (tmp_path / "peers.json").write_text(Peers.of(parts).model_dump_json())
    return tmp_path / "aggregator.toml"


def test_the_configuration_loads(configured):
    settings = load_settings(configured)
    assert settings.aggregator_config().suite is SealingSuite.X25519
    assert settings.tls_certificate == configured.parent / "tls/chain.pem"
    assert settings.parameters.privacy is not None


def test_the_number_of_aggregators_that_each_stage_takes():
    table = StagesTable(
        PinnedParameters(
            min_cohort=2,
            clip_norm=1.0,
            fraction_bits=16,
            privacy=PinnedPrivacy(noise_multiplier=4.0, max_rounds=1, epsilon=1.0, delta=1e-5),
        )
    )
    listed = {stage: int(needed) for stage, needed in rows("| to | takes |")}
    expected = {str(stage): needed for stage, needed, _ in table.rows()}
    # Challenging is part of checking, and takes as many here.
    assert expected.pop("challenge reports") == expected["check reports"]
    assert listed == expected


def test_the_metrics_exist():
    text = AggregatorMetrics().render().decode()
    listed = {name for names, _ in rows("| metric | meaning |") for name in re.findall(r"`([^`]+)`", names)}
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert {name.removesuffix("_total") for name in listed} == {name.removesuffix("_total") for name in families}


def test_the_refusals_exist():
    listed = [slug for names, *_ in rows("| refusal | means | do |") for slug in re.findall(r"`([^`]+)`", names)]
    assert len(listed) > 8
    for slug in listed:
        assert from_problem(PROBLEM_PREFIX + slug).slug == slug, slug


def test_what_a_server_expects_to_be_pinned_is_printed_as_it_is_configured(tmp_path, capsys):
    tiny_bundle("softmax", tmp_path / "bundle")
    (tmp_path / "server.toml").write_text(
        'data_dir = "state"\n[task]\nbundle = "bundle"\nbuffer_size = 8\n[task.plan]\nbatch_size = 4\n'
        '[task.aggregation]\nclip_norm = 0.5\nweighting = "uniform"\n'
        '[task.privacy]\nnoise = "aggregators"\nepsilon = 4.0\n'
        "[task.secure]\nnum_aggregators = 3\nthreshold = 2\n"
    )
    assert main(["aggregator", "parameters", "--server-config", str(tmp_path / "server.toml")]) == 0
    printed = tomllib.loads(capsys.readouterr().out)["parameters"]
    pinned: Message = PinnedParameters.model_validate(printed, strict=False)
    from server_ref.config import load_config  # noqa: PLC0415 - as the command does

    sharing = load_task(load_config(tmp_path / "server.toml").task).sharing
    assert sharing is not None
    assert pinned == sharing.pinned
    (tmp_path / "clear.toml").write_text('data_dir = "state"\n[task]\nbundle = "bundle"\n[task.plan]\nbatch_size = 4\n')
    assert main(["aggregator", "parameters", "--server-config", str(tmp_path / "clear.toml")]) == 2
    assert "not shared; set task.secure" in capsys.readouterr().err
