"""A bundle on disk: verified when it is opened, replaced whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError, ManifestError, ProgramHashMismatch
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE
from mobile_export import bundle as bundle_module
from mobile_export.bundle import ProgramBundle, refuse_foreign_folder, replacing_folder
from mobile_export.cache import copy_bundle
from tests.bundles import tiny_bundle, tiny_model

FILES = (PROGRAM_FILE, MANIFEST_FILE, WEIGHTS_FILE)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory) -> ProgramBundle:
    return tiny_bundle("mlp", tmp_path_factory.mktemp("bundles") / "mlp")


@pytest.fixture
def folder(mlp, tmp_path) -> Path:
    """A copy that a test may damage."""
    copy_bundle(mlp.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_bundle_is_three_files_that_its_manifest_describes(mlp):
    assert sorted(contents(mlp.path)) == sorted(FILES)
    opened = ProgramBundle.open(mlp.path)
    assert opened.manifest == mlp.manifest
    assert opened.parity is None


def test_the_initial_weights_are_the_models_parameters_in_table_order(mlp):
    w = mlp.initial_weights()
    parameters = dict(tiny_model("mlp").named_parameters())
    assert [p.name for p in mlp.manifest.parameters] == list(parameters)
    for p in mlp.manifest.parameters:
        slice_ = w[p.offset : p.offset + p.num_elements].reshape(p.shape)
        assert np.array_equal(slice_, parameters[p.name].detach().numpy())
    w[:] = 0  # a fresh array: the next caller is not disturbed
    assert mlp.initial_weights().any()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ManifestError, match=name):
        ProgramBundle.open(folder)


@pytest.mark.parametrize("name", [PROGRAM_FILE, WEIGHTS_FILE])
def test_a_changed_byte_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ProgramHashMismatch, match=name):
        ProgramBundle.open(folder)


def test_an_unreadable_manifest_is_said_to_be_one(folder):
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(ManifestError, match="unreadable"):
        ProgramBundle.open(folder)


def test_only_bundles_are_replaced(folder, tmp_path):
    refuse_foreign_folder(tmp_path / "new")
    refuse_foreign_folder(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"notes\.txt"):
        refuse_foreign_folder(folder)
    with pytest.raises(ConfigurationError, match="a file"):
        refuse_foreign_folder(folder / "notes.txt")


def test_a_folder_is_replaced_when_the_block_ends_well(folder):
    with replacing_folder(folder) as scratch:
        (scratch / PROGRAM_FILE).write_text("new")
        assert sorted(contents(folder)) == sorted(FILES)
    assert contents(folder) == {PROGRAM_FILE: b"new"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_block_leaves_the_old_folder_and_no_litter(folder):
    before = contents(folder)

    def fail():
        with replacing_folder(folder) as scratch:
            (scratch / PROGRAM_FILE).write_text("half")
            raise RuntimeError("export refused")

    with pytest.raises(RuntimeError, match="export refused"):
        fail()
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


class Killed(BaseException):
    """Stands for the process's end: nothing may catch it."""


def test_killed_at_any_system_call_a_folder_is_old_new_or_absent(folder, monkeypatch):
    """Every call that changes the disk is made the last one, in turn."""
    old, new = contents(folder), {name: b"new " + name.encode() for name in FILES}
    seen = []
    for last in range(1, 50):
        calls = 0

        def die_after(real, last=last):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == last:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", die_after(Path.rename))
            patch.setattr(Path, "write_bytes", die_after(Path.write_bytes))
            patch.setattr(bundle_module, "_sync", die_after(bundle_module._sync))
            patch.setattr(bundle_module.shutil, "rmtree", lambda *_a, **_k: None)  # a dead process cleans nothing
            try:
                with replacing_folder(folder) as scratch:
                    for name, data in new.items():
                        (scratch / name).write_bytes(data)
            except Killed:
                seen.append(contents(folder) if folder.exists() else None)
            else:
                break
        if not folder.exists():
            with replacing_folder(folder) as scratch:  # the next run goes through
                for name, data in old.items():
                    (scratch / name).write_bytes(data)
    assert contents(folder) == new
    assert len(seen) >= 8
    assert all(state in (None, old, new) for state in seen)


def test_kill_9_in_the_middle_leaves_the_old_bundle(folder):
    before = contents(folder)
    code = (
        "import sys, pathlib; from mobile_export.bundle import replacing_folder\n"
        "with replacing_folder(pathlib.Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'program.pte').write_bytes(b'half'); print('writing', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert contents(folder) == before
    assert ProgramBundle.open(folder).manifest.program_sha256


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigurationError, match="cannot write"),
        replacing_folder(tmp_path / "file" / "bundle"),
    ):
        pytest.fail("the block must not run")
