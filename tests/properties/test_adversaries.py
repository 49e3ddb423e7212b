"""What holds for every attack, whatever its parameters and whatever the colluders learned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simulator.adversaries import ATTACKS, AttackContext, Roster, parse_attack
from simulator.adversaries import vectors as v
from simulator.adversaries.vectors import Perturbation

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
SMALL = st.floats(-100, 100, width=32)
KNOWN = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.one_of(FINITE, SMALL))
)


def values_of(parameter):
    """All values that a parameter may have."""
    if hasattr(parameter.kind, "__members__"):
        values = st.sampled_from(list(parameter.kind))
    elif parameter.kind is int:
        values = st.integers(int(parameter.low), int(parameter.high))
    else:
        values = st.floats(parameter.low, parameter.high)
    return st.one_of(st.none(), values) if parameter.absent else values


@st.composite
def attacks(draw):
    kind = draw(st.sampled_from(list(ATTACKS.values())))
    return kind(**{name: draw(values_of(parameter)) for name, parameter in kind.parameters().items()})


def context(known, seed=1, version=0, device=0):
    return AttackContext(seed, version, device, 10, 3, np.zeros(known.shape[1], np.float32), lambda: known)


@given(attacks())
def test_every_attack_is_read_as_it_is_written(attack):
    assert parse_attack(str(attack)) == attack


@given(attacks(), KNOWN)
def test_what_is_sent_is_finite_and_as_long_as_the_update(attack, known):
    before = known.copy()
    own = known[0]
    crafted = attack.craft(own, context(known))
    assert crafted.dtype == np.float32
    assert crafted.shape == own.shape
    assert np.isfinite(crafted).all()
    assert np.array_equal(known, before)


@given(attacks(), KNOWN, st.integers(0, 9))
def test_a_common_attack_does_not_depend_on_who_sends_it(attack, known, device):
    if attack.common:
        first = attack.craft(known[0], context(known))
        assert np.array_equal(first, attack.craft(known[-1], context(known, device=device)))


@given(KNOWN, st.sampled_from(list(Perturbation)))
def test_min_max_and_min_sum_never_leave_what_honest_updates_reach(known, perturbation):
    wide = known.astype(np.float64)
    squared = np.array([[np.sum((a - b) ** 2) for b in wide] for a in wide])
    scale = np.sum(wide * wide) + 1e-30
    far = wide - v.min_max(known, perturbation).astype(np.float64)
    assert np.sum(far * far, axis=1).max() <= squared.max() + 1e-5 * scale
    far = wide - v.min_sum(known, perturbation).astype(np.float64)
    assert np.sum(far * far) <= squared.sum(axis=1).max() + 1e-5 * len(wide) * scale


@given(KNOWN, st.randoms(use_true_random=False))
def test_the_order_of_the_colluders_hardly_matters(known, rng):
    order = rng.sample(range(len(known)), len(known))
    scale = float(np.abs(known).max())
    for attack in (lambda k: v.a_little_is_enough(k, 1.5), lambda k: v.inner_product(k, 0.5)):
        assert attack(known[order]) == pytest.approx(attack(known), rel=1e-5, abs=1e-5 * scale)


@given(KNOWN)
def test_mimic_sends_a_colluder_s_very_update(known):
    assert any(np.array_equal(v.mimic(known), row) for row in known)


@given(hnp.arrays(np.float32, 5, elements=FINITE), st.floats(1e-8, 1e8))
def test_a_bound_is_kept_to_the_last_bit(crafted, max_abs):
    kept = v.within(crafted, max_abs)
    assert max(abs(float(value)) for value in kept) <= max_abs
    assert np.isfinite(kept).all()


@given(st.integers(0, 2**31 - 1), st.integers(1, 300), st.floats(0.01, 0.99))
def test_rosters_are_nested_and_as_large_as_they_say(seed, devices, fraction):
    exact = int(np.floor(np.round(fraction * devices, 9)))
    if exact == 0:
        return
    roster = Roster.of(seed, devices, fraction)
    assert len(set(roster.attackers)) == exact
    assert all(0 <= device < devices for device in roster.attackers)
    larger = Roster.of(seed, devices, (fraction + 1) / 2)
    assert larger.attackers[:exact] == roster.attackers
    assert dataclasses.replace(roster) == roster
