"""Feed damaged bytes to every parser: ``make fuzz``.

A case is a seed and a number, so that it can be run again: what fails is printed with both, and the bytes. A parser may
accept, or refuse with one of its typed errors; it must not allocate beyond its bound nor compute for longer than
``CPU_SECONDS``.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from tests.fuzz.parsers import NotACase, Parser, all_parsers

CPU_SECONDS = 10.0
MOST_BYTES = 1 << 16
_NUMBERS = (
    b"0",
    b"-1",
    b"1e400",
    b"-0",
    b"9" * 30,
    b"18446744073709551616",
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
)
_TOKENS = (
    b'"',
    b"\\",
    b"\\ud800",
    b"\x00",
    b"[" * 2000,
    b"{",
    b"}",
    b",",
    b":",
    b'"__metadata__":',
    b"\xff",
    b"=",
    b";",
)


class Hang(Exception):
    """A case took more processor time than any may."""


class Failed(AssertionError):
    """A case that ended in none of the ways that it may."""


@dataclass
class Tally:
    """How the cases of one parser ended."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


def damaged(corpus: Sequence[bytes], draw: random.Random) -> bytes:
    """One to four changes to an input of the corpus: bits, bytes, words, lengths, digits, tokens, cuts and splices."""
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        change = draw.randrange(11)
        if change < 5:
            _overwrite(data, at, change, draw)
        else:
            _rearrange(data, at, change, corpus, draw)
        del data[MOST_BYTES:]
    return bytes(data)


def _overwrite(data: bytearray, at: int, change: int, draw: random.Random) -> None:
    match change:
        case 0 if data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        case 1 if data:
            data[at % len(data)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        case 2:
            word = draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
            data[at : at + 8] = word.to_bytes(8, "little")
        case 3:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57] or [at]
            place = draw.choice(digits)
            data[place : place + 1] = draw.choice(_NUMBERS)
        case _:
            data[: 8 if len(data) >= 8 else 0] = draw.randrange(2 * len(data) + 1).to_bytes(8, "little")


def _rearrange(data: bytearray, at: int, change: int, corpus: Sequence[bytes], draw: random.Random) -> None:
    match change:
        case 5:
            del data[at:]
        case 6:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 8, 64)))
        case 7:
            del data[at : at + draw.choice((1, 2, 8, 64))]
        case 8:
            other = draw.choice(corpus)
            data[at:] = other[draw.randrange(len(other) + 1) :]
        case 9:
            data[at:at] = draw.choice(_TOKENS)
        case _:
            data[at:at] = data[at : at + draw.choice((1, 8, 32, 256))] * draw.choice((1, 2, 50))


@contextmanager
def at_most(cpu_seconds: float) -> Iterator[None]:
    """Raise ``Hang`` when the body has used that much processor time; the clock on the wall does not matter."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"more than {cpu_seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def try_case(parser: Parser, data: bytes, tally: Tally) -> None:
    """One input.

    Raises:
        Failed: It ended in another error, took too long, or too much memory.
    """
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        with at_most(CPU_SECONDS):
            parser.parse(data)
    except NotACase:
        return
    except parser.refusals as e:
        tally.refused[type(e).__name__] += 1
    except Exception as e:
        raise Failed(f"{parser.name}: {type(e).__name__}: {e}") from e
    else:
        tally.accepted += 1
    used = tracemalloc.get_traced_memory()[1] - before
    tally.peak_bytes = max(tally.peak_bytes, used)
    if used > parser.peak_bytes:
        raise Failed(f"{parser.name}: {used} bytes for an input of {len(data)}")


def fuzz(parser: Parser, seed: int, cases: int) -> Tally:
    """Run the cases 0 .. ``cases`` of a seed.

    Raises:
        Failed: With the case, and its bytes.
    """
    tally = Tally()
    tracemalloc.start()
    try:
        for case in range(cases):
            key = hashlib.sha256(f"{parser.name}/{seed}/{case}".encode()).digest()
            data = damaged(parser.corpus, random.Random(key))
            try:
                try_case(parser, data, tally)
            except Failed as e:
                raise Failed(f"{e}\ncase {case} of seed {seed}: {data.hex()}") from e
    finally:
        tracemalloc.stop()
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz the chosen parsers, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="for each parser (default: 20000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="parsers whose name contains this")
    options = parser.parse_args(arguments)
    status = 0
    for each in all_parsers():
        if options.only not in each.name:
            continue
        try:
            tally = fuzz(each, options.seed, options.cases)
        except Failed as e:
            print(f"FAILED {e}")
            status = 1
        else:
            refused = ", ".join(f"{name} {count}" for name, count in tally.refused.most_common())
            print(f"{each.name}: accepted {tally.accepted}; {refused}; peak {tally.peak_bytes} bytes", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
