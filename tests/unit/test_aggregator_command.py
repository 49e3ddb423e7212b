"""``pocketfed aggregator``: keys that nothing overwrites or shows, the peers' file, settings."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from client_sdk.cli import main
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.sealing import SealingSuite
from server_ref.secure.config import load_settings
from server_ref.secure.identity import AggregatorKeys
from server_ref.secure.keys import Peers, PublicPart, create_keys, load_keys, public_part, read_public
from server_ref.secure.parameters import CheckingMode


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["aggregator", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def part(index: int, suite: SealingSuite = SealingSuite.X25519) -> PublicPart:
    return public_part(AggregatorKeys.generate(suite), index)


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["x25519", "mlkem768-x25519"])
def test_init_makes_keys_for_the_owner_alone_and_prints_the_public_part(tmp_path, capsys, suite):
    folder = tmp_path / "agg"
    status, out, _ = run(capsys, "init", "--index", 2, "--dir", folder, "--suite", suite)
    assert status == 0
    printed = PublicPart.model_validate_json(out)
    assert (printed.index, printed.suite) == (2, suite)
    keys = load_keys(folder / "keys.json", 2, SealingSuite(suite))
    assert public_part(keys, 2) == printed
    assert stat.S_IMODE((folder / "keys.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["aggregator.toml", "keys.json"]


def test_init_never_overwrites_and_never_shows_a_secret(tmp_path, capsys):
    _, first, _ = run(capsys, "init", "--index", 1, "--dir", tmp_path)
    (tmp_path / "aggregator.toml").write_text("mine")
    before = (tmp_path / "keys.json").read_bytes()
    status, again, err = run(capsys, "init", "--index", 1, "--dir", tmp_path)
    assert (status, again) == (0, first)
    assert "left as they are" in err
    assert (tmp_path / "keys.json").read_bytes() == before
    assert (tmp_path / "aggregator.toml").read_text() == "mine"
    secrets = json.loads(before)
    for shown in (first, err):
        assert secrets["signing_key"] not in shown
        assert secrets["sealing_key"] not in shown


def test_init_for_another_index_leaves_the_keys_and_says_whose_they_are(tmp_path, capsys):
    run(capsys, "init", "--index", 1, "--dir", tmp_path)
    before = (tmp_path / "keys.json").read_bytes()
    status, out, err = run(capsys, "init", "--index", 2, "--dir", tmp_path)
    assert (status, out) == (2, "")
    assert "has the keys of aggregator 1" in err
    assert (tmp_path / "keys.json").read_bytes() == before


@pytest.mark.parametrize("index", [0, 65, -1])
def test_an_impossible_index_is_refused_before_anything_is_made(tmp_path, capsys, index):
    status, _, err = run(capsys, "init", f"--index={index}", "--dir", tmp_path / "new")
    assert status == 2
    assert "from 1 to 64" in err
    assert not (tmp_path / "new").exists()


def test_keys_that_others_can_read_are_refused(tmp_path):
    path = tmp_path / "keys.json"
    create_keys(path, 1, SealingSuite.X25519)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_keys(path, 1, SealingSuite.X25519)


@pytest.mark.parametrize("content", ["", "{}", '{"index":1,"suite":"x25519","signing_key":"zz","sealing_key":"zz"}'])
def test_a_damaged_key_file_is_refused_without_quoting_it(tmp_path, content):
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError) as caught:
        load_keys(path, 1, SealingSuite.X25519)
    assert "zz" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        create_keys(path, 1, SealingSuite.X25519)
    assert path.read_text() == content


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read .*keys\.json"):
        load_keys(tmp_path / "keys.json", 1, SealingSuite.X25519)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, "init", "--index", 1, "--dir", tmp_path / "file")
    assert status == 2
    assert "cannot write" in err


def test_the_coordinator_s_key_is_made_once(tmp_path, capsys):
    path = tmp_path / "coordinator.key"
    status, first, _ = run(capsys, "coordinator", "--key-file", path)
    assert status == 0
    assert len(first.strip()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, again, err = run(capsys, "coordinator", "--key-file", path)
    assert again == first
    assert "left as it is" in err
    assert json.loads(path.read_text())["coordinator_signing_key"] not in first + err


# --- the peers' file -------------------------------------------------------------------------------------------------


def test_parts_become_one_file_in_order_whatever_order_they_come_in(tmp_path, capsys):
    parts = [part(i) for i in (3, 1, 2)]
    files = [tmp_path / f"{each.index}.json" for each in parts]
    for each, file in zip(parts, files, strict=True):
        file.write_text(each.model_dump_json())
    status, out, err = run(capsys, "peers", *files)
    assert status == 0
    peers = Peers.model_validate_json(out)
    assert [peer.signing_key for peer in peers.peers] == [p.signing_key for p in sorted(parts, key=lambda p: p.index)]
    assert f"fingerprint {peers.fingerprint()}" in err
    (tmp_path / "peers.json").write_text(out)
    assert read_public(tmp_path / "peers.json", Peers) == peers


def test_the_fingerprint_is_of_exactly_these_keys():
    parts = [part(i) for i in (1, 2, 3)]
    fingerprint = Peers.of(parts).fingerprint()
    assert Peers.of(parts[::-1]).fingerprint() == fingerprint
    assert Peers.of([*parts[:2], part(3)]).fingerprint() != fingerprint
    assert len(fingerprint.split()) == 8


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([part(1), part(3)], r"of aggregators \[1, 3\]"),
        ([part(1), part(1)], r"of aggregators \[1, 1\]"),
        ([part(1), part(2, SealingSuite.MLKEM768_X25519)], "different suites"),
        ([part(1)], "at least 2"),
    ],
    ids=["gap", "twice", "suites", "one"],
)
def test_parts_that_do_not_belong_together_are_refused(parts, says):
    with pytest.raises(ConfigurationError, match=says):
        Peers.of(parts)


def test_one_party_cannot_be_two():
    first, second = part(1), part(2)
    for name in ("signing_key", "sealing_key"):
        copied = second.model_copy(update={name: getattr(first, name)})
        with pytest.raises(ConfigurationError, match="one party would be two"):
            Peers.of([first, copied])


def test_a_file_that_is_no_public_part_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    status, _, err = run(capsys, "peers", tmp_path / "x.json")
    assert status == 2
    assert "x.json" in err
    status, _, err = run(capsys, "peers", tmp_path / "none.json")
    assert status == 2
    assert "cannot read" in err


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ceremony(tmp_path, capsys) -> Path:
    """The first of three parties, as far as the template and the parts bring it."""
    files = []
    for index in (1, 2, 3):
        _, out, _ = run(capsys, "init", "--index", index, "--dir", tmp_path / str(index))
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(out)
    _, peers, _ = run(capsys, "peers", *files)
    (tmp_path / "1" / "peers.json").write_text(peers)
    _, key, _ = run(capsys, "coordinator", "--key-file", tmp_path / "coordinator.key")
    file = tmp_path / "1" / "aggregator.toml"
    text = file.read_text().replace('coordinator_key = ""', f'coordinator_key = "{key.strip()}"')
    file.write_text(
        text.replace("num_aggregators = 5", "num_aggregators = 3").replace("threshold = 3", "threshold = 2")
    )
    return file


def test_the_template_is_complete_but_for_what_its_operator_must_decide(ceremony):
    settings = load_settings(ceremony)
    config = settings.aggregator_config()
    assert (config.index, config.parameters.num_aggregators, len(config.peers)) == (1, 3, 3)
    assert settings.data_dir == ceremony.parent / "state"
    assert settings.host == "127.0.0.1"
    keys = load_keys(settings.key_file, 1, config.suite)
    assert keys.public == config.peers[0]


def test_an_unfilled_template_is_refused(tmp_path, capsys):
    run(capsys, "init", "--index", 1, "--dir", tmp_path)
    status, _, err = run(capsys, "--config", tmp_path / "aggregator.toml")
    assert status == 2
    assert "coordinator_key" in err


def test_flags_win_over_the_environment_and_that_over_the_file(ceremony, monkeypatch):
    monkeypatch.setenv("POCKETFED_AGGREGATOR_PORT", "9001")
    monkeypatch.setenv("POCKETFED_AGGREGATOR_PARAMETERS__MIN_COHORT", "250")
    monkeypatch.setenv("POCKETFED_AGGREGATOR_PARAMETERS__CHECKING", "buckets")
    monkeypatch.setenv("POCKETFED_PORT", "1")
    settings = load_settings(ceremony, {"host": "0.0.0.0"})  # noqa: S104 - what a flag might say
    assert (settings.port, settings.host) == (9001, "0.0.0.0")  # noqa: S104
    assert (settings.parameters.min_cohort, settings.parameters.checking) == (250, CheckingMode.BUCKETS)
    assert settings.parameters.threshold == 2, "the rest of the table stays"
    assert load_settings(ceremony, {"port": 9002}).port == 9002


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("min_cohort", "min_cohorts", "min_cohorts"),
        ("port = 8471", "port = 99999", "port"),
        ('coordinator_key = "', 'coordinator_key = "zz', "coordinator_key"),
        ("threshold = 2", "threshold = 4", "cannot reach a threshold of 4"),
        ("threshold = 2", "threshold = 2\nquorum = 1", "quorum below 3"),
        ("min_cohort = 100", "min_cohort = 1", "min_cohort"),
        ("epsilon = 8.0", "epsilon = -1.0", "epsilon"),
        ("port = 8471", 'port = 8471\ntls_certificate = "cert.pem"', "tls_certificate and tls_key"),
        ("[parameters.privacy]", "[parameters.privacy", "not valid TOML"),
    ],
)
def test_what_cannot_be_is_named(ceremony, old, new, says):
    text = ceremony.read_text()
    assert old in text
    ceremony.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=says):
        load_settings(ceremony)


def test_what_is_missing_is_named_with_its_flag(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--index.*--data-dir.*--key-file.*--peers-file"):
        load_settings()
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_settings(tmp_path / "none.toml")


def test_peers_that_do_not_fit_the_parameters_are_refused(ceremony):
    ceremony.write_text(ceremony.read_text().replace("num_aggregators = 3", "num_aggregators = 4"))
    with pytest.raises(ConfigurationError, match="keys of 4 aggregators are pinned, not of 3"):
        load_settings(ceremony).aggregator_config()


def test_keys_that_the_others_do_not_pin_end_the_start(ceremony, capsys, tmp_path):
    (tmp_path / "2" / "keys.json").replace(ceremony.parent / "keys.json")
    status, _, err = run(capsys, "--config", ceremony)
    assert status == 2
    assert "has the keys of aggregator 2" in err


def test_a_flag_for_another_index_does_not_make_it_another(ceremony, capsys):
    status, _, err = run(capsys, "--index", 2, "--config", ceremony)
    assert status == 2
    assert "has the keys of aggregator 1" in err
