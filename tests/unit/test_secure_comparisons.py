"""Comparing secret updates at real aggregators: exact, once for each report, the same bytes again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError
from server_ref.secure import store
from server_ref.secure.distance_messages import DistanceRequest, DistanceShare
from server_ref.secure.distance_opening import open_distances
from server_ref.secure.distances import distance_settings
from server_ref.secure.errors import CohortTooSmall, DistancesRefused, UnknownReport, ZeroKeyRejected
from server_ref.secure.parameters import CheckingMode
from tests.secure_parties import TASK, Parties, Upload, pinned, pinned_privacy


def parameters(**changes: object):
    return pinned(
        **({"checking": CheckingMode.PROJECTIONS, "distances": True, "privacy": None, "min_cohort": 3} | changes)
    )


@pytest.fixture
def parties(tmp_path) -> Iterator[Parties]:
    made = Parties(tmp_path, parameters())
    yield made
    made.close()


def request_for(uploads: Sequence[Upload], round_id: int = 0) -> DistanceRequest:
    return DistanceRequest(task_id=TASK.task_id, round_id=round_id, reports=tuple(upload.ref for upload in uploads))


def compared(parties: Parties, request: DistanceRequest) -> list[DistanceShare]:
    keys = [parties[i].deal_distance_keys(request) for i in parties.indices]
    return [parties[i].compare(request, [one.for_receiver(i) for one in keys]) for i in parties.indices]


@pytest.mark.parametrize("inline_bytes", [0, store.INLINE_BYTES], ids=["blobs", "rows"])
@pytest.mark.parametrize("field", ["m61", "m127"])
def test_distances_are_those_of_the_codes(tmp_path, monkeypatch, field, inline_bytes):
    monkeypatch.setattr(store, "INLINE_BYTES", inline_bytes)
    parties = Parties(tmp_path, parameters(field=field))
    uploads = parties.uploads(range(4))
    request = request_for(uploads)
    opened = open_distances(
        request, compared(parties, request), distance_settings(parties.parameters), parties.configs[0].signed
    )
    assert opened == [int(((a.codes - b.codes) ** 2).sum()) for a, b in itertools.combinations(uploads, 2)]
    # What was selected is summed as always.
    assert parties.run(parties.statement(uploads[:3]))[0].tolist() == sum(u.codes for u in uploads[:3]).tolist()
    parties.close()


def test_the_answer_is_the_same_again_also_after_a_restart(parties):
    uploads = parties.uploads(range(3))
    request = request_for(uploads)
    answers = compared(parties, request)
    assert compared(parties, request) == answers
    assert parties.restart(2).compare(request, []) == answers[1]
    parties.run(parties.statement(uploads))
    assert parties[3].compare(request, []) == answers[2], "when the shares are gone"


def test_a_report_is_compared_within_one_cohort_ever(parties):
    uploads = parties.uploads(range(4))
    compared(parties, request_for(uploads[:3]))
    for other in (request_for(uploads[1:]), request_for(uploads[:3], round_id=1), request_for(uploads[2::-1])):
        with pytest.raises(DistancesRefused, match="compared before"):
            parties[1].deal_distance_keys(other)
        with pytest.raises(DistancesRefused, match="compared before"):
            parties.restart(1).compare(other, [])


def test_only_reports_that_are_kept_and_enough_of_them_are_compared(parties):
    uploads = parties.uploads(range(3))
    with pytest.raises(UnknownReport):
        parties[1].deal_distance_keys(request_for([*uploads, parties.upload(8)]))
    with pytest.raises(ZeroKeyRejected):
        parties[2].compare(request_for(uploads), [])
    with pytest.raises(DistancesRefused, match="serves task"):
        parties[1].compare(request_for(uploads).model_copy(update={"task_id": "00" * 16}), [])
    request = request_for(uploads)
    with pytest.raises(CohortTooSmall):
        parties[1].deal_distance_keys(request.model_copy(update={"reports": request.reports[:2]}))
    assert len(compared(parties, request)) == 5, "what was refused changed nothing"


def test_distances_are_pinned_or_refused(tmp_path):
    parties = Parties(tmp_path / "plain", pinned(privacy=None))
    with pytest.raises(DistancesRefused, match="does not pin"):
        parties[1].deal_distance_keys(request_for(parties.uploads(range(3))))
    parties.close()
    for name, (changes, error) in {
        "unchecked": ({"checking": CheckingMode.TRUST_DEVICES}, ConfigurationError),
        "private": ({"privacy": pinned_privacy()}, ConfigurationError),
        "too fine": ({"fraction_bits": 30}, BudgetExceeded),
    }.items():
        with pytest.raises(error):
            Parties(tmp_path / name, parameters(**changes))
