"""Attacks do what their papers say: compared with the definitions, written out the long way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from simulator.adversaries import ATTACKS, AttackContext, AttackPlan, Coalition, Roster, attack_forms, parse_attack
from simulator.adversaries import vectors as v
from simulator.adversaries.base import seeded
from simulator.adversaries.examples import flip_labels, plant_backdoor, stamp
from simulator.adversaries.on_updates import Alie, Scaling
from simulator.datasets import Split
from simulator.errors import AttackError

D = 50


def updates(m, d=D, seed=0, centre=1.0):
    return (centre + np.random.default_rng(seed).normal(size=(m, d))).astype(np.float32)


def context(known, *, reports=10, attackers=3, seed=1, version=0, device=0):
    return AttackContext(
        seed=seed,
        version=version,
        device=device,
        reports=reports,
        attackers=attackers,
        weights=np.zeros(known.shape[1], np.float32),
        colluders=lambda: known,
    )


# --- on updates --------------------------------------------------------------------------------------------------


def test_a_sign_flip_negates_and_scaling_multiplies():
    own = updates(1)[0]
    assert np.array_equal(v.scaled(own, -1), -own)
    assert np.array_equal(v.scaled(own, 1000), (own.astype(np.float64) * 1000).astype(np.float32))
    assert not v.scaled(own, 0).any()


def test_what_leaves_float32_s_range_stays_finite():
    own = np.array([1e38, -1e38, 0], np.float32)
    largest = np.finfo(np.float32).max
    assert v.scaled(own, 1e12).tolist() == [largest, -largest, 0]


@pytest.mark.parametrize(
    ("n", "f", "z"),
    # Phi^-1 from tables: 24/26 -> 1.426, 24/38 -> 0.336; where supporters are at least half of the honest, none.
    [(50, 24, 1.426), (50, 12, 0.336), (10, 2, 0.0), (10, 1, 0.0), (20, 2, 0.0), (3, 1, 0.0), (1, 1, 0.0)],
)
def test_alie_s_deviation_is_the_paper_s(n, f, z):
    assert v.alie_z_max(n, f) == pytest.approx(z, abs=5e-4)


def test_alie_s_deviation_grows_with_the_attackers_up_to_half():
    found = [v.alie_z_max(51, f) for f in range(1, 26)]
    assert found == sorted(found)
    assert found[-1] > 1.5


@pytest.mark.parametrize(("n", "f"), [(10, 0), (10, 11), (10, -1)])
def test_alie_refuses_impossible_numbers(n, f):
    with pytest.raises(AttackError, match="attackers among 10"):
        v.alie_z_max(n, f)


def test_alie_lies_z_standard_deviations_below_the_mean():
    known = updates(7)
    crafted = v.a_little_is_enough(known, 1.5)
    for j in range(D):
        column = [float(x) for x in known[:, j]]
        mean = math.fsum(column) / 7
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / 7)
        assert crafted[j] == pytest.approx(mean - 1.5 * std, rel=1e-6, abs=1e-6)


def test_inner_product_manipulation_points_against_the_mean():
    known = updates(5)
    crafted = v.inner_product(known, 0.5)
    assert np.allclose(crafted, -0.5 * known.astype(np.float64).mean(axis=0), rtol=1e-6)
    assert crafted @ known.mean(axis=0) < 0


def test_mimic_repeats_the_update_that_reaches_furthest_along_the_widest_direction():
    rng = np.random.default_rng(3)
    direction = rng.normal(size=D)
    direction /= np.linalg.norm(direction)
    reach = [1.0, -2.0, 0.5, 9.0, -1.5]
    known = np.array([5 + r * direction + 1e-3 * rng.normal(size=D) for r in reach], np.float32)
    assert np.array_equal(v.mimic(known), known[3])


def test_mimic_among_equals_takes_the_first():
    known = np.ones((4, D), np.float32)
    assert np.array_equal(v.mimic(known), known[0])
    # Two updates lie equally far from their mean.
    pair = updates(2)
    assert np.array_equal(v.mimic(pair), pair[0])


def distance(a, b):
    return math.sqrt(math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("perturbation", list(v.Perturbation))
def test_min_max_reaches_the_largest_distance_between_honest_updates_and_no_further(perturbation):
    known = updates(6)
    crafted = v.min_max(known, perturbation)
    allowed = max(distance(a, b) for a, b in itertools.combinations(known, 2))
    assert max(distance(crafted, x) for x in known) == pytest.approx(allowed, rel=1e-5)


@pytest.mark.parametrize("perturbation", list(v.Perturbation))
def test_min_sum_reaches_the_largest_sum_of_squared_distances_and_no_further(perturbation):
    known = updates(6)
    crafted = v.min_sum(known, perturbation)
    allowed = max(math.fsum(distance(a, b) ** 2 for b in known) for a in known)
    assert math.fsum(distance(crafted, x) ** 2 for x in known) == pytest.approx(allowed, rel=1e-5)


@pytest.mark.parametrize("attack", [v.min_max, v.min_sum])
def test_one_colluder_has_nothing_to_hide_in(attack):
    known = updates(1)
    for perturbation in v.Perturbation:
        assert np.allclose(attack(known, perturbation), known[0], rtol=1e-6)


@pytest.mark.parametrize("attack", [v.min_max, v.min_sum])
def test_a_model_that_does_not_move_leaves_no_direction(attack):
    for perturbation in v.Perturbation:
        assert not attack(np.zeros((3, D), np.float32), perturbation).any()


def test_common_poison_has_the_length_it_says():
    known = updates(4)
    crafted = v.common_poison(known, 10.0, np.random.default_rng(0))
    assert np.linalg.norm(crafted) == pytest.approx(10 * np.mean(np.linalg.norm(known, axis=1)), rel=1e-5)


def test_noise_has_the_size_it_says_and_nothing_of_the_update():
    own = updates(1, d=20_000)[0]
    crafted = v.gaussian(own, 3.0, np.random.default_rng(99)).astype(np.float64)
    rms = math.sqrt(np.mean(own.astype(np.float64) ** 2))
    assert np.std(crafted) == pytest.approx(3 * rms, rel=0.03)
    assert abs(np.corrcoef(crafted, own)[0, 1]) < 0.03


def test_an_update_of_zeros_stays_one():
    zero = np.zeros(D, np.float32)
    assert not v.gaussian(zero, 10.0, np.random.default_rng(0)).any()
    assert not v.common_poison(zero[None], 10.0, np.random.default_rng(0)).any()


def test_a_bound_is_kept_by_scaling():
    crafted = np.array([3e38, -1e38, 0.0], np.float32)
    kept = v.within(crafted, 1024.0)
    assert np.abs(kept).max() <= 1024
    assert np.allclose(kept, [1024, -1024 / 3, 0], rtol=1e-5)
    inside = updates(1)[0]
    assert v.within(inside, 1024.0) is inside


# --- on data -----------------------------------------------------------------------------------------------------


def test_flipped_labels_are_mirrored_or_renamed():
    y = np.array([0, 1, 5, 9])
    assert flip_labels(y, 10).tolist() == [9, 8, 4, 0]
    assert flip_labels(y, 10, 1, 7).tolist() == [0, 7, 5, 9]
    assert y.tolist() == [0, 1, 5, 9]


@pytest.mark.parametrize(("source", "target"), [(1, None), (None, 1), (3, 3), (1, 10), (10, 1)])
def test_labels_that_do_not_exist_are_refused(source, target):
    with pytest.raises(AttackError, match=r"two different classes|no class 10"):
        flip_labels(np.zeros(1, np.int64), 10, source, target)


def test_the_trigger_sits_in_the_corner():
    x = np.zeros((2, 1, 8, 8), np.float32)
    stamped = stamp(x, 3)
    assert stamped.sum() == 2 * 9
    assert (stamped[:, :, 5:, 5:] == 1).all()
    assert not x.any()
    assert stamp(np.zeros((2, 12), np.float32), 2).sum() == 2 * 4
    assert stamp(x, 99).all()


def test_a_backdoor_is_planted_in_a_share_of_the_examples():
    x, y = np.zeros((10, 1, 8, 8), np.float32), np.arange(10)
    poisoned_x, poisoned_y = plant_backdoor(x, y, target=7, size=2, share=0.3, rng=np.random.default_rng(0))
    touched = poisoned_x.any(axis=(1, 2, 3))
    assert touched.sum() == 3
    assert (poisoned_y[touched] == 7).all()
    assert np.array_equal(poisoned_y[~touched], y[~touched])
    assert not x.any()


# --- how they are written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("alie", "alie"),
        ("alie:1.5", "alie:1.5"),
        ("alie:max", "alie"),
        ("scaling:100", "scaling"),
        ("scaling:1e3", "scaling:1000"),
        ("scaling:factor=2", "scaling:2"),
        ("ipm:0.5", "ipm"),
        ("foe:10", "ipm:10"),
        ("free-rider", "zero"),
        ("min-max:sign", "min-max:sign"),
        ("backdoor:target=7,scale=5", "backdoor:target=7,scale=5"),
        ("backdoor:7,replace", "backdoor:target=7,scale=replace"),
        ("label-flip:source=1,target=7", "label-flip:source=1,target=7"),
    ],
)
def test_an_attack_is_read_and_written(text, canonical):
    assert str(parse_attack(text)) == canonical
    assert parse_attack(canonical) == parse_attack(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alei", "there is no attack 'alei'; choose one of sign-flip"),
        ("", "choose one of"),
        ("scaling:", r"must be a number from 0 to 1e\+12, got ''"),
        ("scaling:-1", "must be a number from 0"),
        ("scaling:nan", "must be a number"),
        ("scaling:inf", "must be a number"),
        ("scaling:2,3", r"cannot be read at '3'; the form is scaling\[:FACTOR\]"),
        ("scaling:factor=1,factor=2", "cannot be read at 'factor=2'"),
        ("scaling:size=2", "cannot be read at 'size=2'"),
        ("zero:1", "the form is zero"),
        ("min-max:up", "must be one of unit, std, sign"),
        ("alie:many", "must be a number from 0 to 1e.06, or max"),
        ("backdoor:target=x", "must be a whole number"),
        ("backdoor:share=1.5", "from 0 to 1"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_there_is(text, says):
    with pytest.raises(AttackError, match=says):
        parse_attack(text)


def test_every_attack_says_what_it_does():
    assert len(attack_forms()) == len(ATTACKS) == 12
    for form, kind in zip(attack_forms(), ATTACKS.values(), strict=True):
        assert form.startswith(kind.name)
        assert kind.summary
        assert str(kind()) == kind.name


# --- who attacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "fraction", "count"), [(10, 0.3, 3), (100, 0.29, 29), (7, 0.2, 1), (10, 0.99, 9)])
def test_a_roster_has_the_number_it_says(devices, fraction, count):
    roster = Roster.of(1, devices, fraction)
    assert len(set(roster.attackers)) == len(roster.attackers) == count
    assert set(roster.attackers) <= set(range(devices))


def test_rosters_of_one_seed_are_nested_and_seeds_differ():
    few, many = Roster.of(5, 100, 0.1), Roster.of(5, 100, 0.3)
    assert many.attackers[:10] == few.attackers
    assert Roster.of(6, 100, 0.1) != few


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(AttackError, match="between 0 and 1"):
        Roster.of(1, 10, fraction)


def test_a_fraction_of_nobody_is_refused_with_the_smallest_that_works():
    with pytest.raises(AttackError, match=r"no attacker; take 0\.1 or more"):
        Roster.of(1, 10, 0.05)


# --- together ----------------------------------------------------------------------------------------------------


class Run:
    """The part of a configuration that an attack needs."""

    def __init__(self, attack, byzantine=0.3, seed=1, devices=20, cohort_size=10, max_staleness=0):
        self.attack, self.byzantine, self.seed = attack, byzantine, seed
        self.devices, self.cohort_size, self.max_staleness = devices, cohort_size, max_staleness


def test_no_attack_is_no_plan():
    assert AttackPlan.of(Run(None), 10) is None


def test_a_plan_counts_its_attackers():
    plan = AttackPlan.of(Run("alie"), 10)
    assert sum(plan.attacks(d) for d in range(20)) == 6
    assert plan.colluders == plan.roster.attackers
    assert plan.attackers_per_round == 3
    assert AttackPlan.of(Run("alie", 0.05), 10).attackers_per_round == 1
    assert len(AttackPlan.of(Run("alie", devices=100), 10).colluders) == 10


@pytest.mark.parametrize("attack", ["backdoor:target=10", "label-flip:source=1,target=10"])
def test_an_attack_that_the_data_set_has_no_class_for_is_refused(attack):
    with pytest.raises(AttackError, match="no class 10"):
        AttackPlan.of(Run(attack), 10)


def split(n=60):
    rng = np.random.default_rng(0)
    return Split(rng.random((n, 1, 8, 8), dtype=np.float32), rng.integers(0, 10, n))


def test_only_the_attackers_examples_are_poisoned():
    train = split()
    parts = np.array_split(np.arange(60), 20)
    plan = AttackPlan.of(Run("backdoor:target=7,share=1"), 10)
    poisoned = plan.poisoned(train, parts)
    for device, rows in enumerate(parts):
        assert (poisoned.y[rows] == 7).all() == plan.attacks(device) or (train.y[rows] == 7).all()
        assert np.array_equal(poisoned.x[rows], train.x[rows]) != plan.attacks(device)


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_data_that_an_attack_leaves_alone_is_not_copied(attack):
    train = split()
    poisoned = AttackPlan.of(Run(attack), 10).poisoned(train, np.array_split(np.arange(60), 20))
    assert (poisoned.x is train.x) == (attack != "backdoor")
    assert (poisoned.y is train.y) == (attack not in {"backdoor", "label-flip"})


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_the_colluders_rehearse_once_a_version_and_only_if_somebody_asks(attack):
    plan = AttackPlan.of(Run(attack), 10)
    coalition = Coalition(plan)
    asked = []

    def rehearse(devices):
        asked.append(tuple(devices))
        return updates(len(devices))

    weights = np.zeros(D, np.float32)
    for version in (0, 0, 1, 1):
        for device in plan.colluders:
            coalition.craft(device, version, updates(1, seed=device)[0], weights, rehearse)
    needs = attack in {"alie", "ipm", "mimic", "min-max", "min-sum", "collude"}
    assert asked == ([plan.colluders] * 2 if needs else [])


def test_attackers_that_cannot_rehearse_send_what_they_learned():
    coalition = Coalition(AttackPlan.of(Run("alie"), 10))
    own = updates(1)[0]
    nobody = np.empty((0, D), np.float32)
    assert np.array_equal(coalition.craft(3, 0, own, own, lambda _: nobody), own)
    # It is not remembered: the next one may find somebody.
    known = updates(3)
    crafted = coalition.craft(3, 0, own, own, lambda _: known)
    assert np.array_equal(crafted, v.a_little_is_enough(known, v.alie_z_max(10, 3)))


def test_a_direction_that_colluders_share_lasts_the_whole_run():
    known = updates(3)
    attack = parse_attack("collude")
    first = attack.craft(known[0], context(known, version=0, device=1))
    assert np.array_equal(first, attack.craft(known[1], context(known, version=9, device=2)))
    assert not np.array_equal(first, attack.craft(known[0], context(known, seed=2)))


def test_noise_differs_between_devices_versions_and_seeds():
    own = updates(1)[0]
    attack = parse_attack("gaussian")
    crafted = [
        attack.craft(own, context(own[None], seed=s, version=n, device=d))
        for s, n, d in [(1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    ]
    assert np.array_equal(crafted[0], crafted[1])
    assert len({c.tobytes() for c in crafted}) == 4


def test_a_backdoor_replaces_the_model_when_told_to():
    own = updates(1)[0]
    attack = parse_attack("backdoor:scale=replace")
    crafted = attack.craft(own, context(own[None], reports=10, attackers=2))
    assert np.array_equal(crafted, (own.astype(np.float64) * 5).astype(np.float32))
    assert parse_attack("backdoor").craft(own, context(own[None])) is own


def test_attacks_are_values():
    assert parse_attack("alie:1.5") == Alie(1.5)
    assert {Scaling(2.0), parse_attack("scaling:2")} == {Scaling(2.0)}


def test_randomness_is_a_function_of_its_key():
    assert seeded("a", 1).integers(2**53) == seeded("a", 1).integers(2**53)
    assert seeded("a", 1).integers(2**53) != seeded("a", 2).integers(2**53)
    assert seeded("a", 11).integers(2**53) != seeded("a", 1, 1).integers(2**53)
