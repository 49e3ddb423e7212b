"""The fuzzers find what they are for, and find nothing in the parsers; ``make fuzz`` looks for longer."""

from __future__ import annotations

import random

import pytest

from client_sdk.protocol.errors import MalformedFrame
from tests.fuzz import fuzz
from tests.fuzz.parsers import Parser, all_parsers

CASES = 60
CORPUS = (b"a corpus of one", b"or two 12")


@pytest.mark.parametrize("parser", all_parsers(), ids=lambda parser: parser.name)
def test_damaged_bytes_end_in_typed_errors(parser: Parser):
    tally = fuzz.fuzz(parser, seed=3, cases=CASES)
    assert tally.accepted + tally.refused.total() <= CASES
    assert tally.refused.total() > 0


def test_the_vectors_themselves_are_among_the_cases_and_are_read():
    frame = next(parser for parser in all_parsers() if parser.name == "frame")
    tally = fuzz.Tally()
    for data in frame.corpus:
        fuzz.try_case(frame, data, tally)
    assert tally.accepted > 0
    assert tally.refused.total() > 0


@pytest.mark.parametrize("error", [KeyError, RecursionError, MemoryError, AssertionError, UnicodeDecodeError])
def test_an_untyped_error_is_found_and_can_be_run_again(error: type[Exception]):
    def parse(data: bytes) -> None:
        if b"12" not in data:
            raise error("utf-8", data, 0, 1, "?") if error is UnicodeDecodeError else error("planted")

    with pytest.raises(fuzz.Failed, match=rf"planted-parser: {error.__name__}(.|\n)*case \d+ of seed 5") as found:
        fuzz.fuzz(Parser("planted-parser", CORPUS, parse), seed=5, cases=200)
    data = bytes.fromhex(str(found.value).rsplit(": ", 1)[1])
    with pytest.raises(error):
        parse(data)


def test_a_refusal_is_no_failure():
    def parse(_data: bytes) -> None:
        raise MalformedFrame("no")

    assert fuzz.fuzz(Parser("planted", CORPUS, parse), seed=1, cases=20).refused == {"MalformedFrame": 20}


def test_memory_beyond_the_bound_is_found():
    def parse(data: bytes) -> None:
        bytearray(2**20 if len(data) < 12 else 10)

    with pytest.raises(fuzz.Failed, match=r"planted: 10\d{5} bytes for an input of"):
        fuzz.fuzz(Parser("planted", CORPUS, parse, peak_bytes=2**19), seed=1, cases=200)


def test_a_loop_without_an_end_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.05)

    def parse(_data: bytes) -> None:
        while True:
            pass

    with pytest.raises(fuzz.Failed, match="processor time"):
        fuzz.fuzz(Parser("planted", CORPUS, parse), seed=1, cases=1)


def test_cases_follow_from_the_seed_and_differ():
    cases = [fuzz.damaged(CORPUS, random.Random(seed)) for seed in range(200)]
    assert cases == [fuzz.damaged(CORPUS, random.Random(seed)) for seed in range(200)]
    assert len(set(cases)) > 150
    assert max(map(len, cases)) <= fuzz.MOST_BYTES
