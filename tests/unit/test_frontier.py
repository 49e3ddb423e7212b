"""The frontier's fast cohort against written-down updates and the server's pipeline, and a tiny study end to end."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import Adjacency, ClipGlobal, EncodedUpdate, ExactMean, Facts, Pipeline, Sgd
from server_ref.aggregation.bucketed import BucketSums
from server_ref.aggregation.buckets import BucketedRule
from server_ref.aggregation.centred import centred_stages
from server_ref.aggregation.release import NoNoise
from server_ref.aggregation.robust import RuleOptions, sensitivity_replace_one
from simulator.frontier import __main__ as command
from simulator.frontier import study
from simulator.frontier.config import MODES, Cell, FrontierSettings
from simulator.frontier.report import Frontier, as_markdown, as_picture
from simulator.frontier.run import World, _attacked, _Sent, _Server, run_cell

TINY = FrontierSettings(
    dataset="digits", devices=300, rounds=6, epsilons=(1.0, None), fractions=(0.0, 0.2), attacks=("sign-flip", "alie:2")
)


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(TINY)


@pytest.fixture(scope="module")
def honest(world: World) -> _Sent:
    weights = 0.3 * np.random.default_rng(0).standard_normal(world.cohort.size)
    return _Sent(world.cohort.train(weights, 1.0), np.ones(world.cohort.devices), None)


def test_implicit_updates_are_the_updates(world, honest):
    """Against one gradient at a time, from the definition."""
    cohort, rng = world.cohort, np.random.default_rng(1)
    assert sorted(set(cohort.sizes)) == [4, 5]
    weights = 0.3 * np.random.default_rng(0).standard_normal(cohort.size)
    expected = []
    for device in range(cohort.devices):
        x, y = cohort.features[cohort.owners == device], cohort.targets[cohort.owners == device]
        scores = x.astype(np.float64) @ weights.reshape(65, 10)
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        expected.append((x.T @ (y - p) / len(x)).reshape(-1))
    rows = np.array(expected)
    found = honest.updates
    np.testing.assert_allclose(found.dense(np.arange(cohort.devices)), rows, atol=1e-5)
    np.testing.assert_allclose(found.norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    direction, factors = rng.standard_normal(cohort.size), rng.standard_normal(cohort.devices)
    np.testing.assert_allclose(found.inner(direction), rows @ direction, atol=1e-4)
    np.testing.assert_allclose(found.sum(factors), factors @ rows, atol=1e-3)
    some = np.array([3, 5, 8])
    np.testing.assert_allclose(found.sum(factors, some), factors[some] @ rows[some], atol=1e-4)


@pytest.mark.parametrize("attack", ["none", "sign-flip", "ipm:1000"])
@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=lambda m: m.kind)
def test_a_round_is_what_the_pipeline_makes_of_the_same_updates(world, honest, mode, attack):
    """Without noise; with it the noise stage is the server's own."""
    cell = Cell(mode, None, 0.2, attack)
    attackers = world.attackers(0.2)
    sent = honest if cell.parsed is None else _attacked(world, honest, cell.parsed, attackers, 0)
    rows = honest.updates.dense(np.arange(world.cohort.devices))
    if attack == "sign-flip":
        rows[attackers] *= -1
    elif sent.common is not None:
        rows[attackers] = sent.common
    server = _Server(world, cell, None, np.random.default_rng(0).bytes)
    released = [server.release(sent, 0), server.release(sent, 1)]
    facts = Facts(world.cohort.size, UpdateKind.DELTA, capacity=len(rows), count=len(rows))
    stages = [ClipGlobal(mode.clip_norm)]
    if mode.kind == "centred":
        clip, _ = centred_stages(NoNoise(), size=facts.size, radius=mode.clip_norm)
        stages = [replace(clip, centre=released[0].astype(np.float32))]
    pipeline = Pipeline.build(*stages, ExactMean("fixed"), Sgd(), facts=facts)
    fold = pipeline.start()
    fold.add([pipeline.admit(EncodedUpdate(i, row)) for i, row in enumerate(rows)])
    outcome = pipeline.finish(fold).values + (released[0] if mode.kind == "centred" else 0)
    np.testing.assert_allclose(released[1], outcome, atol=2e-6)


def test_buckets_reach_the_noise_stage_as_the_reduce_stage_hands_them_over(world, honest):
    mode = MODES[1]
    server = _Server(world, Cell(mode, None, 0.0, "none"), None, np.random.default_rng(0).bytes)
    sums, weights = server._sums(honest)
    aggregate = server._aggregate(sums, weights)
    rule = BucketedRule(mode.buckets, mode.num_byzantine, mode.rule)
    facts = Facts(world.cohort.size, UpdateKind.DELTA, capacity=300, count=300)
    pipeline = Pipeline.build(ClipGlobal(mode.clip_norm), BucketSums(rule, bytes(16)), Sgd(), facts=facts)
    fold = pipeline.start()
    rows = honest.updates.dense(np.arange(300))
    fold.add([pipeline.admit(EncodedUpdate(i, row)) for i, row in enumerate(rows)])
    theirs = fold.finish()
    assert sorted(aggregate.measurements["bucket_weights"]) == sorted(theirs.measurements["bucket_weights"])
    assert aggregate.values.shape == theirs.values.shape
    assert aggregate.sensitivity[Adjacency.ZERO_OUT] == theirs.sensitivity[Adjacency.ZERO_OUT] == mode.clip_norm
    # Dealt out differently, the sum of all is the same.
    shape = (mode.buckets, -1)
    total = theirs.values.reshape(shape).sum(axis=0)
    np.testing.assert_allclose(aggregate.values.reshape(shape).sum(axis=0), total, atol=1e-3)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
def test_a_run_spends_its_budget_and_no_more(world, mode):
    outcome = run_cell(world, Cell(mode, 3.0, 0.0, "none"), test=False)
    assert 2.999 < outcome.epsilon <= 3.0
    assert outcome.test is None
    quiet = run_cell(world, Cell(mode, None, 0.0, "none"))
    assert quiet.epsilon is None
    assert quiet.test > 0.6


def test_noise_has_the_size_that_the_budget_asks_for(world, honest):
    """Six rounds at epsilon 1: z = 9.14; and three of seven buckets' means would not do."""
    zeros = _Sent(honest.updates, np.zeros(300), np.zeros(world.cohort.size, np.float32))
    mode = MODES[0]
    spread = []
    for budget in (1.0, 8.0):
        found = []
        original = _Server.release

        def spy(self, sent, version, found=found, original=original):
            found.append(original(self, zeros, version))
            return found[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Server, "release", spy)
            run_cell(world, Cell(mode, budget, 0.0, "none"), test=False)
        spread.append(float(np.std(found)) * 300 / mode.clip_norm)
    assert spread[0] == pytest.approx(3.7306 * 6**0.5, rel=0.05)
    assert spread[1] < spread[0] / 4


def test_an_attack_that_needs_more_than_a_linear_device_has_is_refused(world):
    with pytest.raises(ConfigurationError, match="label-flip"):
        run_cell(world, Cell(MODES[0], None, 0.2, "label-flip"))


def test_a_tiny_frontier_from_the_command_to_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FrontierSettings", lambda: TINY)
    kept = tmp_path / "kept" / "cells.jsonl"
    arguments = ["--out", str(tmp_path / "f.md"), "--picture", str(tmp_path / "f.svg"), "--kept", str(kept)]
    assert command.main(arguments) == 0
    page, picture = (tmp_path / "f.md").read_text(), (tmp_path / "f.svg").read_text()
    told = capsys.readouterr().err.splitlines()
    cells = list(TINY.cells())
    assert len(told) == len(cells) == len(kept.read_text().splitlines()) - 1 == 4 * 2 * 3
    assert page.count("\n| noised mean |") == 2 + 4 + 1  # worst, by attack, and what it is
    assert picture.startswith("<svg")
    assert picture.count(", worst attack ") == 4 * 2 * 2
    # A second time nothing is run, and the page is the same.
    monkeypatch.setattr(study, "run_cell", None)
    assert command.main(arguments) == 0
    assert ((tmp_path / "f.md").read_text(), capsys.readouterr().err) == (page, "")
    # Figures are those of the cells, and the worst attack is the worst.
    outcomes = study.run_study(TINY, kept)
    frontier = Frontier(TINY, outcomes)
    assert (as_markdown(frontier), as_picture(frontier)) == (page, picture)
    found = frontier.of(MODES[0], None, 0.2)
    assert frontier.worst(MODES[0], None, 0.2)[1] == min(found.values())
    assert found["sign-flip"] == outcomes[Cell(MODES[0], None, 0.2, "sign-flip").key].test
    with pytest.raises(ConfigurationError, match="another study"):
        study.run_study(TINY.model_copy(update={"rounds": 7}), kept)


def test_the_page_quotes_figures_of_the_summary():
    docs = Path(__file__).parents[2] / "docs"
    quoted = set(re.findall(r"\b(\d\d\.\d) %", (docs / "frontier.md").read_text()))
    assert len(quoted) > 8
    assert quoted <= set(re.findall(r"\b\d\d\.\d\b", (docs / "frontier-summary.md").read_text()))
    # And of rules on updates, beside the mean's.
    for rule, times in (("multi-krum", 1337), ("trimmed-mean", 2.8)):
        sensitivity = sensitivity_replace_one(rule, 12_000, 1200, 1.0, RuleOptions())
        assert sensitivity / (2 / 12_000) == pytest.approx(times, rel=2e-3)
