"""The private vote about a support: noised as the ballots' sensitivity asks, paid for first, public afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.errors import (
    ConfigurationError,
    EmptyAggregate,
    NonFiniteUpdate,
    ShapeMismatch,
    UpdateOutOfRange,
)
from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper, PrivacyBudget, PrivacyLedger
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.errors import PrivacyBudgetExhausted
from server_ref.aggregation.support_voting import Support, SupportVoting


def free(_event: GaussianRelease) -> None:
    """A ledger that asks nothing."""


@given(st.integers(1, 60), st.data(), st.sampled_from(Adjacency))
@settings(max_examples=50)
def test_one_client_moves_the_count_by_no_more_than_the_noise_covers(
    size: int, data: st.DataObject, adjacency: Adjacency
):
    votes = data.draw(st.integers(1, size))
    vote = SupportVoting(size, votes, 1, 1.0, adjacency)
    ballot = st.lists(st.integers(0, size - 1), max_size=votes, unique=True).map(lambda b: np.array(b, np.int64))
    one, other = data.draw(ballot), data.draw(ballot)
    if adjacency is not Adjacency.REPLACE_ONE:
        other = np.zeros(0, np.int64)
    moved = vote.count([one]) - vote.count([other])
    assert int((moved**2).sum()) <= vote.squared_sensitivity


@pytest.mark.parametrize(("adjacency", "squared"), [(Adjacency.ZERO_OUT, 5), (Adjacency.REPLACE_ONE, 10)])
def test_the_sensitivity_is_attained_and_the_noise_has_it(adjacency: Adjacency, squared: int):
    vote = SupportVoting(4000, 5, 7, 1.5, adjacency)
    gone = np.arange(5, 10) if adjacency is Adjacency.REPLACE_ONE else np.zeros(0, np.int64)
    moved = vote.count([np.arange(5)]) - vote.count([gone])
    assert int((moved**2).sum()) == squared == vote.squared_sensitivity
    assert vote.variance == Fraction(9, 4) * squared


def test_the_noise_is_drawn_with_the_stated_variance():
    """4000 coordinates: the sample variance is within five standard deviations of its own."""

    class Spy(SupportVoting):
        def leading(self, noised: np.ndarray) -> Support:
            seen.append(noised)
            return super().leading(noised)

    seen: list[np.ndarray] = []
    vote = Spy(4000, 9, 9, 2.0)
    vote.elect(vote.count([]), round_id=0, charge=free)
    wanted = 4.0 * 9
    assert float(np.var(seen[0])) == pytest.approx(wanted, abs=5 * wanted * math.sqrt(2 / 4000))


def test_a_vote_is_paid_for_before_anything_is_drawn():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    keeper = LedgerKeeper(PrivacyLedger(budget=budget))
    vote = SupportVoting(100, 4, 4, 5.0)
    counts = vote.count([np.arange(4)])
    asked: list[int] = []

    def random(n: int) -> bytes:
        asked.append(n)
        return bytes(range(256))[:n].ljust(n, b"\1")

    keeper.open_round(0)
    vote.elect(counts, round_id=0, charge=keeper.charge, random=random)
    event = keeper.ledger.events[0]
    assert (event.noise_multiplier, event.adjacency) == (5.0, Adjacency.ZERO_OUT)
    assert asked
    asked.clear()
    keeper.open_round(1)
    with pytest.raises(PrivacyBudgetExhausted):
        SupportVoting(100, 4, 4, 0.5).elect(counts, round_id=1, charge=keeper.charge, random=random)
    assert not asked, "nothing was drawn, so nothing was learned"
    assert len(keeper.ledger.events) == 1


def ballots_of(votes: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """500 clients whose largest coordinates are mostly among the first 25."""
    for _ in range(500):
        yield random.permutation(np.r_[random.choice(25, votes - 1, replace=False), 25 + random.integers(975)])


def test_the_support_is_what_most_clients_voted_for():
    random = np.random.default_rng(0)
    vote = SupportVoting(1000, 16, 25, 4.0)
    found = vote.elect(vote.count(ballots_of(16, random)), round_id=0, charge=free)
    assert found.indices.tolist() == list(range(25))
    # Drowned in noise it is as good as none.
    loud = SupportVoting(1000, 16, 25, 4000.0).elect(vote.count(ballots_of(16, random)), round_id=0, charge=free)
    assert len(set(loud.indices.tolist()) & set(range(25))) < 15


def test_ballots_are_the_largest_coordinates():
    vote = SupportVoting(5, 2, 1, 1.0)
    assert vote.ballot(np.array([1, -3, 0, 3, 2], np.float32)).tolist() == [1, 3]
    assert vote.ballot(np.ones(5, np.float32)).tolist() == [0, 1]
    with pytest.raises(NonFiniteUpdate):
        vote.ballot(np.array([1, np.nan, 0, 3, 2], np.float32))
    for bad in (np.ones(5), np.ones(4, np.float32)):
        with pytest.raises(ShapeMismatch):
            vote.ballot(bad)


@pytest.mark.parametrize(
    "ballot",
    [[0, 1, 2], [0, 0], [-1], [5], [[0, 1]]],
    ids=["too many", "twice", "negative", "beyond", "matrix"],
)
def test_ballots_that_would_count_for_more_are_refused(ballot: list[int]):
    """A stuffed ballot moves the count by more than the noise covers."""
    with pytest.raises(UpdateOutOfRange):
        SupportVoting(5, 2, 1, 1.0).count([np.array(ballot, np.int64)])


def test_equal_counts_go_to_the_lowest_coordinate():
    assert SupportVoting(4, 1, 2, 1.0).leading(np.array([1, 3, 3, 3])).indices.tolist() == [1, 2]
    assert SupportVoting(4, 1, 3, 1.0).leading(np.array([1.0, -2.0, 0.5, -2.0])).indices.tolist() == [0, 1, 2]


def test_a_support_projects_and_scatters():
    support = Support(np.array([1, 3]), 5)
    update = np.arange(5, dtype=np.float32)
    assert support.project(update).tolist() == [1, 3]
    assert support.scatter(support.project(update)).tolist() == [0, 1, 0, 3, 0]
    assert support.scatter(np.array([7, -7])).dtype == np.int64
    hashes = {support.sha256, Support(np.array([1, 4]), 5).sha256, Support(np.array([1, 3]), 6).sha256}
    assert len(hashes) == 3
    with pytest.raises(ShapeMismatch):
        support.project(update[:4])
    with pytest.raises(ShapeMismatch):
        support.scatter(np.zeros(3))
    for bad in ([3, 1], [1, 1], [-1, 2], [2, 5]):
        with pytest.raises(ShapeMismatch):
            Support(np.array(bad), 5)


def test_a_vote_about_squares_fits_secret_ballots():
    """The clip norm sqrt(k) is an integer, so that ballots fit a grid of whole numbers exactly."""
    vote = SupportVoting.square(1000, share=0.05, noise_multiplier=1.0, adjacency=Adjacency.ZERO_OUT)
    assert (vote.votes, vote.kept) == (49, 49)
    assert SupportVoting.square(3, share=1.0, noise_multiplier=1.0, adjacency=Adjacency.ZERO_OUT).votes == 1
    with pytest.raises(EmptyAggregate):
        SupportVoting.square(0, share=0.5, noise_multiplier=1.0, adjacency=Adjacency.ZERO_OUT)
    for share in (0.0, 1.5):
        with pytest.raises(ConfigurationError):
            SupportVoting.square(10, share=share, noise_multiplier=1.0, adjacency=Adjacency.ZERO_OUT)


@pytest.mark.parametrize("numbers", [(5, 0, 1, 1.0), (5, 6, 1, 1.0), (5, 1, 6, 1.0), (5, 1, 0, 1.0), (5, 1, 1, 0.0)])
def test_nonsense_is_refused(numbers: tuple[int, int, int, float]):
    with pytest.raises(ConfigurationError):
        SupportVoting(*numbers)


def test_counts_of_another_vote_are_refused():
    vote = SupportVoting(5, 1, 1, 1.0)
    for bad in (np.zeros(5), np.zeros(4, np.int64)):
        with pytest.raises(ShapeMismatch):
            vote.elect(bad, round_id=0, charge=free)
    with pytest.raises(ShapeMismatch):
        vote.leading(np.zeros(4))
