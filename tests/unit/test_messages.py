"""The control messages: closed schemas, bounded values, one JSON form."""

from __future__ import annotations

import contextlib
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from client_sdk.protocol import messages as m
from client_sdk.protocol.errors import PROBLEM_PREFIX, ProtocolError, ServerBusy, StaleReport, from_problem
from client_sdk.protocol.profile import DeviceTier
from client_sdk.protocol.sealing import SealingKey, SealingSuite
from client_sdk.protocol.updates import UpdateKind
from tests.devices import WAIT, make_assignment
from tests.vectors.generate import PLAN

ID, HASH = "0123456789abcdef" * 2, "0123456789abcdef" * 4
ASSIGNMENT = make_assignment(1).model_dump(mode="json")
MODEL = {name: ASSIGNMENT[name] for name in m.ModelReply.model_fields}
FACTS = {
    "report_id": ID,
    "assignment_id": ID,
    "model_version": "3",
    "parameter_table_sha256": HASH,
    "kind": "delta",
    "encoding": "f32",
    "algorithm": "fedavg",
    "compression": "none",
    "compression_seed": "0",
    "steps": "10",
    "train_loss": "0.125",
}
GOOD: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (m.EnrolRequest, {"public_key": HASH, "tier": "low_end"}),
    (m.EnrolReply, {"device_id": ID, "server_key": HASH}),
    (m.CheckInRequest, {"num_samples": 1}),
    (m.CheckInRequest, {"num_samples": 10**9, "virtual": {"now_s": 0.5, "duration_s": None}}),
    (m.CheckInReply, {"reply": {"status": "assigned", "assignment": ASSIGNMENT}}),
    (m.CheckInReply, {"reply": WAIT.model_dump(mode="json")}),
    (m.CheckInReply, {"reply": {"status": "finished", "model_version": 0}}),
    (m.ModelReply, MODEL),
    (m.ReportReply, {"report_id": ID, "assignment_id": ID}),
    (m.ReportFacts, FACTS),
    (m.ReportFacts, FACTS | {"encoding": "i64-shares", "train_loss": "withheld"}),
    (m.AbandonRequest, {"reason": "no-memory"}),
    (m.AbandonRequest, {"reason": "privacy"}),
    (m.AbandonRequest, {}),
    (m.Problem, {"type": "about:blank", "title": "x", "status": 400, "anything": "else"}),
]


@pytest.mark.parametrize(("model", "content"), GOOD, ids=lambda v: getattr(v, "__name__", None))
def test_a_message_survives_its_json(model: type[BaseModel], content: dict[str, Any]):
    message = model.model_validate_json(json.dumps(content))
    text = message.model_dump_json()
    assert model.model_validate_json(text) == message
    assert model.model_validate_json(text).model_dump_json() == text
    assert len(text) < m.MAX_JSON_BYTES


@pytest.mark.parametrize(("model", "content"), GOOD[:-1], ids=lambda v: getattr(v, "__name__", None))
def test_messages_are_closed_and_frozen(model: type[BaseModel], content: dict[str, Any]):
    with pytest.raises(ValidationError, match="extra"):
        model.model_validate_json(json.dumps(content | {"surprise": 1}))
    message = model.model_validate_json(json.dumps(content))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(message, next(iter(model.model_fields)), None)


def changed(path: str, value: object) -> dict[str, Any]:
    """The assignment with one value replaced (or removed, for Ellipsis)."""
    content = json.loads(json.dumps(ASSIGNMENT))
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


BAD: list[tuple[type[BaseModel], object]] = [
    (m.EnrolRequest, {}),
    (m.EnrolRequest, {"public_key": HASH[:-1]}),
    (m.EnrolRequest, {"public_key": HASH.upper()}),
    (m.EnrolRequest, {"public_key": HASH + "\n"}),
    (m.EnrolRequest, {"public_key": HASH, "tier": "laptop"}),
    (m.EnrolRequest, {"public_key": HASH, "protocol_version": 2}),
    (m.EnrolReply, {"device_id": ID + "0"}),
    (m.EnrolReply, {"device_id": 5}),
    (m.CheckInRequest, {"num_samples": 0}),
    (m.CheckInRequest, {"num_samples": -1}),
    (m.CheckInRequest, {"num_samples": 10**9 + 1}),
    (m.CheckInRequest, {"num_samples": 1.5}),
    (m.CheckInRequest, {"num_samples": None}),
    (m.CheckInRequest, {"num_samples": True}),
    (m.CheckInRequest, {"num_samples": "5"}),
    (m.CheckInRequest, {"num_samples": 5.0}),
    (m.CheckInRequest, {"num_samples": 5, "virtual": {"now_s": "1", "duration_s": 1}}),
    (m.CheckInRequest, {"num_samples": 5, "virtual": {"now_s": True, "duration_s": 1}}),
    (m.CheckInRequest, {"num_samples": 1, "virtual": {"now_s": -1, "duration_s": 1}}),
    (m.CheckInRequest, {"num_samples": 1, "virtual": {"now_s": 1e10, "duration_s": 1}}),
    (m.CheckInRequest, {"num_samples": 1, "virtual": {"now_s": 1}}),
    (m.CheckInRequest, []),
    (m.CheckInReply, {"reply": {"status": "maybe"}}),
    (m.CheckInReply, {"reply": {}}),
    (m.CheckInReply, {"status": "finished", "model_version": 1}),
    (m.CheckInReply, {"reply": {"status": "wait", "reason": "tea", "retry": {"min_s": 0, "max_s": 1}}}),
    (m.RetryWindow, {"min_s": 2, "max_s": 1}),
    (m.RetryWindow, {"min_s": -1, "max_s": 1}),
    (m.RetryWindow, {"min_s": 0, "max_s": 2e9}),
    (m.Assignment, changed("weight", 0)),
    (m.Assignment, changed("assignment_number", -1)),
    (m.Assignment, changed("shuffle_seed", 2**53)),
    (m.Assignment, changed("max_report_bytes", 0)),
    (m.Assignment, changed("lease_s", -1)),
    (m.Assignment, changed("kind", "weights")),
    (m.Assignment, changed("model_sha256", "x" * 64)),
    (m.Assignment, changed("model_sha256", "../../etc/passwd")),
    (m.Assignment, changed("plan", ...)),
    (m.Assignment, changed("plan.batch_size", 0)),
    (m.Assignment, changed("plan.batch_size", 10**6)),
    (m.Assignment, changed("plan.local_epochs", 1001)),
    (m.Assignment, changed("plan.learning_rate", 0)),
    (m.Assignment, changed("plan.learning_rate", -0.1)),
    (m.Assignment, changed("plan.prox_mu", -1)),
    (m.Assignment, changed("plan.momentum", 0.9)),
    (m.Assignment, changed("plan.algorithm", "fedprox")),
    (m.Assignment, changed("plan.algorithm", "scaffold")),
    (m.Assignment, changed("control_sha256", HASH)),
    (m.Assignment, changed("compression", "")),
    (m.Assignment, changed("compression", "x" * 129)),
    (m.Assignment, changed("compression_seed", 2**53)),
    (m.Assignment, changed("compression_seed", -1)),
    (m.Assignment, changed("encoding.name", "f16")),
    (m.Assignment, changed("encoding.max_abs", 0)),
    (m.AbandonRequest, {"reason": "bored"}),
    *((m.ModelReply, {k: v for k, v in MODEL.items() if k != missing}) for missing in MODEL),
    (m.ReportFacts, FACTS | {"model_version": "-1"}),
    (m.ReportFacts, FACTS | {"model_version": "1" * 19}),
    (m.ReportFacts, FACTS | {"model_version": 3}),
    (m.ReportFacts, FACTS | {"train_loss": "nan"}),
    (m.ReportFacts, FACTS | {"train_loss": "inf"}),
    (m.ReportFacts, FACTS | {"train_loss": "withheld\n"}),
    (m.ReportFacts, FACTS | {"train_loss": "withheld1"}),
    (m.ReportFacts, FACTS | {"train_loss": "0" * 33}),
    (m.ReportFacts, FACTS | {"steps": "1.5"}),
    (m.ReportFacts, FACTS | {"steps": "3\n"}),
    (m.ReportFacts, FACTS | {"steps": "0"}),
    (m.ReportFacts, FACTS | {"steps": "010"}),
    (m.ReportFacts, FACTS | {"algorithm": "fedprox"}),
    (m.ReportFacts, FACTS | {"compression": ""}),
    (m.ReportFacts, FACTS | {"compression": "caf\u00e9"}),
    (m.ReportFacts, FACTS | {"compression_seed": "-1"}),
    (m.ReportFacts, FACTS | {"compression_seed": "00"}),
    (m.ReportFacts, FACTS | {"protocol_version": "2"}),
    *((m.ReportFacts, {k: v for k, v in FACTS.items() if k != missing}) for missing in FACTS),
]


@pytest.mark.parametrize(("model", "content"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_values_out_of_bounds_are_refused(model: type[BaseModel], content: object):
    with pytest.raises(ValidationError):
        model.model_validate_json(json.dumps(content))


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(token: str):
    for model, text in (
        (m.RetryWindow, f'{{"min_s": 0, "max_s": {token}}}'),
        (m.F32Encoding, f'{{"max_abs": {token}}}'),
        (m.VirtualTiming, f'{{"now_s": {token}, "duration_s": null}}'),
    ):
        with pytest.raises(ValidationError):
            model.model_validate_json(text)


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 50_000,
        b'{"num_samples":' * 20_000,
        b'{"num_samples":' + b"9" * 60_000 + b"}",
        b'{"num_samples":1e' + b"9" * 1000 + b"}",
        b"",
        b"\x00",
        b"\xff\xfe{",
        b'{"num_samples":1}{"num_samples":1}',
        b'{"num_samples":1',
    ],
    ids=lambda b: f"{b[:12]!r}-{len(b)}",
)
def test_json_bombs_and_garbage_are_refused(bomb: bytes):
    with pytest.raises(ValidationError):
        m.CheckInRequest.model_validate_json(bomb)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda c: st.dictionaries(st.sampled_from(["reply", "status", "assignment", "retry", "min_s"]), c, max_size=4),
    )
)
def test_any_json_is_a_reply_or_a_validation_error(content: object):
    with contextlib.suppress(ValidationError):
        m.CheckInReply.model_validate_json(json.dumps(content))


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_loss_can_be_reported(loss: float):
    facts = m.ReportFacts.model_validate(FACTS | {"train_loss": repr(loss)})
    assert float(facts.train_loss) == loss


def test_facts_travel_as_strings_only():
    facts = m.ReportFacts.model_validate(FACTS)
    assert all(isinstance(v, str) for v in facts.model_dump(mode="json").values())
    assert facts.kind is UpdateKind.DELTA


# --- secure plans ---


def secure_plan(suite: SealingSuite, count: int, **changes: Any) -> m.SecurePlan:
    keys = tuple(SealingKey.generate(suite).public.hex for _ in range(count))
    return m.SecurePlan(fraction_bits=24, clip_norm=1.0, suite=suite, aggregator_keys=keys, **changes)


@pytest.mark.parametrize(("suite", "count"), [(SealingSuite.X25519, 64), (SealingSuite.MLKEM768_X25519, 16)])
def test_an_assignment_with_the_most_keys_is_still_a_small_message(suite: SealingSuite, count: int):
    assignment = make_assignment(1, encoding=m.I64SharesEncoding(), secure=secure_plan(suite, count))
    text = m.CheckInReply(reply=m.Assigned(assignment=assignment)).model_dump_json()
    assert len(text) < m.MAX_JSON_BYTES
    with pytest.raises(ValidationError, match=r"fit into a message|at most 64"):
        secure_plan(suite, count + 1)


def test_a_plan_says_its_bounds_and_keys():
    plan = secure_plan(SealingSuite.X25519, 5)
    assert plan.num_aggregators == 5
    assert plan.bounds.norm_bound == 1 << 24
    assert [key.hex for key in plan.public_keys] == list(plan.aggregator_keys)


VARIANCES = st.builds(Fraction, st.integers(1, 10**99), st.integers(1, 10**99))


@given(variance=VARIANCES, indicator=VARIANCES)
def test_every_variance_travels_exactly(variance: Fraction, indicator: Fraction):
    fields = PLAN.model_dump() | {"noise": "devices", "indicator_norm": 1.0}
    plan = m.SecurePlan(**fields | {"noise_variance": str(variance), "indicator_variance": str(indicator)})
    back = m.SecurePlan.model_validate_json(plan.model_dump_json())
    assert (Fraction(back.noise_variance), Fraction(back.indicator_variance)) == (variance, indicator)


def test_who_shares_an_update_or_is_told_to_keeps_the_loss_to_itself():
    plain = make_assignment(1)
    assert not plain.withholds_loss
    assert plain.model_copy(update={"withhold_metrics": True}).withholds_loss
    assert make_assignment(1, encoding=m.I64SharesEncoding(), secure=PLAN).withholds_loss


# --- problems ---


def all_errors(cls: type[ProtocolError] = ProtocolError) -> list[type[ProtocolError]]:
    return [cls, *(e for sub in cls.__subclasses__() for e in all_errors(sub))]


@pytest.mark.parametrize("error", all_errors(), ids=lambda e: e.slug)
def test_an_error_comes_back_from_its_problem(error: type[ProtocolError]):
    back = from_problem(error("why").type_uri, "why", http_status=error.http_status)
    assert type(back) is error
    assert str(back) == "why"


def test_slugs_are_unique_and_stable_in_form():
    slugs = [e.slug for e in all_errors()]
    assert len(set(slugs)) == len(slugs)
    assert all(slug == slug.lower() and " " not in slug for slug in slugs)


def test_what_a_newer_server_says_is_still_told_apart():
    new = PROBLEM_PREFIX + "from-the-future"
    assert isinstance(from_problem(new, http_status=503), ServerBusy)
    permanent = from_problem(new, http_status=409)
    assert type(permanent) is ProtocolError
    assert not permanent.retryable
    assert "from-the-future" in str(permanent)


def test_an_error_without_detail_says_its_title():
    assert str(StaleReport()) == StaleReport.title
    assert DeviceTier("low_end") is DeviceTier.LOW_END
