"""A run's folder: new ones are taken, others' files are never touched, two processes never share one."""

import pytest

from simulator.config import SimulationConfig
from simulator.errors import OutputDirectoryInUse, ResumeMismatch
from simulator.folder import RunFolder

CONFIG = SimulationConfig(seed=5)


def begin(path, **kwargs):
    RunFolder.begin(path, CONFIG, **kwargs).close()


def test_a_new_folder_is_created_with_its_parents(tmp_path):
    with RunFolder.begin(tmp_path / "a" / "b", CONFIG) as folder:
        assert folder.fresh
        assert SimulationConfig.read(folder.path / "config.json") == CONFIG


def test_nothing_but_the_run_is_left_when_it_is_closed(tmp_path):
    begin(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_folder_with_a_run_is_refused_and_the_ways_out_are_told(tmp_path):
    begin(tmp_path)
    with pytest.raises(OutputDirectoryInUse, match=r"--resume.*--overwrite"):
        begin(tmp_path)


def test_a_folder_with_other_files_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputDirectoryInUse, match=r"'thesis\.txt', which is no part of a run"):
            begin(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_other_files_beside_a_run_are_not_overwritten_either(tmp_path):
    begin(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(OutputDirectoryInUse, match="notes"):
        begin(tmp_path, overwrite=True)


def test_overwrite_removes_all_of_an_earlier_run(tmp_path):
    begin(tmp_path)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "log").touch()
    (tmp_path / "results.json").touch()
    begin(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_resume_takes_the_runs_own_configuration(tmp_path):
    begin(tmp_path)
    with RunFolder.resume(tmp_path, {"seed": 5}) as folder:
        assert folder.config == CONFIG
        assert not folder.fresh


def test_resume_compares_what_is_given_of_a_section_and_nothing_else(tmp_path):
    config = SimulationConfig(aggregation={"rule": "krum", "clip_norm": 5.0})
    RunFolder.begin(tmp_path / "run", config).close()
    with RunFolder.resume(tmp_path / "run", {"aggregation": {"rule": "krum"}}) as folder:
        assert folder.config == config
    with pytest.raises(ResumeMismatch, match=r"--rule bulyan \(the run has krum\)\. Leave"):
        RunFolder.resume(tmp_path / "run", {"aggregation": {"rule": "bulyan"}})


def test_resume_with_other_values_names_them(tmp_path):
    begin(tmp_path)
    with pytest.raises(ResumeMismatch, match=r"--seed 6 \(the run has 5\).*Leave these flags out"):
        RunFolder.resume(tmp_path, {"seed": 6})


@pytest.mark.parametrize("content", [None, "{}x", '{"format": 2}', '{"format": 1, "unknown": 1}'])
def test_resume_without_a_run_of_this_version_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ResumeMismatch):
        RunFolder.resume(tmp_path, {})


def test_resume_of_a_folder_that_is_not_there_creates_nothing(tmp_path):
    with pytest.raises(ResumeMismatch, match="no run to resume"):
        RunFolder.resume(tmp_path / "nowhere", {})
    assert not (tmp_path / "nowhere").exists()


def test_two_processes_cannot_use_one_folder(tmp_path):
    with RunFolder.begin(tmp_path, CONFIG):
        with pytest.raises(OutputDirectoryInUse, match="another process"):
            RunFolder.resume(tmp_path, {})
        with pytest.raises(OutputDirectoryInUse, match="another process"):
            RunFolder.begin(tmp_path, CONFIG, overwrite=True)
    RunFolder.resume(tmp_path, {}).close()


def test_discard_leaves_an_empty_folder(tmp_path):
    with RunFolder.begin(tmp_path, CONFIG) as folder:
        folder.discard()
    assert list(tmp_path.iterdir()) == []
