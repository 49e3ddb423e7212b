"""Exports are found again by what went into them, and believed only if no byte of the entry changed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.program import Role
from mobile_export import ProgramBundle, export_program
from mobile_export.blueprint import draw_blueprint
from mobile_export.cache import CHECKSUM_FILE, PARITY_FILE, ExportCache
from mobile_export.decompositions import decomposition_table
from mobile_export.methods import cross_entropy
from tests.bundles import tiny_model


def export(folder, **options) -> ProgramBundle:
    """A small export: softmax regression with one method."""
    model = options.pop("model", None) or tiny_model("softmax")
    return export_program(
        model, out_dir=folder / "out", cache_dir=folder / "cache", batch_sizes={Role.INFER: (2,)}, **options
    )


def entry_of(folder):
    """The one entry's folder."""
    [entry] = [p for p in (folder / "cache").iterdir() if p.is_dir()]
    return entry


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a cache of one entry, and what the export said."""
    folder = tmp_path_factory.mktemp("export")
    steps = []
    return folder, export(folder, progress=steps.append), steps


@pytest.fixture
def damaged(exported, tmp_path):
    """A copy of the cache, free to be damaged."""
    cached = entry_of(exported[0])
    entry = tmp_path / "cache" / cached.name
    entry.mkdir(parents=True)
    for name, data in contents(cached).items():
        (entry / name).write_bytes(data)
    return tmp_path, entry


def test_the_first_export_does_all_steps_in_order(exported):
    _, bundle, steps = exported
    assert not bundle.cached
    assert [(s.stage, s.method) for s in steps] == [
        ("trace", "infer_b2"),
        ("lower", "infer_b2"),
        ("emit", ""),
        *[("check", "infer_b2")] * 4,
    ]
    assert [(s.done, s.total) for s in steps] == [(i + 1, 7) for i in range(7)]


def test_the_second_export_is_found(exported, tmp_path):
    folder, first, _ = exported
    steps = []
    again = export_program(
        tiny_model("softmax"),
        out_dir=tmp_path / "again",
        cache_dir=folder / "cache",
        batch_sizes={Role.INFER: (2,)},
        progress=steps.append,
    )
    assert again.cached
    assert again.parity == first.parity
    assert again.manifest == first.manifest
    assert contents(again.path) == contents(first.path)
    assert [s.stage for s in steps] == ["trace", "cached"]
    assert steps[-1].done == steps[-1].total


def test_an_export_without_the_cache_gives_the_same_bytes(exported, tmp_path):
    _, first, _ = exported
    again = export(tmp_path, use_cache=False)
    assert not again.cached
    assert contents(again.path) == contents(first.path)
    assert not (tmp_path / "cache").exists()


def test_what_the_gate_did_not_see_is_not_kept(tmp_path):
    bundle = export(tmp_path, parity=False)
    assert bundle.parity is None
    assert not (tmp_path / "cache").exists()
    bundle.load().close()


@pytest.mark.parametrize("name", ["program.pte", "manifest.json", "weights.safetensors", PARITY_FILE, CHECKSUM_FILE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_entry_is_not_believed(damaged, name, damage):
    folder, entry = damaged
    cache = ExportCache(folder / "cache")
    assert cache.find(entry.name, 1e-5) is not None
    data = bytearray((entry / name).read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            (entry / name).write_bytes(data)
        case "truncate":
            (entry / name).write_bytes(data[:-1])
        case "remove":
            (entry / name).unlink()
    assert cache.find(entry.name, 1e-5) is None


def test_a_damaged_entry_is_built_again(damaged, exported):
    folder, entry = damaged
    (entry / "program.pte").write_bytes(b"rubbish")
    rebuilt = export(folder)
    assert not rebuilt.cached
    assert contents(rebuilt.path) == contents(exported[1].path)
    assert contents(entry) == contents(entry_of(exported[0]))


def test_what_a_killed_export_left_behind_is_swept(damaged):
    folder, entry = damaged
    litter = folder / "cache" / f".{entry.name}.abc"
    (litter / "new").mkdir(parents=True)
    other = folder / "cache" / ".0000.abc"
    other.mkdir()
    cache = ExportCache(folder / "cache")
    with cache.locked(entry.name), cache.writing(entry.name) as scratch:
        for name, data in contents(entry).items():
            (scratch / name).write_bytes(data)
    assert not litter.exists()
    assert other.exists()
    assert cache.find(entry.name, 1e-5) is not None


def test_an_entry_under_another_key_is_not_believed(damaged):
    folder, entry = damaged
    entry.rename(entry.with_name("0" * 64))
    assert ExportCache(folder / "cache").find("0" * 64, 1e-5) is None


def test_an_entry_that_passed_a_laxer_gate_only_is_not_believed(damaged):
    folder, entry = damaged
    assert ExportCache(folder / "cache").find(entry.name, 1e-12) is None


def test_a_user_who_edits_the_bundle_does_not_edit_the_cache(damaged):
    folder, entry = damaged
    bundle = export(folder)
    assert bundle.cached
    with (bundle.path / "program.pte").open("r+b") as file:
        file.write(b"edited")
    assert ExportCache(folder / "cache").find(entry.name, 1e-5) is not None


def test_a_key_is_locked_by_one_builder_at_a_time(tmp_path):
    cache = ExportCache(tmp_path)
    inside, log = threading.Event(), []

    def second():
        inside.wait()
        with cache.locked("key"):
            log.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with cache.locked("key"):
        inside.set()
        with cache.locked("other"):  # other keys are free
            log.append("first")
    thread.join()
    assert log == ["first", "second"]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigurationError, match="POCKETFED_CACHE"),
        ExportCache(tmp_path / "file" / "cache").locked("key"),
    ):
        pytest.fail("the block must not run")


class Tempered(nn.Module):
    """A model whose behaviour depends on what no repr, state dict or source shows."""

    feature_shape = (4,)

    def __init__(self, temperature=1.0, shift=None):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.5)
        self.temperature = temperature
        self.shift = shift if shift is not None else torch.zeros(3)

    def forward(self, x):
        return self.linear(x) / self.temperature + self.shift


def key(model=None, loss=cross_entropy, **options):
    defaults = {
        "batch_sizes": {Role.TRAIN: (2,)},
        "example_batch": None,
        "feature_shape": None,
        "num_classes": None,
        "model_name": None,
        "constants": {},
        "decompositions": decomposition_table(),
    }
    blueprint = draw_blueprint(model or Tempered(), loss, **{**defaults, **options}, traced=lambda _method: None)
    return blueprint.content_key()


def scaled(factor):
    return lambda logits, y: factor * cross_entropy(logits, y)


def test_the_same_content_has_the_same_key():
    assert key() == key()
    assert key(loss=scaled(2.0)) == key(loss=scaled(2.0))
    x, y = torch.zeros(7, 4), torch.zeros(7, dtype=torch.int64)
    assert key(example_batch=(x, y)) == key(feature_shape=(4,)) == key()


def with_other_weights():
    model = Tempered()
    with torch.no_grad():
        model.linear.bias[0] = 0.25
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"model": Tempered(temperature=2.0)},
        {"model": Tempered(shift=torch.ones(3))},
        {"model": with_other_weights()},
        {"loss": scaled(2.0)},
        {"batch_sizes": {Role.TRAIN: (3,)}},
        {"batch_sizes": {Role.GRAD: (2,)}},
        {"batch_sizes": {Role.TRAIN: (2,), Role.INFER: (2,)}},
        {"model_name": "other"},
        {"constants": {"side": 8}},
        {"decompositions": {}},
    ],
    ids="-".join,
)
def test_whatever_changes_the_program_changes_the_key(change):
    assert key(**change) != key()
