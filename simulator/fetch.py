"""Where data files come from and where they are kept: a checksummed cache, filled from Debian packages or a folder.

Nothing here needs root: ``apt-get download`` and ``dpkg-deb -x`` work in a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from simulator.errors import DatasetUnavailable, MalformedDataset
from simulator.languages import DATASET, LANGUAGES, MANIFEST, Language, copy_corpus, extract

Progress = Callable[[str], None]
"""Receives one line of text per step."""


@dataclass(frozen=True)
class DataPackage:
    """Files of one data set and the Debian package that carries them.

    Attributes:
        dataset: Name of the data set, and of its folder in the cache.
        debian_package: Package to download.
        folder: Where the package keeps the files.
        sha256: File name -> SHA-256 (hex) of its content.
    """

    dataset: str
    debian_package: str
    folder: str
    sha256: Mapping[str, str]


# The hashes are those of Debian's dataset-fashion-mnist 0.0~git20200523.55506a9-1; upstream's files are the same.
FASHION_MNIST = DataPackage(
    dataset="fashion-mnist",
    debian_package="dataset-fashion-mnist",
    folder="usr/share/datasets/fashion-mnist",
    sha256=MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        }
    ),
)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(package: DataPackage, folder: Path) -> None:
    """Compare every file with its pinned hash.

    Raises:
        DatasetUnavailable: A file is missing.
        MalformedDataset: A file differs.
    """
    missing = [name for name in package.sha256 if not (folder / name).is_file()]
    if missing:
        raise DatasetUnavailable(f"{folder} lacks {', '.join(missing)}")
    for name, expected in package.sha256.items():
        actual = _sha256(folder / name)
        if actual != expected:
            raise MalformedDataset(
                f"{folder / name}: SHA-256 is {actual}, expected {expected}; the file is truncated or another version"
            )


def is_current(package: DataPackage, folder: Path) -> bool:
    """Whether ``folder`` holds all files, unharmed."""
    try:
        verify(package, folder)
    except (DatasetUnavailable, MalformedDataset):
        return False
    return True


def install_from_folder(package: DataPackage, source: Path, target: Path, say: Progress) -> None:
    """Copy the files from ``source`` after checking them; ``target`` holds either all of them or what it held before.

    Raises:
        DatasetUnavailable: ``source`` is no folder, or lacks a file.
        MalformedDataset: A file is not the pinned one.
    """
    if not source.is_dir():
        raise DatasetUnavailable(f"{source} is not a folder")
    say(f"checking {len(package.sha256)} files in {source}")
    verify(package, source)
    target.mkdir(parents=True, exist_ok=True)
    for name in package.sha256:
        partial = target / f".{name}.partial"
        shutil.copyfile(source / name, partial)
        partial.replace(target / name)
    say(f"stored in {target}")


def fetch(package: DataPackage, target: Path, say: Progress) -> None:
    """Download the Debian package, unpack it without root, check and store its files.

    Raises:
        DatasetUnavailable: No apt-get here, no network, or the package is unknown to apt.
        MalformedDataset: The package holds other files than the pinned ones.
    """
    by_hand = (
        f"take the files {', '.join(package.sha256)} from elsewhere and pass their folder: "
        f"pocketfed data {package.dataset} --from DIR"
    )
    with tempfile.TemporaryDirectory(prefix="pocketfed-data-") as temporary:
        folder = Path(temporary)
        archive = _downloaded(package.debian_package, "about 31 MB", folder, say, by_hand)
        say("unpacking")
        install_from_folder(package, _unpacked(archive, folder) / package.folder, target, say)


def fetch_corpus(target: Path, say: Progress, languages: Sequence[Language] = LANGUAGES) -> None:
    """Download the manual pages of all languages, and make a corpus of their text.

    Raises:
        DatasetUnavailable: No apt-get here, no network, or a package is unknown to apt.
        MalformedDataset: A package has too few pages.
    """
    names = ", ".join(language.debian_package for language in languages)
    by_hand = (
        f"take the packages {names} (or a finished corpus) from elsewhere and pass their folder: "
        f"pocketfed data {DATASET} --from DIR"
    )
    with tempfile.TemporaryDirectory(prefix="pocketfed-data-") as temporary:
        folder = Path(temporary)
        for language in languages:
            _downloaded(language.debian_package, "1 to 5 MB", folder, say, by_hand)
        corpus_from_folder(folder, target, say, languages)


def corpus_from_folder(source: Path, target: Path, say: Progress, languages: Sequence[Language] = LANGUAGES) -> None:
    """Make a corpus of the Debian packages in a folder, or copy the finished one that it holds.

    Raises:
        DatasetUnavailable: No such folder, or it lacks a package, or dpkg-deb is not on this machine.
        MalformedDataset: A package cannot be unpacked or has too few pages, or a finished corpus was changed.
    """
    if not source.is_dir():
        raise DatasetUnavailable(f"{source} is not a folder")
    if (source / MANIFEST).is_file():
        say(f"checking the corpus in {source}")
        copy_corpus(source, target)
    else:
        found = {language.debian_package: _archives(source, language.debian_package) for language in languages}
        lacking = [name for name, archives in found.items() if not archives]
        if lacking:
            raise DatasetUnavailable(f"{source} holds neither {MANIFEST} nor the packages {', '.join(lacking)} (*.deb)")
        archives = {name: archives[-1] for name, archives in found.items()}
        if shutil.which("dpkg-deb") is None:
            raise DatasetUnavailable("dpkg-deb is not on this machine (it comes with Debian and Ubuntu)")
        with tempfile.TemporaryDirectory(prefix="pocketfed-data-") as temporary:
            unpacked = {}
            for name, archive in archives.items():
                say(f"unpacking {archive.name}")
                unpacked[name] = _unpacked(archive, Path(temporary))
            say("taking the text of the pages")
            extract(unpacked, list(archives.values()), target, languages)
    say(f"stored in {target}")


def _downloaded(name: str, size: str, folder: Path, say: Progress, by_hand: str) -> Path:
    """The archive of a Debian package, downloaded into a folder."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DatasetUnavailable(f"{tool} is not on this machine (it comes with Debian and Ubuntu); {by_hand}")
    say(f"downloading the Debian package {name} ({size})")
    output = _download(name, folder, say)
    archives = _archives(folder, name)
    if len(archives) != 1:
        raise DatasetUnavailable(
            f"apt-get could not download {name}. Is the machine online? "
            f"If it is, its package lists may be old: run `apt-get update` as root and try again. "
            f"Without apt, {by_hand}.\napt-get said: {_last_words(output)}"
        )
    return archives[0]


def _archives(folder: Path, name: str) -> list[Path]:
    """Archives of a package in a folder, whatever their version, in the order of their names."""
    return sorted(folder.glob(f"{name}_*.deb"))


def _unpacked(archive: Path, folder: Path) -> Path:
    """A package's files, in a folder of their own under the given one."""
    target = folder / f"unpacked-{archive.stem}"
    status, output = _run(["dpkg-deb", "-x", str(archive), str(target)], folder, lambda _: None)
    if status != 0:
        raise MalformedDataset(f"dpkg-deb could not unpack {archive.name}: {_last_words(output)}")
    return target


def _download(name: str, folder: Path, say: Progress) -> str:
    """Run ``apt-get download``, refreshing the package lists once where that is allowed; returns apt's output."""
    # Run by root, apt drops its privileges to fetch, and then warns that it cannot write into our private folder.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", name]
    status, output = _run(command, folder, say)
    if status == 0 or os.geteuid() != 0:
        return output
    say("the download failed; refreshing the package lists (apt-get update) and trying again")
    _, refresh = _run(["apt-get", "update"], folder, say)
    _, again = _run(command, folder, say)
    return refresh + again


def _run(command: list[str], folder: Path, say: Progress) -> tuple[int, str]:
    """Run a command in ``folder``, passing each line of its output on as it comes."""
    lines: list[str] = []
    with subprocess.Popen(  # noqa: S603  (fixed commands, no shell)
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            say(f"  {line.rstrip()}")
    return process.returncode, "".join(lines)


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "Err:"))]
    return "; ".join((errors or lines)[-3:]) or "nothing"
