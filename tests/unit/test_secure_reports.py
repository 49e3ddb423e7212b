"""A device's secure report: its aggregators get the clipped update, exactly; once made it is sent, and no other."""

from __future__ import annotations

import hashlib
import itertools
import os
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client_sdk import MobileClient, events
from client_sdk.errors import BundleMismatch, ParticipationsSpent
from client_sdk.native.sharing import PlainKernels, load_kernels
from client_sdk.protocol import sealing
from client_sdk.protocol.clipping import l2_norm
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.discrete_gaussian import sample
from client_sdk.protocol.errors import (
    ConfigurationError,
    InvalidSealingKey,
    MalformedShare,
    NonFiniteUpdate,
    ProgramExecutionError,
    SealingFailed,
)
from client_sdk.protocol.field import Field, RandomBytes
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import Assignment, I64SharesEncoding, ReportFacts, SecurePlan
from client_sdk.protocol.privacy import encode_clipped
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.sealing import SealingKey, SealingSuite
from client_sdk.protocol.secure import SecureLayout, encode_shares, split_secure_report
from client_sdk.protocol.shamir import reconstruct
from client_sdk.reports import build_report, check_reportable
from client_sdk.secure_reports import private_shares, sealed_shares
from client_sdk.session_state import RetryPolicy
from client_sdk.store import FileDeviceStore, MemoryDeviceStore
from client_sdk.training import LocalTrainer
from tests.aggregators import DEVICE_ID, info_for, layout_of, opened_codes, opened_share, opened_shares
from tests.devices import NUM_PARAMETERS, ToyProgram, ToyServer, make_assignment, make_data

KEYS = {suite: [SealingKey.generate(suite) for _ in range(5)] for suite in SealingSuite}
CURVE = KEYS[SealingSuite.X25519]
REPORT_ID = "a" * 32


def make_plan(suite: SealingSuite = SealingSuite.X25519, **changes: Any) -> SecurePlan:
    facts: dict[str, Any] = {"fraction_bits": 24, "clip_norm": 1.0, "suite": suite}
    return SecurePlan(aggregator_keys=tuple(key.public.hex for key in KEYS[suite]), **facts | changes)


def secure_assignment(number: int = 1, plan: SecurePlan | None = None, **changes: Any) -> Assignment:
    return make_assignment(number, encoding=I64SharesEncoding(), secure=plan or make_plan(), **changes)


def report_of(assignment: Assignment, update: np.ndarray, **more: Any) -> bytes:
    return bytes(
        build_report(assignment, REPORT_ID, update, device_id=DEVICE_ID, steps=3, train_loss=0.5, **more).frame
    )


def private_codes(plan: SecurePlan, update: np.ndarray, random: RandomBytes = os.urandom) -> np.ndarray:
    """What a device shares of an update, mask left out: opened from its shares."""
    layout = SecureLayout.of(plan, len(update))
    shares = private_shares(plan, layout, update, random=random, kernels=PlainKernels())
    vectors = shares.expand(layout.scheme, layout.length)
    secret = reconstruct(dict(enumerate(vectors, 1)), layout.scheme, layout.length)
    return layout.scheme.field.to_signed(layout.values(secret))


# --- what arrives ------------------------------------------------------------------------------------------------

UPDATES = arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**70), 2.0**70, width=32))


@given(
    UPDATES,
    st.sampled_from([None, "randomk:0.3", "randomk:0.5,rotate", "sketch:0.5,rows=1"]),
    st.sampled_from(["m61", "m127"]),
    st.sampled_from([1, 2]),
    st.sampled_from(SealingSuite),
    st.none() | st.floats(0.01, 10),
    st.data(),
)
@settings(max_examples=40)
def test_any_aggregators_that_suffice_open_the_clipped_update_exactly(
    update, compression, field, packing, suite, indicator_norm, data
):
    plan = make_plan(suite, field=field, packing=packing, indicator_norm=indicator_norm)
    assignment = secure_assignment(plan=plan, compression=compression, compression_seed=11 if compression else 0)
    frame = report_of(assignment, update)
    shared = update
    if compression is not None:
        shared = Codec(CompressionSpec.parse(compression), len(update)).project(update, 11)
    expected = encode_clipped(shared, plan.bounds).tolist()
    if indicator_norm is not None:
        expected.append(1 if l2_norm(shared) <= indicator_norm else -1)
    some = data.draw(st.permutations(range(1, 6)))[: 3 + packing - 1]
    assert opened_codes(frame, assignment, len(update), KEYS[suite], some).tolist() == expected
    assert sum(code**2 for code in expected[: len(shared)]) <= plan.bounds.norm_bound**2


def test_a_report_repeats_its_assignment_and_keeps_the_loss_to_itself():
    assignment = secure_assignment(7)
    update = np.ones(9, np.float32)
    report = build_report(assignment, REPORT_ID, update, device_id=DEVICE_ID, steps=3, train_loss=0.5)
    facts = ReportFacts.model_validate(decode_frame(report.frame).metadata)
    assert (facts.report_id, facts.assignment_id, facts.steps) == (REPORT_ID, assignment.assignment_id, "3")
    assert (facts.encoding, facts.train_loss, facts.compression) == ("i64-shares", "withheld", "none")
    assert (report.dense_bytes, report.residual) == (36, None)
    assert len(report.frame) <= layout_of(assignment, 9).max_frame_bytes


def test_the_indicator_says_whether_the_norm_lies_within_the_bound_itself_included():
    update = np.array([3.0, 4.0], np.float32)
    for norm, expected in ((5.0, 1), (np.nextafter(5.0, 0), -1), (0.5, -1), (80.0, 1)):
        assert private_codes(make_plan(indicator_norm=float(norm)), update)[-1] == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_report_is_made_of_what_is_no_number(bad: float):
    with pytest.raises(NonFiniteUpdate):
        report_of(secure_assignment(), np.array([1, bad], np.float32))


# --- randomness --------------------------------------------------------------------------------------------------


class Source:
    """Random bytes that a test can count and look at."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        self.given.append(os.urandom(size))
        return self.given[-1]


def test_every_report_draws_two_seeds_and_a_mask_and_none_of_them_twice():
    """Two shares of one seed, or a mask that is a share's seed, would give the update away."""
    source, update = Source(), np.ones(50, np.float32)
    assignment = secure_assignment()
    for _ in range(3):
        sealed_shares(assignment, make_plan(), update, device_id=DEVICE_ID, random=source)
    assert [len(each) for each in source.given] == [32] * 9
    assert len(set(source.given)) == 9


def test_two_reports_of_one_update_have_nothing_in_common():
    update, assignment = np.ones(50, np.float32), secure_assignment()
    one, other = (report_of(assignment, update) for _ in range(2))
    assert opened_codes(one, assignment, 50, CURVE).tolist() == opened_codes(other, assignment, 50, CURVE).tolist()
    for index in range(1, 6):
        shares = [opened_shares(frame, assignment, 50, CURVE)[index] for frame in (one, other)]
        assert not np.any(shares[0] == shares[1])
    ciphertexts = [decode_frame(frame).tensors["share-1"].tobytes() for frame in (one, other)]
    assert ciphertexts[0][:32] != ciphertexts[1][:32]


def test_a_source_that_repeats_itself_is_refused():
    with pytest.raises(ConfigurationError, match="twice"):
        sealed_shares(secure_assignment(), make_plan(), np.ones(5, np.float32), device_id=DEVICE_ID, random=bytes)


def test_one_share_of_a_report_says_nothing_of_the_update():
    """Shares of nothing and of the largest update are alike: each eighth of the field is hit as often.

    With 2000 elements a share, an eighth has 250 +- 14.8: one of the 80 counts lies more than 6.5 standard deviations
    (96) away once in 10^8 runs. A share that was the update itself would have all elements in one eighth or two.
    """
    field = Field.by_name("m61")
    for update in (np.zeros(2000, np.float32), np.full(2000, 1.0, np.float32)):
        assignment = secure_assignment(max_report_bytes=1 << 24)
        for share in opened_shares(report_of(assignment, update), assignment, 2000, CURVE).values():
            counts = np.bincount(np.array(share >> np.uint64(field.bits - 3), np.int64), minlength=8)
            assert np.all(np.abs(counts - 2001 / 8) < 96), counts


# --- the device's own noise --------------------------------------------------------------------------------------


def noisy_plan(**changes: Any) -> SecurePlan:
    return make_plan(noise="devices", noise_variance="90001/4", **changes)


def test_a_device_adds_noise_of_the_stated_variance_to_what_it_clipped():
    update = np.linspace(-1, 1, 4000, dtype=np.float32)
    noise = (private_codes(noisy_plan(), update) - encode_clipped(update, make_plan().bounds)).astype(float)
    # The sum of squares over the variance is chi-squared of 4000 degrees: 6.5 standard deviations are 0.145.
    assert abs(np.mean(noise**2) / (90001 / 4) - 1) < 0.145
    assert abs(np.mean(noise)) < 6.5 * 150 / np.sqrt(4000)
    assert len(set(noise)) > 300


def test_the_noise_is_the_exact_samplers_and_the_indicator_has_its_own():
    update = np.array([0.5, -0.25, 0.0], np.float32)
    plan = noisy_plan(indicator_norm=1.0, indicator_variance="7")
    source = Source()
    found = private_codes(plan, update, random=source)
    indicator, _mask, codes, *_seeds = source.given
    expected = encode_clipped(update, plan.bounds) + sample(3, Fraction(90001, 4), lambda _: codes)
    assert found[:3].tolist() == expected.tolist()
    assert found[3] == 1 + sample(1, 7, lambda _: indicator)[0]


@pytest.mark.parametrize("noise", ["none", "aggregators"])
def test_a_device_adds_no_noise_where_others_do_or_nobody_does(noise: str):
    update = np.linspace(-1, 1, 100, dtype=np.float32)
    plan = make_plan(noise=noise, indicator_norm=2.0)
    assert private_codes(plan, update)[:-1].tolist() == encode_clipped(update, plan.bounds).tolist()


@given(
    UPDATES,
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from(["m61", "m127"]),
    st.binary(min_size=8),
)
@settings(max_examples=30)
def test_native_kernels_and_numpy_make_the_same_shares(update, noisy, indicator, packing, field, seed):
    changes: dict[str, Any] = {"packing": packing, "field": field, "indicator_norm": 1.0 if indicator else None}
    if noisy:
        changes |= {"noise": "devices", "noise_variance": "17/3", "indicator_variance": "2" if indicator else None}
    plan = make_plan(**changes)
    layout = SecureLayout.of(plan, len(update))
    made = []
    for kernels in (PlainKernels(), load_kernels()):
        stream = itertools.count()
        shares = private_shares(
            plan,
            layout,
            update,
            random=lambda size, stream=stream: hashlib.shake_256(seed + bytes([next(stream)])).digest(size),
            kernels=kernels,
        )
        made.append(encode_shares(shares, layout))
    assert made[0] == made[1]


# --- before it trains --------------------------------------------------------------------------------------------


def test_a_report_that_cannot_fit_is_found_out_before_training():
    needed = layout_of(secure_assignment(), NUM_PARAMETERS).max_frame_bytes
    check_reportable(secure_assignment(max_report_bytes=needed), NUM_PARAMETERS)
    with pytest.raises(BundleMismatch, match="does not fit"):
        check_reportable(secure_assignment(max_report_bytes=needed - 1), NUM_PARAMETERS)


@pytest.mark.parametrize("line", ["topk:0.5", "quantize:8", "randomk:0.5,feedback=on"])
def test_a_compression_that_cannot_be_shared_is_found_out_before_training(line: str):
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        check_reportable(secure_assignment(compression=line, compression_seed=1), NUM_PARAMETERS)


def test_nothing_is_sealed_to_a_key_of_low_order():
    plan = make_plan()
    keys = (*plan.aggregator_keys[:4], "00" * 32)
    with pytest.raises(InvalidSealingKey):
        report_of(secure_assignment(plan=plan.model_copy(update={"aggregator_keys": keys})), np.ones(3, np.float32))


# --- hostile hands between device and aggregator -----------------------------------------------------------------


def test_a_share_opens_for_its_own_aggregator_only():
    """Swapped shares, and a share under the index of another: whoever relays them cannot mix them up unnoticed."""
    assignment = secure_assignment()
    layout = layout_of(assignment, 9)
    ciphertexts = split_secure_report(decode_frame(report_of(assignment, np.ones(9, np.float32))), layout)
    for share, holder in itertools.permutations(range(1, 6), 2):
        with pytest.raises(SealingFailed):
            opened_share(ciphertexts[share - 1], assignment, layout, CURVE[holder - 1], holder)
        with pytest.raises(SealingFailed):
            opened_share(ciphertexts[share - 1], assignment, layout, CURVE[share - 1], holder)


def test_a_device_that_seals_anothers_share_to_an_aggregator_is_noticed_where_the_kind_differs():
    """Of a share of the right kind the parity check tells; here even the form is wrong."""
    assignment, plan = secure_assignment(), make_plan()
    layout = layout_of(assignment, 3)
    shares = opened_shares(report_of(assignment, np.ones(3, np.float32)), assignment, 3, CURVE)
    forged = b"\x01" + layout.scheme.field.to_bytes(shares[5])
    with pytest.raises(MalformedShare):
        forge(assignment, plan, layout, forged, 1)
    assert np.array_equal(forge(assignment, plan, layout, forged, 4), shares[5])


def forge(assignment: Assignment, plan: SecurePlan, layout: SecureLayout, plaintext: bytes, index: int) -> np.ndarray:
    """What aggregator ``index`` makes of bytes that a device sealed to it properly."""
    ciphertext = sealing.seal(plaintext, plan.public_keys[index - 1], info_for(assignment, index))
    return opened_share(ciphertext, assignment, layout, CURVE[index - 1], index)


@pytest.mark.parametrize(
    "changes",
    [
        {"assignment_id": "b" * 32},
        {"task_id": "b" * 32},
        {"model_version": 1},
        {"parameter_table_sha256": "b" * 64},
        {"secure": make_plan(clip_norm=0.5)},
        {"secure": make_plan(fraction_bits=23)},
        {"secure": make_plan(threshold=2)},
        {"secure": make_plan(noise="devices", noise_variance="9")},
        {"secure": make_plan(max_participations=9)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_report_replayed_for_anything_else_opens_nowhere(changes: dict[str, Any]):
    assignment = secure_assignment()
    layout = layout_of(assignment, 9)
    ciphertexts = split_secure_report(decode_frame(report_of(assignment, np.ones(9, np.float32))), layout)
    other = assignment.model_copy(update=changes)
    for index, ciphertext in enumerate(ciphertexts, 1):
        assert len(opened_share(ciphertext, assignment, layout, CURVE[index - 1], index)) == 10
        with pytest.raises(SealingFailed):
            opened_share(ciphertext, other, layout, CURVE[index - 1], index)


# --- the life of a device ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class Phone:
    """A device and its server; a ``client`` on the same store is a new process."""

    def __init__(self, store: MemoryDeviceStore | FileDeviceStore, work: int = 1, **plan: Any) -> None:
        self.server = ToyServer(work=work)
        self.server.amend |= {"encoding": I64SharesEncoding(), "secure": make_plan(**plan)}
        self.store = store
        self.transport = self.server.device(store.identity.device_id)
        self.program = ToyProgram(self.server.manifest)

    def client(self, **changes: Any) -> MobileClient:
        return MobileClient(
            self.program,
            DeviceProfile("phone", DeviceTier.LOW_END),
            data=make_data(),
            transport=self.transport,
            store=self.store,
            policy=RetryPolicy(max_attempts=2),
            wait=lambda _delay, _stop: None,
            **changes,
        )

    def run_killed_at_upload(self, when: str = "before") -> bytes:
        """Run until the report is to be sent (or was received), and return what is sealed then."""

        def kill(request: str) -> None:
            if request == "upload":
                raise Killed

        setattr(self.server, when, kill)
        with pytest.raises(Killed):
            self.client().run()
        setattr(self.server, when, lambda _: None)
        sealed = self.store.sealed(self.report_id)
        assert sealed is not None
        return bytes(sealed)

    @property
    def report_id(self) -> str:
        """Of the first assignment."""
        return self.store.identity.report_id(make_assignment(1).assignment_id)

    def frames(self) -> list[bytes]:
        return [frame for _, frame in self.server.reports.values()]


def trained_codes(phone: Phone, assignment: Assignment) -> np.ndarray:
    """The clipped update that an honest device sends, computed without the client."""
    weights = np.frombuffer(decode_frame(phone.server.model).payload, np.float32)
    result = LocalTrainer(ToyProgram()).train(weights, *make_data(), assignment.plan, assignment.shuffle_seed)
    assert assignment.secure is not None
    return encode_clipped(result.delta, assignment.secure.bounds)


def test_a_device_trains_seals_and_delivers_what_its_aggregators_open():
    phone = Phone(MemoryDeviceStore(), work=2)
    summary = phone.client(aggregator_keys=[key.public.hex for key in CURVE]).run()
    assert (summary.cause, summary.reports) == ("finished", 2)
    for number, frame in enumerate(phone.frames(), 1):
        assignment = make_assignment(number, **phone.server.hashes | phone.server.amend)
        expected = trained_codes(phone, assignment)
        device_id = phone.store.identity.device_id
        opened = opened_codes(frame, assignment, NUM_PARAMETERS, CURVE, device_id=device_id)
        assert opened.tolist() == expected.tolist()
        with pytest.raises(SealingFailed):
            opened_codes(frame, assignment, NUM_PARAMETERS, CURVE, device_id=DEVICE_ID)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_device_killed_between_sealing_and_acknowledgement_sends_the_same_bytes(when: str, tmp_path):
    store = FileDeviceStore(tmp_path / "state")
    phone = Phone(store)
    sealed = phone.run_killed_at_upload(when)
    runs = phone.program.runs
    assert phone.client().run().reports == 1
    assert phone.frames() == [sealed]
    assert phone.program.runs == runs
    store.close()


def test_a_device_killed_before_its_report_is_durable_has_sent_nothing_and_counts_once(monkeypatch):
    phone = Phone(MemoryDeviceStore(), max_participations=1)
    drawn = []

    def kill(report_id: str, frame: bytes) -> None:
        drawn.append(bytes(frame))
        raise Killed

    monkeypatch.setattr(phone.store, "seal", kill)
    with pytest.raises(Killed):
        phone.client().run()
    monkeypatch.undo()
    assert phone.client().run().reports == 1
    assert phone.frames() != drawn
    assert phone.store.participations("f" * 32, besides="") == 1


def test_a_device_takes_part_as_often_as_the_plan_says_then_gives_back_and_says_why():
    phone = Phone(MemoryDeviceStore(), work=5, max_participations=2)
    summary = phone.client().run()
    assert (summary.cause, summary.reports) == ("refused", 2)
    assert isinstance(summary.error, ParticipationsSpent)
    assert "allows a device 2 reports" in summary.detail
    assert [reason for _, reason in phone.server.abandoned] == ["privacy"]
    runs = phone.program.runs
    again = phone.client().run()
    assert (again.cause, again.reports, phone.program.runs) == ("refused", 0, runs)


def test_an_assignment_that_is_abandoned_before_it_is_sealed_is_no_participation():
    phone = Phone(MemoryDeviceStore(), work=2, max_participations=1)

    def fail() -> None:
        raise ProgramExecutionError("no kernel")

    phone.program.before_run = fail
    client = phone.client()
    with pytest.raises(ProgramExecutionError):
        client.perform(client.check_in().assignment)
    phone.program.before_run = lambda: None
    assert phone.client().run().reports == 1


def test_a_report_sealed_to_others_is_not_sent_by_a_device_that_was_told_whom_to_trust():
    phone = Phone(MemoryDeviceStore())
    phone.run_killed_at_upload()
    summary = phone.client(aggregator_keys=["0" * 64, "1" * 64]).run()
    assert summary.cause == "refused"
    assert phone.frames() == []


def test_a_damaged_sealed_report_is_made_again_and_counts_once():
    phone = Phone(MemoryDeviceStore(), max_participations=1)
    sealed = phone.run_killed_at_upload()
    phone.store.seal(phone.report_id, sealed[:-1])
    assert phone.client().run().reports == 1
    assert phone.frames() != [sealed]


def test_an_update_sent_after_a_restart_is_told_with_its_plain_size():
    phone, told = Phone(MemoryDeviceStore()), []
    phone.run_killed_at_upload()
    phone.client(on_event=told.append).run()
    (uploaded,) = [event for event in told if isinstance(event, events.Uploaded)]
    assert uploaded.dense_bytes == 4 * NUM_PARAMETERS
