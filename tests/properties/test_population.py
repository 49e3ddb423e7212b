"""A population is a pure function of its seed: same answers in any order, plausible shares, sane durations."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.protocol.meta_learning import META_ALGORITHMS, ExampleSplit, MetaBatches, MetaPlan
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.training import TrainingPlan
from simulator.population import Population, Workload, examples_trained
from simulator.profiles import read_profiles

WORK = Workload(flops_per_example=3e5, bytes_down=200_000, bytes_up=200_000, plan=TrainingPlan(local_epochs=2))
seeds = st.integers(0, 2**31 - 1)
devices = st.integers(0, 999)
sessions = st.integers(0, 10_000)
STEADY = read_profiles("steady").profile


def answers(population, device, session):
    return (
        population.profile(device),
        population.identity(device).device_id,
        population.first_check_in_s(device),
        population.pause_s(device, session),
        population.retry_fraction(device, session),
        population.duration_s(device, session, 20, WORK),
    )


@given(seeds, st.lists(st.tuples(devices, sessions), min_size=1, max_size=8))
def test_answers_do_not_depend_on_the_order_of_questions(seed, questions):
    forward = Population(seed, 1000, dropout=0.3)
    backward = Population(seed, 1000, dropout=0.3)
    asked = {q: answers(forward, *q) for q in questions}
    assert asked == {q: answers(backward, *q) for q in reversed(questions)}


@given(seeds, devices, sessions, st.integers(1, 10_000))
def test_a_duration_is_positive_and_in_whole_milliseconds(seed, device, session, num_samples):
    duration = Population(seed, 1000).duration_s(device, session, num_samples, WORK)
    assert duration is not None
    assert duration > 0
    assert round(duration, 3) == duration


@given(seeds, devices, st.integers(1, 1000))
def test_more_data_never_takes_less_time(seed, device, num_samples):
    population = Population(seed, 1000)
    assert population.typical_duration_s(device, num_samples + 1, WORK) >= population.typical_duration_s(
        device, num_samples, WORK
    )


@given(seeds, devices)
def test_max_steps_bounds_the_work(seed, device):
    population = Population(seed, 1000)
    one_step = Workload(WORK.flops_per_example, 0, 0, TrainingPlan(local_epochs=9, batch_size=8, max_steps=1))
    assert population.typical_duration_s(device, 10**6, one_step) == population.typical_duration_s(device, 8, one_step)


@given(seeds, devices, sessions)
def test_pauses_lie_around_the_interval(seed, device, number):
    population = Population(seed, 1000, check_in_interval_s=60)
    assert 0 <= population.first_check_in_s(device) <= 60
    assert 30 <= population.pause_s(device, number) <= 90
    steady = Population(seed, 1000, check_in_interval_s=60, check_in_spread=0.1)
    assert 54 <= steady.pause_s(device, number) <= 66


def test_tiers_come_in_their_shares_and_profiles_follow_them():
    population = Population(7, 5000)
    profiles = [population.profile(d) for d in range(5000)]
    counts = Counter(p.device_type for p in profiles)
    for kind in STEADY:
        assert abs(counts[kind.tier] / 5000 - kind.share) < 0.03
    assert {p.available_memory_mb for p in profiles if p.device_type is DeviceTier.LOW_END} == {512}


def test_better_tiers_are_faster_on_average():
    population = Population(7, 2000)
    by_tier = {kind.tier: [] for kind in STEADY}
    for d in range(2000):
        by_tier[population.tier(d)].append(population.typical_duration_s(d, 50, WORK))
    high, mid, low = (sum(v) / len(v) for v in by_tier.values())
    assert high < mid < low


def test_drop_outs_come_at_their_rate_and_differ_between_sessions():
    population = Population(7, 2000, dropout=0.2)
    dropped = [[population.duration_s(d, s, 20, WORK) is None for s in range(2)] for d in range(2000)]
    assert abs(sum(map(sum, dropped)) / 4000 - 0.2) < 0.03
    assert any(a != b for a, b in dropped)
    assert all(Population(7, 100).duration_s(d, 0, 20, WORK) is not None for d in range(100))


def test_identities_are_distinct_and_follow_the_seed():
    ids = {Population(1, 100).identity(d).device_id for d in range(100)}
    others = {Population(2, 100).identity(d).device_id for d in range(100)}
    assert len(ids) == 100
    assert not ids & others


@given(st.integers(0, 1000), st.integers(1, 60), st.floats(0, 0.99), st.floats(1, 50))
def test_stragglers_are_a_fixed_part_of_the_fleet_and_so_much_slower(seed, devices, fraction, slowdown):
    usual = Population(seed, devices)
    slowed = Population(seed, devices, stragglers=fraction, slowdown=slowdown)
    assert len(slowed.slow_devices) == round(fraction * devices)
    for device in range(devices):
        before = usual.typical_duration_s(device, 20, WORK)
        expected = slowdown * before if device in slowed.slow_devices else before
        assert slowed.typical_duration_s(device, 20, WORK) == pytest.approx(expected)


@given(
    st.sampled_from(META_ALGORITHMS),
    st.integers(2, 60),
    st.integers(1, 12),
    st.integers(1, 16),
    st.floats(0.05, 0.95),
    st.integers(1, 3),
)
def test_a_session_of_meta_learning_takes_in_the_examples_of_its_batches(algorithm, n, steps, size, fraction, judging):
    meta = MetaPlan(inner_steps=steps, query_fraction=fraction, query_batches=judging)
    split = ExampleSplit.of(np.arange(n, dtype=np.float32)[:, None], np.zeros(n, np.int64), fraction)
    drawn = MetaBatches.of(algorithm, meta, split, batch_size=size, seed=1, shuffle=True)
    batches = (*drawn.support, *drawn.query, *drawn.hessian)
    plan = TrainingPlan(algorithm=algorithm, meta=meta, batch_size=size)
    assert examples_trained(plan, n) == sum(len(batch) for batch in batches)


def test_a_session_whose_steps_are_counted_costs_the_same_on_any_number_of_examples():
    counted = dataclasses.replace(WORK, flops_per_session=1e9)
    few, many = (Population(1, 1).typical_phases(0, n, counted).training_s for n in (1, 1000))
    assert few == many > 0
    few, many = (Population(1, 1).typical_phases(0, n, WORK).training_s for n in (1, 1000))
    assert many > few
