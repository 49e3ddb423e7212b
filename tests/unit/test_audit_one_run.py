"""The one-run audit: the private pipeline stands it, and every planted bug is found. A small instance of `make audit`.

The noise comes from the operating system, so outcomes differ from run to run; the bounds that are asserted are missed
with a probability below 1e-4 (measured over repetitions, by the number of canaries and rounds chosen here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_sdk.cli import main
from client_sdk.protocol.errors import ConfigurationError
from server_ref.aggregation import Adjacency
from simulator.audit.canaries import LENGTH, Canaries, always, every_other, ladder
from simulator.audit.neighbours import Claim, check
from simulator.audit.one_run import AuditPlan, Claimed, Published, audit
from simulator.audit.report import Findings, as_markdown
from simulator.audit.servers import CLIP_NORM, PLANTED, REAL

ALWAYS, PAUSING, LADDER = ("always",), ("every other round",), ("a norm each",)
SMALL = AuditPlan(128, 256, 8, seed=1)
# The program that shows each bug, and as many rounds as it takes.
PLANS = {
    "sensitivity C sqrt(1 %) for sparse updates": AuditPlan(256, 512, 3, 1, ALWAYS),
    "noise of one round's budget in every round": AuditPlan(192, 384, 80, 1, ALWAYS),
    "one round's noise reused in every round": AuditPlan(128, 256, 4, 1, PAUSING),
    "noise of the mean's scale on the sum": AuditPlan(128, 256, 3, 1, ALWAYS),
    "clipping after the noise": AuditPlan(256, 512, 3, 1, ALWAYS),
    "a raw quantile of the norms as clip norm": AuditPlan(128, 256, 40, 1, LADDER),
}


@pytest.mark.parametrize("claimed", REAL, ids=lambda c: c.name)
def test_the_private_pipeline_stands(claimed: Claimed):
    assert audit(claimed, SMALL).holds


@pytest.mark.parametrize("claimed", PLANTED, ids=lambda c: c.name)
def test_a_planted_bug_is_found(claimed: Claimed):
    outcome = audit(claimed, PLANS[claimed.name])
    assert not outcome.holds, outcome.bound
    assert outcome.bound.epsilon > claimed.epsilon


def test_every_planted_bug_has_a_plan():
    assert {c.name for c in PLANTED} == PLANS.keys()


# --- the parts --------------------------------------------------------------------------------------------------------


class Open:
    """A server that adds no noise at all."""

    clip_norm = 1.0

    def round(self, updates: Iterator[np.ndarray]) -> Published:
        return Published(np.sum(list(updates), axis=0, dtype=np.float64), 1.0)


class Silent(Open):
    """A server that tells nothing."""

    def round(self, updates: Iterator[np.ndarray]) -> Published:
        return Published(np.zeros_like(super().round(updates).values), 1.0)


@pytest.mark.parametrize("program", ["always", "every other round", "a norm each"])
def test_an_open_server_is_refuted_and_a_silent_one_never(program: str):
    plan = AuditPlan(64, 128, 4, seed=3, programs=(program,))
    assert not audit(Claimed("open", lambda *_: Open(), 1.5, 1e-5), plan).holds
    for seed in range(20):
        silent = audit(Claimed("silent", lambda *_: Silent(), 0.5, 1e-5), replace(plan, seed=seed))
        assert silent.holds


def test_canaries_are_orthogonal_and_far_longer_than_the_clip_norm():
    canaries = Canaries.draw(30, 200, np.random.default_rng(0))
    updates = np.stack(list(canaries.updates(np.ones(30, bool), np.full(30, 3.0))))
    np.testing.assert_allclose(updates @ updates.T, 9 * np.eye(30), atol=1e-5)
    np.testing.assert_allclose(canaries.along(updates.sum(axis=0, dtype=np.float64)), np.full(30, 3.0), rtol=1e-6)
    out = np.stack(list(canaries.updates(np.zeros(30, bool), np.full(30, 3.0))))
    assert not out.any()
    assert always(5, 2.0)(0).tolist() == [2.0 * LENGTH] * 5
    assert every_other(5, 2.0)(1).tolist() == [0.0] * 5
    norms = [ladder(40, CLIP_NORM)(i) for i in range(3)]
    assert all(len(set(n.tolist())) == 40 for n in norms)
    assert norms[0].argmax() != norms[1].argmax() != norms[2].argmax()


@pytest.mark.parametrize(
    "arguments", [(8, 100, 5), (100, 50, 5), (100, 200, 1), (100, 200, 5, None, ()), (100, 200, 5, None, ("dance",))]
)
def test_plans_that_show_nothing_are_refused(arguments: tuple):
    with pytest.raises(ConfigurationError):
        AuditPlan(*arguments)
    with pytest.raises(ConfigurationError):
        Canaries.draw(0, 5, np.random.default_rng(0))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_names_what_should_not_be():
    wrong = [
        check(Claim("planted", adjacency, 0.5, lambda rows: rows.sum(axis=0).astype(np.float64), 1.0, 2, 3, 4))
        for adjacency in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE)
    ]
    open_server = audit(Claimed("open", lambda *_: Open(), 1.0, 1e-5), AuditPlan(64, 128, 4, seed=3))
    silent = audit(Claimed("silent", lambda *_: Silent(), 1.0, 1e-5), AuditPlan(64, 128, 4, seed=3))
    good = Findings([], wrong, [silent], [open_server], SMALL, SMALL)
    assert good.surprises == []
    page = as_markdown(good)
    assert "| silent | 1 | 0.000 |" in page
    assert page.count("planted, refuted") == 3
    bad = Findings(wrong, [], [open_server], [silent], SMALL, SMALL)
    assert bad.surprises == [
        "refuted: planted (zero-out)", "refuted: planted (replace-one)", "refuted: open", "not found: silent",
    ]  # fmt: skip
    assert "**refuted**" in as_markdown(bad)
    assert "**not found**" in as_markdown(bad)


def test_the_command_writes_the_page_and_its_exit_status_says_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two servers in place of all, so that it takes no longer than it must."""
    good = (Claimed("silent", lambda *_: Silent(), 1.0, 1e-5),)
    bad = (Claimed("open", lambda *_: Open(), 1.0, 1e-5),)
    page = tmp_path / "page.md"
    command = ["audit", "--canaries", "64", "--size", "128", "--rounds", "3", "--planted-rounds", "3", "--seed", "1"]
    monkeypatch.setattr("simulator.audit.claims.all_claims", list)
    monkeypatch.setattr("simulator.audit.claims.calibrated", lambda *_: [])
    for real, planted, status in ((good, bad, 0), (bad, good, 1)):
        monkeypatch.setattr("simulator.audit.servers.REAL", real)
        monkeypatch.setattr("simulator.audit.servers.PLANTED", planted)
        assert main([*command, "--out", str(page)]) == status
    assert "# Audit summary" in page.read_text()
    assert "refuted: open" in capsys.readouterr().err
