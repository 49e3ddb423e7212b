"""Part 5 of the specification: robust rules against dishonest workers, on softmax regression over the digits.

"Honest workers' aggregation is correct" cannot hold of a rule that picks one update of many. What holds is a bounded
deviation, which is tested here as the theorem it is; what it costs and where it ends is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client_sdk.protocol.errors import TooManyByzantine
from client_sdk.protocol.updates import WorkerGradient
from server_ref import ByzantineRobustAggregator, GradientAggregator, apply_update
from server_ref.aggregation import RuleOptions
from server_ref.aggregation.robust import RULES
from tests import digits

Attack = Callable[[list[digits.State], int], list[digits.State]]
"""From the honest gradients and the round to what the dishonest workers send."""


def mean_of(gradients: list[digits.State]) -> digits.State:
    return {name: np.mean([g[name] for g in gradients], axis=0) for name in gradients[0]}


def scaled(factor: float, copies: int = 1) -> Attack:
    """The honest mean times a factor, from each of them."""
    return lambda honest, _: [{k: v * np.float32(factor) for k, v in mean_of(honest).items()}] * copies


def correlated_poison(copies: int) -> Attack:
    """One wrong direction, three times the length of an honest gradient, with a little noise of each colluder's own."""

    def poison(honest: list[digits.State], round_id: int) -> list[digits.State]:
        random = np.random.default_rng(round_id)
        mean = mean_of(honest)
        length = 3 * math.sqrt(sum(float(np.sum(v**2)) for v in mean.values()))
        direction = {k: random.standard_normal(v.shape) for k, v in mean.items()}
        norm = math.sqrt(sum(float(np.sum(v**2)) for v in direction.values()))
        return [
            {
                k: (length / norm * (v + 0.05 * random.standard_normal(v.shape))).astype(np.float32)
                for k, v in direction.items()
            }
            for _ in range(copies)
        ]

    return poison


def cohort(state: digits.State, honest: int, attack: Attack | None, round_id: int = 0) -> list[WorkerGradient]:
    """Honest workers first, then the dishonest ones."""
    workers = [digits.worker(f"honest-{i}", state, shard) for i, shard in enumerate(digits.shards(honest))]
    if attack is not None:
        sent = attack([dict(w.gradients) for w in workers], round_id)
        workers += [WorkerGradient(f"liar-{i}", update, 180, timestamp=0.0) for i, update in enumerate(sent)]
    return workers


def train(
    aggregate: Callable, honest: int, attack: Attack | None, rounds: int, learning_rate: float = 1.0
) -> tuple[list[float], list[list[int]]]:
    """Losses on the honest workers' data, and who was left out in each round."""
    state, losses, excluded = digits.start(), [], []
    for round_id in range(rounds):
        update = aggregate(cohort(state, honest, attack, round_id), state)
        state = apply_update(state, update, learning_rate=learning_rate)
        losses.append(digits.loss(state, digits.shards(honest)))
        excluded.append(update.measurements.get("excluded", []))
    return losses, excluded


@pytest.mark.parametrize("factor", [100.0, 1000.0, -1.0, -100.0])
def test_single_byzantine_worker(factor: float):
    """Test: 10 honest workers + 1 malicious worker sending gradient x 100 (and x 1000, inverted, both).

    Expected: Krum selects an honest worker, model converges.
    """
    attack = scaled(factor)
    losses, excluded = train(ByzantineRobustAggregator("krum", 1).aggregate_byzantine_robust, 10, attack, 60)
    assert all(len(out) == 10 and 10 in out for out in excluded)
    without, _ = train(GradientAggregator().aggregate, 10, None, 60)
    assert losses[-1] < 1.2 * without[-1]
    if abs(factor) > 1:
        poisoned, _ = train(GradientAggregator().aggregate, 10, attack, 60)
        assert max(poisoned) > 3 * max(losses), "the plain mean goes wherever it is thrown"


@pytest.mark.parametrize("seed", range(20))
def test_coordinated_byzantine_attack(seed: int):
    """Test: 3 out of 10 workers collude and send correlated poison gradients.

    Expected: Multi-Krum excludes all 3, uses remaining 7. Holds in each of 20 draws, with m = 7 on request and with the
    default m = n - f - 2 = 5. It holds for poison that stands out; what hides among the honest does not (docs).
    """
    random = np.random.default_rng(seed)
    state = {name: 0.3 * random.standard_normal(v.shape) for name, v in digits.start().items()}
    workers = cohort(state, 7, correlated_poison(3), round_id=1000 + seed)
    liars = {7, 8, 9}
    all_seven = ByzantineRobustAggregator("multi-krum", 3, rule_options=RuleOptions(m=7))
    found = all_seven.aggregate_byzantine_robust(workers, state)
    assert found.measurements["excluded"] == sorted(liars)
    honest = GradientAggregator(max_weight=1).aggregate(workers[:7], state)
    for name in state:
        np.testing.assert_allclose(found[name], honest[name], rtol=1e-12, atol=1e-15)
    by_default = ByzantineRobustAggregator("multi-krum", 3).aggregate_byzantine_robust(workers, state)
    assert liars < set(by_default.measurements["excluded"])
    assert len(by_default.measurements["excluded"]) == 5


def test_krum_convergence_rate():
    """Test: Compare convergence with/without Byzantine workers.

    Expected: With Krum, convergence only 10-20% slower. Measured here, 3 of 13 workers inverting the gradient tenfold:
    Krum needs 1.07 times the rounds to a loss of 0.6 and 1.16 times to 0.4. To 0.3 it is 1.37 times: one worker's
    gradient is all that a step has, and its noise matters more the nearer the optimum. Multi-Krum stays within 2 %.
    """
    rounds, attack = 130, scaled(-10, copies=3)
    honest, _ = train(GradientAggregator(max_weight=1).aggregate, 10, None, rounds)
    krum, _ = train(ByzantineRobustAggregator("krum", 3).aggregate_byzantine_robust, 10, attack, rounds)
    multi, _ = train(ByzantineRobustAggregator("multi-krum", 3).aggregate_byzantine_robust, 10, attack, rounds)
    slower = {
        target: [digits.rounds_to(losses, target) / digits.rounds_to(honest, target) for losses in (krum, multi)]
        for target in (0.6, 0.4, 0.3)
    }
    assert slower[0.6][0] <= 1.1
    assert slower[0.4][0] <= 1.2
    assert 1.2 < slower[0.3][0] <= 1.5
    assert all(by_multi <= 1.05 for _, by_multi in slower.values())


@pytest.mark.parametrize("rule", RULES)
def test_byzantine_upper_bound(rule: str):
    """Test: n=10 workers, f=4 Byzantine (exceeds n/3 bound).

    Expected: Krum may fail, but fails gracefully (doesn't crash). Holds: a rule that does not stand 4 of 10 says so by
    a typed error, and what to change; in degraded mode it goes on, and the outcome says how many it assumed.
    """
    state = digits.start()
    workers = cohort(state, 6, scaled(100, copies=4))
    limit = RULES[rule].limit(10)
    strict = ByzantineRobustAggregator(rule, 4)
    if limit < 4:
        with pytest.raises(TooManyByzantine, match="degraded") as caught:
            strict.aggregate_byzantine_robust(workers, state)
        assert (caught.value.num_rows, caught.value.num_byzantine, caught.value.limit) == (10, 4, limit)
    degraded = ByzantineRobustAggregator(rule, 4, rule_options=RuleOptions(degraded=True))
    found = degraded.aggregate_byzantine_robust(workers, state)
    assert all(np.isfinite(v).all() for v in found.values())
    assert found.measurements["num_byzantine"] == min(limit, 4)
    assert found.measurements.get("degraded", False) is (limit < 4)


def test_colluders_who_hide_among_the_honest_are_chosen():
    """The limit of the rule, within its bound: three alike, nearer to the honest mean than any honest update is.

    So the outcome is theirs; how far that can take the model in one round is what the last test here bounds.
    """
    state = digits.start()

    def hide(honest: list[digits.State], _: int) -> list[digits.State]:
        mean = mean_of(honest)
        radius = min(math.sqrt(sum(float(np.sum((g[k] - mean[k]) ** 2)) for k in mean)) for g in honest)
        length = math.sqrt(sum(float(np.sum(v**2)) for v in mean.values()))
        return [{k: (v * np.float32(1 - 0.5 * radius / length)) for k, v in mean.items()}] * 3

    found = ByzantineRobustAggregator("krum", 3).aggregate_byzantine_robust(cohort(state, 7, hide), state)
    assert set(range(10)) - set(found.measurements["excluded"]) <= {7, 8, 9}


ROWS = st.integers(1, 3).flatmap(
    lambda f: st.tuples(
        st.just(f),
        hnp.arrays(np.float32, (f + 3, 3), elements=st.floats(-10, 10, width=32)),
        hnp.arrays(np.float32, (f, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    )
)


@settings(deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_no_dishonest_workers_move_the_outcome_farther_than_the_honest_ones_differ(rows, random):
    """With n = 2f + 3 and D the largest distance of two honest updates.

    Krum's choice lies within sqrt(n - f - 2) D of an honest update: one is among its n - f - 2 neighbours, and its
    score is at most that of an honest update, (n - f - 2) D^2. The median of a coordinate lies between honest values,
    and so does the trimmed mean.
    """
    f, honest, liars = rows
    workers = [WorkerGradient(f"w{i}", {"w": row}, 1, 0.0) for i, row in enumerate([*honest, *liars])]
    random.shuffle(workers)
    n, model = len(workers), {"w": np.zeros(3)}
    assert n == 2 * f + 3

    def outcome(rule: str) -> np.ndarray:
        aggregator = ByzantineRobustAggregator(rule, f, max_abs=2.0**101)
        return aggregator.aggregate_byzantine_robust(workers, model)["w"]

    exact = honest.astype(np.float64)
    spread = max(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(exact, 2))
    nearest = min(float(np.linalg.norm(outcome("krum") - row)) for row in exact)
    assert nearest <= math.sqrt(n - f - 2) * spread * (1 + 1e-6) + 1e-6
    for rule in ("median", "trimmed-mean"):
        found = outcome(rule)
        margin = 1e-9 * np.abs(exact).max()
        assert (found >= exact.min(axis=0) - margin).all()
        assert (found <= exact.max(axis=0) + margin).all()
