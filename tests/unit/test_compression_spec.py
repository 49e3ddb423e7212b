"""The specification of compression: its one-line form, and what makes no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client_sdk.protocol.compression import CompressionMethod, CompressionSpec
from client_sdk.protocol.compression.spec import ACCEPTED
from client_sdk.protocol.errors import ConfigurationError

M = CompressionMethod
shares = st.floats(0, 1, exclude_min=True)
positive = st.floats(0, 3.4028234663852886e38, exclude_min=True)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, object]:
    """Fields of a specification that makes sense."""
    method = draw(st.sampled_from(M))
    bits = draw(st.sampled_from([32, 8, 4, 1]))
    found: dict[str, object] = {"method": method, "value_bits": bits}
    if bits != 32:
        found["block"] = draw(st.integers(1, 2**31 - 1))
    if method is M.THRESHOLD:
        found["threshold"] = draw(positive)
    if method in {M.TOPK, M.RANDOMK}:
        found["ratio"] = draw(shares)
    if method is M.COUNT_SKETCH:
        found["rows"] = draw(st.integers(0, 15)) * 2 + 1
        found["recover"] = draw(st.none() | shares)
        found |= draw(st.one_of(shares.map(lambda r: {"ratio": r}), st.integers(1, 1000).map(lambda c: {"columns": c})))
    else:
        found["error_feedback"] = draw(st.booleans()) and not (method is M.NONE and bits == 32)
    if method is M.RANDOMK or (method is M.NONE and bits != 32):
        found["rotation"] = draw(st.booleans())
    return found


@given(fields(), fields())
def test_the_line_is_read_back_and_tells_specifications_apart(one: dict[str, object], other: dict[str, object]):
    a, b = CompressionSpec(**one), CompressionSpec(**other)
    assert CompressionSpec.parse(str(a)) == a
    assert (str(a) == str(b)) == (a == b)


@given(fields())
def test_the_json_form_is_read_back(found: dict[str, object]):
    spec = CompressionSpec(**found)
    assert CompressionSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("line", "canonical"),
    [
        ("none", "none"),
        ("topk:0.01", "topk:0.01"),
        ("topk:1e-2", "topk:0.01"),
        ("topk:1.0", "topk:1"),
        ("topk:0.01,bits=8", "topk:0.01,bits=8"),
        ("topk:0.01,bits=32", "topk:0.01"),
        ("topk:0.01,feedback=on", "topk:0.01"),
        ("topk:0.01,feedback=off", "topk:0.01,feedback=off"),
        (" randomk:0.1, rotate, bits=4 ", "randomk:0.1,bits=4,rotate"),
        ("randomk:0.1,feedback=off", "randomk:0.1"),
        ("threshold:1e-3", "threshold:0.001"),
        ("sketch:0.05", "sketch:0.05,rows=5"),
        ("count-sketch:0.05,rows=3", "sketch:0.05,rows=3"),
        ("sketch,columns=100,recover=0.01", "sketch,rows=5,columns=100,recover=0.01"),
        ("quantize:8", "quantize:8"),
        ("quantize:4,rotate,block=64", "quantize:4,block=64,rotate"),
    ],
)
def test_a_line_has_one_canonical_form(line: str, canonical: str):
    assert str(CompressionSpec.parse(line)) == canonical


def test_the_fields_of_a_line():
    assert CompressionSpec.parse("randomk:0.1,rotate,bits=4") == CompressionSpec(
        method=M.RANDOMK, ratio=0.1, rotation=True, value_bits=4, error_feedback=False
    )
    assert CompressionSpec.parse("quantize:1") == CompressionSpec(method=M.NONE, value_bits=1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "no method"),
        ("gzip:9", "no method 'gzip:9'"),
        ("topk", "topk needs a ratio"),
        ("topk:", "no method 'topk:'"),
        ("topk:0", "greater than 0"),
        ("topk:1.5", "less than or equal to 1"),
        ("topk:nan", "ratio"),
        ("topk:a", "could not convert"),
        ("topk:0.1,", "no option ''"),
        ("topk:0.1,bits=16", "32, 8, 4 or 1"),
        ("topk:0.1,bits=8,bits=8", "twice"),
        ("topk:0.1,rows=3", "with a sketch only"),
        ("topk:0.1,rotate", "no large values to choose"),
        ("topk:0.1,rotate=yes", "no option"),
        ("topk:0.1,feedback=maybe", "no option"),
        ("topk:0.1,block=64", "fewer than 32 bits"),
        ("threshold", "threshold goes with"),
        ("threshold:0", "greater than 0"),
        ("threshold:1e39", "threshold"),
        ("threshold:1,rotate", "no large values to choose"),
        ("sketch", "ratio or by columns"),
        ("sketch:0.1,columns=3", "not by both"),
        ("sketch:0.1,rows=4", "odd"),
        ("sketch:0.1,rotate", "gains a sketch nothing"),
        ("sketch:0.1,feedback=on", "feedback=off"),
        ("quantize", "quantize needs bits"),
        ("quantize:x", "invalid literal"),
        ("quantize:32", "float32 is called none"),
        ("quantize:2", "32, 8, 4 or 1"),
        ("none:0.5", "no ratio"),
        ("none,rotate", "all go out as float32"),
        ("none,feedback=on", "nothing is lost"),
    ],
)
def test_a_line_that_makes_no_sense_says_why_and_what_is_accepted(line: str, why: str):
    with pytest.raises(ConfigurationError) as caught:
        CompressionSpec.parse(line)
    assert why in str(caught.value)
    assert str(caught.value).endswith(ACCEPTED)


@pytest.mark.parametrize(
    "found",
    [
        {"method": M.TOPK},
        {"method": M.NONE, "ratio": 0.5},
        {"method": M.TOPK, "ratio": 0.5, "threshold": 1.0},
        {"method": M.TOPK, "ratio": "0.5"},
        {"method": M.TOPK, "ratio": 0.5, "bits": 8},
        {"method": "topk", "ratio": 0.5},
        {"method": M.TOPK, "ratio": True},
    ],
)
def test_fields_that_make_no_sense_are_refused(found: dict[str, object]):
    with pytest.raises(ValidationError):
        CompressionSpec(**found)


def test_feedback_is_on_where_the_choice_is_biased():
    lines = ("none", "quantize:8", "topk:0.1", "randomk:0.1", "threshold:1", "sketch:0.1")
    assert [line for line in lines if CompressionSpec.parse(line).error_feedback] == ["topk:0.1", "threshold:1"]


def test_a_specification_cannot_be_changed():
    spec = CompressionSpec.parse("topk:0.1")
    with pytest.raises(ValidationError):
        spec.ratio = 0.2
