"""Fetching data files: checksums decide, a package manager is only a carrier, and every failure says what to do.

The package manager is a real process with a scripted answer; the archive is a real one.
"""

import hashlib
import shutil
import subprocess

import pytest

from simulator.errors import DatasetUnavailable, MalformedDataset
from simulator.fetch import FASHION_MNIST, DataPackage, fetch, install_from_folder, is_current

FILES = {"a.gz": b"first file", "b.gz": b"second file"}
PACKAGE = DataPackage(
    dataset="tiny",
    debian_package="dataset-tiny",
    folder="usr/share/datasets/tiny",
    sha256={name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()},
)


def write_files(folder, files=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def ignore(_line):
    pass


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with dpkg-deb and whatever ``apt-get`` the test writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("dpkg-deb", "tar", "sh", "cp", "test", "touch", "echo", "rm"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))

    def apt_get(script):
        path = folder / "apt-get"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return apt_get


@pytest.fixture
def archive(tmp_path):
    """A Debian package with the files."""
    root = tmp_path / "package"
    write_files(root / PACKAGE.folder)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        "Package: dataset-tiny\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
    )
    path = tmp_path / "dataset-tiny_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    return path


def test_a_folder_with_all_files_is_copied(tmp_path):
    install_from_folder(PACKAGE, write_files(tmp_path / "from"), tmp_path / "to", ignore)
    assert is_current(PACKAGE, tmp_path / "to")
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == sorted(FILES)


def test_a_missing_file_is_named(tmp_path):
    source = write_files(tmp_path / "from", {"a.gz": FILES["a.gz"]})
    with pytest.raises(DatasetUnavailable, match=r"lacks b\.gz"):
        install_from_folder(PACKAGE, source, tmp_path / "to", ignore)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DatasetUnavailable, match="is not a folder"):
        install_from_folder(PACKAGE, tmp_path / "nowhere", tmp_path / "to", ignore)


def test_a_truncated_file_is_refused_with_both_hashes_and_leaves_the_cache_as_it_was(tmp_path):
    source = write_files(tmp_path / "from", {"a.gz": FILES["a.gz"], "b.gz": FILES["b.gz"][:-1]})
    with pytest.raises(MalformedDataset, match=rf"b\.gz: SHA-256 is .*, expected {PACKAGE.sha256['b.gz']}"):
        install_from_folder(PACKAGE, source, tmp_path / "to", ignore)
    assert not (tmp_path / "to").exists()


def test_the_package_is_downloaded_unpacked_checked_and_stored(tmp_path, tools, archive):
    tools(f'echo "Get:1 dataset-tiny"; cp {archive} .')
    lines = []
    fetch(PACKAGE, tmp_path / "to", lines.append)
    assert is_current(PACKAGE, tmp_path / "to")
    assert any("Get:1" in line for line in lines), "the package manager's progress is passed on"


def test_without_a_package_manager_the_way_by_hand_is_told(tmp_path, tools):
    with pytest.raises(DatasetUnavailable, match=r"apt-get is not on this machine.*a\.gz, b\.gz.*--from DIR"):
        fetch(PACKAGE, tmp_path / "to", ignore)


def test_root_refreshes_old_package_lists_and_tries_again(tmp_path, tools, archive, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    flag = tmp_path / "refreshed"
    tools(
        f'if test "$1" = update; then touch {flag}; exit 0; fi\n'
        f"test -e {flag} || {{ echo 'E: Unable to locate package dataset-tiny'; exit 100; }}\n"
        f"cp {archive} ."
    )
    lines = []
    fetch(PACKAGE, tmp_path / "to", lines.append)
    assert is_current(PACKAGE, tmp_path / "to")
    assert any("apt-get update" in line for line in lines)


def test_a_user_is_told_to_refresh_the_lists_and_what_went_wrong(tmp_path, tools, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    tools(f"touch {tmp_path}/called-$1 ; echo \"E: Failed to fetch: Could not resolve 'mirror'\"; exit 100")
    with pytest.raises(DatasetUnavailable, match=r"online\?.*apt-get update.*--from DIR.*\n.*Could not resolve"):
        fetch(PACKAGE, tmp_path / "to", ignore)
    assert not (tmp_path / "called-update").exists()


def test_a_package_with_other_files_is_refused(tmp_path, tools, archive):
    tools(f"cp {archive} .")
    other = DataPackage("tiny", "dataset-tiny", PACKAGE.folder, {**PACKAGE.sha256, "b.gz": "0" * 64})
    with pytest.raises(MalformedDataset, match="another version"):
        fetch(other, tmp_path / "to", ignore)


def test_a_damaged_package_is_refused(tmp_path, tools):
    tools("echo garbage > dataset-tiny_1_all.deb")
    with pytest.raises(MalformedDataset, match="could not unpack"):
        fetch(PACKAGE, tmp_path / "to", ignore)


def test_every_file_of_fashion_mnist_is_pinned():
    assert len(FASHION_MNIST.sha256) == 4
    assert all(len(h) == 64 for h in FASHION_MNIST.sha256.values())
