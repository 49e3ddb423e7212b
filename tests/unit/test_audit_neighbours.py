"""The neighbouring-data test: every sensitivity that the product claims holds, and a wrong one is refuted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server_ref.aggregation import Adjacency
from simulator.audit.claims import all_claims, calibrated, sqrt_ratio
from simulator.audit.neighbours import Claim, check

CLAIMS = list(all_claims())
TIGHT = {"mean, float64 bins", "mean, int64 grid", "weighted mean", "stale updates", "centred clipping", "krum",
         "topk, clipped after", "randomk, clipped after", "SensitivityCalibrator", "sums of all buckets",
         "votes for a support"}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.name}, {c.adjacency}")
def test_no_pair_of_neighbours_refutes_a_claim(claim: Claim):
    verdict = check(claim)
    assert verdict.holds, f"{verdict.moved} > {claim.sensitivity}"
    if claim.name in TIGHT:
        assert verdict.attained > 0.999, "and a smaller claim would be wrong"


def test_the_claims_cover_what_the_product_names():
    assert {c.name for c in CLAIMS} >= TIGHT | {"multi-krum", "trimmed-mean", "median"}
    assert {c.adjacency for c in CLAIMS} == {Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE}


def test_sqrt_ratio_is_refuted_at_once():
    """What the specification's calibrator returned: off by a factor of sqrt(1 / ratio), found by the first pairs."""
    for claim in calibrated("sqrt(ratio)", sqrt_ratio):
        verdict = check(claim)
        assert not verdict.holds
        assert verdict.attained == pytest.approx(0.05**-0.5, rel=1e-5)


def test_an_outcome_that_is_no_number_is_no_proof():
    broken = replace(CLAIMS[0], outcome=lambda _: np.full(3, np.nan))
    assert not check(broken).holds
