"""Aggregators on one machine: processes that end with their parent, embedded ones that say what they do not give."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client_sdk.protocol.errors import ConfigurationError
from server_ref.child import ChildServer, ChildUnavailable
from server_ref.secure.client import HttpAggregator, Patience
from server_ref.secure.embedded import EmbeddedAggregators
from server_ref.secure.errors import AggregatorUnavailable
from server_ref.secure.keys import Peers, create_coordinator_key, load_keys, read_public
from server_ref.secure.launch import COORDINATOR_FILE, PEERS_FILE, launch_aggregators
from server_ref.secure.round import SecureRound
from tests.secure_parties import TASK, Parties, pinned
from tests.secure_rounds import MemoryJournal, plain_sum, reports

TWO = {"num_aggregators": 2, "threshold": 2, "privacy": None}


def devices(folder: Path, parameters, peers) -> Parties:
    """Parties of whom only the devices are used, sealing to these peers."""
    parties = Parties(folder, parameters)
    parties.close()
    parties.configs = [config.model_copy(update={"peers": peers.peers}) for config in parties.configs]
    return parties


def until_it_fails(action: Callable[[], object]) -> None:
    """What happens in another process takes its time: ask again until it has."""
    while True:
        action()


# --- processes ---------------------------------------------------------------------------------------------------

_PARENT = """
import json, sys
from pathlib import Path
from server_ref.secure.launch import launch_aggregators
from server_ref.secure.parameters import PinnedParameters
processes = launch_aggregators(PinnedParameters.model_validate_json(sys.argv[2]), Path(sys.argv[1]))
processes.start()
print(json.dumps([port.url for port in processes.ports]), flush=True)
sys.stdin.read()
"""


def test_real_processes_run_a_round_and_end_with_a_parent_that_is_killed(tmp_path):
    parameters = pinned(**TWO)
    command = [sys.executable, "-c", _PARENT, str(tmp_path), parameters.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        urls = json.loads(parent.stdout.readline())
        key, _ = create_coordinator_key(tmp_path / COORDINATOR_FILE)
        peers = read_public(tmp_path / PEERS_FILE, Peers)
        ports = [HttpAggregator(i, url, key, patience=Patience(attempts=1)) for i, url in enumerate(urls, 1)]
        made = [devices(tmp_path / "d", parameters, peers).upload(i) for i in range(3)]
        secure = SecureRound(ports, peers, parameters, TASK, MemoryJournal())
        np.testing.assert_array_equal(secure.run(0, reports(made)).sums[0], plain_sum(made))
        parent.kill()
    for port in ports:
        with pytest.raises(AggregatorUnavailable):
            until_it_fails(port.describe)
        port.close()
    secure.close()


def test_a_process_that_cannot_start_is_told_with_its_last_words(tmp_path):
    processes = launch_aggregators(pinned(**TWO), tmp_path)
    (tmp_path / "aggregator-2" / "keys.json").chmod(0o644)
    with pytest.raises(ChildUnavailable, match=r"aggregator 2 did not start: .*chmod 600.*log"):
        processes.start()
    assert processes.pid(1) is None, "the other is stopped"


# --- TLS ---------------------------------------------------------------------------------------------------------


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "aggregator")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


def test_an_aggregator_speaks_tls_to_who_trusts_its_certificate(tmp_path):
    processes = launch_aggregators(pinned(**TWO), tmp_path, task=TASK)
    home = tmp_path / "aggregator-1"
    write_certificate(home)
    config = home / "aggregator.toml"
    config.write_text('tls_certificate = "cert.pem"\ntls_key = "key.pem"\n' + config.read_text())
    with ChildServer(["aggregator", "--config", str(config)], home / "log", "aggregator 1") as child:
        assert child.url.startswith("https://")
        patience = Patience(attempts=1)
        with HttpAggregator(1, child.url, processes.coordinator, ca_file=home / "cert.pem", patience=patience) as port:
            assert port.describe().index == 1
        with (
            HttpAggregator(1, child.url, processes.coordinator, patience=patience) as distrustful,
            pytest.raises(AggregatorUnavailable, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            distrustful.describe()


# --- embedded ----------------------------------------------------------------------------------------------------


def test_embedded_aggregators_sum_as_others_do_and_say_that_they_give_no_secrecy(tmp_path, caplog):
    parameters = pinned(num_aggregators=3, threshold=2, privacy=None)
    journal = MemoryJournal()
    results = []
    made = None
    for _ in range(2):
        caplog.clear()
        with EmbeddedAggregators.open(tmp_path / "data", parameters, task=TASK) as embedded:
            assert "all 3 aggregators run in this process" in caplog.text
            assert caplog.records[0].levelno == logging.WARNING
            made = made or [devices(tmp_path / "d", parameters, embedded.peers).upload(i) for i in range(3)]
            secure = SecureRound(embedded.ports, embedded.peers, parameters, TASK, journal)
            results.append(secure.run(0, reports(made)).sums[0])
            secure.close()
    np.testing.assert_array_equal(results[0], plain_sum(made or []))
    np.testing.assert_array_equal(results[0], results[1])


def test_embedded_keys_are_made_once_and_for_the_owner_alone(tmp_path):
    parameters = pinned(**TWO)
    with (
        EmbeddedAggregators.open(tmp_path, parameters) as first,
        EmbeddedAggregators.open(tmp_path, parameters) as again,
    ):
        assert first.peers == again.peers
    path = tmp_path / "aggregator-1" / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_keys(path, 1, first.peers.suite).public == first.peers.peers[0]


def test_embedded_aggregators_do_not_change_their_parameters(tmp_path):
    EmbeddedAggregators.open(tmp_path, pinned(**TWO)).close()
    with pytest.raises(ConfigurationError, match="other parameters"):
        EmbeddedAggregators.open(tmp_path, pinned(min_cohort=3, **TWO))
