"""What an aggregator's own configuration may say, and what its ledger makes of a round."""

from __future__ import annotations

import ast
import math
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.sealing import SealingSuite
from server_ref.aggregation.batch import Adjacency
from server_ref.aggregation.calibration import gaussian_epsilon
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.errors import SumOutOfRange
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys, PeerKeys, SigningKey
from server_ref.secure.ledger import load_ledger, release_of
from server_ref.secure.parameters import PRICES, SUM_LIMIT, CheckingMode, PinnedParameters, RoundParameters
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import TASK, Parties, pinned, pinned_privacy

ROOT = Path(__file__).parents[2]


# --- pinned ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "t", "quorum"), [(5, 3, 4), (3, 2, 3), (7, 3, 5), (3, 3, 3), (2, 2, 2), (10, 4, 7)], ids=str
)
def test_two_quorums_have_an_honest_aggregator_in_common(n, t, quorum):
    parameters = pinned(num_aggregators=n, threshold=t)
    assert parameters.effective_quorum == quorum
    assert 2 * quorum - n > t - 1, "any two have more in common than may be dishonest"
    assert 2 * (quorum - 1) - n <= t - 1, "and no smaller number does it"


@given(st.integers(2, 64), st.data())
def test_the_quorum_is_the_least_that_is_safe(n, data):
    t = data.draw(st.integers(2, n))
    q = pinned(num_aggregators=n, threshold=t).effective_quorum
    assert t <= q <= n
    assert 2 * q - n >= t > 2 * (q - 1) - n


def test_a_smaller_quorum_has_to_say_what_it_assumes():
    with pytest.raises(ValidationError, match="assume_consistent_coordinator"):
        pinned(quorum=3)
    assert pinned(quorum=3, assume_consistent_coordinator=True).effective_quorum == 3
    assert pinned(quorum=5).effective_quorum == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 6},
        {"threshold": 1},
        {"packing": 2, "num_aggregators": 3},
        {"quorum": 6},
        {"min_cohort": 1},
        {"min_bucket": 2},
        {"max_parts": 2},
        {"max_weight": 0},
        {"clip_norm": math.nan},
        {"clip_norm": 0.0},
        {"fraction_bits": 41},
        {"indicator": True},
        {"privacy": pinned_privacy(indicator_noise_multiplier=3.0)},
        {"surprise": 1},
    ],
    ids=str,
)
def test_parameters_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ValidationError):
        pinned(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"max_rounds": 0},
        {"max_participations": 0},
        {"epsilon": 0.0},
        {"delta": 1.0},
        {"noise": "devices"},
        {"honest_devices": 2},
        {"device_noise_variance": "7"},
    ],
    ids=str,
)
def test_privacy_that_is_none_is_refused(wrong):
    with pytest.raises(ValidationError):
        pinned_privacy(**wrong)


def by_devices(variance: Fraction, **changes: object) -> PinnedParameters:
    privacy = pinned_privacy(noise="devices", device_noise_variance=str(variance), honest_devices=2)
    return pinned(privacy=privacy, **changes)


def test_noise_of_devices_has_to_suffice_by_the_honest_ones_alone():
    needed = Fraction(4 * 2**16) ** 2 / 2
    assert by_devices(needed).privacy is not None
    with pytest.raises(ValidationError, match="below noise_multiplier"):
        by_devices(needed - 1)
    with pytest.raises(ValidationError, match="max_weight"):
        by_devices(needed, max_weight=2)
    with pytest.raises(ValidationError, match="honest devices"):
        pinned(privacy=pinned_privacy(noise="devices", device_noise_variance=str(needed), honest_devices=3))


def test_with_noise_of_devices_aggregators_sum_and_charge_and_draw_none(tmp_path):
    parties = Parties(tmp_path, by_devices(Fraction(4 * 2**16) ** 2 / 2))
    uploads = parties.uploads(range(2))
    statement = parties.statement(uploads)
    assert statement.contributors == ()
    assert parties.run(statement)[0].tolist() == (uploads[0].codes + uploads[1].codes).tolist()
    with parties.stores[1].transaction() as connection:
        (event,) = load_ledger(connection, parties.parameters.privacy).events
    assert event.effective_multiplier == pytest.approx(4.0, rel=1e-12)
    parties.close()


def test_every_checking_mode_says_what_it_costs():
    assert set(PRICES) == set(CheckingMode)
    assert all(PRICES.values())


def test_the_hash_of_parameters_covers_all_of_them():
    changes = {
        "num_aggregators": 6,
        "threshold": 2,
        "field": "m127",
        "packing": 2,
        "quorum": 5,
        "assume_consistent_coordinator": True,
        "min_cohort": 3,
        "clip_norm": 2.0,
        "fraction_bits": 17,
        "max_weight": 2,
        "privacy": None,
    }
    hashes = {pinned(**{name: value}).sha256() for name, value in changes.items()}
    assert len(hashes | {pinned().sha256()}) == len(changes) + 1


# --- a round's parameters ------------------------------------------------------------------------------------------


@given(st.floats(0.125, 64.0), st.integers(1, 2**30), st.integers(1, 1000), st.integers(1, 10**6), st.integers(1, 9))
def test_the_range_is_kept_with_twelve_deviations_of_noise(sigma, bound, max_weight, total_weight, threshold):
    parameters = RoundParameters(noise_multiplier=sigma, bound=bound, max_weight=max_weight, fraction_bits=20)
    needed = total_weight * bound + 12 * math.sqrt(threshold) * sigma * max_weight * bound
    if needed < SUM_LIMIT * (1 - 1e-9):
        parameters.require_range(total_weight, threshold)
    elif needed > SUM_LIMIT * (1 + 1e-9):
        with pytest.raises(SumOutOfRange):
            parameters.require_range(total_weight, threshold)


def test_a_contributors_variance_is_exact():
    parameters = RoundParameters(
        noise_multiplier=0.1, bound=3, max_weight=7, fraction_bits=0, indicator_noise_multiplier=0.2
    )
    assert parameters.noise_variance(3) == Fraction(0.1) ** 2 * 441 / 3
    assert parameters.indicator_variance(2) == Fraction(0.2) ** 2 * 49 / 2


# --- what a round costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contributors", [(1, 2, 3), (1, 2, 3, 4, 5)], ids=len)
@pytest.mark.parametrize("max_weight", [1, 256])
def test_a_round_costs_what_its_honest_noise_is_worth(tmp_path, contributors, max_weight):
    parties = Parties(tmp_path, pinned(max_weight=max_weight), live=[1])
    uploads = [parties.upload(number) for number in range(2)]
    statement = parties.statement(uploads, contributors=contributors)
    release = release_of(statement, parties.parameters, parties.parameters.privacy, TASK.size)
    assert release.effective_multiplier == pytest.approx(4.0, rel=1e-12)
    assert release.contributors == len(contributors) - 2
    parties.close()


def test_replacing_a_device_moves_the_sum_by_twice_as_much(tmp_path):
    privacy = pinned_privacy(adjacency=Adjacency.REPLACE_ONE)
    parties = Parties(tmp_path, pinned(privacy=privacy), live=[1])
    statement = parties.statement([parties.upload(number) for number in range(2)])
    release = release_of(statement, parties.parameters, privacy, TASK.size)
    assert release.effective_multiplier == pytest.approx(2.0, rel=1e-12)
    parties.close()


def test_update_and_indicator_are_paid_for_together(tmp_path):
    privacy = pinned_privacy(indicator_noise_multiplier=8.0)
    parties = Parties(tmp_path, pinned(indicator=True, privacy=privacy), live=[1])
    statement = parties.statement([parties.upload(number) for number in range(2)])
    release = release_of(statement, parties.parameters, privacy, TASK.size)
    assert release.effective_multiplier == pytest.approx((4.0**-2 + 8.0**-2) ** -0.5, rel=1e-12)
    parties.close()


def test_every_aggregator_s_ledger_has_each_release_once_and_says_the_same(tmp_path):
    parties = Parties(tmp_path)
    for round_id in range(3):
        parties.run(
            parties.statement(parties.uploads(range(9 * round_id, 9 * round_id + 2), round_id), round_id=round_id)
        )
    for index in parties.indices:
        with parties.stores[index].transaction() as connection:
            spent = load_ledger(connection, parties.parameters.privacy).spent()
        assert spent.releases == 3
        assert spent.epsilon == pytest.approx(gaussian_epsilon(1e-5, 4.0 / math.sqrt(3)), rel=1e-6)
    parties.close()


# --- keys and configuration ------------------------------------------------------------------------------------------


def config(keys: list[AggregatorKeys], **changes: object) -> AggregatorConfig:
    values = {"index": 1, "parameters": pinned(), "peers": tuple(key.public for key in keys)} | changes
    return AggregatorConfig(**values)


def test_peers_are_n_different_parties():
    keys = [AggregatorKeys.generate() for _ in range(5)]
    assert config(keys).index == 1
    twin = PeerKeys(signing_key=keys[0].public.signing_key, sealing_key=keys[4].public.sealing_key)
    sealed_twin = PeerKeys(signing_key=keys[4].public.signing_key, sealing_key=keys[0].public.sealing_key)
    peers = tuple(key.public for key in keys)
    for wrong in (
        {"peers": peers[:4]},
        {"index": 6},
        {"peers": (*peers[:4], twin)},
        {"peers": (*peers[:4], sealed_twin)},
        {"suite": SealingSuite.MLKEM768_X25519},
    ):
        with pytest.raises(ValidationError):
            config(keys, **wrong)


def test_an_aggregator_opens_its_own_store_with_its_own_keys_only(tmp_path):
    keys = [AggregatorKeys.generate() for _ in range(5)]
    with closing(AggregatorStore(tmp_path / "one")) as store:
        Aggregator(config(keys), keys[0], store)
        with pytest.raises(ConfigurationError, match="keys"):
            Aggregator(config(keys), keys[1], store)
        with pytest.raises(ConfigurationError, match="another index"):
            Aggregator(config(keys, index=2), keys[1], store)
        weaker = pinned(privacy=pinned_privacy(noise_multiplier=1.0))
        with pytest.raises(ConfigurationError, match="parameters"):
            Aggregator(config(keys, parameters=weaker), keys[0], store)


def test_secrets_do_not_print():
    key = SigningKey.generate()
    keys = AggregatorKeys.generate()
    for text in (repr(key), str(key), repr(keys)):
        assert key.private_bytes().hex() not in text
        assert keys.signing.private_bytes().hex() not in text
        assert keys.sealing.private_bytes().hex() not in text
    with pytest.raises(ConfigurationError):
        SigningKey(b"short")


# --- what decides -------------------------------------------------------------------------------------------------


CORE = (
    "aggregator", "answers", "canonical", "challenges", "comparisons", "errors", "identity", "intake", "ledger",
    "messages", "noise_shares", "parameters", "port", "projections", "queries", "record_rules", "rules", "store",
    "sums", "tables", "zero_keys",
)  # fmt: skip


@pytest.mark.parametrize("name", CORE)
def test_no_clock_and_no_seedable_randomness_decides_anything(name):
    tree = ast.parse((ROOT / "server_ref" / "secure" / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} | {
        str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert not imported & {"time", "datetime", "random", "server_ref.clock", "numpy.random"}
    assert "default_rng" not in ast.dump(tree)
