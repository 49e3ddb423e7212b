"""A device's day is a pure function of the seed, and pauses only ever lengthen or lose a session."""

from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.training import TrainingPlan
from simulator.population import Population, Workload
from simulator.profiles import read_profiles
from simulator.traces import FleetTraces

PHONES = read_profiles("phones")
LONG = Workload(flops_per_example=1e9, bytes_down=10**6, bytes_up=10**6, plan=TrainingPlan(local_epochs=5))
instants = st.floats(0, 3 * 86400)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.tuples(st.integers(0, 99), instants), min_size=1, max_size=5))
def test_answers_do_not_depend_on_the_order_of_questions(seed, questions):
    there, back = (FleetTraces(Population(seed, 100, profiles=PHONES)) for _ in range(2))

    def asked(traces, of):
        return {q: (traces.against_starting(*q), traces.course(q[0], 1, 20, LONG, q[1])) for q in of}

    assert asked(there, questions) == asked(back, reversed(questions))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), instants, st.floats(1, 86400))
def test_a_session_takes_at_least_its_work_and_a_lease_only_cuts_it(seed, device, now, lease):
    population = Population(seed, 100, profiles=PHONES)
    course = FleetTraces(population).course(device, 0, 20, LONG, now)
    if course.duration_s is not None:
        work = population.typical_duration_s(device, 20, LONG) * population.jitter_of(device, 0)
        assert course.duration_s >= round(work, 3) - 0.001
    cut = course.within(lease)
    assert (cut.duration_s is None) == (cut.lost is not None)
    assert cut.duration_s is None or cut == course
    assert course.pauses[: len(cut.pauses)] == cut.pauses


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), instants)
def test_wrong_clocks_do_not_matter(seed, device, now):
    right = PHONES.model_copy(update={"profile": tuple(p.model_copy(update={"clock": None}) for p in PHONES.profile)})
    wrong, told = (FleetTraces(Population(seed, 100, profiles=p)) for p in (PHONES, right))
    assert wrong.course(device, 0, 20, LONG, now) == told.course(device, 0, 20, LONG, now)
