"""The server's key: made once, kept for its owner, and the same after every restart."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from client_sdk.errors import StateDirUnusable
from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.signing import reply_signer
from client_sdk.replies import ServerKeys
from client_sdk.store import FileDeviceStore, MemoryDeviceStore
from server_ref.server_identity import KEY_FILE, ServerIdentity

REQUEST = "sig1=:" + "A" * 86 + "==:"


def test_the_key_is_made_once_and_is_the_same_ever_after(tmp_path: Path):
    first, created = ServerIdentity.open(tmp_path)
    again, created_again = ServerIdentity.open(tmp_path)
    assert (created, created_again) == (True, False)
    assert first.public_key == again.public_key
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    headers = again.sign_reply(REQUEST, 200, b"{}")
    assert reply_signer(headers, REQUEST, 200, b"{}") == first.public_key


def test_a_new_key_is_made_where_the_file_was_removed(tmp_path: Path):
    first, _ = ServerIdentity.open(tmp_path)
    (tmp_path / KEY_FILE).unlink()
    second, created = ServerIdentity.open(tmp_path)
    assert created
    assert second.public_key != first.public_key


def test_a_key_that_others_can_read_is_refused(tmp_path: Path):
    ServerIdentity.open(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        ServerIdentity.open(tmp_path)


def test_a_damaged_key_file_is_refused_and_not_quoted(tmp_path: Path):
    ServerIdentity.open(tmp_path)
    path = tmp_path / KEY_FILE
    path.write_text(path.read_text().replace('"server_signing_key":"', '"server_signing_key":"x'))
    secret = path.read_text()[-40:-10]
    with pytest.raises(ConfigurationError, match="no key file") as caught:
        ServerIdentity.open(tmp_path)
    assert secret not in str(caught.value)


def test_it_shows_its_public_key_only(tmp_path: Path):
    identity, _ = ServerIdentity.open(tmp_path)
    secret = (tmp_path / KEY_FILE).read_text().split('"')[3]
    assert identity.public_key in repr(identity)
    assert secret not in repr(identity)


# --- what a device keeps of it ---

KEY, OTHER = "5" * 64, "6" * 64


def test_a_device_keeps_the_servers_key_across_restarts(tmp_path: Path):
    store = FileDeviceStore(tmp_path)
    keys: ServerKeys = store
    assert keys.server_key() is None
    keys.pin_server_key(KEY)
    assert keys.server_key() == KEY
    store.close()
    again = FileDeviceStore(tmp_path)
    assert again.server_key() == KEY
    again.close()


@pytest.mark.parametrize("damage", ["", KEY[:-1], KEY.upper().replace("5", "F"), KEY + KEY, "\xff" * 64])
def test_a_device_whose_copy_is_damaged_trusts_nobody(tmp_path: Path, damage: str):
    store = FileDeviceStore(tmp_path)
    store.pin_server_key(KEY)
    store.close()
    (tmp_path / "server.key").write_text(damage, "latin-1")
    again = FileDeviceStore(tmp_path)
    with pytest.raises(StateDirUnusable, match="damaged"):
        again.server_key()
    again.close()


def test_a_store_in_memory_keeps_it_too():
    store = MemoryDeviceStore()
    assert store.server_key() is None
    store.pin_server_key(OTHER)
    assert store.server_key() == OTHER
