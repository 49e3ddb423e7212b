"""What aggregators take from devices: nothing malformed, mis-indexed, swapped, replayed, or made under other terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.secure import encode_shares
from client_sdk.protocol.shamir import share_seeded
from server_ref.secure import store
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.errors import ParametersBelowPinned, TaskNotBound
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.messages import ShareHeader, VerdictReason
from server_ref.secure.store import AggregatorStore
from tests.secure_parties import Parties, Upload, hex_id, pinned, pinned_privacy


@pytest.fixture
def parties(tmp_path) -> Iterator[Parties]:
    made = Parties(tmp_path, pinned(privacy=None))
    yield made
    made.close()


def reason(parties: Parties, upload: Upload, index: int = 4) -> VerdictReason | None:
    (verdict,) = parties[index].deliver(0, [upload.share(index)])
    assert (verdict.report_id, verdict.digest) == (upload.header.report_id, upload.header.digest())
    return verdict.reason


def facts(number: int) -> dict[str, object]:
    return {
        "report_id": hex_id(number, "report"),
        "assignment_id": hex_id(number, "assign"),
        "device_id": hex_id(number, "device"),
        "model_version": 3,
        "clip_norm": 1.0,
        "indicator_norm": None,
    }


def plaintexts(parties: Parties) -> list[bytes]:
    secret = parties.layout.secret(np.arange(parties.layout.num_values), os.urandom(32))
    return [bytes(each) for each in encode_shares(share_seeded(secret, parties.layout.scheme), parties.layout)]


@pytest.mark.parametrize("suite", SealingSuite)
def test_a_sound_share_is_kept(tmp_path, suite):
    parties = Parties(tmp_path, pinned(privacy=None), suite=suite)
    uploads = parties.uploads(range(2))
    assert parties.run(parties.statement(uploads))[0].tolist() == (uploads[0].codes + uploads[1].codes).tolist()
    parties.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda share: share[:-1],
        lambda share: share + b"\x00",
        lambda _share: b"",
        lambda share: b"\x02" + share[1:],
        lambda _share: b"\x00" + os.urandom(32),
        lambda share: share[:-8] + (2**61 - 1).to_bytes(8, "little"),
        lambda share: share[:1] + b"\xff" * (len(share) - 1),
    ],
    ids=["short", "long", "empty", "kind", "a seed instead", "the modulus", "beyond the field"],
)
def test_what_is_no_canonical_share_is_malformed(parties, spoil):
    shares = plaintexts(parties)
    shares[3] = spoil(shares[3])
    upload = parties.seal(facts(1), shares, np.arange(6))
    assert reason(parties, upload) is VerdictReason.MALFORMED
    assert reason(parties, upload, 5) is None, "the others' shares are sound"


def test_a_seed_is_32_bytes_and_nothing_else(parties):
    shares = plaintexts(parties)
    for wrong in (shares[3], shares[0][:-1], shares[0] + b"\x00", b"\x01" + shares[0][1:]):
        upload = parties.seal(facts(1), [wrong, *shares[1:]], np.arange(6))
        assert reason(parties, upload, 1) is VerdictReason.MALFORMED


@pytest.mark.parametrize(
    "other",
    [{"assignment_id": hex_id(8, "assign")}, {"device_id": hex_id(8, "device")}, {"model_version": 4}],
    ids=["assignment", "device", "model version"],
)
def test_a_share_opens_for_what_it_was_sealed_for_only(parties, other):
    upload = parties.upload(1)
    moved = replace(upload, header=upload.header.model_copy(update=other))
    assert reason(parties, moved) is VerdictReason.UNSEALABLE
    assert reason(parties, upload) is None


def test_a_share_opens_for_its_aggregator_only(parties):
    upload = parties.upload(1)
    swapped = (*upload.ciphertexts[:3], upload.ciphertexts[4], upload.ciphertexts[3])
    assert reason(parties, replace(upload, ciphertexts=swapped)) is VerdictReason.HEADER_MISMATCH
    ids = upload.header.ciphertext_ids
    relabelled = upload.header.model_copy(update={"ciphertext_ids": (*ids[:3], ids[4], ids[3])})
    assert reason(parties, Upload(relabelled, swapped, upload.codes)) is VerdictReason.UNSEALABLE


def test_a_share_that_was_changed_on_its_way_does_not_open(parties):
    upload = parties.upload(1)
    sealed = bytearray(upload.ciphertexts[3])
    sealed[40] ^= 1  # neither in the encapsulated key nor in the tag, which its name covers
    changed = replace(upload, ciphertexts=(*upload.ciphertexts[:3], bytes(sealed), upload.ciphertexts[4]))
    assert reason(parties, changed) is VerdictReason.UNSEALABLE
    for cut in (b"", sealed[:20]):
        short = replace(upload, ciphertexts=(*upload.ciphertexts[:3], bytes(cut), upload.ciphertexts[4]))
        assert reason(parties, short) is VerdictReason.HEADER_MISMATCH


def test_a_header_has_one_name_for_each_aggregator(parties):
    upload = parties.upload(1)
    ids = upload.header.ciphertext_ids
    for wrong in (ids[:4], (*ids, ids[0])):
        assert reason(parties, replace(upload, header=upload.header.model_copy(update={"ciphertext_ids": wrong}))) is (
            VerdictReason.HEADER_MISMATCH
        )


def test_a_device_that_was_told_other_terms_is_noticed(parties, tmp_path):
    """The coordinator tells devices a larger clip norm than the noise is made for. Its word is not taken for it."""
    assert reason(parties, parties.upload(1, clip_norm=64.0)) is VerdictReason.TERMS
    sealed_for_64 = parties.upload(2, clip_norm=64.0)
    claimed = replace(sealed_for_64, header=sealed_for_64.header.model_copy(update={"clip_norm": 1.0}))
    assert reason(parties, claimed) is VerdictReason.UNSEALABLE
    assert reason(parties, parties.upload(3, indicator_norm=1.0)) is VerdictReason.TERMS
    finer = Parties(tmp_path / "finer", pinned(privacy=None, fraction_bits=30))
    finer.keys, finer.configs = parties.keys, [replace_bits(config, 30) for config in parties.configs]
    assert reason(parties, finer.upload(4)) is VerdictReason.UNSEALABLE
    finer.close()


@pytest.mark.parametrize(("counted", "told"), [(2, 9), (2, None), (None, 2), (2, 1)])
def test_a_device_that_was_told_another_number_of_participations_is_noticed(tmp_path, counted, told):
    """Its own count is the one that a coordinator cannot mislead with other ids: it has to be the pinned one."""
    parties = Parties(tmp_path, pinned(privacy=pinned_privacy(max_participations=counted)))
    honest = parties.upload(1)
    lie = pinned(privacy=pinned_privacy(max_participations=told))
    parties.configs = [config.model_copy(update={"parameters": lie}) for config in parties.configs]
    misled = parties.upload(2)
    assert [reason(parties, misled, index) for index in parties.indices] == [VerdictReason.UNSEALABLE] * 5
    assert [reason(parties, honest, index) for index in parties.indices] == [None] * 5
    parties.close()


def replace_bits(config: AggregatorConfig, fraction_bits: int) -> AggregatorConfig:
    parameters = config.parameters.model_copy(update={"fraction_bits": fraction_bits})
    return config.model_copy(update={"parameters": parameters})


def test_with_an_indicator_the_noise_covers_the_largest_clip_norm_of_the_reports(tmp_path):
    parties = Parties(
        tmp_path,
        pinned(indicator=True, privacy=pinned_privacy(indicator_noise_multiplier=8.0)),
    )
    uploads = [parties.upload(0, clip_norm=0.5), parties.upload(1, clip_norm=2.0)]
    parties.deliver(uploads)
    parameters = parties.parameters.round_parameters()
    small, enough = (parameters.model_copy(update={"bound": bound}) for bound in (2**17 - 1, 2**17))
    with pytest.raises(ParametersBelowPinned, match="report's own"):
        parties[1].contribute(parties.statement(uploads, parameters=small))
    assert len(parties.run(parties.statement(uploads, parameters=enough))) == 1
    parties.close()


def test_what_came_before_is_neither_replaced_nor_renamed(parties):
    first = parties.upload(1)
    assert reason(parties, first) is None
    assert reason(parties, parties.upload(1, [1] * 6)) is VerdictReason.CONFLICT, "another upload, the same report"
    second_report = parties.upload(1, report_id=hex_id(7, "report"))
    assert reason(parties, second_report) is VerdictReason.CONFLICT, "the assignment has a report"
    assert reason(parties, replace(first, header=first.header.model_copy(update={"device_id": "00" * 16}))) is (
        VerdictReason.CONFLICT
    )
    assert reason(parties, first) is None
    assert reason(parties, first) is None


def test_one_delivery_that_contradicts_itself_keeps_the_first(parties):
    first, other = parties.upload(1), parties.upload(1, [1] * 6)
    twin = parties.upload(1, report_id=hex_id(7, "report"))
    verdicts = parties[4].deliver(0, [upload.share(4) for upload in (first, other, twin, first)])
    assert [verdict.reason for verdict in verdicts] == [None, VerdictReason.CONFLICT, VerdictReason.CONFLICT, None]
    assert reason(parties, first) is None


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20], ids=["in blobs", "in the database"])
def test_shares_outlive_a_restart_and_are_let_go_once_summed(parties, monkeypatch, inline_bytes):
    monkeypatch.setattr(store, "INLINE_BYTES", inline_bytes)
    uploads = parties.uploads(range(3))
    for index in parties.indices:
        parties.restart(index)
    statement = parties.statement(uploads[:2])
    signatures = parties.commit(statement)
    answers = parties.answers(0, signatures)
    assert parties.open(answers)[0].tolist() == (uploads[0].codes + uploads[1].codes).tolist()
    blobs = parties.stores[4].blobs
    assert len(blobs.keys("shares")) == (1 if inline_bytes == 0 else 0), "only that of the report that was not summed"
    parties.restart(4)
    assert parties.answers(0, signatures, by=[4]) == answers[3:4]
    assert reason(parties, uploads[0]) is None
    assert reason(parties, parties.upload(0, [1] * 6)) is VerdictReason.CONFLICT


def test_devices_that_share_one_vector_do_not_share_one_blob(parties, monkeypatch):
    """Or the first of their sums would take the second one's share with it."""
    monkeypatch.setattr(store, "INLINE_BYTES", 0)
    shares = plaintexts(parties)
    twins = [parties.seal(facts(number), shares, np.arange(6)) for number in range(2)]
    parties.deliver(twins)
    others = parties.uploads([5, 6])
    parties.run(parties.statement([twins[0], others[0]]))
    assert (
        parties.run(parties.statement([twins[1], others[1]], round_id=1))[0].tolist()
        == (np.arange(6) + others[1].codes).tolist()
    )


def test_without_a_task_nothing_is_taken(tmp_path, parties):
    config = parties.configs[0].model_copy(update={"task": None})
    own = AggregatorStore(tmp_path / "unbound")
    aggregator = Aggregator(config, parties.keys[0], own)
    assert aggregator.describe().task is None
    with pytest.raises(TaskNotBound):
        aggregator.deliver(0, [parties.upload(1).share(1)])
    aggregator.bind(parties.task)
    assert aggregator.deliver(0, [parties.upload(1).share(1)])[0].ok
    own.close()


def test_the_digest_names_every_part_of_a_header(parties):
    header = parties.upload(1).header
    changes = {
        "report_id": "00" * 16,
        "assignment_id": "00" * 16,
        "device_id": "00" * 16,
        "model_version": 4,
        "clip_norm": 1.5,
        "indicator_norm": 1.0,
        "ciphertext_ids": header.ciphertext_ids[::-1],
    }
    assert set(changes) == set(ShareHeader.model_fields)
    digests = {header.model_copy(update={name: value}).digest() for name, value in changes.items()}
    assert len(digests | {header.digest()}) == len(changes) + 1
