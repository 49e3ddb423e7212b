"""Releases on disk: the same bits come back, or nothing does; kept exactly as long as a crash can need them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sqlalchemy.exc import IntegrityError

from client_sdk.protocol.errors import StorageUnavailable
from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.accounting import GaussianRelease, LedgerKeeper, PrivacyBudget, PrivacyLedger
from server_ref.aggregation.batch import Adjacency, Aggregate, PrivateAggregate
from server_ref.aggregation.errors import NoiseMissing, PrivacyBudgetExhausted
from server_ref.assignments import AssignmentRecord
from server_ref.clock import WallClock
from server_ref.privacy_plan import PrivacyPlan
from server_ref.private_buffer import MemoryReleases, release_once
from server_ref.release_store import ReleaseStore
from server_ref.releases import decode_release, encode_release
from server_ref.store import database
from server_ref.store.blobs import BlobStore

FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = arrays.arrays(np.float64, st.integers(0, 40), elements=FINITE)


def aggregate(values: np.ndarray | None = None, **changes: object) -> PrivateAggregate:
    facts: dict[str, object] = {
        "values": np.array([0.1, -0.0, 5e-324, 1e300]) if values is None else values,
        "kind": UpdateKind.DELTA,
        "count": 3,
        "total_weight": 3,
        "sensitivity": {Adjacency.ZERO_OUT: 1 / 3, Adjacency.REPLACE_ONE: 2 / 3},
        "measurements": {"staleness": {"0": 3}, "signed": [1, 2, 5]},
        "noise_stddev": math.pi,
        "adjacency": Adjacency.ZERO_OUT,
    }
    return PrivateAggregate(**(facts | changes))  # type: ignore[arg-type]


def event(round_id: int, noise_multiplier: float = 1.0) -> GaussianRelease:
    return GaussianRelease(round_id=round_id, noise_multiplier=noise_multiplier, adjacency=Adjacency.ZERO_OUT)


# --- bytes -----------------------------------------------------------------------------------------------------------


@given(VALUES, st.floats(min_value=0, allow_infinity=False), st.sampled_from(Adjacency))
def test_what_comes_back_is_the_same_to_the_bit(values, stddev, adjacency):
    made = aggregate(values, noise_stddev=stddev, adjacency=adjacency, sensitivity={adjacency: stddev})
    found = decode_release(encode_release(made))
    assert found.values.tobytes() == made.values.tobytes()
    assert found.values.dtype == np.float64
    assert found.values.flags.writeable
    for name in ("kind", "count", "total_weight", "noise_stddev", "adjacency"):
        assert getattr(found, name) == getattr(made, name)
    assert dict(found.sensitivity) == dict(made.sensitivity)
    assert dict(found.measurements) == dict(made.measurements)
    assert encode_release(found) == encode_release(made), "one encoding of one release"


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_noise_is_not_read_out_of_garbage(data):
    with pytest.raises(StorageUnavailable):
        decode_release(data)


@pytest.mark.parametrize(
    "facts",
    ["", "[]", "{}", "7", '{"kind": "delta", "sensitivity": []}', '{"kind": "delta", "sensitivity": {"nobody": 1.0}}'],
)
def test_facts_that_are_none_are_damage(facts):
    with pytest.raises(StorageUnavailable):
        decode_release(bytes(encode_frame({"values": np.zeros(3)}, {"facts": facts})))


@given(st.integers(min_value=0))
def test_a_cut_release_is_damage(cut):
    whole = encode_release(aggregate())
    with pytest.raises(StorageUnavailable):
        decode_release(whole[: cut % len(whole)])


# --- the store -------------------------------------------------------------------------------------------------------


class Stored:
    """A store whose process ends whenever a test wants."""

    def __init__(self, folder: Path, epsilon: float = 100.0) -> None:
        self.folder = folder
        self.budget = PrivacyBudget(epsilon=epsilon, delta=1e-5)
        self.open(version=0)

    def open(self, version: int) -> None:
        """A new process, with the models up to this version committed."""
        self.db = database.open_database(self.folder / "pocketfed.db")
        self.blobs = BlobStore(self.folder / "blobs")
        self.keeper = LedgerKeeper(PrivacyLedger(budget=self.budget))
        self.store = ReleaseStore(self.db, self.blobs, WallClock(), self.keeper)
        with self.db.connect() as connection:
            self.store.reload(connection, version)
        self.store.delete_orphans()

    def restart(self, version: int) -> None:
        self.db.dispose()
        self.open(version)

    @property
    def kept(self) -> int:
        """Releases on disk."""
        return len(self.blobs.keys("releases"))


@pytest.fixture
def stored(tmp_path):
    found = Stored(tmp_path)
    yield found
    found.db.dispose()


def test_a_release_is_there_until_its_round_is_committed(stored):
    assert stored.store.load_release(0) is None
    made = aggregate()
    stored.store.save_release(event(0), made)
    for version in (0, 0):
        found = stored.store.load_release(0)
        assert found is not None
        assert found.values.tobytes() == made.values.tobytes()
        stored.restart(version)
        assert [e.round_id for e in stored.keeper.ledger.events] == [0]
    [key] = stored.store.committed(0)
    assert stored.store.load_release(0) is None
    assert stored.store.committed(0) == [], "once"
    stored.blobs.delete(key)
    assert stored.kept == 0


def test_a_release_that_nobody_deleted_after_its_commit_goes_at_the_next_start_and_its_charge_stays(stored):
    for round_id in range(3):
        stored.store.save_release(event(round_id), aggregate(np.full(2, float(round_id))))
    assert stored.kept == 3
    stored.restart(version=2)
    assert stored.kept == 1, "that of the round that is not committed"
    assert [e.round_id for e in stored.keeper.ledger.events] == [0, 1, 2]
    assert stored.keeper.ledger.spent().releases == 3


def test_one_round_is_charged_once(stored):
    stored.store.save_release(event(4), aggregate())
    with pytest.raises(IntegrityError):
        stored.store.save_release(event(4), aggregate(np.zeros(2)))
    stored.restart(version=4)
    found = stored.store.load_release(4)
    assert found is not None
    assert found.values.size == 4, "the first one"
    assert stored.kept == 1


@pytest.mark.parametrize("damage", ["missing", "another", "cut", "bit"])
def test_a_release_that_is_not_what_was_paid_for_is_not_used(stored, damage):
    stored.store.save_release(event(0), aggregate())
    [key] = stored.blobs.keys("releases")
    good = bytes(stored.blobs.get(key))
    if damage == "missing":
        stored.blobs.delete(key)
    else:
        flipped = bytearray(good)
        flipped[-3] ^= 1
        stored.blobs.put(
            key, {"another": encode_release(aggregate(np.zeros(4))), "cut": good[:-1], "bit": bytes(flipped)}[damage]
        )
    stored.restart(version=0)
    with pytest.raises(StorageUnavailable, match=r"the release of round 0 is (missing|damaged) on disk"):
        stored.store.load_release(0)
    assert stored.keeper.ledger.spent().releases == 1


def test_a_secure_round_s_state_is_kept_until_it_is_forgotten(stored):
    assert stored.store.load(7) is None
    stored.store.save(7, "first")
    stored.store.save(7, "second")
    stored.store.save(8, "other")
    stored.restart(version=0)
    assert stored.store.load(7) == "second"
    with stored.db.begin() as connection:
        stored.store.forget(connection, 7)
        stored.store.forget(connection, 99)
    assert stored.store.load(7) is None
    assert stored.store.load(8) == "other"


# --- once ------------------------------------------------------------------------------------------------------------


def test_a_round_is_reduced_once(stored):
    plan = PrivacyPlan(1.0, stored.budget)
    made = []

    def reduce() -> PrivateAggregate:
        made.append(stored.keeper.round_id)
        return aggregate(np.full(3, float(len(made))))

    first = release_once(stored.keeper, plan, stored.store, round_id=0, reduce=reduce, counted=[])
    assert first.measurements["privacy"]["epsilon"] == stored.keeper.ledger.spent().epsilon
    stored.restart(version=0)
    again = release_once(stored.keeper, plan, stored.store, round_id=0, reduce=reduce, counted=[])
    assert made == [0]
    assert again.values.tobytes() == first.values.tobytes()
    assert dict(again.measurements) == dict(first.measurements)
    assert stored.keeper.ledger.spent().releases == 1


def test_what_a_spent_budget_does_not_allow_is_not_even_reduced(tmp_path):
    stored = Stored(tmp_path, epsilon=0.5)
    plan = PrivacyPlan(1.0, stored.budget)

    def reduce() -> PrivateAggregate:
        raise AssertionError("noise was drawn")

    with pytest.raises(PrivacyBudgetExhausted):
        release_once(stored.keeper, plan, stored.store, round_id=0, reduce=reduce, counted=[])
    assert stored.kept == 0
    stored.restart(version=0)
    assert stored.keeper.ledger.events == ()
    stored.db.dispose()


def test_an_aggregate_without_noise_leaves_no_private_task(stored):
    plain = aggregate()
    naked = Aggregate(
        values=plain.values, kind=plain.kind, count=3, total_weight=3, sensitivity=plain.sensitivity, measurements={}
    )
    for releases in (stored.store, MemoryReleases()):
        with pytest.raises(NoiseMissing):
            release_once(
                stored.keeper, PrivacyPlan(1.0, stored.budget), releases, round_id=0, reduce=lambda: naked, counted=[]
            )
    assert stored.kept == 0
    assert stored.keeper.ledger.events == ()


def test_what_was_drawn_for_some_reports_is_not_used_for_others(stored):
    def record(number):
        return AssignmentRecord(number, f"{number:032x}", "d" * 32, 0, 0, 1, 0.0, 1.0)

    plan = PrivacyPlan(1.0, stored.budget)
    first = [record(0), record(1)]
    release_once(stored.keeper, plan, stored.store, round_id=0, reduce=aggregate, counted=first)
    stored.restart(version=0)
    release_once(stored.keeper, plan, stored.store, round_id=0, reduce=aggregate, counted=first[::-1])
    with pytest.raises(StorageUnavailable, match="other reports"):
        release_once(stored.keeper, plan, stored.store, round_id=0, reduce=aggregate, counted=[record(0), record(2)])
