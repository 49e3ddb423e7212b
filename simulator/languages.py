"""A corpus of several languages: manual pages that Debian packages carry, as plain text with whole pages on one side.

Unlike a data set that has been published once, these packages move on with every release. So nothing is pinned in
here: ``extract`` writes down which packages a corpus was made of and the hash of every file that it made, and
``read_corpus`` refuses files that are others. What was trained on is then told by the data set's own hash, which
results carry.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from client_sdk.atomic import write_atomically
from simulator.errors import DatasetUnavailable, MalformedDataset
from simulator.roff import plain_text

Side = Literal["train", "validation", "test"]
SIDES: Final[tuple[Side, ...]] = get_args(Side)

DATASET: Final = "manpages"
MANIFEST: Final = "corpus.json"
# Raised whenever the same packages would give other text.
_RECIPE: Final = 1
# Long pages are cut, so that no language is one shell's manual; short ones say too little.
_LONGEST_PAGE: Final = 12_000
_SHORTEST_PAGE: Final = 500
# Of 100 pages, by their names.
_VALIDATION, _TEST = 8, 16
BYTES_KEPT: Final[Mapping[Side, int]] = {"train": 340_000, "validation": 26_000, "test": 52_000}
"""UTF-8 bytes of each language that ``extract`` keeps for each side."""

_SIDES_OF_TEXT: Final = TypeAdapter(dict[Side, list[str]])


@dataclass(frozen=True)
class Language:
    """One language and the package that carries its pages.

    Attributes:
        code: As in the data set's group names: ISO 639-1.
        debian_package: Package to download.
        folder: Where it keeps the sections ``man1`` to ``man8``.
    """

    code: str
    debian_package: str
    folder: str


LANGUAGES: Final = (
    Language("en", "manpages", "usr/share/man"),
    Language("de", "manpages-de", "usr/share/man/de"),
    Language("fr", "manpages-fr", "usr/share/man/fr"),
    Language("es", "manpages-es", "usr/share/man/es"),
    Language("pl", "manpages-pl", "usr/share/man/pl"),
    Language("ru", "manpages-ru", "usr/share/man/ru"),
    Language("ja", "manpages-ja", "usr/share/man/ja"),
    Language("zh", "manpages-zh", "usr/share/man/zh_CN"),
)


class PackageUsed(BaseModel):
    """A package that a corpus was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="name of the archive, which has the version in it")
    sha256: str


class CorpusManifest(BaseModel):
    """What lies in a corpus' folder, and what it was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: int = Field(description="how pages became text: other numbers are other text")
    packages: tuple[PackageUsed, ...]
    files: dict[str, str] = Field(description="language -> SHA-256 of its file")


@dataclass(frozen=True)
class Corpus:
    """Text by language and side.

    Attributes:
        texts: Language -> side -> pages, in a fixed order.
    """

    texts: Mapping[str, Mapping[Side, Sequence[str]]]

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes, in a fixed order."""
        return tuple(self.texts)


def side_of(page: str) -> Side:
    """The side of a page, by its name alone: a page and its translations are on one side, now and in a later release.

    Args:
        page: Section and name, such as ``7/utf-8``.
    """
    draw = _draw(page) % 100
    return "validation" if draw < _VALIDATION else "test" if draw < _VALIDATION + _TEST else "train"


def _draw(page: str) -> int:
    return int.from_bytes(hashlib.sha256(f"pocketfed-page-v1:{page}".encode()).digest()[:8], "big")


def pages_of(folder: Path) -> dict[str, str]:
    """Plain text of the manual pages under a folder with ``man1`` to ``man8``.

    Pages that are only links, or in mdoc, or not UTF-8, or damaged, or short are left out; long ones are cut.

    Returns:
        Section and name -> text, in an order that follows from the names.
    """
    found = {}
    for path in folder.glob("man[1-8]/*.gz"):
        if path.is_symlink():
            continue
        try:
            text = plain_text(gzip.decompress(path.read_bytes()).decode())
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue
        if text is not None and len(text.encode()) >= _SHORTEST_PAGE:
            # Cut in bytes; half a character at the end goes.
            found[f"{path.parent.name[3:]}/{path.name.partition('.')[0]}"] = text.encode()[:_LONGEST_PAGE].decode(
                errors="ignore"
            )
    return dict(sorted(found.items(), key=lambda item: (_draw(item[0]), item[0])))


def chosen(pages: Mapping[str, str], kept: Mapping[Side, int]) -> dict[Side, list[str]]:
    """Pages of each side, whole ones from the first on, until a side has as many UTF-8 bytes as it keeps."""
    sides: dict[Side, list[str]] = {side: [] for side in SIDES}
    sizes = dict.fromkeys(SIDES, 0)
    for name, text in pages.items():
        side = side_of(name)
        if sizes[side] < kept[side]:
            sides[side].append(text)
            sizes[side] += len(text.encode())
    return sides


def write_corpus(
    target: Path, texts: Mapping[str, Mapping[Side, Sequence[str]]], packages: Sequence[PackageUsed] = ()
) -> None:
    """Write a corpus; its manifest comes last, so that an interrupted one is none."""
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    hashes = {}
    for language, sides in texts.items():
        content = json.dumps({side: list(sides[side]) for side in SIDES}, ensure_ascii=False, indent=0).encode()
        hashes[language] = hashlib.sha256(content).hexdigest()
        write_atomically(target / f"{language}.json", content, mode=0o644)
    manifest = CorpusManifest(recipe=_RECIPE, packages=tuple(packages), files=hashes)
    write_atomically(target / MANIFEST, manifest.model_dump_json(indent=2).encode(), mode=0o644)


def read_manifest(folder: Path) -> CorpusManifest:
    """What a folder says that it holds.

    Raises:
        DatasetUnavailable: It has no corpus.
        MalformedDataset: Its manifest is damaged, or of another release of this program.
    """
    try:
        manifest = CorpusManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as e:
        raise DatasetUnavailable(f"{folder} holds no corpus; make it once: pocketfed data {DATASET}") from e
    except ValidationError as e:
        raise MalformedDataset(f"{folder / MANIFEST} is damaged: {e}") from e
    if manifest.recipe != _RECIPE:
        raise MalformedDataset(
            f"{folder} was made by another release of pocketfed, which took other text of the pages; "
            f"remove the folder and make it again: pocketfed data {DATASET}"
        )
    return manifest


def read_corpus(folder: Path) -> Corpus:
    """Read a corpus, every file checked against the manifest.

    Raises:
        DatasetUnavailable: There is none, or a file is missing.
        MalformedDataset: A file is not the one that was written.
    """
    texts = {}
    for language, expected in read_manifest(folder).files.items():
        path = folder / f"{language}.json"
        try:
            content = path.read_bytes()
        except OSError as e:
            raise DatasetUnavailable(f"{folder} lacks {path.name}") from e
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected:
            raise MalformedDataset(
                f"{path}: SHA-256 is {actual}, the manifest says {expected}; the file was truncated or changed"
            )
        try:
            texts[language] = _SIDES_OF_TEXT.validate_json(content)
        except ValidationError as e:
            raise MalformedDataset(f"{path} holds no text by side: {e}") from e
    return Corpus(texts)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a corpus, unharmed."""
    try:
        read_corpus(folder)
    except (DatasetUnavailable, MalformedDataset):
        return False
    return True


def copy_corpus(source: Path, target: Path) -> None:
    """Copy a corpus after checking it.

    Raises:
        DatasetUnavailable, MalformedDataset: See ``read_corpus``.
    """
    read_corpus(source)
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    for name in [*(f"{language}.json" for language in read_manifest(source).files), MANIFEST]:
        partial = target / f".{name}.partial"
        shutil.copyfile(source / name, partial)
        partial.replace(target / name)


def extract(
    unpacked: Mapping[str, Path], archives: Sequence[Path], target: Path, languages: Sequence[Language] = LANGUAGES
) -> None:
    """Make a corpus of unpacked packages.

    Args:
        unpacked: Package -> folder with its files.
        archives: The packages themselves, for the record.
        target: Where the corpus goes.
        languages: Which ones.

    Raises:
        MalformedDataset: A package has too few pages.
    """
    texts = {}
    for language in languages:
        sides = chosen(pages_of(unpacked[language.debian_package] / language.folder), BYTES_KEPT)
        for side, pages in sides.items():
            size = sum(len(page.encode()) for page in pages)
            if size < BYTES_KEPT[side]:
                raise MalformedDataset(
                    f"{language.debian_package} has {size} bytes of text for {side}, {BYTES_KEPT[side]} are needed; "
                    "the package is of a release that carries fewer pages"
                )
        texts[language.code] = sides
    write_corpus(target, texts, list(_used(archives)))


def _used(archives: Sequence[Path]) -> Iterator[PackageUsed]:
    for archive in archives:
        with archive.open("rb") as f:
            yield PackageUsed(file=archive.name, sha256=hashlib.file_digest(f, "sha256").hexdigest())
