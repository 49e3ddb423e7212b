"""The shared noise: of the stated variance, drawn once, known to nobody, and never on the parity mask."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
from scipy import stats

from client_sdk.protocol.shamir import reconstruct
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.noise_shares import draw_noise, make_contribution, sum_received
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.rules import honest_contributors
from tests.secure_parties import Parties, pinned, pinned_privacy, reweighted

SIZE = 4000


def spread(values: np.ndarray, stddev: float) -> None:
    """The sample's standard deviation is the stated one: a two-sided test that errs once in a million."""
    n = values.size
    statistic = float((values.astype(float) ** 2).sum()) / stddev**2
    assert stats.chi2.ppf(5e-7, n) < statistic < stats.chi2.ppf(1 - 5e-7, n), (values.std(), stddev)


@pytest.mark.parametrize("contributors", [(1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 4, 5)], ids=len)
def test_the_honest_contributors_noise_alone_has_the_stated_deviation(tmp_path, contributors):
    parties = Parties(tmp_path, pinned(max_weight=3), size=SIZE, live=contributors)
    statement = parties.statement(parties_uploads(parties), contributors=contributors)
    honest = honest_contributors(statement, parties.parameters)
    assert honest == len(contributors) - 2
    drawn = [draw_noise(statement, parties.layout, honest, os.urandom) for _ in range(honest)]
    spread(np.sum(drawn, axis=0), 4.0 * 3 * 2**16)
    parties.close()


def parties_uploads(parties: Parties):
    return reweighted([parties.upload(number, [0] * parties.layout.num_values) for number in range(2)], 1)


def test_what_is_opened_has_the_noise_of_all_contributors_once(tmp_path):
    """Five contributors, of whom three are relied on: the variance is 5/3 of what is needed, no more and no less."""
    parties = Parties(tmp_path, size=SIZE)
    uploads = parties.uploads(range(2))
    opened = parties.run(parties.statement(uploads))[0]
    noise = opened - uploads[0].codes - uploads[1].codes
    spread(noise, 4.0 * 2**16 * math.sqrt(5 / 3))
    parties.close()


def test_noise_is_the_same_whichever_answers_open_it(tmp_path):
    """Noise on one's own share would be multiplied by Lagrange coefficients, and differ from choice to choice."""
    parties = Parties(tmp_path)
    answers = parties.answers(0, parties.commit(parties.statement(parties.uploads(range(2)))))
    opened = [parties.open(list(chosen))[0].tolist() for chosen in itertools.combinations(answers, 3)]
    assert all(each == opened[0] for each in opened)
    parties.close()


def test_the_indicator_has_noise_of_its_own(tmp_path):
    parties = Parties(
        tmp_path,
        pinned(indicator=True, privacy=pinned_privacy(indicator_noise_multiplier=40.0, epsilon=9.0)),
        live=[1],
    )
    statement = parties.statement(parties_uploads(parties))
    drawn = np.array([draw_noise(statement, parties.layout, 3, os.urandom) for _ in range(80)])
    spread(drawn[:, :-1].ravel(), 4.0 * 2**16 / math.sqrt(3))
    spread(drawn[:, -1], 40.0 / math.sqrt(3))
    parties.close()


@pytest.mark.parametrize("packing", [1, 2])
@pytest.mark.parametrize("field", ["m61", "m127"])
def test_each_receiver_gets_its_share_of_the_same_noise(tmp_path, packing, field):
    parties = Parties(tmp_path, pinned(packing=packing, field=field), live=[1])
    statement = parties.statement(parties_uploads(parties))
    contributions = [
        make_contribution(statement, config, keys, parties.layout, os.urandom)
        for config, keys in zip(parties.configs, parties.keys, strict=True)
    ]
    sums = {
        index: sum_received(
            statement,
            [one.for_receiver(index) for one in contributions],
            parties.configs[index - 1],
            parties.keys[index - 1],
            parties.layout,
        )[0]
        for index in parties.indices
    }
    size = parties.layout.length
    opened = {
        reconstruct({i: sums[i] for i in chosen}, parties.layout.scheme, size).tobytes()
        for chosen in itertools.combinations(parties.indices, parties.parameters.needed)
    }
    assert len(opened) == 1
    parties.close()


def test_in_buckets_every_part_has_the_full_noise_and_its_own(tmp_path):
    parties = Parties(tmp_path, pinned(checking=CheckingMode.BUCKETS, max_parts=2, min_bucket=2), size=SIZE)
    uploads = parties.uploads(range(4))
    opened = parties.run(parties.statement(uploads[:2], uploads[2:]))
    noise = [
        opened[0] - uploads[0].codes - uploads[1].codes,
        opened[1] - uploads[2].codes - uploads[3].codes,
    ]
    for part in noise:
        spread(part, 4.0 * 2**16 * math.sqrt(5 / 3))
    # Independent parts: the sum of two has twice the variance, not four times or none.
    spread(noise[0] + noise[1], 4.0 * 2**16 * math.sqrt(10 / 3))
    parties.close()


def test_a_share_of_the_noise_is_uniform_over_the_field(tmp_path):
    """Aggregators 1 and 2 are sent seeds; the others' elements fill the field, whatever the noise is."""
    parties = Parties(tmp_path, size=SIZE, live=[1])
    statement = parties.statement(parties_uploads(parties), contributors=(1, 2, 3))
    index = 4
    noise = [
        make_contribution(statement, parties.configs[i - 1], parties.keys[i - 1], parties.layout, os.urandom)
        for i in statement.contributors
    ]
    mine = [one.for_receiver(index) for one in noise]
    (share,) = sum_received(statement, mine, parties.configs[index - 1], parties.keys[index - 1], parties.layout)
    counts = np.bincount((share >> np.uint64(61 - 5)).astype(int), minlength=32)
    assert stats.chisquare(counts).pvalue > 1e-6
    parties.close()


def test_the_default_randomness_is_the_operating_system_s():
    """No aggregator draws noise from anything that a seed could repeat, unless a test says so."""
    assert Aggregator.__init__.__defaults__ is not None
    assert os.urandom in Aggregator.__init__.__defaults__


def test_another_draw_gives_other_noise(tmp_path):
    parties = Parties(tmp_path, live=[1])
    statement = parties.statement(parties_uploads(parties))
    first, second = (draw_noise(statement, parties.layout, 3, os.urandom) for _ in range(2))
    assert first.tolist() != second.tolist()
    parties.close()
