"""Local privacy: the mechanism's exact law, what it costs, what an attacker makes of it, its budget and its label."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from client_sdk.errors import LocalBudgetSpent, LocalPrivacyUnavailable, PrivacyRefusal, StateDirUnusable
from client_sdk.privacy import LocalPrivacy, LocalPrivacyPolicy, local_policy, noised
from client_sdk.privacy_ledger import LocalCharges, LocalPrivacyLedger
from client_sdk.protocol.accountant import ORDERS, gaussian_rdp, noise_for_epsilon, rdp_to_epsilon
from client_sdk.protocol.clipping import integer_norm_squared
from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.privacy import encode_clipped
from simulator.audit.bounds import count_right, epsilon_lower_bound, guess
from tests.devices import make_assignment

SHA = "a" * 64


def policy(**changes: Any) -> LocalPrivacyPolicy:
    facts: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-6, "max_reports": 1000}
    return LocalPrivacyPolicy(**facts | changes)


def stream(seed: int) -> Callable[[int], bytes]:
    """Random bytes that can be drawn a second time; each call gives others."""
    calls = itertools.count()
    return lambda n: hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(n)


@pytest.fixture
def ledger(tmp_path: Path) -> LocalPrivacyLedger:
    return LocalPrivacyLedger(tmp_path / "ledger")


def codes_of(released: np.ndarray, given: LocalPrivacyPolicy) -> np.ndarray:
    """The integers of a release whose float32 rounding lost nothing."""
    codes = released.astype(np.float64) / given.bounds.step
    assert np.array_equal(codes, np.rint(codes))
    return codes.astype(np.int64)


# --- the mechanism ----------------------------------------------------------------------------------------------


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**40), 2.0**40, width=32)), st.integers(0, 99))
def test_a_release_is_the_clipped_codes_and_exact_noise(update: np.ndarray, seed: int):
    exact = policy(fraction_bits=8, clip_norm=3.7)
    noise = sample(len(update), exact.noise_variance, stream(seed))
    expected = encode_clipped(update, exact.bounds) + noise
    assert np.array_equal(codes_of(noised(update, exact, random=stream(seed)), exact), expected)


@given(
    arrays(np.float32, 30, elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    arrays(np.float32, 30, elements=st.floats(-(2.0**60), 2.0**60, width=32)),
)
def test_any_two_updates_lie_within_the_sensitivity_that_the_noise_is_for(one: np.ndarray, other: np.ndarray):
    """With the same noise: what is left is the difference of what was clipped before it, at most 2 B."""
    exact = policy(fraction_bits=6, noise_multiplier=0.5)
    released = [codes_of(noised(u, exact, random=stream(1)), exact) for u in (one, other)]
    assert integer_norm_squared(released[0] - released[1]) <= (2 * exact.bounds.norm_bound) ** 2
    assert exact.noise_variance == (Fraction(0.5) * 2 * exact.bounds.norm_bound) ** 2


def test_noise_is_added_after_clipping_not_before():
    """What leaves is far longer than C, since it is d coordinates of noise that no clipping has touched."""
    released = noised(np.full(10_000, 1e6, np.float32), policy())
    assert np.linalg.norm(released) == pytest.approx(policy().noise_stddev * 100, rel=0.05)
    assert policy().noise_stddev == 2.0


def chi_square(codes: np.ndarray, variance: Fraction) -> tuple[float, int]:
    """Of a sample against the discrete Gaussian's masses, cells of at least ten expected; and the number of cells."""
    reach = range(-40, 41)
    weights = [math.exp(-float(Fraction(z * z) / (2 * variance))) for z in reach]
    expected = {z: w / sum(weights) * len(codes) for z, w in zip(reach, weights, strict=True)}
    cells = [z for z in reach if expected[z] >= 10]
    found = Counter(codes.tolist())
    rest = len(codes) - sum(expected[z] for z in cells)
    statistic = sum((found[z] - expected[z]) ** 2 / expected[z] for z in cells)
    outside = len(codes) - sum(found[z] for z in cells)
    return statistic + (outside - rest) ** 2 / max(rest, 1.0), len(cells)


def test_the_noise_has_the_stated_law_and_a_little_less_would_be_noticed():
    """On a grid as coarse as C, where the law is visibly discrete: variance (2 z B)**2 = 4."""
    coarse = policy(fraction_bits=0, noise_multiplier=1.0)
    assert coarse.noise_variance == 4
    drawn = codes_of(noised(np.zeros(100_000, np.float32), coarse, random=stream(3)), coarse)
    statistic, cells = chi_square(drawn, Fraction(4))
    assert statistic < cells + 6 * math.sqrt(2 * cells)
    weaker = sample(100_000, Fraction(9, 10) * 4, stream(3))
    assert chi_square(weaker, Fraction(4))[0] > cells + 20 * math.sqrt(2 * cells)


@pytest.mark.parametrize("fraction_bits", [10, 24, 40])
def test_its_variance_is_that_of_the_policy_whatever_the_grid(fraction_bits: int):
    given_policy = policy(fraction_bits=fraction_bits, noise_multiplier=1.5, clip_norm=0.25)
    drawn = noised(np.zeros(50_000, np.float32), given_policy, random=stream(4)).astype(np.float64)
    statistic = float((drawn**2).sum()) / 0.75**2  # 2 z C
    assert abs(statistic - 50_000) < 5 * math.sqrt(2 * 50_000)


def test_noise_is_the_system_s_and_never_the_same():
    zeros = np.zeros(64, np.float32)
    assert not np.array_equal(noised(zeros, policy()), noised(zeros, policy()))


def test_blocks_of_a_large_update_have_noise_of_their_own():
    released = noised(np.zeros(70_000, np.float32), policy(), random=stream(0))
    assert not np.array_equal(released[:30_000], released[2**15 : 2**15 + 30_000])
    assert abs(float(np.corrcoef(released[:30_000], released[2**15 : 2**15 + 30_000])[0, 1])) < 0.05
    assert np.all(np.abs(released).max() > 0)


def test_what_is_no_update_is_refused():
    with pytest.raises(NonFiniteUpdate):
        noised(np.array([np.nan], np.float32), policy())
    with pytest.raises(ShapeMismatch):
        noised(np.zeros(3), policy())  # type: ignore[arg-type]


# --- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("reports", [1, 7, 60])
def test_epsilon_is_composed_as_dp_accounting_does_and_never_below_the_exact_one(z: float, reports: int):
    delta = 1e-6
    charges = LocalCharges()
    for _ in range(reports):
        charges = charges.charging(z)
    ours = charges.account.epsilon(delta)
    events = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), reports)
    exact = PLDAccountant().compose(events).get_epsilon(delta)
    theirs = RdpAccountant(ORDERS).compose(events).get_epsilon(delta)
    assert exact <= ours * (1 + 1e-9)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours <= reports * rdp_to_epsilon(gaussian_rdp(z), delta) * (1 + 1e-9)


def test_reports_of_several_policies_are_composed_not_added():
    charges = LocalCharges()
    for z in (1.0, 2.0, 1.0, 5.0):
        charges = charges.charging(z)
    assert charges.reports == 4
    one = (2 * 1.0**-2 + 2.0**-2 + 5.0**-2) ** -0.5  # what the four are worth
    assert charges.account.epsilon(1e-6) == pytest.approx(rdp_to_epsilon(gaussian_rdp(one), 1e-6), rel=1e-9)
    assert charges.account.epsilon(1e-6) < sum(rdp_to_epsilon(gaussian_rdp(z), 1e-6) for z in (1.0, 2.0, 1.0, 5.0))


@given(st.floats(0.05, 50), st.sampled_from([1e-3, 1e-5, 1e-9]))
@settings(max_examples=60)
def test_the_least_noise_for_an_epsilon_costs_it_and_hardly_less(epsilon: float, delta: float):
    z = noise_for_epsilon(epsilon, delta)
    assert rdp_to_epsilon(gaussian_rdp(z), delta) <= epsilon
    assert rdp_to_epsilon(gaussian_rdp(z * 0.999), delta) > epsilon
    given_policy = policy(noise_multiplier=None, epsilon=epsilon, delta=delta)
    assert (given_policy.multiplier, given_policy.report_epsilon <= epsilon) == (z, True)


def test_no_noise_is_found_for_what_is_no_epsilon():
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigurationError):
            noise_for_epsilon(epsilon, 1e-6)


# --- an attacker ------------------------------------------------------------------------------------------------

TRIALS, GUESSES, ERROR = 8000, 400, 1e-3


def refuted(claimed: LocalPrivacyPolicy, used: LocalPrivacyPolicy, seed: int) -> float:
    """The epsilon that an attacker refutes who tells the two worst updates apart, +C and -C, from single reports."""
    included = np.random.default_rng(seed).random(TRIALS) < 0.5
    random = stream(seed)
    scores = [noised(np.array([1e3 if plus else -1e3], np.float32), used, random=random)[0] for plus in included]
    return epsilon_lower_bound(
        count_right(guess(np.array(scores, np.float64), GUESSES), included), claimed.delta, error=ERROR
    )


def test_an_attacker_learns_no_more_than_is_claimed_and_finds_noise_that_is_too_small():
    claimed = policy(noise_multiplier=None, epsilon=1.0, delta=1e-7)
    assert refuted(claimed, claimed, 1) <= 1.0
    quarter = policy(noise_multiplier=claimed.multiplier / 4)
    assert refuted(claimed, quarter, 2) > 1.0
    assert refuted(claimed, policy(noise_multiplier=1e-3), 3) > 4.0


# --- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 1.0}, "one of them"),
        ({"noise_multiplier": None}, "one of them"),
        ({"max_reports": None}, "needs a budget"),
        ({"noise_multiplier": None, "epsilon": 2.0, "epsilon_total": 1.0}, "more than the budget"),
        ({"clip_norm": 1e-9}, "fraction_bits"),
        ({"clip_norm": 1e6, "fraction_bits": 40}, "fraction_bits"),
        ({"clip_norm": 1.0, "noise_multiplier": 1e12, "fraction_bits": 24}, "lower fraction_bits"),
    ],
)
def test_a_policy_that_promises_nothing_or_cannot_work_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ConfigurationError, match=words):
        policy(**changes)


@pytest.mark.parametrize("changes", [{"delta": 0.0}, {"delta": 0.1}, {"clip_norm": math.inf}, {"max_reports": 0}])
def test_fields_have_their_ranges(changes: dict[str, Any]):
    with pytest.raises(ValidationError):
        policy(**changes)


def test_a_command_line_names_all_or_nothing():
    nothing: dict[str, float | None] = dict.fromkeys(("epsilon", "clip_norm", "budget", "delta"))
    assert local_policy(**nothing) is None
    found = local_policy(epsilon=2.0, clip_norm=0.5, budget=9.0, delta=None)
    assert found is not None
    assert (found.epsilon, found.clip_norm, found.epsilon_total, found.delta) == (2.0, 0.5, 9.0, 1e-6)
    for name in ("epsilon", "clip_norm", "budget"):
        with pytest.raises(ConfigurationError, match="give all three"):
            local_policy(**{"epsilon": 2.0, "clip_norm": 0.5, "budget": 9.0, "delta": None} | {name: None})
    with pytest.raises(ConfigurationError, match="give all three"):
        local_policy(**nothing | {"delta": 1e-5})
    with pytest.raises(ConfigurationError, match="clip_norm: Input should be greater than 0"):
        local_policy(epsilon=2.0, clip_norm=-1.0, budget=9.0, delta=None)


# --- budget and label -------------------------------------------------------------------------------------------


def releases(private: LocalPrivacy) -> Iterator[np.ndarray]:
    while True:
        yield private.release(np.ones(2, np.float32))


def spend(private: LocalPrivacy) -> int:
    """Releases until the budget is spent: how many."""
    made = 0
    try:
        for _ in releases(private):
            made += 1
    except LocalBudgetSpent:
        return made
    raise AssertionError


def test_the_budget_ends_where_one_more_would_exceed_it(ledger: LocalPrivacyLedger):
    private = LocalPrivacy(policy(noise_multiplier=None, epsilon=1.0, epsilon_total=3.0, max_reports=None), ledger)
    made = spend(private)
    assert made == ledger.charges().reports
    assert made > 3, "composed, not added"
    account = ledger.charges().account
    assert account.epsilon(1e-6) <= 3.0 < account.plus(gaussian_rdp(private.policy.multiplier)).epsilon(1e-6)
    with pytest.raises(LocalBudgetSpent, match="more than the 3 that this device spends"):
        private.check(make_assignment(1))
    assert issubclass(LocalBudgetSpent, PrivacyRefusal)


def test_reports_are_counted_too(ledger: LocalPrivacyLedger):
    assert spend(LocalPrivacy(policy(max_reports=3), ledger)) == 3


def test_another_policy_goes_on_from_what_was_spent(ledger: LocalPrivacyLedger):
    tight = LocalPrivacy(policy(noise_multiplier=None, epsilon=1.0, epsilon_total=3.0, max_reports=None), ledger)
    spend(tight)
    loose = tight.policy.model_copy(update={"epsilon_total": 4.0})
    total = spend(LocalPrivacy(loose, ledger))
    assert total > 0
    assert ledger.charges().account.epsilon(1e-6) <= 4.0
    assert spend(tight) == 0


def test_the_charge_is_durable_before_any_noise_is_drawn(ledger: LocalPrivacyLedger):
    class Died(BaseException):
        pass

    def random(_: int) -> bytes:
        assert ledger.charges().reports == 1
        raise Died

    private = LocalPrivacy(policy(), ledger)
    with pytest.raises(Died):
        private.release(np.ones(3, np.float32), random=random)
    assert ledger.charges().reports == 1, "and it is not paid back"


def test_a_charge_that_cannot_be_written_means_no_noise(tmp_path: Path):
    private = LocalPrivacy(policy(), LocalPrivacyLedger(tmp_path / "nowhere" / "ledger"))
    with pytest.raises(StateDirUnusable):
        private.release(np.ones(3, np.float32), random=lambda _: pytest.fail("noise was drawn"))


@pytest.mark.parametrize("at", range(0, 130, 9))
def test_damage_is_an_error_and_not_a_fresh_start(tmp_path: Path, at: int):
    path = tmp_path / "ledger"
    private = LocalPrivacy(policy(), LocalPrivacyLedger(path))
    private.release(np.ones(3, np.float32))
    private.name(b"a report")
    whole = bytearray(path.read_bytes())
    for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        path.write_bytes(damaged)
        for action in (private.label, lambda: private.covers(b"a report"), lambda: private.check(make_assignment(1))):
            with pytest.raises(StateDirUnusable, match="is not known"):
                action()
        with pytest.raises(StateDirUnusable):
            private.release(np.ones(3, np.float32))
        assert path.read_bytes() == damaged, "it is left as it is"


def test_a_ledger_of_another_version_is_not_read(tmp_path: Path):
    body = b'{"version":2,"noised":[]}'
    (tmp_path / "ledger").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    with pytest.raises(StateDirUnusable, match="another version"):
        LocalPrivacyLedger(tmp_path / "ledger").charges()


def test_only_the_report_of_the_latest_charge_is_covered(ledger: LocalPrivacyLedger):
    private = LocalPrivacy(policy(), ledger)
    assert not private.covers(b"one")
    private.release(np.ones(3, np.float32))
    assert not private.covers(b"one")
    private.name(b"one")
    assert private.covers(b"one")
    assert not private.covers(b"another")
    private.release(np.ones(3, np.float32))
    assert not private.covers(b"one"), "a new version was drawn: the old one must not be sent beside it"


def test_scaffold_is_refused(ledger: LocalPrivacyLedger):
    plan = make_assignment(1).plan.model_copy(update={"algorithm": "scaffold"})
    with pytest.raises(LocalPrivacyUnavailable, match="not clipped jointly"):
        LocalPrivacy(policy(), ledger).check(make_assignment(1, plan=plan, control_sha256=SHA))


def test_the_label_says_what_is_promised_spent_and_not_hidden(ledger: LocalPrivacyLedger):
    private = LocalPrivacy(policy(noise_multiplier=None, epsilon=2.0, epsilon_total=9.0), ledger)
    assert private.label() == (
        "local differential privacy: epsilon = 2 per report, 0 after 0 reports, budget epsilon 9 and 1000 reports, "
        "delta 1e-06; replace-one over all of this device's data; protects against everyone, the server included; "
        "does not hide participation and its timing, the number of steps, training that failed"
    )
    private.release(np.ones(3, np.float32))
    assert "2 after 1 report, budget" in private.label()
    told = LocalPrivacy(policy(noise_multiplier=0.1, hide_sample_count=False), ledger)
    assert "(so large that it promises next to nothing) per report" in told.label()
    assert "the number of examples" in told.label()
    assert (private.told_samples(37), told.told_samples(37)) == (1, 37)
