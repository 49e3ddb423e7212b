"""Text in several languages: whole pages on one side, files that are checked, examples that share no byte."""

import dataclasses
import gzip
import json
import subprocess

import numpy as np
import pytest

from simulator import languages
from simulator.datasets import CONTEXT, load_dataset, manpages, text_dataset
from simulator.errors import DatasetUnavailable, MalformedDataset
from simulator.fetch import corpus_from_folder, fetch_corpus
from simulator.languages import (
    DATASET,
    LANGUAGES,
    MANIFEST,
    SIDES,
    Corpus,
    Language,
    chosen,
    is_whole,
    pages_of,
    read_corpus,
    read_manifest,
    side_of,
    write_corpus,
)
from tests.texts import small_corpus

HERE = (Language("en", "pages-en", "usr/share/man"), Language("de", "pages-de", "usr/share/man/de"))


def ignore(_line):
    pass


# --- pages ----------------------------------------------------------------------------------------------------------


def test_a_page_and_its_translations_are_on_one_side_and_all_sides_have_pages():
    sides = [side_of(f"7/page{i}") for i in range(1000)]
    assert sides == [side_of(f"7/page{i}") for i in range(1000)]
    shares = {side: sides.count(side) / 1000 for side in SIDES}
    assert 0.7 < shares["train"] < 0.82
    assert 0.05 < shares["validation"] < 0.12
    assert 0.12 < shares["test"] < 0.20


def write_page(folder, name, text, section=7):
    path = folder / f"man{section}" / f"{name}.{section}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode() if isinstance(text, str) else text))
    return path


def test_pages_that_are_no_text_are_left_out_and_long_ones_are_cut(tmp_path):
    words = "Some words of a page. " * 40
    write_page(tmp_path, "good", f".SH NAME\n{words}")
    write_page(tmp_path, "short", "too short")
    write_page(tmp_path, "mdoc", f".Dd today\n{words}")
    write_page(tmp_path, "latin", b"\xe9" * 1000)
    write_page(tmp_path, "long", "字" * 9000)
    (tmp_path / "man7" / "alias.7.gz").symlink_to("good.7.gz")
    (tmp_path / "man7" / "damaged.7.gz").write_bytes(b"no gzip")
    (tmp_path / "man7" / "cut.7.gz").write_bytes(gzip.compress(words.encode())[:-10])
    pages = pages_of(tmp_path)
    assert set(pages) == {"7/good", "7/long"}
    assert pages["7/good"].startswith("NAME\nSome words")
    assert pages["7/long"] == "字" * 4000


def test_whole_pages_are_chosen_until_there_are_enough():
    pages = {f"1/page{i}": "x" * 100 for i in range(200)}
    sides = chosen(pages, {"train": 250, "validation": 100, "test": 0})
    assert {side: len(texts) for side, texts in sides.items()} == {"train": 3, "validation": 1, "test": 0}
    assert set(map(len, sides["train"])) == {100}


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_corpus_comes_back_as_it_was_written(tmp_path):
    corpus = small_corpus()
    write_corpus(tmp_path, corpus.texts)
    assert read_corpus(tmp_path) == corpus
    assert is_whole(tmp_path)


def test_a_changed_file_is_refused_with_both_hashes(tmp_path):
    write_corpus(tmp_path, small_corpus().texts)
    path = tmp_path / "de.json"
    path.write_bytes(path.read_bytes().replace(b"Datei", b"Patei", 1))
    with pytest.raises(MalformedDataset, match=r"de\.json: SHA-256 is .*, the manifest says"):
        read_corpus(tmp_path)
    assert not is_whole(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write_corpus(tmp_path, small_corpus().texts)
    (tmp_path / "zh.json").unlink()
    with pytest.raises(DatasetUnavailable, match=r"lacks zh\.json"):
        read_corpus(tmp_path)


def test_an_interrupted_corpus_is_none(tmp_path, monkeypatch):
    write_corpus(tmp_path, small_corpus().texts)

    def full(*_args, **_options):
        raise OSError("disk full")

    monkeypatch.setattr(languages, "write_atomically", full)
    with pytest.raises(OSError, match="disk full"):
        write_corpus(tmp_path, small_corpus(seed=1).texts)
    with pytest.raises(DatasetUnavailable, match="pocketfed data manpages"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("change", [{"recipe": 0}, {"recipe": 99}])
def test_text_of_another_release_is_refused(tmp_path, change):
    write_corpus(tmp_path, small_corpus().texts)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(MalformedDataset, match="another release"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": 1}', "{"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(MalformedDataset, match="is damaged"):
        read_manifest(tmp_path)


# --- packages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with two Debian packages of small manual pages."""
    monkeypatch.setattr(languages, "BYTES_KEPT", {"train": 3000, "validation": 600, "test": 600})
    folder = tmp_path / "debs"
    folder.mkdir()
    for language in HERE:
        root = tmp_path / language.debian_package
        for i in range(60):
            write_page(root / language.folder, f"page{i}", f".SH NAME\n{f'{language.code} {i} words. ' * 50}")
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN" / "control").write_text(
            f"Package: {language.debian_package}\nVersion: 1:2\nArchitecture: all\nMaintainer: n <n@example.org>\n"
            "Description: x\n"
        )
        path = folder / f"{language.debian_package}_1%3a2_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    return folder


def test_packages_become_a_corpus_that_says_what_it_was_made_of(archives, tmp_path):
    corpus_from_folder(archives, tmp_path / "to", ignore, HERE)
    corpus = read_corpus(tmp_path / "to")
    assert corpus.languages == ("en", "de")
    assert all(page.startswith("NAME\nde ") for page in corpus.texts["de"]["test"])
    used = read_manifest(tmp_path / "to").packages
    assert [p.file for p in used] == ["pages-en_1%3a2_all.deb", "pages-de_1%3a2_all.deb"]
    assert all(len(p.sha256) == 64 for p in used)


def test_a_finished_corpus_is_copied_after_it_was_checked(archives, tmp_path):
    corpus_from_folder(archives, tmp_path / "to", ignore, HERE)
    corpus_from_folder(tmp_path / "to", tmp_path / "copy", ignore)
    assert read_corpus(tmp_path / "copy") == read_corpus(tmp_path / "to")
    assert read_manifest(tmp_path / "copy") == read_manifest(tmp_path / "to")
    (tmp_path / "to" / "en.json").write_text("{}")
    with pytest.raises(MalformedDataset, match="SHA-256"):
        corpus_from_folder(tmp_path / "to", tmp_path / "other", ignore)
    assert not (tmp_path / "other").exists()


def test_packages_that_lack_are_named(archives, tmp_path):
    (archives / "pages-de_1%3a2_all.deb").unlink()
    with pytest.raises(DatasetUnavailable, match=r"neither corpus\.json nor the packages pages-de \(\*\.deb\)"):
        corpus_from_folder(archives, tmp_path / "to", ignore, HERE)
    with pytest.raises(DatasetUnavailable, match="is not a folder"):
        corpus_from_folder(tmp_path / "nowhere", tmp_path / "to", ignore, HERE)


def test_a_package_with_too_few_pages_is_refused(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "BYTES_KEPT", {"train": 10**6, "validation": 0, "test": 0})
    with pytest.raises(MalformedDataset, match=r"pages-en has .* bytes of text for train, 1000000 are needed"):
        corpus_from_folder(archives, tmp_path / "to", ignore, HERE)


def test_packages_are_downloaded_without_root(archives, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\nfor last; do :; done\ncp {archives}/"$last"_* .\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    fetch_corpus(tmp_path / "to", ignore, HERE)
    assert read_corpus(tmp_path / "to").languages == ("en", "de")


def test_there_is_a_package_for_each_of_eight_languages():
    assert len({language.code for language in LANGUAGES}) == len({p.debian_package for p in LANGUAGES}) == 8


# --- examples -------------------------------------------------------------------------------------------------------


def test_examples_are_the_bytes_of_the_pages_and_share_none():
    corpus = Corpus({"en": {side: [f"{side} " + "abcdefghij" * 6] for side in SIDES}})
    data = text_dataset("tiny", corpus)
    text = corpus.texts["en"]["train"][0].encode()
    size = CONTEXT + 1
    assert len(data.train) == len(text) // size
    for i, (x, y) in enumerate(zip(data.train.x, data.train.y, strict=True)):
        assert bytes(x.astype(np.uint8)) + bytes([y]) == text[i * size : (i + 1) * size]


def test_languages_have_equal_parts_of_every_split_and_are_the_groups():
    corpus = small_corpus()
    shorter = {**corpus.texts, "de": {**corpus.texts["de"], "train": corpus.texts["de"]["train"][:1]}}
    data = text_dataset("tiny", Corpus(shorter))
    assert data.group_names == ("en", "de", "zh")
    assert data.num_classes == 256
    assert data.feature_shape == (CONTEXT,)
    for split in (data.train, data.validation, data.test):
        assert split.x.dtype == np.float32
        assert split.y.dtype == split.groups.dtype == np.int64
        counts = np.bincount(split.groups)
        assert len(counts) == 3
        assert counts.min() == counts.max()
    assert (data.train.x[data.train.groups == 0] < 128).all(), "English here is ASCII"
    assert (data.train.x[data.train.groups == 2] >= 128).mean() > 0.9, "Chinese is not"


def test_what_was_trained_on_is_told_by_the_hash():
    first, same, other = (text_dataset("tiny", small_corpus(seed=s)) for s in (0, 0, 1))
    assert first.sha256 == same.sha256 != other.sha256


def test_a_language_without_text_for_a_side_is_refused():
    corpus = small_corpus()
    empty = {**corpus.texts, "zh": {**corpus.texts["zh"], "test": ["short"]}}
    with pytest.raises(MalformedDataset, match="no text for test"):
        text_dataset("tiny", Corpus(empty))


def test_the_data_set_is_found_in_the_cache_and_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETFED_CACHE", str(tmp_path))
    with pytest.raises(DatasetUnavailable, match="pocketfed data manpages"):
        load_dataset(DATASET)
    write_corpus(tmp_path / "data" / DATASET, small_corpus().texts)
    assert dataclasses.asdict(load_dataset(DATASET))["sha256"] == manpages().sha256
